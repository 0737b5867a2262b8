"""The model's stored tensors, cut into one part a rank: each rank sums the gradient of its part alone, has masters and
moments of it alone, and updates it alone.

Stacks of matrices are cut between layers, ⌈L/N⌉ a rank, since Muon wants them whole; tables and scalars are flat, cut
at multiples of 1,024 elements. What a rank has too few of is padding, which nobody reads.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import Ranks

# Elements. Vectors of any width, and the shares of as many threads as cores usually are, begin at a multiple of it: an
# element is computed by the same instructions wherever the cut is.
FLAT = 1024
ALIGNED = 32  # elements: 128 bytes, where vector loads want a tensor to begin


@dataclass(frozen=True)
class Cut:
    """How a tensor of `shape` is divided.

    Args:
        rows: of its first dimension that a rank has; None: the tensor is cut flat.
        part: elements of a rank's part, padding included.
    """

    shape: tuple[int, ...]
    rank: int
    size: int
    rows: int | None
    part: int

    @classmethod
    def of(cls, shape: tuple[int, ...], whole_rows: bool, ranks: Ranks, unit: int = 1) -> "Cut":
        """`whole_rows`: cut in the first dimension, `unit` rows of which belong together; flat otherwise."""
        shape, elements = tuple(shape), math.prod(shape)
        if whole_rows:
            rows = -(-shape[0] // (unit * ranks.size)) * unit
            return cls(shape, ranks.rank, ranks.size, rows, rows * math.prod(shape[1:]))
        return cls(shape, ranks.rank, ranks.size, None, -(-elements // (ranks.size * FLAT)) * FLAT)

    @property
    def begin(self) -> int:
        """Of this rank's part in the padded whole."""
        return self.rank * self.part

    @property
    def padded(self) -> int:
        """Elements of all parts."""
        return self.size * self.part

    def own(self, part: Tensor) -> Tensor:
        """Of this rank's part [part] what is no padding: its rows; a stretch of a flat one, the whole in its shape
        where it is on one rank."""
        left = max(0, min(self.part, math.prod(self.shape) - self.begin))
        if self.rows is not None:
            each = math.prod(self.shape[1:])
            return part[:left].view(left // each, *self.shape[1:])
        return part[:left].view(self.shape) if self.size == 1 else part[:left]

    def whole(self, flat: Tensor) -> Tensor:
        """Of all parts [padded], one behind the other, the tensor."""
        return flat[: math.prod(self.shape)].view(self.shape)


@dataclass
class Kept:
    """A tensor of the optimizer's state, of which this rank has `own`, padding left out."""

    cut: Cut
    own: Tensor

    def gathered(self, ranks: Ranks) -> Tensor | None:
        """The whole on rank 0: `own` itself where there is no other rank."""
        if ranks.size == 1:
            return self.own
        padded = self.own.new_zeros(self.cut.part)
        padded[: self.own.numel()] = self.own.flatten()
        flat = ranks.gather(padded)
        return None if flat is None else self.cut.whole(flat)

    def restore(self, ranks: Ranks, whole: Tensor | None) -> None:
        """From what rank 0 gives, on whatever device."""
        if ranks.size == 1:
            self.own.copy_(whole)
            return
        padded, flat = self.own.new_empty(self.cut.part), None
        if ranks.first:
            flat = self.own.new_zeros(self.cut.padded)
            flat[: whole.numel()] = whole.flatten().to(flat.device)
        ranks.scatter(padded, flat)
        self.own.copy_(padded[: self.own.numel()].view_as(self.own))


@dataclass
class Stored:
    """A stored tensor of the model. `forward`, `grad`: [padded], the whole on every rank; the others: [part]."""

    cut: Cut
    forward: Tensor  # what the parameter is a view of
    grad: Tensor  # fp32, of the micro-step that runs; `main_grad` is a view of it
    sum: Tensor  # fp32, over the micro-steps of all ranks; where that is one micro-step of one rank it is `grad`
    master: Tensor  # fp32; a stretch of `forward` where that is fp32 too

    @property
    def copy(self) -> Tensor | None:
        """This rank's part of `forward`; None where that is the master."""
        if self.forward.dtype == torch.float32:
            return None
        return self.forward[self.cut.begin : self.cut.begin + self.cut.part]


def store(
    parameters: dict[str, torch.nn.Parameter], dtype_of: Callable[[str], torch.dtype], by_layer: tuple[str, ...],
    ranks: Ranks, apart: bool,
) -> tuple[dict[str, Stored], Tensor, Tensor]:  # fmt: skip
    """Moves every parameter into memory that can be cut, and gives it its `main_grad`.

    Args:
        dtype_of: what the forward reads of a parameter, by its name.
        by_layer: names of the stacks of matrices.
        apart: whether sums are kept apart from the gradients of a micro-step.

    Returns:
        the tensors by name, the flat buffer of all gradients, and that of all sums.
    """
    cuts = {name: Cut.of(p.shape, name in by_layer, ranks) for name, p in parameters.items()}
    device = next(iter(parameters.values())).device
    grads = torch.zeros(sum(_aligned(cut.padded) for cut in cuts.values()), device=device)
    sums = torch.zeros(sum(_aligned(cut.part) for cut in cuts.values()), device=device) if apart else grads
    stored, at, sum_at = {}, 0, 0
    for name, parameter in parameters.items():
        cut, dtype = cuts[name], dtype_of(name)
        flat = torch.zeros(cut.padded, device=device)
        cut.whole(flat).copy_(parameter.data)
        if dtype == torch.float32:
            forward, master = flat, flat[cut.begin : cut.begin + cut.part]
        else:
            forward = flat.to(dtype)
            # All of it is the part of a single rank; of several, the rest is given back.
            master = flat if ranks.size == 1 else flat[cut.begin : cut.begin + cut.part].clone()
        grad = grads[at : at + cut.padded]
        stored[name] = Stored(cut, forward, grad, sums[sum_at : sum_at + cut.part] if apart else grad, master)
        parameter.data = cut.whole(forward)
        parameter.main_grad = cut.whole(grad)
        at, sum_at = at + _aligned(cut.padded), sum_at + _aligned(cut.part)
    return stored, grads, sums


def _aligned(elements: int) -> int:
    return -(-elements // ALIGNED) * ALIGNED
