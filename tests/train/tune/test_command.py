"""`python -m train.tune`: its arguments, what it prints, and its exit codes."""

import json
from types import SimpleNamespace

import pytest
import torch

from prepare import InputError
from train.tune import __main__ as command
from train.tune.table import Kept, Machine
from train.tune.trials import Trial, Tuned
from train.tune.tuner import Outcome

MACHINE = Machine("a GPU", "1", "2", "3")


@pytest.mark.parametrize(("args", "words"), [
    ([], "no CUDA device here to time anything on"),
    (["--offline", "--only", "adamv"], "--only adamv: no such kernel; there are "),
    (["--offline", "--vocab-size", "0"], "--vocab-size 0 must be"),
    (["--offline", "--seconds", "nan"], "--seconds nan must be above 0"),
    (["--arch", "90"], "--arch goes with --offline"),
    (["--offline", "--head-dim", "256"], "--head-dim 256: the kernels take"),
    (["--offline", "--depth", "0"], "--depth 0 must be at least 1"),
])  # fmt: skip
def test_bad_arguments_are_one_line(monkeypatch, capsys, args, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(args) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert words in printed.err
    assert printed.err.count("\n") == 1


@pytest.fixture
def scripted(monkeypatch, tmp_path):
    """A GPU that needs no tuning, until the test says what came of it."""
    monkeypatch.setenv("TIMEBOX_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command, "check_launching", lambda: None)
    monkeypatch.setattr(command, "fit_default", lambda config, shape: config)
    monkeypatch.setattr(command.Machine, "here", classmethod(lambda cls: MACHINE))
    asked = []

    def came(outcome):
        def tune_step(config, shape, kept, seconds, fused_norms, again, only):
            asked.append(SimpleNamespace(config=config, shape=shape, seconds=seconds, fused_norms=fused_norms,
                                         again=again, only=only))  # fmt: skip
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        monkeypatch.setattr(command, "tune_step", tune_step)
        return asked

    return came


def tuned(**faults) -> Tuned:
    target = SimpleNamespace(
        name="softmax", key="100 bfloat16", calls=1.0, op=SimpleNamespace(name="loss"), fused_norms=False
    )
    trials = [Trial({"BLOCK_V": n}, fault=faults.get(f"t{n}")) for n in (64, 128, 256)]
    for trial in trials:
        trial.seconds = [] if trial.fault else [1.0, 1.0]
    return Tuned(target, trials)


def test_options_of_train_shape_the_step(scripted, capsys):
    asked = scripted(Outcome())
    assert command.main(["--depth", "4", "--vocab-size", "1000", "--only", "adamw", "muon", "--again"]) == 0
    (call,) = asked
    assert (call.config.depth, call.shape.vocab_size, call.only, call.again) == (4, 1000, ("adamw", "muon"), True)
    assert (call.seconds, call.fused_norms) == (600.0, None)
    assert "nothing to tune: " in capsys.readouterr().out
    command.main(["--no-fused-norms"])
    assert asked[-1].fused_norms is False


def test_what_came_of_it(scripted, capsys, tmp_path):
    times = {"before": [0.2], "after": [0.1]}
    outcome = Outcome([tuned(t128="wrong: by much", t256="wrong: by much")], untold=3, faults=["softmax: unsteady"])
    outcome.step = {"tuned": {"better": True, **times}, "fused_norms": {"better": False, **times}}
    scripted(outcome)
    assert command.main(["--json", str(tmp_path / "all.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "whole step: tuned: 200.00 ms before, 100.00 after: taken" in lines
    assert "whole step: fused_norms: 200.00 ms before, 100.00 after: not taken" in lines
    assert "struck out: softmax (100 bfloat16), 128, 256: wrong: by much" in lines
    assert "note: softmax: unsteady" in lines
    assert any("3 kernels were left for want of time" in line for line in lines)
    assert lines[-1].startswith("kept in ")
    (row,) = json.loads((tmp_path / "all.json").read_text())
    assert [trial["fault"] for trial in row["trials"]] == [None, "wrong: by much", "wrong: by much"]


def test_where_nothing_is_right_the_exit_code_says_so(scripted, capsys):
    scripted(Outcome([tuned(t64="AssertionError: zero", t128="wrong: zero", t256="wrong: zero")]))
    assert command.main([]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "WRONG: the default tile of softmax (100 bfloat16): AssertionError: zero" in lines
    assert "nothing that was tried computes what it should: every kernel keeps the tile of the source" in lines


def test_where_nothing_could_be_tried_the_exit_code_says_so(scripted):
    scripted(Outcome(faults=["measuring: the process ends with 1"], untold=2))
    assert command.main([]) == 1


@pytest.mark.parametrize("error", [InputError("this GPU is busy (2 GiB)"), OSError(28, "No space left on device", "f")])
def test_what_it_cannot_do_is_one_line(scripted, capsys, error):
    scripted(error)
    assert command.main([]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1


def test_a_file_that_is_not_used_is_said(scripted, capsys, tmp_path):
    Kept(tmp_path / "tuning" / "a-GPU.json", Machine("a GPU", "0", "2", "3")).write()
    scripted(Outcome())
    assert command.main([]) == 0
    assert "driver 0, now 1: what it says is not used" in capsys.readouterr().out
