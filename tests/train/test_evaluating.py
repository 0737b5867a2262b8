"""`--eval-every`: when it comes, what it writes, and that no run is another for it."""

import json
import math
import random
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train.__main__
import train.evaluating
from prepare import Dataset, InputError
from prepare.scoring import evaluate_bpb
from tests.helpers.stopped_run import interrupt
from tests.helpers.tiny_run import assert_same, rows, run_main
from train import evaluate
from train.config import TrainConfig, resolve
from train.evaluating import Evaluations, part_of
from train.every import Every
from train.results.evals import append_eval, cut_evals, read_evals
from train.results.ledger import Ledger
from train.results.metrics import eval_line
from train.results.progress import Reporter

STEPS = ["--steps", "10", "--untimed-steps", "3", "--keep-checkpoints", "--eval-tokens", "4096"]


@pytest.fixture(scope="module", autouse=True)
def four_batches():
    """The small corpus has 30 rows of validation: half of them are three batches of four rows, and one of three."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.evaluating.PART", 2)
        yield


@pytest.fixture(scope="module")
def without(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("without") / "run"
    assert run_main(corpus, folder, *STEPS) == 0
    return folder


@pytest.fixture(scope="module")
def evaluated(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("with") / "run"
    assert run_main(corpus, folder, *STEPS, "--eval-every", "4") == 0
    return folder


def numbers(folder) -> list[tuple]:
    """All of the rows that is no time."""
    keys = ("step", "progress", "tokens", "val_bpb", "val_rows", "val_bytes", "sample")
    return [tuple(row[key] for key in keys) for row in read_evals(folder)]


@pytest.mark.parametrize(("spelled", "steps", "seconds"), [
    ("100", 100, 0), ("1", 1, 0), ("30s", 0, 30), ("0.5s", 0, 0.5), ("0", 0, 0), ("0s", 0, 0),
])  # fmt: skip
def test_how_often_is_steps_or_seconds(spelled, steps, seconds):
    assert Every.of(spelled) == Every(steps, seconds)
    assert bool(Every.of(spelled)) == (spelled not in ("0", "0s"))


@pytest.mark.parametrize("spelled", ["", "soon", "-1", "1.5", "30 s", "5m", "s", "1e3", "nans", "9" * 5000, "٣", "3\n"])
def test_what_is_neither_is_one_line(corpus, tmp_path, capsys, spelled):
    with pytest.raises(InputError):
        Every.of(spelled)
    assert run_main(corpus, tmp_path / "run", f"--eval-every={spelled}") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --eval-every ")
    assert error.endswith(" must be steps, as 100, or seconds, as 30s; 0: never\n")
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_it_is_due_once_at_each_multiple():
    by_steps, by_seconds = Every(steps=4), Every(seconds=2.5)
    assert [step for step in range(1, 13) if by_steps.due(step, 99.0, step - 1, 0.0)] == [4, 8, 12]
    assert [step for step in range(1, 13) if by_seconds.due(99, step, 0, step - 1)] == [3, 5, 8, 10]
    assert by_steps.due(9, 0.0, 3, 0.0)  # late, but once
    assert not by_steps.due(9, 0.0, 8, 0.0)
    assert not Every().due(100, 100.0, 0, 0.0)


def test_a_run_with_it_is_the_run_without(without, evaluated):
    """Weights, moments, losses, val_bpb, and what a checkpoint has of generators and loader."""
    assert_same(evaluated, without)
    assert [row["step"] for row in read_evals(evaluated)] == [4, 8]
    a, b = (Ledger.beside(folder).runs()[0] for folder in (evaluated, without))
    assert a["comparable"] == b["comparable"]
    assert a["doubts"] == b["doubts"] == []
    assert a["budget"] == b["budget"]


def test_off_by_default_it_writes_nothing(without):
    assert not (without / "evals.jsonl").exists()
    summary = json.loads((without / "summary.json").read_text())
    assert "eval_seconds" not in summary
    assert "evals" not in summary["seconds"]


def test_its_seconds_are_counted_by_themselves(evaluated):
    summary = json.loads((evaluated / "summary.json").read_text())
    took = sum(row["seconds"] for row in read_evals(evaluated))
    assert summary["eval_seconds"] == pytest.approx(took)
    assert Ledger.beside(evaluated).runs()[0]["seconds"]["evals"] == pytest.approx(took)
    assert summary["training_seconds"] + summary["untimed_seconds"] == pytest.approx(
        sum(row["seconds"] for row in rows(evaluated))
    )


def test_it_scores_evenly_spaced_rows_of_validation_as_the_final_evaluation_does(corpus, tmp_path, monkeypatch):
    """At the last step the model is the finished one: its number on the part is that of the evaluation by hand."""
    assert run_main(corpus, tmp_path / "run", *STEPS, "--eval-every", "10") == 0
    (row,) = read_evals(tmp_path / "run")
    found = []

    def noted(*args, **kwargs):
        found.append(evaluate_bpb(*args, **kwargs))
        return found[0]

    monkeypatch.setattr(evaluate, "evaluate_bpb", noted)
    tokens = Dataset.open(corpus).split("val").num_tokens // 2
    assert evaluate.main([str(tmp_path / "run"), "--eval-tokens", str(tokens)]) == 0
    assert row["val_bpb"] == pytest.approx(found[0].bpb, rel=1e-6)
    assert (row["val_rows"], row["val_bytes"]) == (found[0].rows, found[0].bytes_scored)
    assert row["val_rows"] in (15, 16)
    assert row["sample"] == (tmp_path / "run" / "sample.txt").read_text()


@pytest.mark.parametrize(("eval_tokens", "tokens"), [(0, 100), (8000, 100), (400, 50), (3, 1)])
def test_the_part_is_an_eighth_of_what_is_scored_at_the_end(monkeypatch, eval_tokens, tokens):
    monkeypatch.setattr("train.evaluating.PART", 8)
    data = SimpleNamespace(split={"val": SimpleNamespace(num_tokens=807)}.__getitem__)
    assert part_of(TrainConfig(eval_tokens=eval_tokens), data) == tokens


def test_it_is_printed(corpus, tmp_path, capsys):
    assert run_main(corpus, tmp_path / "run", *STEPS, "--eval-every", "5") == 0
    out = capsys.readouterr().out
    lines = out.partition("\n---\n")[0].splitlines()
    five, ten = read_evals(tmp_path / "run")
    at = next(i for i, line in enumerate(lines) if line.startswith("eval 00005 (50.0%) | val_bpb: "))
    assert lines[at] == eval_line(five)
    assert f"{five['val_bpb']:.6f} on {five['val_rows']} rows | took: " in lines[at]
    assert " | The " in lines[at]
    assert lines[at - 1].startswith("step 00004")
    assert lines[at + 1].startswith("step 00005")
    assert lines[-1] == eval_line(ten)
    assert "\neval_seconds: " in out


def test_a_line_is_as_wide_as_the_terminal_and_shows_no_control_character():
    sample = "The  \x1b[31m\n\t " + "x" * 900
    row = {"step": 7, "progress": 0.5, "val_bpb": None, "val_rows": 3, "seconds": 0.12, "sample": sample}
    whole = "eval 00007 (50.0%) | val_bpb: n/a on 3 rows | took: 0.1s | The \\x1b[31m " + "x" * 99
    assert eval_line(row, 70) == whole[:70]
    assert len(eval_line(row)) < 130


def test_no_generator_notices(corpus, tmp_path, without, monkeypatch):
    """Whatever a model's words, or its score, would draw from those of the process."""
    inside = train.evaluating.sampled

    def greedy(*args) -> str:
        torch.rand(3), np.random.rand(3), random.random()
        return inside(*args)

    monkeypatch.setattr(train.evaluating, "sampled", greedy)
    assert run_main(corpus, tmp_path / "run", *STEPS, "--eval-every", "1") == 0
    assert_same(tmp_path / "run", without)
    states = [checkpoint_generators(folder) for folder in (tmp_path / "run", without)]
    assert states[0] == states[1]


def checkpoint_generators(folder) -> dict:
    newest = max((folder / "checkpoints").iterdir())
    return json.loads((newest / "state.json").read_text())["rng"]


# After an interruption.


@pytest.mark.parametrize("last", [2, 3, 4])
def test_a_resumed_run_is_evaluated_where_it_would_have_been(corpus, tmp_path, evaluated, last):
    """Stopped before the evaluation of step 4, at it, and after it: who asks to stop does not wait for one."""
    folder = interrupt(corpus, tmp_path / "run", *STEPS, "--eval-every", "4", step=last, number=signal.SIGINT)
    assert [row["step"] for row in read_evals(folder)] == [4] * (last > 3)
    assert train.__main__.main(["--resume", str(folder)]) == 0
    assert numbers(folder) == numbers(evaluated)
    assert_same(folder, evaluated)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["eval_seconds"] == pytest.approx(sum(row["seconds"] for row in read_evals(folder)))


def test_rows_after_the_checkpoint_are_cut(corpus, tmp_path, evaluated):
    """Also one at the checkpoint's own step that it knows nothing of: it is made again."""
    folder = interrupt(corpus, tmp_path / "run", *STEPS, "--eval-every", "4", step=3)
    for step in (4, 5, 8):
        append_eval(folder, {"step": step, "timed_seconds": 0.0, "val_bpb": 9.0, "sample": "x"})
    with (folder / "evals.jsonl").open("ab") as file:
        file.write(b'{"step": 3, "timed_sec')
    assert train.__main__.main(["--resume", str(folder)]) == 0
    assert numbers(folder) == numbers(evaluated)


def test_it_may_be_changed_where_a_run_goes_on(corpus, tmp_path, evaluated):
    folder = interrupt(corpus, tmp_path / "run", *STEPS, step=5)
    assert train.__main__.main(["--resume", str(folder), "--eval-every", "3"]) == 0
    assert [row["step"] for row in read_evals(folder)] == [6, 9]
    assert_same(folder, evaluated)


def test_damaged_rows_are_left_out(tmp_path):
    good = {"step": 3, "timed_seconds": 1.0, "val_bpb": 2.0, "sample": "x"}
    odd = {"step": (True, -1, 10**400, 1.5), "val_bpb": (None, math.nan, 10**400), "timed_seconds": ("1",),
           "sample": (5,)}  # fmt: skip
    bad = [{}, [], None, 3, *(good | {key: value} for key, values in odd.items() for value in values)]
    lines = [json.dumps(row).encode() for row in (*bad, good)] + [b"\xff\x00", b"[" * 9999, b'{"step": 3']
    (tmp_path / "evals.jsonl").write_bytes(b"\n".join(lines))
    assert read_evals(tmp_path) == [good]
    cut_evals(tmp_path, 2)
    assert (tmp_path / "evals.jsonl").read_bytes() == b""
    assert read_evals(tmp_path / "nowhere") == []
    (tmp_path / "folder" / "evals.jsonl").mkdir(parents=True)
    assert read_evals(tmp_path / "folder") == []


# What may happen to one.


def test_a_full_disk_costs_its_row_alone(corpus, tmp_path, without, monkeypatch, capsys):
    def full(folder, row):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("train.results.run_folder.append_eval", full)
    assert run_main(corpus, tmp_path / "run", *STEPS, "--eval-every", "4") == 0
    assert capsys.readouterr().err.count("note: the disk is full") == 1
    assert_same(tmp_path / "run", without)


def test_with_too_little_memory_it_takes_fewer_rows_at_a_time(corpus, tmp_path, without, monkeypatch, capsys):
    """And stays with them; the number is the same."""
    token_losses, sizes = train.step.TrainStep.token_losses, []

    def scarce(self, inputs, targets):
        sizes.append(len(inputs))
        if len(inputs) > 1 and len(sizes) < 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return token_losses(self, inputs, targets)

    monkeypatch.setattr(train.step.TrainStep, "token_losses", scarce)
    assert run_main(corpus, tmp_path / "run", *STEPS, "--eval-every", "4") == 0
    assert capsys.readouterr().err.count("note: out of memory: going on with ") == 2
    assert sizes[:2] == [4, 2]
    assert set(sizes[2:28]) == {1}  # two evaluations
    assert_same(tmp_path / "run", without)


def test_the_watchdog_looks_on(corpus, tmp_path, monkeypatch):
    """A beat after each batch; what is usual there says nothing of a step, and the other way round."""
    events = []
    watchdog = train.resilience.watchdog.Watchdog
    beat, phase, step, evaluated = watchdog.beat, watchdog.phase, Reporter.step, Reporter.evaluated
    monkeypatch.setattr(watchdog, "beat", lambda self: events.append("beat") or beat(self))
    monkeypatch.setattr(watchdog, "phase", lambda self: events.append("phase") or phase(self))
    monkeypatch.setattr(Reporter, "step", lambda self, *args: step(self, *args) or events.append("step"))
    monkeypatch.setattr(Reporter, "evaluated", lambda self, row: evaluated(self, row) or events.append("row"))
    assert run_main(corpus, tmp_path / "run", *STEPS, "--eval-every", "4") == 0
    second = events.index("row") + 1
    between = events[second : events.index("row", second)]
    assert between == ["beat", "step"] * 4 + ["phase", *["beat"] * 4, "phase", "phase"]


def test_of_a_number_that_is_none_there_is_a_row(corpus, tmp_path):
    class Evaluation:
        bpb, rows, bytes_scored = math.nan, 1, 1

    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evaluations, "_evaluated", lambda self, rows: Evaluation)
        assert run_main(corpus, folder, *STEPS, "--eval-every", "4") == 0
    assert [json.loads(line)["val_bpb"] for line in (folder / "evals.jsonl").read_text().splitlines()] == [None] * 2
    assert read_evals(folder) == []


def test_the_configuration_is_resolved_with_it():
    with pytest.raises(InputError, match=r"^--eval-every 'soon' must be"):
        resolve(TrainConfig(eval_every="soon"), "cpu")
    assert "eval_every" not in resolve(TrainConfig(eval_every="3"), "cpu").fixed()
