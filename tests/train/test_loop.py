"""The loop that runs ahead, and the step that nothing in it waits for."""

import gc
import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernels
import train.loop
from model import GPT
from tests.helpers.small_step import CONFIG, SHAPE, endless_batches, make_step
from train.budget import Budget
from train.clock import DeviceClock, HostClock, Stops
from train.config import TrainConfig, resolve
from train.evaluating import Evaluations
from train.every import Every
from train.optimizer import Optimizer
from train.resilience.state import Evaluated, RunState
from train.schedule import StepValues, step_values
from train.step import TrainingError, TrainStep


class Batches:
    """In the place of a loader."""

    def __init__(self, batches):
        self.batches = iter(batches)

    def start(self) -> None:
        pass

    def __iter__(self):
        return self.batches


class LaggingClock(HostClock):
    """A GPU's way of working, on a CPU; each step takes a second."""

    def __init__(self, lag: int):
        self.lag = lag
        self.now = 0.0

    def mark(self) -> float:
        self.now += 1.0
        return self.now


class Recorder:
    def __init__(self):
        self.steps, self.losses, self.seconds = [], [], []

    def step(self, budget, values, dt, loss, smooth, epoch):
        self.steps.append(values.step)
        self.losses.append(loss)
        self.seconds.append(dt)


class Pauses:
    """In the place of checkpoints: one, due once `after` steps are done, that takes a thousand seconds."""

    def __init__(self, state: RunState, clock: LaggingClock, after: float):
        self.state, self.clock, self.after = state, clock, after
        self.taken = []

    def due(self) -> bool:
        return self.state.step >= self.after and not self.taken

    def save(self) -> None:
        self.taken.append(self.state.step)
        self.clock.now += 1000.0


class LongEvaluations(Evaluations):
    """Of real ones when they are due; each takes a thousand seconds."""

    def __init__(self, state: RunState, clock: LaggingClock, every: str):
        self.state, self.clock, self.every = state, clock, Every.of(every)
        self.taken = []

    def take(self) -> None:
        self.taken.append(self.state.step)
        self.clock.now += 1000.0
        self.state.evaluated = Evaluated(self.state.step, self.state.budget.timed_seconds, 1000.0 * len(self.taken))


def run(
    lag: int, step: TrainStep, stop=lambda: False, pause_after=math.inf, stops=None, every="0", **budget
) -> tuple[Recorder, Budget]:
    seen, clock = Recorder(), LaggingClock(lag)
    state = RunState(step.optimizer, Batches(endless_batches()), Budget(untimed_steps=0, **budget))
    seen.pauses = Pauses(state, clock, pause_after)
    seen.evaluations = LongEvaluations(state, clock, every)
    train.loop.train(
        CONFIG, step, state, clock, seen, seen.pauses, stop, stops or Stops(), evaluations=seen.evaluations
    )
    return seen, state.budget


def test_running_ahead_changes_no_bit():
    steps = [make_step() for _ in range(2)]
    (at_once, _), (late, _) = (run(lag, step, seconds=1.0, steps=6) for lag, step in enumerate(steps))
    assert at_once.steps == late.steps == [*range(6)]
    assert at_once.losses == late.losses
    assert late.seconds == [1.0] * 6
    for a, b in zip(*(step.model.parameters() for step in steps), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("lag", "num_steps"), [(0, 3), (1, 4)])
def test_a_step_on_its_way_when_time_is_up_is_counted(lag, num_steps):
    seen, budget = run(lag, make_step(), seconds=3.0)
    assert seen.steps == [*range(num_steps)]
    assert budget.timed_seconds == num_steps
    assert budget.overshoot == num_steps - 3


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("untimed", [0, 1, 2, 3, 10])
def test_what_comes_once_is_no_timed_steps(monkeypatch, lag, untimed):
    """Garbage is collected, and the first batch packed, before the clock's first mark. It is collected again after the
    first step where the next to be sent is untimed, and then at every sixth; by itself never."""
    events = []

    class Watched(LaggingClock):
        def mark(self):
            events.append("mark")
            return super().mark()

    def step(*_):
        assert not gc.isenabled()
        events.append("step")
        return torch.zeros(()), torch.ones((), dtype=torch.bool)

    monkeypatch.setattr(Batches, "start", lambda self: events.append("first batch"))
    monkeypatch.setattr(train.loop.gc, "collect", lambda: events.append("collected"))
    monkeypatch.setattr(train.loop, "COLLECT_EVERY", 6)
    state = RunState(None, Batches(endless_batches()), Budget(1.0, steps=8, untimed_steps=untimed))
    pauses = Pauses(state, clock := Watched(lag), math.inf)
    train.loop.train(CONFIG, step, state, clock, Recorder(), pauses, lambda: False, Stops())
    assert events[:3] == ["collected", "first batch", "mark"]
    counts = [events[: i + 1].count("step") for i, event in enumerate(events) if event == "collected"]
    again = [1 + lag] if untimed > 1 + lag else []
    assert counts == [0, *again, 6 + lag]
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


@pytest.mark.parametrize("lag", [0, 1])
def test_a_checkpoint_is_taken_at_rest_and_costs_no_step(lag):
    """Every step sent is finished first, and the thousand seconds are no step's."""
    seen, budget = run(lag, make_step(), pause_after=2, seconds=1.0, steps=6)
    assert seen.pauses.taken == [2 + lag]
    assert seen.seconds == [1.0] * 6
    assert budget.timed_seconds == 6
    plain, _ = run(lag, make_step(), seconds=1.0, steps=6)
    assert seen.losses == plain.losses


@pytest.mark.parametrize(("lag", "every", "taken"), [
    (0, "2", [2, 4, 6]), (1, "2", [2, 4, 6]),  # by steps it is known before the step is sent
    (0, "2s", [2, 4, 6]), (1, "2s", [3, 5, 6]),  # by seconds a step is on its way when they are over
    (0, "2.5s", [3, 5]), (0, "9", []), (1, "100s", []),
])  # fmt: skip
def test_an_evaluation_is_made_at_rest_and_costs_no_step(lag, every, taken):
    """Beside a checkpoint; the budget's clock has none of it, and training is what it was."""
    seen, budget = run(lag, make_step(), pause_after=3, every=every, seconds=1.0, steps=6)
    assert seen.evaluations.taken == taken
    assert seen.seconds == [1.0] * 6
    assert budget.timed_seconds == 6
    assert len(seen.pauses.taken) == 1
    plain, _ = run(lag, make_step(), seconds=1.0, steps=6)
    assert seen.losses == plain.losses


@pytest.mark.parametrize("lag", [0, 1])
def test_inside_a_time_budget_as_many_steps_are_made_with_evaluations(lag):
    (_, plain), (seen, budget) = (run(lag, make_step(), every=every, seconds=7.0) for every in ("0", "2.5s"))
    assert (budget.step, budget.timed_seconds) == (plain.step, plain.timed_seconds)
    assert len(seen.evaluations.taken) == 2 + lag


@pytest.mark.parametrize("lag", [0, 1])
def test_who_asks_to_stop_waits_for_no_evaluation(lag):
    asked = iter([False])
    seen, budget = run(lag, make_step(), lambda: next(asked, True), every="1s", seconds=9.0)
    assert budget.step == 1 + lag
    assert seen.evaluations.taken == []


def test_an_evaluation_comes_before_the_checkpoint_of_its_step():
    """Which knows of it, so that no run that goes on from there makes it again."""
    order = []
    state = RunState(None, Batches(endless_batches()), Budget(9.0, steps=3, untimed_steps=0))
    clock = LaggingClock(0)
    pauses, evaluations = Pauses(state, clock, 2), LongEvaluations(state, clock, "2")
    for what, name in ((pauses, "save"), (evaluations, "take")):
        real = getattr(what, name)
        setattr(what, name, lambda real=real, name=name: (order.append(name), real()))
    step = lambda *_: (torch.zeros(()), torch.ones((), dtype=torch.bool))  # noqa: E731
    train.loop.train(CONFIG, step, state, clock, Recorder(), pauses, lambda: False, Stops(), evaluations=evaluations)
    assert order == ["take", "save"]


def test_what_an_evaluation_leaves_is_collected_before_the_clock_goes_on(monkeypatch):
    events = []
    monkeypatch.setattr(train.loop.gc, "collect", lambda: events.append("collected"))
    take, mark = LongEvaluations.take, LaggingClock.mark
    monkeypatch.setattr(LongEvaluations, "take", lambda self: events.append("evaluated") or take(self))
    monkeypatch.setattr(LaggingClock, "mark", lambda self: events.append("mark") or mark(self))
    run(0, make_step(), every="2", seconds=1.0, steps=3)
    at = events.index("evaluated")
    assert events[at : at + 3] == ["evaluated", "collected", "mark"]


@pytest.mark.parametrize("lag", [0, 1])
def test_a_process_that_stood_still_inside_a_step_says_so(lag):
    """Not what it did before the first, nor while a checkpoint was written."""
    asked = iter([1000.0, *[0.0] * (1 + lag), 100.0, 10.0, 1.0])
    stops = SimpleNamespace(since=lambda: next(asked, 0.0))
    # Before the first step; after steps 0 (and 1); after the next; after the checkpoint; after the step that follows.
    seen, budget = run(lag, make_step(), stops=stops, pause_after=2, seconds=1.0, steps=6)
    assert seen.pauses.taken == [2 + lag]
    assert budget.stopped_seconds == 101.0


@pytest.mark.parametrize("lag", [0, 1])
def test_asked_to_stop_it_finishes_what_it_has_sent(lag):
    step = make_step()
    calls = 0

    def stop():
        nonlocal calls
        calls += 1
        return calls > 3

    seen, budget = run(lag, step, stop, seconds=100.0)
    assert seen.steps == [0, 1, 2, 3][: 3 + lag]  # asked before the first step, and after each
    assert budget.step == 3 + lag


@pytest.mark.parametrize("lag", [0, 1])
def test_a_bad_step_is_named_and_nothing_after_it_is_taken(monkeypatch, lag):
    forward, calls = GPT.forward, 0

    def poisoned(self, *args, **kwargs):
        nonlocal calls
        calls += 1
        loss = forward(self, *args, **kwargs)
        return loss * math.nan if calls in (5, 6) else loss  # both micro-steps of step 2

    monkeypatch.setattr(GPT, "forward", poisoned)
    step, untouched = make_step(), make_step()
    with pytest.raises(TrainingError, match=r"step 00002: loss is nan \(batches 4 to 5\)"):
        run(lag, step, seconds=1.0, steps=6)
    assert calls == 6 + 2 * lag  # on a GPU one more step was on its way
    monkeypatch.setattr(GPT, "forward", forward)
    six = Budget(seconds=1.0, steps=6)
    batches = endless_batches()
    for number in range(2):
        untouched([next(batches), next(batches)], step_values(CONFIG, number, six.progress(number)))
    for a, b in zip(step.model.parameters(), untouched.model.parameters(), strict=True):
        assert torch.equal(a, b)


class NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait for the device, or ties a captured step to the host's memory."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero", "item", "allclose")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        assert not any(name == w or name.startswith((f"{w}_", f"_{w}")) for w in self.WAITING), f"{name} waits"
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        devices = {t.device.type for t in tensors if t.dim() or t.device.type != "cpu"}
        assert len(devices) <= 1, f"{name} crosses from one device to another: {devices}"
        return out


@pytest.fixture
def no_launches(monkeypatch):
    """Kernels are called with all their arguments, and do nothing: tensors without memory can go through a step."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    for kind in (InterpretedFunction, JITFunction):
        monkeypatch.setattr(kind, "run", lambda self, *args, **kwargs: None)
    kernels.set_ops("triton")
    yield
    kernels.set_ops(None)


def device_step(**options: bool) -> tuple[TrainStep, torch.Tensor]:
    """The default GPU configuration at full size, on a device without memory; and a micro-batch of its tokens."""
    config = resolve(TrainConfig(**options), "cuda")
    model = GPT(config.model_config(8192), device="meta", **config.model_options)
    tokens = torch.empty(config.device_batch_size, config.seq_len + 1, dtype=torch.int32, device="meta")
    return TrainStep(model, Optimizer(model, config, torch.bfloat16)), tokens


def test_nothing_in_a_step_waits_for_the_device(no_launches):
    step, tokens = device_step()
    with NoWaiting():
        step.optimizer.zero_grad()
        step.micro_step(tokens, 2)
        step.micro_step(tokens, 2)
        step.update()


class Passes(TorchDispatchMode):
    """Counts what passes over a tensor of the stream's size and is no kernel of ours: views and allocations do not."""

    def __init__(self, size: int):
        super().__init__()
        self.size, self.counts = size, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        written = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.numel() >= self.size]
        if written and not func.is_view and func not in self.ALLOCATIONS:
            self.counts[func._schema.name.removeprefix("aten::")] += 1
        return out

    ALLOCATIONS = (torch.ops.aten.empty.memory_format, torch.ops.aten.empty_like.default)


@pytest.mark.parametrize("fused_norms", [False, True])
def test_beside_the_ops_nothing_passes_over_the_stream(no_launches, fused_norms):
    """A sum that autograd makes of two gradients of the stream is 0.8 GB moved: each has to be an op's own."""
    step, tokens = device_step(fused_norms=fused_norms)
    with Passes(tokens[:, :-1].numel() * step.model.config.d_model) as passes:
        step.micro_step(tokens, 2)
    # In every layer dx of qkv and of attention's output, and where no norm is in them qkv and dx of the MLP; the logits
    # in eight chunks. Attention's output and the MLP's are added to the stream in place, but to a copy of it where a
    # norm inside a product keeps it for its backward.
    products = {"mm": 2 * 8 + 8, "addmm": 16} if fused_norms else {"mm": 4 * 8 + 8, "addmm_": 16}
    # Before the first layer x is x0, and two gradients meet; the head's dx is scaled by what comes back for the loss.
    assert dict(passes.counts) == {**products, "add": 1, "mul": 1}


@pytest.mark.parametrize("op", ["item", "nonzero", "host copy", "host index"])
def test_waiting_is_found(no_launches, monkeypatch, op):
    step, tokens = device_step()
    update = {
        "item": lambda loss: loss.item(),
        "nonzero": lambda loss: tokens.nonzero(),
        "host copy": lambda loss: step.optimizer.hyper.cpu(),
        "host index": lambda loss: step.optimizer.hyper[torch.tensor([0, 1])],
    }[op]
    monkeypatch.setattr(step, "update_parameters", update)
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)), NoWaiting():
        step.update()


@pytest.mark.parametrize("micro_steps", [1, 2])
def test_eager_and_replayed_steps_give_the_same_bits(gpu, micro_steps):
    """Over steps of changing rate, momentum and decay; a rehearsal and a bad step in between change nothing."""
    eager, replayed = (make_step("cuda", torch.bfloat16) for _ in range(2))
    values = [StepValues(i, lr_multiplier=1 / (i + 1), momentum=0.85 + i / 100, weight_decay=0.2 - i / 50)
              for i in range(5)]  # fmt: skip
    replayed.capture(SHAPE, micro_steps, values[0])
    batches, kept = endless_batches("cuda"), []
    for i, value in enumerate(values):
        taken = [next(batches) for _ in range(micro_steps)]
        if i == 2:
            replayed(taken, values[0], apply=False)
        (loss, good), (loss_replayed, good_replayed) = eager(taken, value), replayed(taken, value)
        assert good
        assert good_replayed
        assert torch.equal(loss, loss_replayed)
        for (name, a), b in zip(eager.optimizer.masters.items(), replayed.optimizer.masters.values(), strict=True):
            assert torch.equal(a, b), f"{name} after step {i}"
        kept.append((loss_replayed, loss.item()))
    assert all(loss.item() == then for loss, then in kept)  # no later step has written over it


@pytest.mark.parametrize("graphs", [True, False])
def test_the_loop_waits_for_nothing_but_its_clock(gpu, graphs):
    """CUDA's own word for it: in this mode PyTorch raises on every call that makes the host wait."""
    step = make_step("cuda", torch.bfloat16)
    values = StepValues(0, 1.0, 0.85, 0.2)
    if graphs:
        step.capture(SHAPE, 2, values)
    else:
        step.rehearse(SHAPE, 2, values)
    batches = [next(generator) for generator in [endless_batches("cuda")] for _ in range(12)]
    state, clock, seen = RunState(step.optimizer, Batches(batches), Budget(1.0, steps=6)), DeviceClock(), Recorder()
    torch.cuda.set_sync_debug_mode("error")
    try:
        train.loop.train(CONFIG, step, state, clock, seen, Pauses(state, clock, math.inf), lambda: False, Stops())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert seen.steps == [*range(6)]
    assert all(seconds > 0 for seconds in seen.seconds)
    # As a step that is waited for before the next one is sent.
    plain, budget = make_step("cuda", torch.bfloat16), Budget(1.0, steps=6)
    for i in range(6):
        loss, _ = plain(batches[2 * i : 2 * i + 2], step_values(CONFIG, i, budget.progress(i)))
        assert seen.losses[i] == loss.item()
    for a, b in zip(step.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(a, b)
