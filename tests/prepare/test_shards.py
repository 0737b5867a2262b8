import errno
import json
import os
import re
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest

from prepare import Dataset, InputError, dataset, prepare, shards
from prepare.sources import folder_source
from prepare.words import command_line
from tests.helpers.prepare_corpus import VOCAB_SIZE, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"), 120)


@pytest.fixture
def folder(corpus, tmp_path):
    return prepare(str(corpus), tmp_path / "out", vocab_size=VOCAB_SIZE)


def texts_of(data, name):
    split = data.split(name)
    return [data.tokenizer.decode(split.document(i)) for i in range(split.num_documents)]


def test_every_document_arrives_in_its_split(corpus, folder):
    data = Dataset.open(folder)
    expected = {"train": [], "val": [], "holdout": []}
    for split, text in folder_source(corpus).documents():
        expected[split].append(text)
    for name, texts in expected.items():
        assert sorted(texts_of(data, name)) == sorted(texts)
        split = data.split(name)
        assert split.num_bytes == sum(len(text.encode()) for text in texts)
        assert split.num_documents == len(texts)
    assert texts_of(data, "train") != expected["train"]  # shuffled


def test_the_vocabulary_is_learned_from_the_train_split_alone(corpus, tmp_path):
    folder = tmp_path / "corpus"
    shutil.copytree(corpus, folder)
    fingerprints = set()
    for word in ("alpha", "zebra"):
        (folder / "val.txt").write_text(f"{word} " * 1_000)
        out = prepare(str(folder), tmp_path / word, vocab_size=VOCAB_SIZE)
        fingerprints.add(Dataset.open(out).tokenizer.fingerprint)
    assert len(fingerprints) == 1


def test_attributes(corpus, folder):
    data = Dataset.open(folder)
    assert (data.folder, data.source, data.vocab_size) == (folder, str(corpus), VOCAB_SIZE)
    train = data.split("train")
    tokens = np.concatenate([train.document(i) for i in range(train.num_documents)])
    assert tokens.dtype == np.uint16
    assert tokens.max() < data.tokenizer.bos  # documents are stored without it
    assert np.array_equal(data.token_counts, np.bincount(tokens, minlength=VOCAB_SIZE))
    assert data.token_bytes[tokens].sum() == train.num_bytes
    assert train.sha256 != data.split("val").sha256
    assert len(train.sha256) == 64
    assert data.manifest["seed"] == 0
    assert set(data.manifest["versions"]) >= {"tokenizers", "tiktoken"}
    with pytest.raises(InputError, match="no split 'test'"):
        data.split("test")


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}


@pytest.mark.parametrize("shard_bytes", [250_000_000, 5_000])
def test_same_seed_same_bytes(corpus, tmp_path, monkeypatch, shard_bytes):
    monkeypatch.setattr(shards, "SHARD_TEXT_BYTES", shard_bytes)
    monkeypatch.setattr("prepare.build.BATCH_CHARS", 3_000)
    folders = [prepare(str(corpus), tmp_path / f"{i}", VOCAB_SIZE, seed) for i, seed in enumerate((7, 7, 8))]
    one, two, other = map(files_of, folders)
    assert one == two
    assert one != other
    assert one["tokenizer.json"] == other["tokenizer.json"]  # the whole corpus is its sample
    num_shards = sum(name.startswith("train") and "offsets" not in name for name in one)
    assert num_shards == 1 if shard_bytes > 10**6 else num_shards > 5
    data = Dataset.open(folders[0])
    assert sorted(texts_of(data, "train")) == sorted(texts_of(Dataset.open(folders[2]), "train"))
    assert not list(folders[0].glob("*.bucket"))


def test_the_shuffle_is_uniform(tmp_path, monkeypatch):
    """Over many seeds each of four documents is found at each place equally often, with two buckets."""
    monkeypatch.setattr(shards, "SHARD_TEXT_BYTES", 10)
    places = np.zeros((4, 4))
    for seed in range(400):
        writer = shards.SplitWriter(tmp_path, "train", 20, np.random.default_rng(seed))
        writer.add([np.array([i], dtype=np.uint16) for i in range(2)])
        writer.add([np.array([i], dtype=np.uint16) for i in range(2, 4)])
        entry, _ = writer.finish(np.ones(4, dtype=np.int32))
        names = [record["name"] for record in entry["files"] if "offsets" not in record["name"]]
        places[np.arange(4), np.concatenate([np.load(tmp_path / name) for name in names])] += 1
    assert abs(places - 100).max() < 40  # 4.6 standard deviations


def test_more_text_than_was_estimated_makes_more_shards_and_no_larger_ones(tmp_path, monkeypatch):
    """As from a file of a few bytes that holds gigabytes: no shard, nor what is shuffled at a time, grows with it."""
    monkeypatch.setattr(shards, "SHARD_TEXT_BYTES", 1_000)
    lengths = [1 + i % 7 for i in range(3_000)]
    documents = [np.full(length, i, dtype=np.uint16) for i, length in enumerate(lengths)]
    shuffled = []
    original = shards.SplitWriter._shuffled
    monkeypatch.setattr(
        shards.SplitWriter, "_shuffled", lambda *args: shuffled.append(len(args[1])) or original(*args)
    )
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        writer = shards.SplitWriter(folder, "train", 1, np.random.default_rng(0))
        writer.add(documents)
        entry, counts = writer.finish(np.ones(len(documents), dtype=np.int32))
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert counts.tolist() == lengths
    assert entry["documents"] == len(documents)
    assert max(shuffled) <= 1_000
    assert len(entry["files"]) == len(shuffled) > 2 * 12
    assert not list((tmp_path / "a").glob("*.bucket"))
    split = dataset.Split(tmp_path / "a", "train", entry)
    found = [split.document(i) for i in range(split.num_documents)]
    assert sorted((int(d[0]), len(d)) for d in found) == list(enumerate(lengths))


def test_more_shards_than_a_shell_allows_open_files(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_TEXT_BYTES", 500)
    monkeypatch.setattr(dataset, "OTHER_FILES", 200)
    folder = prepare(str(corpus), tmp_path / "out", vocab_size=VOCAB_SIZE)
    count = sum(name.name[:3] in ("tra", "val") for name in folder.iterdir())
    assert count > 100
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = len(os.listdir("/dev/fd")) + 100
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, before[1]))
        data = Dataset.open(folder)
        assert len(data.split("train").files) + len(data.split("val").files) == count
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (50, 100))
    with pytest.raises(InputError, match=r"files to be held open, .* allows a process 100: raise .*ulimit -Hn"):
        Dataset.open(folder)


def test_one_document_larger_than_a_shard(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_TEXT_BYTES", 100)
    writer = shards.SplitWriter(tmp_path, "train", 1, np.random.default_rng(0))
    writer.add([np.zeros(5_000, dtype=np.uint16), np.ones(3, dtype=np.uint16)])
    entry, counts = writer.finish(np.ones(2, dtype=np.int32))
    assert counts.tolist() == [5_000, 3]
    assert dataset.Split(tmp_path, "train", entry).num_documents == 2


def test_an_existing_folder_is_replaced(corpus, folder):
    before = files_of(folder)
    prepare(str(corpus), folder, vocab_size=280)
    assert Dataset.open(folder).vocab_size == 280
    assert files_of(folder)["tokenizer.json"] != before["tokenizer.json"]
    assert os.listdir(folder.parent) == [folder.name]


def test_a_source_of_the_same_name_replaces_nothing_unasked(tmp_path, monkeypatch):
    monkeypatch.setenv("TIMEBOX_HOME", str(tmp_path / "home"))
    for parent in "ab":
        (tmp_path / parent / "texts").mkdir(parents=True)
        for i in range(40):
            (tmp_path / parent / "texts" / f"{i}.txt").write_text(f"{parent} text, number {i} of many " * 20)
    folder = prepare(str(tmp_path / "a" / "texts"), vocab_size=280)
    before = files_of(folder)
    with pytest.raises(InputError, match=r"home/texts was prepared from .*/a/texts: .* for .*/b/texts with --out"):
        prepare(str(tmp_path / "b" / "texts"), vocab_size=280)
    assert files_of(folder) == before
    assert prepare(str(tmp_path / "a" / "texts"), vocab_size=270) == folder
    assert prepare(str(tmp_path / "b" / "texts"), folder, vocab_size=280) == folder  # asked for by name


def test_a_folder_with_other_files_is_never_replaced(corpus, folder):
    (folder / "thesis.txt").write_text("ten years of work")
    with pytest.raises(InputError, match=r"thesis\.txt.*--out"):
        prepare(str(corpus), folder, vocab_size=280)
    assert (folder / "thesis.txt").exists()
    with pytest.raises(InputError, match="--out"):
        prepare(str(corpus), corpus, vocab_size=280)


def test_save_array_writes_what_np_save_writes(tmp_path):
    for values in (np.arange(7, dtype=np.uint16), np.arange(5), np.zeros(0, dtype=np.int64)):
        np.save(tmp_path / "a.npy", values)
        shards.save_array(tmp_path / "b.npy", values)
        assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full, a disk that is always full, is Linux's")
def test_save_array_says_that_the_disk_is_full():
    with pytest.raises(OSError, match="No space left") as caught:
        shards.save_array(Path("/dev/full"), np.zeros(10**6))
    assert caught.value.errno == errno.ENOSPC


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["train_00000.npy", "val_00000.npy", "val_00000_offsets.npy", "token_counts.npy"])
def test_a_changed_shard_is_found_at_the_start(folder, name):
    flip_a_byte(folder / name)
    with pytest.raises(InputError, match=rf"{name} has changed since it was prepared .*SHA-256"):
        Dataset.open(folder)
    if "offsets" not in name:  # which are looked at in any case: nothing is ever read beside a shard
        Dataset.open(folder, verify=False)
    (folder / name).unlink()
    with pytest.raises(InputError, match=rf"{name} is missing"):
        Dataset.open(folder)


@pytest.mark.parametrize("name", ["val_00000.npy", "train_00000.npy"])
def test_a_changed_shard_is_found_though_size_and_mtime_are_the_old(folder, name):
    path = folder / name
    stat = path.stat()
    flip_a_byte(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(InputError, match="SHA-256"):
        Dataset.open(folder)


def test_the_holdout_is_read_and_checked_only_when_asked_for(folder):
    flip_a_byte(folder / "holdout_00000.npy")
    data = Dataset.open(folder)
    data.split("train"), data.split("val")
    with pytest.raises(InputError, match="holdout_00000"):
        data.split("holdout")


def test_train_shards_are_hashed_once_after_a_copy(folder, monkeypatch):
    hashed = []
    original = dataset._check_hash
    monkeypatch.setattr(dataset, "ALWAYS_HASHED", 0)  # a corpus of any size is a large one
    monkeypatch.setattr(dataset, "_check_hash", lambda *args: hashed.append(args[1].name) or original(*args))

    def opened():
        hashed.clear()
        Dataset.open(folder)
        return [name for name in hashed if name.startswith("train")]

    assert opened() == []
    os.utime(folder / "train_00000.npy")
    assert opened() == ["train_00000.npy"]
    assert opened() == []
    (folder / "verified.json").write_text("broken")
    assert opened() == ["train_00000.npy"]
    os.utime(folder / "train_00000.npy", ns=(1, 1))
    monkeypatch.setattr(dataset, "write_json", lambda *_: (_ for _ in ()).throw(PermissionError("read-only")))
    assert opened() == opened() == ["train_00000.npy"]


def taken(data) -> tuple:
    """All that a run takes from an opened folder."""
    texts = [texts_of(data, name) for name in ("train", "val")]
    hashes = [data.split(name).sha256 for name in ("train", "val")]
    return texts, hashes, data.token_counts.tolist(), data.tokenizer_file, data.tokenizer.encode("the rows")


@pytest.mark.parametrize("becomes", ["prepared anew", "removed", "moved"])
def test_what_was_opened_stays_whatever_becomes_of_the_folder(corpus, folder, tmp_path, becomes):
    expected = taken(Dataset.open(folder))
    data = Dataset.open(folder)
    assert not data.was_replaced()
    if becomes == "prepared anew":
        prepare(str(corpus), folder, vocab_size=280, seed=1)
        assert taken(Dataset.open(folder)) != expected
    elif becomes == "removed":
        shutil.rmtree(folder)
    else:
        folder.rename(tmp_path / "elsewhere")
    assert taken(data) == expected
    assert data.was_replaced()
    data.check_unchanged()


@pytest.mark.parametrize("name", ["train_00000.npy", "val_00000.npy", "val_00000_offsets.npy", "token_counts.npy"])
@pytest.mark.parametrize("damage", [flip_a_byte, lambda path: os.truncate(path, 130)], ids=["a bit", "cut"])
def test_a_file_that_is_written_to_while_it_is_open(folder, name, damage):
    data = Dataset.open(folder)
    data.check_unchanged()
    damage(folder / name)
    with pytest.raises(InputError, match=rf"{name} has changed since it was prepared"):
        data.check_unchanged()


def test_a_large_train_shard_that_is_written_to_while_it_is_open(folder, monkeypatch):
    monkeypatch.setattr(dataset, "ALWAYS_HASHED", 0)
    data = Dataset.open(folder)
    stat = (folder / "train_00000.npy").stat()
    flip_a_byte(folder / "train_00000.npy")
    os.utime(folder / "train_00000.npy", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    data.check_unchanged()  # by size and mtime, and so it is written in the README
    os.utime(folder / "train_00000.npy", ns=(1, 1))
    with pytest.raises(InputError, match=r"train_00000.npy has changed"):
        data.check_unchanged()


def test_a_tokenizer_the_shards_were_not_made_with(folder, tmp_path):
    corpus_of_others = write_corpus(tmp_path / "corpus", 40)
    other = prepare(str(corpus_of_others), tmp_path / "other", vocab_size=VOCAB_SIZE)
    (folder / "tokenizer.json").write_bytes((other / "tokenizer.json").read_bytes())
    with pytest.raises(InputError, match="not the tokenizer the shards were made with"):
        Dataset.open(folder)


@pytest.mark.parametrize("content", ["{", "[]", "{}", "\x00\xff", "[" * 100_000, '{"a": 1, "a": 1}', "9" * 5000])
def test_a_manifest_that_is_none(folder, content):
    (folder / "manifest.json").write_text(content)
    with pytest.raises(InputError, match=rf"manifest\.json .*{re.escape(command_line('prepare'))}"):
        Dataset.open(folder)


def test_a_missing_or_later_manifest(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format": 2}))
    with pytest.raises(InputError, match="has format 2, this program reads 1"):
        Dataset.open(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(InputError, match="holds no prepared data"):
        Dataset.open(folder)
    with pytest.raises(InputError, match="holds no prepared data"):
        Dataset.open(folder / "nowhere")
    with pytest.raises(InputError, match="an empty path"):  # not the current folder
        Dataset.open("")
