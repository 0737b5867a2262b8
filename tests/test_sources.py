import errno
import json
import os
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prepare_corpus import write_corpus

from prepare import InputError, default_folder, sources
from prepare.sources import folder_source, stdlib_source


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
    assert [file.path.name for file in folder_source(tmp_path).files] == ["a.txt"]


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
    monkeypatch.delenv("TIMEBOX_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    assert default_folder("climbmix") == tmp_path / "me/.cache/timebox/climbmix"


def test_too_few_documents(tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text(f"only {i % 2} different")
    with pytest.raises(InputError, match="has 2 different documents, and at least 3"):
        list(folder_source(tmp_path).documents())
