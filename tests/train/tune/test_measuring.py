"""Which candidates get a time, and which of them wins."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from tests.helpers.kernel_checks import DEVICE, exact_bfloat16

pytest.importorskip("triton")
import kernels
from kernels.choice import Choice
from tests.helpers.small_targets import config_of, small_target
from train.tune import measuring, timing
from train.tune.measuring import Step, StepTimes, compare_steps, difference, tune
from train.tune.targets import DTYPE
from train.tune.trials import HEADER, NO_TIME, Trial, Tuned, label, line_of

NORM = small_target("norm-forward")
SOFTMAX = small_target("softmax")


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    exact_bfloat16(monkeypatch)
    kernels.set_ops("triton")
    yield
    kernels.set_ops(None)


def rows(block_m: int, **more) -> dict:
    return {"BLOCK_M": block_m, "BLOCK_D": 64, "num_warps": 4, **more}


def tuned_with(*tiles: dict, of=NORM) -> Tuned:
    return Tuned(of, [Trial(of.choice.default(*of.shape)), *map(Trial, tiles)])


@pytest.fixture
def steady(monkeypatch):
    """Calls take what is set for their BLOCK_M, or a second."""
    times = {}

    def time_call(launches, device, seconds):
        launches()
        launch = launches.again[0]
        return SimpleNamespace(median=times.get(getattr(launch, "kwargs", {}).get("BLOCK_M"), 1.0))

    monkeypatch.setattr(measuring, "time_call", time_call)
    return times


def test_a_wrong_candidate_gets_no_time_and_is_never_chosen(steady):
    steady |= {2: 0.9, 32: 1.0, 4: 0.1}
    half, odd, right = rows(4, BLOCK_D=32, PARTS=1), rows(3), rows(2)
    one = tuned_with(half, odd, right)
    tune(one, DEVICE, DTYPE, seconds=60.0)
    assert one.trials[1].fault.startswith("wrong: rms_norm")  # a half that nobody wrote
    assert one.trials[2].fault  # no power of two
    assert [trial.tile for trial in one.timed] == [one.present.tile, right]
    assert [len(trial.seconds) for trial in one.trials] == [measuring.VISITS, 0, 0, measuring.VISITS]
    assert one.best.tile == right
    assert one.struck == one.trials[1:3]
    assert one.launches == NORM.calls

    part = {"ONE_BLOCK": True, "BLOCK_V": 64, "num_warps": 4}  # of 100 logits
    two = tuned_with(part, of=SOFTMAX)
    tune(two, DEVICE, DTYPE, seconds=60.0)
    assert two.trials[1].fault.startswith("wrong: ")
    assert not two.trials[1].seconds
    assert two.best is two.present


def test_what_is_right_on_few_tokens_is_compared_at_the_full_size(steady, monkeypatch):
    """An index that overflows, or a race, shows there alone."""
    monkeypatch.setattr(measuring.Check, "__call__", lambda self, tile: None)
    one = tuned_with(rows(4, BLOCK_D=32, PARTS=1))
    tune(one, DEVICE, DTYPE, seconds=60.0)
    assert one.trials[1].fault == "wrong: off by nan of the default's norm"


def test_a_wrong_default_is_named_and_what_is_right_takes_its_place(steady):
    choice = Choice(NORM.name, NORM.choice.kernels, lambda D, dtype: rows(4, BLOCK_D=32, PARTS=1), lambda D, dtype: [])
    one = tuned_with(rows(2), rows(8, BLOCK_D=16, PARTS=1), of=replace(NORM, choice=choice))
    tune(one, DEVICE, DTYPE, seconds=60.0)
    assert one.present.fault.startswith("AssertionError: rms_norm")
    assert one.best.tile == rows(2)
    assert one.gain == 0
    assert one.trials[2].fault.startswith("wrong")


def test_where_the_reference_gives_nothing_nothing_is_right(steady, monkeypatch):
    """As on a GPU that computes nothing."""
    run = measuring.forward_backward
    monkeypatch.setattr(measuring, "forward_backward", lambda *args: [0 * x for x in run(*args)])
    one = tuned_with(rows(2), rows(4))
    tune(one, DEVICE, DTYPE, seconds=60.0)
    assert all("PyTorch's own result" in trial.fault for trial in one.trials)
    assert one.timed == []
    assert one.best is one.present


def test_where_time_runs_out_the_rest_is_left_out(steady):
    one = Tuned.fresh(SOFTMAX)
    tune(one, DEVICE, DTYPE, seconds=-1.0)
    assert [bool(trial.seconds) for trial in one.trials] == [True] + [False] * (len(one.trials) - 1)
    assert {trial.fault for trial in one.trials[1:]} == {NO_TIME}
    one.trials[1].fault = "spills"
    assert (len(one.struck), one.untried) == (1, len(one.trials) - 2)
    assert HEADER.split()[-4:] == ["timed", "struck", "left", "spills"]
    assert line_of(one).split()[-4:-1] == ["1", "1", str(len(one.trials) - 2)]


def test_a_default_that_was_not_compiled_in_time_is_measured_all_the_same(steady):
    one = tuned_with(rows(2))
    one.present.fault = NO_TIME
    tune(one, DEVICE, DTYPE, seconds=60.0)
    assert one.present.seconds


def test_a_hopeless_candidate_is_visited_once(steady):
    steady |= {32: 1.5, 2: 1.0, 4: 1.2, 8: 1.4}  # 32 is the default, and the measure of what drifts
    one = tuned_with(*(rows(n) for n in (2, 4, 8)))
    tune(one, DEVICE, DTYPE, seconds=60.0)
    assert [len(trial.seconds) for trial in one.trials] == [measuring.VISITS, measuring.VISITS, measuring.VISITS, 1]
    assert one.best.tile == rows(2)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("launch failed")])
def test_one_that_fails_costs_the_others_nothing(steady, monkeypatch, error):
    real = measuring.launches_of

    def launches_of(target, call, tile, whole=False):
        if tile == rows(2):
            raise error
        return real(target, call, tile, whole)

    monkeypatch.setattr(measuring, "launches_of", launches_of)
    one = tuned_with(rows(2), rows(4))
    tune(one, DEVICE, DTYPE, seconds=60.0)
    assert one.trials[1].fault == f"{type(error).__name__}: {error}"
    assert [trial.tile["BLOCK_M"] for trial in one.timed] == [32, 4]


def test_what_is_tried_is_said_before(steady):
    said = []
    tune(tuned_with(rows(2), rows(4)), DEVICE, DTYPE, 60.0, said.append)
    assert said[0] == 0
    assert set(said) == {0, 1, 2}


def test_the_real_clock(monkeypatch):
    monkeypatch.setattr(timing, "ROUNDS", (3, 3))
    one = tuned_with(rows(16))
    tune(one, DEVICE, DTYPE, seconds=60.0)
    assert all(0 < trial.median < 60 for trial in one.trials)


def fake(default: list[float], **seconds: float) -> Tuned:
    """A kernel whose default took these seconds; a candidate w<n> has n warps."""
    trials = [Trial({"BLOCK_M": 64, "num_warps": 8}, seconds=default)]
    trials += [Trial({"BLOCK_M": 128, "num_warps": int(key[1:])}, seconds=[value]) for key, value in seconds.items()]
    return Tuned(replace(NORM, calls=2), trials, launches=2)


def test_a_winner_beats_the_noise():
    steady = fake([1.0, 1.01, 1.02], w4=0.97)
    assert steady.gain == pytest.approx(2e6 * 0.04)
    assert steady.best is steady.trials[1]
    unsteady = fake([1.0, 1.01, 1.05], w4=0.97)
    assert unsteady.best is unsteady.present
    assert unsteady.gain == 0
    assert not unsteady.unsteady
    assert fake([1.0, 1.0, 1.3]).unsteady
    slower = fake([1.0], w4=1.1)
    assert slower.best is slower.present
    words = line_of(steady).split()
    assert words[:3] == ["norm-forward", "64", "bfloat16"]
    assert "128 w4" in line_of(steady)
    assert " 80,000.0 " in line_of(steady)


def test_differences():
    x = torch.tensor([3.0, 4.0])
    assert difference([x, x + 0.5], [x, x]) == pytest.approx(0.5 * math.sqrt(2) / 5)
    assert math.isnan(difference([x, x * float("nan")], [x, x]))
    assert math.isnan(difference([x], [x[:1]]))
    assert difference([x * 0], [x * 0]) == 0


def test_labels():
    assert label({"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "BLOCK_K": 32, "num_stages": 3}) == "128x64x32 w8 s3"
    assert label({"BLOCK": 1024, "num_warps": 4, "STEPS": 8}) == "1024 w4 STEPS=8"
    assert label({"block_m": 64, "num_warps": 8, "tma": True}) == "64 w8 tma"
    assert label({"block_m": 64, "num_warps": 8, "tma": False}) == "64 w8"
    assert label({"way": "vendor"}) == "way=vendor"


def test_whole_steps_are_compared_in_turn():
    calls, drift = [], iter(range(1, 100))

    def step(name: str, seconds: float):
        def run() -> float:
            calls.append(name)
            return seconds + 0.001 * next(drift)

        return run

    times = compare_steps(step("before", 1.0), step("after", 0.9), visits=4)
    assert calls == ["before", "after"] * 5
    assert (len(times.before), len(times.after)) == (4, 4)
    assert times.better
    assert not times.worse
    assert not StepTimes([1.0, 1.2], [1.05, 1.0]).better
    assert not StepTimes([1.0, 1.2], [1.3, 1.2]).worse
    assert StepTimes([1.0, 1.01], [1.1, 1.2]).worse


def test_a_step_takes_the_table_that_it_is_given_and_changes_no_parameter():
    config = config_of(depth=1)
    step = Step(replace(config, device="cpu"), config.model_config(100), "cpu", torch.float32)
    before = [p.clone() for p in step.step.model.parameters()]
    table = {"norm-forward": {"64 float32": rows(2)}}
    assert step.seconds(table) > 0
    assert step.loss({}) == pytest.approx(step.loss(table), abs=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(before, step.step.model.parameters(), strict=True))
    with pytest.raises(Exception, match=r"power of (2|two)"):
        step.loss({"norm-forward": {"64 float32": rows(3)}})
