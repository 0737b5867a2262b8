"""Checkpoints: one folder each, written beside the training, of which a crash at any byte leaves the last good one.

RUN/checkpoints/step-00001234/    tensors.safetensors   masters and moments, fp32
                                  state.json            all else: see RunState, and what the run was started with
                                  SHA256SUMS            of the two; `sha256sum -c` reads it

A folder is written as step-00001234.part, every file of it synced, and then renamed.
"""

import hashlib
import json
import os
import re
import shutil
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from prepare import InputError
from prepare.files import library_path, sha256_of
from prepare.words import printable

from ..ranks import ALONE, Ranks
from .durable import rename_synced, sync, write_synced
from .state import RunState
from .tensors import header

FORMAT_VERSION = 1
TENSORS, STATE, SUMS = "tensors.safetensors", "state.json", "SHA256SUMS"
KEPT = 2  # the older one is for where the disk damages the newer


class DamagedError(Exception):
    """A checkpoint that cannot be read; says why."""


@dataclass(frozen=True)
class Checkpoint:
    """Read and found whole."""

    path: Path
    values: dict

    @property
    def step(self) -> int:
        """Steps that were done."""
        return self.values["step"]

    def tensors(self) -> dict[str, Tensor]:
        """On the CPU. Raises InputError."""
        try:
            with library_path(self.path / TENSORS) as name:
                return load_file(name)
        except (OSError, ValueError, SafetensorError) as error:
            raise InputError(f"{self.path / TENSORS} cannot be read ({error})") from None


def checkpoint_folders(folder: Path) -> list[Path]:
    """Newest first."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def write_checkpoint(folder: Path, values: dict, *tensors: bytes | memoryview) -> None:
    """Writes one, `tensors` in pieces, and removes all but the last two. Raises OSError, with those before unharmed."""
    if not folder.exists():
        folder.mkdir()
        sync(folder.parent)
    remove_parts(folder)
    path = folder / f"step-{values['step']:08d}"
    if path.exists():  # written before, but not known to be on the disk
        remove(path)
    part = path.with_name(path.name + ".part")
    part.mkdir()
    state = json.dumps({"format": FORMAT_VERSION, **values}).encode()
    sums = {TENSORS: write_synced(part / TENSORS, *tensors), STATE: write_synced(part / STATE, state)}
    write_synced(part / SUMS, sums_file(sums))
    sync(part)
    rename_synced(part, path)
    for old in checkpoint_folders(folder)[KEPT:]:
        remove(old)


def sums_file(sums: dict[str, str]) -> bytes:
    return "".join(f"{sum}  {name}\n" for name, sum in sums.items()).encode()


def remove(path: Path) -> None:
    """Renamed first: half a checkpoint never carries the name of a whole one."""
    part = path.with_name(path.name + ".part")
    os.replace(path, part)
    shutil.rmtree(part, ignore_errors=True)


def remove_parts(folder: Path) -> None:
    """What a crash or a full disk has left."""
    for part in folder.glob("*.part"):
        shutil.rmtree(part, ignore_errors=True)


def read_checkpoint(path: Path) -> Checkpoint:
    """Raises DamagedError where a file is missing, or is not what was written."""
    try:
        written = (path / SUMS).read_bytes()
        state = (path / STATE).read_bytes()
        sums = {TENSORS: sha256_of(path / TENSORS), STATE: hashlib.sha256(state).hexdigest()}
        if written != sums_file(sums):
            changed = [name for name, sum in sums.items() if sum.encode() not in written] or [SUMS]
            raise DamagedError(f"{' and '.join(changed)} changed since it was written")
        values = json.loads(state)
    except OSError as error:
        raise DamagedError(f"{Path(error.filename or path).name}: {error.strerror}") from None
    except ValueError as error:
        raise DamagedError(f"{STATE} is no JSON ({error})") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT_VERSION:
        raise DamagedError(f"{STATE} is not of format {FORMAT_VERSION}, which this program reads")
    return Checkpoint(path, values)


def newest_checkpoint(folder: Path) -> Checkpoint:
    """The newest that is whole; says so where that is not the newest there is. Raises InputError where none is."""
    damaged = []
    for path in checkpoint_folders(folder):
        try:
            return read_checkpoint(path)
        except DamagedError as error:
            damaged.append(f"{path}: {error}")
            print(f"note: a checkpoint is damaged and left out, {printable(damaged[-1])}", file=sys.stderr)
    what = f"no whole checkpoint ({damaged[0]})" if damaged else "no checkpoint"
    raise InputError(f"{folder.parent} has {what}: start the run anew, without --resume")


class Checkpointer:
    """Takes a run's checkpoints: a snapshot, for which training stands still, written by a thread of its own.

    There is one buffer, allocated here and once: no snapshot is taken while the one before is still being written.
    The thread is no daemon, so that a process that ends by itself ends with its last checkpoint whole.
    """

    def __init__(self, folder: Path, state: RunState, every: float, origin: dict, ranks: Ranks = ALONE):
        """
        Args:
            folder: of the checkpoints.
            every: seconds of wall time from one to the next; at 0, as often as they can be written.
            origin: what the run was started with; stands in each state.json.
            ranks: each gives its part of every tensor, and rank 0 alone has the whole, and writes it.
        """
        self.folder, self.state, self.every, self.origin, self.ranks = folder, state, every, origin, ranks
        self.sources = state.kept()
        self.cuda = next(iter(self.sources.values())).own.is_cuda
        if ranks.first:
            # Filled, because memory that was only promised comes a page fault at a time, in the first snapshot.
            shapes = {name: torch.empty(kept.cut.shape, device="meta") for name, kept in self.sources.items()}
            buffer = torch.empty(sum(t.numel() for t in shapes.values()), pin_memory=self.cuda).fill_(0)
            parts = buffer.split([t.numel() for t in shapes.values()])
            self.snapshot = [part.view(t.shape) for part, t in zip(parts, shapes.values(), strict=True)]
            self.bytes = memoryview(buffer.numpy()).cast("B")
            self.header = header(shapes)
            for path in checkpoint_folders(folder):
                if step_of(path) > state.step:  # damaged, or the run would go on from there
                    remove(path)
        self.taken = self.written = state.step  # steps of the last snapshot, of the last checkpoint on the disk
        self.next_time = time.monotonic() + every
        self.writer: threading.Thread | None = None

    def due(self) -> bool:
        """Asked after each step. Rank 0, which writes them, says when."""
        if not self.ranks.first:
            return False
        busy = self.writer is not None and self.writer.is_alive()
        return not busy and time.monotonic() >= self.next_time and self.state.step > self.taken

    def save(self) -> None:
        """Takes a snapshot and lets it be written, unless this step has its checkpoint. Nothing may be on its way."""
        start = time.perf_counter()
        self.wait()
        if self.ranks.of_first(self.written) == self.state.step:
            return
        for i, kept in enumerate(self.sources.values()):
            whole = kept.gathered(self.ranks)
            if self.ranks.first:
                self.snapshot[i].copy_(whole, non_blocking=True)
        if not self.ranks.first:
            return
        if self.cuda:
            torch.cuda.synchronize()
        self.state.blocked_seconds += time.perf_counter() - start
        values = self.state.values() | self.origin
        self.writer = threading.Thread(target=self._write, args=(values,), name="checkpoint")
        self.writer.start()
        self.taken = self.state.step
        self.next_time = time.monotonic() + self.every

    def wait(self) -> None:
        """Until the checkpoint that is being written is on the disk."""
        if self.writer is not None:
            self.writer.join()
            self.writer = None

    def _write(self, values: dict) -> None:
        try:
            # First the log: a checkpoint stands for all that was reported up to it.
            sync(self.folder.parent / "metrics.jsonl")
            write_checkpoint(self.folder, values, self.header, self.bytes)
            self.written = values["step"]
        except OSError as error:
            remove_parts(self.folder)
            print(
                f"\nnote: no checkpoint of step {values['step']}, the run goes on:"
                f" {printable(error.filename)}: {error.strerror}", file=sys.stderr, flush=True,
            )  # fmt: skip
