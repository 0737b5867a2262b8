"""What the ranks send each other in a step: how much it is, and how long it takes."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from model import GPT, GPTConfig

from ..config import TrainConfig
from ..optimizer import Optimizer
from ..place import Place
from . import Ranks


@dataclass(frozen=True)
class Traffic:
    """Of one rank, in bytes of a step that it sends to others; it receives as many.

    Args:
        exchange: of the gradients of one of its micro-steps; with native sums, of a step.
        exchanges: in a step.
        gather: of what the forward reads.
        calls: collectives, of an exchange and of a gather each.
    """

    exchange: int
    exchanges: int
    gather: int
    calls: int

    @property
    def bytes(self) -> int:
        return self.exchange * self.exchanges + self.gather


def traffic(optimizer: Optimizer, config: TrainConfig) -> Traffic:
    size, stored = optimizer.ranks.size, optimizer.stored.values()
    exchanges = 1 if optimizer.native else config.grad_accum_steps // size
    exchange = sum((size - 1) * each.cut.part * each.grad.element_size() for each in stored)
    gather = sum((size - 1) * each.cut.part * each.forward.element_size() for each in stored)
    return Traffic(exchange, exchanges, gather, len(stored))


def traffic_of(config: TrainConfig, shape: GPTConfig, size: int) -> Traffic:
    """Without a process for each of the `size` ranks, and without memory."""
    optimizer = Optimizer(GPT(shape, device="meta"), config, config.forward_dtype, Ranks(Place(size=size)))
    return traffic(optimizer, config)


def seconds_of(call: Callable[[], object], ranks: Ranks, device: str, times: int = 20) -> list[float]:
    """Of a call that all ranks make, `times` times: each as long as it took the slowest rank."""
    taken = []
    for _ in range(times + 2):  # the first two connect the ranks
        ranks.agree(0)
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        taken += ranks.agree(time.perf_counter() - start)
    return taken[2:]


def measured(optimizer: Optimizer, device: str) -> tuple[list[float], list[float]]:
    """Seconds of exchanges, with the additions that they are made for, and of gathers. All ranks call it."""
    ranks = optimizer.ranks
    return seconds_of(optimizer.add_gradients, ranks, device), seconds_of(optimizer.share_parameters, ranks, device)
