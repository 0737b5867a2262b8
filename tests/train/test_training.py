"""The program end to end, on a small corpus: what it prints, writes and promises."""

import json
import math
import re

import pytest
import torch
from safetensors.torch import load_file

import kernels
import train.__main__
import train.device
import train.memory
import train.trainer
from model import GPT, GPTConfig
from prepare import Batch, Dataset, InputError
from tests.helpers.small_step import make_step
from tests.helpers.tiny_run import losses, rows, run_main
from train import evaluate
from train.config import TrainConfig, resolve
from train.optimizer import MuonGroup, Optimizer
from train.results.metrics import shown
from train.results.run_folder import load_run
from train.schedule import StepValues
from train.step import TrainStep
from train.tune import steps


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """A run of 30 steps."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert run_main(corpus, folder, "--steps", "30") == 0
    return folder


def test_a_run_learns_and_writes_its_folder(finished, corpus):
    assert sorted(p.name for p in finished.iterdir()) == [
        "changes.diff", "config.json", "curves.png", "metrics.jsonl", "model.safetensors", "sample.txt", "summary.json",
        "tokenizer.json",
    ]  # fmt: skip
    history = losses(finished)
    assert len(history) == 30
    assert history[0] == pytest.approx(math.log(512), rel=0.01)
    assert history[-1] < history[0] - 1
    summary = json.loads((finished / "summary.json").read_text())
    assert list(summary)[:9] == [
        "val_bpb", "training_seconds", "total_seconds", "peak_vram_mb", "mfu_percent", "total_tokens_M", "num_steps",
        "num_params_M", "depth",
    ]  # fmt: skip
    assert summary["num_steps"] == 30
    assert summary["untimed_steps"] == 10
    assert summary["mfu_percent"] is None
    assert summary["comparable"].endswith("; with no published number (CPU defaults)")
    assert summary["seconds"].keys() >= {"setup", "training", "evaluation", "audit"}
    assert (finished / "sample.txt").read_text(errors="replace").startswith("The ")
    assert summary["val_bpb"] < 8
    config = json.loads((finished / "config.json").read_text())
    assert config["config"]["depth"] == 2
    assert config["config"]["recipe"] == summary["recipe"] == "cpu"
    assert config["model"]["vocab_size"] == 512
    data = Dataset.open(corpus)
    assert summary["fingerprint"]["split_sha256"] == data.split("val").sha256
    assert summary["val_bytes"] == data.split("val").num_bytes


def test_what_is_printed_is_in_the_summary_as_numbers(corpus, tmp_path, capsys):
    assert run_main(corpus, tmp_path / "run", "--steps", "2", "--untimed-steps", "1") == 0
    lines = capsys.readouterr().out.partition("\n---\n")[2].splitlines()
    printed = dict(line.split(maxsplit=1) for line in lines)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    text = {"tiles", "recipe", "packing", "val_sha256", "tokenizer_sha256", "comparable", "audit", "status", "verdict"}
    assert {key for key, value in summary.items() if isinstance(value, str)} == text | {"sha256"}
    for key, value in summary.items():
        if key not in ("fingerprint", "sha256", "seconds"):
            assert printed[f"{key}:"] == shown(key, value)
    assert summary["total_seconds"] > summary["training_seconds"] > 0
    row = json.loads((tmp_path / "results.jsonl").read_text())
    assert row["summary"] == {key: summary[key] for key in row["summary"]}


def test_printed_lines(corpus, tmp_path, capfd):
    assert run_main(corpus, tmp_path / "run", "--steps", "3") == 0
    out = capfd.readouterr().out
    assert "\r" not in out
    assert "\x1b" not in out
    lines = out.splitlines()
    steps = [line for line in lines if line.startswith("step ")]
    pattern = (
        r"step \d{5} \(\d+\.\d%\) \| loss: \d+\.\d{6} \| lrm: \d\.\d\d \| dt: \d+ms \| tok/sec: [\d,]+ \| mfu: n/a"
        r" \| epoch: \d+ \| remaining: \d+s"
    )
    assert len(steps) == 3
    assert all(re.fullmatch(pattern, line) for line in steps)
    summary = lines[lines.index("---") + 1 :]
    assert all(re.fullmatch(r"[a-zA-Z0-9_]+: +\S.*", line) for line in summary)
    assert summary[0].startswith("val_bpb:")


def test_same_seed_same_losses_bit_for_bit(corpus, tmp_path):
    for name, seed in [("a", "1"), ("b", "1"), ("c", "2")]:
        assert run_main(corpus, tmp_path / name, "--steps", "12", "--untimed-steps", "2", "--seed", seed) == 0
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert losses(tmp_path / "a") != losses(tmp_path / "c")
    weights = [load_file(tmp_path / name / "model.safetensors") for name in "ab"]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.mark.parametrize("ops", ["cpu", "reference"])
def test_two_threads_give_the_same_bits_twice(ops):
    """At the CPU's default shape: the tests' own is too small for a second thread, and has one (conftest.py)."""
    config = resolve(TrainConfig(ops=ops), "cpu")
    torch.set_num_threads(2)
    try:
        with kernels.ops_in_force(config.ops):
            once, again = (steps.make_step(config, config.model_config(1024)) for _ in range(2))
            for step, batches, values in (once, again):
                step(batches, values)
    finally:
        torch.set_num_threads(1)
    for p, q in zip(once[0].model.parameters(), again[0].model.parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p.main_grad, q.main_grad)


def test_strict_mode_rehearses_without_a_trace(corpus, tmp_path):
    assert run_main(corpus, tmp_path / "strict", "--steps", "4", "--untimed-steps", "0") == 0
    assert run_main(corpus, tmp_path / "usual", "--steps", "4") == 0
    assert losses(tmp_path / "strict") == losses(tmp_path / "usual")
    summary = json.loads((tmp_path / "strict" / "summary.json").read_text())
    assert summary["untimed_steps"] == 0
    assert 0 < rows(tmp_path / "strict")[0]["timed_seconds"] < summary["training_seconds"]


VALUES = StepValues(step=0, lr_multiplier=1.0, momentum=0.85, weight_decay=0.2)


def batch(tokens: torch.Tensor) -> Batch:
    return Batch(tokens=tokens, epoch=1, index=0, state={})


def test_two_micro_batches_of_four_rows_are_one_of_eight(in_fp64):
    tokens = torch.randint(512, (8, 33), generator=torch.Generator().manual_seed(2), dtype=torch.int32)
    one, two = (make_step(forward_dtype=torch.float64) for _ in range(2))
    loss_one, _ = one([batch(tokens)], VALUES)
    loss_two, _ = two([batch(tokens[:4]), batch(tokens[4:])], VALUES)
    torch.testing.assert_close(loss_one, loss_two, rtol=1e-12, atol=0)
    for (name, p), q in zip(one.model.named_parameters(), two.model.parameters(), strict=True):
        ours, theirs = (step.optimizer.summed(name) for step in (one, two))
        assert ours.abs().max() > 1e-5, f"{name}: a gradient of zero tests nothing"
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12, msg=name)
        torch.testing.assert_close(p, q, rtol=0, atol=1e-9, msg=name)  # Polar Express makes a difference 1,000 times it


def test_whoever_makes_a_step_multiplies_as_a_run_does():
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
    TrainStep(make_step().model, None)
    assert torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction is False


def test_the_precision_of_a_gpu():
    """bf16 parameters and activations, fp32 masters and gradients: the step of a GPU, here on a CPU."""
    full, half = make_step(), make_step(forward_dtype=torch.bfloat16)
    tokens = torch.randint(512, (4, 33), generator=torch.Generator().manual_seed(2), dtype=torch.int32)
    for i in range(3):
        loss_full, _ = full([batch(tokens)], VALUES)
        loss_half, good = half([batch(tokens)], VALUES)
        assert good
        assert loss_half.dtype == torch.float32
        torch.testing.assert_close(loss_half, loss_full, rtol=0, atol=0.02)
        for name, p in half.model.named_parameters():
            assert torch.equal(p, half.optimizer.masters[name].to(p.dtype)), name
            if i == 0:  # later the parameters themselves differ: AdamW's first steps are near to signs
                ours, theirs = (step.optimizer.summed(name) for step in (half, full))
                assert ours.dtype == torch.float32
                assert (ours - theirs).norm() / theirs.norm() < 5 * 2**-8, name


def test_published_packing_says_what_it_crops(corpus, tmp_path):
    assert run_main(corpus, tmp_path / "run", "--steps", "3", "--packing", "published") == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["packing"] == "published"
    assert summary["train_cropped_percent"] > 5
    assert summary["val_cropped_percent"] > 5


def test_rehearsal_restores_every_bit():
    step, untouched = make_step(), make_step()
    before = torch.random.get_rng_state()
    step.rehearse((4, 33), micro_steps=2, values=VALUES)
    assert torch.equal(before, torch.random.get_rng_state())
    tokens = torch.randint(512, (4, 33), dtype=torch.int32)
    for s in (step, untouched):
        s([batch(tokens)], VALUES)
        s([batch(tokens)], VALUES)
    for p, q in zip(step.model.parameters(), untouched.model.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(("value", "cause"), [(math.nan, "is nan"), (math.inf, "is inf"), (101, "is 101")])
def test_a_bad_loss_fails_the_run(corpus, tmp_path, monkeypatch, capsys, value, cause):
    forward, calls = GPT.forward, 0

    def poisoned(self, *args, **kwargs):
        nonlocal calls
        calls += 1
        loss = forward(self, *args, **kwargs)
        return loss * 0 + value if calls in (6, 7) else loss  # 1 for the memory check, then 2 micro-steps a step

    monkeypatch.setattr(GPT, "forward", poisoned)
    assert run_main(corpus, tmp_path / "run", "--steps", "5") == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"FAIL: step 00002: loss {cause}")
    # Forward is itself again when the step is repeated.
    assert "(batches 4 to 5); repeated at once, the step is good; kept for " in last
    assert last.endswith(f" -m train.replay {tmp_path / 'run'}")
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_bad_gradient_fails_the_run(corpus, tmp_path, monkeypatch, capsys):
    zero = Optimizer.zero_grad
    calls = 0

    def poisoned(self):
        nonlocal calls
        calls += 1
        zero(self)
        if calls == 3:
            self.grads[7] = math.nan

    monkeypatch.setattr(Optimizer, "zero_grad", poisoned)
    assert run_main(corpus, tmp_path / "run", "--steps", "5") == 1
    assert "FAIL: step 00002: a gradient is not finite" in capsys.readouterr().out


def test_evaluate_a_finished_run(finished, corpus, capsys):
    assert evaluate.main([str(finished), "--device", "cpu"]) == 0
    summary = json.loads((finished / "summary.json").read_text())
    assert f"val_bpb: {summary['val_bpb']:.6f}\n" in capsys.readouterr().out
    assert evaluate.main([str(finished), "--holdout", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("holdout_bpb: ")
    assert Dataset.open(corpus).split("holdout").sha256 in out


def test_a_look_at_the_holdout_that_cannot_be_counted_shows_nothing(finished, monkeypatch, capsys):
    def read_only(*_):
        raise OSError("Read-only file system")

    monkeypatch.setattr("train.results.ledger.Ledger.append", read_only)
    assert evaluate.main([str(finished), "--holdout", "--device", "cpu"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1


def test_saved_weights_are_the_trained_ones(finished):
    model, tokenizer, _ = load_run(finished)
    assert tokenizer.vocab_size == 512
    assert model.lambda_r.tolist() != [1, 1]


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--depht", "4"], "--depth"),
        (["--depth", "four"], "--depth"),
        (["--depth", "0"], "--depth"),
        (["--depth", "9" * 20], "--depth"),
        (["--time", "3"], "--time-budget"),
        (["--d-model", "100"], "d_model"),
        (["--data", "~no-such-user/data"], "~no-such-user"),
        (["--total-batch-size", "300"], "use 256"),
        (["--total-batch-size", "100"], "use 128"),
        (["--device-batch-size", "5000", "--total-batch-size", "160000"], "smaller batch"),
        (["--time-budget", "0"], "--time-budget"),
        (["--time-budget", "nan"], "--time-budget"),
        (["--steps", "0"], "--steps"),
        (["--seed", "-1"], "--seed"),
        (["--seed", "9" * 30], "--seed"),
        (["--name", "a/b"], "--name"),
        (["--warmup-ratio", "0.8"], "--warmup-ratio"),
        (["--matrix-lr", "inf"], "--matrix-lr inf must be finite"),
        (["--checkpoint-every", "inf"], "--checkpoint-every inf must be finite"),
        (["--packing", "loose"], "--packing"),
        (["--data", "nowhere"], "nowhere"),
        (["--window-pattern", "SQ"], "window_pattern"),
        (["--recipe", "tund"], "'tund' is none of published, tuned, cpu: did you mean tuned?"),
        (["--short-window", "3"], "choose from 2, 4, 8"),
        (["--rope-base", "0.5"], "--rope-base 0.5 must be at least 1"),
        (["--wte-decay", "-0.1"], "--wte-decay -0.1 must be at least 0"),
        (["--lambda-0-init", "nan"], "--lambda-0-init nan must be finite"),
        (["--lambda-r-init=-inf"], "--lambda-r-init -inf must be finite"),
        (["--momentum-ramp", "-1"], "--momentum-ramp -1 must be at least 0"),
    ],
)
def test_bad_arguments_are_named_in_one_line(corpus, tmp_path, capsys, args, named):
    try:
        code = run_main(corpus, tmp_path / "run", *args)
    except SystemExit as exit:  # argparse
        code = exit.code
    captured = capsys.readouterr()
    assert code == 2
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert named in captured.err
    assert not (tmp_path / "run").exists()


def test_no_gpu_is_said_in_one_line(corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run_main(corpus, tmp_path / "run", "--device", "cuda") == 2
    assert "--device cuda" in capsys.readouterr().err


def test_a_gpu_has_no_autocast_to_announce(monkeypatch):
    monkeypatch.setattr(train.device, "pick_device", lambda wanted: "cuda")
    assert train.device.complete(TrainConfig(ops="reference", autocast=True)).autocast is False


@pytest.mark.parametrize("has_bf16", [False, True])
def test_the_measured_step_multiplies_as_the_run_does(monkeypatch, has_bf16):
    monkeypatch.setattr("train.config.cpu_has_bf16", lambda: has_bf16)
    shape = GPTConfig(depth=2, d_model=32, head_dim=16, seq_len=16, vocab_size=64)
    config = resolve(TrainConfig(seq_len=16, device_batch_size=2, total_batch_size=32, ops="reference"), "cpu")
    step, _, _ = steps.make_step(config, shape, torch.float32)
    assert step.autocast is has_bf16
    iterates = {group.iterate_dtype for group in step.optimizer.groups if isinstance(group, MuonGroup)}
    assert iterates == {torch.bfloat16 if has_bf16 else torch.float32}


@pytest.mark.parametrize(
    ("shape", "named"), [({"head_dim": 256}, "--head-dim 256: .* 16, 32, 64, 128"), ({"d_model": 8320}, "at most 8192")]
)
def test_a_shape_that_the_kernels_do_not_take_is_bad_input(monkeypatch, shape, named):
    monkeypatch.setattr(train.device, "pick_device", lambda wanted: "cuda")
    monkeypatch.setattr(train.device, "check_launching", lambda: None)
    assert train.device.complete(TrainConfig(ops="reference", **shape)).ops == "reference"
    with pytest.raises(InputError, match=named):
        train.device.complete(TrainConfig(ops="triton", **shape))
    kernels.set_ops(None)


def test_a_run_folder_in_use_is_left_alone(corpus, finished, capsys):
    before = {p.name: p.stat().st_mtime_ns for p in finished.iterdir()}
    assert run_main(corpus, finished, "--steps", "1") == 2
    assert "--run-dir" in capsys.readouterr().err
    assert before == {p.name: p.stat().st_mtime_ns for p in finished.iterdir()}


def test_what_does_not_fit_is_said_up_front(corpus, tmp_path, capsys, monkeypatch):
    args = ["--device-batch-size", "64", "--total-batch-size", str(64 * 32)]
    monkeypatch.setattr(train.memory, "available_bytes", lambda device: train.memory.OVERHEAD["cpu"] + 20 * 2**20)
    assert run_main(corpus, tmp_path / "run", *args) == 2
    err = capsys.readouterr().err
    named = int(re.search(r"use --device-batch-size (\d+)", err)[1])
    assert 64 % named == 0
    assert named < 64
    # And what is named does fit.
    args[1] = str(named)
    assert run_main(corpus, tmp_path / "run", *args, "--steps", "1") == 0
    monkeypatch.setattr(train.memory, "available_bytes", lambda device: 1000)
    assert run_main(corpus, tmp_path / "run2", *args) == 2
    assert "less than one row needs: lower --seq-len or --depth" in capsys.readouterr().err


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as exit:
        train.__main__.main(["--help"])
    assert exit.value.code == 0
    out = capsys.readouterr().out
    assert all(f"--{f.replace('_', '-')}" in out for f in TrainConfig.__dataclass_fields__)
    assert "20971520" in out.replace("\n", "")  # every digit of a default
