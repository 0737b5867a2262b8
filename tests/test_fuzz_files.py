"""Every file that steers training or evaluation, cut and flipped: an InputError, or the very same result."""

import json
import os
import shutil

import pytest
from damage import COUNT, DATA_FILES, RUN_FILES, fuzz, read_data, read_run

from prepare import Dataset, InputError, Tokenizer, dataset
from prepare.files import SEAL, read_sealed


def test_no_file_is_forgotten(small_data, small_run):
    assert sorted(path.name for path in small_data.iterdir()) == sorted(DATA_FILES)
    assert {path.name for path in small_run.iterdir()} == {*RUN_FILES, "summary.json", "metrics.jsonl"}


@pytest.mark.parametrize("name", DATA_FILES)
def test_prepared_data(small_data, name):
    refused = fuzz(small_data / name, lambda: read_data(small_data))
    assert refused >= 1.9 * COUNT  # white space in the JSON means nothing


@pytest.mark.parametrize("name", ["train_00000.npy", "train_00000_offsets.npy"])
def test_a_large_corpus_whose_bits_rot(small_data, monkeypatch, name):
    """Where size and mtime are believed a token may be another one; but nothing is ever read beside the shard."""
    monkeypatch.setattr(dataset, "ALWAYS_HASHED", 0)
    assert fuzz(small_data / name, lambda: read_data(small_data), keep_mtime=True, exact=False) >= COUNT


def test_a_token_outside_the_vocabulary_is_never_trained_on(small_data, monkeypatch):
    monkeypatch.setattr(dataset, "ALWAYS_HASHED", 0)
    shard = small_data / "train_00000.npy"
    content, stat = shard.read_bytes(), shard.stat()
    shard.write_bytes(content[:128] + b"\xff" * (len(content) - 128))
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(InputError, match=r"hold token 65,535 and the vocabulary ends at 266.*touch"):
        read_data(small_data)
    shard.write_bytes(content)
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("name", ["manifest.json", "tokenizer.json"])
def test_what_only_others_vouch_for(small_data, tmp_path, name):
    """A manifest without its seal, a tokenizer without its hash: other content may pass, other errors may not."""
    copy = shutil.copytree(small_data, tmp_path / "copy")
    content = json.loads((copy / name).read_text())
    content.pop(SEAL, None)
    (copy / name).write_text(json.dumps(content))

    def read():
        return Tokenizer.load(copy / name).encode("the rows") if name == "tokenizer.json" else read_data(copy)

    assert fuzz(copy / name, read, exact=False) >= COUNT


def test_what_was_verified(small_data, monkeypatch):
    """verified.json spares hashing and nothing else: damaged, it is made anew."""
    monkeypatch.setattr(dataset, "ALWAYS_HASHED", 0)
    train_shard = small_data / "train_00000.npy"
    train_shard.touch()
    Dataset.open(small_data)
    assert fuzz(small_data / "verified.json", lambda: read_data(small_data)) == 0
    (small_data / "verified.json").unlink()


@pytest.mark.parametrize("name", RUN_FILES)
def test_a_finished_run(small_run, name):
    assert fuzz(small_run / name, lambda: read_run(small_run)) >= 1.8 * COUNT


def test_the_summary(small_run):
    path = small_run / "summary.json"
    assert fuzz(path, lambda: read_sealed(path, "train it again")) >= 1.8 * COUNT
