"""The tuner around its measuring process: one that crashes, hangs, runs out of time or meets a busy GPU; what a whole
step decides; and what is kept of all that. The processes are real, what they measure is made up."""

import json
import time
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
import kernels
from prepare import InputError
from tests.helpers.small_targets import config_of, small_targets
from train.tune import tuner, worker
from train.tune.table import Kept, Machine
from train.tune.trials import NO_TIME
from train.tune.tuner import tune_step

MACHINE = Machine("a GPU", "1.2", "2.13", "3.7")
CONFIG = config_of(depth=1)
SHAPE = CONFIG.model_config(100)
# A measuring process. In place of a GPU: a default takes a second and what is named in FASTER half of one; what is
# named in CRASHES ends the process, what is named in HANGS never ends.
PROGRAM = """
import json, os, sys, time
given = json.load(open(sys.argv[1]))
script = json.load(open(SCRIPT))
def write(**line):
    open(given["results"], "a").write(json.dumps(line) + "\\n")
if script.get("busy"):
    write(busy="other processes hold 9 GiB of it")
    sys.exit()
if given["decide"]:
    for number, way in enumerate(given["ways"]):
        write(way=number)
        write(way=number, better=way[0] not in script["bad ways"], before=[1.0], after=[0.9])
    if script.get("dies deciding"):
        os.abort()
    write(what="tuned", better=script["step is better"], before=[1.0], after=[0.8])
    write(what="graphs", better=True, before=[1.0], after=[0.8])
    sys.exit()
for number in given["numbers"]:
    trials = given["trials"][str(number)]
    for at, trial in enumerate(trials):
        if trial["fault"] not in (None, "no time was left"):
            continue
        write(number=number, at=at)
        if [number, at] in script["crashes"]:
            os.abort()
        if [number, at] in script["hangs"]:
            time.sleep(600)
        seconds = 0.5 if [number, at] in script["faster"] else 1.0
        trial.update(seconds=[seconds, seconds * script.get("drift", 1.0)], fault=None)
    write(number=number, trials=trials, whole=number in script["whole"], launches=1.0, error=None)
"""


@pytest.fixture
def scripted(monkeypatch, tmp_path):
    """What the measuring process is told to do, to be changed by the test."""
    path = tmp_path / "script.json"

    def tell(**more) -> None:
        script = {"crashes": [], "hangs": [], "faster": [], "whole": [], "bad ways": [], "step is better": True}
        path.write_text(json.dumps(script | more))

    tell()
    monkeypatch.setattr(tuner.Measuring, "program", PROGRAM.replace("SCRIPT", repr(str(path))))
    monkeypatch.setattr(tuner, "arch_here", lambda: 90)
    monkeypatch.setattr(tuner, "compile_all", lambda *args: None)
    with kernels.ops_in_force("triton"):
        yield tell


def numbers_of(*names: str) -> list[int]:
    found = small_targets(CONFIG, False)
    return [next(i for i, target in enumerate(found) if target.name == name) for name in names]


def tune(kept: Kept, seconds: float = 60.0, again: bool = False, only=("norm-forward", "softmax", "norm-backward")):
    said = []
    outcome = tune_step(CONFIG, SHAPE, kept, seconds, False, again, only, said.append)
    return outcome, said


@pytest.fixture
def kept(tmp_path):
    return Kept(tmp_path / "tuning" / "a-GPU.json", MACHINE)


def read_again(kept: Kept) -> Kept:
    return Kept.read(kept.path, MACHINE)


def test_what_is_faster_is_kept_and_not_measured_again(scripted, kept):
    norm, softmax = numbers_of("norm-forward", "softmax")
    scripted(faster=[[norm, 2]])
    outcome, said = tune(kept)
    assert outcome.faults == []
    entries = read_again(kept).entries
    assert {name for name, _ in entries} == {"norm-forward", "softmax", "norm-backward"}
    target = small_targets(CONFIG, False)[norm]
    entry = entries["norm-forward", target.key]
    assert entry.best == target.tiles[2] != entry.default == target.tiles[0]
    assert entry.default_us == pytest.approx(1e6 * target.calls)
    assert entry.best_us == pytest.approx(0.5e6 * target.calls)
    assert outcome.predicted_us == pytest.approx(0.5e6 * target.calls)
    assert entries["softmax", small_targets(CONFIG, False)[softmax].key].best_us == pytest.approx(1e6)
    assert any("norm-forward" in line and "500,000" in line for line in said)
    assert next(iter(read_again(kept).options.values()))["graphs"] is True
    scripted(crashes=[[norm, 0], [softmax, 0]])  # nobody asks
    outcome, _ = tune(read_again(kept))
    assert (outcome.tuned, outcome.faults) == ([], [])
    scripted()
    outcome, _ = tune(read_again(kept), again=True)
    assert len(outcome.tuned) == 3


def test_an_edited_kernel_is_tuned_anew_and_no_other(scripted, kept, monkeypatch):
    tune(kept)
    softmax = small_targets(CONFIG, False)[numbers_of("softmax")[0]].choice
    monkeypatch.setattr(softmax, "digest", lambda *shape: "another")
    outcome, _ = tune(read_again(kept))
    assert [one.target.name for one in outcome.tuned] == ["softmax"]


def test_a_candidate_that_breaks_the_gpu_is_struck_out_and_the_others_go_on(scripted, kept):
    norm, softmax = numbers_of("norm-forward", "softmax")
    scripted(crashes=[[norm, 1]], faster=[[norm, 2], [softmax, 1]])
    outcome, _ = tune(kept)
    entries = read_again(kept).entries
    by_name = {one.target.name: one for one in outcome.tuned}
    assert by_name["norm-forward"].trials[1].fault.startswith("breaks the GPU, or hangs it: the process ends with -6")
    assert by_name["norm-forward"].best is by_name["norm-forward"].trials[2]
    assert by_name["softmax"].best is by_name["softmax"].trials[1]
    (struck,) = entries["norm-forward", by_name["norm-forward"].target.key].struck_out.values()
    assert struck.startswith("breaks the GPU")


def test_a_candidate_that_hangs_is_ended(scripted, kept, monkeypatch):
    (norm,) = numbers_of("norm-forward")
    scripted(hangs=[[norm, 1]], faster=[[norm, 2]])
    monkeypatch.setattr(tuner, "HANG", 1.0)
    outcome, _ = tune(kept, only=("norm-forward",))
    (one,) = outcome.tuned
    assert one.trials[1].fault == "breaks the GPU, or hangs it: it does not end"
    assert one.best is one.trials[2]


@pytest.mark.parametrize("crashes", [[0], [1, 2, 3]])
def test_a_kernel_that_breaks_the_gpu_again_and_again_keeps_its_default(scripted, kept, crashes):
    """Or whose default does."""
    norm, softmax = numbers_of("norm-forward", "softmax")
    scripted(crashes=[[norm, at] for at in crashes], faster=[[softmax, 1]])
    outcome, _ = tune(kept)
    by_name = {one.target.name: one for one in outcome.tuned}
    assert by_name["norm-forward"].best is by_name["norm-forward"].present
    assert by_name["softmax"].best is by_name["softmax"].trials[1]


def test_where_time_runs_out_what_was_found_is_kept(scripted, kept, monkeypatch):
    """And the next call goes on with the rest. By a clock of the test's own, which a trial that hangs moves on."""
    softmax, norm = numbers_of("softmax", "norm-backward")
    scripted(hangs=[[norm, 1]])
    now, lines = [0.0], tuner.Measuring.lines

    def until_it_hangs(self, until):
        for line in lines(self, until):
            yield line
            now[0] += 1000.0 * (line.get("number") == norm and line.get("at") == 1)

    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=time.sleep, strftime=time.strftime)
    monkeypatch.setattr(tuner, "time", clock)
    monkeypatch.setattr(tuner.Measuring, "lines", until_it_hangs)
    outcome, _ = tune(kept)
    assert outcome.untold >= 1
    assert f"measuring: {NO_TIME}" in outcome.faults
    assert ("softmax", small_targets(CONFIG, False)[softmax].key) in read_again(kept).entries
    scripted()
    outcome, _ = tune(read_again(kept))
    assert outcome.tuned
    assert "softmax" not in {one.target.name for one in outcome.tuned}
    assert outcome.untold == 0


def test_a_busy_gpu_writes_no_table(scripted, kept):
    scripted(busy=True)
    with pytest.raises(InputError, match="this GPU is busy"):
        tune(kept)
    assert not kept.path.exists()


def test_times_that_differ_by_themselves_are_not_kept(scripted, kept):
    scripted(drift=1.6)
    outcome, _ = tune(kept)
    assert outcome.tuned == []
    assert all("something else is at work" in fault for fault in outcome.faults)
    assert read_again(kept).entries == {}


@pytest.mark.parametrize(("script", "taken"), [
    ({}, True), ({"bad ways": ["softmax"]}, False), ({"dies deciding": True, "bad ways": ["softmax"]}, False),
    ({"step is better": False}, False),
])  # fmt: skip
def test_what_is_no_tile_is_decided_by_whole_steps(scripted, kept, script, taken):
    softmax, norm = numbers_of("softmax", "norm-forward")
    scripted(faster=[[softmax, 1], [norm, 1]], whole=[softmax], **script)
    outcome, _ = tune(kept)
    entries = {name: entry for (name, _), entry in read_again(kept).entries.items()}
    assert (entries["softmax"].best != entries["softmax"].default) == taken
    better_step = script.get("step is better", True)
    assert (entries["norm-forward"].best != entries["norm-forward"].default) == better_step
    if not better_step:
        assert any("a whole step is slower" in fault for fault in outcome.faults)
    if "dies deciding" in script:
        assert any(fault.startswith("whole steps: the process ends with -6") for fault in outcome.faults)


def test_no_such_kernel(scripted, kept):
    with pytest.raises(InputError, match="--only adamv: no such kernel; there are adamw, "):
        tune(kept, only=("adamv",))


def test_the_worker_measures_what_it_is_told(monkeypatch, tmp_path):
    """In this process, in the interpreter: its lines are those that the tuner reads."""
    lines = []
    monkeypatch.setattr(
        worker, "tune", lambda tuned, device, dtype, seconds, about: about(1) or setattr(tuned, "launches", 3.0)
    )
    (number,) = numbers_of("norm-forward")
    trials = [{"tile": tile} for tile in small_targets(CONFIG, False)[number].tiles[:2]]
    given = {"config": vars(CONFIG), "vocab_size": 100, "fused_norms": False, "numbers": [number], "seconds": 9.0,
             "trials": {str(number): trials}}  # fmt: skip
    worker.measure(given, lambda **line: lines.append(line), "cpu", torch.float32)
    first, second = lines
    assert first == {"number": number, "at": 1}
    assert [trial["tile"] for trial in second["trials"]] == [trial["tile"] for trial in trials]
    assert (second["launches"], second["error"], second["whole"]) == (3.0, None, False)
    monkeypatch.setattr(worker, "tune", lambda *_: 1 / 0)
    worker.measure(given, lambda **line: lines.append(line), "cpu", torch.float32)
    assert lines[-1]["error"] == "ZeroDivisionError: division by zero"


@pytest.mark.parametrize(("ours", "apart", "better"), [(0.5, 0.0, True), (2.0, 0.0, False), (0.5, 1.0, False)])
def test_the_worker_decides_by_whole_steps(monkeypatch, ours, apart, better):
    """A table that is slower, or that gives another loss, is not taken."""

    class Step:
        def __init__(self, config, *_):
            self.speed = 0.7 if config.fused_norms else 1.0

        def seconds(self, table, graphs=None):
            return self.speed * (ours if table else 1.0) * (0.5 if "way" in str(table) else 1.0)

        def loss(self, table):
            return 4.6 + (apart if table else 0.0)

    monkeypatch.setattr(worker, "Step", Step)
    lines = []
    given = {"config": vars(CONFIG), "vocab_size": 100, "fused_norms": None, "table": {"a": {"8": {"BLOCK": 1}}},
             "ways": [("b", "8", {"way": "own"})]}  # fmt: skip
    worker.decide(given, lambda **line: lines.append(line), "cpu", torch.float32)
    said = {line.get("what", "way"): line["better"] for line in lines if "better" in line}
    assert said == {"way": True, "tuned": better or apart == 0.0, "fused_norms": True}


def test_another_process_that_holds_the_gpu_is_seen(monkeypatch):
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (78 * 2**30, 80 * 2**30))
    assert worker.busy() == ""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (40 * 2**30, 80 * 2**30))
    assert worker.busy() == "other processes hold 39.0 GiB of it"


def test_a_gpu_whose_limits_are_not_known(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(InputError, match="this GPU is an sm_75, and the limits of 80, 86, "):
        tuner.arch_here()
