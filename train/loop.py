"""The training loop, on one screen."""

import gc
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import Tensor

from prepare import Batch

from .budget import Budget
from .clock import Clock
from .config import TrainConfig
from .metrics import DebiasedAverage
from .optimizer import MAX_LOSS
from .progress import Reporter
from .schedule import StepValues, step_values
from .step import TrainStep

COLLECT_EVERY = 5000  # steps between garbage collections; in between the collector is off, so that no step waits for it


class TrainingError(Exception):
    """The loss or a gradient is not finite, or the loss is above 100. The parameters are those of the step before."""

    def __init__(self, line: str, sent: "Sent"):
        super().__init__(line)
        self.sent = sent


@dataclass
class Sent:
    """A step that has been sent to the device, and may still be running there."""

    values: StepValues
    batches: list[Batch]
    loss: Tensor  # this and the next: on the host, and there once `end` is reached
    good: Tensor
    end: Any  # mark of the clock


def train(
    config: TrainConfig, step: TrainStep, batches: Iterator[Batch], budget: Budget, clock: Clock, report: Reporter
) -> None:
    """Trains until the budget is used up. Raises TrainingError.

    The host sends a step before it has read the loss of the one `clock.lag` steps earlier, so that the device never
    waits for it. A bad step is therefore noticed late; the optimizer takes neither it nor any step after it.
    """
    average = DebiasedAverage()
    in_flight: deque[Sent] = deque()
    number, last = budget.step, clock.mark()
    while True:
        wanted = budget.wants(number)
        if wanted:
            values = step_values(config, number, budget.progress(number))
            micro_batches = list(islice(batches, config.grad_accum_steps))
            # Sent to the host here and now: asked for later, they would arrive after the step that is sent next.
            loss, good = (result.to("cpu", non_blocking=True) for result in step(micro_batches, values))
            in_flight.append(Sent(values, micro_batches, loss, good, clock.mark()))
            number += 1
        elif not in_flight:
            return
        if len(in_flight) > clock.lag or not wanted:
            sent = in_flight.popleft()
            seconds, last = clock.seconds(last, sent.end), sent.end
            finish(sent, seconds, budget, average, report)


def finish(sent: Sent, seconds: float, budget: Budget, average: DebiasedAverage, report: Reporter) -> None:
    """Reads a step's loss, counts its time, reports it. Raises TrainingError."""
    loss = sent.loss.item()
    if not sent.good.item():
        cause = f"loss is {loss:.4g}" if not loss <= MAX_LOSS else "a gradient is not finite"
        first, last = sent.batches[0].index, sent.batches[-1].index
        raise TrainingError(f"step {sent.values.step:05d}: {cause} (batches {first} to {last})", sent)
    budget.add(seconds)
    report.step(budget, sent.values, seconds, loss, average.update(loss), sent.batches[-1].epoch)
    if sent.values.step == 0:
        gc.collect()
        gc.freeze()
        gc.disable()
    elif sent.values.step % COLLECT_EVERY == 0:
        gc.collect()
