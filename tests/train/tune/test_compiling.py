"""Candidates compiled by processes that crash, hang and run out of time; and what the compiler says of real ones."""

import json
import subprocess
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")
from tests.helpers.small_targets import config_of, small_target
from train.tune import __main__ as command
from train.tune import compiling
from train.tune.compiling import compile_all
from train.tune.trials import NO_TIME, Trial, Tuned
from train.tune.usage import Usage

CONFIG = config_of(depth=1)
ADAMW = small_target("adamw")


def compiled(tiles: list, cores: int = 1, **options) -> list[Trial]:
    one = Tuned(ADAMW, [Trial({"BLOCK": tile}) for tile in tiles])
    compile_all([one], [0], CONFIG, 100, False, 90, **options)
    return one.trials


@pytest.fixture
def one_core(monkeypatch):
    monkeypatch.setattr(compiling, "num_cores", lambda: 1)


@pytest.fixture
def compiler(monkeypatch, one_core):
    """A program in place of the process that compiles."""
    popen = subprocess.Popen

    def put(*program: str) -> None:
        monkeypatch.setattr(compiling.subprocess, "Popen", lambda args, **options: popen(program, **options))

    return put


def test_what_crashes_the_compiler_is_left_out(monkeypatch, one_core):
    """A process that dies loses the candidate it was at, and no other."""
    popen = subprocess.Popen

    def start(args, **options):
        given = json.loads(Path(args[-1]).read_text())
        done = [tile["BLOCK"] for _, tile in given["jobs"]]
        crash = done.index("bad") if "bad" in done else len(done)
        lines = "".join(json.dumps({"registers": 9}) + "\n" for _ in done[:crash])
        Path(given["results"]).write_text(lines)
        return popen(["sh", "-c", "exit 0" if crash == len(done) else "kill -11 $$"], **options)

    monkeypatch.setattr(compiling.subprocess, "Popen", start)
    trials = compiled(["a", "b", "bad", "c", "bad", "d", "bad"])
    assert [trial.tile["BLOCK"] for trial in trials if trial.fault is None] == ["a", "b", "c", "d"]
    assert {trial.fault for trial in trials if trial.fault} == {"the compiler crashes (-11)"}
    assert trials[0].compiled == {"registers": 9}


def test_what_hangs_is_ended(compiler, monkeypatch):
    compiler("sleep", "600")
    monkeypatch.setattr(compiling, "STUCK", 1.0)
    assert compiled(["a"])[0].fault == "the compiler hangs"


def test_what_is_not_compiled_in_time_is_left(compiler):
    compiler("sleep", "600")
    assert [trial.fault for trial in compiled(["a", "b"], seconds=1.0)] == [NO_TIME, NO_TIME]
    assert [trial.fault for trial in compiled(["a", "b"], seconds=-1.0)] == [NO_TIME, NO_TIME]


def test_what_fails_otherwise_is_no_fault_of_a_candidate(compiler):
    compiler("sh", "-c", "echo no; exit 1")
    with pytest.raises(RuntimeError, match="compiling failed: no"):
        compiled(["a"])


def test_an_interruption_ends_the_processes(compiler, monkeypatch):
    """In far less than the 600 seconds that they would take."""
    compiler("sleep", "600")
    monkeypatch.setattr(compiling, "SAY_EVERY", 0.1)

    def interrupted(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compiled(["a"], say=interrupted)


def test_it_says_how_far_it_is(compiler, monkeypatch):
    compiler("sleep", "1")
    monkeypatch.setattr(compiling, "SAY_EVERY", 0.1)
    said = []
    compiled(["a"], say=said.append)
    assert "tuning: 0 of 1 compiled" in said


def test_of_a_candidates_variants_the_worst_counts(monkeypatch):
    light = Usage("_adamw_kernel", 1, warps=8, registers=40, stack=0, shared=0, is_matrix=False, wgmma=0)
    heavy = replace(light, registers=200, stack=16, shared=1024)
    other = replace(heavy, name="_another_kernel", stack=999)
    monkeypatch.setattr(Usage, "metadata", property(lambda usage: usage), raising=False)  # each is its own kernel
    monkeypatch.setattr(compiling, "launches_of", lambda *_: None)
    monkeypatch.setattr(compiling, "usage", lambda kernel, launches: kernel)

    def result(*usages: Usage) -> dict:
        monkeypatch.setattr(compiling, "compiling_only", lambda arch: nullcontext(Counter(usages)))
        return compiling.compile_one(ADAMW, None, {}, 90)

    assert result(light, heavy, other) == {
        "registers": 200, "stack": 16, "shared": 1024, "ctas_per_sm": heavy.ctas_per_sm(90),
    }  # fmt: skip
    assert heavy.ctas_per_sm(90) < light.ctas_per_sm(90)
    too_much = result(replace(heavy, shared=2**20))
    assert too_much["fault"] == "_adamw_kernel: 1048576 bytes of shared memory, 232448 there"


def test_offline(monkeypatch, capsys, tmp_path, one_core):
    """For sm_90: a tile, one that is no power of two, and one with more elements than there are registers: its spills
    are shown, and time would tell."""
    from kernels.choice import Choice

    choice = next(target for target in [ADAMW]).choice
    planted = [{"BLOCK": 2048, "num_warps": 8}, {"BLOCK": 1000, "num_warps": 8}, {"BLOCK": 8192, "num_warps": 4}]
    monkeypatch.setattr(choice, "_candidates", lambda: planted)
    assert isinstance(choice, Choice)
    assert command.main(["--offline", "--only", "adamw", "--json", str(tmp_path / "out.json"), "--depth", "1"]) == 0
    printed = capsys.readouterr().out
    assert "4 candidates of 1 kernels, " in printed
    assert "adamw : 3 candidates on sm_90, 1 of no use" in printed
    (row,) = json.loads((tmp_path / "out.json").read_text())
    default, right, odd, large = row["trials"]
    assert (default["tile"], default["fault"]) == ({"BLOCK": 1024, "num_warps": 8}, None)
    assert 0 < default["compiled"]["registers"] < right["compiled"]["registers"] <= 255
    assert odd["fault"].startswith("does not compile: ")
    assert large["fault"] is None
    assert large["compiled"]["stack"] > 0
