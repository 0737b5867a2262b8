"""A run that is stopped, killed or cut off goes on as if nothing had been: bit for bit, on the CPU, by steps."""

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import train.__main__
import train.resilience.checkpoint
import train.trainer
from prepare import prepare
from prepare.words import command_line
from tests.helpers.stopped_run import STEPS, interrupt, main, signal_after
from tests.helpers.tiny_run import TINY, assert_same, losses, rows, run_main
from train.budget import Budget
from train.recipes import BEFORE_RECIPES
from train.resilience.checkpoint import STATE, SUMS, checkpoint_folders, read_checkpoint
from train.results.ledger import Ledger
from train.results.progress import Reporter
from train.step import TrainStep


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """A run of 16 steps that nothing disturbs."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert run_main(corpus, folder, *STEPS) == 0
    return folder


@pytest.fixture(scope="module")
def stopped_once(corpus, tmp_path_factory):
    return interrupt(corpus, tmp_path_factory.mktemp("runs") / "stopped")


@pytest.fixture
def stopped(stopped_once, tmp_path):
    """A run of 16 steps that a SIGTERM ended after 7; the test may do with it what it likes."""
    return Path(shutil.copytree(stopped_once, tmp_path / "stopped"))


@pytest.mark.parametrize(("number", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
def test_stopped_by_a_signal_and_continued(corpus, tmp_path, whole, capfd, number, word):
    folder = interrupt(corpus, tmp_path / "a \udcff$run$ \x1b[1m'", number=number)
    captured = capfd.readouterr()
    assert captured.err.splitlines()[-1] == word
    assert "Traceback" not in captured.err
    assert losses(folder) == losses(whole)[:7]  # the step was finished, and no other begun
    command = captured.out.splitlines()[-1].partition(": ")[2]
    said = subprocess.run(["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, check=True).stdout
    python, *args = map(os.fsdecode, said.split(b"\0")[:-1])
    assert (os.path.abspath(python), *args[:2]) == (sys.executable, "-m", "train")
    assert train.__main__.main(args[2:]) == 0
    assert_same(folder, whole)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["resumes"] == 1
    timed = [row["seconds"] for row in rows(folder)[3:]]
    assert summary["training_seconds"] == pytest.approx(sum(timed))


def test_stopped_at_every_step(corpus, tmp_path, whole):
    """Untimed steps and timed ones, early and late, time after time."""
    folder = interrupt(corpus, tmp_path / "run", step=0)
    for step in range(1, 15, 2):
        with pytest.MonkeyPatch.context() as patch:
            signal_after(patch, step)
            assert main("--resume", str(folder)) == 143
    assert main("--resume", str(folder)) == 0
    assert_same(folder, whole)
    assert json.loads((folder / "summary.json").read_text())["resumes"] == 8


@pytest.mark.parametrize("option", [["--packing", "published"], ["--untimed-steps", "0"], ["--num-kv-heads", "2"]])
def test_other_runs_continue_too(corpus, tmp_path, option):
    args = [*STEPS, "--steps", "6", *option]
    assert run_main(corpus, tmp_path / "whole", *args) == 0
    folder = interrupt(corpus, tmp_path / "run", *args, step=3)
    assert main("--resume", str(folder)) == 0
    assert_same(folder, tmp_path / "whole")


def test_the_budget_clock_goes_on(corpus, tmp_path, monkeypatch):
    """By a clock on which every step takes 0.25 s, and which has gone on before the run does."""
    clock = SimpleNamespace(lag=0, now=0.0, mark=lambda: clock.now, seconds=lambda start, end: end - start)
    call = TrainStep.__call__

    def step(*args, apply=True):
        clock.now += 0.25 * apply  # a rehearsal is no step
        return call(*args, apply=apply)

    monkeypatch.setattr(TrainStep, "__call__", step)
    monkeypatch.setattr(train.trainer, "clock_of", lambda device: clock)
    folder = interrupt(corpus, tmp_path / "run", "--time-budget", "2", "--untimed-steps", "2", step=5)
    assert rows(folder)[-1]["timed_seconds"] == 4 * 0.25
    clock.now += 1000  # what passes between the two is nobody's
    assert main("--resume", str(folder)) == 0
    assert clock.now == 1000 + 10 * 0.25  # no step was made again
    assert [row["seconds"] for row in rows(folder)] == [0.25] * 10
    assert [row["timed_seconds"] for row in rows(folder)] == [0.0, 0.0, *(0.25 * i for i in range(1, 9))]


@pytest.mark.parametrize(
    ("untimed", "step", "counts"), [(10, 0, False), (10, 9, False), (10, 10, True), (0, 0, True), (10, 16, False)]
)
def test_a_first_step_that_counts_is_known(untimed, step, counts):
    """Of 16, wherever a process begins: the one after the last is none."""
    assert Budget(60.0, steps=16, untimed_steps=untimed, step=step).next_step_counts == counts


@pytest.mark.parametrize("untimed", [6, 7, 8])
def test_a_process_whose_first_step_counts_rehearses(corpus, tmp_path, monkeypatch, untimed):
    folder = interrupt(corpus, tmp_path / "run", "--steps", "9", "--untimed-steps", str(untimed), step=6)
    rehearsed = []
    monkeypatch.setattr(TrainStep, "rehearse", lambda *_: rehearsed.append(True))
    assert main("--resume", str(folder)) == 0
    assert rehearsed == [True] * (untimed <= 7)


def test_after_the_evaluation_only_the_weights_remain(corpus, tmp_path):
    assert run_main(corpus, tmp_path / "run", "--steps", "3") == 0
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_the_last_two_are_kept(corpus, tmp_path):
    folder = tmp_path / "run"
    assert run_main(corpus, folder, *STEPS, "--checkpoint-every", "0") == 0
    kept = checkpoint_folders(folder / "checkpoints")
    assert sorted((folder / "checkpoints").iterdir(), reverse=True) == kept
    assert len(kept) == 2
    assert kept[0].name == "step-00000016"
    assert all(read_checkpoint(path) for path in kept)


def test_interrupted_while_it_evaluates(stopped, whole, monkeypatch, capfd):
    evaluate = train.trainer.evaluate_bpb

    def interrupting(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        return evaluate(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(train.trainer, "evaluate_bpb", interrupting)
        assert main("--resume", str(stopped)) == 130
    captured = capfd.readouterr()
    assert "Traceback" not in captured.err
    assert f"to go on from step 16: {command_line('train', '--resume', stopped)}" in captured.out
    assert not (stopped / "summary.json").exists()
    steps = []
    with monkeypatch.context() as patch:
        patch.setattr(Reporter, "step", lambda self, budget, values, *_: steps.append(values.step))
        assert main("--resume", str(stopped)) == 0
    assert steps == []
    assert_same(stopped, whole)


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--depth", "3"], "depth was 2 and is 3"),
        (["--steps", "17", "--seed", "7"], "steps was 16 and is 17, seed was 42 and is 7"),
        (["--time-budget", "61"], "time_budget was 60.0 and is 61.0"),
        (["--autocast"], "autocast was False and is True"),
        (["--device-batch-size", "8"], "device_batch_size was 4 and is 8"),
        (["--name", "other"], "name was 'run' and is 'other'"),
        (["--repeat", "3", "--confirm"], "repeat was 1 and is 3, confirm was False and is True"),
        (["--group", "other"], "group was None and is 'other'"),
    ],
)
def test_an_option_that_differs_is_refused(stopped, capsys, args, named):
    before = {path: path.stat().st_mtime_ns for path in stopped.rglob("*")}
    assert main("--resume", str(stopped), *args) == 2
    err = capsys.readouterr().err
    assert named in err
    assert err.count("\n") == 1
    assert before == {path: path.stat().st_mtime_ns for path in stopped.rglob("*")}


def test_an_option_at_its_default_is_compared_as_well(corpus, tmp_path, capsys):
    folder = interrupt(corpus, tmp_path / "run", "--steps", "16", "--seed", "7", step=2)
    assert main("--resume", str(folder), "--seed", "42") == 2
    assert "seed was 7 and is 42" in capsys.readouterr().err


def test_what_does_not_differ_may_be_said_again(stopped, whole, capsys):
    assert main("--resume", str(stopped), *TINY, *STEPS, "--checkpoint-every", "0") == 0
    assert_same(stopped, whole)
    assert "note:" not in capsys.readouterr().out


def test_what_changed_around_a_run_is_said(stopped, monkeypatch, capsys):
    here = train.trainer.environment()
    monkeypatch.setattr(train.trainer, "environment", lambda: here | {"threads": 99})
    assert main("--resume", str(stopped)) == 0
    assert f"note:   started with threads {here['threads']}, now 99: " in capsys.readouterr().out


def test_a_run_from_before_there_were_recipes_goes_on(stopped, whole):
    """Its config.json and its checkpoint lack the fields that were added, and it ends as it would have ended then."""
    path = stopped / "config.json"
    saved = json.loads(path.read_text())
    for key in BEFORE_RECIPES:
        del saved["config"][key]
    for key in BEFORE_RECIPES.keys() & saved["model"].keys():
        del saved["model"][key]
    path.write_text(json.dumps(saved))
    for folder in checkpoint_folders(stopped / "checkpoints"):
        values = read_checkpoint(folder).values
        values["config"] = {key: value for key, value in values["config"].items() if key not in BEFORE_RECIPES}
        sums = (folder / SUMS).read_text()
        old, state = (folder / STATE).read_bytes(), json.dumps(values).encode()
        (folder / STATE).write_bytes(state)
        (folder / SUMS).write_text(sums.replace(*(hashlib.sha256(text).hexdigest() for text in (old, state))))
    assert main("--resume", str(stopped)) == 0
    assert_same(stopped, whole)


def test_an_edited_config_is_refused(stopped, capsys):
    path = stopped / "config.json"
    path.write_text(path.read_text().replace('"matrix_lr": 0.02', '"matrix_lr": 0.05'))
    assert main("--resume", str(stopped)) == 2
    assert "matrix_lr was 0.02 and is 0.05; config.json was changed" in capsys.readouterr().err


def test_a_run_of_before_an_option_goes_on_with_its_default(stopped, whole, monkeypatch):
    path = stopped / "config.json"
    saved = json.loads(path.read_text())
    del saved["config"]["key_offset"], saved["model"]["key_offset"]
    path.write_text(json.dumps(saved))
    newest = train.trainer.newest_checkpoint

    def of_before(folder):
        checkpoint = newest(folder)
        del checkpoint.values["config"]["key_offset"]
        return checkpoint

    monkeypatch.setattr(train.trainer, "newest_checkpoint", of_before)
    assert main("--resume", str(stopped)) == 0
    assert_same(stopped, whole)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "config.json cannot be read"),
        ("[]", "config.json is no JSON object"),
        ('{"config": {"depht": 2}}', "depht"),
        ('{"config": {"depth": "2"}}', "'2' for depth"),
    ],
)
def test_a_config_that_is_none(stopped, capsys, text, named):
    (stopped / "config.json").write_text(text)
    assert main("--resume", str(stopped)) == 2
    err = capsys.readouterr().err
    assert named in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(("vocab_size", "named"), [(512, "train_sha256"), (400, "tokenizer_sha256")])
def test_other_data_is_refused(stopped, tmp_path, capsys, vocab_size, named):
    text = tmp_path / "text"
    text.mkdir()
    rng = random.Random(1)
    for i in range(100):
        (text / f"{i}.txt").write_text(" ".join("".join(rng.choices("abcdefghijklmno", k=5)) for _ in range(100)))
    other = prepare(str(text), out=tmp_path / "other", vocab_size=vocab_size)
    assert main("--resume", str(stopped), "--data", str(other)) == 2
    err = capsys.readouterr().err
    assert f"the data in {other}" in err
    assert f"{named} was" in err


def test_data_may_have_moved(stopped, whole, corpus, tmp_path):
    shutil.copytree(corpus, tmp_path / "moved")
    assert main("--resume", str(stopped), "--data", str(tmp_path / "moved")) == 0
    assert_same(stopped, whole)


def test_runs_that_cannot_go_on(whole, stopped, tmp_path, capsys, monkeypatch):
    def refused(*args) -> str:
        assert main("--resume", *args) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        return err

    assert "is finished" in refused(str(whole))
    assert "config.json is missing" in refused(str(tmp_path / "nowhere"))
    in_use = train.results.run_folder.RunFolder.reopen(stopped)
    assert "in use by another process" in refused(str(stopped))
    in_use.close()
    shutil.rmtree(stopped / "checkpoints")
    assert "has no checkpoint" in refused(str(stopped))
    monkeypatch.chdir(tmp_path)
    assert "there is no interrupted run" in refused("auto")


def test_auto_takes_the_newest_interrupted_run(stopped_once, whole, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    now = time.time()
    ages = {"older": 9, "a": 7, "b": 5, "finished": 3, "running": 2, "failed": 1}
    for name, age in ages.items():
        source = whole if name == "finished" else stopped_once
        shutil.copytree(source, tmp_path / "runs" / name)
        os.utime(checkpoint_folders(tmp_path / "runs" / name / "checkpoints")[0], (now - age, now - age))
    (tmp_path / "runs" / "failed" / "failure").mkdir()
    running = train.results.run_folder.RunFolder.reopen(tmp_path / "runs" / "running")
    assert main("--resume", "auto") == 0
    running.close()
    assert "run:    runs/b\n" in capsys.readouterr().out
    assert_same(tmp_path / "runs" / "b", whole)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(corpus, stopped, whole, capsys):
    with pytest.MonkeyPatch.context() as patch:
        signal_after(patch, 11)
        assert main("--resume", str(stopped)) == 143
    newer, older = checkpoint_folders(stopped / "checkpoints")
    damaged = bytearray((newer / "tensors.safetensors").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (newer / "tensors.safetensors").write_bytes(damaged)
    capsys.readouterr()
    assert main("--resume", str(stopped)) == 0
    captured = capsys.readouterr()
    assert "tensors.safetensors changed since" in captured.err
    assert f"resume: {int(older.name[5:])} steps are done" in captured.out
    assert_same(stopped, whole)


def test_where_every_checkpoint_is_damaged(stopped, capsys):
    (path,) = checkpoint_folders(stopped / "checkpoints")
    (path / "SHA256SUMS").write_text("")
    assert main("--resume", str(stopped)) == 2
    assert "has no whole checkpoint" in capsys.readouterr().err


def test_metrics_are_cut_back(stopped, whole):
    """Rows that are not covered by the checkpoint, a torn one, and one that a bit fell in."""
    path = stopped / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    lines[2] = lines[2].replace('"step"', '"stfp"')
    path.write_text("".join(lines) + lines[-1].replace('"step": 6', '"step": 7') + lines[-1][:40])
    assert main("--resume", str(stopped)) == 0
    assert [row["step"] for row in rows(stopped)] == [0, 1, *range(3, 16)]
    assert losses(stopped) == losses(whole)[:2] + losses(whole)[3:]


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(corpus, tmp_path, whole, monkeypatch, capsys):
    write, calls = train.resilience.checkpoint.write_synced, 0

    def full(path, *pieces):
        nonlocal calls
        calls += 1
        if calls > 6:  # three files a checkpoint: the first two are written
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write(path, *pieces)

    monkeypatch.setattr(train.resilience.checkpoint, "write_synced", full)
    assert run_main(corpus, tmp_path / "run", *STEPS, "--checkpoint-every", "0") == 0
    assert "note: no checkpoint of step 16, the run goes on: " in capsys.readouterr().err
    assert losses(tmp_path / "run") == losses(whole)
    left = checkpoint_folders(tmp_path / "run" / "checkpoints")
    assert len(left) == len([*(tmp_path / "run" / "checkpoints").iterdir()]) == 2
    assert all(read_checkpoint(path) for path in left)


def test_a_full_disk_costs_rows_and_not_the_run(corpus, tmp_path, whole, monkeypatch, capsys):
    write = train.results.run_folder.RunFolder.write_metrics

    def full(self, row):
        if 4 <= row["step"] < 8:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, row)

    monkeypatch.setattr(train.results.run_folder.RunFolder, "write_metrics", full)
    assert run_main(corpus, tmp_path / "run", *STEPS) == 0
    assert capsys.readouterr().err.count("the disk is full") == 1
    assert losses(tmp_path / "run") == losses(whole)[:4] + losses(whole)[8:]


def test_weights_that_find_no_room_are_told_with_the_way_on(stopped, whole, monkeypatch, capsys):
    def full(self, weights):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "model.safetensors.part")

    with monkeypatch.context() as patch:
        patch.setattr(train.results.run_folder.RunFolder, "write_model", full)
        assert main("--resume", str(stopped)) == 2
    captured = capsys.readouterr()
    assert "error: model.safetensors.part: No space left on device; make room there" in captured.err
    assert f"to go on from step 16: {command_line('train', '--resume', stopped)}" in captured.out
    (row,) = (run for run in Ledger.beside(stopped).runs() if run["run"] == stopped.name)
    assert f"val_bpb:               {row['val_bpb']:.6f}\n" in captured.out  # the number is not lost with the files
    assert main("--resume", str(stopped)) == 0
    assert_same(stopped, whole)
    assert [run["val_bpb"] for run in Ledger.beside(stopped).runs() if run["run"] == stopped.name] == [row["val_bpb"]]
