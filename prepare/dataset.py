"""Reads a prepared folder, and checks that it is what its manifest says."""

import bisect
import contextlib
import hashlib
import os
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from .errors import InputError
from .files import SEAL, parse_json, read_bytes, read_json, seal_of
from .home import expanded
from .shards import (
    FORMAT_VERSION,
    MANIFEST,
    OUR_FILES,
    SPLITS,
    TOKEN_COUNTS,
    TOKENIZER,
    VERIFIED,
    write_json,
)
from .tokenizer import Tokenizer
from .words import command_line

try:
    import resource
except ImportError:  # Windows has no such limits
    resource = None

# Train shards that are hashed at every start, in bytes: half a second. Of more, those whose size or mtime has changed.
ALWAYS_HASHED = 250_000_000

OTHER_FILES = 512  # that a process may want open besides

_MEND = f"run `{command_line('prepare')}` again"

# Whether a file is to be hashed that has this stat, and this record in the manifest.
MustHash = Callable[[os.stat_result, dict], bool]


class MappedArray:
    """A one-dimensional .npy file, memory-mapped: its content is there whatever becomes of its name and its folder.

    `values` is a plain array over the map, since each slice of a np.memmap costs microseconds. Raises InputError where
    the file is not what its `record` in the manifest says, as far as `must_hash` has it hashed, or no such array.
    """

    def __init__(self, path: Path, dtype: type, record: dict, must_hash: MustHash):
        self.path = path
        self.record = record
        if not path.is_file():  # nor a pipe, which would be waited for
            raise InputError(f"{path} is missing; {_MEND}")
        with path.open("rb") as file:
            self.stat = os.fstat(file.fileno())
            self.hashed = must_hash(self.stat, record)
            if self.hashed:
                _check_hash(file, path, record)
                file.seek(0)
            mapped = _map(file, path, dtype)
        self._map = mapped.base
        self.values = np.asarray(mapped)

    def check_unchanged(self) -> None:
        """Raises InputError where the file itself was written to; a file that has taken its name is another."""
        if self._map.size() != len(self._map) or hashlib.sha256(self._map).hexdigest() != self.record["sha256"]:
            raise InputError(_changed(self.path))

    def looks_unchanged(self) -> bool:
        """By size and mtime, as far as it is still there under its name."""
        try:
            now = self.path.stat()
        except OSError:
            return True
        same_file = os.path.samestat(now, self.stat)
        return not same_file or (now.st_size, now.st_mtime_ns) == (self.stat.st_size, self.stat.st_mtime_ns)


class Split:
    """The documents of one split, memory-mapped, as one stream of tokens without BOS.

    Shards are joined: document numbers and token positions run through all of them.
    """

    def __init__(self, folder: Path, name: str, entry: dict, must_hash: MustHash = lambda stat, record: False):
        self.name = name
        self.num_documents: int = entry["documents"]
        self.num_tokens: int = entry["tokens"]
        self.num_bytes: int = entry["bytes"]
        hashes = "".join(f"{record['name']} {record['sha256']}\n" for record in entry["files"])
        self.sha256 = hashlib.sha256(hashes.encode()).hexdigest()  # one fingerprint for all its files
        of_offsets = [Path(record["name"]).stem.endswith("_offsets") for record in entry["files"]]
        records = tqdm(entry["files"], desc=f"checking {name}", unit="file", delay=1, disable=None, leave=False)
        self.files = [
            MappedArray(folder / record["name"], np.int64 if offsets else np.uint16, record, must_hash)
            for record, offsets in zip(records, of_offsets, strict=True)
        ]
        self._tokens = [file.values for file, offsets in zip(self.files, of_offsets, strict=True) if not offsets]
        self._offsets = [file.values for file, offsets in zip(self.files, of_offsets, strict=True) if offsets]
        self._first_document = [0, *accumulate(len(offsets) - 1 for offsets in self._offsets)]
        self._first_token = [0, *accumulate(len(tokens) for tokens in self._tokens)]
        counts = (self._first_document[-1], self._first_token[-1])
        if counts != (self.num_documents, self.num_tokens) or not self._offsets_fit():
            raise InputError(f"{folder}: the {name} shards do not hold what {MANIFEST} says; {_MEND}")

    def _offsets_fit(self) -> bool:
        """Whether each shard's offsets rise from 0 to its number of tokens: no document lies outside it."""
        return len(self._offsets) == len(self._tokens) and all(
            len(offsets) and offsets[0] == 0 and offsets[-1] == len(tokens) and (offsets[1:] >= offsets[:-1]).all()
            for offsets, tokens in zip(self._offsets, self._tokens, strict=True)
        )

    def document(self, i: int) -> np.ndarray:
        """uint16 view of document `i`."""
        if not 0 <= i < self.num_documents:
            raise IndexError(f"document {i} of {self.num_documents}")
        shard = bisect.bisect_right(self._first_document, i) - 1
        start, stop = self._offsets[shard][i - self._first_document[shard] :][:2]
        return self._tokens[shard][start:stop]

    def document_bounds(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """int64 token positions where the documents [first, last) start and stop; last may exceed the split's end."""
        starts, stops = [], []
        for shard, offsets in enumerate(self._offsets):
            shift = self._first_document[shard]
            part = offsets[max(0, first - shift) : max(0, last - shift + 1)] + self._first_token[shard]
            starts.append(part[:-1])
            stops.append(part[1:])
        return np.concatenate(starts), np.concatenate(stops)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """uint16 view of the tokens at positions [start, stop), which must lie in one document."""
        shard = bisect.bisect_right(self._first_token, start) - 1
        shift = self._first_token[shard]
        return self._tokens[shard][start - shift : stop - shift]


class Dataset:
    """A prepared folder. `open` it; the attributes are plain.

    All that a run takes from it is held from then on: the folder may be prepared anew, moved or removed, and the run
    goes on with what it began with. The holdout alone is opened when it is asked for.

    token_counts: int64 [V], how often each token occurs in the train split.
    tokenizer_file: the bytes of tokenizer.json.
    """

    def __init__(self, folder: Path, *, verify: bool):
        """As `open`."""
        self.folder = folder
        self._verify = verify
        self._manifest_file, self.manifest = _read_manifest(folder)
        self.source: str = self.manifest["source"]
        path = folder / TOKENIZER
        self.tokenizer_file = read_bytes(path, _MEND)
        # Hashed before it is parsed: a pattern with a changed bit is no pattern to compile.
        if hashlib.sha256(self.tokenizer_file).hexdigest() != self.manifest["tokenizer_sha256"]:
            raise InputError(f"{path} is not the tokenizer the shards were made with; put that one back, or {_MEND}")
        self.tokenizer = Tokenizer.parse(self.tokenizer_file, path, _MEND)
        self.vocab_size = self.tokenizer.vocab_size
        self.token_bytes = self.tokenizer.token_bytes
        if self.vocab_size != self.manifest["vocab_size"]:
            raise InputError(f"{path} has {self.vocab_size} tokens, {MANIFEST} says otherwise; {_MEND}")
        _allow_open_files(folder, sum(len(split["files"]) for split in self.manifest["splits"].values()))
        path, record = folder / TOKEN_COUNTS, self.manifest["token_counts"]
        self._counts_file = MappedArray(path, np.int64, record, lambda *_: verify)
        self.token_counts = np.array(self._counts_file.values)
        if len(self.token_counts) != self.vocab_size:
            raise InputError(f"{path} has {len(self.token_counts)} counts, not {self.vocab_size}; {_MEND}")
        self._splits = {"val": self._open("val", lambda *_: verify), "train": self._open_train()}

    @classmethod
    def open(cls, folder: str | Path, *, verify: bool = True) -> "Dataset":
        """Reads the manifest and checks the files against it.

        Tokenizer and validation shards are hashed at every start; training shards too up to `ALWAYS_HASHED`, beyond
        it where their size or mtime is not the recorded one; holdout shards where they are read. Raises InputError
        where anything disagrees.
        """
        return cls(expanded(folder), verify=verify)

    def split(self, name: str) -> Split:
        """`train`, `val` or `holdout` (whose hashes are checked here, when it is first read)."""
        if name not in self.manifest["splits"]:
            raise InputError(f"{self.folder} has no split {name!r}, only {', '.join(self.manifest['splits'])}")
        if name not in self._splits:
            self._splits[name] = self._open(name, lambda *_: self._verify)
        return self._splits[name]

    def check_unchanged(self) -> None:
        """Raises InputError where a file that is held was written to since it was opened. Of train shards beyond
        `ALWAYS_HASHED`, those are hashed whose size or mtime has changed."""
        self._counts_file.check_unchanged()
        for name, split in self._splits.items():
            by_looks = name == "train" and _size(self.manifest["splits"][name]) > ALWAYS_HASHED
            for file in split.files:
                if not (by_looks and file.looks_unchanged()):
                    file.check_unchanged()

    def was_replaced(self) -> bool:
        """Whether the folder holds other data by now, or none."""
        try:
            return (self.folder / MANIFEST).read_bytes() != self._manifest_file
        except OSError:
            return True

    def _open(self, name: str, must_hash: MustHash) -> Split:
        return Split(self.folder, name, self.manifest["splits"][name], must_hash)

    def _open_train(self) -> Split:
        """All is hashed up to `ALWAYS_HASHED`; beyond it the files whose size or mtime is neither that of the manifest
        nor that of an earlier check of this folder. There a bit that the disk itself has turned is not noticed."""
        if not self._verify or _size(self.manifest["splits"]["train"]) <= ALWAYS_HASHED:
            return self._open("train", lambda *_: self._verify)
        verified = _read_verified(self.folder)

        def must_hash(stat: os.stat_result, record: dict) -> bool:
            manifests = [record["size"], record["mtime_ns"], record["sha256"]]
            return _looks(stat, record) not in (manifests, verified.get(record["name"]))

        split = self._open("train", must_hash)
        if hashed := {file.path.name: _looks(file.stat, file.record) for file in split.files if file.hashed}:
            with contextlib.suppress(OSError):  # a folder that cannot be written to is hashed at every start
                write_json(self.folder / VERIFIED, verified | hashed)
        return split


def _read_manifest(folder: Path) -> tuple[bytes, dict]:
    path = folder / MANIFEST
    if not path.exists():
        raise InputError(f"{folder} holds no prepared data ({MANIFEST} is missing): run `{command_line('prepare')}`")
    content = read_bytes(path, _MEND)
    manifest = parse_json(content, path, _MEND)
    if manifest.get("format", FORMAT_VERSION) != FORMAT_VERSION:
        raise InputError(f"{path} has format {manifest['format']!r}, this program reads {FORMAT_VERSION}; {_MEND}")
    if not _well_formed(manifest):
        raise InputError(f"{path} is not a manifest of prepared data; {_MEND}")
    # The first manifests had no seal: what was prepared then is read still.
    if manifest.get(SEAL, seal_of(manifest)) != seal_of(manifest):
        raise InputError(f"{path} has changed since it was prepared (its {SEAL} disagrees); {_MEND}")
    return content, manifest


def _well_formed(manifest: dict) -> bool:
    """Whether all that is read of a manifest is there and of its kind; its files are such as `prepare` writes."""
    try:
        splits = [manifest["splits"][name] for name in SPLITS]
        files = [manifest["token_counts"], *(record for split in splits for record in split["files"])]
        counts = [manifest["vocab_size"], *(split[key] for split in splits for key in ("documents", "tokens", "bytes"))]
        counts += [record["size"] for record in files]
        texts = [manifest["source"], manifest["tokenizer_sha256"], *(record["sha256"] for record in files)]
        return (
            all(type(count) is int and count >= 0 for count in counts)
            and all(type(text) is str for text in texts)
            and all(OUR_FILES.fullmatch(record["name"]) and type(record["mtime_ns"]) is int for record in files)
        )
    except (KeyError, TypeError):
        return False


def _allow_open_files(folder: Path, shards: int) -> None:
    """Each map keeps its file open: of a large corpus more than the 1,024 that a shell usually allows."""
    if resource is None:
        return
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = (float("inf") if limit == resource.RLIM_INFINITY else limit for limit in limits)
    if hard < shards:
        raise InputError(
            f"{folder} has {shards:,} files to be held open, and this system allows a process {hard:,}: raise that"
            " limit (ulimit -Hn), or prepare less text"
        )
    if (wanted := min(shards + OTHER_FILES, hard)) > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, limits[1]))


def _map(file: BinaryIO, path: Path, dtype: type) -> np.memmap:
    try:
        # np.load would take zip archives and pickles too.
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("another version of the format")
        shape, _, found = np.lib.format.read_array_header_1_0(file)
        if found == dtype and len(shape) == 1:
            return np.memmap(file, dtype, "r", file.tell(), shape)
    except Exception as e:  # numpy's parser of a damaged header knows many kinds
        raise InputError(f"{path} is not a token shard ({(str(e).splitlines() or [''])[0]}); {_MEND}") from e
    raise InputError(f"{path} holds {found} {shape}, not a row of {np.dtype(dtype)}; {_MEND}")


def _check_hash(file: BinaryIO, path: Path, record: dict) -> None:
    if hashlib.file_digest(file, "sha256").hexdigest() != record["sha256"]:
        raise InputError(_changed(path))


def _changed(path: Path) -> str:
    return f"{path} has changed since it was prepared (SHA-256 disagrees with {MANIFEST}); {_MEND}"


def _size(entry: dict) -> int:
    return sum(record["size"] for record in entry["files"])


def _looks(stat: os.stat_result, record: dict) -> list:
    return [stat.st_size, stat.st_mtime_ns, record["sha256"]]


def _read_verified(folder: Path) -> dict:
    try:
        return read_json(folder / VERIFIED, _MEND)
    except InputError:  # missing or damaged: everything is hashed again
        return {}
