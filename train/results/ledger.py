"""The ledger: a row for every run in `results.tsv`, for eyes and scripts, and all that is known in `results.jsonl`.

Both stand beside the run folders. Lines are only ever appended, each by one write under a lock: several runs may end at
once, and a writer that is killed costs its own line and no other. Programs read `results.jsonl` alone.
"""

import json
import math
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prepare.words import printable

from ..resilience.durable import hold_lock

TSV, JSONL, LOCK = "results.tsv", "results.jsonl", "results.lock"
# The first five are those of the published system, whose scripts cut them by position.
COLUMNS = (
    "commit", "val_bpb", "memory_gb", "status", "description",
    "verdict", "note", "run", "group", "seed", "budget", "total_seconds", "time",
)  # fmt: skip
RUN, HOLDOUT = "run", "holdout"  # kinds of object in results.jsonl


class Ledger:
    """The two files in one folder."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    @classmethod
    def beside(cls, run: str | Path) -> "Ledger":
        """The ledger that a run's folder belongs to."""
        return cls(Path(run).resolve().parent)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Between reading and appending: what is decided on the rows read still holds when the new one is written.

        The lock is a file of its own, which no editor replaces.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / LOCK).open("a") as file:
            hold_lock(file.fileno(), self.folder)
            yield  # closing the file gives the lock back

    def append(self, entry: dict) -> None:
        """Adds an entry, a run's also to `results.tsv`. Under `locked`."""
        if entry["kind"] == RUN:
            header = "\t".join(COLUMNS) + "\n"
            _append_line(self.folder / TSV, tsv_line(entry), header)
        _append_line(self.folder / JSONL, json.dumps(entry | {"crc32": _checksum(entry)}) + "\n")

    def entries(self) -> tuple[list[dict], int]:
        """All entries, oldest first, and how many lines were damaged and are left out."""
        try:
            lines = _BEGINNING.split((self.folder / JSONL).read_bytes())
        except FileNotFoundError:
            return [], 0
        entries = [_parse(line) for line in lines if line.strip()]
        return [entry for entry in entries if entry is not None], entries.count(None)

    def runs(self, new: dict | None = None) -> list[dict]:
        """The runs, oldest first; one that went on after its row was written appears as what it ended as. `new`: the
        entry that is about to be added, and is not among them."""
        runs = [entry for entry in self.entries()[0] if entry["kind"] == RUN]
        return standing(runs) if new is None else standing([*runs, new])[:-1]

    def row_of(self, run: str | Path) -> dict | None:
        """The last row of the run in this folder; None where there is none."""
        return next((entry for entry in reversed(self.runs()) if entry["run"] == name_of(run)), None)

    def holdout_uses(self) -> int:
        return sum(entry["kind"] == HOLDOUT for entry in self.entries()[0])


def standing(runs: list[dict]) -> list[dict]:
    """Without the rows that a later one of the same run takes the place of: those of an interrupted run, and every one
    before a resumption. A run that was killed between its row and its summary has a finished one there."""
    kept, later, resumed = [], set(), set()
    for entry in reversed(runs):
        run = entry["run"]
        if run not in resumed and not (entry.get("outcome") == "interrupted" and run in later):
            kept.append(entry)
        later.add(run)
        if (entry.get("config") or {}).get("resume"):
            resumed.add(run)
    return kept[::-1]


def tsv_line(entry: dict) -> str:
    """The row of a run. Where there is no val_bpb it says 0.000000, and 0.0 GB, as the published system does."""
    finished = entry["val_bpb"] is not None
    shown = {
        "val_bpb": f"{entry['val_bpb']:.6f}" if finished else "0.000000",
        "memory_gb": f"{entry['memory_gb']:.1f}" if finished else "0.0",
        "total_seconds": f"{entry['seconds']['total']:.1f}",
    }
    cells = [shown[column] if column in shown else entry[column] for column in COLUMNS]
    return "\t".join(" ".join(printable(cell).split()) or "-" for cell in cells) + "\n"


def name_of(run: str | Path) -> str:
    """What the ledger calls the run in a folder."""
    return printable(Path(run).resolve().name)


def _append_line(path: Path, line: str, header: str = "") -> None:
    """One write. A line that a killed writer left unfinished is ended first, so that it takes no other with it."""
    fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(fd).st_size
        if size == 0:
            line = header + line
        else:
            os.lseek(fd, size - 1, os.SEEK_SET)  # what is written goes to the end all the same
            line = "\n" * (os.read(fd, 1) != b"\n") + line
        data = line.encode("utf-8", errors="replace")
        if (written := os.write(fd, data)) < len(data):
            raise OSError(f"{path}: only {written} of {len(data)} bytes could be written")
    finally:
        os.close(fd)


# What the readers of the ledger rely on; anything more may be missing.
_NEEDED = {
    RUN: {
        "run": str, "group": str, "outcome": str, "status": str, "verdict": str, "note": str, "description": str,
        "commit": str, "budget": str, "time": str, "comparable": dict, "seconds": dict,
    },
    HOLDOUT: {"run": str},
}  # fmt: skip


# Where an entry begins, also where the end of the line before it is damaged: inside a string its quotes are escaped.
_BEGINNING = re.compile(rb'\n|(?=\{"kind": "(?:run|holdout)")')


def _checksum(entry: dict) -> int:
    """Of the entry as it is written: a digit that has changed on the disk is no number to compare with."""
    return zlib.crc32(json.dumps(entry).encode())


def _clean(value):
    """What any output takes, of whoever wrote the line: the names and words in `value`, and in all that it holds."""
    if isinstance(value, dict):
        return {key: _clean(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_clean(item) for item in value]
    return printable(value) if isinstance(value, str) else value


def _parse(line: bytes) -> dict | None:
    try:
        entry, _ = json.JSONDecoder().raw_decode(line.decode("utf-8", errors="replace"))
        needed = _NEEDED[entry["kind"]]
        if entry.pop("crc32") != _checksum(entry):
            return None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if not all(isinstance(entry.get(key), kind) for key, kind in needed.items()):
        return None
    if entry["kind"] == RUN:
        bpb = entry.get("val_bpb")
        if not (bpb is None or (isinstance(bpb, float) and math.isfinite(bpb))):
            return None
        if (bpb is None) != (entry["outcome"] != "finished"):
            return None
    return _clean(entry)
