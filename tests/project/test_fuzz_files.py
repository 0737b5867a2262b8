"""Every file that steers training or evaluation, cut and flipped: an InputError, or the very same result."""

import json
import os
import shutil

import pytest

from prepare import Dataset, InputError, Tokenizer, dataset
from prepare.files import SEAL, read_sealed
from tests.helpers.damage import (
    CHECKPOINT_FILES,
    COUNT,
    DATA_FILES,
    RUN_FILES,
    damaged,
    fuzz,
    read_checkpoint,
    read_data,
    read_run,
)
from train.config import parse_given
from train.resilience.resume import parse
from train.results.run_folder import RunFolder


def test_no_file_is_forgotten(small_data, small_run):
    assert sorted(path.name for path in small_data.iterdir()) == sorted(DATA_FILES)
    assert {path.name for path in small_run.iterdir()} == {
        *RUN_FILES, "summary.json", "metrics.jsonl", "curves.png", "checkpoints", "changes.diff", "sample.txt",
    }  # fmt: skip
    (checkpoint,) = (small_run / "checkpoints").iterdir()
    assert {path.name for path in checkpoint.iterdir()} == set(CHECKPOINT_FILES)


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


@pytest.mark.parametrize("name", CHECKPOINT_FILES)
def test_a_checkpoint(small_run, name):
    (checkpoint,) = (small_run / "checkpoints").iterdir()
    assert fuzz(checkpoint / name, lambda: read_checkpoint(small_run)) >= 1.8 * COUNT


def test_the_configuration_of_a_run_that_goes_on(small_run):
    """A changed value passes here: `run` compares each with those in the checkpoint, and names it."""
    assert parse_given(["--resume", str(small_run)]) == {"resume": str(small_run)}
    refused = fuzz(small_run / "config.json", lambda: parse(["--resume", str(small_run)]), exact=False)
    assert refused >= COUNT


def test_a_log_loses_the_damaged_line_and_no_other(tmp_path, monkeypatch):
    """Also where it is cut right before the end of a line, and another is appended."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # hundreds of them take their time
    lines = [json.dumps({"step": i, "loss": 5 / (i + 1), "epoch": 1}).encode() for i in range(12)]
    run, path = RunFolder(tmp_path / "run"), tmp_path / "run" / "metrics.jsonl"
    content = b"".join(line + b"\n" for line in lines)
    for done, bad in damaged(content, "metrics"):
        path.write_bytes(bad)
        run.cut_metrics(12)
        with path.open("ab") as log:
            log.write(b'{"step": 12}\n')
        left = path.read_bytes().split(b"\n")
        whole = [line for line in bad.split(b"\n") if line in lines]
        assert [line for line in left if line in lines] == whole, done
        assert left[-2:] == [b'{"step": 12}', b""], done
        assert len(left) <= len(lines) + 2, done
        assert all("step" in json.loads(line) for line in left[:-1]), done
