"""What there is to choose in a training step: found by running its ops on tensors without memory, and no list by hand.

An op of the step that looks up a `Choice` makes a target of it, at the shape that it asks for.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import kernels
from kernels import Choice, Tile, asked, key_of, trying
from model import GPTConfig

from ..config import TrainConfig
from .ops import Op, micro_step_ops, update_ops
from .problems import FUSED, OPS, Problem, build, directions, forward, is_update, kind, runner

DTYPE = torch.bfloat16  # of a step on a GPU


@dataclass(frozen=True)
class Target:
    """A choice at a shape, and the op that is run to try it.

    Args:
        op: of those that ask for it the one that does most.
        calls: of all such ops in a micro-step; an update counts by its share of one.
    """

    choice: Choice
    shape: tuple
    op: Op
    calls: float
    fused_norms: bool = False  # asked for by `train --fused-norms` alone

    @property
    def name(self) -> str:
        return self.choice.name

    @property
    def key(self) -> str:
        return key_of(self.shape)

    @property
    def tiles(self) -> list[Tile]:
        """The default, then the others."""
        return self.choice.candidates(*self.shape)

    @property
    def flops(self) -> float:
        return sum(self.op.cost(backward=way)[1] for way in (False, True)) * self.calls


@contextmanager
def recorded_launches(run: bool = True) -> Iterator[list[tuple]]:
    """Yields (kernel, grid, arguments, options) of every launch inside; without `run` none of them happens."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    found: list[tuple] = []

    def recorded(launch):
        def wrapper(self, *args, grid, warmup, **kwargs):
            found.append((self, grid, args, kwargs))
            return launch(self, *args, grid=grid, warmup=warmup, **kwargs) if run else None

        return wrapper

    with ExitStack() as stack:
        for kind_of in (JITFunction, InterpretedFunction):
            stack.callback(setattr, kind_of, "run", kind_of.run)
            kind_of.run = recorded(kind_of.run)
        yield found


def call_of(op: Op, device: str, dtype: torch.dtype = DTYPE) -> Callable[[], list[Tensor]]:
    """The op as a step runs it, forward and backward, on random inputs of its sizes: each time from the same state."""
    function, problem = (OPS | FUSED)[kind(op)], build(op, device, dtype)
    if is_update(op):
        return lambda: forward(function, Problem(op, [x.clone() for x in problem.inputs], problem.constants))
    call = runner(function, problem, directions(op)[-1])

    def from_zero() -> list[Tensor]:
        for x in problem.inputs:
            if hasattr(x, "main_grad"):
                x.main_grad.zero_()
        return call()

    return from_zero


def targets(config: TrainConfig, shape: GPTConfig, fused_norms: bool | None = None) -> list[Target]:
    """Of a step of `config`, the largest first; with `fused_norms` None both of a step without and of one with them.

    Raises InputError for a model with an op whose cost is not known.
    """
    found: dict[tuple[str, str], Target] = {}
    for fused in (False, True) if fused_norms is None else (fused_norms,):
        step = dataclasses.replace(config, fused_norms=fused)
        ops = [(op, op.count) for op in micro_step_ops(step, shape)]
        ops += [(op, op.count / config.grad_accum_steps) for op in update_ops(shape)]
        met: dict[tuple[str, str], list] = {}
        for op, count in ops:
            with kernels.ops_in_force("triton"), recorded_launches(run=False), asked() as calls:
                call_of(op, "meta")()
            for name_and_key, (choice, of) in calls.items():
                met.setdefault(name_and_key, []).append((choice, of, op, count))
        for name_and_key, users in met.items():
            # One op contains another: Muon's update its orthogonal factors, which are an op by themselves.
            users = [user for user in users if not is_update(user[2]) or user[2].module == users[0][2].module]
            if name_and_key not in found:
                choice, of, op, _ = max(users, key=lambda user: user[2].cost()[0])
                calls = sum(count for *_, count in users)
                found[name_and_key] = Target(choice, of, op, calls, fused_norms=fused and fused_norms is None)
    return sorted(found.values(), key=lambda target: (is_update(target.op), -target.flops))


class Launch(NamedTuple):
    kernel: object  # as Triton made it
    grid: tuple[int, ...]
    args: tuple
    kwargs: dict

    def __call__(self) -> None:
        self.kernel[self.grid](*self.args, **self.kwargs)


@dataclass
class Launches:
    """What a call launched of a target's kernels, to be repeated; `outputs` keeps its memory alive. Repeated, a kernel
    that works in place finds its own results: that changes the numbers, and not what it does with them. Where the
    target has no kernel, or a vendor's product is in its place, it is the whole call that is repeated."""

    outputs: list[Tensor]
    again: list[Callable[[], object]]

    def __call__(self) -> None:
        for launch in self.again:
            launch()


def launches_of(target: Target, call: Callable[[], list[Tensor]], tile: Tile | None, whole: bool = False) -> Launches:
    """Runs `call` with `tile` chosen, or the default. `whole`: all of it is to be repeated, whatever it launches."""
    names = {kernel.__name__ for kernel in target.choice.kernels}
    with trying(target.name, target.key, tile), recorded_launches() as launches:
        outputs = [x.detach().clone() for x in call()]  # a gradient's buffer is the next call's too
    again = [Launch(*launch) for launch in launches if launch[0].__name__ in names]
    if whole or not again:

        def repeat():
            with trying(target.name, target.key, tile):
                call()

        again = [repeat]
    return Launches(outputs, again)
