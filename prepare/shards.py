"""Writes one prepared folder: shuffled token shards, their offsets, counts, and a manifest over all of it.

tokenizer.json       train_00000.npy           uint16 [tokens], documents back to back, no BOS
manifest.json        train_00000_offsets.npy   int64 [documents + 1], where each document begins
token_counts.npy     val_00000.npy ...         holdout_00000.npy ...
"""

import json
import os
import re
import shutil
import uuid
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from .errors import InputError
from .files import sha256_of

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
TOKEN_COUNTS = "token_counts.npy"
VERIFIED = "verified.json"
SPLITS = ("train", "val", "holdout")
# Text behind one train shard: 60M tokens at 4.2 bytes each, and never more than 250M (0.5 GB) at one byte each, but for
# a single document that has more.
SHARD_TEXT_BYTES = 250_000_000

OUR_FILES = re.compile(rf"(({'|'.join(SPLITS)})_\d+(_offsets)?\.npy|{TOKENIZER}|{MANIFEST}|{TOKEN_COUNTS}|{VERIFIED})")


def file_record(path: Path) -> dict:
    """What the manifest says of a file: name, size in bytes, mtime_ns, SHA-256 in hex."""
    stat = path.stat()
    return {"name": path.name, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": sha256_of(path)}


def save_array(path: Path, values: np.ndarray) -> None:
    """The bytes of np.save, which reports a full disk as an OSError without errno."""
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(values))
        file.write(np.ascontiguousarray(values).data)


def write_json(path: Path, content: dict) -> None:
    """Written beside, then renamed: a reader sees the old file or the new one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


class SplitWriter:
    """Shuffles a stream of documents uniformly without holding it in memory.

    `add` scatters documents at random over files on disk; `finish` shuffles each of them in memory and writes it as a
    shard. That is a uniform shuffle of the whole, and the same seed gives the same bytes.
    """

    def __init__(self, folder: Path, name: str, estimated_bytes: float, rng: np.random.Generator):
        self.folder = folder
        self.name = name
        self.rng = rng
        num_buckets = max(1, -int(-estimated_bytes // SHARD_TEXT_BYTES))
        self.buckets = [folder / f"{name}_{i:05d}.bucket" for i in range(num_buckets)]
        self.lengths = [array("q") for _ in self.buckets]  # tokens of each document
        self.num_documents = 0

    def add(self, documents: list[np.ndarray]) -> None:
        """Takes uint16 arrays, one a document."""
        self.num_documents += len(documents)
        bucket_of = self.rng.integers(len(self.buckets), size=len(documents))
        for bucket in np.unique(bucket_of):
            chosen = [documents[i] for i in np.flatnonzero(bucket_of == bucket)]
            self.lengths[bucket].extend(map(len, chosen))
            # Opened anew each time: a large corpus has more buckets than a process may have open files.
            with self.buckets[bucket].open("ab") as file:
                file.write(np.concatenate(chosen).tobytes())

    def finish(self, token_bytes: np.ndarray) -> tuple[dict, np.ndarray]:
        """Returns the manifest's entry of this split, and int64 [V] counts of its tokens.

        Raises InputError where the split has no documents.
        """
        if not self.num_documents:
            raise InputError(f"the {self.name} split has no documents: add text to the source")
        counts = np.zeros(len(token_bytes), dtype=np.int64)
        files = []
        for bucket, bucket_lengths in self._buckets_that_fit():
            if not bucket_lengths:
                continue
            tokens = np.fromfile(bucket, dtype=np.uint16)
            bucket.unlink()  # before the shard is written: the disk holds the tokens about once
            tokens, offsets = self._shuffled(tokens, np.array(bucket_lengths, dtype=np.int64))
            counts += np.bincount(tokens, minlength=len(counts))
            shard = self.folder / f"{self.name}_{len(files) // 2:05d}.npy"
            offsets_path = shard.with_name(f"{shard.stem}_offsets.npy")
            save_array(shard, tokens)
            save_array(offsets_path, offsets)
            files += [file_record(shard), file_record(offsets_path)]
        entry = {
            "documents": self.num_documents,
            "tokens": int(counts.sum()),
            "bytes": int(counts @ token_bytes),
            "files": files,
        }
        return entry, counts

    def _buckets_that_fit(self) -> Iterator[tuple[Path, array]]:
        """The buckets and their documents' lengths. One that got more than a shard may hold, since the text was more
        than its files' sizes had said, is scattered again."""
        for bucket, lengths in zip(self.buckets, self.lengths, strict=True):
            num_tokens = sum(lengths)
            if num_tokens <= SHARD_TEXT_BYTES or len(lengths) < 2:
                yield bucket, lengths
                continue
            parts = SplitWriter(self.folder, bucket.stem, 2 * num_tokens, self.rng)
            tokens, ends = np.memmap(bucket, np.uint16, mode="r"), np.cumsum(lengths)
            step = SHARD_TEXT_BYTES // 16 + 1  # tokens in memory
            for some in np.split(np.arange(len(ends)), np.searchsorted(ends, range(step, num_tokens, step))):
                parts.add([tokens[ends[i] - lengths[i] : ends[i]] for i in some])
            bucket.unlink()
            yield from zip(parts.buckets, parts.lengths, strict=True)

    def _shuffled(self, tokens: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        order = self.rng.permutation(len(lengths))
        starts = np.cumsum(lengths) - lengths
        shuffled = np.concatenate([tokens[starts[i] : starts[i] + lengths[i]] for i in order])
        return shuffled, np.concatenate([[0], np.cumsum(lengths[order])])


def check_replaceable(out: Path) -> None:
    """Raises InputError where writing to `out` would destroy anything but data that `prepare` wrote."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file: --out takes a folder")
    foreign = sorted(p.name for p in out.iterdir() if not OUR_FILES.fullmatch(p.name)) if out.exists() else []
    if foreign:
        raise InputError(
            f"{out} holds files that are not prepared data ({', '.join(foreign[:3])}), and they would be lost: "
            "name another folder with --out"
        )


@contextmanager
def building(out: Path) -> Iterator[Path]:
    """A temporary sibling of `out`, renamed to it at the end. On a failure or an interruption it is removed, and `out`
    is as it was. A link stays one: what it points to is replaced."""
    out = Path(os.path.realpath(out))  # Path.resolve raises a RuntimeError where a link leads to itself
    out.parent.mkdir(parents=True, exist_ok=True)
    # Named before they are made: an interruption may come between the call that makes one and the next line.
    unique = uuid.uuid4().hex
    folder, old = (out.with_name(f".{out.name}.{state}-{unique}") for state in ("preparing", "old"))
    try:
        folder.mkdir()
        yield folder
        check_replaceable(out)
        if out.exists():
            os.replace(out, old)
        os.replace(folder, out)
    finally:
        if old.exists() and not out.exists():
            os.replace(old, out)
        for rest in (old, folder):
            shutil.rmtree(rest, ignore_errors=True)
