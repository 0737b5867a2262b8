"""Every run leaves a row: finished, failed, broken, interrupted, repeated, confirmed."""

import csv
import errno
import itertools
import json
import math
import os
import re
import signal
import stat
import subprocess

import pytest
import torch

import train.__main__
import train.experiment
from model import GPT
from prepare import InputError
from prepare.words import SAID
from tests.helpers import tiny_run
from tests.helpers.ledger_entries import add, entry
from train import doctor
from train.config import TrainConfig, parse_given, to_args
from train.resilience.resume import is_free
from train.results.ledger import Ledger
from train.results.provenance import evaluating_code_sha256, machine, short_commit, source_state
from train.results.run_folder import RunFolder, default_run_dir, reserved_run_dir


def run_main(corpus, folder, *args: str) -> int:
    return tiny_run.run_main(corpus, folder, "--steps", "3", *args)


def rows(folder) -> list[dict]:
    with (folder / "results.tsv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t"))


@pytest.mark.usefixtures("pictures")
def test_a_finished_run(corpus, tmp_path, capsys):
    assert run_main(corpus, tmp_path / "a", "--description", "the baseline") == 0
    assert run_main(corpus, tmp_path / "b", "--seed", "7") == 0
    first, second = rows(tmp_path)
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert first["val_bpb"] == f"{summary['val_bpb']:.6f}"
    assert (first["status"], first["verdict"], first["description"]) == ("keep", "baseline", "the baseline")
    assert [summary[key] for key in ("audit", "status", "verdict")] == ["ok", "keep", "baseline"]
    assert (second["status"], second["verdict"]) == ("discard", "undecided: next seed 42")
    assert "nothing is known of the noise" in second["note"]
    assert " -m train --group b --seed 42, and the other options as they were" in capsys.readouterr().out
    full = Ledger(tmp_path).runs()[0]
    assert full["config"]["depth"] == 2
    assert full["seconds"].keys() >= {"setup", "compile", "training", "evaluation", "overshoot", "audit", "total"}
    assert full["versions"]["torch"] == torch.__version__
    assert full["comparable"]["evaluation"]["code_sha256"] == evaluating_code_sha256()
    assert full["comparable"]["evaluation"]["split_sha256"] == summary["fingerprint"]["split_sha256"]
    assert full["val_bpb"] == full["summary"]["val_bpb"] == summary["val_bpb"]
    assert (tmp_path / "a" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert first["budget"] == "3 steps"
    assert full["load"]["other_cores"] >= 0
    assert {"--steps=3", "--depth=2", "--no-autocast"} < set(full["flags"])
    assert not any(flag.startswith(("--description", "--run-dir", "--seed")) for flag in full["flags"])
    assert (tmp_path / "a" / "changes.diff").exists()


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


def test_repeats_are_one_experiment(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train.experiment, "Popen", InProcess)
    assert run_main(corpus, tmp_path / "base", "--repeat", "2", "--description", "two seeds") == 0
    out = capsys.readouterr().out
    found = rows(tmp_path)
    assert [(row["run"], row["seed"]) for row in found] == [("base-seed42", "42"), ("base-seed43", "43")]
    assert {row["group"] for row in found} == {"base"}
    assert len({row["val_bpb"] for row in found}) == 2
    assert {(row["status"], row["verdict"]) for row in found} == {("keep", "baseline")}
    assert re.search(r"^val_bpb:   \d\.\d{6} ± \d\.\d{6} \(2\)$", out, re.MULTILINE)
    assert re.search(r"^status:    keep$", out, re.MULTILINE)


@pytest.fixture
def trials(monkeypatch, tmp_path):
    """Runs that take no time: the n-th of a group has the n-th of the numbers that the test gives it."""
    numbers: dict[str, list[float]] = {}

    class Run:
        def __init__(self, command: list[str], process_group: int):
            self.config = TrainConfig(**parse_given(command[3:]))

        def wait(self) -> int:
            config = self.config
            name = config.run_dir.rpartition("/")[2]
            with Ledger(tmp_path).locked():
                pass
            made = entry(name, numbers[config.group].pop(0), group=config.group, seed=config.seed)
            made["comparable"] |= {"machine": machine("cpu")["name"], "budget": "3 steps"}
            made["config"] = {"max_seeds": config.max_seeds}
            add(Ledger(tmp_path), made)
            return 0

    def confirm(name: str, *values: float, more: tuple[str, ...] = ("--confirm",)) -> int:
        numbers[name] = [*values]
        code = train.__main__.main(["--steps", "3", "--device", "cpu", "--run-dir", str(tmp_path / name), *more])
        assert numbers[name] == [], "so many runs were made"
        return code

    monkeypatch.setattr(train.experiment, "Popen", Run)
    return confirm


def test_seed_after_seed_until_it_is_known(trials, tmp_path, capsys):
    assert trials("base", 1.000, 1.004, 0.996, more=("--repeat", "3")) == 0
    assert trials("worse", 1.02) == 0
    assert trials("luck", 0.992, 1.004) == 0
    assert trials("gain", 0.985, 0.984, 0.986) == 0  # the last on a fresh seed
    out = capsys.readouterr().out
    assert [(row["group"], row["seed"], row["status"], row["verdict"]) for row in rows(tmp_path)[3:]] == [
        ("worse", "44", "discard", "not better"),
        ("luck", "44", "discard", "undecided: next seed 43"), ("luck", "43", "discard", "not better"),
        ("gain", "44", "discard", "undecided: next seed 43"), ("gain", "43", "keep", "better"),
        ("gain", "45", "keep", "incumbent"),
    ]  # fmt: skip
    assert "worse against base: 1 to 3 runs of about 320 s, and one more if it is better" in out
    assert "luck: 2 runs" in out
    assert "gain is better, on a fresh seed: seed 45" in out
    # The next one begins with what owes nothing to having been chosen.
    assert trials("next", 0.99) == 0
    assert rows(tmp_path)[-1]["seed"] == "45"


def test_at_most_so_many_seeds(trials, tmp_path):
    trials("base", 1.000, 1.004, 0.996, more=("--repeat", "3"))
    assert trials("one", 0.997, more=("--confirm", "--max-seeds", "1")) == 0
    assert rows(tmp_path)[-1]["verdict"] == "not better"


def test_the_first_of_all_is_the_baseline_and_needs_no_second(trials, tmp_path):
    assert trials("base", 1.0) == 0
    assert [(row["status"], row["verdict"]) for row in rows(tmp_path)] == [("keep", "baseline")]


def test_what_is_due_is_said_with_its_command(trials, tmp_path, capsys):
    trials("base", 1.000, 1.004, 0.996, more=("--repeat", "3"))
    for i in range(12):
        assert "due: " not in capsys.readouterr().out
        trials(f"idea-{i}", 1.03)
    assert "due:       base was last run 12 experiments ago" in (out := capsys.readouterr().out)
    assert " -m train --group base --seed 45" in out
    trials("base", 1.001, more=("--group", "base", "--seed", "45", "--repeat", "1", "--confirm"))


def test_confirm_and_repeat_are_two_ways(corpus, tmp_path, capsys):
    assert run_main(corpus, tmp_path / "a", "--repeat", "2", "--confirm") == 2
    assert "--confirm takes its seeds one by one" in capsys.readouterr().err
    assert run_main(corpus, tmp_path / "a", "--confirm", "--max-seeds", "0") == 2
    assert not (tmp_path / "results.tsv").exists()


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
    config = TrainConfig(description="--odd = one", seed=7, autocast=False, time_budget=1e-7, track="wandb,tensorboard")
    assert TrainConfig(**parse_given(to_args(config))) == config
    assert to_args(TrainConfig()) == []


def test_the_code_that_evaluates_is_hashed(monkeypatch, tmp_path):
    import train.results.provenance as provenance

    before = evaluating_code_sha256()
    for name in ("prepare/scoring.py", "prepare/tokenizer.py", *provenance.EVALUATING_FILES):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((provenance.ROOT / name).read_bytes())
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    copied = evaluating_code_sha256()
    assert copied != before  # files are missing
    for name in ("prepare/scoring.py", "prepare/tokenizer.py", *provenance.EVALUATING_FILES):
        path = tmp_path / name
        honest = path.read_bytes()
        path.write_bytes(honest + b"# edited\n")
        assert evaluating_code_sha256() != copied, name
        path.write_bytes(honest)
    assert evaluating_code_sha256() == copied


def test_the_state_of_the_source(monkeypatch, tmp_path):
    import train.results.provenance as provenance

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


class NotLikeThat:
    """What a file system says that has no locks, or that does not sync, of a folder or of anything."""

    def __init__(self, number: int, of_folders: bool = False):
        self.number, self.of_folders = number, of_folders

    def __call__(self, descriptor: int, *_) -> None:
        if not self.of_folders or stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
def test_a_file_system_without_locks(corpus, tmp_path, monkeypatch, capsys, number):
    monkeypatch.chdir(tmp_path)
    SAID.clear()
    monkeypatch.setattr("train.resilience.durable.fcntl.flock", NotLikeThat(number))
    assert run_main(corpus, "runs/a") == 0
    (note,) = [line for line in capsys.readouterr().err.splitlines() if "locks" in line]
    assert note.startswith(f"note: the file system of runs/a has no locks ({os.strerror(number)}): ")
    assert [row["run"] for row in rows(tmp_path / "runs")] == ["a"]
    assert is_free(tmp_path / "runs" / "a")


@pytest.mark.parametrize("of_folders", [False, True])
def test_a_file_system_that_does_not_sync(corpus, tmp_path, monkeypatch, capsys, of_folders):
    SAID.clear()
    monkeypatch.setattr("train.resilience.durable.os.fsync", NotLikeThat(errno.EINVAL, of_folders))
    assert run_main(corpus, tmp_path / "a", "--checkpoint-every", "0", "--keep-checkpoints") == 0
    said = "does not sync it (Invalid argument): a power cut may cost what is newest"
    assert capsys.readouterr().err.count(said) == 1
    assert [*(tmp_path / "a" / "checkpoints").iterdir()]


@pytest.mark.parametrize("call", ["fcntl.flock", "os.fsync"])
def test_a_broken_disk_is_no_file_system_that_does_without(corpus, tmp_path, monkeypatch, capsys, call):
    monkeypatch.setattr(f"train.resilience.durable.{call}", NotLikeThat(errno.EIO))
    assert run_main(corpus, tmp_path / "a") == 2
    assert "Input/output error" in capsys.readouterr().err


def test_runs_that_begin_in_one_second_have_folders_of_their_own(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("train.results.run_folder.time.strftime", lambda form: "20261129-120000")
    monkeypatch.setattr(train.experiment, "Popen", InProcess)
    arguments = [*tiny_run.TINY, "--data", str(corpus), "--steps", "3"]
    for more in ([], [], ["--seed", "50"], ["--repeat", "1", "--name", "other"]):
        assert train.__main__.main([*arguments, *more]) == 0
    names = ["20261129-120000-run", "20261129-120000-run-2", "20261129-120000-run-3", "20261129-120000-other"]
    assert [row["run"] for row in rows(tmp_path / "runs")] == names
    for name, seed in zip(names, (42, 42, 50, 42), strict=True):
        assert json.loads((tmp_path / "runs" / name / "summary.json").read_text())["seed"] == seed


def test_groups_that_begin_in_one_second_have_names_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("train.results.run_folder.time.strftime", lambda form: "20261129-120000")
    with reserved_run_dir("a") as first, reserved_run_dir("a") as second:
        alone = RunFolder(default_run_dir("a"), named_by_user=False)
        alone.close()
        names = [path.name for path in (first, second, alone.path)]
        assert names == ["20261129-120000-a", "20261129-120000-a-2", "20261129-120000-a-3"]
    assert [path.name for path in (tmp_path / "runs").iterdir()] == names[2:]


def test_repeats_keep_their_name_to_themselves_and_leave_no_folder(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("train.results.run_folder.time.strftime", lambda form: "20261129-120000")
    seen = []

    class Another(InProcess):
        """In the same second another group begins, on other seeds."""

        def wait(self) -> int:
            with reserved_run_dir("run") as path:
                seen.append(path.name)
            return super().wait()

    monkeypatch.setattr(train.experiment, "Popen", Another)
    arguments = [*tiny_run.TINY, "--data", str(corpus), "--steps", "3", "--repeat", "2"]
    assert train.__main__.main(arguments) == 0
    assert seen == ["20261129-120000-run-2"] * 2
    assert {row["group"] for row in rows(tmp_path / "runs")} == {"20261129-120000-run"}
    folders = sorted(path.name for path in (tmp_path / "runs").iterdir() if path.is_dir())
    assert folders == ["20261129-120000-run-seed42", "20261129-120000-run-seed43"]


def test_a_run_folder_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "nowhere").symlink_to("gone")
    for folder, mend in ((tmp_path / "nowhere", "--run-dir"), (tmp_path / "nowhere" / "run", "--run-dir")):
        with pytest.raises(InputError, match=f"cannot make the run folder .*{mend}"):
            RunFolder(folder)
    with pytest.raises(InputError, match="File name too long; choose another --name"):
        RunFolder(tmp_path / ("a" * 300), named_by_user=False)


@pytest.mark.parametrize(("said", "reason", "mend"), [
    ("fatal: detected dubious ownership in repository at '/a b'\nTo add an exception for this directory, call:\n\n"
     "\tgit config --global --add safe.directory '/a b'\n", "belongs to another user",
     "git config --global --add safe.directory '/a b'"),
    ("fatal: not a git repository (or any of the parent directories): .git\n", "is no git repository", "git init && "),
    ("fatal: ambiguous argument 'HEAD': unknown revision\n", "git knows no commit of", "git add . && git commit"),
    (FileNotFoundError("git"), "git is not installed", "install git"),
])  # fmt: skip
def test_where_git_names_no_commit_it_is_said_why(corpus, tmp_path, monkeypatch, capsys, said, reason, mend):
    def refuses(*args):
        raise said if isinstance(said, OSError) else subprocess.CalledProcessError(128, "git", b"", said.encode())

    monkeypatch.setattr("train.results.provenance._git", refuses)
    found = doctor.code()
    assert found.state == doctor.NOTE
    assert reason in found.found
    assert found.remedy.startswith(mend)
    assert run_main(corpus, tmp_path / "a") == 0
    (note,) = [line for line in capsys.readouterr().err.splitlines() if "the ledger cannot name a commit" in line]
    assert reason in note
    assert mend in note
    assert rows(tmp_path)[0]["commit"] == "none"


def test_a_git_that_does_not_know_who_commits(tmp_path, monkeypatch):
    """It would refuse the agent's commit, and the run would be of a commit with changes."""
    for name in [name for name in os.environ if name.startswith(("GIT_", "EMAIL"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.setattr("train.results.provenance.ROOT", tmp_path)
    who = ["-c", "user.name=A", "-c", "user.email=a@b"]
    for args in (["init"], [*who, "commit", "--allow-empty", "-m", "start"], ["config", "user.useConfigOnly", "true"]):
        subprocess.run(["git", "-C", str(tmp_path), *args], check=True, capture_output=True)
    found = doctor.code()
    assert found.state == doctor.NOTE
    assert "git does not know who you are" in found.found
    assert found.remedy.startswith("git config --global user.name")
    for key in ("user.name", "user.email"):
        subprocess.run(["git", "-C", str(tmp_path), "config", key, "a@b"], check=True)
    assert doctor.code().state == doctor.OK
