"""Numbers that are compared with no other: of runs that two states of the code trained, or that were stopped."""

import json
from types import SimpleNamespace

import pytest

import train.results.record
import train.trainer
from tests.helpers.stopped_run import interrupt, main, signal_after
from train.config import TrainConfig
from train.results.ledger import Ledger
from train.step import TrainStep

CLEAN = {"commit": "a" * 40, "dirty": False, "diff_sha256": None}
OTHER = {"commit": "b" * 40, "dirty": False, "diff_sha256": None}
EDITED = {"commit": "a" * 40, "dirty": True, "diff_sha256": "e" * 64}
EDITED_AGAIN = {"commit": "a" * 40, "dirty": True, "diff_sha256": "f" * 64}
NONE = {"commit": None, "dirty": None, "diff_sha256": None}


@pytest.mark.parametrize(
    ("sources", "commit", "doubt"),
    [
        ([CLEAN, CLEAN, CLEAN], "aaaaaaa", ""),
        ([NONE, NONE, NONE], "none", ""),
        ([EDITED, EDITED, EDITED], "aaaaaaa+", ""),
        ([CLEAN, CLEAN, OTHER], "aaaaaaa>bbbbbbb", "aaaaaaa > bbbbbbb"),
        ([CLEAN, OTHER, CLEAN], "aaaaaaa>bbbbbbb>aaaaaaa", "aaaaaaa > bbbbbbb > aaaaaaa"),
        ([CLEAN, NONE, NONE], "aaaaaaa>none", "aaaaaaa > none"),
        ([EDITED, EDITED_AGAIN, EDITED_AGAIN], "aaaaaaa+>aaaaaaa+",
         "aaaaaaa+ (changes eeeeeeee) > aaaaaaa+ (changes ffffffff)"),
    ],
)  # fmt: skip
def test_every_code_that_trained_a_run_is_in_its_row(corpus, tmp_path, monkeypatch, capsys, sources, commit, doubt):
    """Stopped twice, and gone on with each time by a process at `sources`."""
    begun, resumed, finished = sources

    def at(source):
        monkeypatch.setattr(train.results.record, "source_state", lambda: dict(source))

    at(begun)
    folder = interrupt(corpus, tmp_path / "run", "--steps", "6", step=1)
    at(resumed)
    with pytest.MonkeyPatch.context() as patch:
        signal_after(patch, 3)
        assert main("--resume", str(folder)) == 143
    at(finished)
    capsys.readouterr()
    assert main("--resume", str(folder)) == 0
    out = capsys.readouterr().out
    (row,) = Ledger(tmp_path).runs()
    cells = (tmp_path / "results.tsv").read_text().splitlines()[-1].split("\t")
    assert cells[0] == row["commit"] == commit
    assert row["val_bpb"] is not None
    said = f"resumed with other code: {doubt}"
    assert row["doubts"] == [said] * bool(doubt)
    assert (row["status"], row["verdict"]) == (("discard", "not compared") if doubt else ("keep", "baseline"))
    assert (f"note:   {said}: its number will be compared with no other" in out) == bool(doubt)
    assert (f"verdict:               not compared ({said})" in out) == bool(doubt)


def test_a_checkpoint_of_before_knows_its_last_commit(monkeypatch):
    """Whose code was another: it wrote no `sources`."""
    for now, then, found in ((CLEAN, "bbbbbbb+", ["resumed with other code: bbbbbbb+ > aaaaaaa"]), (NONE, None, [])):
        monkeypatch.setattr(train.results.record, "source_state", lambda now=now: now)
        record = train.results.record.Record(TrainConfig(resume="run"))
        record.goes_on_from({"environment": {"commit": then}})
        assert record.doubts() == found


@pytest.mark.parametrize(("length", "counts"), [(["--time-budget", "2"], True), (["--steps", "10"], False)])
def test_a_stop_inside_the_budget_is_in_the_row(corpus, tmp_path, monkeypatch, capsys, length, counts):
    """By a clock on which every step takes 0.25 s; stopped before the run is interrupted, and gone on with later."""
    clock = SimpleNamespace(lag=0, now=0.0, mark=lambda: clock.now, seconds=lambda start, end: end - start)
    call = TrainStep.__call__

    def step(*args, apply=True):
        clock.now += 0.25 * apply
        return call(*args, apply=apply)

    monkeypatch.setattr(TrainStep, "__call__", step)
    monkeypatch.setattr(train.trainer, "clock_of", lambda device: clock)
    seen = iter([0.0] * 4 + [31.25])
    monkeypatch.setattr(train.trainer.Stops, "since", lambda self: next(seen, 0.0))
    folder = interrupt(corpus, tmp_path / "run", *length, "--untimed-steps", "2", step=5)
    assert main("--resume", str(folder)) == 0
    out = capsys.readouterr().out
    (row,) = Ledger(tmp_path).runs()
    doubt = "stopped for 31.2 s inside its budget"
    assert row["doubts"] == [doubt] * counts
    assert row["seconds"]["stopped"] == 31.25
    assert (row["status"], row["verdict"]) == (("discard", "not compared") if counts else ("keep", "baseline"))
    assert json.loads((folder / "summary.json").read_text())["stopped_seconds"] == 31.25
    assert "stopped_seconds:       31.2\n" in out
    assert (f"verdict:               not compared ({doubt})" in out) == counts
