"""Small corpora for the tests of `prepare`: real enough for a few hundred merges, made in milliseconds."""

import random
from pathlib import Path

import numpy as np

from prepare.dataset import Split
from prepare.shards import file_record, save_array

VOCAB_SIZE = 300
BOS = 65_000  # in `make_split`, whose tokens are all smaller


def sentence(rng: random.Random, num_words: int) -> str:
    words = ["the", "loader", "packs", "rows", "naïve", "tokens", "of", "7", "128", "bytes,", "été", "and\n", "(again)"]
    return " ".join(rng.choice(words) + rng.choice(["", "s", "ing"]) for _ in range(num_words))


def write_corpus(folder: Path, num_documents: int = 60) -> Path:
    """A folder of .txt files of quite different lengths."""
    rng = random.Random(5)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(num_documents):
        text = f"document {i}\n" + sentence(rng, rng.choice([1, 5, 40, 300]))
        (folder / f"{i:03d}.txt").write_bytes(text.encode())
    return folder


def make_split(folder: Path, shards: list[list[int]], name: str = "train") -> Split:
    """A split of documents of these lengths; its token i is i % 60,000, so that each can be told apart."""
    folder.mkdir(parents=True, exist_ok=True)
    files, position = [], 0
    for number, lengths in enumerate(shards):
        tokens = np.arange(position, position + sum(lengths)) % 60_000
        position += sum(lengths)
        path = folder / f"{name}_{number:05d}.npy"
        offsets_path = folder / f"{name}_{number:05d}_offsets.npy"
        save_array(path, tokens.astype(np.uint16))
        save_array(offsets_path, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
        files += [file_record(path), file_record(offsets_path)]
    num_documents = sum(map(len, shards))
    return Split(folder, name, {"documents": num_documents, "tokens": position, "bytes": position, "files": files})
