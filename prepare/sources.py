"""Where text comes from, and which split each document belongs to.

A source is a list of files read one after another: the corpus is never in memory. Every pass over it gives the same
documents in the same order.
"""

import hashlib
import math
import os
import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from .errors import InputError
from .home import BUILT_IN_SOURCES, expanded
from .readers import CUT_BY_SEPARATOR, FORMATS, Reading, Skipped, format_of

VAL_SHARE = 0.02  # of all documents, where no file is named as validation
HOLDOUT_SHARE = 0.01  # of the documents that are not validation, where no file is named as test
# Of the text. No hash takes a larger document out of training: validation and holdout leave it most of any corpus.
MAX_HELD_OUT = 0.2
SMALL_CORPUS = 2_000  # documents; above it, the odds that a hash leaves a split empty are below one in 10⁸
HASH_RANGE = 1 << 64
DERIVED = r"(tmp|cache-).*\.arrow"  # by what the library `datasets` calls what it made of a set, beside the set
NAMED_KINDS = 8  # of the files that are not read: what more there are is counted together

_SPLIT_OF_WORD = {"val": "val", "valid": "val", "validation": "val", "test": "holdout", "train": "train"}
_LETTER = r"[^\W\d_]"
_WORD = re.compile(rf"(.*(?<!{_LETTER}))??({'|'.join(_SPLIT_OF_WORD)})(?!{_LETTER})")


class SourceFile(NamedTuple):
    path: Path
    split: str | None  # val or holdout, where its name says so
    key: str  # relative path


class _Cuts(NamedTuple):
    val_below: int  # hashes below it are validation
    holdout_below: int  # those from there on, and below this one, holdout
    largest: float  # bytes of the largest document that is taken by its hash


@dataclass(frozen=True)
class Source:
    """Documents of some files. `details` goes into the manifest. Splits by path for `stdlib`, else by text."""

    name: str
    files: tuple[SourceFile, ...]
    details: dict
    split_by_path: bool = False
    reading: Reading = field(default_factory=Reading)
    passed_over: Skipped = field(default_factory=Skipped)  # files that are there and are not read, by kind

    @cached_property
    def estimated_bytes(self) -> int:
        """UTF-8 bytes of text, from file sizes, Parquet footers, and the beginning of what is compressed: so it finds
        broken ones."""
        return sum(self._estimated_bytes_of.values())

    @cached_property
    def estimated_split_bytes(self) -> dict[str, float]:
        named = Counter()
        for file in self.files:
            named[file.split] += self._estimated_bytes_of[file]
        val = named["val"] or VAL_SHARE * named[None]
        rest = named[None] - (0 if named["val"] else val)
        holdout = named["holdout"] or HOLDOUT_SHARE * rest
        return {"train": rest - (0 if named["holdout"] else holdout), "val": val, "holdout": holdout}

    @cached_property
    def _estimated_bytes_of(self) -> dict[SourceFile, int]:
        return {file: self.reading.estimated_bytes(file.path) for file in self.files}

    def documents(self, skipped: Skipped | None = None) -> Iterator[tuple[str, str]]:
        """Yields (split, text). Counts into `skipped` what is left out, by reason.

        The hash of the text, where it decides, keeps copies of a document in one split. Where a path or a file's
        name decides, a copy of a document of another split is left out, so that nothing trained on is scored.
        """
        skipped = Skipped() if skipped is None else skipped
        _ = self._cuts  # too few documents are an error even where no hash is ever asked for
        split_of: dict[bytes, str] = {}
        for file, text in self._texts(skipped):
            digest = _digest(text)
            split = file.split or self._split(self._hash(file, digest), text)
            if split_of.get(digest, split) != split:
                skipped["copies across splits"] += 1
                continue
            if self.split_by_path or file.split:
                split_of[digest] = split
            yield split, text

    def _texts(self, skipped: Skipped) -> Iterator[tuple[SourceFile, str]]:
        for file in self.files:
            for text in self.reading.texts(file.path, skipped):
                if text is None:
                    skipped["null rows"] += 1
                elif not text or text.isspace():
                    skipped["empty documents"] += 1
                else:
                    yield file, text

    def _hash(self, file: SourceFile, text_digest: bytes) -> int:
        digest = _digest(file.key) if self.split_by_path else text_digest
        return int.from_bytes(digest[:8], "big")

    def _split(self, hashed: int, text: str) -> str:
        if hashed >= self._cuts.holdout_below or len(text.encode("utf-8")) > self._cuts.largest:
            return "train"
        return "val" if hashed < self._cuts.val_below else "holdout"

    @cached_property
    def _cuts(self) -> _Cuts:
        """By the shares above, raised where a small corpus has no document below them."""
        size_of, skipped, known = {}, Skipped(), True  # UTF-8 bytes of each document that a hash may take
        for file, text in self._texts(skipped):
            if file.split is None:
                size_of[self._hash(file, _digest(text))] = len(text.encode("utf-8"))
            if len(size_of) >= SMALL_CORPUS:
                known = False
                break
        named = {file.split for file in self.files}
        by_hash = [split for split in ("val", "holdout") if split not in named]
        if len(size_of) <= len(by_hash):
            raise InputError(self._too_few(len(size_of), len(by_hash) + 1, skipped))
        if not by_hash:
            return _Cuts(0, 0, 0)
        largest = math.inf
        if not self.split_by_path:
            share = MAX_HELD_OUT * (sum(size_of.values()) if known else self.estimated_bytes)
            largest = max(share, sorted(size_of.values())[len(by_hash) - 1])  # of so few documents the smallest
        smallest = sorted(h for h, size in size_of.items() if size <= largest)
        val_below = max(int(VAL_SHARE * HASH_RANGE), smallest[0] + 1) if "val" in by_hash else 0
        holdout_below = val_below
        if "holdout" in by_hash:
            share = (1 - VAL_SHARE if "val" in by_hash else 1) * HOLDOUT_SHARE
            first_after_val = next((h for h in smallest if h >= val_below), HASH_RANGE)
            holdout_below = max(val_below + int(share * HASH_RANGE), first_after_val + 1)
        if smallest[-1] < holdout_below:  # one document each, and the rest for training
            val_below = smallest[0] + 1 if "val" in by_hash else 0
            holdout_below = smallest[len(by_hash) - 1] + 1
        return _Cuts(val_below, holdout_below, largest)

    def _too_few(self, documents: int, needed: int, skipped: Skipped) -> str:
        beside = " beside the files named val or test" if any(file.split for file in self.files) else ""
        left_out = f" (left out: {counted(skipped)})" if skipped else ""
        return (
            f"{self.name} has {documents} different documents{beside}{left_out}, and at least {needed} are needed for"
            " the splits: add documents, or cut .txt and .md with --separator"
        )


def counted(skipped: Skipped) -> str:
    """In words; nothing where nothing was skipped."""
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(skipped.items()))


def stdlib_source() -> Source:
    """The running Python's own standard library, its tests included: about 32 MB of text that is always there."""
    root = Path(sysconfig.get_paths()["stdlib"])
    outside = {"site-packages", "dist-packages", "__pycache__"}
    paths = [path for path in _walk(root, outside, Skipped()) if format_of(path)[0] == ".py"]
    if not paths:
        raise InputError(f"this Python has no standard library as text in {root}: pass a folder with --source")
    version = ".".join(map(str, sys.version_info[:3]))
    files = tuple(SourceFile(path, None, path.relative_to(root).as_posix()) for path in paths)
    return Source("stdlib", files, {"python": version}, split_by_path=True)


def folder_source(folder: str | Path, reading: Reading | None = None) -> Source:
    """Every file of FORMATS below `folder`, those of which a name says that they are validation or test first; or one
    such file, whatever its name."""
    reading, root, passed_over = reading or Reading(), expanded(folder), Skipped()
    if root.is_file():
        root = root.resolve()
        files = [SourceFile(root, None, root.name)]
        if format_of(root)[0] not in FORMATS:
            raise InputError(f"{root} is none of {_formats()}: name it as what it is, or convert it")
    elif root.is_dir():
        root = root.resolve()
        paths = [path.relative_to(root) for path in _walk(root, set(), passed_over)]
        _check_one_set(paths, root)
        files = _named(paths, root, passed_over)
        if not files:
            there = f", only {counted(passed_over)}" if passed_over else ""
            raise InputError(f"{root} has no text{there}: put {_formats()} there")
    else:
        what = "is neither a folder nor a file" if root.exists() else "does not exist"
        raise InputError(f"{root} {what}: --source takes {', '.join(BUILT_IN_SOURCES)}, a folder with"
                         " text or a file")  # fmt: skip
    _check_of_use(reading, files)
    named = Counter(file.split for file in files)
    details = {"files": len(files), "validation_files": named["val"], "holdout_files": named["holdout"]}
    return Source(str(root), tuple(files), details | asdict(reading), reading=reading, passed_over=passed_over)


def fetched_source(
    name: str, validation: list[Path], training: list[Path], details: dict, reading: Reading | None = None
) -> Source:
    """Downloaded shards. Without any for validation a hash of the text decides, as everywhere."""
    files = [SourceFile(path, "val", path.name) for path in validation]
    files += [SourceFile(path, None, path.name) for path in training]
    return Source(name, tuple(files), details, reading=reading or Reading())


def split_named(path: Path, trains: set[tuple[Path, str]]) -> str | None:
    """val or holdout, where the path below the source's root says so.

    A name does that begins with val, valid, validation or test as a whole word: no letter follows it. The file's own
    counts before those of its folders. Also one that has the word later, and begins as a file beside it which has
    train in its place: those are in `trains`, by folder and beginning.
    """
    for name in (path, *path.parents):
        match = _WORD.match(name.name.lower())
        split = match and _SPLIT_OF_WORD[match[2]]
        if split in ("val", "holdout") and (not match[1] or (name is path and (path.parent, match[1]) in trains)):
            return split
    return None


def _named(paths: list[Path], root: Path, passed_over: Skipped) -> list[SourceFile]:
    """Those of FORMATS, with their splits; the others are counted."""
    taken, others = [], Counter()
    for path in paths:
        form, _ = format_of(path)
        if re.fullmatch(DERIVED, path.name):
            passed_over["results of map and filter, cache-*.arrow (not read)"] += 1
        elif form in FORMATS:
            taken.append(path)
        else:
            others[_kind(path)] += 1
    common = [kind for kind, _ in others.most_common(NAMED_KINDS)]
    for kind, count in others.items():
        passed_over[f"{kind if kind in common else 'other'} files (not read)"] += count
    matches = [(path.parent, _WORD.match(path.name.lower())) for path in taken]
    trains = {(parent, match[1]) for parent, match in matches if match and match[2] == "train"}
    files = [SourceFile(root / path, split_named(path, trains), path.as_posix()) for path in taken]
    return sorted(files, key=lambda file: ("val", "holdout", None).index(file.split))


def _check_one_set(paths: list[Path], root: Path) -> None:
    """In the cache of the library `datasets` each revision and each configuration of a set has a folder of its own,
    with a dataset_info.json: read together they would be the same text more than once. What `save_to_disk` writes has a
    state.json too, and one folder a split."""
    folders = {path.parent for path in paths if path.name == "dataset_info.json"}
    sets = sorted(folders - {path.parent for path in paths if path.name == "state.json"})
    if len(sets) > 1:
        named = ", ".join(map(str, sets[:3])) + (", ..." if len(sets) > 3 else "")
        raise InputError(f"{root} holds {len(sets)} sets of the library datasets ({named}): name the folder of one of"
                         " them with --source")  # fmt: skip


def _kind(path: Path) -> str:
    """What a user would call a file: by its ending, with that of what is compressed; other where that is no word."""
    match = re.search(r"((\.[A-Za-z]\w{0,9})?\.(gz|zst|bz2|xz|zip|lz4)|\.\w{1,10})$", path.name.lower(), re.ASCII)
    return match[0] if match else "other"


def _check_of_use(reading: Reading, files: list[SourceFile]) -> None:
    formats = {format_of(file.path)[0] for file in files}
    if reading.separator == "":
        raise InputError("--separator is empty: it takes the text between two documents, such as '<|endoftext|>'")
    if not _is_text(reading.separator or "") or not _is_text(reading.text_column):
        raise InputError("--separator and --text-column take text in UTF-8")
    if reading.separator is not None and not formats & {*CUT_BY_SEPARATOR}:
        raise InputError(f"--separator cuts {' and '.join(CUT_BY_SEPARATOR)} and there are none: leave it out")
    if reading.text_column != Reading.text_column and not formats - {*CUT_BY_SEPARATOR}:
        raise InputError("--text-column is for .parquet, .arrow and .jsonl and there are none: leave it out")


def _is_text(given: str) -> bool:
    try:
        given.encode("utf-8")
        return True
    except UnicodeEncodeError:  # bytes of the command line that are none
        return False


def _formats() -> str:
    return f"{', '.join(FORMATS)} (the last three also as .gz or .zst)"


def _walk(root: Path, skip_folders: set[str], passed_over: Skipped) -> list[Path]:
    """Files below `root`, sorted by relative path; hidden files and folders are left out, and so are linked folders,
    and pipes, whose end would never come. Raises OSError where a folder cannot be read: none is silently missing."""

    def unreadable(error: OSError):
        raise error

    found = []
    for folder, names, files in os.walk(root, onerror=unreadable):
        names[:] = [name for name in names if name not in skip_folders and not name.startswith(".")]
        if linked := sum(os.path.islink(os.path.join(folder, name)) for name in names):
            passed_over["linked folders (not followed)"] += linked
        paths = [Path(folder, name) for name in files if not name.startswith(".")]
        pipes = [path for path in paths if path.is_fifo()]
        if pipes:
            passed_over["pipes (not read)"] += len(pipes)
        found += [path for path in paths if path not in pipes]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()
