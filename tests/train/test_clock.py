"""Clocks that nobody sets, and what is said of a process that stood still."""

import signal
import time
from types import SimpleNamespace

import pytest

import train.clock
from train.budget import Budget
from train.clock import LOOK, Stops, seconds_asleep, seconds_since_start


def test_a_wall_clock_that_is_set_back_moves_nothing(monkeypatch):
    before = seconds_since_start()
    assert before > 0
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert before <= seconds_since_start() < before + 3600


@pytest.fixture
def now(monkeypatch):
    """The clocks that `Stops` reads, which go on where a test says so; its thread looks on."""
    clock = SimpleNamespace(running=100.0, asleep=3.0)
    monkeypatch.setattr(train.clock, "monotonic", lambda: clock.running)
    monkeypatch.setattr(train.clock, "seconds_asleep", lambda: clock.asleep)
    return clock


def test_a_stop_is_a_signal_and_a_gap(now):
    before = signal.getsignal(signal.SIGCONT)
    with Stops() as stops:
        assert stops.since() == 0
        now.running += 1000
        signal.raise_signal(signal.SIGCONT)
        assert stops.since() == pytest.approx(1000 - LOOK)
        assert stops.since() == 0  # once
        now.running += 1000  # the thread waited for C code that kept Python's lock
        assert stops.since() == 0
        signal.raise_signal(signal.SIGCONT)  # which found the process running
        assert stops.since() == 0
        now.running += 2 * LOOK
        signal.raise_signal(signal.SIGCONT)
        assert stops.since() == 0  # too short for a word
    assert signal.getsignal(signal.SIGCONT) == before
    assert not stops._thread.is_alive()


def test_the_thread_sees_what_the_main_thread_is_late_for(now):
    """A stop in the middle of C code of 60 seconds: 40 of them, and not 60."""
    stops = Stops()
    for seconds in (*[LOOK] * 100, 40.0, *[LOOK] * 100):
        now.running += seconds
        stops._look()
    stops._went_on()
    assert stops.since() == pytest.approx(40.0 - LOOK)


def test_a_machine_that_sleeps_sends_no_signal(now):
    stops = Stops()
    now.asleep += 600.0
    assert stops.since() == 600.0
    now.asleep += 1e-6  # two clocks, read one after the other
    assert stops.since() == 0


def test_this_machine_has_clocks_of_its_sleep():
    assert seconds_asleep() > -1


def test_only_what_is_charged_to_the_budget_counts():
    """Two steps before the first timed one a stop may still reach it: a GPU works on what was sent before."""
    budget = Budget(60.0, untimed_steps=10)
    for step in range(20):
        budget.add(1.0, stopped=2.0**step)
    assert budget.stopped_seconds == sum(2.0**step for step in range(8, 20))
