"""Schedules at their corners, and the budget with a clock of the test's own."""

from dataclasses import asdict

import pytest

from model import GPTConfig
from prepare import InputError
from train.budget import Budget
from train.config import TrainConfig, resolve
from train.schedule import lr_multiplier, muon_momentum, muon_weight_decay, step_values


@pytest.mark.parametrize(
    ("progress", "expected"),
    [(0, 1), (0.25, 1), (0.5, 1), (0.75, 0.5), (0.9, 0.2), (1, 0)],
)
def test_default_rate_is_flat_then_falls_to_zero(progress, expected):
    assert lr_multiplier(progress, 0.0, 0.5, 0.0) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("progress", "expected"), [(0, 0), (0.1, 0.5), (0.2, 1), (0.6, 1), (0.8, 0.55), (1, 0.1), (1.2, 0.1)]
)
def test_rate_with_warmup_and_a_floor(progress, expected):
    assert lr_multiplier(progress, 0.2, 0.4, 0.1) == pytest.approx(expected)


def test_no_warmdown_stays_flat():
    assert lr_multiplier(1.0, 0.0, 0.0, 0.0) == 1


def test_momentum_and_decay():
    assert [muon_momentum(s) for s in (0, 150, 300, 5000)] == pytest.approx([0.85, 0.90, 0.95, 0.95])
    assert [muon_momentum(s, 200) for s in (0, 100, 200)] == pytest.approx([0.85, 0.90, 0.95])
    assert muon_momentum(0, 0) == pytest.approx(0.95)
    assert [muon_weight_decay(p, 0.2) for p in (0, 0.5, 1)] == pytest.approx([0.2, 0.1, 0])


def test_step_values_put_them_together():
    config = resolve(TrainConfig(weight_decay=0.4), "cpu")
    values = step_values(config, step=30, progress=0.75)
    assert (values.step, values.lr_multiplier) == (30, 0.5)
    assert (values.momentum, values.weight_decay) == pytest.approx((0.86, 0.1))
    config = resolve(TrainConfig(momentum_ramp=60), "cpu")
    assert step_values(config, step=30, progress=0.75).momentum == pytest.approx(0.9)


def run(budget: Budget, seconds_of_step) -> list[float]:
    """Steps until the budget is used up; returns the progress before each."""
    seen = []
    while budget.wants(budget.step):
        seen.append(budget.progress(budget.step))
        budget.add(seconds_of_step(budget.step))
        assert len(seen) < 1000
    return seen


def test_ten_steps_are_untimed_and_the_run_stops_with_the_step_that_reaches_the_budget():
    budget = Budget(seconds=5.0)
    seen = run(budget, lambda step: 60.0 if step < 10 else 0.75)
    assert budget.step == len(seen) == 10 + 7  # 6 x 0.75 = 4.5 < 5 <= 7 x 0.75
    assert seen[:11] == [0.0] * 11
    assert seen[11:] == pytest.approx([0.15, 0.30, 0.45, 0.60, 0.75, 0.90])
    assert (budget.timed_steps, budget.timed_seconds) == (7, pytest.approx(5.25))
    assert budget.untimed_seconds == pytest.approx(600)
    assert budget.progress(budget.step) == 1
    assert budget.remaining == 0
    assert budget.overshoot == pytest.approx(0.25)


def test_exactly_reached_is_reached():
    budget = Budget(seconds=1.0, untimed_steps=0)
    run(budget, lambda step: 0.25)
    assert budget.step == 4
    assert budget.overshoot == 0


def test_by_steps_time_has_no_say():
    budget = Budget(seconds=0.001, steps=4, untimed_steps=10)
    assert run(budget, lambda step: 3.0) == [0, 0.25, 0.5, 0.75]
    assert (budget.step, budget.timed_steps, budget.untimed_seconds) == (4, 0, 12)
    assert budget.overshoot == 0


def test_by_steps_progress_is_that_of_the_step_asked_about():
    """Not of the last one finished: a step is sent before the one ahead of it is done."""
    budget = Budget(seconds=1.0, steps=8)
    assert [budget.progress(step) for step in (0, 2, 7)] == [0, 0.25, 0.875]
    assert [budget.wants(step) for step in (0, 7, 8)] == [True, True, False]


def test_remaining():
    budget = Budget(seconds=10.0, untimed_steps=1)
    for _ in range(3):
        budget.add(2)
    assert budget.remaining == 6
    by_steps = Budget(seconds=10.0, steps=10)
    by_steps.add(2)
    assert by_steps.remaining == 18


def test_a_key_that_is_not_known_names_the_nearest():
    with pytest.raises(InputError, match=r"'matrix_rl' that this program does not know: did it mean matrix_lr\?"):
        TrainConfig.from_json({"matrix_rl": 0.1})
    with pytest.raises(InputError, match=r"'zzz' that this program does not know$"):
        TrainConfig.from_json({"zzz": 0.1})


def test_a_configuration_of_before_there_were_key_offsets_has_none():
    saved = asdict(resolve(TrainConfig(recipe="published"), "cpu"))
    del saved["key_offset"]
    config = TrainConfig.from_json(saved)
    assert config == resolve(TrainConfig(recipe="published"), "cpu")
    assert not config.model_config(100).key_offset
    shape = asdict(config.model_config(100))
    del shape["key_offset"]
    assert GPTConfig(**shape) == config.model_config(100)
    assert resolve(TrainConfig(key_offset=True), "cpu").model_config(100).key_offset
