"""An op with inputs of its sizes: what every provider is given, what it is checked against, and how it is called.

Inputs are random. Weights carry `main_grad` as in training: whatever a provider makes of a weight's gradient ends up
added to an fp32 buffer, in the op itself or after it. Directions of an op of the model: "forward", without gradients,
as evaluation runs it; "both", forward and backward, as training does. Where a forward also takes the gradients (the
loss does) the backward alone would be no measure, so it is never timed alone. An op of the optimizer has "update".

The ops of `train --fused-norms` are the kernels' alone: to every other provider a norm is an op of its own. Where two
of them share a norm, each is given the gradients that the other gives it, multiplied by rstd.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

import kernels
from kernels import EPS, rotary_tables

from ..config import cpu_has_bf16
from ..optimizer import iterate_dtype
from .ops import Op

# Of ‖truth‖: bf16 operands err by 1e-3 to 1e-2, fp32 by far less; Polar Express iterates in bf16 on any GPU.
TOLERANCES = {torch.bfloat16: 2e-2, torch.float32: 1e-4}
BF16_ITERATES = {"polar_express": 5e-2, "muon": 5e-2}
TOKENS_TO_CHECK = 2048
ADAMW_BETAS, ADAMW_EPS = (0.8, 0.95), 1e-10
MODEL_DIRECTIONS, UPDATE_DIRECTIONS = ("forward", "both"), ("update",)

Function = Callable[..., Tensor | list[Tensor] | tuple[Tensor, ...]]


def is_update(op: Op) -> bool:
    return op.module in ("polar_express", "muon", "adamw")


def kind(op: Op) -> str:
    """Its name in `OPS` or `FUSED`: the public function's, but for a `qkv_projection` of factors."""
    flags = dict(op.flags)
    if op.module == "rms_norm" and not flags.get("has_y", True):
        return "norm_factors"
    public = {"mlp": "relu2_mlp", "muon": "muon_update", "adamw": "adamw_update"}.get(op.module, op.module)
    return f"norm_{public}" if flags.get("norm") else public


def directions(op: Op) -> tuple[str, ...]:
    return UPDATE_DIRECTIONS if is_update(op) else MODEL_DIRECTIONS


def tokens_of(op: Op) -> int:
    """Positions it works on; for an update, the elements."""
    if is_update(op):
        return torch.Size(op.shape or op.sizes).numel()
    return op.sizes[0] * op.sizes[1] if op.module == "rotary_attention" else op.sizes[0]


def with_tokens(op: Op, tokens: int) -> Op:
    """The same op of the model on at most so many positions: whole rows of them where it attends."""
    per_row = op.sizes[1] if op.module == "rotary_attention" else 1
    rows = max(1, min(op.sizes[0], tokens // per_row))
    return replace(op, sizes=(rows, *op.sizes[1:]))


def cost(op: Op, direction: str, itemsize: int = 2) -> tuple[float, float]:
    """Bytes and FLOPs, from the op's own `cost`: the same for every provider."""
    parts = [op.cost(itemsize=itemsize)]
    if direction == "both":
        parts.append(op.cost(backward=True, itemsize=itemsize))
    if op.module == "muon":
        parts.append(replace(op, module="polar_express", sizes=op.shape).cost())
    return sum(num_bytes for num_bytes, _ in parts), sum(flops for _, flops in parts)


def shape_label(op: Op) -> str:
    """Its sizes for people, without a blank."""
    if op.module == "rotary_attention":
        batch, seq_len, heads, kv_heads, head_dim, window = op.sizes
        grouped = f"/{kv_heads}" if kv_heads != heads else ""
        flags = dict(op.flags)
        more = "-ve" * flags.get("has_ve", False) + "-offset" * flags.get("key_offset", False)
        return f"{batch}x{seq_len}-h{heads}{grouped}x{head_dim}-w{window}{more}"
    if op.module == "embedding":
        tokens, vocab_size, widths = op.sizes
        return f"{tokens}-v{vocab_size}x{sum(widths)}"
    flags = "".join(f"-{'' if on else 'no-'}{name.removeprefix('has_')}" for name, on in op.flags)
    return "x".join(str(size) for size in (op.shape or op.sizes)) + flags


@dataclass
class Problem:
    """Arguments of one call: `function(*inputs, **constants)`."""

    op: Op
    inputs: list[Tensor]
    constants: dict = field(default_factory=dict)
    weights: frozenset[int] = frozenset()  # which inputs are parameters


def build(op: Op, device: str, dtype: torch.dtype, seed: int = 0) -> Problem:
    """Random inputs for an op at its sizes."""
    # Tensors without memory stand for a GPU's, and take no generator.
    generator = None if device == "meta" else torch.Generator(device).manual_seed(seed)
    arithmetic = "cuda" if device == "meta" else device

    def randn(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)

    def uneven(rows: int, width: int) -> Tensor:
        """Rows of half to twice the usual size: a norm that is left out, or another row's, is then far off."""
        sizes = torch.rand(rows, 1, generator=generator, device=device) * 2 - 1
        return randn(rows, width) * (math.log(2) * sizes).exp().to(dtype)

    def integers(high: int, count: int) -> Tensor:
        return torch.randint(high, (count,), generator=generator, device=device)

    flags = dict(op.flags)
    if op.module == "rms_norm":
        inputs = [uneven(*op.sizes)]
        if not flags.get("has_x0"):
            return Problem(op, inputs)
        # Scalars are fp32 everywhere but in the truth.
        lambdas = [torch.tensor(value, device=device) for value in (0.9, 0.2)]
        return Problem(op, [*inputs, randn(*op.sizes), *lambdas], weights=frozenset((2, 3)))
    if op.module == "linear":
        rows, width, out = op.sizes
        inputs = [randn(rows, width), randn(out, width, scale=width**-0.5)]
        return Problem(op, inputs + ([randn(rows, out)] if flags.get("residual") else []), weights=frozenset((1,)))
    if op.module == "qkv_projection":
        rows, width, out, *gate = op.sizes
        weights = [randn(*shape, scale=shape[1] ** -0.5) for shape in [(out, width), *([gate] if gate else [])]]
        problem = Problem(op, [uneven(rows, width), *weights], weights=frozenset(range(1, 1 + len(weights))))
        if flags.get("norm"):
            problem.constants["rstd"] = torch.rsqrt(problem.inputs[0].float().square().mean(-1) + EPS)
        return problem
    if op.module == "rotary_attention":
        batch, seq_len, heads, kv_heads, head_dim, window = op.sizes
        cos, sin = rotary_tables(seq_len, head_dim, device=device)
        inputs = [randn(batch, seq_len, (heads + 2 * kv_heads) * head_dim)]
        if flags.get("has_ve"):
            inputs += [randn(batch, seq_len, kv_heads * head_dim), randn(batch, seq_len, kv_heads)]
        problem = Problem(op, inputs, {"cos": cos, "sin": sin, "num_heads": heads, "window": window})
        if flags.get("key_offset"):
            problem.constants["key_offset"] = True
        return problem
    if op.module == "mlp":
        rows, width, hidden = op.sizes
        weights = [randn(hidden, width, scale=width**-0.5), randn(width, hidden, scale=hidden**-0.5)]
        residual = [] if flags.get("norm") else [randn(rows, width)]
        return Problem(op, [uneven(rows, width), *weights, *residual], weights=frozenset((1, 2)))
    if op.module == "linear_cross_entropy":
        rows, width, vocab_size = op.sizes
        # Logits of up to the softcap, so that it matters.
        inputs = [randn(rows, width), randn(vocab_size, width, scale=5 * width**-0.5)]
        return Problem(op, inputs, {"targets": integers(vocab_size, rows)}, frozenset((1,)))
    if op.module == "embedding":
        tokens, vocab_size, widths = op.sizes
        tables = [randn(vocab_size, width) for width in widths]
        return Problem(op, tables, {"tokens": integers(vocab_size, tokens)}, frozenset(range(len(tables))))
    if op.module == "polar_express":
        iterates = iterate_dtype(arithmetic, cpu_has_bf16())
        return Problem(op, [randn(*op.sizes, dtype=torch.float32)], {"dtype": iterates})
    return _update_problem(op, device, dtype, randn, iterate_dtype(arithmetic, cpu_has_bf16()))


def _update_problem(
    op: Op, device: str, dtype: torch.dtype, randn: Callable[..., Tensor], iterates: torch.dtype
) -> Problem:  # fmt: skip
    shape = op.shape or op.sizes
    state = [randn(*shape, scale=0.02, dtype=torch.float32) for _ in range(3)]  # master, gradient, first moment
    second = kernels.second_moment_shape(shape) if op.module == "muon" else shape
    state.append(randn(*second, scale=0.02, dtype=torch.float32).square())
    if dtype != torch.float32:
        state.append(state[0].to(dtype))  # the copy that the forward reads
    # Rates of the masters' own size, so that an error of the update shows in them: lr, μ, wd or lr, 1 − β₁ᵗ, 1 − β₂ᵗ,
    # wd; AdamW's decay takes a tenth of a weight.
    hyper = torch.tensor([0.5, 0.9, 0.1] if op.module == "muon" else [0.02, 0.9, 0.4, 5.0], device=device)
    constants = {"hyper": hyper, "apply": torch.ones((), dtype=torch.bool, device=device)}
    if op.module == "muon":
        constants["iterate_dtype"] = iterates
    return Problem(op, state, constants)


def qkv_projection(x, weight, gate_weight=None):
    return [out for out in kernels.qkv_projection(x, weight, gate_weight) if out is not None]


def rotary_attention(qkv, ve=None, gate=None, *, cos, sin, num_heads, window, key_offset=False):
    return kernels.rotary_attention(qkv, cos, sin, num_heads, window, ve, gate, key_offset=key_offset)


def embedding(*tables, tokens):
    return kernels.embedding(tokens, tables)


def muon_update(master, grad, momentum, second_moment, copy=None, *, hyper, apply, iterate_dtype):
    kernels.muon_update(master, grad, momentum, second_moment, copy, hyper, apply, iterate_dtype)
    return [master, momentum, second_moment, *([] if copy is None else [copy])]


def adamw_update(master, grad, exp_avg, exp_avg_sq, copy=None, *, hyper, apply):
    lists = [master], [grad], [exp_avg], [exp_avg_sq], [copy]
    kernels.adamw_update(*lists, hyper, apply, ADAMW_BETAS, ADAMW_EPS)
    return [master, exp_avg, exp_avg_sq, *([] if copy is None else [copy])]


# By the public function. With `kernels.set_ops` these are the kernels, the references, or the references compiled.
OPS: dict[str, Function] = {
    "rms_norm": kernels.rms_norm,
    "linear": kernels.linear,
    "qkv_projection": qkv_projection,
    "rotary_attention": rotary_attention,
    "relu2_mlp": kernels.relu2_mlp,
    "linear_cross_entropy": kernels.linear_cross_entropy,
    "embedding": embedding,
    "polar_express": kernels.polar_express,
    "muon_update": muon_update,
    "adamw_update": adamw_update,
}


def norm_factors(*inputs):
    s, y, x0 = kernels.norm_factors(*inputs)
    return s, *y, x0


def norm_qkv_projection(x, weight, gate_weight=None, *, rstd):
    """Gradients come multiplied by rstd, from attention."""
    outs = kernels.qkv_projection(kernels.Factors(x, rstd), weight, gate_weight)
    return [out.tensor for out in outs if out is not None]


def linear_over_its_residual(x, weight, residual=None):
    """As the model calls it. The copy is made here, and by nobody else: the vendor's product would make one where ours
    makes none, and it is no part of a step."""
    return kernels.linear(x, weight, None if residual is None else residual.clone(), overwrite=residual is not None)


# By the kernels alone: the ops of `--fused-norms`, and what the model calls otherwise than anybody else could.
FUSED: dict[str, Function] = {
    "linear": linear_over_its_residual,
    "norm_factors": norm_factors,
    "norm_qkv_projection": norm_qkv_projection,
    "norm_relu2_mlp": kernels.norm_relu2_mlp,
}


def _scaled(value: Tensor, through: Tensor, rstd: Tensor) -> Tensor:
    """`value`, whose gradient is rstd times that of `through`."""
    return value.detach() + (through - through.detach()) / rstd.detach()[..., None]


def _norm_factors_truth(x, x0, lambda_r, lambda_0):
    """From the norm that is written."""
    s, y, x0 = kernels.rms_norm(x, x0, lambda_r, lambda_0)
    rstd = torch.rsqrt(s.detach().square().mean(-1) + EPS)
    return [s, _scaled(s, y, rstd), rstd, x0]


def _norm_qkv_projection_truth(x, weight, gate_weight=None, *, rstd):
    return [_scaled(out, out, rstd) for out in norm_qkv_projection(x, weight, gate_weight, rstd=rstd)]


# What is right, with `kernels.set_ops("reference")`.
TRUTHS = OPS | FUSED | {"norm_factors": _norm_factors_truth, "norm_qkv_projection": _norm_qkv_projection_truth}


def _as_list(out) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else list(out)


def forward(function: Function, problem: Problem) -> list[Tensor]:
    with torch.no_grad():
        return _as_list(function(*problem.inputs, **problem.constants))


def forward_backward(function: Function, problem: Problem, cotangents: list[Tensor] | None = None) -> list[Tensor]:
    """Outputs, then the gradient of every input; a weight's is in its `main_grad` where it has one.

    The cotangents default to ones for a loss and random numbers elsewhere.
    """
    for i, x in enumerate(problem.inputs):
        x.requires_grad_()
        if i in problem.weights and not hasattr(x, "main_grad"):
            x.main_grad = torch.zeros(x.shape, device=x.device)
    arguments = [kernels.layer_weight(x) if i in problem.weights else x for i, x in enumerate(problem.inputs)]
    outs = _as_list(function(*arguments, **problem.constants))
    cotangents = random_cotangents(outs) if cotangents is None else cotangents
    wanted = [(out, cotangent) for out, cotangent in zip(outs, cotangents, strict=True) if out.requires_grad]
    outputs, given = zip(*wanted, strict=True)
    gradients = torch.autograd.grad(outputs, problem.inputs, given, allow_unused=True)
    pairs = zip(gradients, problem.inputs, strict=True)
    return [*(out.detach() for out in outs), *(x.main_grad if g is None else g for g, x in pairs)]


def random_cotangents(outs: list[Tensor]) -> list[Tensor]:
    """Of a loss it is 1: some implementations scale in place what they saved, by anything else. The rest are what every
    dtype holds: rounded for one side alone, they move a sum that nearly cancels, a gradient of λ, out of bounds."""
    generator = None if outs[0].is_meta else torch.Generator(outs[0].device).manual_seed(1)
    return [
        torch.ones_like(out) if out.dim() == 0
        else torch.randn(out.shape, generator=generator, device=out.device).bfloat16().to(out.dtype)
        for out in outs
    ]  # fmt: skip


def runner(function: Function, problem: Problem, direction: str) -> Callable[[], object]:
    """The call to time."""
    if direction != "both":
        return lambda: forward(function, problem)
    # Made once: making them is no part of the op. Some implementations write over a cotangent; it stays of its size.
    cotangents = random_cotangents(forward(function, problem))
    return lambda: forward_backward(function, problem, cotangents)


def truth_of(op: Op, device: str, dtype: torch.dtype) -> tuple[Problem, Problem]:
    """A fresh problem of `op`, small enough for fp64, and the same in fp64, without buffers for gradients."""
    problem = build(op if is_update(op) else with_tokens(op, TOKENS_TO_CHECK), device, dtype, seed=1)
    inputs = problem.inputs[:4] if op.module in ("muon", "adamw") else problem.inputs  # a copy is the master, rounded
    return problem, Problem(problem.op, [x.to(torch.float64, copy=True) for x in inputs], problem.constants)


def assert_close(op: Op, got: list[Tensor], truth: list[Tensor], dtype: torch.dtype) -> None:
    """Every result against the truth's, by ‖difference‖ / ‖truth‖; NaN never passes. Raises AssertionError."""
    if is_update(op) and len(got) > len(truth):
        truth = [*truth, truth[0]]
    assert len(got) == len(truth), f"{op.name}: {len(got)} results, {len(truth)} expected"
    tolerance = BF16_ITERATES.get(op.module, TOLERANCES[dtype])
    for i, (value, expected) in enumerate(zip(got, truth, strict=True)):
        error = ((value.double() - expected).norm() / expected.norm()).item()
        assert error < tolerance, f"{op.name}: result {i} errs by {error:.1e} of its norm: no time for a wrong result"
