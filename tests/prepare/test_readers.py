"""What one file holds: formats, compression, separators, columns, and what is bad in it."""

import gzip
import json
import tracemalloc
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prepare import InputError, readers
from prepare.readers import Reading, format_of

BOM = b"\xef\xbb\xbf"
PACK = {".gz": gzip.compress, ".zst": lambda content: pa.compress(content, "zstd", asbytes=True)}


def texts(path, **options) -> list[str | None]:
    return list(Reading(**options).texts(path, Counter()))


def jsonl(*rows, key: str = "text") -> bytes:
    return "".join(json.dumps({key: row}) + "\n" for row in rows).encode()


def written(path, content: bytes):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "b.jsonl.gz", "c.jsonl.zst"])
def test_a_bom_before_json_lines(tmp_path, name):
    content = BOM + jsonl("one") + BOM + jsonl("two")  # two files of it, concatenated
    path = written(tmp_path / name, PACK.get(name[-3:], PACK.get(name[-4:], bytes))(content))
    assert texts(path) == ["one", "two"]


@pytest.mark.parametrize("name", ["a.txt", "a.md"])
def test_a_bom_is_no_text(tmp_path, name):
    path = written(tmp_path / name, BOM + "é\ufeff".encode())
    assert texts(path) == ["é\ufeff"]  # the second is a character of the text
    assert texts(path, separator="|") == ["é\ufeff"]
    with pytest.raises(InputError, match="bad byte at offset 4;"):  # in the file, the mark counted
        texts(written(path, BOM + b"x\xff"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a.txt", (".txt", None)), ("a.TXT.GZ", (".txt", "gzip")), ("a.b.jsonl.zst", (".jsonl", "zstd")),
     ("a.parquet", (".parquet", None)), ("a.parquet.gz", (".gz", None)), ("a.gz", (".gz", None)),
     ("a.tar.gz", (".gz", None)), ("README", ("", None)), ("a.txt.bz2", (".bz2", None))],
)  # fmt: skip
def test_formats(tmp_path, name, expected):
    assert format_of(tmp_path / name) == expected


@pytest.mark.parametrize("suffix", PACK)
def test_compressed(tmp_path, suffix):
    lines = [f"line {i}, é" for i in range(50_000)]
    for name, content, expected in (
        ("a.txt", "\n".join(lines).encode(), ["\n".join(lines)]),
        ("a.md", b"# m", ["# m"]),
        ("a.jsonl", jsonl(*lines), lines),
    ):
        assert texts(written(tmp_path / (name + suffix), PACK[suffix](content))) == expected
    halves = [PACK[suffix](jsonl(*lines[:100])), PACK[suffix](jsonl(*lines[100:]))]  # as `cat` and pigz leave them
    assert texts(written(tmp_path / f"b.jsonl{suffix}", b"".join(halves))) == lines


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_broken_compressed_files(tmp_path, suffix, name):
    content = jsonl(*(f"line {i} {i * i % 997}" for i in range(2_000)))
    whole, path = PACK[suffix](content), tmp_path / (name + suffix)
    for bad in (whole[: len(whole) // 2], whole[:-1], whole[:5], content):
        path.write_bytes(bad)
        with pytest.raises(InputError, match=rf"{name}{suffix} is not a whole (gzip|zstd) file \(.+\): ") as caught:
            texts(path)
        assert "\n" not in str(caught.value)
        counted = Counter()
        read = list(Reading(skip_bad=True).texts(path, counted))
        assert counted.total() == 1
        assert read == [json.loads(line)["text"] for line in content.splitlines()][: len(read)]
        assert not read or name == "a.jsonl"  # a document is whole or left out


def test_a_path_that_cannot_be_read_is_no_broken_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        texts(tmp_path / "a.txt.gz")


@pytest.mark.parametrize("chunk", [1, 2, 7, 1 << 20])
@pytest.mark.parametrize("separator", ["<|end|>", "|", "\n\n", "aab", "é"])
def test_a_separator(tmp_path, monkeypatch, chunk, separator):
    """Wherever a file is cut while it is read."""
    monkeypatch.setattr(readers, "CHUNK", chunk)
    documents = ["one", "aa", "two\nlines, ü", f"x{separator[:-1]}y", "last"]
    path = written(tmp_path / "a.txt", separator.join(documents).encode())
    assert texts(path, separator=separator) == documents
    # A line of its own, at the very end too, and nothing between two of them.
    path.write_bytes(f"\none\r\n{separator}\r\n\n{separator}\ntwo\n{separator}\n".encode())
    assert [text for text in texts(path, separator=separator) if text] == ["one", "two"]


def test_a_separator_that_is_not_there(tmp_path):
    assert texts(written(tmp_path / "a.md", b"one\n"), separator="|") == ["one"]


def test_bytes_that_are_not_utf8_between_separators(tmp_path):
    path = written(tmp_path / "a.txt", b"one|tw\xff|three")
    with pytest.raises(InputError, match=r"not UTF-8: bad byte at offset 6;.*--skip-bad"):
        texts(path, separator="|")
    counted = Counter()
    assert list(Reading(separator="|", skip_bad=True).texts(path, counted)) == ["one", "three"]
    assert counted == {"documents that are not UTF-8": 1}


@pytest.mark.parametrize("suffix", ["", *PACK])
def test_a_large_file_is_never_held_as_a_whole(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(readers, "CHUNK", 1 << 12)
    content = b"a document of some forty bytes and more.|" * 100_000
    path = written(tmp_path / f"a.txt{suffix}", PACK.get(suffix, bytes)(content))
    tracemalloc.start()
    try:
        assert sum(1 for _ in Reading(separator="|").texts(path, Counter())) == 100_000
        assert tracemalloc.get_traced_memory()[1] < 500_000 < len(content) / 8
    finally:
        tracemalloc.stop()


def test_another_column(tmp_path):
    pq.write_table(pa.table({"text": ["no"], "body": ["yes"]}), tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet", text_column="body") == ["yes"]
    assert Reading(text_column="body").estimated_bytes(tmp_path / "a.parquet") > 0
    assert texts(written(tmp_path / "a.jsonl", jsonl("yes", key="body")), text_column="body") == ["yes"]
    with pytest.raises(InputError, match=r'line 1: no "text" key.* it has "body": name one with --text-column'):
        texts(tmp_path / "a.jsonl")
    with pytest.raises(InputError, match=r"no column main, only text, body: name one with --text-column"):
        texts(tmp_path / "a.parquet", text_column="main")


def test_bad_lines_are_skipped_with_a_count(tmp_path):
    lines = [b'{"text": "a"}', b"{", b'{"body": 1}', b"[]", b'{"text": 5}', b'{"text": "\xff"}', b'{"text": null}',
             b'{"text": "b"}']  # fmt: skip
    path, counted = written(tmp_path / "a.jsonl", b"\n".join(lines)), Counter()
    assert list(Reading(skip_bad=True).texts(path, counted)) == ["a", None, "b"]
    assert counted == {"lines that are not JSON": 2, 'lines without "text"': 2, 'lines whose "text" is no string': 1}


def test_bad_rows_are_skipped_with_a_count(tmp_path):
    path, counted = tmp_path / "a.parquet", Counter()
    values = pa.array([b"a", b"\xff", b"b"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": values}), path)
    with pytest.raises(InputError, match=r"a\.parquet, row 1 \(counted from 0\): not UTF-8"):
        texts(path)
    assert list(Reading(skip_bad=True).texts(path, counted)) == ["a", "b"]
    assert counted == {"rows that are not UTF-8": 1}


def test_a_broken_row_group_costs_no_other(tmp_path):
    path, counted = tmp_path / "a.parquet", Counter()
    rows = [f"text {i} {i * i}" for i in range(3_000)]
    pq.write_table(
        pa.table({"text": rows}), path, row_group_size=1_000, use_dictionary=False, compression="zstd",
        write_statistics=False,
    )  # fmt: skip
    start = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    content = bytearray(path.read_bytes())
    content[start + 60 : start + 400] = bytes(340)
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.parquet is broken after row 1000 "):
        texts(path)
    assert list(Reading(skip_bad=True).texts(path, counted)) == [*rows[:1_000], *rows[2_000:]]
    assert counted == {"rows in broken Parquet row groups": 1_000}


def test_bad_files_are_skipped_with_a_count(tmp_path):
    counted, reading = Counter(), Reading(skip_bad=True)
    paths = [written(tmp_path / "a.parquet", b"PAR1 and no more"), tmp_path / "b.parquet", tmp_path / "c.parquet"]
    pq.write_table(pa.table({"body": ["x"]}), paths[1])
    pq.write_table(pa.Table.from_arrays([pa.array(["x"])] * 2, ["text", "text"]), paths[2])
    for path in paths:
        assert list(reading.texts(path, counted)) == []
        assert reading.estimated_bytes(path) == path.stat().st_size
        with pytest.raises(InputError, match="--skip-bad"):
            Reading().estimated_bytes(path)
    assert counted == {"files that are no Parquet": 1, "files without one column text of strings": 2}


@pytest.mark.parametrize("suffix", PACK)
def test_the_size_of_what_is_compressed_is_estimated_from_its_beginning(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(readers, "MEASURED", 1 << 20)
    monkeypatch.setattr(readers, "CHUNK", 1 << 16)
    content = "\n".join(f"{i * i} {i % 7919} text" for i in range(200_000)).encode()
    path = written(tmp_path / f"a.txt{suffix}", PACK[suffix](content))
    assert path.stat().st_size < len(content) / 2
    assert 0.5 < Reading().estimated_bytes(path) / len(content) < 2
    assert Reading().estimated_bytes(written(path, PACK[suffix](b"short"))) == len(b"short")
    with pytest.raises(InputError, match="is not a whole"):
        Reading().estimated_bytes(written(path, b"none at all"))
