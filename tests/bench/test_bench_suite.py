"""The bench suite's own logic: what it rejects, what it counts, what it prints. On a CPU, where it can be told right
from wrong."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from functools import partial
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import kernels
from bench import ceilings
from bench import test_ops as suite
from bench.ceilings import Ceilings
from bench.conftest import out_of_time
from bench.suite import providers as providers_module
from bench.suite.providers import COMPILE, CPU, EAGER, TRITON, Provider, assert_right, providers
from bench.suite.replay import device_time, replay
from bench.suite.results import relative_speeds, row, step_table, table
from kernels.common import use_kernels
from kernels.rotary_attention.reference import window_attention_ref
from tests.helpers.kernel_checks import DEVICE, exact_bfloat16
from train.config import ROOT
from train.tune import problems, timing
from train.tune.ops import Op
from train.tune.targets import targets
from train.tune.timing import Timing, _captured, time_call

VE = (("has_ve", True),)
# Small enough for the interpreter.
SMALL = {
    "rms_norm": Op("rms_norm, mix", 1, "rms_norm", (9, 24), (("has_x0", True),)),
    "linear": Op("linear", 1, "linear", (9, 24, 16), (("residual", True),)),
    "qkv_projection": Op("qkv_projection", 1, "qkv_projection", (9, 24, 16, 2, 8)),
    "rotary_attention": Op("rotary_attention", 1, "rotary_attention", (2, 19, 4, 2, 16, 7), VE),
    "relu2_mlp": Op("relu2_mlp", 1, "mlp", (9, 16, 64)),
    "norm_factors": Op("norm_factors", 1, "rms_norm", (9, 24), (("has_x0", True), ("has_y", False))),
    "norm_qkv_projection": Op("qkv_projection, norm", 1, "qkv_projection", (9, 24, 16, 2, 8), (("norm", True),)),
    "norm_relu2_mlp": Op("norm_relu2_mlp", 1, "mlp", (9, 16, 64), (("norm", True),)),
    "linear_cross_entropy": Op("linear_cross_entropy", 1, "linear_cross_entropy", (9, 16, 50)),
    "embedding": Op("embedding", 1, "embedding", (30, 11, (16, 8))),
    "polar_express": Op("polar_express", 1, "polar_express", (2, 16, 24)),
    "muon_update": Op("muon_update", 1, "muon", (2 * 16 * 24,), shape=(2, 16, 24)),
    "adamw_update": Op("adamw_update", 1, "adamw", (96,)),
}


def test_an_offset_of_keys_is_part_of_the_op(monkeypatch):
    """Its constants say so, and who leaves it out gets no time."""
    op = dataclasses.replace(SMALL["rotary_attention"], flags=(*VE, ("key_offset", True)))
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    for provider in (TRITON, EAGER, COMPILE):
        assert_right(provider, op, "both", DEVICE, torch.float32)
    torch._dynamo.reset()

    def without(*inputs, key_offset, **constants):
        assert key_offset
        return problems.rotary_attention(*inputs, **constants)

    with pytest.raises(AssertionError, match="errs by"):
        assert_right(Provider("wrong", "reference", {"rotary_attention": without}), op, "forward", "cpu", torch.float32)
    assert problems.shape_label(op) == "2x19-h4/2x16-w7-ve-offset"
    assert problems.cost(op, "both") == problems.cost(SMALL["rotary_attention"], "both")


@pytest.mark.parametrize("op", SMALL.values(), ids=SMALL.keys())
def test_kernels_forms_and_references_pass_their_check(monkeypatch, op):
    exact_bfloat16(monkeypatch)  # Polar Express iterates in it
    assert EAGER.functions.keys() == SMALL.keys() - {"norm_factors", "norm_qkv_projection", "norm_relu2_mlp"}
    for provider in [TRITON, *[CPU, EAGER] * (problems.kind(op) in EAGER.functions)]:
        for direction in problems.directions(op):
            assert_right(provider, op, direction, DEVICE, torch.float32)
    assert not use_kernels(torch.zeros(1)), "the ops are as they were"


@pytest.mark.parametrize("op", [SMALL[name] for name in problems.OPS], ids=problems.OPS)
def test_what_is_compiled_passes_its_check(monkeypatch, op):
    """Traced and differentiated as a whole; the code that a GPU would run is not generated here."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    for direction in problems.directions(op):
        assert_right(COMPILE, op, direction, "cpu", torch.float32)
    torch._dynamo.reset()


def scaled_gradient(function):
    """The same outputs, and 1.05 of every gradient."""

    def wrong(*inputs, **constants):
        return function(*(x * 1.05 - (x * 0.05).detach() for x in inputs), **constants)

    return wrong


def one_key_less(*inputs, window, **constants):
    return problems.rotary_attention(*inputs, window=window - 1, **constants)


def without_softcap(x, weight, *, targets):
    return F.cross_entropy(F.linear(x, weight).float(), targets)


def without_mix(x, x0, lambda_r, lambda_0):
    return kernels.rms_norm(x + 0 * x0 + 0 * lambda_r + 0 * lambda_0)


def without_momentum(master, grad, momentum, *rest, **constants):
    return problems.muon_update(master, grad, grad.clone(), *rest, **constants)


def not_a_number(*inputs, **constants):
    return problems.embedding(*inputs, **constants)[0] * float("nan"), problems.embedding(*inputs, **constants)[1]


def factors_of_a_written_norm(x, x0, lambda_r, lambda_0):
    """The gradient of y = rstd ⊙ s where that of rstd ⊙ y is due."""
    s, y, x0 = kernels.rms_norm(x, x0, lambda_r, lambda_0)
    return [s, s.detach() + y - y.detach(), problems.norm_factors(x, x0, lambda_r, lambda_0)[2].detach(), x0]


def scaled_twice(*inputs, rstd):
    return [rstd[..., None] * out + (1 - rstd[..., None]) * out.detach()
            for out in problems.norm_qkv_projection(*inputs, rstd=rstd)]  # fmt: skip


MUTANTS = {
    "rstd": ("norm_factors", "forward", lambda *x: [*problems.norm_factors(*x)[:2], x[0][:, 0] + 1, x[1]]),
    "gradient of a factor": ("norm_factors", "both", factors_of_a_written_norm),
    "gradient scaled twice": ("norm_qkv_projection", "both", scaled_twice),
    "no rstd": ("norm_qkv_projection", "forward", lambda *x, rstd: kernels.qkv_projection(*x)),
    "no norm": ("norm_relu2_mlp", "forward", lambda x, *weights: kernels.relu2_mlp(x, *weights, x)),
    "gradient of a product": ("linear", "both", scaled_gradient(kernels.linear)),
    "gradient of the mlp": ("relu2_mlp", "both", scaled_gradient(kernels.relu2_mlp)),
    "window": ("rotary_attention", "forward", one_key_less),
    "softcap": ("linear_cross_entropy", "forward", without_softcap),
    "mix": ("rms_norm", "forward", without_mix),
    "momentum": ("muon_update", "update", without_momentum),
    "bias correction": ("adamw_update", "update", lambda *x, hyper, apply: problems.adamw_update(
        *x, hyper=hyper * torch.tensor([1.0, 0.9, 1.0, 1.0]), apply=apply)),
    "orthogonality": ("polar_express", "update", lambda g, dtype: kernels.polar_express(g, dtype) * 1.1),
    "NaN": ("embedding", "forward", not_a_number),
    "a result too few": ("embedding", "forward", lambda *x, **c: problems.embedding(*x, **c)[:1]),
}  # fmt: skip


@pytest.mark.parametrize("dtype", problems.TOLERANCES)
@pytest.mark.parametrize(("module", "direction", "function"), MUTANTS.values(), ids=MUTANTS.keys())
def test_a_wrong_provider_gets_no_time(module, direction, function, dtype):
    wrong = Provider("wrong", "reference", {module: function})
    with pytest.raises(AssertionError):
        assert_right(wrong, SMALL[module], direction, "cpu", dtype)


def test_bytes_and_flops_are_the_ops_own():
    attention = dataclasses.replace(SMALL["rotary_attention"], flags=())
    cost = import_module("kernels.rotary_attention").cost
    forward, backward = cost(*attention.sizes), cost(*attention.sizes, backward=True)
    assert problems.cost(attention, "forward") == forward
    assert problems.cost(attention, "both") == (forward[0] + backward[0], forward[1] + backward[1])
    assert problems.cost(attention, "forward", itemsize=4)[0] == 2 * forward[0]
    # Muon holds Polar Express; in fp32 neither it nor AdamW writes a copy: 2 bytes an element less.
    muon, polar = SMALL["muon_update"], SMALL["polar_express"].cost()
    assert problems.cost(muon, "update")[0] == muon.sizes[0] * 30 + polar[0]
    assert problems.cost(muon, "update", itemsize=4)[0] == muon.sizes[0] * 28 + polar[0]
    assert problems.cost(SMALL["adamw_update"], "update") == (96 * 30, 96 * 14)


def test_fewer_tokens_are_whole_rows():
    op = Op("attention", 1, "rotary_attention", (8, 100, 4, 4, 16, 50))
    assert problems.with_tokens(op, 250).sizes == (2, 100, 4, 4, 16, 50)
    assert problems.with_tokens(op, 10).sizes[0] == 1
    assert problems.tokens_of(op) == 800
    assert problems.with_tokens(SMALL["relu2_mlp"], 4).sizes == (4, 16, 64)


def test_want_of_memory_halves_the_rows(monkeypatch):
    op, built = Op("rms_norm", 1, "rms_norm", (12, 24)), []

    def build(op, *rest):
        built.append(op.sizes[0])
        if op.sizes[0] > 3:
            raise torch.OutOfMemoryError
        return problems.build(op, *rest)

    monkeypatch.setattr(suite, "build", build)
    monkeypatch.setattr(suite, "time_call", lambda call, device: Timing([2e-3, 2e-3], "host clock"))
    took, ran = suite.timed(EAGER, op, "forward")
    assert built == [12, 6, 3]
    assert ran.sizes == (3, 24)
    figures = row(op, ran, "forward", "eager", took, 2, Ceilings(1e12, 1e12), "a device", "c0ffee")
    assert figures["note"] == "3 of 12 rows for want of memory"
    assert figures["ns_per_token"] == pytest.approx(2e6 / 3)
    assert figures["shape"] == "12x24"  # compared under the shape that was asked for
    assert figures["GB/s"] == pytest.approx(op.cost()[0] * 3 / 12 / 2e-3 / 1e9)


def figures(provider: str, milliseconds: float, direction: str = "forward") -> dict:
    op = Op("rms_norm", 1, "rms_norm", (1000, 100))
    took = Timing([milliseconds / 1e3] * 3, "events")
    return row(op, op, direction, provider, took, 2, Ceilings(1e12, 2e9), "NVIDIA H200", None)


def test_figures_of_a_row():
    got = figures("triton", 0.5)
    num_bytes = 1000 * (100 * 2 * 2 + 4)
    assert got["GB/s"] == pytest.approx(num_bytes / 0.5e-3 / 1e9)
    assert got["percent_ceiling"] == pytest.approx(100 * num_bytes / 2e9 / 0.5e-3)
    assert got["percent_datasheet"] == pytest.approx(100 * num_bytes / 4.8e12 / 0.5e-3)


def test_whole_steps_stand_below_each_other():
    step = {"step_ms": 210.4, "update_ms": 0.61, "tokens_per_second": 1234567.8, "mfu_percent": 61.23}
    step, on_cpu = {**step, "peak_mib": 25487}, {**step, "mfu_percent": None, "peak_mib": None}
    assert step_table({"V = 8,192": step, "V = 8,192 --recompute": on_cpu}) == [
        "step                    ms  update ms   tokens/s  MFU %  peak MiB",
        "V = 8,192              210      0.610  1,234,568   61.2    25,487",
        "V = 8,192 --recompute  210      0.610  1,234,568    n/a       n/a",
    ]


def test_the_table_keeps_what_is_compared_together():
    rows = [figures("triton", 0.5), figures("triton", 2.0, "both")]
    rows += [figures("eager", 1.0), figures("eager", 1.0, "both")]
    assert relative_speeds(rows) == [1.0, 1.0, 0.5, 2.0]
    lines = table(rows)
    assert [line.split()[:4] for line in lines[1:]] == [
        ["rms_norm", "1000x100", "forward", "triton"],
        ["eager", "1.00", "0.404", "0.000400"],
        ["rms_norm", "1000x100", "both", "triton"],
        ["eager", "1.00", "1.21", "0.00130"],
    ]
    assert [line.rstrip().split()[-1] for line in lines[1:]] == ["1.00x", "0.50x", "1.00x", "2.00x"]
    assert table([figures("eager", 1.0)])[1].split()[-1] == "-"


def test_pytest_benchmark_is_given_the_times_measured():
    seen = []

    def pedantic(target, rounds):
        for _ in range(rounds):
            start = device_time()
            target()
            seen.append(device_time() - start)

    replay(SimpleNamespace(pedantic=pedantic), Timing([0.25, 0.5, 0.125], "events"))
    assert seen == [0.25, 0.5, 0.125]


def test_a_median_is_no_mean():
    took = Timing([1.0] * 8 + [2.0, 100.0], "host clock")
    assert took.median == 1.0
    assert took.spread > 1


def test_a_call_is_timed_by_what_it_takes(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    took = time_call(lambda: now.__setitem__(0, now[0] + 0.125), "cpu")
    assert took.seconds == [0.125] * timing.ROUNDS[0]
    took = time_call(lambda: now.__setitem__(0, now[0] + 0.125), "cpu", seconds=1.25)
    assert took.seconds == [0.125] * 10


def test_ceilings_count_bytes_read_and_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(ceilings, "time_call", lambda call, device: call() is None or Timing([0.5], ""))
    monkeypatch.setitem(ceilings.COPY_BYTES, "cpu", 1000)
    monkeypatch.setitem(ceilings.PRODUCT_SIZE, "cpu", 10)
    monkeypatch.setattr(ceilings.torch.cuda, "is_available", lambda: False)
    assert ceilings.measure("cpu") == Ceilings(flops=2 * 10**3 / 0.5, bandwidth=2 * 1000 / 0.5)
    assert ceilings.main(["--json", str(tmp_path / "c.json")]) == 0
    assert json.loads((tmp_path / "c.json").read_text())["bandwidth"] == 4000
    assert ceilings.main(["--json", str(tmp_path / "none" / "c.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_datasheet_is_a_devices_own():
    assert ceilings.datasheet("NVIDIA H200") == Ceilings(989.5e12, 4.8e12)
    assert ceilings.datasheet("NVIDIA H100 80GB HBM3") == Ceilings(989.5e12, 3.35e12)
    assert ceilings.datasheet("NVIDIA H100 PCIe").bandwidth == 2.0e12
    assert ceilings.datasheet("NVIDIA L40S").bandwidth == 864e9
    assert ceilings.datasheet("NVIDIA A10") is None
    assert ceilings.datasheet("NVIDIA GH200 480GB") is None  # not an H200: its bandwidth is not in the table


def test_a_missing_peer_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(providers_module, "find_spec", lambda name: None)
    found = {p.name: p for p in providers("cuda")}
    assert [name for name, p in found.items() if p.missing is None] == ["triton", "eager", "compile"]
    assert found["liger"].missing.endswith(" --no-deps liger-kernel")
    assert all("not installed: " in p.missing for p in list(found.values())[3:])


def test_a_peer_of_another_version_is_left_out_with_the_reason(monkeypatch):
    monkeypatch.setattr(providers_module, "find_spec", lambda name: name == "quack")
    monkeypatch.setitem(sys.modules, "quack.rmsnorm", SimpleNamespace())
    missing = {p.name: p.missing for p in providers("cuda")}
    assert "AttributeError" in missing["quack"] or "ImportError" in missing["quack"] or "NotFound" in missing["quack"]


def fake_liger(monkeypatch):
    """Liger-Kernel's interfaces, in PyTorch."""

    def norm(x, weight, eps):
        assert weight is None
        return F.rms_norm(x, x.shape[-1:], eps=eps)

    def loss(x, weight, targets, *, ignore_index, softcap, accum_dtype):
        assert accum_dtype == torch.float32
        logits = softcap * torch.tanh(F.linear(x, weight) / softcap)
        return F.cross_entropy(logits, targets, ignore_index=ignore_index)

    for name, content in {
        "liger_kernel.ops.rms_norm": {"LigerRMSNormFunction": SimpleNamespace(apply=norm)},
        "liger_kernel.ops.relu_squared": {"LigerReLUSquaredFunction": SimpleNamespace(apply=lambda x: F.relu(x) ** 2)},
        "liger_kernel.transformers.functional": {"liger_fused_linear_cross_entropy": loss},
    }.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**content))
    return providers_module.liger()


def fake_quack(monkeypatch):
    """QuACK's interfaces, in PyTorch."""

    def block(x, w1, w2, activation):
        assert activation == "relu_sq"
        return F.linear(F.relu(F.linear(x, w1)) ** 2, w2)

    for name, content in {
        "quack.rmsnorm": {"rmsnorm": lambda x, eps: F.rms_norm(x, x.shape[-1:], eps=eps)},
        "quack.linear": {"linear_func": F.linear},
        "quack.mlp": {"mlp_func": block},
        "quack.cross_entropy": {"cross_entropy": F.cross_entropy},
    }.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**content))
    return providers_module.quack()


def fake_flash_attention(monkeypatch):
    """FlashAttention's interface, in PyTorch; as some builds do, it returns the log-sum-exp as well."""

    def attend(q, k, v, *, causal, window_size):
        assert causal
        assert window_size[1] == 0
        return window_attention_ref(q, k, v, window_size[0]), None

    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_func=attend))
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    return providers_module.flash_attention("flash_attn")


@pytest.mark.parametrize("fake", [fake_liger, fake_quack, fake_flash_attention])
def test_what_is_put_around_a_peer_makes_it_our_op(monkeypatch, fake):
    functions = fake(monkeypatch)
    attention = Op("rotary_attention", 1, "rotary_attention", (2, 19, 4, 4, 16, 19))
    plain = [Op("rms_norm", 1, "rms_norm", (9, 24)), attention]
    for op in [*(op for op in plain if op.module in functions), *(SMALL[module] for module in functions)]:
        for direction in problems.directions(op):
            assert_right(Provider("peer", "reference", functions), op, direction, "cpu", torch.float32)


def test_cases_are_named_after_the_public_ops():
    """Each op at the door of `kernels` is found by its name, also where it cannot be run."""
    ids = [case.id for case in suite.cases() if not case.id.startswith("none-")]
    for name in kernels.op_names():
        assert any(case.startswith(name) for case in ids), f"-k {name} finds nothing"
    assert all(case.startswith(tuple(kernels.op_names())) for case in ids)


def test_every_gradient_of_a_weight_has_a_case():
    """As a step asks for them: of the same sizes, and from as many rows."""
    config = dataclasses.replace(suite.CONFIG, ops="triton")
    found = targets(config, config.model_config(suite.VOCAB_SIZES[0]), fused_norms=False)
    wanted = {target.shape[:2] for target in found if target.name == suite.WEIGHT_GRAD.name}
    assert len(wanted) == 6
    assert {(N, K) for _, N, K in suite.weights()} == wanted
    assert {rows for rows, *_ in suite.weights()} == {config.micro_batch_tokens}


def test_the_suite_from_outside(tmp_path):
    """Times in JSON and table are the same; what cannot run is one line a provider."""
    path = tmp_path / "ops.json"
    command = [sys.executable, "-m", "pytest", "bench/test_ops.py", "--benchmark-only"]
    command += ["-k", "adamw_update_lambda_r or none", "--benchmark-json", str(path)]
    # Told that it is one of several processes, pytest measures nothing.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    benchmarks = json.loads(path.read_text())["benchmarks"]
    # By the forms for a CPU, and by the references.
    assert [b["extra_info"]["op"] for b in benchmarks] == ["adamw_update lambda_r"] * 2
    for b in benchmarks:
        assert 1e3 * b["stats"]["median"] == pytest.approx(b["extra_info"]["ms"])
        assert any(line.startswith("adamw_update lambda_r") for line in done.stdout.splitlines())
    lines = [line for line in done.stdout.splitlines() if line.startswith("not measured")]
    assert len(lines) == 3, lines


def test_the_truth_is_asked_with_the_same_cotangents():
    outs = [torch.empty(64, 32, dtype=dtype) for dtype in (torch.bfloat16, torch.float32, torch.float64)]
    low, middle, high = (problems.random_cotangents([out])[0] for out in outs)
    assert torch.equal(low.double(), high)
    assert torch.equal(middle.double(), high)


def test_no_case_begins_after_its_time():
    now = time.monotonic()
    assert not out_of_time(None, 0.0)
    assert not out_of_time(100.0, now)
    assert out_of_time(1.0, now - 2.0)


def test_what_waits_is_no_graph(gpu):
    x = torch.ones(4, device="cuda")
    graph = _captured(lambda: x.neg_())
    assert _captured(lambda: x.sum().item()) is None
    before = x.tolist()
    graph.replay()
    assert x.tolist() == [-value for value in before]
    assert time_call(lambda: x.neg_(), "cuda", 0.01).median > 0


@pytest.mark.gpu
def test_times_on_a_gpu():
    x = torch.randn(2**26, device="cuda")  # 256 MiB: half a GB moved, so more than 50 µs on any GPU
    took = time_call(lambda: x.neg_(), "cuda")
    assert took.method == "events"
    assert took.median > 5e-5
    small = torch.randn(32, 32, device="cuda")

    def many():
        for _ in range(100):
            small.neg_()

    assert time_call(many, "cuda").method == "graph"
    assert time_call(lambda: (many(), small.sum().item()), "cuda").method == "events, bound by launches"
    assert time_call(many, "cuda").method == "graph"  # what could not be captured has left nothing behind
    torch.cuda.empty_cache()
    assert torch.rand(4, device="cuda").isfinite().all()
