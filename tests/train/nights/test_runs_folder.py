"""TIMEBOX_RUNS: one folder of runs, and one ledger, for worktrees side by side."""

import train.compare
import train.report
from tests.helpers.stopped_run import main, signal_after
from tests.helpers.tiny_run import TINY
from train import doctor
from train.config import runs_folder
from train.results.ledger import Ledger


def test_every_command_looks_there(corpus, tmp_path, monkeypatch, capsys):
    shared = tmp_path / "shared runs"
    monkeypatch.setenv("TIMEBOX_RUNS", str(shared))
    arguments = [*TINY, "--data", str(corpus), "--steps", "6", "--untimed-steps", "0"]
    for worktree in ("a", "b"):
        (tmp_path / worktree).mkdir()
        monkeypatch.chdir(tmp_path / worktree)
        assert main(*arguments, "--name", worktree) == 0
    with monkeypatch.context() as patch:
        signal_after(patch, step=2)
        assert main(*arguments, "--name", "c", "--checkpoint-every", "0") == 143
    assert main("--resume", "auto") == 0
    capsys.readouterr()
    runs = Ledger(shared).runs()
    assert [run["run"].rpartition("-")[2] for run in runs] == ["a", "b", "c"]
    assert {run["outcome"] for run in runs} == {"finished"}
    assert train.compare.main([run["run"] for run in runs[:2]]) == 0
    assert train.report.main(["--no-page"]) == 0
    assert "3 experiments" in capsys.readouterr().out
    assert (shared / "report.md").exists()
    assert str(shared) in doctor.disk().found
    assert not any((tmp_path / worktree / "runs").exists() for worktree in "ab")


def test_where_it_is_not_set_or_a_home_is_meant(tmp_path, monkeypatch):
    assert str(runs_folder()) == "runs"
    monkeypatch.setenv("TIMEBOX_RUNS", "")
    assert str(runs_folder()) == "runs"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TIMEBOX_RUNS", "~/night")
    assert runs_folder() == tmp_path / "night"


def test_a_folder_that_cannot_be_is_one_line(corpus, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TIMEBOX_RUNS", str(tmp_path / "file"))
    assert main(*TINY, "--data", str(corpus), "--steps", "1") == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
    assert main("--resume", "auto") == 2
    assert train.report.main([]) == 2
    assert train.compare.main(["a", "b"]) == 2
    assert capsys.readouterr().err.count("\n") == 3
