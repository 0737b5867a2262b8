"""What stands in the code as a default, and a measurement on a GPU may replace: a kernel's tile, a product's way.

A `Choice` stands in the file of its kernel, with what may be tried in its place. It depends on a shape, a dtype and the
GPU alone: never on how many rows or matrices a process happens to hold, so that many GPUs compute the bits of one. An
op looks it up when it is called, and measures nothing.
"""

import ast
import hashlib
import inspect
import json
import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import product

import torch

__all__ = [
    "Choice", "Table", "Tile", "asked", "choose", "chosen", "elements", "fitting_block", "fitting_blocks", "grid",
    "key_of", "product_tiles", "trying",
]  # fmt: skip

Tile = dict[str, int | bool | str]
Table = dict[str, dict[str, Tile]]  # by the choice's name, then by its shape as `key_of` writes it

_chosen: Table = {}
_asked: list[dict] = []


class Choice:
    """Called with a shape it gives what is in force there: what was chosen, or else the default.

    Args:
        name: what a table calls it.
        kernels: the Triton functions that are launched with it; none where it chooses something else.
        default: of a shape.
        candidates: of the same shape, complete: each could stand there as it is.
    """

    def __init__(
        self, name: str, kernels: Iterable, default: Callable[..., Tile], candidates: Callable[..., Iterable[Tile]]
    ):
        self.name, self.kernels, self.default, self._candidates = name, tuple(kernels), default, candidates

    def __call__(self, *shape: int | torch.dtype) -> Tile:
        for calls in _asked:
            calls[self.name, key_of(shape)] = (self, shape)
        tile = _chosen.get(self.name, {}).get(key_of(shape))
        return self.default(*shape) if tile is None else tile

    def candidates(self, *shape: int | torch.dtype) -> list[Tile]:
        """The default first, and no tile twice."""
        found = [self.default(*shape)]
        for tile in self._candidates(*shape):
            if tile not in found:
                found.append(tile)
        return found


    def digest(self, *shape: int | torch.dtype) -> str:
        """Changes with the kernels, with all that they call, and with what may be chosen."""
        text: dict[str, str] = {}
        for kernel in self.kernels:
            _read(kernel, text)
        return hashlib.sha256(json.dumps([text, self.candidates(*shape)], sort_keys=True).encode()).hexdigest()[:16]


def _read(function, text: dict[str, str]) -> None:
    """Adds the sources of a Triton function and of those that it calls, and the constants that they name."""
    inside = function.fn
    name = f"{inside.__module__}.{inside.__name__}"
    if name in text:
        return
    text[name] = inspect.getsource(inside)
    for node in ast.walk(ast.parse(textwrap.dedent(text[name]))):
        if isinstance(node, ast.Name) and node.id in inside.__globals__:
            value = inside.__globals__[node.id]
            if callable(getattr(value, "fn", None)):
                _read(value, text)
            elif isinstance(value, int | float | str):
                text[f"{name}: {node.id}"] = str(value)


def key_of(shape: Iterable[int | torch.dtype]) -> str:
    return " ".join(str(part).removeprefix("torch.") for part in shape)


def choose(table: Table) -> Table:
    """From here on `table` is in force and nothing else is. Returns what was."""
    global _chosen
    before, _chosen = _chosen, table
    return before


@contextmanager
def chosen(table: Table) -> Iterator[None]:
    """Inside, `table` is in force and nothing else is."""
    before = choose(table)
    try:
        yield
    finally:
        choose(before)


@contextmanager
def trying(name: str, key: str, tile: Tile | None) -> Iterator[None]:
    """Inside, one choice gives `tile`, or its default for None; the others stay as they are."""
    others = {shape: given for shape, given in _chosen.get(name, {}).items() if shape != key}
    with chosen({**_chosen, name: others if tile is None else {**others, key: tile}}):
        yield


@contextmanager
def asked() -> Iterator[dict[tuple[str, str], tuple[Choice, tuple]]]:
    """Yields the choices that are looked up inside, by name and key: each with the shape it was asked for."""
    calls: dict[tuple[str, str], tuple[Choice, tuple]] = {}
    _asked.append(calls)
    try:
        yield calls
    finally:
        _asked.remove(calls)


def grid(accept: Callable[[Tile], bool] = lambda tile: True, **values: Iterable) -> list[Tile]:
    """All combinations of `values` that are accepted."""
    found = [dict(zip(values, choice, strict=True)) for choice in product(*values.values())]
    return [tile for tile in found if accept(tile)]


def elements(of: Callable[[Tile], int], least: int, most: int) -> Callable[[Tile], bool]:
    """Whether a thread has from `least` to `most` of a tile's elements: vectors of 16 bytes, and registers to spare."""
    return lambda tile: least <= of(tile) // (32 * tile["num_warps"]) <= most


def fitting_blocks(width: int, blocks: Iterable[int]) -> list[int]:
    """Those powers of two in whose blocks no more than a quarter of the columns lies past `width`, or where there is
    none the narrowest."""
    blocks = sorted(blocks)
    return [b for b in blocks if 3 * b * -(-width // b) <= 4 * width] or blocks[:1]


def fitting_block(width: int, most: int) -> int:
    """The widest of them from 128 to `most`; a row of less than that in one."""
    whole = 1 << (width - 1).bit_length()
    return min(whole, fitting_blocks(width, [b for b in (128, 256, 512, 1024) if b <= most])[-1])


def product_tiles(pipelines: tuple[tuple[int, int], ...], **values: Iterable) -> list[Tile]:
    """Tiles of a product: the given sizes, 4 or 8 warps, and (BLOCK_K, stages).

    A thread's share of the fp32 sums is 64 or 128 registers: with less, a factor's elements are read too often, with
    more they spill. Stages have to fit into 227 KiB, which is what Hopper has.
    """
    sides = list(values)

    def area(tile):
        return tile[sides[0]] * tile[sides[-1]]

    return [
        {**tile, "BLOCK_K": block_k, "num_stages": stages}
        for tile in grid(elements(area, 64, 128), **values, num_warps=(4, 8))
        for block_k, stages in pipelines
        if (tile[sides[0]] + tile[sides[-1]]) * block_k * 2 * stages <= 227 * 1024
    ]
