"""The training loop, on one screen."""

import gc
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice

from .budget import Budget
from .clock import Clock, Stops
from .config import TrainConfig
from .evaluating import Evaluations
from .optimizer import MAX_LOSS
from .ranks import ALONE, Ranks
from .resilience.checkpoint import Checkpointer
from .resilience.state import RunState
from .results.progress import Reporter
from .schedule import step_values
from .step import Sent, TrainingError, TrainStep

COLLECT_EVERY = 5000  # steps between garbage collections; in between the collector is off, so that no step waits for it


def settle_garbage() -> None:
    """What is there now stays: no later collection looks at it."""
    gc.collect()
    gc.freeze()


@contextmanager
def seldom_collecting() -> Iterator[None]:
    """The garbage collector runs where the loop says so, and not by itself."""
    settle_garbage()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


@seldom_collecting()
def train(
    config: TrainConfig, step: TrainStep, state: RunState, clock: Clock, report: Reporter, checkpoints: Checkpointer,
    stop: Callable[[], bool], stops: Stops, ranks: Ranks = ALONE, evaluations: Evaluations | None = None,
) -> None:  # fmt: skip
    """Trains until the budget is used up or `stop` says so; nothing is on its way then. Raises TrainingError.

    The host sends a step before it has read the loss of the one `clock.lag` steps earlier, so that the device never
    waits for it. A bad step is therefore noticed late; the optimizer takes neither it nor any step after it.

    All ranks do the same at the same step: what one of them alone may know, the time that a step took on rank 0, a
    signal, a checkpoint that is due, they agree on after each step, one step late like all else. `evaluations` are due
    by what all know already; who asks to stop does not wait for one, and it comes first when the run goes on.

    Before the first mark all is ready that no step should pay for: the first batch, and the garbage is gone.
    """
    in_flight: deque[Sent] = deque()
    number = state.budget.step
    # Once more after the first step, which may compile, where the step that pays for it is an untimed one.
    warm = number + 1 if number + 1 + clock.lag < state.budget.untimed_steps else None
    state.loader.start()
    stops.since()
    asked, due = agreed(state.budget, stop(), checkpoints.due(), ranks)
    last = clock.mark()
    while True:
        more = state.budget.wants(number) and not asked
        evaluate = evaluations is not None and not asked and evaluations.due(number)
        wanted = more and not due and not evaluate
        if wanted:
            values = step_values(config, number, state.budget.progress(number))
            micro_batches = list(islice(state.loader, config.grad_accum_steps))
            # Sent to the host here and now: asked for later, they would arrive after the step that is sent next.
            loss, good = (result.to("cpu", non_blocking=True) for result in step(micro_batches, values))
            in_flight.append(Sent(values, micro_batches, loss, good, clock.mark()))
            number += 1
        elif not in_flight:
            if evaluate:
                evaluations.take()
                settle_garbage()
            elif not more:
                return
            else:
                checkpoints.save()
            stops.since()
            asked, due = agreed(state.budget, stop(), checkpoints.due(), ranks)
            last = clock.mark()  # what it took is no step's time
            continue
        if len(in_flight) > clock.lag or not wanted:
            sent = in_flight.popleft()
            seconds, last = clock.seconds(last, sent.end), sent.end
            finish(sent, seconds, stops.since(), state, report)
            asked, due = agreed(state.budget, stop(), checkpoints.due(), ranks)
            if state.step == warm or state.step % COLLECT_EVERY == 0:
                settle_garbage()


def agreed(budget: Budget, asked: bool, due: bool, ranks: Ranks) -> tuple[bool, bool]:
    """Sets every rank's clock to rank 0's. Whether any was `asked` to stop, and whether a checkpoint is `due`."""
    clock = (budget.timed_seconds, budget.untimed_seconds) if ranks.first else (0.0, 0.0)
    budget.timed_seconds, budget.untimed_seconds, budget.stopped_seconds, asked, due = ranks.agree(
        *clock, budget.stopped_seconds, asked, due
    )
    return bool(asked), bool(due)


def finish(sent: Sent, seconds: float, stopped: float, state: RunState, report: Reporter) -> None:
    """Reads a step's loss, counts its time, reports it. Raises TrainingError."""
    loss = sent.loss.item()
    if not sent.good.item():
        cause = f"loss is {loss:.4g}" if not loss <= MAX_LOSS else "a gradient is not finite"
        first, last = sent.batches[0].index, sent.batches[-1].index
        raise TrainingError(f"step {sent.values.step:05d}: {cause} (batches {first} to {last})", sent)
    state.budget.add(seconds, stopped)
    report.step(state.budget, sent.values, seconds, loss, state.average.update(loss), sent.batches[-1].epoch)
