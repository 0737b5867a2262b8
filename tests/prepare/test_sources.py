import errno
import gzip
import json
import os
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prepare import InputError, default_folder, sources
from prepare.readers import Reading
from prepare.sources import folder_source, stdlib_source
from tests.helpers.prepare_corpus import write_corpus


def by_split(source) -> dict[str, list[str]]:
    splits = {"train": [], "val": [], "holdout": []}
    for split, text in source.documents():
        splits[split].append(text)
    return splits


def write_parquet(path, texts, **kwargs):
    pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), path, **kwargs)


def test_stdlib_is_the_running_pythons_own_with_its_tests():
    source = stdlib_source()
    keys = [file.key for file in source.files]
    assert keys == sorted(keys)
    assert {"os.py", "json/decoder.py"} <= set(keys)
    assert not [key for key in keys if "site-packages" in key or not key.endswith(".py")]
    skipped = Counter()
    splits = Counter(split for split, _ in source.documents(skipped))
    assert 0.01 < splits["val"] / splits.total() < 0.04
    assert splits["holdout"] > 0
    assert splits.total() + skipped.total() == len(keys)


def test_every_format_is_read_in_order(tmp_path):
    write_parquet(tmp_path / "b.parquet", ["p0", "p1", None, ""], row_group_size=2)
    lines = [json.dumps({"text": "j0", "id": 1}), "", json.dumps({"text": None}), json.dumps({"text": "j1\nü"})]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.txt").write_bytes("t0\r\né".encode())
    (tmp_path / "D.MD").write_text("# m0")
    (tmp_path / "notes.rst").write_text("not read")
    (tmp_path / ".hidden.txt").write_text("not read")
    (tmp_path / "empty.txt").write_text(" \n")
    skipped = Counter()
    assert [text for _, text in folder_source(tmp_path).documents(skipped)] == [
        *("# m0", "j0", "j1\nü", "p0", "p1", "t0\r\né")
    ]
    assert skipped == {"null rows": 2, "empty documents": 2}


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_string_types(tmp_path, kind):
    pq.write_table(pa.table({"text": pa.array(["a", "b", "c"]).cast(kind)}), tmp_path / "a.parquet")
    assert sorted(text for _, text in folder_source(tmp_path).documents()) == ["a", "b", "c"]


def test_files_named_val_are_the_validation(tmp_path):
    write_corpus(tmp_path, 30)
    (tmp_path / "val_00.jsonl").write_text('{"text": "v0"}\n{"text": "v1"}\n')
    (tmp_path / "validation.txt").write_text("v2")
    splits = by_split(folder_source(tmp_path))
    assert sorted(splits["val"]) == ["v0", "v1", "v2"]
    assert len(splits["train"]) + len(splits["holdout"]) == 30
    assert splits["holdout"]


VAL, HOLDOUT = "val", "holdout"


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("val.txt", VAL), ("VAL.md", VAL), ("val_00.jsonl", VAL), ("val-1.txt", VAL), ("val2.txt", VAL),
        ("valid.txt", VAL), ("validation-00000-of-00001.parquet", VAL), ("validation.jsonl.gz", VAL),
        ("values.md", None), ("valley.txt", None), ("validated.txt", None), ("valé.txt", None), ("interval.txt", None),
        ("test.txt", HOLDOUT), ("test-00000-of-00002.parquet", HOLDOUT), ("test_a.jsonl", HOLDOUT),
        ("testing.md", None), ("tests.md", None), ("testament.txt", None), ("how-to-test.md", None),
        ("cross_validation.md", None), ("train-00.parquet", None),
        ("validation/0.txt", VAL), ("data/test/0.parquet", HOLDOUT), ("tests/0.txt", None), ("train/0.txt", None),
        ("test/val.txt", VAL), ("values/test.txt", HOLDOUT),
        ("Stories-valid.txt", VAL), ("Stories-test.txt", HOLDOUT), ("c4-validation.00000-of-00008.jsonl", VAL),
        ("sub/Stories-valid.txt", None),
    ],
)  # fmt: skip
def test_the_split_that_a_name_says(tmp_path, name, split):
    for path in (tmp_path / name, tmp_path / "Stories-train.txt", tmp_path / "c4-train.00000-of-01024.jsonl"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    files = folder_source(tmp_path).files
    assert {file.key: file.split for file in files}[name] == split
    assert [file.split for file in files] == sorted((f.split for f in files), key=["val", "holdout", None].index)


@pytest.mark.parametrize("with_val", [False, True])
def test_files_named_test_are_held_out(tmp_path, with_val):
    write_corpus(tmp_path, 30)
    (tmp_path / "test-0.txt").write_text("t0")
    (tmp_path / "test-1.txt").write_bytes((tmp_path / "003.txt").read_bytes())
    if with_val:
        (tmp_path / "val.txt").write_text("v")
    source, skipped = folder_source(tmp_path), Counter()
    splits = Counter(split for split, _ in source.documents(skipped))
    assert splits["holdout"] == 2
    assert splits["val"] == 1
    assert splits["train"] == 29 - (not with_val)
    assert skipped == {"copies across splits": 1}
    assert source.details["holdout_files"] == 2
    assert sum(source.estimated_split_bytes.values()) == pytest.approx(source.estimated_bytes)


def test_only_named_files_beside_one_document(tmp_path):
    for name in ("val", "test", "a"):
        (tmp_path / f"{name}.txt").write_text(name)
    assert by_split(folder_source(tmp_path)) == {"train": ["a"], "val": ["val"], "holdout": ["test"]}


@pytest.mark.parametrize("trial", range(12))
@pytest.mark.parametrize("others", [2, 60])
def test_no_hash_takes_a_large_document_out_of_training(tmp_path, trial, others):
    """And its copies stay with it."""
    huge = f"{trial} " * 50_000
    for i in range(others):
        (tmp_path / f"{i}.txt").write_text(f"text {trial} {i} " * 20)
    (tmp_path / "a.txt").write_text(huge)
    (tmp_path / "z.jsonl").write_text(json.dumps({"text": huge}))
    splits = by_split(folder_source(tmp_path))
    assert splits["train"].count(huge) == 2
    assert splits["val"]
    assert splits["holdout"]


def test_no_hash_takes_a_large_document_out_of_a_large_corpus(tmp_path, monkeypatch):
    """Where not all documents are looked at first: by its share of the estimated text, though it has the least hash."""
    monkeypatch.setattr(sources, "SMALL_CORPUS", 20)
    digest = sources._digest
    monkeypatch.setattr(sources, "_digest", lambda text: bytes(16) if text[0] == "x" else digest(text))
    huge = "x" * 50_000
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in [*map(str, range(200)), huge]))
    splits = by_split(folder_source(tmp_path))
    assert huge in splits["train"]
    assert splits["val"]


def test_nothing_validated_is_trained_on(tmp_path):
    write_corpus(tmp_path, 30)
    (tmp_path / "val.txt").write_bytes((tmp_path / "003.txt").read_bytes())
    skipped = Counter()
    splits = Counter(split for split, _ in folder_source(tmp_path).documents(skipped))
    assert skipped["copies across splits"] == 1
    assert splits["val"] == 1
    assert splits.total() == 30


def test_the_text_decides_the_split_whatever_the_files_are_called(tmp_path):
    write_corpus(tmp_path / "a", 200)
    before = by_split(folder_source(tmp_path / "a"))
    for path in list((tmp_path / "a").iterdir()):
        path.rename(path.with_name(f"x{path.name}"))
    (tmp_path / "a" / "copy.txt").write_text(before["val"][0], encoding="utf-8")
    after = by_split(folder_source(tmp_path / "a"))
    assert set(after["val"]) == set(before["val"])
    assert set(after["train"]) == set(before["train"])


def test_shares(tmp_path):
    lines = [json.dumps({"text": f"document number {i}"}) for i in range(20_000)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    sizes = {split: len(texts) for split, texts in by_split(folder_source(tmp_path)).items()}
    assert sizes["val"] == pytest.approx(400, abs=60)
    assert sizes["holdout"] == pytest.approx(196, abs=45)


@pytest.mark.parametrize("with_val", [False, True])
@pytest.mark.parametrize("trial", range(25))
def test_three_documents_are_enough(tmp_path, trial, with_val):
    for i in range(3):
        (tmp_path / ("val.txt" if with_val and i == 0 else f"{i}.txt")).write_text(f"text {trial} {i}")
    splits = by_split(folder_source(tmp_path))
    assert [len(texts) for texts in splits.values()] == [1, 1, 1]


@pytest.mark.parametrize("hashes", [[1, 2, 3], [1, 2, 3, 2**64 - 1], [2**63, 2**63 + 1, 2**64 - 1], [0, 1, 2]])
def test_no_split_is_empty_whatever_the_hashes(tmp_path, monkeypatch, hashes):
    texts = [str(h) for h in hashes]
    monkeypatch.setattr(sources, "_digest", lambda text: int(text).to_bytes(8, "big") * 2)
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text)
    assert all(by_split(folder_source(tmp_path)).values())


def test_lone_surrogates_are_replaced_and_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text(r'{"text": "x\ud800y \ud83d\ude00"}' + '\n{"text": "b"}\n{"text": "c"}\n')
    skipped = Counter()
    texts = [text for _, text in folder_source(tmp_path).documents(skipped)]
    assert texts[0] == "x\ufffdy 😀"
    assert skipped.total() == 1


def test_a_pipe_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    os.mkfifo(tmp_path / "b.txt")
    source = folder_source(tmp_path)
    assert [file.path.name for file in source.files] == ["a.txt"]
    assert source.passed_over == {"pipes (not read)": 1}


def test_what_is_not_read_is_counted_by_its_kind(tmp_path):
    names = ["a.jsonl", "b.jsonl.gz", "b.json", "c.JSON", "d.csv", "e.jsonl.bz2", "f.parquet.zst", "g.tar.gz", "README",
             "h.a\x1b[31m", ".hidden.csv"]  # fmt: skip
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "linked").symlink_to(tmp_path.parent, target_is_directory=True)
    source = folder_source(tmp_path)
    assert [file.key for file in source.files] == ["a.jsonl", "b.jsonl.gz"]
    assert source.passed_over == {
        ".json files (not read)": 2, ".csv files (not read)": 1, ".jsonl.bz2 files (not read)": 1,
        ".parquet.zst files (not read)": 1, ".tar.gz files (not read)": 1, "other files (not read)": 2,
        "linked folders (not followed)": 1,
    }  # fmt: skip


def test_of_many_kinds_the_most_frequent_are_named(tmp_path):
    for i in range(20):
        (tmp_path / f"a.x{i}").touch()
    for name in ("a.txt", "a.csv", "b.csv", "no-suffix"):
        (tmp_path / name).touch()
    passed_over = folder_source(tmp_path).passed_over
    assert passed_over[".csv files (not read)"] == 2
    assert len(passed_over) == sources.NAMED_KINDS + 1
    assert passed_over.total() == 23


@pytest.mark.parametrize("name", ["stories.txt", "val.jsonl.gz", "test.md"])
def test_one_file_is_a_corpus(tmp_path, name):
    """Whatever its name says: there is nothing else to train on."""
    texts = [f"document {i}" for i in range(20)]
    lines = "\n".join(json.dumps({"text": text}) for text in texts)
    content = lines.encode() if "jsonl" in name else "|".join(texts).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    source = folder_source(tmp_path / name, Reading(separator=None if "jsonl" in name else "|"))
    assert sorted(text for _, text in source.documents()) == sorted(texts)
    assert all(by_split(source).values())
    assert source.name == str(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "reading", "line"),
    [
        ("a.txt", Reading(separator=""), "--separator is empty"),
        ("a.txt", Reading(separator="\udcff"), "--separator and --text-column take text in UTF-8"),
        ("a.jsonl", Reading(separator="|"), r"--separator cuts \.txt and \.md and there are none"),
        ("a.txt", Reading(text_column="body"), r"--text-column is for \.parquet, \.arrow and \.jsonl and there"),
        ("a.csv", Reading(), r"a\.csv is none of \.parquet, \.arrow, \.jsonl, \.txt, \.md"),
    ],
)
def test_what_would_be_of_no_use_is_refused(tmp_path, name, reading, line):
    (tmp_path / name).write_text("text")
    with pytest.raises(InputError, match=line):
        folder_source(tmp_path / name, reading)


def test_a_folder_that_cannot_be_read_is_not_passed_over(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "below").mkdir()
    listing = os.scandir

    def scandir(path):  # the tests may run as root, who can read all
        if Path(path).name == "below":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return listing(path)

    monkeypatch.setattr("os.scandir", scandir)
    with pytest.raises(PermissionError, match="below"):
        folder_source(tmp_path)


def test_a_home_that_is_not_known(monkeypatch):
    monkeypatch.setenv("TIMEBOX_HOME", "~no-such-user/timebox")
    with pytest.raises(InputError, match="~no-such-user"):
        default_folder()


def test_default_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("TIMEBOX_HOME", str(tmp_path))
    assert default_folder("stdlib") == default_folder() == tmp_path / "stdlib"
    assert default_folder(f"{tmp_path}/my books/") == tmp_path / "my books"
    assert default_folder("./stdlib") == tmp_path / "stdlib-folder"
    for name in ("a.stories.txt", "b.jsonl.gz"):
        (tmp_path / name).touch()
    assert default_folder(tmp_path / "a.stories.txt") == tmp_path / "a.stories"
    assert default_folder(tmp_path / "b.jsonl.gz") == tmp_path / "b"
    monkeypatch.delenv("TIMEBOX_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    assert default_folder("climbmix") == tmp_path / "me/.cache/timebox/climbmix"


def test_too_few_documents(tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text(f"only {i % 2} different")
    with pytest.raises(InputError, match="has 2 different documents, and at least 3"):
        list(folder_source(tmp_path).documents())
