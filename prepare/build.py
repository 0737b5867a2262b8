"""`prepare`: a source becomes one folder that training reads."""

import random
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
from tqdm import tqdm

from . import hub
from .download import CLIMBMIX_URL, DEFAULT_SHARDS, fetch_climbmix
from .errors import InputError, bad_path_is_input_error, full_disk_is_input_error
from .files import read_json, sealed
from .home import BUILT_IN_SOURCES, DEFAULT_SOURCE, default_folder, downloads_folder, expanded
from .readers import Reading, Skipped
from .shards import (
    FORMAT_VERSION,
    MANIFEST,
    SPLITS,
    TOKEN_COUNTS,
    TOKENIZER,
    SplitWriter,
    building,
    check_replaceable,
    file_record,
    save_array,
    write_json,
)
from .sources import Source, counted, fetched_source, folder_source, stdlib_source
from .tokenizer import MAX_TRAIN_CHARS, TRAIN_BYTES, Tokenizer, check_vocab_size
from .words import command_line, printable

DEFAULT_VOCAB_SIZE = 8192
SMALL_TRAIN_SHARE = 0.5  # of the text: with less than that, it says so
BATCH_CHARS = 8_000_000  # text encoded at a time: enough to keep many cores busy, little enough to hold


def prepare(
    source: str = DEFAULT_SOURCE,
    out: str | Path | None = None,
    vocab_size: int | None = None,
    seed: int = 0,
    shards: int | None = None,
    base_url: str | None = None,
    tokenizer: str | Path | None = None,
    text_column: str = Reading.text_column,
    separator: str | None = None,
    skip_bad: bool = False,
) -> Path:
    """Writes tokenizer, shards and manifest of `source` to `out` and returns it; raises InputError.

    `source` is one of `BUILT_IN_SOURCES`, a folder or a file. `shards` and `base_url` matter to those that are fetched,
    and None is the default of each; `Reading` describes `text_column`, `separator` and `skip_bad`. The vocabulary is
    learned from the text, or is that of `tokenizer`: another prepared folder, or its tokenizer.json. The same text,
    seed and library versions give the same bytes. A folder already there is replaced at the end, and kept on failure;
    where `out` is not given, only one that was prepared from the same source.
    """
    check_vocab_size(DEFAULT_VOCAB_SIZE if vocab_size is None else vocab_size)
    if seed < 0:
        raise InputError(f"--seed is {seed}: it takes 0 or more")
    for option, path in (("--source", source), ("--out", out), ("--tokenizer", tokenizer)):
        if path is not None and not str(path):  # else it would be the current folder
            raise InputError(f"{option} is empty: name a path, or leave it out")
    folder = default_folder(source) if out is None else expanded(out).absolute()
    with bad_path_is_input_error():
        check_replaceable(folder)
        given = None if tokenizer is None else _given_tokenizer(expanded(tokenizer), vocab_size)
        text = open_source(source, Reading(text_column, separator, skip_bad), shards=shards, base_url=base_url)
        if out is None:
            _check_same_source(folder, text)
        _build(text, folder, given, vocab_size or DEFAULT_VOCAB_SIZE, seed)
    return folder


def _given_tokenizer(path: Path, vocab_size: int | None) -> Tokenizer:
    """Of a prepared folder, whose manifest vouches for it, or of a file."""
    mend = "name a prepared folder, or its tokenizer.json, with --tokenizer"
    tokenizer = Tokenizer.load(path / TOKENIZER if path.is_dir() else path, mend)
    manifest = read_json(path / MANIFEST, mend) if (path / MANIFEST).is_file() else {}
    if manifest.get("tokenizer_sha256", tokenizer.fingerprint) != tokenizer.fingerprint:
        raise InputError(f"{path / TOKENIZER} is not the tokenizer its shards were made with: {mend}")
    if vocab_size not in (None, tokenizer.vocab_size):
        raise InputError(
            f"the tokenizer of {path} has {tokenizer.vocab_size:,} tokens and --vocab-size is {vocab_size:,}: "
            "leave --vocab-size out"
        )
    return tokenizer


def _check_same_source(folder: Path, text: Source) -> None:
    """Raises InputError where `folder` holds another source of the same base name: runs may have been trained on it."""
    if (folder / MANIFEST).exists():
        there = read_json(folder / MANIFEST, "remove that folder, or name another with --out").get("source")
        if there != text.name:
            raise InputError(f"{folder} was prepared from {there}: name another folder for {text.name} with --out")


def _build(text: Source, out: Path, tokenizer: Tokenizer | None, vocab_size: int, seed: int) -> None:
    # Tokens are 2 bytes for at least 2 bytes of text, in all but the smallest vocabularies.
    with full_disk_is_input_error(_existing(out), text.estimated_bytes), building(out) as folder:
        origin = "learned" if tokenizer is None else "given"
        tokenizer = tokenizer or Tokenizer.train(_sample(text, seed), vocab_size)
        tokenizer.save(folder / TOKENIZER)
        skipped = Skipped(text.passed_over)
        splits, train_counts = _write_splits(folder, text, tokenizer, seed, skipped)
        save_array(folder / TOKEN_COUNTS, train_counts)
        manifest = {
            "format": FORMAT_VERSION,
            "source": text.name,
            "details": text.details,
            "seed": seed,
            "vocab_size": tokenizer.vocab_size,
            "tokenizer": origin,
            "tokenizer_sha256": tokenizer.fingerprint,
            "token_counts": file_record(folder / TOKEN_COUNTS),
            "splits": splits,
            "skipped": dict(skipped),
            "versions": {name: version(name) for name in ("numpy", "pyarrow", "tiktoken", "tokenizers")},
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        write_json(folder / MANIFEST, sealed(manifest))


def open_source(
    source: str, reading: Reading | None = None, *, shards: int | None = None, base_url: str | None = None
) -> Source:
    """Finds the files of a source, which are downloaded first where it is served somewhere. Raises InputError."""
    check_reading(source, reading)
    if source == "stdlib":
        return stdlib_source()
    if source == "climbmix":
        shards, base_url = DEFAULT_SHARDS if shards is None else shards, base_url or CLIMBMIX_URL
        *training, validation = fetch_climbmix(shards, base_url, downloads_folder(source))
        return fetched_source(source, [validation], training, {"shards": shards, "base_url": base_url})
    if source in hub.CORPORA:
        chosen = hub.choose(source, shards, base_url)
        corpus, (validation, training) = chosen.corpus, hub.fetch(chosen)
        details = {"shards": len(training), "repo": corpus.repo, "revision": corpus.revision, "license": corpus.license}
        return fetched_source(source, validation, training, details, Reading(corpus.text_column))
    return folder_source(source, reading)


def check_reading(source: str, reading: Reading | None) -> None:
    if source in BUILT_IN_SOURCES and reading not in (None, Reading()):
        raise InputError("--text-column, --separator and --skip-bad are for a folder or a file: leave them out")


def summary(manifest: dict, folder: Path) -> str:
    """The lines that `python -m prepare` ends with."""
    lines = []
    for name, split in manifest["splits"].items():
        lines.append(
            f"{name + ':':<9}{split['documents']:>10,} documents {split['tokens']:>15,} tokens "
            f"{split['bytes'] / split['tokens']:>6.2f} bytes per token"
        )
    details = manifest["details"]
    if named := details.get("validation_files", 0) + details.get("holdout_files", 0):
        lines.append(
            f"{'names:':<9}{named} of {details['files']} files are for evaluation by their names: "
            f"{details['validation_files']} val, {details['holdout_files']} holdout (test)"
        )
    lines.append(f"{'skipped:':<9}{counted(manifest['skipped']) or 'nothing'}")
    num_bytes = {name: split["bytes"] for name, split in manifest["splits"].items()}
    if (share := num_bytes["train"] / sum(num_bytes.values())) < SMALL_TRAIN_SHARE:
        lines.append(
            f"{'note:':<9}only {share:.0%} of the text is for training: give more documents, cut them with --separator,"
            " or hold fewer files out by their names"
        )
    lines.append(f"{'where:':<9}{printable(folder)}")
    lines.append(f"{'next:':<9}{command_line('train', '--data', folder)}")
    return "\n".join(lines)


def _sample(source: Source, seed: int) -> Iterator[str]:
    """Train documents to learn the vocabulary from: a random part of the whole corpus, however its files are ordered.

    Long documents count as the tokenizer's trainer counts them, so the part is drawn a little too large and cut there.
    """
    share = 1.25 * TRAIN_BYTES / max(1, source.estimated_bytes)
    rng = random.Random(seed)
    with _bar(min(TRAIN_BYTES, source.estimated_bytes), "learning the vocabulary") as bar:
        for split, text in source.documents():
            if split == "train" and rng.random() < share:
                yield text
                bar.update(len(text[:MAX_TRAIN_CHARS].encode("utf-8")))


def _write_splits(
    folder: Path, source: Source, tokenizer: Tokenizer, seed: int, skipped: Skipped
) -> tuple[dict[str, dict], np.ndarray]:
    """Tokenises every document into its split's shards; returns the manifest's `splits` and the train token counts."""
    seeds = np.random.SeedSequence(seed).spawn(len(SPLITS))
    writers = {
        name: SplitWriter(folder, name, source.estimated_split_bytes[name], np.random.default_rng(child))
        for name, child in zip(SPLITS, seeds, strict=True)
    }
    num_bytes = dict.fromkeys(SPLITS, 0)
    with _bar(source.estimated_bytes, "tokenising") as bar:
        for batch in _batches(source.documents(skipped)):
            encoded = tokenizer.encode_batch([text for _, text in batch])
            for name, writer in writers.items():
                writer.add([tokens for (split, _), tokens in zip(batch, encoded, strict=True) if split == name])
            before = sum(num_bytes.values())
            for split, text in batch:
                num_bytes[split] += len(text.encode("utf-8"))
            bar.update(sum(num_bytes.values()) - before)
    finished = {name: writer.finish(tokenizer.token_bytes) for name, writer in writers.items()}
    for name, (entry, _) in finished.items():
        if entry["bytes"] != num_bytes[name]:  # bits per byte would be wrong
            raise RuntimeError(f"the {name} tokens spell {entry['bytes']} bytes, the text has {num_bytes[name]}")
    return {name: entry for name, (entry, _) in finished.items()}, finished["train"][1]


def _batches(documents: Iterator[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    batch, chars = [], 0
    for split, text in documents:
        batch.append((split, text))
        chars += len(text)
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _bar(total: int, what: str) -> tqdm:
    """In bytes of text, on stderr; quiet where that is no terminal."""
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=None, leave=False)


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.exists())
