"""Every run leaves a row: finished, failed, broken, interrupted, repeated, confirmed."""

import csv
import itertools
import json
import math
import re
import signal
import subprocess

import pytest
import tiny_run
import torch

import train.__main__
import train.experiment
from model import GPT
from train.config import TrainConfig, parse_given, to_args
from train.ledger import Ledger
from train.provenance import evaluating_code_sha256, short_commit, source_state


def run_main(corpus, folder, *args: str) -> int:
    return tiny_run.run_main(corpus, folder, "--steps", "3", *args)


def rows(folder) -> list[dict]:
    with (folder / "results.tsv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t"))


@pytest.mark.usefixtures("pictures")
def test_a_finished_run(corpus, tmp_path):
    assert run_main(corpus, tmp_path / "a", "--description", "the baseline") == 0
    assert run_main(corpus, tmp_path / "b", "--seed", "7") == 0
    first, second = rows(tmp_path)
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert first["val_bpb"] == summary["val_bpb"]
    assert (first["status"], first["verdict"], first["description"]) == ("keep", "baseline", "the baseline")
    assert [summary[key] for key in ("audit", "status", "verdict")] == ["ok", "keep", "baseline"]
    assert second["status"] == ("keep" if second["val_bpb"] < first["val_bpb"] else "discard")
    assert second["verdict"] == "unknown"
    full = Ledger(tmp_path).runs()[0]
    assert full["config"]["depth"] == 2
    assert full["seconds"].keys() >= {"setup", "compile", "training", "evaluation", "overshoot", "audit", "total"}
    assert full["versions"]["torch"] == torch.__version__
    assert full["comparable"]["evaluation"]["code_sha256"] == evaluating_code_sha256()
    assert full["comparable"]["evaluation"]["split_sha256"] == summary["fingerprint"]["split_sha256"]
    assert full["summary"]["val_bpb"] == summary["val_bpb"]
    assert (tmp_path / "a" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert first["budget"] == "3 steps"


def test_a_run_that_fails_and_one_that_is_broken(corpus, tmp_path, monkeypatch):
    forward = GPT.forward
    monkeypatch.setattr(GPT, "forward", lambda self, *args, **kwargs: forward(self, *args, **kwargs) * math.nan)
    assert run_main(corpus, tmp_path / "nan") == 1
    monkeypatch.setattr(GPT, "forward", lambda self, *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # a bug in the experiment, met before there is a folder
        run_main(corpus, tmp_path / "bug", "--description", "bug")
    failed, broken = rows(tmp_path)
    assert (failed["val_bpb"], failed["memory_gb"], failed["status"], failed["verdict"]) == (
        "0.000000", "0.0", "crash", "failed",
    )  # fmt: skip
    assert failed["note"].startswith("step 00000: loss is nan")
    assert failed["note"].endswith(", after 0 steps")
    assert (broken["run"], broken["status"], broken["description"]) == ("bug", "crash", "bug")
    assert broken["note"] == "ZeroDivisionError: division by zero, before the first step"


@pytest.mark.usefixtures("pictures")
def test_a_run_that_fails_later_has_curves_of_what_it_did(corpus, tmp_path, monkeypatch):
    forward, calls = GPT.forward, itertools.count()
    broken = lambda *args, **kwargs: forward(*args, **kwargs) * (math.nan if next(calls) >= 4 else 1.0)  # noqa: E731
    monkeypatch.setattr(GPT, "forward", broken)
    assert run_main(corpus, tmp_path / "run") == 1
    assert 0 < len(tiny_run.rows(tmp_path / "run")) < 3
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_bad_arguments_leave_no_row(corpus, tmp_path):
    assert run_main(corpus, tmp_path / "run", "--window-pattern", "SQ") == 2
    assert run_main(corpus, tmp_path / "run", "--repeat", "0") == 2
    assert not (tmp_path / "results.tsv").exists()


def test_a_ledger_that_cannot_be_written_costs_no_run(corpus, tmp_path, capsys):
    (tmp_path / "results.lock").mkdir()
    assert run_main(corpus, tmp_path / "run") == 0
    assert "no row in the ledger" in capsys.readouterr().err
    assert (tmp_path / "run" / "summary.json").exists()


class InProcess:
    """A child that runs here and now: what several runs do does not need several interpreters."""

    def __init__(self, command: list[str], process_group: int):
        self.args = command[3:]

    def wait(self) -> int:
        return train.__main__.main(self.args)


def test_repeats_and_their_confirmation(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train.experiment, "Popen", InProcess)
    assert run_main(corpus, tmp_path / "base", "--repeat", "2", "--confirm", "--description", "two seeds") == 0
    out = capsys.readouterr().out
    found = rows(tmp_path)
    assert [row["run"] for row in found] == [f"base-seed{seed}" for seed in (42, 43, 44, 45, 46)]
    assert {row["group"] for row in found} == {"base"}
    assert [row["seed"] for row in found] == ["42", "43", "44", "45", "46"]
    assert len({row["val_bpb"] for row in found}) == 5
    assert {row["verdict"] for row in found} == {"baseline"}
    assert [run["confirms"] for run in Ledger(tmp_path).runs()] == [None, None, "base", "base", "base"]
    assert re.search(r"^tried:     \d\.\d{6} ± \d\.\d{6} \(2\)$", out, re.MULTILINE)
    assert re.search(r"^confirmed: \d\.\d{6} ± \d\.\d{6} \(3\)$", out, re.MULTILINE)

    # What is no new best is not confirmed.
    assert run_main(corpus, tmp_path / "worse", "--confirm", "--matrix-lr", "0", "--embedding-lr", "0") == 0
    assert "no new best" in capsys.readouterr().out
    assert [(row["run"], row["status"]) for row in rows(tmp_path)[5:]] == [("worse-seed42", "discard")]


def test_the_first_run_that_fails_ends_the_repeats(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(train.experiment, "Popen", InProcess)
    forward = GPT.forward
    monkeypatch.setattr(GPT, "forward", lambda self, *args, **kwargs: forward(self, *args, **kwargs) * math.nan)
    assert run_main(corpus, tmp_path / "base", "--repeat", "3") == 1
    assert [row["status"] for row in rows(tmp_path)] == ["crash"]


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_signal_reaches_the_run_and_leaves_a_row(corpus, tmp_path, number, code, word):
    args = [*tiny_run.TINY, "--data", str(corpus), "--run-dir", str(tmp_path / "run"), "--repeat", "2"]
    process = tiny_run.start(*args, "--steps", "100000")
    for line in process.stdout:
        if line.startswith("step 00003"):
            process.send_signal(number)
            break
    _, err = process.communicate(timeout=600)
    assert process.returncode == code
    assert "Traceback" not in err
    (row,) = rows(tmp_path)
    assert (row["status"], row["verdict"]) == ("crash", "interrupted")
    assert row["note"].startswith(word)
    assert int(re.search(r"after (\d+) steps", row["note"])[1]) >= 3


def test_arguments_spell_the_configuration():
    config = TrainConfig(description="--odd = one", seed=7, autocast=False, time_budget=1e-7, tensorboard=True)
    assert TrainConfig(**parse_given(to_args(config))) == config
    assert to_args(TrainConfig()) == []


def test_the_code_that_evaluates_is_hashed(monkeypatch, tmp_path):
    import train.provenance as provenance

    before = evaluating_code_sha256()
    for name in ("prepare/evaluate.py", "prepare/tokenizer.py", *provenance.EVALUATING_FILES):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes((provenance.ROOT / name).read_bytes())
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    copied = evaluating_code_sha256()
    assert copied != before  # files are missing
    for name in ("prepare/evaluate.py", "prepare/tokenizer.py", *provenance.EVALUATING_FILES):
        path = tmp_path / name
        honest = path.read_bytes()
        path.write_bytes(honest + b"# edited\n")
        assert evaluating_code_sha256() != copied, name
        path.write_bytes(honest)
    assert evaluating_code_sha256() == copied


def test_the_state_of_the_source(monkeypatch, tmp_path):
    import train.provenance as provenance

    def git(*args: str) -> None:
        who = ["-c", "user.name=x", "-c", "user.email=x@example.com"]
        subprocess.run(["git", "-C", str(tmp_path), *who, *args], check=True, capture_output=True)

    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    assert source_state()["commit"] is None
    assert short_commit(source_state()) is None
    git("init")
    (tmp_path / "model.py").write_text("depth = 8\n")
    git("add", ".")
    git("commit", "-m", "one")
    clean = source_state()
    assert (len(clean["commit"]), clean["dirty"], clean["diff_sha256"]) == (40, False, None)
    (tmp_path / "model.py").write_text("depth = 9\n")
    edited = source_state()
    assert edited["dirty"]
    assert (short_commit(clean), short_commit(edited)) == (clean["commit"][:7], clean["commit"][:7] + "+")
    (tmp_path / "new.py").write_text("x = 1\n")
    (tmp_path / ".#model.py").symlink_to("someone@elsewhere")  # as an editor does
    assert len({clean["diff_sha256"], edited["diff_sha256"], source_state()["diff_sha256"]}) == 3
