"""How fast a step could be: each op's bytes and FLOPs, from its own `cost`, over the ceilings of a GPU.

`python -m bench.roofline [--gpu h100|h200] [--depth N] [--vocab-size V] [--config RUN/config.json]` prints a line for
an op and direction: what binds it, its share, and the MFU that the sum would give. An op takes the longer of its two
times, as if bytes and FLOPs overlapped wholly: no launch gaps, no tails, every fusion that `cost` counts on. It is a
bound to measure against, not a prediction.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from bench.ceilings import Ceilings
from model import GPTConfig, flops_per_token
from model.config import GATE_CHANNELS
from model.flops import H100_PEAK
from model.gpt import BLOCK_WEIGHTS, parameter_shapes
from prepare import InputError
from prepare.arguments import Parser
from train.config import TrainConfig, resolve

# H200: 790 TFLOP/s and 4.3 TB/s (of 4.8) have been measured by others on one. H100: the same rate, and the same nine
# tenths of its datasheet's 3.35 TB/s: not measured.
GPUS = {"h200": Ceilings(790e12, 4.3e12), "h100": Ceilings(790e12, 3.0e12)}


@dataclass(frozen=True)
class Line:
    """An op in one direction, `count` times in a micro-step."""

    name: str
    count: int
    bytes: float
    flops: float

    def milliseconds(self, gpu: Ceilings) -> float:
        return 1e3 * self.count * gpu.seconds(self.bytes, self.flops)

    def bound(self, gpu: Ceilings) -> str:
        return "bytes" if self.bytes / gpu.bandwidth > self.flops / gpu.flops else "FLOPs"


@dataclass(frozen=True)
class Op:
    """An op of the model at its sizes, `count` times in a micro-step, or in a step where it belongs to the update."""

    name: str
    count: int
    module: str  # of kernels/; its `cost` takes the sizes and flags
    sizes: tuple
    flags: tuple[tuple[str, bool], ...] = ()
    shape: tuple[int, ...] = ()  # of Muon's matrices, of which `cost` wants the number of elements alone

    def cost(self, **more) -> tuple[float, float]:
        """Bytes and FLOPs, of the forward unless `backward=True`. `more` is what its `cost` takes besides the sizes."""
        # Not by attribute: the door of `kernels` has the op under the module's name.
        return import_module(f"kernels.{self.module}").cost(*self.sizes, **dict(self.flags), **more)


def micro_step_ops(config: TrainConfig, model: GPTConfig) -> list[Op]:
    """Every op of a forward and backward, in the order of the forward."""
    rows, D = config.micro_batch_tokens, model.d_model
    ve = len(model.ve_layers)
    heads = (config.device_batch_size, model.seq_len, model.num_heads, model.kv_heads, model.head_dim)
    attention = []
    for window in sorted(set(model.windows)):
        layers = [i for i, w in enumerate(model.windows) if w == window]
        for has_ve in (False, True):
            count = sum((i in model.ve_layers) == has_ve for i in layers)
            name = f"attention, window {window}{', value embedding' if has_ve else ''}"
            attention.append(Op(name, count, "rotary_attention", (*heads, window), (("has_ve", has_ve),)))
    ops = [
        Op("embedding", 1, "embedding", (rows, model.vocab_size, (D, *[model.kv_width] * ve))),
        Op("norm", model.depth + 2, "rms_norm", (rows, D)),
        Op("λ-mix and norm", model.depth, "rms_norm", (rows, D), (("has_x0", True),)),
        Op("qkv", model.depth, "linear", (rows, D, D + 2 * model.kv_width)),
        Op("value gate", ve, "linear", (rows, GATE_CHANNELS, model.kv_heads)),
        *attention,
        Op("attention output", model.depth, "linear", (rows, D, D), (("residual", True),)),
        Op("relu² MLP", model.depth, "mlp", (rows, D, 4 * D)),
        Op("head and loss", 1, "linear_cross_entropy", (rows, D, model.vocab_size)),
    ]
    return [op for op in ops if op.count]


def micro_step(config: TrainConfig, model: GPTConfig) -> Iterator[Line]:
    """Every op in its forward, then every op in its backward."""
    for direction in ("forward", "backward"):
        for op in micro_step_ops(config, model):
            yield Line(f"{op.name} {direction}", op.count, *op.cost(backward=direction == "backward"))


def update_ops(model: GPTConfig) -> list[Op]:
    """Every op of the optimizer, once a step."""
    ops = []
    for name, shape in parameter_shapes(model).items():
        if name not in BLOCK_WEIGHTS:
            ops.append(Op(f"AdamW {name}", 1, "adamw", (math.prod(shape),)))
            continue
        L, rows, cols = shape
        # q, k and v are three matrices to Muon: one batch where they are alike.
        sizes = [model.d_model, model.kv_width, model.kv_width] if name == "w_qkv" else [rows]
        alike = len(set(sizes)) == 1
        for matrices in [(L * len(sizes), sizes[0], cols)] if alike else [(L, size, cols) for size in sizes]:
            ops.append(Op(f"Polar Express {name}", 1, "polar_express", matrices))
            ops.append(Op(f"Muon {name}", 1, "muon", (math.prod(matrices),), shape=matrices))
    return [op for op in ops if op.sizes[0]]


def update(model: GPTConfig) -> Iterator[Line]:
    for op in update_ops(model):
        yield Line(op.name, op.count, *op.cost())


def report(config: TrainConfig, model: GPTConfig, gpu: Ceilings) -> tuple[float, float]:
    """Prints the table. Returns the milliseconds of a micro-step, its share of the update included, and the MFU."""
    accumulated = config.grad_accum_steps
    parts = [(line, 1.0) for line in micro_step(config, model)] + [(line, 1 / accumulated) for line in update(model)]
    total = sum(line.milliseconds(gpu) * share for line, share in parts)
    width = max(len(line.name) for line, _ in parts)
    print(f"{'op':<{width}}  count  MB each  GFLOP each  bound  ms in all  share")
    for line, share in parts:
        ms = line.milliseconds(gpu) * share
        print(
            f"{line.name:<{width}}  {line.count:>5}  {line.bytes / 1e6:>7,.0f}  {line.flops / 1e9:>10,.0f}"
            f"  {line.bound(gpu)}  {ms:>9.3f}  {ms / total:>5.1%}"
        )
    mfu = 100 * flops_per_token(model) * config.micro_batch_tokens / (total / 1e3) / H100_PEAK
    print(f"a micro-step of {config.micro_batch_tokens:,} tokens: {total:.1f} ms, the update's share included")
    print(f"MFU {mfu:.1f} %, {config.micro_batch_tokens / total * 1e3:,.0f} tokens/s: a bound, not a measurement")
    return total, mfu


def main(args: list[str] | None = None) -> int:
    parser = Parser(prog="python -m bench.roofline", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--gpu", choices=GPUS, default="h200")
    parser.add_argument("--depth", type=int, help="layers (default: the default GPU configuration's)")
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--config", type=Path, help="config.json of a run, instead of --depth and --vocab-size")
    options = parser.parse_args(args)
    try:
        if options.config:
            saved = json.loads(options.config.read_text(encoding="utf-8"))
            config, model = TrainConfig(**saved["config"]), GPTConfig(**saved["model"])
        else:
            config = resolve(TrainConfig(depth=options.depth), "cuda")
            model = config.model_config(options.vocab_size)
    except (OSError, ValueError, KeyError, TypeError, InputError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    report(config, model, GPUS[options.gpu])
    return 0


if __name__ == "__main__":
    sys.exit(main())
