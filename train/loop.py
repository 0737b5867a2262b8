"""The training loop, on one screen."""

import gc
from collections.abc import Iterator
from itertools import islice

from prepare import Batch

from .budget import Budget
from .config import TrainConfig
from .metrics import DebiasedAverage
from .optimizer import MAX_LOSS
from .progress import Reporter
from .schedule import step_values
from .step import TrainStep

COLLECT_EVERY = 5000  # steps between garbage collections; in between the collector is off, so that no step waits for it


class TrainingError(Exception):
    """The loss or a gradient is not finite, or the loss is above 100. The parameters are those of the step before."""


def train(config: TrainConfig, step: TrainStep, batches: Iterator[Batch], budget: Budget, report: Reporter) -> None:
    """Trains until the budget is used up. Raises TrainingError."""
    average = DebiasedAverage()
    while not budget.done:
        budget.start()
        values = step_values(config, budget.step, budget.progress)
        micro_batches = list(islice(batches, config.grad_accum_steps))
        loss, good = step(micro_batches, values)
        loss = loss.item()
        if not good.item():
            cause = f"loss is {loss:.4g}" if not loss <= MAX_LOSS else "a gradient is not finite"
            first, last = micro_batches[0].index, micro_batches[-1].index
            raise TrainingError(f"step {budget.step:05d}: {cause} (batches {first} to {last})")
        dt = budget.stop()
        report.step(budget, values, dt, loss, average.update(loss), micro_batches[-1].epoch)
        if values.step == 0:
            gc.collect()
            gc.freeze()
            gc.disable()
        elif values.step % COLLECT_EVERY == 0:
            gc.collect()
