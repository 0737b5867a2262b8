"""The ops of a step at their sizes, as the model and the optimizer call them: no list of them is kept by hand.

A forward of the configuration runs on tensors without memory, its calls watched at the door of `kernels`; the groups of
the optimizer say what updates them. What is called and has no known cost is an error that names it, and so is a product
that no op makes: a sum over the others would be that of another model. What passes over the stream outside the ops
beside that is in no sum.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import kernels
from model import GPT, GPTConfig
from model.gpt import parameter_shapes
from prepare import InputError

from ..config import ROOT, TrainConfig, resolve
from ..optimizer import AdamWGroup, MuonGroup, Optimizer

HERE = Path(__file__).relative_to(ROOT)  # where a cost that is not known is to be added


@dataclass(frozen=True)
class Op:
    """An op of the model at its sizes, `count` times in a micro-step, or in a step where it belongs to the update."""

    name: str  # of the public function, and what tells it from others of that name
    count: int
    module: str  # of kernels/; its `cost` takes the sizes and flags
    sizes: tuple
    flags: tuple[tuple[str, bool], ...] = ()
    shape: tuple[int, ...] = ()  # of Muon's matrices, of which `cost` wants the number of elements alone

    def cost(self, backward: bool = False, itemsize: int = 2) -> tuple[float, float]:
        """Bytes and FLOPs; `itemsize` is that of the activations, in bytes. Where they are fp32 the forward reads the
        masters, and an update writes no copy. An update has no backward, and Polar Express its own dtype."""
        more = {
            "polar_express": {},
            "adamw": {"copy_itemsize": itemsize % 4},
            "muon": {"copy_itemsize": itemsize % 4},
        }.get(self.module, {"itemsize": itemsize, "backward": backward})
        # Not by attribute: the door of `kernels` has the op under the module's name.
        return import_module(f"kernels.{self.module}").cost(*self.sizes, **dict(self.flags), **more)


def _rows(x: Tensor) -> int:
    return x.numel() // x.shape[-1]


def _rms_norm(x, x0=None, lambda_r=None, lambda_0=None, y_only=False):
    flags = (("has_x0", True),) * (x0 is not None) + (("has_s", False),) * y_only
    yield Op(f"rms_norm{', mix' * (x0 is not None)}", 1, "rms_norm", (_rows(x), x.shape[-1]), flags)


def _norm_factors(x, x0=None, lambda_r=None, lambda_0=None, y_only=False):
    if x0 is not None:  # else there is nothing to do
        yield Op("norm_factors", 1, "rms_norm", (_rows(x), x.shape[-1]), (("has_x0", True), ("has_y", False)))


def _linear(x, weight, residual=None, overwrite=False):
    flags = (("residual", True),) * (residual is not None)
    yield Op("linear", 1, "linear", (_rows(x), *reversed(weight.shape)), flags)


def _qkv_projection(x, weight, gate_weight=None):
    normed = isinstance(x, kernels.Factors)
    gate = () if gate_weight is None else tuple(gate_weight.shape)
    name = f"qkv_projection{', norm' * normed}{', value gate' * bool(gate)}"
    sizes = (_rows(x.stream if normed else x), *reversed(weight.shape), *gate)
    yield Op(name, 1, "qkv_projection", sizes, (("norm", True),) * normed)


def _rotary_attention(qkv, cos, sin, num_heads, window, ve=None, gate=None, overwrite=False, key_offset=False):
    batch, seq_len, width = (qkv.tensor if isinstance(qkv, kernels.GradScaled) else qkv).shape
    head_dim = 2 * cos.shape[-1]
    sizes = (batch, seq_len, num_heads, (width // head_dim - num_heads) // 2, head_dim, window)
    name = f"rotary_attention, window {window}{', value embedding' * (ve is not None)}{', key offset' * key_offset}"
    flags = (("has_ve", ve is not None), *((("key_offset", True),) * key_offset))
    yield Op(name, 1, "rotary_attention", sizes, flags)


def _relu2_mlp(x, w_fc, w_proj, residual, recompute=False, overwrite=False):
    if isinstance(x, kernels.Factors):
        yield from _norm_relu2_mlp(residual, w_fc, w_proj, recompute)
    else:
        yield from _block("relu2_mlp", x, w_fc, recompute)


def _norm_relu2_mlp(x, w_fc, w_proj, recompute=False):
    yield from _block("norm_relu2_mlp", x, w_fc, recompute, (("norm", True),))


def _block(name, x, w_fc, recompute, flags=()):
    sizes = _rows(x), x.shape[-1], w_fc.shape[0]
    yield Op(name, 1, "mlp", sizes, flags)
    if recompute:
        yield _Again(Op(f"{name}, post-activation", 1, "linear", sizes))


def _linear_cross_entropy(x, weight, targets, softcap=None, reduction="mean"):
    yield Op("linear_cross_entropy", 1, "linear_cross_entropy", (_rows(x), x.shape[-1], weight.shape[0]))


def _embedding(tokens, tables):
    sizes = tokens.numel(), tables[0].shape[0], tuple(table.shape[1] for table in tables)
    yield Op("embedding", 1, "embedding", sizes)


@dataclass(frozen=True)
class _Again:
    """What an op's own backward does a second time."""

    op: Op


# What a call of each op is to its `cost`; the arguments are the op's own.
CALLS: dict[str, Callable[..., Iterator[Op | _Again]]] = {
    "rms_norm": _rms_norm,
    "norm_factors": _norm_factors,
    "linear": _linear,
    "qkv_projection": _qkv_projection,
    "rotary_attention": _rotary_attention,
    "relu2_mlp": _relu2_mlp,
    "norm_relu2_mlp": _norm_relu2_mlp,
    "linear_cross_entropy": _linear_cross_entropy,
    "embedding": _embedding,
}


def _described(name: str, args: tuple, kwargs: dict) -> list[Op | _Again]:
    if name not in CALLS:
        raise InputError(f"the cost of kernels.{name}, which the model calls, is not known: add it to CALLS in {HERE}")
    try:
        return list(CALLS[name](*args, **kwargs))
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"the model calls kernels.{name} as CALLS in {HERE} does not know it: {error}") from None


class _Watch:
    """The calls of a forward, each with how often."""

    def __init__(self):
        self.forward: Counter[Op] = Counter()
        self.again: Counter[Op] = Counter()  # what the backward does a second time
        self.products: Counter = Counter()  # FLOPs inside the ops
        self.counter = FlopCounterMode(display=False)
        self.found = self.forward

    def flops(self) -> Counter:
        return Counter(self.counter.get_flop_counts().get("Global", {}))

    def call(self, name: str, op: Callable, args: tuple, kwargs: dict):
        for part in _described(name, args, kwargs):
            if isinstance(part, _Again):
                self.again[part.op] += 1
            else:
                self.found[part] += 1
        before = self.flops()
        result = op(*args, **kwargs)
        self.products += self.flops() - before
        return result

    @contextmanager
    def recomputed(self, tensor, again: Callable) -> Iterator[None]:
        self.found = self.again
        again()
        self.found = self.forward
        yield

    def outside(self) -> list[str]:
        """The products that no op made."""
        return sorted(str(product) for product in self.flops() - self.products)


def _watched(config: TrainConfig, model: GPTConfig) -> _Watch:
    """One forward as training does it, on references: at the door all ops are the same. Raises InputError."""
    watch, recomputed = _Watch(), kernels.recomputed
    tokens = torch.empty(config.device_batch_size, model.seq_len, dtype=torch.int32, device="meta")
    gpt = GPT(model, device="meta", **config.model_options)
    kernels.recomputed = watch.recomputed
    try:
        with (
            kernels.ops_in_force("reference", config.device), kernels.watched(watch.call), torch.no_grad(),
            watch.counter,
        ):  # fmt: skip
            gpt(tokens, tokens)
    finally:
        kernels.recomputed = recomputed
    if outside := watch.outside():
        raise InputError(f"the model makes products outside the ops of kernels ({', '.join(outside)}): their cost is"
                         " not known, so make them with kernels.linear or an op of your own")  # fmt: skip
    return watch


def _counted(found: Counter[Op]) -> list[Op]:
    return [replace(op, count=count) for op, count in found.items()]


def micro_step_ops(config: TrainConfig, model: GPTConfig) -> list[Op]:
    """Every op of a forward and backward, in the order of the forward. Raises InputError for what has no known cost."""
    return _counted(_watched(config, model).forward)


def recomputed_ops(config: TrainConfig, model: GPTConfig) -> list[Op]:
    """What the backward of a micro-step does a second time, forward alone. Raises InputError as `micro_step_ops`."""
    return _counted(_watched(config, model).again)


def update_ops(model: GPTConfig) -> list[Op]:
    """Every op of the optimizer, once a step, in the order of the parameters. Raises InputError for another group."""
    ops, order = [], list(parameter_shapes(model))
    for group in Optimizer(GPT(model, device="meta"), resolve(TrainConfig(), "cuda"), torch.bfloat16).groups:
        if isinstance(group, AdamWGroup):
            tables = zip(group.names, group.masters, strict=True)
            ops += [(name, Op(f"adamw_update {name}", 1, "adamw", (table.numel(),))) for name, table in tables]
        elif isinstance(group, MuonGroup):
            shape = tuple(group.master.shape)
            ops.append((group.name, Op(f"polar_express {group.name}", 1, "polar_express", shape)))
            ops.append((group.name, Op(f"muon_update {group.name}", 1, "muon", (math.prod(shape),), shape=shape)))
        else:
            raise InputError(f"the cost of a {type(group).__name__} is not known: add it to update_ops in {HERE}")
    return [op for name, op in sorted(ops, key=lambda pair: order.index(pair[0])) if op.sizes[0]]
