"""Which tiles a run takes: those of its GPU, after a tuner that may end in any way; and what says which they were."""

import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
import kernels
import train.trainer
import train.tune
from kernels.choice import chosen
from tests.helpers.ledger_entries import entry as ledger_entry
from tests.helpers.small_targets import config_of
from tests.helpers.stopped_run import STEPS, interrupt, main
from tests.helpers.tiny_run import run_main
from train.at_once import OneByOne
from train.config import TrainConfig, parse_given
from train.precompile import stamp, step_digest
from train.results.judge import judge
from train.tune import DEFAULTS, Tiles, choices_of, saved_tiles, tiles_for
from train.tune.table import Entry, Kept, Machine

MACHINE = Machine("a GPU", "1", "2", "3")
CONFIG = config_of(depth=1)
SHAPE = CONFIG.model_config(100)
POPEN = subprocess.Popen
TABLE = {"norm-forward": {"64 bfloat16": {"BLOCK_M": 2, "BLOCK_D": 64, "num_warps": 4}}}


@pytest.fixture
def scripted(monkeypatch, tmp_path):
    """A GPU with an empty table, and a tuner that the test says."""
    monkeypatch.setenv("TIMEBOX_HOME", str(tmp_path))
    monkeypatch.setattr(train.tune.Machine, "here", classmethod(lambda cls: MACHINE))
    called = []

    def tuner(program: str = "") -> list[list[str]]:
        def start(args, **options):
            called.append(args)
            return POPEN([sys.executable, "-c", program], **options)

        monkeypatch.setattr(train.tune.subprocess, "Popen", start)
        return called

    tuner()
    return tuner


def fill(options: dict | None = None) -> Kept:
    """A table that has everything: the norm's second candidate is better."""
    kept = Kept(train.tune.path_of("a GPU"), MACHINE)
    for choice, of in choices_of(CONFIG, SHAPE):
        default, *others = choice.candidates(*of)
        best = others[0] if choice.name == "norm-forward" else default
        kept.add(Entry(choice.name, kernels.key_of(of), choice.digest(*of), default, best, 3000.0, 1000.0, 0.0))
    kept.options[step_digest(CONFIG, 100)] = options or {}
    kept.write()
    return kept


def test_a_gpu_with_a_table_is_not_tuned_again(scripted, capsys):
    kept = fill({"fused_norms": True, "graphs": False})
    called = scripted()
    tiles = tiles_for(CONFIG, SHAPE)
    assert called == []
    assert list(tiles.table) == ["norm-forward"]
    assert (tiles.gpu, tiles.fused_norms, tiles.graphs) == ("a GPU", True, False)
    said = f"tiles:  {tiles.digest}, 1 of {len(kept.entries)} are not the source's, which gains 2.00 ms a micro-step"
    assert capsys.readouterr().out.startswith(said)


def test_the_first_run_tunes_with_its_own_options(scripted):
    called = scripted()
    assert tiles_for(CONFIG, SHAPE).table == {}
    (args,) = called
    assert args[1:3] == ["-m", "train.tune"]
    assert {"--vocab-size=100", "--depth=1", "--d-model=64", "--seconds=90", "--lifeline"} <= set(args)
    assert not any(arg.startswith(("--tune", "--run-dir", "--repeat")) for arg in args)


def test_again_tunes_what_is_there(scripted):
    fill()
    called = scripted()
    tiles_for(config_of(depth=1, tune="again"), SHAPE)
    assert "--again" in called[0]


@pytest.mark.parametrize("more", [{"tune": "off"}, {"ops": "reference"}, {"device": "cpu"}])
def test_no_tiles_but_the_sources(scripted, more):
    called = scripted()
    assert tiles_for(replace(CONFIG, **more), SHAPE) is DEFAULTS
    assert called == []


@pytest.mark.parametrize(("program", "why"), [
    ("import os; os.abort()", "train.tune ended with -6"),
    ("raise SystemExit(1)", "train.tune ended with 1"),
    ("import time; time.sleep(600)", "it took longer than 1 s"),
])  # fmt: skip
def test_however_the_tuner_ends_the_run_goes_on(scripted, capsys, monkeypatch, program, why):
    monkeypatch.setattr(train.tune, "SECONDS", 0.5)
    monkeypatch.setattr(train.tune, "GRACE", 0.5)
    scripted(program)
    assert tiles_for(CONFIG, SHAPE).table == {}
    err = capsys.readouterr().err
    assert err.startswith("note: the kernels were not all tuned: ")
    assert why in err
    assert err.count("\n") == 1


def test_a_tuner_that_cannot_be_started_is_a_line(scripted, capsys, monkeypatch):
    monkeypatch.setattr(train.tune.subprocess, "Popen", lambda *args, **options: 1 / 0)
    assert tiles_for(CONFIG, SHAPE) is DEFAULTS
    assert "the kernels were not tuned (ZeroDivisionError: division by zero)" in capsys.readouterr().err


def test_a_table_that_is_damaged_is_a_line(scripted, capsys):
    fill().path.write_text("{")
    scripted()
    assert tiles_for(CONFIG, SHAPE).table == {}
    assert "is not used" in capsys.readouterr().err


def test_a_finished_runs_tiles_are_for_its_own_gpu(monkeypatch):
    saved = {"tiles": Tiles(TABLE, "a GPU").as_json()}
    assert saved_tiles(saved) is DEFAULTS  # there is none here
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert saved_tiles(saved).table == TABLE
    assert saved_tiles({}) is DEFAULTS
    assert saved_tiles({"tiles": None}) is DEFAULTS
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "another")
    assert saved_tiles(saved) is DEFAULTS


@pytest.fixture
def tuned(monkeypatch):
    """Runs in this process have tiles of a table, as on a GPU."""
    seen, tiles = [], Tiles(TABLE, "a GPU")
    monkeypatch.setattr(train.trainer, "tiles_for", lambda config, shape: tiles)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")

    def watched(table):
        seen.append(table)
        return chosen(table)

    monkeypatch.setattr(train.trainer, "chosen", watched)
    return SimpleNamespace(seen=seen, digest=tiles.digest)


def test_a_run_says_which_tiles_it_used(corpus, tmp_path, tuned, capsys):
    assert run_main(corpus, tmp_path / "run", "--steps", "2") == 0
    assert tuned.seen == [TABLE]
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["tiles"] == {"digest": tuned.digest, "gpu": "a GPU", "table": TABLE}
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["tiles"] == tuned.digest
    assert json.loads((tmp_path / "results.jsonl").read_text())["tiles"] == tuned.digest
    assert f"tiles:                 {tuned.digest}" in capsys.readouterr().out
    assert kernels.choose({}) == {}  # the run has given back what it chose


def test_a_resumed_run_keeps_its_own(corpus, tmp_path, tuned, monkeypatch):
    folder = interrupt(corpus, tmp_path / "run", *STEPS)
    monkeypatch.setattr(train.trainer, "tiles_for", lambda config, shape: 1 / 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(train.tune.torch.cuda, "is_available", lambda: True)
    assert train.tune.saved_tiles(json.loads((folder / "config.json").read_text())).table == TABLE
    monkeypatch.setattr(train.trainer, "saved_tiles", lambda saved: Tiles(saved["tiles"]["table"], "a GPU"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main("--resume", str(folder)) == 0
    assert tuned.seen == [TABLE, TABLE]
    assert json.loads((folder / "summary.json").read_text())["tiles"] == tuned.digest


def test_a_whole_steps_decisions_are_defaults_and_no_more(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(train.trainer, "tiles_for", lambda config, shape: Tiles({}, "a GPU", fused_norms=True))

    def fused(*args: str) -> bool:
        folder = tmp_path / f"run{len(args)}"
        assert run_main(corpus, folder, "--steps", "2", *args) == 0
        return json.loads((folder / "config.json").read_text())["config"]["fused_norms"]

    assert fused() is True
    assert fused("--no-fused-norms") is False


def test_runs_by_other_tiles_are_compared_and_that_is_said():
    first = ledger_entry("a", 1.0, status="keep") | {"tiles": "abc"}
    for tiles, note in (("abc", ""), ("def", ", whose kernels had other tiles (abc, here def)"),
                        (None, ", whose kernels had other tiles (abc, here default)")):  # fmt: skip
        run = ledger_entry("b", 0.9) | ({"tiles": tiles} if tiles else {})
        judgement = judge(run, [first])
        assert "against a" in judgement.note
        assert note in judgement.note
        assert ("other tiles" in judgement.note) == bool(note)


def test_kernels_are_compiled_ahead_for_the_tiles_in_force():
    assert stamp(CONFIG, 100, 90, {}) != stamp(CONFIG, 100, 90, TABLE)
    assert step_digest(CONFIG, 100) != step_digest(CONFIG, 200)
    assert step_digest(CONFIG, 100) == step_digest(config_of(depth=1, fused_norms=True), 100)


@pytest.mark.parametrize(("asked", "given"), [("again", ["again", "auto", "auto"]), ("off", ["off"] * 3)])
def test_repeats_tune_anew_once(tmp_path, asked, given):
    seen = []

    def popen(command, **_):
        seen.append(TrainConfig(**parse_given(command[3:])).tune)
        return SimpleNamespace(wait=lambda: 0)

    runs = OneByOne(config_of(depth=1, tune=asked, repeat=3), tmp_path / "run", "group", popen)
    runs.begin(dict.fromkeys((1, 2, 3), "a repeat"))
    assert [runs.judged(seed) for seed in (1, 2, 3)] == [0, 0, 0]
    assert seen == given
