"""A run that fails says on what, and shows it again."""

import math
import shutil

import pytest
import torch
from safetensors.torch import load_file

from prepare import Batch
from prepare.words import command_line
from tests.helpers.damage import COUNT, fuzz
from tests.helpers.payloads import FORMS
from tests.helpers.small_step import CONFIG, endless_batches, make_step
from tests.helpers.tiny_run import run_main
from train import replay
from train.resilience import failure
from train.resilience.failure import find, read_failure
from train.resilience.tensors import digest, save_tensors
from train.schedule import step_values

STEPS = ["--steps", "8", "--checkpoint-every", "1000"]
# Rates at which a step of finite loss has gradients that are not, and a step has no loss.
CAUSES = {
    "gradient": (["--ops", "reference", "--lm-head-lr", "1e25", "--matrix-lr", "1e8"], "the gradient of "),
    "loss": (["--matrix-lr", "1e30"], "loss is nan in batch "),
}


def fail(corpus, folder, *args: str):
    assert run_main(corpus, folder, *STEPS, *args) == 1
    return folder


@pytest.fixture(scope="module")
def failed(corpus, tmp_path_factory):
    """The folder of a run whose second step has a loss and no gradient."""
    return fail(corpus, tmp_path_factory.mktemp("failed") / "run", *CAUSES["gradient"][0])


@pytest.mark.parametrize("kind", CAUSES)
def test_a_run_that_fails_is_shown_again(corpus, tmp_path, capsys, kind):
    args, said = CAUSES[kind]
    folder = fail(corpus, tmp_path / "a run", *args)
    out = capsys.readouterr().out
    line = out.splitlines()[-1]
    assert line.startswith(f"FAIL: step 00001: {said}")
    assert "in batch 2 (micro-batch 1 of 2); kept for " + command_line("train.replay", folder) in line
    assert out.count("\nstep ") == 1  # the bad step is not reported
    assert not (folder / "failure.part").exists()
    assert replay.main([str(folder)]) == 1
    again = capsys.readouterr().out
    assert again.splitlines()[0] == line.partition("; kept")[0]
    assert "in the run it was" not in again
    # In the order of the forward and the backward, so that the first bad tensor is where it began.
    activations, gradients = again.partition("activations of batch 2")[2].split("gradients after batch 2")
    bad = [row.split()[0] for row in activations.splitlines()[1:] if row.split()[1] != "0"]
    assert bool(bad) == (kind == "loss")
    assert not bad or bad[0] == "linear[0]"
    assert " 0 of " in gradients or kind == "loss"
    parameters = again.partition("parameters")[2].partition("activations")[0].splitlines()[1:]
    assert len(parameters) > 10
    assert all(" 0 of " in row for row in parameters)


def test_the_parameters_kept_are_those_before_the_step(corpus, failed, tmp_path):
    """A run of one step alone has the same."""
    args = [*CAUSES["gradient"][0], "--steps", "1", "--warmdown-ratio", "0"]
    assert run_main(corpus, tmp_path / "one", *args) == 0
    kept, model = read_failure(failed).parameters, load_file(tmp_path / "one" / "model.safetensors")
    assert digest(kept) == digest(model)


def test_a_failure_that_is_none_any_more(failed, tmp_path, capsys):
    """As after a change of a kernel: with parameters of a usual size the step is good."""
    run = shutil.copytree(failed, tmp_path / "run")
    kept = read_failure(run)
    save_tensors(run / "failure" / failure.PARAMETERS, {name: t.clamp(-1, 1) for name, t in kept.parameters.items()})
    assert replay.main([str(run)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "step 00001: the loss and all gradients are good"
    assert out[1] == f"in the run it was: {kept.line}"


@pytest.mark.parametrize("name", ["failure.json", "parameters.safetensors", "batches.safetensors"])
def test_a_damaged_failure_is_refused(failed, tmp_path, name):
    run = shutil.copytree(failed, tmp_path / "run")

    def read():
        kept = read_failure(run)
        batches = [batch.tokens.tolist() for batch in kept.batches]
        return kept.step, kept.line, batches, digest(kept.parameters), digest(kept.generators)

    assert fuzz(run / "failure" / name, read) >= 1.8 * COUNT


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
@pytest.mark.parametrize("name", ["failure.json", "parameters.safetensors", "batches.safetensors"])
def test_a_failure_runs_no_code(failed, payload, tmp_path, capsys, name, form):
    run = shutil.copytree(failed, tmp_path / "run")
    form(payload, run / "failure" / name)
    assert replay.main([str(run)]) == 2
    err = capsys.readouterr().err
    assert name in err
    assert err.count("\n") == 1


def test_nothing_to_show(small_run, tmp_path, capsys):
    for run in (small_run, tmp_path / "nowhere"):
        assert replay.main([str(run)]) == 2
        assert "has no step that failed" in capsys.readouterr().err


def test_a_full_disk_leaves_the_line(corpus, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(failure, "save_tensors", full)
    folder = fail(corpus, tmp_path / "run", *CAUSES["loss"][0])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("FAIL: step 00001: loss is nan")
    assert last.endswith("it could not be kept ([Errno 28] No space left on device)")
    assert not list(folder.glob("failure*"))


def test_no_memory_to_repeat_it_in(corpus, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(failure, "find", full)
    fail(corpus, tmp_path / "run", *CAUSES["loss"][0])
    assert "loss is nan (batches 2 to 3); there is no memory to repeat it in" in capsys.readouterr().out


def test_the_bad_micro_batch_is_named():
    """The token that is only in the third of four leads to the one row of a table that is not finite."""
    step = make_step()
    batches = [next(endless_batches()) for _ in range(4)]
    tokens = [torch.full((4, 33), 7, dtype=torch.int32) for _ in batches]
    tokens[2][1, 5] = 300
    batches = [Batch(tokens=t, epoch=1, index=40 + i, state={}) for i, t in enumerate(tokens)]
    step.optimizer.grads.fill_(math.nan)  # left by the step that failed, and by what was sent after it
    assert find(step, batches) is None
    with torch.no_grad():
        step.model.wte[300] = math.inf
    before = {name: p.detach().clone() for name, p in step.model.named_parameters()}
    finding = find(step, batches)
    assert finding.micro_batch == 2
    assert finding.text == "loss is nan in batch 42 (micro-batch 3 of 4)"
    for name, p in step.model.named_parameters():
        assert torch.equal(p, before[name]), name
    _, good = step(batches, step_values(CONFIG, 0, 0.0), apply=False)
    assert not good


@pytest.mark.parametrize(("value", "text"), [
    (math.nan, "the gradient of w_fc[1] is not finite in batch 0 (micro-batch 1 of 2)"),
    (3e38, "the sum of all gradients overflows, up to 3e+38 in w_fc[1], in batch 0 (micro-batch 1 of 2)"),
])  # fmt: skip
def test_the_bad_gradient_is_named(monkeypatch, value, text):
    step, backward = make_step(), torch.Tensor.backward

    def poisoned(self):
        backward(self)
        step.optimizer.parameters["w_fc"].main_grad[1, :2, 3] = value

    monkeypatch.setattr(torch.Tensor, "backward", poisoned)
    source = endless_batches()
    assert find(step, [next(source), next(source)]).text == text


def test_watching_leaves_the_ops_as_they_were():
    step = make_step()
    before = {name: getattr(replay.kernels, name) for name in replay.kernels.op_names()}
    rows = [line.split() for line in replay.activations(step, next(endless_batches()).tokens)]
    assert before == {name: getattr(replay.kernels, name) for name in before}
    names = [name for name, *_ in rows]
    assert names[:2] == ["embedding", "embedding"]
    assert names.count("relu2_mlp[0]") == names.count("relu2_mlp[1]") == names.count("rotary_attention[1]") == 1
    assert names[-1] == "linear_cross_entropy"
    assert all(bad == "0" for _, bad, *_ in rows)


@pytest.mark.parametrize("fused_norms", [False, True])
def test_what_an_op_returned_is_seen_before_another_writes_over_it(fused_norms):
    step, tokens = make_step(), next(endless_batches()).tokens
    step.model.fused_norms = fused_norms
    seen = {}
    for ops in ("reference", "triton"):
        replay.kernels.set_ops(ops)
        seen[ops] = [line.split() for line in replay.activations(step, tokens)]
    replay.kernels.set_ops(None)
    names = [name for name, *_ in seen["triton"]]
    norm = "norm_factors" if fused_norms else "rms_norm"
    assert {f"{name}[{i}]" for name in (norm, "qkv_projection", "relu2_mlp") for i in range(2)} <= {*names}
    assert names[-2:] == ["rms_norm", "linear_cross_entropy"]
    for reference, kernel in zip(*seen.values(), strict=True):
        assert kernel[:4] == reference[:4]
        assert [float(x) for x in kernel[4:]] == pytest.approx([float(x) for x in reference[4:]], rel=2e-3, abs=1e-4)
