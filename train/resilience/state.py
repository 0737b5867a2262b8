"""Everything that the rest of a run depends on: what a checkpoint holds."""

import random
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from torch import Tensor

from prepare import InputError, Loader

from ..budget import Budget
from ..clock import seconds_since_start
from ..optimizer import Optimizer
from ..ranks.parts import Kept


@dataclass
class DebiasedAverage:
    """Exponential moving average, divided by 1 − βⁿ so that it starts at the first value and not at 0."""

    beta: float = 0.9
    sum: float = 0.0
    count: int = 0

    def update(self, value: float) -> float:
        self.sum = self.beta * self.sum + (1 - self.beta) * value
        self.count += 1
        return self.sum / (1 - self.beta**self.count)


@dataclass(frozen=True)
class Evaluated:
    """When the run was evaluated last (`--eval-every`), and how long all of that has taken."""

    step: int = 0
    timed_seconds: float = 0.0
    seconds: float = 0.0


@dataclass
class RunState:
    """Consistent only while no step is on its way. The loader's part is its state after the batch handed out last:
    what it has read ahead is not in it."""

    optimizer: Optimizer
    loader: Loader
    budget: Budget
    average: DebiasedAverage = field(default_factory=DebiasedAverage)
    blocked_seconds: float = 0.0  # that training stood still for checkpoints
    evaluated: Evaluated = Evaluated()
    resumes: int = 0
    earlier_seconds: float = 0.0  # of the processes before this one, each up to the checkpoint it left

    @property
    def step(self) -> int:
        """Steps done."""
        return self.budget.step

    @property
    def seconds(self) -> float:
        """Of the whole run, as far as its result rests on them."""
        return self.earlier_seconds + seconds_since_start()

    def kept(self) -> dict[str, Kept]:
        """Masters and moments by name, fp32: this rank's part of them, wherever they live."""
        return self.optimizer.kept()

    def values(self) -> dict:
        """All else, as JSON can hold it."""
        return {
            "step": self.step,
            "budget": self.budget.counters(),
            "average": asdict(self.average),
            "loader": self.loader.state_dict(),
            "rng": rng_states(),
            "seconds": self.seconds,
            "blocked_seconds": self.blocked_seconds,
            "evaluated": asdict(self.evaluated),
            "resumes": self.resumes,
        }

    def restore(self, values: dict, tensors: dict[str, Tensor] | None) -> None:
        """Becomes what `values` and `tensors` were taken from; rank 0 has the tensors. Raises InputError where they are
        of another model."""
        ranks, ours = self.optimizer.ranks, self.kept()

        def check() -> None:
            shapes = {name: torch.empty(kept.cut.shape, device="meta") for name, kept in ours.items()}
            for name in sorted(ours.keys() | tensors.keys()):
                here, there = (describe(each.get(name)) for each in (shapes, tensors))
                if here != there:
                    raise InputError(f"the checkpoint is of another model: {name} is {there} there and {here} here")

        ranks.first_does(check)
        for name, kept in ours.items():
            kept.restore(ranks, tensors[name] if ranks.first else None)
        self.optimizer.round_masters()
        self.budget = Budget(self.budget.seconds, self.budget.steps, self.budget.untimed_steps, **values["budget"])
        self.average = DebiasedAverage(**values["average"])
        self.loader.load_state_dict(values["loader"])
        self.blocked_seconds = values["blocked_seconds"]
        self.evaluated = Evaluated(**values.get("evaluated", {}))  # checkpoints of before have none
        self.resumes = values["resumes"] + 1
        self.earlier_seconds = values["seconds"]
        set_rng_states(values["rng"])


def describe(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def rng_states() -> dict:
    """Of every generator that code in this process draws from without naming one. JSON can hold it."""
    numpy = np.random.get_state(legacy=False)
    numpy["state"] = numpy["state"] | {"key": numpy["state"]["key"].tolist()}
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {
        "torch": to_hex(torch.get_rng_state()),
        "cuda": None if cuda is None else to_hex(cuda),
        "numpy": numpy,
        "python": random.getstate(),
    }


def set_rng_states(states: dict) -> None:
    torch.set_rng_state(from_hex(states["torch"]))
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(from_hex(states["cuda"]))
    np.random.set_state(states["numpy"])
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))


def to_hex(state: Tensor) -> str:
    return state.numpy().tobytes().hex()


def from_hex(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
