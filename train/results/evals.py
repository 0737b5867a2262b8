"""evals.jsonl: what `--eval-every` found while a run was training. A log, as metrics.jsonl is: nothing rests on it."""

import json
import math
from pathlib import Path

from ..resilience.durable import replace_file

NAME = "evals.jsonl"


def append_eval(folder: Path, row: dict) -> None:
    """The file is written anew each time, so that no crash and no full disk tears a line: there are few of them."""
    path = folder / NAME
    before = path.read_bytes() if path.exists() else b""
    replace_file(path, before + json.dumps(row).encode() + b"\n")


def cut_evals(folder: Path, step: int) -> None:
    """Leaves the rows up to `step`, at which the run that goes on was evaluated last; damaged ones go."""
    path = folder / NAME
    if path.exists():
        rows = [row for row in read_evals(folder) if row["step"] <= step]
        replace_file(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def read_evals(folder: Path) -> list[dict]:
    """The rows that have a step, the timed seconds and a number; what is damaged is left out."""
    try:
        lines = (folder / NAME).read_bytes().split(b"\n")
    except OSError:
        return []
    return [row for line in lines if (row := _row(line)) is not None]


def _row(line: bytes) -> dict | None:
    try:
        row = json.loads(line)
        step, numbers = row["step"], (row["timed_seconds"], row["val_bpb"])
        whole = type(step) is int and 0 <= step < 2**53 and all(
            type(value) in (int, float) and math.isfinite(value) for value in numbers
        )  # fmt: skip
        return row if whole and isinstance(row.get("sample", ""), str) else None
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
        return None
