"""Reads a prepared folder, and checks that it is what its manifest says."""

import bisect
import contextlib
import hashlib
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np
from tqdm import tqdm

from .errors import InputError, readable_size
from .files import SEAL, read_json, seal_of, sha256_of
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

# Train shards that are hashed at every start, in bytes: half a second. Of more, those whose size or mtime has changed.
ALWAYS_HASHED = 250_000_000

_MEND = f"run `{command_line('prepare')}` again"


class Split:
    """The documents of one split, memory-mapped, as one stream of tokens without BOS.

    Shards are joined: document numbers and token positions run through all of them.
    """

    def __init__(self, folder: Path, name: str, entry: dict):
        self.name = name
        self.num_documents: int = entry["documents"]
        self.num_tokens: int = entry["tokens"]
        self.num_bytes: int = entry["bytes"]
        hashes = "".join(f"{record['name']} {record['sha256']}\n" for record in entry["files"])
        self.sha256 = hashlib.sha256(hashes.encode()).hexdigest()  # one fingerprint for all its files
        paths = [folder / record["name"] for record in entry["files"]]
        self._tokens = [_load_array(path, np.uint16) for path in paths if not path.stem.endswith("_offsets")]
        self._offsets = [_load_array(path, np.int64) for path in paths if path.stem.endswith("_offsets")]
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
    """A prepared folder. `open` it; the attributes are plain."""

    def __init__(self, folder: Path, manifest: dict, tokenizer: Tokenizer, *, verify: bool):
        self.folder = folder
        self.manifest = manifest
        self.tokenizer = tokenizer
        self.source: str = manifest["source"]
        self.vocab_size = tokenizer.vocab_size
        self.token_bytes = tokenizer.token_bytes
        self._verify = verify
        self._splits: dict[str, Split] = {}

    @classmethod
    def open(cls, folder: str | Path, *, verify: bool = True) -> "Dataset":
        """Reads the manifest and checks the files against it.

        Tokenizer and validation shards are hashed at every start; training shards too up to `ALWAYS_HASHED`, beyond
        it where their size or mtime is not the recorded one; holdout shards where they are read. Raises InputError
        where anything disagrees.
        """
        folder = expanded(folder)
        manifest = _read_manifest(folder)
        path = folder / TOKENIZER
        # Hashed before it is parsed: a pattern with a changed bit is no pattern to compile.
        if path.is_file() and sha256_of(path) != manifest["tokenizer_sha256"]:
            raise InputError(f"{path} is not the tokenizer the shards were made with; put that one back, or {_MEND}")
        tokenizer = Tokenizer.load(path)
        if tokenizer.vocab_size != manifest["vocab_size"]:
            raise InputError(f"{path} has {tokenizer.vocab_size} tokens, {MANIFEST} says otherwise; {_MEND}")
        dataset = cls(folder, manifest, tokenizer, verify=verify)
        if verify:
            _check_hashes(folder, [manifest["token_counts"], *manifest["splits"]["val"]["files"]])
            _check_changed(folder, manifest["splits"]["train"]["files"])
        return dataset

    @cached_property
    def token_counts(self) -> np.ndarray:
        """int64 [V]: how often each token occurs in the train split."""
        counts = np.array(_load_array(self.folder / TOKEN_COUNTS, np.int64))
        if len(counts) != self.vocab_size:
            raise InputError(f"{self.folder / TOKEN_COUNTS} has {len(counts)} counts, not {self.vocab_size}; {_MEND}")
        return counts

    def split(self, name: str) -> Split:
        """`train`, `val` or `holdout` (whose hashes are checked here, when it is first read)."""
        if name not in self.manifest["splits"]:
            raise InputError(f"{self.folder} has no split {name!r}, only {', '.join(self.manifest['splits'])}")
        if name not in self._splits:
            entry = self.manifest["splits"][name]
            if name == "holdout" and self._verify:
                _check_hashes(self.folder, entry["files"])
            self._splits[name] = Split(self.folder, name, entry)
        return self._splits[name]


def _read_manifest(folder: Path) -> dict:
    path = folder / MANIFEST
    if not path.exists():
        raise InputError(f"{folder} holds no prepared data ({MANIFEST} is missing): run `{command_line('prepare')}`")
    manifest = read_json(path, _MEND)
    if manifest.get("format", FORMAT_VERSION) != FORMAT_VERSION:
        raise InputError(f"{path} has format {manifest['format']!r}, this program reads {FORMAT_VERSION}; {_MEND}")
    if not _well_formed(manifest):
        raise InputError(f"{path} is not a manifest of prepared data; {_MEND}")
    # The first manifests had no seal: what was prepared then is read still.
    if manifest.get(SEAL, seal_of(manifest)) != seal_of(manifest):
        raise InputError(f"{path} has changed since it was prepared (its {SEAL} disagrees); {_MEND}")
    return manifest


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


def _load_array(path: Path, dtype: type) -> np.ndarray:
    """Memory-mapped. A plain array over the map, since each slice of a np.memmap costs microseconds."""
    if not path.is_file():
        raise InputError(f"{path} is missing; {_MEND}")
    try:
        # np.load would take zip archives and pickles too.
        values = np.lib.format.open_memmap(path, mode="r")
    except Exception as e:  # numpy's parser of a damaged header knows many kinds
        raise InputError(f"{path} is not a token shard ({(str(e).splitlines() or [''])[0]}); {_MEND}") from e
    if values.dtype != dtype or values.ndim != 1:
        raise InputError(f"{path} holds {values.dtype} {values.shape}, not a row of {np.dtype(dtype)}; {_MEND}")
    return np.asarray(values)


def _check_hashes(folder: Path, records: list[dict]) -> None:
    for record in records:
        path = folder / record["name"]
        if not path.is_file():
            raise InputError(f"{path} is missing; {_MEND}")
        if sha256_of(path) != record["sha256"]:
            raise InputError(f"{path} has changed since it was prepared (SHA-256 disagrees with {MANIFEST}); {_MEND}")


def _check_changed(folder: Path, records: list[dict]) -> None:
    """Hashes all files up to `ALWAYS_HASHED`; beyond it those whose size or mtime is neither that of the manifest nor
    that of an earlier check of this folder. There a bit that the disk itself has turned is not noticed."""
    if sum(record["size"] for record in records) <= ALWAYS_HASHED:
        return _check_hashes(folder, records)
    verified = _read_verified(folder)
    changed = [record for record in records if not _unchanged(folder, record, verified)]
    if not changed:
        return
    what = f"checking {readable_size(sum(record['size'] for record in changed))} of train shards"
    for record in tqdm(changed, desc=what, unit="file", disable=None, leave=False):
        _check_hashes(folder, [record])
        stat = (folder / record["name"]).stat()
        verified[record["name"]] = [stat.st_size, stat.st_mtime_ns, record["sha256"]]
    with contextlib.suppress(OSError):  # a folder that cannot be written to is hashed at every start
        write_json(folder / VERIFIED, verified)


def _unchanged(folder: Path, record: dict, verified: dict) -> bool:
    try:
        stat = (folder / record["name"]).stat()
    except OSError:
        return False
    now = [stat.st_size, stat.st_mtime_ns, record["sha256"]]
    return now in ([record["size"], record["mtime_ns"], record["sha256"]], verified.get(record["name"]))


def _read_verified(folder: Path) -> dict:
    try:
        return read_json(folder / VERIFIED, _MEND)
    except InputError:  # missing or damaged: everything is hashed again
        return {}
