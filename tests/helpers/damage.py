"""The files that steer a run, damage to them, and what reading them may then do.

TIMEBOX_FUZZ=5000 tries that many cuts and flips of each file.
"""

import dataclasses
import os
import random
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from prepare import Dataset, InputError, Loader
from train.resilience.checkpoint import newest_checkpoint
from train.resilience.tensors import digest
from train.results.run_folder import load_run

DATA_FILES = [
    "manifest.json", "tokenizer.json", "token_counts.npy",
    *(f"{split}_00000{kind}.npy" for split in ("train", "val", "holdout") for kind in ("", "_offsets")),
]  # fmt: skip
RUN_FILES = ["config.json", "tokenizer.json", "model.safetensors"]
CHECKPOINT_FILES = ["tensors.safetensors", "state.json", "SHA256SUMS"]

COUNT = int(os.environ.get("TIMEBOX_FUZZ", "200"))
SECONDS = 20  # for one reading, which takes milliseconds
MEMORY = 1 << 30  # that one reading may map on top of what is in use


def damaged(content: bytes, seed: str) -> Iterator[tuple[str, bytes]]:
    """`content` cut at COUNT random lengths, then with one bit flipped at COUNT random places; with what was done."""
    rng = random.Random(seed)
    for _ in range(COUNT):
        length = rng.randrange(len(content))
        yield f"cut to {length} bytes", content[:length]
    for _ in range(COUNT):
        place, bit = rng.randrange(len(content)), rng.randrange(8)
        flipped = bytearray(content)
        flipped[place] ^= 1 << bit
        yield f"bit {bit} of byte {place} flipped", bytes(flipped)


@contextmanager
def limits() -> Iterator[None]:
    """Neither a hang nor a huge allocation passes."""

    def too_long(signum, frame):
        raise TimeoutError(f"reading takes more than {SECONDS} s")

    handler = signal.signal(signal.SIGALRM, too_long)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + MEMORY, hard))
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, handler)


def fuzz(path: Path, read: Callable[[], object], *, keep_mtime: bool = False, exact: bool = True) -> int:
    """Damages the file at `path` in every way, one after the other, and has it read.

    Reading gives what it gives of the whole file (where `exact`), or an InputError of one line. Returns how often it
    was refused; the file is whole again afterwards. `keep_mtime`: as where the disk itself has turned a bit.
    """
    content, stat, whole, refused = path.read_bytes(), path.stat(), read(), 0
    with limits():
        for done, bad in damaged(content, path.name):
            path.write_bytes(bad)
            if keep_mtime:
                os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
            signal.alarm(SECONDS)
            line = None
            try:
                got = read()
            except InputError as error:
                line = str(error)
            except BaseException as error:
                raise AssertionError(f"{path.name}, {done}: {type(error).__name__}: {error}") from error
            if line is None:
                assert got == whole or not exact, f"{path.name}, {done}: read as if nothing were wrong with it"
            else:
                refused += 1
                assert line.strip(), f"{path.name}, {done}: refused without a word"
                assert "\n" not in line, f"{path.name}, {done}: {line}"
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert read() == whole
    return refused


def read_data(folder) -> tuple:
    """All that training and evaluation take from a prepared folder."""
    data = Dataset.open(folder)
    splits = [data.split(name) for name in ("train", "val", "holdout")]
    texts = [b"".join(s.document(i).tobytes() for i in range(s.num_documents)) for s in splits]
    numbers = [(s.sha256, s.num_documents, s.num_tokens, s.num_bytes) for s in splits]
    with Loader(splits[0], 2, 16, bos=data.tokenizer.bos) as loader:
        batch = next(loader)
    tokenizer = (data.tokenizer.fingerprint, data.tokenizer.encode("été, the 128 rows"), data.vocab_size)
    return texts, numbers, tokenizer, data.token_counts.tobytes(), data.source, batch.tokens.tolist(), batch.state


def read_run(run) -> tuple:
    model, tokenizer, saved = load_run(run)
    return digest(dict(model.state_dict())), dataclasses.asdict(model.config), tokenizer.fingerprint, saved


def read_checkpoint(run) -> tuple:
    """What --resume takes from the only checkpoint there is."""
    checkpoint = newest_checkpoint(run / "checkpoints")
    return checkpoint.values, digest(checkpoint.tensors())
