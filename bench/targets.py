"""What `bench.tune` tunes: each kernel of a training step, at the step's shapes, with its tiles of `bench.grids`.

A target's `prepare` makes random inputs and gives a call that launches the kernel as the step does: through the op's
launcher, or through autograd where the op has none of its own. What else such a call launches is not timed.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

import kernels
from bench.grids import (
    ADAMW,
    ATTENTION,
    ATTENTION_DKV,
    EMBEDDING,
    GEMM,
    LAST,
    MEANS,
    MUON,
    NORM,
    NORM_BACKWARD,
    NORM_GEMM,
    PROLOGUE,
    SYMMETRIC,
    Tile,
    elements,
    grid,
)
from bench.suite.ops import update_ops
from bench.suite.problems import ADAMW_BETAS, ADAMW_EPS, BF16_ITERATES
from kernels.common import triton
from kernels.rotary_attention import cost as attention_cost
from kernels.rotary_attention import rotary_tables, tiles
from kernels.rotary_attention.forward import attention_fwd
from kernels.rotary_attention.prologue import prologue_fwd_
from model import GPTConfig
from model.config import GATE_CHANNELS
from train.config import TrainConfig

# Not by attribute: the door of `kernels` has the op under the module's name.
adamw, embedding, head, mlp, muon, polar_express, qkv_projection, rms_norm = (
    import_module(f"kernels.{name}")
    for name in (
        "adamw", "embedding", "linear_cross_entropy", "mlp", "muon", "polar_express", "qkv_projection", "rms_norm",
    )
)  # fmt: skip
fp32 = torch.float32
# ‖difference‖ / ‖value‖ between two tiles: a sum in another order is now and then rounded to the neighbouring bf16, and
# five iterations in bf16 amplify that.
TOLERANCE, ITERATES_TOLERANCE = 2.0**-8, BF16_ITERATES["polar_express"]

Call = Callable[[], Iterable[Tensor]]


@dataclass(frozen=True)
class Random:
    """Random tensors of the step's device and dtype, the same in every process."""

    device: str
    dtype: torch.dtype

    def __call__(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=dtype or self.dtype).mul_(scale)


@dataclass(frozen=True)
class Target:
    """A kernel, or several that share a tile.

    Args:
        calls: of `prepare`'s call in a micro-step; an update counts by its share of one.
        kernels: whose launches in that call are timed.
        module, config, part: `module.config(...)` gives the tile, or has it as its `part` (an index or a field).
        constants: what of the tile is a constant of `module` instead.
        tiles: to try.
        prepare: from random tensors, a call that may be repeated. It gives what the kernel computed.
        flops, bytes: of a call; the rate that is printed is of FLOPs where there are any.
        tolerance: of ‖difference‖ / ‖value‖ between two tiles.
        fused_norms: launched with `train --fused-norms` alone.
    """

    name: str
    calls: float
    kernels: tuple[str, ...]
    module: ModuleType
    config: str | None
    tiles: list[Tile]
    prepare: Callable[[Random], Call]
    part: int | str | None = None
    constants: tuple[str, ...] = ()
    flops: float = 0.0
    bytes: float = 0.0
    tolerance: float = TOLERANCE
    fused_norms: bool = False


def targets(config: TrainConfig, model: GPTConfig) -> list[Target]:
    """Every kernel that a step of `config` launches more than once or twice, and those of `--fused-norms`."""
    return [
        *_attention_targets(config, model),
        *_mlp_targets(config, model),
        *_norm_targets(config, model),
        *_head_and_embedding_targets(config, model),
        *_update_targets(config, model),
    ]


def _attention_targets(config: TrainConfig, model: GPTConfig) -> list[Target]:
    B, T, H, KVH, head_dim = config.device_batch_size, model.seq_len, model.num_heads, model.kv_heads, model.head_dim
    widths = [H * head_dim, KVH * head_dim, KVH * head_dim]
    period = len(model.window_pattern)  # a call is the layers of one period, (window, has a value embedding) each
    layers = [(model.windows[i], i in model.ve_layers) for i in range(period)]
    calls = model.depth / period
    flops = sum(attention_cost(B, T, H, KVH, head_dim, window)[1] for window, _ in layers)

    def inputs(randn: Random) -> tuple[Tensor, ...]:
        tables = rotary_tables(T, head_dim, device=randn.device)
        return randn(B, T, sum(widths)), *tables, randn(B, T, KVH * head_dim), randn(B, T, KVH)

    def prologue(randn: Random) -> Call:
        qkv, cos, sin, ve, gate = inputs(randn)

        def call():
            for has_ve in (has_ve for _, has_ve in layers):
                out = qkv.clone()
                factors = prologue_fwd_(out, cos, sin, H, KVH, *((ve, gate) if has_ve else (None, None)))
                yield from (out, factors)

        return call

    def forward(randn: Random) -> Call:
        qkv, cos, sin, *_ = inputs(randn)
        prologue_fwd_(qkv, cos, sin, H, KVH, None, None)
        q, k, v = qkv.split(widths, dim=-1)
        return lambda: (out for window, _ in layers for out in attention_fwd(q, k, v, head_dim, window))

    def backward(randn: Random) -> Call:
        qkv, cos, sin, ve, gate = inputs(randn)
        dout, graphs = randn(B, T, H * head_dim), []
        for window, has_ve in layers:
            value = [ve, gate] if has_ve else []
            leaves = [x.requires_grad_() for x in (qkv, *value)]
            graphs.append((kernels.rotary_attention(qkv, cos, sin, H, window, *value), leaves))
        return lambda: (grad for out, of in graphs for grad in torch.autograd.grad(out, of, dout, retain_graph=True))

    attention = {"calls": calls, "module": tiles, "config": "config"}
    moved = B * T * 2 * sum(2 * (H + KVH) * head_dim + 3 * KVH * head_dim * has_ve for _, has_ve in layers)
    return [
        Target("attention-prologue", **attention, kernels=("_prologue_kernel",), part="prologue", tiles=PROLOGUE,
               prepare=prologue, bytes=moved),
        Target("attention-forward", **attention, kernels=("_attention_fwd_kernel",), part="forward", tiles=ATTENTION,
               prepare=forward, flops=flops),
        # Of the pairs' products 3 and 4, where the forward has 2.
        Target("attention-dq", **attention, kernels=("_attention_dq_kernel",), part="dq", tiles=ATTENTION,
               prepare=backward, flops=1.5 * flops),
        Target("attention-dkv", **attention, kernels=("_attention_dkv_kernel",), part="dkv", tiles=ATTENTION_DKV,
               prepare=backward, flops=2 * flops),
    ]  # fmt: skip


def _mlp_targets(config: TrainConfig, model: GPTConfig) -> list[Target]:
    M, D, F = config.micro_batch_tokens, model.d_model, 4 * model.d_model
    qkv_width = D + 2 * model.kv_width

    def fc_forward(randn: Random, normed: bool = False) -> Call:
        x, w_fc = randn(M, D), randn(F, D, scale=D**-0.5)
        rstd = randn(M, dtype=fp32).abs_() if normed else None
        return lambda: [mlp._fc_fwd(x, w_fc, rstd)]

    def proj_backward(randn: Random, normed: bool = False) -> Call:
        dout, w_proj, post = randn(M, D), randn(D, F, scale=F**-0.5), randn(M, F).relu_().square_()
        rstd = randn(M, dtype=fp32).abs_() if normed else None

        def call():
            dz, c = mlp._proj_bwd_(dout, w_proj, post.clone(), rstd)
            return [dz] if c is None else [dz, c.sum(0)]  # a row a tile: the number of rows is the tile's affair

        return call

    def fc_backward(randn: Random) -> Call:
        dz, w_fc, x, dout = randn(M, F), randn(F, D, scale=D**-0.5), randn(M, D), randn(M, D)
        rstd, c = randn(M, dtype=fp32).abs_(), randn(16, M, dtype=fp32)
        return lambda: [mlp._norm_fc_bwd(dz, w_fc, x, dout, rstd, c)]

    def qkv(randn: Random) -> Call:
        x, rstd, weight = randn(M, D), randn(M, dtype=fp32).abs_(), randn(qkv_width, D, scale=D**-0.5)
        return lambda: [qkv_projection._norm_qkv_fwd(x, rstd, weight)]

    product = {"calls": model.depth, "config": "gemm_config", "tiles": GEMM}
    block = {**product, "module": mlp, "flops": 2 * M * D * F}
    tight = {**block, "tiles": NORM_GEMM}  # their epilogues hold more than the sums
    return [
        Target("mlp-fc-forward", **block, kernels=("_fc_fwd_kernel",), prepare=fc_forward),
        Target("mlp-proj-backward", **block, kernels=("_proj_bwd_kernel",), prepare=proj_backward),
        Target("norm-mlp-fc-forward", **block, kernels=("_fc_fwd_kernel",), prepare=partial(fc_forward, normed=True),
               fused_norms=True),
        Target("norm-mlp-proj-backward", **tight, kernels=("_proj_bwd_kernel",),
               prepare=partial(proj_backward, normed=True), fused_norms=True),
        Target("norm-mlp-fc-backward", **tight, kernels=("_norm_fc_bwd_kernel",), prepare=fc_backward,
               fused_norms=True),
        Target("norm-qkv-forward", **product, module=qkv_projection, kernels=("_norm_qkv_fwd_kernel",), prepare=qkv,
               flops=2 * M * D * qkv_width, fused_norms=True),
    ]  # fmt: skip


def _norm_targets(config: TrainConfig, model: GPTConfig) -> list[Target]:
    M, D, L = config.micro_batch_tokens, model.d_model, model.depth

    def inputs(randn: Random, mixed: bool) -> list[Tensor]:
        lambdas = [torch.tensor(value, device=randn.device) for value in (0.9, 0.2)]
        return [randn(M, D), randn(M, D), *lambdas] if mixed else [randn(M, D)]

    def forward(randn: Random, mixed: bool) -> Call:
        given = inputs(randn, mixed)
        return lambda: kernels.rms_norm(*given)[:2]

    def backward(randn: Random, mixed: bool) -> Call:
        given = inputs(randn, mixed)
        leaves = [x.requires_grad_() for x in given]
        outs = kernels.rms_norm(*given)
        douts = [randn(M, D) for _ in outs]
        return lambda: torch.autograd.grad(outs, leaves, douts, retain_graph=True)

    found = []
    for mixed, name, calls in ((False, "norm", L + 2), (True, "mix-and-norm", L)):
        one = {"calls": calls, "module": rms_norm, "config": "_config"}
        moved = [rms_norm.cost(M, D, has_x0=mixed, backward=way)[0] for way in (False, True)]
        found += [
            Target(f"{name}-forward", **one, kernels=("_rms_norm_fwd_kernel",), tiles=NORM,
                   prepare=partial(forward, mixed=mixed), bytes=moved[0]),
            Target(f"{name}-backward", **one, kernels=("_rms_norm_bwd_kernel",), tiles=NORM_BACKWARD,
                   constants=("STEPS",), prepare=partial(backward, mixed=mixed), bytes=moved[1]),
        ]  # fmt: skip
    return found


def _head_and_embedding_targets(config: TrainConfig, model: GPTConfig) -> list[Target]:
    M, V, D = config.micro_batch_tokens, model.vocab_size, model.d_model
    rows = min(M, head._chunk_rows(V, torch.empty(0, device="meta")))  # stands for a tensor on a GPU
    tables = 1 + len(model.ve_layers)

    def softmax(randn: Random) -> Call:
        logits, targets = randn(rows, V), _tokens(rows, V, randn.device)

        def call():
            z, losses = logits.clone(), torch.empty(rows, dtype=fp32, device=randn.device)
            head._cross_entropy(z, targets, losses, head.SOFTCAP, True)
            return z, losses

        return call

    def look_up(randn: Random) -> Call:
        tokens, table = _tokens(M, V, randn.device), randn(V, D)
        return lambda: kernels.embedding(tokens, [table])

    def sum_up(randn: Random) -> Call:
        segments, dout = embedding._segments(_tokens(M, V, randn.device), V), randn(M, D)

        def call():
            dtable = torch.zeros(V, D, dtype=fp32, device=randn.device)
            embedding._add_segments(dout, dtable, segments)
            return [dtable]

        return call

    whole = triton.next_power_of_2(V)
    softmax_tiles = [
        *({"ONE_BLOCK": True, "BLOCK_V": whole, "num_warps": warps} for warps in (4, 8, 16, 32)),
        *grid(elements(lambda tile: tile["BLOCK_V"], 4, 32), ONE_BLOCK=(False,),
               BLOCK_V=[block for block in (1024, 2048, 4096, 8192) if block < whole], num_warps=(4, 8, 16)),
    ]  # fmt: skip
    look_ups = {"calls": tables, "module": embedding, "config": "_config", "tiles": EMBEDDING}
    moved = [embedding.cost(M, V, [D], backward=way)[0] for way in (False, True)]
    return [
        Target("softmax", M / rows, ("_cross_entropy_kernel",), head, "_config", softmax_tiles, softmax,
               bytes=2 * 2 * rows * V),
        Target("embedding-forward", **look_ups, kernels=("_embedding_fwd_kernel",), prepare=look_up, bytes=moved[0]),
        Target("embedding-backward", **look_ups, kernels=("_embedding_bwd_pieces_kernel", "_embedding_bwd_kernel"),
               prepare=sum_up, bytes=moved[1]),
    ]  # fmt: skip


def _tokens(count: int, vocab_size: int, device: str) -> Tensor:
    """As often as in a text: by Zipf's law, so that the most frequent are a good part of all."""
    return (vocab_size ** torch.rand(count, device=device)).to(torch.int32) - 1


def _update_targets(config: TrainConfig, model: GPTConfig) -> list[Target]:
    calls = 1 / config.grad_accum_steps
    # The gates' matrices are too small to matter, and have tiles of their own.
    matrices = [op.shape for op in update_ops(model) if op.module == "muon" and min(op.shape[1:]) > GATE_CHANNELS]
    tables = [op.sizes[0] for op in update_ops(model) if op.module == "adamw" and op.sizes[0] > model.depth]
    by_row = [shape for shape in matrices if shape[1] >= shape[2]]

    def orthogonalise(randn: Random) -> Call:
        gs = [randn(*shape, dtype=fp32) for shape in matrices]
        return lambda: [polar_express._launch(g, randn.dtype) for g in gs]

    def state(randn: Random, shape: tuple[int, ...], second: tuple[int, ...]) -> list[Tensor]:
        """Master, gradient, first and second moment, copy."""
        state = [randn(*shape, scale=0.02, dtype=fp32) for _ in range(3)]
        return [*state, randn(*second, scale=0.02, dtype=fp32).square_(), state[0].to(randn.dtype)]

    def constants(randn: Random, *hyper: float) -> tuple[Tensor, Tensor]:
        return torch.tensor(hyper, device=randn.device), torch.ones((), dtype=torch.bool, device=randn.device)

    def muon_groups(randn: Random, shapes: list[tuple[int, ...]]) -> Call:
        groups = [state(randn, shape, kernels.second_moment_shape(shape)) for shape in shapes]
        hyper, apply = constants(randn, 0.5, 0.9, 0.1)

        def call():
            for group in groups:
                new = [x.clone() for x in group]
                muon._launch(*new, hyper, apply, randn.dtype)
                yield from new

        return call

    def adamw_groups(randn: Random) -> Call:
        states = [state(randn, (size,), (size,)) for size in tables]
        hyper, apply = constants(randn, 0.02, 0.9, 0.4)

        def call():
            new = [[x.clone() for x in one] for one in states]
            adamw._launch(*map(list, zip(*new, strict=True)), hyper, apply, ADAMW_BETAS, ADAMW_EPS)
            return (x for one in new for x in one)

        return call

    polar = {"calls": calls, "module": polar_express, "config": "_config", "prepare": orthogonalise,
             "tolerance": ITERATES_TOLERANCE}  # fmt: skip
    muons = {"calls": calls, "module": muon, "config": "_config", "tolerance": ITERATES_TOLERANCE}
    sides = [(batch, min(sides), max(sides)) for batch, *sides in matrices]
    steps = len(polar_express.COEFFICIENTS)
    return [
        Target("polar-symmetric", **polar, kernels=("_symmetric_kernel",), part=0, tiles=SYMMETRIC,
               flops=steps * sum(batch * m * m * (n + m) for batch, m, n in sides)),
        Target("polar-last", **polar, kernels=("_apply_kernel",), part=1, tiles=LAST,
               flops=steps * sum(2 * batch * m * m * n for batch, m, n in sides)),
        # As in the module's docstring: 14 + 14 bytes an element around the polar factor, and 2 for its means.
        Target("muon", **muons, kernels=("_momentum_kernel", "_muon_kernel"), part=0, tiles=MUON,
               prepare=partial(muon_groups, shapes=matrices), bytes=28 * sum(math.prod(shape) for shape in matrices)),
        Target("muon-means", **muons, kernels=("_variance_kernel",), part=1, tiles=MEANS,
               prepare=partial(muon_groups, shapes=by_row), bytes=2 * sum(math.prod(shape) for shape in by_row)),
        Target("adamw", calls, ("_adamw_kernel",), adamw, None, ADAMW, adamw_groups, constants=("BLOCK", "NUM_WARPS"),
               bytes=adamw.cost(sum(tables))[0]),
    ]  # fmt: skip
