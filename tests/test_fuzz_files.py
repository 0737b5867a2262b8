"""Every file that steers training or evaluation, cut and flipped: an InputError, or the very same result."""

import dataclasses
import json
import os
import shutil

import pytest
from fuzzing import COUNT, fuzz
from prepare_corpus import write_corpus

import train.__main__
from prepare import Dataset, InputError, Loader, Tokenizer, dataset, prepare
from prepare.files import SEAL, read_sealed
from train.runs import load_run
from train.tensors import digest

TINY = [
    "--device", "cpu", "--depth", "1", "--d-model", "32", "--head-dim", "16", "--seq-len", "16", "--no-autocast",
    "--device-batch-size", "2", "--total-batch-size", "32", "--untimed-steps", "0", "--steps", "2",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz")
    return prepare(str(write_corpus(path / "text", 25)), path / "data", vocab_size=270)


@pytest.fixture(scope="module")
def run(folder):
    path = folder.parent / "run"
    assert train.__main__.main([*TINY, "--data", str(folder), "--run-dir", str(path)]) == 0
    return path


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


DATA_FILES = [
    "manifest.json", "tokenizer.json", "token_counts.npy",
    *(f"{split}_00000{kind}.npy" for split in ("train", "val", "holdout") for kind in ("", "_offsets")),
]  # fmt: skip


def test_no_file_is_forgotten(folder, run):
    assert sorted(path.name for path in folder.iterdir()) == sorted(DATA_FILES)
    assert {path.name for path in run.iterdir()} == {*RUN_FILES, "summary.json", "metrics.jsonl"}


@pytest.mark.parametrize("name", DATA_FILES)
def test_prepared_data(folder, name):
    refused = fuzz(folder / name, lambda: read_data(folder))
    assert refused >= 1.9 * COUNT  # white space in the JSON means nothing


@pytest.mark.parametrize("name", ["train_00000.npy", "train_00000_offsets.npy"])
def test_a_large_corpus_whose_bits_rot(folder, monkeypatch, name):
    """Where size and mtime are believed a token may be another one; but nothing is ever read beside the shard."""
    monkeypatch.setattr(dataset, "ALWAYS_HASHED", 0)
    assert fuzz(folder / name, lambda: read_data(folder), keep_mtime=True, exact=False) >= COUNT


def test_a_token_outside_the_vocabulary_is_never_trained_on(folder, monkeypatch):
    monkeypatch.setattr(dataset, "ALWAYS_HASHED", 0)
    shard = folder / "train_00000.npy"
    content, stat = shard.read_bytes(), shard.stat()
    shard.write_bytes(content[:128] + b"\xff" * (len(content) - 128))
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(InputError, match=r"hold token 65,535 and the vocabulary ends at 266.*touch"):
        read_data(folder)
    shard.write_bytes(content)
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("name", ["manifest.json", "tokenizer.json"])
def test_what_only_others_vouch_for(folder, tmp_path, name):
    """A manifest without its seal, a tokenizer without its hash: other content may pass, other errors may not."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    content = json.loads((copy / name).read_text())
    content.pop(SEAL, None)
    (copy / name).write_text(json.dumps(content))

    def read():
        return Tokenizer.load(copy / name).encode("the rows") if name == "tokenizer.json" else read_data(copy)

    assert fuzz(copy / name, read, exact=False) >= COUNT


def test_what_was_verified(folder, monkeypatch):
    """verified.json spares hashing and nothing else: damaged, it is made anew."""
    monkeypatch.setattr(dataset, "ALWAYS_HASHED", 0)
    train_shard = folder / "train_00000.npy"
    train_shard.touch()
    Dataset.open(folder)
    assert fuzz(folder / "verified.json", lambda: read_data(folder)) == 0
    (folder / "verified.json").unlink()


RUN_FILES = ["config.json", "tokenizer.json", "model.safetensors"]


def read_run(run) -> tuple:
    model, tokenizer, saved = load_run(run)
    return digest(dict(model.state_dict())), dataclasses.asdict(model.config), tokenizer.fingerprint, saved


@pytest.mark.parametrize("name", RUN_FILES)
def test_a_finished_run(run, name):
    assert fuzz(run / name, lambda: read_run(run)) >= 1.8 * COUNT


def test_the_summary(run):
    assert fuzz(run / "summary.json", lambda: read_sealed(run / "summary.json", "train it again")) >= 1.8 * COUNT
