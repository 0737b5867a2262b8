"""How fast a step could be: each op's bytes and FLOPs, from its own `cost`, over the ceilings of a GPU.

`python -m bench.roofline [--gpu h100|h200] [--depth N] [--vocab-size V] [--config RUN/config.json]` prints a line for
an op and direction: what binds it, its share, and the MFU that the sum would give. An op takes the longer of its two
times, as if bytes and FLOPs overlapped wholly: no launch gaps, no tails, every fusion that `cost` counts on. It is a
bound to measure against, not a prediction.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from model import GPTConfig, flops_per_token
from model.config import GATE_CHANNELS
from model.flops import H100_PEAK
from model.gpt import BLOCK_WEIGHTS, parameter_shapes
from prepare import InputError
from prepare.arguments import Parser
from train.config import TrainConfig, resolve


@dataclass(frozen=True)
class Gpu:
    """Ceilings: FLOP/s of a large bf16 product of random data, bytes/s of a device-to-device copy."""

    flops: float
    bandwidth: float


# H200: 790 TFLOP/s and 4.3 TB/s (of 4.8) have been measured by others on one. H100: the same rate, and the same nine
# tenths of its datasheet's 3.35 TB/s: not measured.
GPUS = {"h200": Gpu(790e12, 4.3e12), "h100": Gpu(790e12, 3.0e12)}


@dataclass(frozen=True)
class Line:
    """An op in one direction, `count` times in a micro-step."""

    name: str
    count: int
    bytes: float
    flops: float

    def milliseconds(self, gpu: Gpu) -> float:
        return 1e3 * self.count * max(self.bytes / gpu.bandwidth, self.flops / gpu.flops)

    def bound(self, gpu: Gpu) -> str:
        return "bytes" if self.bytes / gpu.bandwidth > self.flops / gpu.flops else "FLOPs"


def op_cost(op: str):
    # The door of `kernels` has the op under the module's name.
    return import_module(f"kernels.{op}").cost


def micro_step(config: TrainConfig, model: GPTConfig) -> Iterator[Line]:
    """Every op of one forward and backward."""
    rows, D = config.micro_batch_tokens, model.d_model
    ve = len(model.ve_layers)
    widths = [D, *[model.kv_width] * ve]
    for backward in (False, True):
        direction = "backward" if backward else "forward"

        def line(name, count, op, *sizes, _backward=backward, _direction=direction, **flags):
            return Line(f"{name} {_direction}", count, *op_cost(op)(*sizes, **flags, backward=_backward))

        yield line("embedding", 1, "embedding", rows, model.vocab_size, widths)
        fused = config.fused_norms
        yield line("norm", 2 + model.depth * (not fused), "rms_norm", rows, D)
        yield line("λ-mix and norm", model.depth, "rms_norm", rows, D, has_x0=True, has_y=not fused)
        yield line("qkv", model.depth, "norm_linear" if fused else "linear", rows, D, D + 2 * model.kv_width)
        yield line("value gate", ve, "linear", rows, GATE_CHANNELS, model.kv_heads)
        heads = (config.device_batch_size, model.seq_len, model.num_heads, model.kv_heads, model.head_dim)
        for window in sorted(set(model.windows)):
            layers = [i for i, w in enumerate(model.windows) if w == window]
            for has_ve in (False, True):
                count = sum((i in model.ve_layers) == has_ve for i in layers)
                name = f"attention, window {window}{', value embedding' if has_ve else ''}"
                yield line(name, count, "rotary_attention", *heads, window, has_ve)
        yield line("attention output", model.depth, "linear", rows, D, D, residual=True)
        yield line("relu² MLP", model.depth, "mlp", rows, D, 4 * D, norm=fused)
        yield line("head and loss", 1, "linear_cross_entropy", rows, D, model.vocab_size)
    if config.recompute:  # every layer but the last
        yield Line("post-activation again", model.depth - 1, *op_cost("linear")(rows, D, 4 * D))
        norm_bytes, norm_flops = op_cost("rms_norm")(rows, D, has_x0=True)
        yield Line("λ-mix and norm again", model.depth - 1, norm_bytes - rows * D * 2, norm_flops)  # s is not written
        yield Line("value embedding again", ve - 1, *op_cost("embedding")(rows, model.vocab_size, [model.kv_width]))


def update(model: GPTConfig) -> Iterator[Line]:
    """Every op of the optimizer, once a step."""
    for name, shape in parameter_shapes(model).items():
        elements = 1
        for size in shape:
            elements *= size
        if name not in BLOCK_WEIGHTS:
            yield Line(f"AdamW {name}", 1, *op_cost("adamw")(elements))
            continue
        L, rows, cols = shape
        sizes = [model.d_model, model.kv_width, model.kv_width] if name == "w_qkv" else [rows]
        for size in sizes:
            yield Line(f"Polar Express {name}", 1, *op_cost("polar_express")(L, size, cols))
        yield Line(f"Muon {name}", 1, *op_cost("muon")(elements))


def report(config: TrainConfig, model: GPTConfig, gpu: Gpu) -> tuple[float, float]:
    """Prints the table. Returns the milliseconds of a micro-step, its share of the update included, and the MFU."""
    accumulated = config.grad_accum_steps
    parts = [(line, 1.0) for line in micro_step(config, model)] + [(line, 1 / accumulated) for line in update(model)]
    parts = [(line, share) for line, share in parts if line.count]
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
