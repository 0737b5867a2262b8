"""A measured op as one row: what pytest-benchmark's JSON holds of it, and the table that a person reads."""

import math
import time
from collections.abc import Iterable

from bench.ceilings import Ceilings, datasheet
from train.tune.ops import Op
from train.tune.problems import cost, shape_label, tokens_of
from train.tune.timing import Timing

OURS = "triton"


def row(
    op: Op, ran: Op, direction: str, provider: str, timing: Timing, itemsize: int, ceilings: Ceilings, device: str,
    commit: str | None,
) -> dict:  # fmt: skip
    """The figures of one measurement.

    Args:
        op: what was asked for; `ran` is the same with as many rows as memory allowed.
        timing, itemsize: of the call; bytes of an element of the activations.
        ceilings: measured on the same device.

    Returns:
        `percent_ceiling` is the time that the ceilings allow over the time it took, `percent_datasheet` the same by
        the vendor's figures, or None where they are not known.
    """
    num_bytes, flops = cost(ran, direction, itemsize)
    seconds, promised = timing.median, datasheet(device)
    return {
        "op": op.name,
        "shape": shape_label(op),
        "direction": direction,
        "provider": provider,
        "ms": 1e3 * seconds,
        "ns_per_token": 1e9 * seconds / tokens_of(ran),
        "GB/s": num_bytes / seconds / 1e9,
        "TFLOP/s": flops / seconds / 1e12,
        "percent_ceiling": 100 * ceilings.seconds(num_bytes, flops) / seconds,
        "percent_datasheet": 100 * promised.seconds(num_bytes, flops) / seconds if promised else None,
        "spread": timing.spread,
        "timed_by": timing.method,
        "note": "" if ran == op else f"{ran.sizes[0]:,} of {op.sizes[0]:,} rows for want of memory",
        "device": device,
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
    }


def relative_speeds(rows: Iterable[dict]) -> list[float | None]:
    """Each row's speed over ours at the same op, shape and direction, by time per token; None without a row of ours."""
    rows = list(rows)
    ours = {_case(r): r["ns_per_token"] for r in rows if r["provider"] == OURS}
    return [ours[_case(r)] / r["ns_per_token"] if _case(r) in ours else None for r in rows]


def _case(row: dict) -> tuple[str, str, str]:
    return row["op"], row["shape"], row["direction"]


def _digits(value: float) -> str:
    """Three of them, and never an exponent."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.{2 - math.floor(math.log10(value))}f}" if value > 1e-6 else "0"


def table(rows: list[dict]) -> list[str]:
    """Aligned lines, a header first. What was asked of several providers stands together, and is named once."""
    first = {_case(r): i for i, r in reversed(list(enumerate(rows)))}
    rows = sorted(rows, key=lambda r: first[_case(r)])
    header = ["op", "shape", "direction", "provider", "ms", "GB/s", "TFLOP/s", "% ceiling", "vs ours", ""]
    lines, last = [header], None
    for r, speed in zip(rows, relative_speeds(rows), strict=True):
        what = [r["op"], r["shape"], r["direction"]]
        remarks = [r["note"]] if r["note"] else []
        if "launches" in r["timed_by"]:
            remarks.append("bound by launches")
        lines.append([
            *(what if what != last else ["", "", ""]), r["provider"],
            *(_digits(r[key]) for key in ("ms", "GB/s", "TFLOP/s")),
            f"{r['percent_ceiling']:.0f}", f"{speed:.2f}x" if speed else "-", "; ".join(remarks),
        ])  # fmt: skip
        last = what
    return _aligned(lines, {0, 1, 2, 3, len(header) - 1})


def step_table(steps: dict[str, dict]) -> list[str]:
    """Whole steps by name, as bench/test_step.py measures them: aligned lines, a header first."""
    lines = [["step", "ms", "update ms", "tokens/s", "MFU %", "peak MiB"]]
    for name, step in steps.items():
        mfu, peak = (step[key] for key in ("mfu_percent", "peak_mib"))
        lines.append([
            name, _digits(step["step_ms"]), _digits(step["update_ms"]), f"{step['tokens_per_second']:,.0f}",
            "n/a" if mfu is None else f"{mfu:.1f}", "n/a" if peak is None else f"{peak:,.0f}",
        ])  # fmt: skip
    return _aligned(lines, {0})


def _aligned(lines: list[list[str]], words: set[int]) -> list[str]:
    """Columns of one width each; those of words to the left, those of numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i in words else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
