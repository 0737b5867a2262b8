"""How fast a step could be: each op's bytes and FLOPs, from its own `cost`, over the ceilings of a GPU.

`python -m bench.roofline [--gpu h100|h200] [--vocab-size V] [--config RUN/config.json]` prints a line for an op and
direction: what binds it, its share, and the MFU that the sum would give. Options of `train`, such as --recipe
tuned, make it another step. An op takes the longer of its two times, as if bytes and FLOPs overlapped wholly:
no launch gaps, no tails, every fusion that `cost` counts on. It is a bound to measure against, not a prediction. The
ops are those that the model calls (train/tune/ops.py); one without a known cost is an error.

`--gpus 8`, or `--gpus 2x8` for two machines, predicts a step of as many: what each computes, and what they send each
other by the rates of the links (train/ranks/traffic.py). Nothing is overlapped. It is a prediction from assumed rates.

`--measured FILE` sets beside it what bench/test_step.py measured: the gap of each op, where the next millisecond is.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.ceilings import Ceilings
from model import GPTConfig, flops_per_token
from model.flops import H100_PEAK
from prepare import InputError
from prepare.arguments import Parser, command
from train.config import TrainConfig, parse_given, resolve
from train.ranks.traffic import traffic_of
from train.recipes import vocab_size
from train.tune.ops import Op, micro_step_ops, recomputed_ops, update_ops

# H200: 790 TFLOP/s and 4.3 TB/s (of 4.8) have been measured by others on one. H100: the same rate, and the same nine
# tenths of its datasheet's 3.35 TB/s: not measured.
GPUS = {"h200": Ceilings(790e12, 4.3e12), "h100": Ceilings(790e12, 3.0e12)}


@dataclass(frozen=True)
class Links:
    """Of one GPU, each direction, bytes/s and seconds. Assumed, of an H100 as it is sold: NVLink 4 has 450 GB/s,
    a network card of 400 Gbit/s 50 GB/s, of which four fifths and nine tenths are counted on; the start of a collective
    takes some 20 µs inside a machine and 40 µs across. None of it is measured here."""

    inside: float = 0.8 * 450e9
    across: float = 0.9 * 50e9
    start_inside: float = 20e-6
    start_across: float = 40e-6

    def seconds(self, num_bytes: float, calls: int, machines: int, each: int) -> float:
        """Of `calls` collectives in which a GPU sends so many bytes, the same to every other."""
        others = machines * each - 1
        inside, across = num_bytes * (each - 1) / others, num_bytes * (machines - 1) * each / others
        start = self.start_across if machines > 1 else self.start_inside
        return calls * start + max(inside / self.inside, across / self.across)


ITEMSIZES = {"cuda": 2, "cpu": 4}  # bytes of an activation


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


def line(op: Op, direction: str, itemsize: int = 2) -> Line:
    """`direction` is "forward", "backward", "again" for a forward in the backward, or "" for an update."""
    return Line(f"{op.name} {direction}".strip(), op.count, *op.cost(direction == "backward", itemsize))


def micro_step(config: TrainConfig, model: GPTConfig) -> Iterator[Line]:
    """Every op in its forward, then every op in its backward, then what `--recompute` does again."""
    ops = micro_step_ops(config, model)
    for direction in ("forward", "backward"):
        for op in ops:
            yield line(op, direction)
    for op in recomputed_ops(config, model):
        yield line(op, "again")


def update(model: GPTConfig, itemsize: int = 2) -> Iterator[Line]:
    for op in update_ops(model):
        yield line(op, "", itemsize)


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


def report_many(config: TrainConfig, model: GPTConfig, gpu: Ceilings, machines: int, each: int) -> float:
    """Prints what a step takes on `machines` with `each` as many GPUs. Returns its milliseconds."""
    size, links = machines * each, Links()
    sent = traffic_of(config, model, size)
    own = config.grad_accum_steps // size
    computed = own * sum(line.milliseconds(gpu) for line in micro_step(config, model))
    updated = sum(line.milliseconds(gpu) for line in update(model)) / size
    exchanged = 1e3 * links.seconds(sent.exchange, sent.calls, machines, each)
    # Received and summed: every part is read, and the sum read and written; then the gradients are zeroed.
    padded = sent.exchange * size / (size - 1)
    added = 1e3 * (4 * padded if config.sums == "ordered" else 0.0) / gpu.bandwidth
    gathered = 1e3 * links.seconds(sent.gather, sent.calls, machines, each)
    parts = {
        f"{own} micro-step{'s' * (own > 1)} of {config.device_batch_size} rows": computed,
        "update of a rank's part": updated,
        f"{sent.exchanges} x exchange, {sent.exchange / 1e6:,.0f} MB": sent.exchanges * exchanged,
        f"{sent.exchanges} x added in order": sent.exchanges * added,
        f"gather, {sent.gather / 1e6:,.0f} MB": gathered,
    }
    total = sum(parts.values())
    print(f"{size} GPUs in {machines} machine{'s' * (machines > 1)}: predicted from assumed rates, not measured")
    for name, ms in parts.items():
        print(f"{name:<40} {ms:>9.3f} ms  {ms / total:>5.1%}")
    mfu = 100 * flops_per_token(model) * config.total_batch_size / (total / 1e3) / H100_PEAK / size
    print(f"a step of {config.total_batch_size:,} tokens: {total:.2f} ms, MFU {mfu:.1f} % of {size} peaks: predicted")
    return total


@dataclass(frozen=True)
class Part:
    """What an op takes in a micro-step, all its layers, in one direction: milliseconds allowed, and measured."""

    name: str
    bound: float
    measured: float

    @property
    def gap(self) -> float:
        return self.measured - self.bound


def read_step(path: Path, vocab_size: int | None) -> dict:
    """The record that bench/test_step.py left in pytest-benchmark's JSON. Raises InputError."""
    try:
        benchmarks = json.loads(path.read_text(encoding="utf-8"))["benchmarks"]
        steps = [b["extra_info"]["step"] for b in benchmarks if "step" in b.get("extra_info", {})]
    except OSError as error:
        raise InputError(f"--measured {path}: {error.strerror}: name another file") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"--measured {path} is no JSON that --benchmark-json wrote") from None
    if not steps:
        raise InputError(f"--measured {path} holds no step: pytest bench/test_step.py --benchmark-only measures one")
    fitting = [step for step in steps if vocab_size in (None, step["model"]["vocab_size"])]
    if not fitting:
        there = ", ".join(str(step["model"]["vocab_size"]) for step in steps)
        raise InputError(f"--measured {path} holds no step at --vocab-size {vocab_size}, only at {there}")
    return fitting[0]


def parts_of(step: dict, gpu: Ceilings) -> list[Part]:
    """Every op forward and backward and the update, the largest gap first. A backward is what both directions take
    over the forward alone: where a forward with gradients does more than one without, that is in it too."""
    config, model = TrainConfig.from_json(step["config"]), GPTConfig(**step["model"])
    times = {part["op"]: part for part in step["parts"]}
    parts, itemsize = [], ITEMSIZES[config.device]
    for op in micro_step_ops(config, model):
        if op.name not in times:
            raise InputError(f"the measured step lacks {op.name!r}: measure it again with this version")
        forward_ms, both_ms = times[op.name]["forward_ms"], times[op.name]["both_ms"]
        for direction, measured in (("forward", forward_ms), ("backward", both_ms - forward_ms)):
            bound = line(op, direction, itemsize)
            parts.append(Part(bound.name, bound.milliseconds(gpu), op.count * measured))
    share = 1 / config.grad_accum_steps
    bound = sum(line.milliseconds(gpu) for line in update(model, itemsize))
    parts.append(Part("update, a micro-step's share", bound * share, step["update_ms"] * share))
    return sorted(parts, key=lambda part: -part.gap)


def report_measured(step: dict, gpu: Ceilings) -> list[Part]:
    """Prints the gap of each op, and what of the step is none of them. Returns the parts as printed."""
    config = TrainConfig.from_json(step["config"])
    parts = parts_of(step, gpu)
    width = max(len(part.name) for part in parts)
    print(f"{'op, all its layers':<{width}}  {'bound ms':>9}  {'measured':>9}  {'gap':>8}  of bound")
    total = Part("sum", sum(part.bound for part in parts), sum(part.measured for part in parts))
    for part in [*parts, total]:
        print(
            f"{part.name:<{width}}  {part.bound:>9.3f}  {part.measured:>9.3f}  {part.gap:>8.3f}"
            f"  {part.bound / part.measured if part.measured > 0 else float('nan'):>8.0%}"
        )
    micro_step = step["step_ms"] / config.grad_accum_steps
    mfu = "n/a" if step["mfu_percent"] is None else f"{step['mfu_percent']:.1f} %"
    print(f"a micro-step of {config.micro_batch_tokens:,} tokens, measured: {micro_step:.2f} ms, MFU {mfu}")
    print(f"in none of its ops: {micro_step - total.measured:.2f} ms")
    print(f"the next millisecond: {parts[0].name}, {parts[0].gap:.2f} ms above its bound")
    return parts


def _machines(text: str) -> tuple[int, int]:
    """"8" or "2x8"."""
    found = re.fullmatch(r"(?:(\d+)x)?(\d+)", text)
    machines, each = (int(number or 1) for number in found.groups()) if found else (0, 0)
    if not 1 < machines * each <= 4096 or each < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of GPUs, as 8, nor machines and GPUs in each, as 2x8")
    return machines, each


def main(args: list[str] | None = None) -> int:
    parser = Parser("bench.roofline", __doc__)
    parser.add_argument("--gpu", choices=GPUS, help="whose ceilings (default: h200; with --measured those measured)")
    parser.add_argument("--vocab-size", type=int, help="default: the recipe's; with --measured the first step's")
    parser.add_argument("--config", type=Path, help="config.json of a run, instead of options of train")
    parser.add_argument("--measured", type=Path, help="JSON of bench/test_step.py: the gap of each op, largest first")
    parser.add_argument("--gpus", type=_machines, metavar="N", help="predict a step on N GPUs, or on MxN")
    options, others = parser.parse_known_args(args)
    given = parse_given(others)
    if options.vocab_size is not None and not 1 <= options.vocab_size <= 65536:
        parser.error(f"--vocab-size {options.vocab_size} must be from 1 to 65,536")
    if given and (options.config or options.measured):
        parser.error(f"{others[0]}: --config and --measured have a step of their own")
    try:
        if options.measured:
            step = read_step(options.measured, options.vocab_size)
            report_measured(step, GPUS[options.gpu] if options.gpu else Ceilings(**step["ceilings"]))
            return 0
        if options.config:
            try:
                saved = json.loads(options.config.read_text(encoding="utf-8"))
                config, model = TrainConfig.from_json(saved["config"]), GPTConfig(**saved["model"])
            except OSError as error:
                raise InputError(f"--config {options.config}: {error.strerror}: name another file") from None
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"--config {options.config} is no config.json of a run ({error})") from None
        else:
            machines, each = options.gpus or (1, 1)
            config = resolve(TrainConfig(**given), "cuda", machines * each)
            model = config.model_config(options.vocab_size or vocab_size(config.recipe))
        if options.gpus and not options.config:
            report_many(config, model, GPUS[options.gpu or "h100"], *options.gpus)
        else:
            report(config, model, GPUS[options.gpu or "h200"])
    except (ValueError, KeyError, TypeError, InputError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    command(main)
