"""Runs side by side: `python -m bench.runs RUN RUN ... [--agree [NATS]] [--steps N]`.

Prints what the summaries of the runs' folders hold; of a run that did not come to its end, its steps and their usual
pace. With `--agree` also their losses step by step, the first run's against each other's: exit code 1 where two differ
by more than NATS at a step that both have. Runs to compare so are made with `--steps`, one seed, one data folder and
`--scalar-lr 0`; what differs between them then is rounding, and it grows. What cannot be read or compared is said and
left out.

Why `--scalar-lr 0`: at the initial weights the layers add nothing to the stream yet, and the norm after them takes
every factor out again. The gradients of the scalars λ are then nothing but rounding, and AdamW, which divides them by
their own size, makes a whole step of ±lr out of that. Runs that train λ may part with nothing wrong, which a note says.
"""

import json
import sys
from pathlib import Path
from statistics import median

from prepare import InputError
from prepare.arguments import Parser, command
from prepare.words import printable
from train.results.metrics import shown

COLUMNS = {
    "tokens_per_second": "tok/s",
    "mfu_percent": "MFU %",
    "peak_vram_mb": "peak MiB",
    "val_bpb": "val_bpb",
    "num_steps": "steps",
    "training_seconds": "seconds",
    "seconds_to_first_step": "first step",
}
NATS = 0.02  # chosen, not yet measured: a bf16 loss of 65,536 tokens rounds to a few thousandths in the first steps


def read_run(folder: Path) -> tuple[dict, list[float]]:
    """A run's summary (what its steps say where it has not finished) and its losses by step. Raises InputError."""
    try:
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        losses = [row["loss"] for row in rows]
        path = folder / "summary.json"
        summary = json.loads(path.read_text(encoding="utf-8")) if path.exists() else unfinished(rows)
        return summary, losses
    except OSError:
        raise InputError(f"{folder} is no run's folder: it has no metrics.jsonl") from None
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{folder} does not hold together as a run: train it again") from None


def unfinished(rows: list[dict]) -> dict:
    """Steps and their median pace, in the words of a summary: the first steps compile, and do not move it."""
    if not rows:
        return {}
    found = {"num_steps": len(rows), "tokens_per_second": median(row["tokens_per_second"] for row in rows)}
    if rows[-1]["mfu"] is not None:
        found["mfu_percent"] = median(row["mfu"] for row in rows)
    return found


def read_runs(folders: list[Path], at_least: int) -> dict[str, tuple[dict, list[float]]]:
    """Those that can be read, by name; to be compared, `at_least` 2, those with a step. Raises InputError."""
    runs = {}
    for folder in folders:
        try:
            summary, losses = read_run(folder)
            if at_least > 1 and not losses:
                raise InputError(f"{folder} has no step")
            runs[printable(folder.name)] = summary, losses
        except InputError as error:
            print(f"left out: {printable(error)}")
    if len(runs) < at_least:
        raise InputError("no run to show" if at_least == 1 else "--agree needs two runs or more, each with a step")
    return runs


def trains_scalars(folder: Path) -> bool:
    """Whether the run's configuration says so: without one nothing is known."""
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))["config"]["scalar_lr"] != 0
    except (OSError, ValueError, KeyError, TypeError):
        return False


def summary_table(runs: dict[str, dict]) -> list[str]:
    """Aligned lines, a header first."""
    cells = [["run", *COLUMNS.values()]]
    cells += [[name, *(shown(key, summary.get(key, "-")) for key in COLUMNS)] for name, summary in runs.items()]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    aligned = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in cells]
    return ["  ".join(row) for row in aligned]


def largest_difference(first: list[float], other: list[float]) -> tuple[float, int]:
    """Between the losses at one step, and that step; NaN is larger than anything."""
    differences = [abs(a - b) for a, b in zip(first, other, strict=False)]
    return max((float("inf") if d != d else d, step) for step, d in enumerate(differences))


def main(args: list[str] | None = None) -> int:
    """Exit codes: 0 agreed, or not asked; 1 they do not; 2 bad input."""
    parser = Parser("bench.runs", __doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--agree", type=float, nargs="?", const=NATS, metavar="NATS", help=f"default: {NATS}")
    parser.add_argument("--steps", type=int, metavar="N", help="compare the losses of the first N alone")
    options = parser.parse_args(args)
    try:
        runs = read_runs(options.runs, 1 if options.agree is None else 2)
    except InputError as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        return 2
    print("\n".join(summary_table({name: summary for name, (summary, _) in runs.items()})))
    if options.agree is None:
        return 0
    names, losses = list(runs), [losses[: options.steps] for _, losses in runs.values()]
    print("step  " + "  ".join(f"{name:>12}" for name in names))
    for step, row in enumerate(zip(*losses, strict=False)):
        print(f"{step:>4}  " + "  ".join(f"{loss:>12.6f}" for loss in row))
    worst = 0.0
    for name, other in zip(names[1:], losses[1:], strict=True):
        difference, step = largest_difference(losses[0], other)
        worst = max(worst, difference)
        print(f"{names[0]} and {name} differ most at step {step}: {difference:.6f} nats")
    agree = worst <= options.agree
    unsteady = sorted({printable(folder.name) for folder in options.runs if trains_scalars(folder)} & runs.keys())
    if unsteady and not agree:
        print(f"note: {', '.join(unsteady)}: without --scalar-lr 0 rounding alone may be the cause (--help says why)")
    print(f"{'agree' if agree else 'DISAGREE'} within {options.agree:g} nats")
    return 0 if agree else 1


if __name__ == "__main__":
    command(main)
