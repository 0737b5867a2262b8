"""The roofline against figures that were worked out apart from it."""

import dataclasses
import json

import pytest
import torch.nn.functional as F

import kernels
from bench import roofline
from bench.ceilings import Ceilings
from model import GPTConfig, flops_per_token, flops_per_token_causal
from model.gpt import count_parameters
from prepare import InputError
from train.config import TrainConfig, resolve
from train.tune.ops import micro_step_ops, recomputed_ops

CONFIG = resolve(TrainConfig(), "cuda")


def test_mfu_is_the_convention_over_the_time(capsys):
    total, mfu = roofline.report(CONFIG, GPTConfig(), roofline.GPUS["h200"])
    # 239.0784 MFLOP x 262,144 tokens / 989.5 TFLOP/s = 63.34 ms at 100 %.
    assert total * mfu == pytest.approx(6334, abs=1)
    out = capsys.readouterr().out
    assert "not a measurement" in out
    assert f"{total:.1f} ms" in out


def test_products_of_a_micro_step_add_up_to_six_flops_a_parameter():
    """All but attention, norms and embeddings: 6 x tokens x matrix parameters, less what the loss adds."""
    lines = list(roofline.micro_step(CONFIG, GPTConfig()))
    products = sum(line.count * line.flops for line in lines if line.name.startswith(("qkv_projection", "relu2_mlp")))
    products += sum(line.count * line.flops for line in lines if line.name.startswith("linear "))
    parameters = 8 * 12 * 512 * 512 + 4 * 4 * 32
    assert products == pytest.approx(6 * 262_144 * parameters)


def test_attention_counts_only_pairs_of_the_window():
    lines = [line for line in roofline.micro_step(CONFIG, GPTConfig()) if line.name.startswith("rotary_attention, ")]
    forward = sum(line.count * line.flops for line in lines if line.name.endswith("forward"))
    pairs = sum(sum(min(t, w) + 1 for t in range(2048)) for w in GPTConfig().windows)
    assert forward == 2 * 2 * 128 * 4 * 128 * pairs  # 2 products, a multiply-add is 2, head_dim, heads, rows


def test_five_heads_and_short_windows_by_hand():
    """9 layers of 640, SSSSL with the last L, an eighth of a row: seven short windows and two whole rows."""
    model = GPTConfig(short_window=8, depth=9, d_model=640, window_pattern="SSSSL")
    assert model.windows == [256] * 4 + [2048] + [256] * 3 + [2048]
    matrices = 9 * 12 * 640 * 640 + 5 * 5 * 32 + 640 * 8192
    pairs = 7 * (257 * 2048 - 256 * 257 // 2) + 2 * 2048 * 2049 // 2
    assert flops_per_token_causal(model) == 6 * matrices + 12 * 640 * pairs / 2048 == 325_572_000
    assert flops_per_token(model) == 6 * matrices + 12 * 640 * (7 * 256 + 2 * 2048) == 342_102_720
    config = resolve(TrainConfig(depth=9, d_model=640, total_batch_size=262_144), "cuda")
    lines = list(roofline.micro_step(config, model))
    attention = [line for line in lines if line.name.startswith("rotary_attention, ")]
    assert sum(line.count * line.flops for line in attention if line.name.endswith("forward")) == (
        2 * 2 * 128 * 5 * 128 * pairs
    )  # 2 products, a multiply-add is 2, head_dim, heads, rows
    products = [line for line in lines if line.name.startswith(("qkv_projection", "relu2_mlp", "linear "))]
    assert sum(line.count * line.flops for line in products) == pytest.approx(6 * ROWS * (matrices - 640 * 8192))


def test_options_of_train_make_the_step(monkeypatch, capsys):
    steps = []
    monkeypatch.setattr(roofline, "report", lambda config, model, gpu: steps.append((config, model)))
    assert roofline.main(["--depth", "9", "--d-model", "640", "--vocab-size", "100", "--gpu", "h100"]) == 0
    config = resolve(TrainConfig(depth=9, d_model=640), "cuda")
    assert steps == [(config, config.model_config(100))]
    for own in ("--config", "--measured"):
        with pytest.raises(SystemExit):
            roofline.main([own, "step.json", "--depth", "9"])
        assert "--depth: " in capsys.readouterr().err


def test_bytes_bind_where_bandwidth_is_low():
    slow = Ceilings(flops=1e18, bandwidth=1e9)
    fast = Ceilings(flops=1e9, bandwidth=1e18)
    line = roofline.Line("x", 2, bytes=1e9, flops=1e9)
    assert (line.bound(slow), line.bound(fast)) == ("bytes", "FLOPs")
    assert line.milliseconds(slow) == line.milliseconds(fast) == 2000


def test_layers_by_window_and_value_embedding():
    """SSSL SSSL: both L layers, the fourth and the last, are among those with a value embedding."""
    attention = [op for op in roofline.micro_step_ops(CONFIG, GPTConfig()) if op.module == "rotary_attention"]
    counts = {(op.sizes[5], dict(op.flags)["has_ve"]): op.count for op in attention}
    assert counts == {(1024, False): 4, (1024, True): 2, (2048, True): 2}
    ops = roofline.micro_step_ops(CONFIG, GPTConfig(key_offset=True))
    offsets = [(op.sizes[5], op.count) for op in ops if dict(op.flags).get("key_offset")]
    assert offsets == [(2048, 2)]


# By hand, from the shapes: milliseconds of all layers of the default model at 790 TFLOP/s and 4.3 TB/s. A product is
# 2·rows·K·N; what is bound by bytes says so.
ROWS = 262_144
BY_HAND = {
    "qkv_projection forward": 4 * 2 * ROWS * 512 * 1536 / 790e12,
    "qkv_projection, value gate backward": 4 * 4 * ROWS * (512 * 1536 + 4 * 32) / 790e12,
    "linear forward": 8 * (3 * ROWS * 512 + 512 * 512) * 2 / 4.3e12,  # bytes: x, residual, y
    "relu2_mlp forward": 8 * 4 * ROWS * 512 * 2048 / 790e12,
    "relu2_mlp backward": 8 * 8 * ROWS * 512 * 2048 / 790e12,
    "rms_norm forward": 10 * ROWS * (2 * 512 * 2 + 4) / 4.3e12,  # bytes: x, y, rstd
}
# The budget that was drawn up apart from this code, in milliseconds, rounded to a tenth there.
BUDGET = {
    ("qkv_projection", "forward"): 4.2, ("qkv_projection", "backward"): 8.4, ("linear ", "forward"): 1.5,
    ("relu2_mlp", "forward"): 11.2, ("relu2_mlp", "backward"): 22.4, ("rotary_attention", "forward"): 4.5,
    ("rotary_attention", "backward"): 11.3, ("linear_cross_entropy", "forward"): 2.8,
    ("linear_cross_entropy", "backward"): 5.6,
}  # fmt: skip


def test_the_table_by_hand():
    lines = {line.name: line.milliseconds(roofline.GPUS["h200"]) for line in roofline.micro_step(CONFIG, GPTConfig())}
    for name, seconds in BY_HAND.items():
        assert lines[name] == pytest.approx(1e3 * seconds, rel=1e-6), name
    for (op, direction), budget in BUDGET.items():
        total = sum(ms for name, ms in lines.items() if name.startswith(op) and name.endswith(direction))
        assert total == pytest.approx(budget, rel=0.01, abs=0.06), op
    embeddings = lines["embedding forward"] + lines["embedding backward"]
    assert embeddings == pytest.approx(0.6, abs=0.1)


@pytest.mark.parametrize(("vocab_size", "constant"), [(8192, 6334), (32768, 8334)])
def test_mfu_constant(capsys, vocab_size, constant):
    total, mfu = roofline.report(CONFIG, CONFIG.model_config(vocab_size), roofline.GPUS["h100"])
    assert total * mfu == pytest.approx(constant, abs=1)


def test_an_odd_configuration_pair_by_pair():
    """Depth 12, two key-value heads of six, a row length off every tile: FLOPs of all products, counted apart."""
    config = resolve(TrainConfig(depth=12, num_kv_heads=2, seq_len=1000, device_batch_size=3), "cuda")
    shape = config.model_config(50257)
    assert (shape.d_model, shape.num_heads, shape.kv_width) == (768, 6, 256)
    rows, D, kv = 3000, 768, 256
    pairs = 0
    for layer in range(12):
        window = 1000 if layer % 4 == 3 or layer == 11 else 500
        pairs += 3 * 6 * sum(min(t, window) + 1 for t in range(1000))
    weights = 12 * (D * (D + 2 * kv) + D * D + 8 * D * D) + 6 * 32 * 2
    ops = roofline.micro_step_ops(config, shape)
    products = ("linear", "qkv_projection", "mlp", "rotary_attention")
    forward = sum(op.count * op.cost()[1] for op in ops if op.module in products)
    assert forward == 2 * rows * weights + 2 * 2 * 128 * pairs
    backward = sum(op.count * op.cost(backward=True)[1] for op in ops if op.module in products)
    assert backward == 4 * rows * weights + 5 * 2 * 128 * pairs
    # Every layer once, and a value embedding in every other one.
    attention = [op for op in ops if op.module == "rotary_attention"]
    assert sum(op.count for op in attention) == 12
    assert sum(op.count for op in attention if dict(op.flags)["has_ve"]) == 6
    # Bytes of one projection: activations in and out, weights once.
    qkv = next(op for op in ops if op.name == "qkv_projection")
    assert qkv.cost()[0] == 2 * (rows * (D + D + 2 * kv) + D * (D + 2 * kv))


@pytest.mark.parametrize("kv_heads", [0, 2])
def test_the_update_covers_every_parameter(kv_heads):
    shape = GPTConfig(num_kv_heads=kv_heads)
    elements = sum(op.sizes[0] for op in roofline.update_ops(shape) if op.module in ("adamw", "muon"))
    assert elements == count_parameters(shape)["total"]
    batches = [op.shape for op in roofline.update_ops(shape) if op.name == "muon_update w_qkv"]
    assert batches == ([(24, 512, 512)] if kv_heads == 0 else [(8, 512, 512), (8, 256, 512), (8, 256, 512)])


@pytest.mark.parametrize("fused_norms", [False, True])
def test_what_recompute_does_again(fused_norms):
    """On every layer but the last: the norm before its products, the first product of its block, its look-up."""
    config = dataclasses.replace(CONFIG, recompute=True, fused_norms=fused_norms)
    again = {op.name: op.count for op in recomputed_ops(config, GPTConfig())}
    norm, block = ("norm_factors", "norm_relu2_mlp") if fused_norms else ("rms_norm, mix", "relu2_mlp")
    assert again == {norm: 7, f"{block}, post-activation": 7, "embedding": 3}
    assert not recomputed_ops(CONFIG, GPTConfig())


def silu_mlp(product):
    return lambda y, w_fc, w_proj, residual, **options: residual + product(F.silu(product(y, w_fc)), w_proj)


class OpsOfAnotherModel:
    """What the model finds under the name of `kernels`: another feed-forward block."""

    def __init__(self, block):
        self.relu2_mlp = block

    def __getattr__(self, name):
        return getattr(kernels, name)


def test_a_model_is_charged_for_the_ops_that_it_calls(monkeypatch):
    before = micro_step_ops(CONFIG, GPTConfig())
    monkeypatch.setattr("model.gpt.kernels", OpsOfAnotherModel(silu_mlp(lambda x, w: kernels.linear(x, w))))
    ops = {(op.name, op.sizes): op.count for op in micro_step_ops(CONFIG, GPTConfig())}
    assert not any("mlp" in name for name, _ in ops)
    assert ops["linear", (ROWS, 512, 2048)] == ops["linear", (ROWS, 2048, 512)] == 8
    rest = {(op.name, op.sizes): op.count for op in before if "mlp" not in op.name}
    assert rest.items() <= ops.items()
    assert len(ops) == len(rest) + 2


def refusals(monkeypatch):
    """Blocks of unknown cost, each with what is said of it."""
    yield "products outside the ops of kernels (aten.mm)", silu_mlp(lambda x, w: F.linear(x, w))
    yield "kernels.linear as CALLS", silu_mlp(lambda x, w: kernels.linear(x, w, wider=True))

    def swiglu_mlp(y, w_fc, w_proj):
        return y

    monkeypatch.setattr(kernels, "swiglu_mlp", swiglu_mlp, raising=False)
    monkeypatch.setattr(kernels, "__all__", [*kernels.__all__, "swiglu_mlp"])
    block = lambda y, w_fc, w_proj, residual, **options: kernels.swiglu_mlp(y, w_fc, w_proj)  # noqa: E731
    yield "the cost of kernels.swiglu_mlp, which the model calls, is not known", block


def test_what_has_no_known_cost_is_refused_by_name(monkeypatch, capsys):
    recomputed = kernels.recomputed
    for said, block in refusals(monkeypatch):
        monkeypatch.setattr("model.gpt.kernels", OpsOfAnotherModel(block))
        with pytest.raises(InputError) as error:
            micro_step_ops(CONFIG, GPTConfig())
        assert said in str(error.value)
        assert roofline.main([]) == 2
        out, err = capsys.readouterr()
        assert said in err
        assert err.count("\n") == 1
        assert not out
    assert kernels.recomputed is recomputed, "the door is as it was"


def measured_step(tmp_path, **changes):
    """As bench/test_step.py leaves it: every op takes 1 ms forward and 3 both ways, the MLP 2 and 10."""
    config = resolve(TrainConfig(device_batch_size=16), "cuda")
    model = config.model_config(8192)
    parts = []
    for op in roofline.micro_step_ops(config, model):
        forward, both = (2.0, 10.0) if "mlp" in op.name else (1.0, 3.0)
        parts.append({"op": op.name, "count": op.count, "forward_ms": forward, "both_ms": both})
    step = {
        "config": dataclasses.asdict(config), "model": dataclasses.asdict(model), "parts": parts, "step_ms": 3200.0,
        "update_ms": 16.0, "mfu_percent": 12.5, "ceilings": {"flops": 790e12, "bandwidth": 4.3e12}, **changes,
    }  # fmt: skip
    path = tmp_path / "step.json"
    path.write_text(json.dumps({"benchmarks": [{"extra_info": {}}, {"extra_info": {"step": step}}]}))
    return path, step


def test_the_gap_of_each_op(tmp_path, capsys):
    path, step = measured_step(tmp_path)
    parts = {part.name: part for part in roofline.parts_of(step, Ceilings(790e12, 4.3e12))}
    mlp = parts["relu2_mlp backward"]
    assert mlp.measured == 8 * (10.0 - 2.0)
    assert mlp.bound == pytest.approx(1e3 * BY_HAND["relu2_mlp backward"] / 8, rel=1e-2)  # an eighth of the rows
    assert parts["update, a micro-step's share"].measured == 16.0 / 16
    assert roofline.main(["--measured", str(path)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[1].startswith("relu2_mlp backward")
    assert out[-1] == f"the next millisecond: relu2_mlp backward, {mlp.gap:.2f} ms above its bound"
    ops = sum(p["count"] * p["both_ms"] for p in step["parts"])
    assert out[-2] == f"in none of its ops: {3200 / 16 - ops - 1:.2f} ms"
    assert "MFU 12.5 %" in out[-3]
    assert roofline.main(["--measured", str(path), "--gpu", "h100"]) == 0  # another GPU's bandwidth
    assert capsys.readouterr().out.splitlines()[-4] != out[-4]


def test_bad_measurements_are_one_line(tmp_path, capsys):
    path, step = measured_step(tmp_path)
    assert roofline.main(["--measured", str(path), "--vocab-size", "1024"]) == 2
    assert "only at 8192" in capsys.readouterr().err
    path, _ = measured_step(tmp_path, parts=step["parts"][:-1])
    assert roofline.main(["--measured", str(path)]) == 2
    assert "'linear_cross_entropy'" in capsys.readouterr().err
    path.write_text(json.dumps({"benchmarks": []}))
    assert roofline.main(["--measured", str(path)]) == 2
    path.write_text("[]")
    assert roofline.main(["--measured", str(path)]) == 2
    assert roofline.main(["--measured", str(tmp_path / "none.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 3


def test_options_of_train_make_another_step(capsys):
    """The tuned recipe's: 640 wide, short windows of 256 tokens."""
    assert roofline.main(["--recipe", "tuned", "--device-batch-size", "16"]) == 0
    out = capsys.readouterr().out
    assert "a micro-step of 32,768 tokens" in out
    shape = roofline.resolve(TrainConfig(recipe="tuned", device_batch_size=16), "cuda")
    assert {op.sizes[-1] for op in roofline.micro_step_ops(shape, shape.model_config(8192))
            if op.module == "rotary_attention"} == {256, 2048}  # fmt: skip
    assert "adamw_update wte" in out
    for args, named in ((["--recipe", "tund"], "did you mean tuned?"), (["--short-window", "3"], "3"),
                        (["--config", "x", "--depth", "3"], "--depth"), (["--rcipe", "cpu"], "--recipe")):  # fmt: skip
        with pytest.raises(SystemExit) as ended:
            roofline.main(args)
        assert ended.value.code == 2
        assert named in (error := capsys.readouterr().err)
        assert error.count("\n") == 1


def test_bad_input_is_one_line(capsys, tmp_path):
    (tmp_path / "other.json").write_text("{}")
    bad = [["--config", str(tmp_path / "none.json")], ["--config", str(tmp_path / "other.json")], ["--depth", "0"]]
    for args in bad:
        assert roofline.main(args) == 2
        error = capsys.readouterr().err
        assert args[-1] in error
        assert error.count("\n") == 1
    with pytest.raises(SystemExit):
        roofline.main(["--vocab-size", "0"])
    assert "--vocab-size 0" in capsys.readouterr().err


def test_many_gpus_by_hand(capsys):
    """Eight in one machine: a rank sends seven eighths of 50.33M gradients of four bytes at 360 GB/s, ten collectives
    start in 20 µs each, and what comes is read, and added, at 3 TB/s."""
    config = resolve(TrainConfig(), "cuda", 8)
    total = roofline.report_many(config, GPTConfig(), roofline.GPUS["h100"], 1, 8)
    P = 50.33e6
    exchange = 10 * 20e-3 + 1e3 * 4 * P * 7 / 8 / 360e9
    gather = 10 * 20e-3 + 1e3 * 2 * P * 7 / 8 / 360e9
    added = 1e3 * 4 * 4 * P / 3e12
    computed = sum(line.milliseconds(roofline.GPUS["h100"]) for line in roofline.micro_step(config, GPTConfig()))
    updated = sum(line.milliseconds(roofline.GPUS["h100"]) for line in roofline.update(GPTConfig())) / 8
    assert total == pytest.approx(computed + updated + exchange + gather + added, rel=2e-3)
    assert "predicted from assumed rates, not measured" in capsys.readouterr().out


def test_across_machines_the_network_binds():
    """Of sixteen in two machines eight fifteenths of the bytes go over 45 GB/s."""
    links = roofline.Links()
    assert links.seconds(150e6, 0, 2, 8) == pytest.approx(80e6 / 45e9)
    assert links.seconds(150e6, 3, 1, 8) == pytest.approx(60e-6 + 150e6 / 360e9)


@pytest.mark.parametrize("text", ["x", "1", "0x8", "8x", "-2"])
def test_a_number_of_gpus_that_is_none(text, capsys):
    with pytest.raises(SystemExit):
        roofline.main([f"--gpus={text}"])
    assert "is no number of GPUs" in capsys.readouterr().err
