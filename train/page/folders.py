"""What the runs' folders still hold of an experiment: curves, changes, a sample. They may be gone, or damaged."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prepare.words import printable

from ..curves import read_metrics
from ..results import evals

POINTS = 160  # of a curve: more than a phone can show
MOST_OF_A_SAMPLE = 300  # characters of one that was made on the way
MOST_BYTES = 60_000  # of a diff or a sample in the page; the whole of it is in the folder


class Folders:
    """Reads files below the folders of ledgers, and again only where one has changed: a page is made anew every few
    seconds of a night."""

    def __init__(self):
        self._read: dict[Path, tuple[tuple, Any]] = {}
        self._names: dict[Path, dict[str, Path]] = {}

    def look(self, ledger: Path) -> None:
        """Which runs have a folder there, by what the ledger calls them: no name that it holds leads elsewhere."""
        try:
            self._names[ledger] = {printable(path.name): path for path in ledger.iterdir() if path.is_dir()}
        except OSError:
            self._names[ledger] = {}

    def of(self, ledger: Path) -> dict[str, Path]:
        return self._names.get(ledger, {})

    def curve(self, folder: Path) -> dict[str, list] | None:
        """`step`, `seconds` (timed) and `loss` (smoothed, nats a token), thinned. None where there is none to read."""
        return self._once(folder / "metrics.jsonl", lambda path: curve_of(read_metrics(path.parent)))

    def evals(self, folder: Path) -> dict[str, list] | None:
        """`step`, `seconds` (timed), `val_bpb` and `sample` of the evaluations on the way, thinned."""
        return self._once(folder / evals.NAME, lambda path: evals_of(evals.read_evals(path.parent)))

    def last_step(self, folder: Path) -> list[dict]:
        """The last twenty rows of the metrics."""
        return self._once(folder / "metrics.jsonl", lambda path: read_metrics(path.parent)[-20:], "last") or []

    def text(self, path: Path) -> str | None:
        """Lines that any output takes, cut where there are too many. None where there is no such file."""
        return self._once(path, _text)

    def _once(self, path: Path, read: Callable[[Path], Any], what: str = "") -> Any:
        try:
            found = path.stat()
            state = (found.st_mtime_ns, found.st_size, found.st_ino)
            key = path / what
            if self._read.get(key, (None,))[0] != state:
                self._read[key] = (state, read(path))
            return self._read[key][1]
        except OSError:
            return None


def curve_of(steps: list[dict]) -> dict[str, list] | None:
    if not steps:
        return None
    every = max(1, math.ceil(len(steps) / POINTS))
    kept = steps[::-1][::every][::-1]  # the last step is what a reader compares
    curve = {
        "step": [number(row.get("step")) for row in kept],
        "seconds": [number(row.get("timed_seconds")) for row in kept],
        "loss": [number(row["smooth_loss"]) for row in kept],
    }
    return curve if any(value is not None for value in curve["loss"]) else None


def evals_of(rows: list[dict]) -> dict[str, list] | None:
    if not rows:
        return None
    every = max(1, math.ceil(len(rows) / POINTS))
    kept = rows[::-1][::every][::-1]
    return {
        "step": [row["step"] for row in kept],
        "seconds": [number(row["timed_seconds"]) for row in kept],
        "val_bpb": [number(row["val_bpb"], 7) for row in kept],
        "sample": [printable(row.get("sample", ""))[:MOST_OF_A_SAMPLE] for row in kept],
    }


def number(value: Any, digits: int = 6) -> float | int | None:
    """`value` to so many digits, or None where it is no number that JSON has a word for."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        rounded = float(f"{value:.{digits}g}")
        return None if not math.isfinite(rounded) else value if rounded == value else rounded
    except OverflowError:  # an int that no float holds
        return None


def _text(path: Path) -> str:
    with path.open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    lines = content[:MOST_BYTES].decode(errors="replace").split("\n")
    shown = "\n".join(printable(line.rstrip("\r").expandtabs(4)) for line in lines)
    if len(content) > MOST_BYTES:
        shown += f"\n[cut after {MOST_BYTES:,} bytes: the rest is in {printable(path.name)}]"
    return shown
