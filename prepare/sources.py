"""Where text comes from, and which split each document belongs to.

A source is a list of files read one after another: the corpus is never in memory. Every pass over it gives the same
documents in the same order.
"""

import hashlib
import json
import os
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from .errors import InputError
from .files import library_path
from .home import expanded

VAL_SHARE = 0.02  # of all documents, where no file is named val*
HOLDOUT_SHARE = 0.01  # of the documents that are not validation
SMALL_CORPUS = 2_000  # documents; above it, the odds that a hash leaves a split empty are below one in 10⁸
BATCH_ROWS = 1_000  # Parquet rows decoded at a time
HASH_RANGE = 1 << 64

Skipped = Counter  # reason -> documents


class SourceFile(NamedTuple):
    path: Path
    validation: bool
    key: str  # relative path


@dataclass(frozen=True)
class Source:
    """Documents of some files. `details` goes into the manifest. Splits by path for `stdlib`, else by text."""

    name: str
    files: tuple[SourceFile, ...]
    details: dict
    split_by_path: bool = False

    @cached_property
    def estimated_bytes(self) -> int:
        """UTF-8 bytes of text, from file sizes and Parquet footers. Opens every Parquet file, so finds broken ones."""
        return sum(self._estimated_bytes_of(file) for file in self.files)

    @cached_property
    def estimated_split_bytes(self) -> dict[str, float]:
        val = sum(self._estimated_bytes_of(file) for file in self.files if file.validation)
        rest = self.estimated_bytes - val
        if not val:
            val, rest = VAL_SHARE * rest, (1 - VAL_SHARE) * rest
        return {"train": (1 - HOLDOUT_SHARE) * rest, "val": val, "holdout": HOLDOUT_SHARE * rest}

    @staticmethod
    def _estimated_bytes_of(file: SourceFile) -> int:
        return _parquet_bytes(file.path) if _suffix(file.path) == ".parquet" else file.path.stat().st_size

    def documents(self, skipped: Skipped | None = None) -> Iterator[tuple[str, str]]:
        """Yields (split, text). Counts into `skipped` what is left out, by reason.

        The hash of the text, where it decides, keeps copies of a document in one split. Where a path or a file's
        name decides, a copy of a document of another split is left out, so that nothing trained on is scored.
        """
        skipped = Skipped() if skipped is None else skipped
        _ = self._thresholds  # too few documents are an error even where no hash is ever asked for
        split_of: dict[bytes, str] = {}
        for file, text in self._texts(skipped):
            digest = _digest(text)
            split = "val" if file.validation else self._split(self._hash(file, digest))
            if split_of.get(digest, split) != split:
                skipped["copies across splits"] += 1
                continue
            if self.split_by_path or file.validation:
                split_of[digest] = split
            yield split, text

    def _texts(self, skipped: Skipped) -> Iterator[tuple[SourceFile, str]]:
        for file in self.files:
            for text in _READERS[_suffix(file.path)](file.path, skipped):
                if text is None:
                    skipped["null rows"] += 1
                elif not text or text.isspace():
                    skipped["empty documents"] += 1
                else:
                    yield file, text

    def _hash(self, file: SourceFile, text_digest: bytes) -> int:
        digest = _digest(file.key) if self.split_by_path else text_digest
        return int.from_bytes(digest[:8], "big")

    def _split(self, hashed: int) -> str:
        val_below, holdout_below = self._thresholds
        return "val" if hashed < val_below else "holdout" if hashed < holdout_below else "train"

    @cached_property
    def _thresholds(self) -> tuple[int, int]:
        """Hashes below the first are validation, below the second holdout.

        They are the shares above, raised where a small corpus has no document below them.
        """
        has_val_files = any(file.validation for file in self.files)
        hashes = set()
        for file, text in self._texts(Skipped()):
            if not file.validation:
                hashes.add(self._hash(file, _digest(text)))
            if len(hashes) >= SMALL_CORPUS:
                break
        smallest = sorted(hashes)
        needed = 2 if has_val_files else 3
        if len(smallest) < needed:
            beside = " beside the validation files" if has_val_files else ""
            raise InputError(
                f"{self.name} has {len(smallest)} different documents{beside}, and at least {needed} are needed "
                "for the splits: add documents, or cut the text into several files"
            )
        val_share = 0.0 if has_val_files else VAL_SHARE
        val_below = 0 if has_val_files else max(int(val_share * HASH_RANGE), smallest[0] + 1)
        first_after_val = next((h for h in smallest if h >= val_below), HASH_RANGE)
        holdout_below = max(val_below + int((1 - val_share) * HOLDOUT_SHARE * HASH_RANGE), first_after_val + 1)
        if smallest[-1] < holdout_below:  # nothing would be left for training
            val_below = 0 if has_val_files else smallest[0] + 1
            holdout_below = smallest[0 if has_val_files else 1] + 1
        return val_below, holdout_below


def stdlib_source() -> Source:
    """The running Python's own standard library, its tests included: about 32 MB of text that is always there."""
    root = Path(sysconfig.get_paths()["stdlib"])
    outside = {"site-packages", "dist-packages", "__pycache__"}
    files = [SourceFile(path, False, path.relative_to(root).as_posix()) for path in _walk(root, {".py"}, outside)]
    if not files:
        raise InputError(f"this Python has no standard library as text in {root}: pass a folder with --source")
    version = ".".join(map(str, sys.version_info[:3]))
    return Source("stdlib", tuple(files), {"python": version}, split_by_path=True)


def folder_source(folder: str | Path) -> Source:
    """Every `.parquet`, `.jsonl`, `.txt` and `.md` below `folder`; files named `val*` are validation, and first."""
    root = expanded(folder)
    if not root.is_dir():
        what = "is no folder" if root.exists() else "does not exist"
        raise InputError(f"{root} {what}: --source takes stdlib, climbmix or a folder with text")
    root = root.resolve()
    suffixes = set(_READERS) - {".py"}
    files = [
        SourceFile(path, path.name.startswith("val"), path.relative_to(root).as_posix())
        for path in _walk(root, suffixes, set())
    ]
    if not files:
        raise InputError(f"{root} has no text: put {', '.join(sorted(suffixes))} files there")
    files.sort(key=lambda file: not file.validation)
    return Source(str(root), tuple(files), {"files": len(files), "validation_files": sum(f.validation for f in files)})


def climbmix_source(paths: list[Path], details: dict) -> Source:
    """Downloaded shards, the last of them pinned for validation."""
    files = [SourceFile(path, i == len(paths) - 1, path.name) for i, path in enumerate(paths)]
    return Source("climbmix", (files[-1], *files[:-1]), details)


def _walk(root: Path, suffixes: set[str], skip_folders: set[str]) -> list[Path]:
    """Files below `root` with such a suffix, sorted by relative path; hidden files and folders are left out, and so are
    pipes, whose end would never come. Raises OSError where a folder cannot be read, rather than train without it."""

    def unreadable(error: OSError):
        raise error

    found = []
    for folder, names, files in os.walk(root, onerror=unreadable):
        names[:] = [name for name in names if name not in skip_folders and not name.startswith(".")]
        paths = [Path(folder, name) for name in files if not name.startswith(".")]
        found += [path for path in paths if _suffix(path) in suffixes and not path.is_fifo()]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _suffix(path: Path) -> str:
    return path.suffix.lower()


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()


def _read_python(path: Path, skipped: Skipped) -> Iterator[str | None]:
    """Skips what is no UTF-8: nobody can mend the standard library, and its tests hold such files on purpose."""
    try:
        yield path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        skipped["undecodable files"] += 1


def _read_text(path: Path, skipped: Skipped) -> Iterator[str | None]:
    try:
        yield path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as e:
        raise InputError(f"{path} is not UTF-8: bad byte at offset {e.start}; convert it, or take it out") from e


def _read_jsonl(path: Path, skipped: Skipped) -> Iterator[str | None]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as e:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
                raise InputError(f"{path}, line {number}: not JSON ({e}); mend or remove the line") from e
            if not isinstance(row, dict) or "text" not in row:
                raise InputError(f'{path}, line {number}: no "text" key; every line must be an object with one')
            text = row["text"]
            if text is not None and not isinstance(text, str):
                raise InputError(f'{path}, line {number}: "text" is {type(text).__name__}, not a string; mend the line')
            yield _without_lone_surrogates(text, skipped) if text else text


def _without_lone_surrogates(text: str, skipped: Skipped) -> str:
    r"""JSON can spell half a surrogate pair (`\ud800`), which no Unicode encoding can hold: it becomes U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        skipped["lone surrogates replaced, in documents kept"] += 1
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _open_parquet(path: Path) -> pq.ParquetFile:
    try:
        with library_path(path) as name:
            file = pq.ParquetFile(name)
    except (pa.ArrowException, OSError) as e:
        raise InputError(f"{path} is not a whole Parquet file ({_one_line(e)}): fetch or write it again") from e
    schema = file.schema_arrow
    if "text" not in schema.names:
        raise InputError(f"{path} has no column text, only {', '.join(schema.names) or 'none'}: rename the column")
    kind = schema.field("text").type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise InputError(f"{path}: the column text holds {kind}, not strings; convert it")
    return file


def _parquet_bytes(path: Path) -> int:
    """Uncompressed size of the column, from the footer."""
    with _open_parquet(path) as file:
        metadata = file.metadata
        column = next(i for i in range(metadata.num_columns) if metadata.schema.column(i).path == "text")
        groups = range(metadata.num_row_groups)
        return sum(metadata.row_group(i).column(column).total_uncompressed_size for i in groups)


def _read_parquet(path: Path, skipped: Skipped) -> Iterator[str | None]:
    with _open_parquet(path) as file:
        row = 0
        try:
            for batch in file.iter_batches(BATCH_ROWS, columns=["text"]):
                yield from batch.column(0).to_pylist()
                row += len(batch)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as e:
            raise InputError(f"{path} is broken after row {row} ({_one_line(e)}): fetch or write it again") from e


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


_READERS: dict[str, Callable[[Path, Skipped], Iterator[str | None]]] = {
    ".parquet": _read_parquet,
    ".jsonl": _read_jsonl,
    ".txt": _read_text,
    ".md": _read_text,
    ".py": _read_python,
}
