"""What was found on a GPU, kept for every run that comes: one file for a GPU's name, below `$TIMEBOX_HOME`.

An entry belongs to a kernel at a shape, and to the kernel's own source: where that changes, or another shape is asked
for, there is no entry, and nothing else is lost. All of the file belongs to one driver, PyTorch and Triton: a file of
others, or one that is damaged, is as good as none.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from kernels import Choice, Table, Tile, key_of
from prepare.home import home

from ..resilience.durable import hold_lock, write_json

FORMAT = 1


@dataclass(frozen=True)
class Machine:
    """What a time, and a tile that compiles, belong to."""

    gpu: str
    driver: str
    torch: str
    triton: str

    @classmethod
    def here(cls) -> "Machine":
        import triton

        return cls(torch.cuda.get_device_name(), _driver(), torch.__version__, triton.__version__)


def _driver() -> str:
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return "unknown"
    found = re.search(r"\b\d+\.\d+(\.\d+)?\b", text)
    return found[0] if found else "unknown"


@dataclass(frozen=True)
class Entry:
    """Of a choice at a shape."""

    kernel: str
    shape: str
    source: str  # `Choice.digest`
    default: Tile
    best: Tile  # the default, where nothing beat it
    default_us: float | None  # microseconds of a micro-step; None where it has no time
    best_us: float | None
    noise: float | None  # by how much the default's times differ
    struck_out: dict[str, str] = field(default_factory=dict)  # by label: why
    commit: str | None = None
    date: str = ""


class Kept:
    """The file of one machine. Raises OSError where it cannot be written."""

    def __init__(self, path: Path, machine: Machine):
        self.path, self.machine = path, machine
        self.entries: dict[tuple[str, str], Entry] = {}
        self.options: dict[str, dict] = {}  # by a step's digest: what a whole step decided
        self.note = ""  # why a file that is there is not read

    @classmethod
    def read(cls, path: Path, machine: Machine) -> "Kept":
        kept = cls(path, machine)
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            if saved["format"] != FORMAT:
                raise ValueError(f"its format is {saved['format']}, not {FORMAT}")
            if (of := Machine(**saved["machine"])) != machine:
                changed = [f"{k} {v}, now {getattr(machine, k)}" for k, v in asdict(of).items()
                           if v != getattr(machine, k)]  # fmt: skip
                kept.note = f"{path} is of {'; '.join(changed)}: what it says is not used"
                return kept
            entries = [Entry(**entry) for entry in saved["entries"]]
            if not all(isinstance(e.best, dict) and e.best and isinstance(e.source, str) for e in entries):
                raise ValueError("an entry has no tile")
            kept.entries = {(entry.kernel, entry.shape): entry for entry in entries}
            kept.options = dict(saved["options"])
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())[:100]
            kept.note, kept.entries, kept.options = f"{path} is damaged ({reason}) and not used", {}, {}
        return kept

    def find(self, choice: Choice, shape: tuple) -> Entry | None:
        """The entry, where the kernel is still the one that was measured."""
        entry = self.entries.get((choice.name, key_of(shape)))
        return entry if entry and entry.source == choice.digest(*shape) else None

    def add(self, entry: Entry) -> None:
        self.entries[entry.kernel, entry.shape] = entry

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        entries = [asdict(self.entries[key]) for key in sorted(self.entries)]
        write_json(self.path, {"format": FORMAT, "machine": asdict(self.machine), "entries": entries,
                               "options": self.options})  # fmt: skip


def folder() -> Path:
    return home() / "tuning"


def path_of(gpu: str) -> Path:
    return folder() / (re.sub(r"[^A-Za-z0-9]+", "-", gpu).strip("-") + ".json")


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Inside, no other process tunes for this file: it waits for one that does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT)
    try:
        if not hold_lock(descriptor, path.parent, wait=False):
            print("another process tunes for this GPU: waiting for it", flush=True)
            hold_lock(descriptor, path.parent)
        yield
    finally:
        os.close(descriptor)


def in_force(kept: Kept, asked: Iterable[tuple[Choice, tuple]]) -> Table:
    """What a run takes in place of its defaults."""
    table: Table = {}
    for choice, shape in asked:
        entry = kept.find(choice, shape)
        if entry and entry.best != choice.default(*shape):
            table.setdefault(choice.name, {})[entry.shape] = entry.best
    return table


def digest(table: Table) -> str:
    """A short name of what is in force; "default" where nothing is."""
    if not table:
        return "default"
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()[:12]
