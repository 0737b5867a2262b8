"""Bad input to `python -m prepare`: one line, exit code 2, and nothing half-written."""

import errno
import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prepare import Dataset, InputError, build, prepare, shards
from prepare.__main__ import main
from tests.helpers.prepare_corpus import write_corpus
from train.config import ROOT


def nothing(folder):
    pass


def no_text(folder):
    (folder / "a.csv").write_text("1,2")


def no_text_column(folder):
    pq.write_table(pa.table({"content": ["a"], "id": [1]}), folder / "a.parquet")


def two_text_columns(folder):
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["text", "text"]), folder / "a.parquet")


def text_of_numbers(folder):
    pq.write_table(pa.table({"text": [1, 2]}), folder / "a.parquet")


def truncated_parquet(folder):
    pq.write_table(pa.table({"text": [f"text {i}" for i in range(1_000)]}), folder / "a.parquet")
    content = (folder / "a.parquet").read_bytes()
    (folder / "a.parquet").write_bytes(content[: len(content) // 2])


def corrupt_parquet_page(folder):
    """Footer and size are right, the data is not."""
    table = pa.table({"text": [f"text {i}" for i in range(5_000)]})
    pq.write_table(table, folder / "a.parquet", compression="zstd", use_dictionary=False)
    content = bytearray((folder / "a.parquet").read_bytes())
    content[len(content) // 4 : len(content) // 2] = bytes(len(content) // 2 - len(content) // 4)
    (folder / "a.parquet").write_bytes(content)


def broken_jsonl(folder):
    (folder / "a.jsonl").write_text('{"text": "fine"}\n\n{"text": "cut o')


def jsonl_without_text(folder):
    (folder / "a.jsonl").write_text('{"text": "fine"}\n{"body": "x"}\n')


def jsonl_with_a_number(folder):
    (folder / "a.jsonl").write_text('{"text": 5}\n')


def jsonl_nested_beyond_reading(folder):
    (folder / "a.jsonl").write_text("[" * 100_000 + "\n")


def jsonl_not_utf8(folder):
    (folder / "a.jsonl").write_bytes(b'{"text": "fine"}\n{"text": "\xff"}\n')


def txt_not_utf8(folder):
    (folder / "a.txt").write_bytes("é fine ".encode() + b"\xe9 latin")


def truncated_gzip(folder):
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "some text"}\n' * 1_000)[:-20])


def no_gzip(folder):
    (folder / "a.txt.gz").write_text("plain text")


def truncated_zstd(folder):
    (folder / "a.txt.zst").write_bytes(pa.compress(b"some text" * 1_000, "zstd", asbytes=True)[:-3])


def only_empty(folder):
    (folder / "a.jsonl").write_text('{"text": ""}\n{"text": null}\n')


def only_validation(folder):
    (folder / "val.txt").write_text("some text")


def empty_validation(folder):
    write_corpus(folder, 30)
    (folder / "val.txt").write_text("")


BAD_CORPORA = {
    nothing: "has no text: put",
    no_text: r"has no text, only 1 \.csv files \(not read\): put",
    two_text_columns: r"a\.parquet has 2 columns called text: rename all but one",
    truncated_gzip: r"a\.jsonl\.gz is not a whole gzip file",
    no_gzip: r"a\.txt\.gz is not a whole gzip file",
    truncated_zstd: r"a\.txt\.zst is not a whole zstd file",
    no_text_column: r"a\.parquet has no column text, only content, id",
    text_of_numbers: r"a\.parquet: the column text holds int64",
    truncated_parquet: r"a\.parquet is not a whole Parquet file",
    corrupt_parquet_page: r"a\.parquet is broken after row \d+",
    broken_jsonl: r"a\.jsonl, line 3: not JSON",
    jsonl_without_text: r'a\.jsonl, line 2: no "text" key',
    jsonl_with_a_number: r'a\.jsonl, line 1: "text" is int',
    jsonl_nested_beyond_reading: r"a\.jsonl, line 1: not JSON",
    jsonl_not_utf8: r"a\.jsonl, line 2: .*0xff",
    txt_not_utf8: r"a\.txt is not UTF-8: bad byte at offset 8",
    only_empty: r"has 0 different documents \(left out: 1 empty documents, 1 null rows\)",
    only_validation: "has 0 different documents beside the files named val or test",
    empty_validation: "the val split has no documents",
}


@pytest.mark.parametrize("make", BAD_CORPORA, ids=lambda make: make.__name__)
def test_bad_corpus(tmp_path, capsys, make):
    (tmp_path / "corpus").mkdir()
    make(tmp_path / "corpus")
    out = tmp_path / "out"
    assert main(["--source", str(tmp_path / "corpus"), "--out", str(out), "--vocab-size", "260"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert "\n" not in error
    with pytest.raises(InputError, match=BAD_CORPORA[make]):
        prepare(str(tmp_path / "corpus"), out, vocab_size=260)
    assert os.listdir(tmp_path) == ["corpus"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source", "~no-such-user/text"], "~no-such-user"),
        (["--out", "~no-such-user/data"], "~no-such-user"),
        (["--source", "nowhere/at/all"], "nowhere/at/all does not exist"),
        (["--source", __file__], "is none of .parquet"),
        (["--source", os.devnull], "is neither a folder nor a file"),
        (["--source", ""], "--source is empty"),
        (["--out", ""], "--out is empty"),
        (["--tokenizer", ""], "--tokenizer is empty"),
        (["--tokenizer", "nowhere"], "nowhere is missing; name a prepared folder"),
        (["--tokenizer", str(ROOT)], "tokenizer.json is missing; name a prepared folder"),
        (["--tokenizer", __file__], "cannot be read"),
        (["--separator", ""], "--separator is empty"),
        (["--text-column", "body"], "--text-column is for .parquet, .arrow and .jsonl"),
        (["--source", "stdlib", "--skip-bad"], "are for a folder or a file"),
        (["--vocab-size", "259"], "--vocab-size takes 260"),
        (["--vocab-size", "65537"], "to 65,536"),
        (["--vocab-size", "60000"], "--vocab-size "),
        (["--out", __file__], "--out takes a folder"),
        (["--out", f"{__file__}/below"], f"{__file__}: "),
        (["--seed", "-1"], "--seed"),
        (["--source", "climbmix", "--shards", "0"], "--shards"),
    ],
)
def test_bad_arguments(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.setenv("TIMEBOX_HOME", str(tmp_path / "home"))
    if "--source" not in arguments:
        arguments = ["--source", str(write_corpus(tmp_path / "corpus", 10)), *arguments]
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
    assert not list(tmp_path.glob("home/*"))


def test_unknown_arguments_exit_with_2():
    with pytest.raises(SystemExit) as caught:
        main(["--sauce", "stdlib"])
    assert caught.value.code == 2


@pytest.mark.parametrize("where", ["writing shards", "scattering", "the manifest"])
@pytest.mark.parametrize("existing", [False, True])
def test_a_disk_that_fills_up(tmp_path, capsys, monkeypatch, where, existing):
    corpus = str(write_corpus(tmp_path / "corpus", 30))
    out = tmp_path / "out"
    if existing:
        prepare(corpus, out, vocab_size=270)
        before = (out / "manifest.json").read_bytes()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if where == "writing shards":
        monkeypatch.setattr(shards, "save_array", full)
    elif where == "scattering":
        monkeypatch.setattr(np, "concatenate", full)
    else:
        monkeypatch.setattr(build, "write_json", full)
    assert main(["--source", corpus, "--out", str(out), "--vocab-size", "280"]) == 2
    error = capsys.readouterr().err
    assert "is full: this needs about 0.0" in error
    assert " are free" in error
    assert sorted(os.listdir(tmp_path)) == (["corpus", "out"] if existing else ["corpus"])
    if existing:
        assert (out / "manifest.json").read_bytes() == before
        assert Dataset.open(out).vocab_size == 270


def test_a_failure_at_the_very_last_rename_keeps_the_old_folder(tmp_path, monkeypatch):
    corpus = str(write_corpus(tmp_path / "corpus", 30))
    out = prepare(corpus, tmp_path / "out", vocab_size=270)
    original = os.replace

    def failing(source, target):
        if Path(target) == out and ".preparing-" in str(source):
            raise OSError(errno.EIO, "broken disk")
        return original(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="broken disk"):
        prepare(corpus, out, vocab_size=280)
    monkeypatch.undo()
    assert Dataset.open(out).vocab_size == 270
    assert sorted(os.listdir(tmp_path)) == ["corpus", "out"]


@pytest.mark.parametrize("place", ["mkdir", "the old one away", "the new one there"])
@pytest.mark.parametrize("made", [False, True], ids=["before", "after"])
def test_interrupted_at_the_worst_place(tmp_path, monkeypatch, place, made):
    """Right before or right after a call that makes or renames a folder: the old one or the new one is there, whole."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "manifest.json").write_text("old")
    replace, mkdir = os.replace, Path.mkdir

    def call(here, function, *arguments, **options):
        if here != place:
            return function(*arguments, **options)
        if made:
            function(*arguments, **options)
        monkeypatch.undo()
        raise KeyboardInterrupt

    def replacing(source, target):
        call("the old one away" if source == out else "the new one there", replace, source, target)

    def making(path, *arguments, **options):
        call("mkdir" if ".preparing-" in path.name else None, mkdir, path, *arguments, **options)

    monkeypatch.setattr(os, "replace", replacing)
    monkeypatch.setattr(Path, "mkdir", making)
    with pytest.raises(KeyboardInterrupt), shards.building(out) as folder:
        (folder / "manifest.json").write_text("new")
    new = place == "the new one there" and made
    assert (out / "manifest.json").read_text() == ("new" if new else "old")
    assert os.listdir(tmp_path) == ["out"]


def test_a_link_to_the_folder_stays_one(tmp_path):
    corpus = str(write_corpus(tmp_path / "corpus", 30))
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "data")
    for vocab_size in (270, 280):
        prepare(corpus, tmp_path / "out", vocab_size=vocab_size)
        assert Dataset.open(tmp_path / "out").vocab_size == vocab_size
    assert (tmp_path / "out").is_symlink()
    assert os.listdir(tmp_path / "disk") == ["data"]
    assert sorted(os.listdir(tmp_path)) == ["corpus", "disk", "out"]


def test_a_link_to_itself(tmp_path, capsys):
    corpus = str(write_corpus(tmp_path / "corpus", 30))
    (tmp_path / "out").symlink_to("out")
    assert main(["--source", corpus, "--out", str(tmp_path / "out"), "--vocab-size", "270"]) == 2
    assert re.fullmatch(r"error: .*Not a directory; name another path with .*--out.*\n", capsys.readouterr().err)
    assert sorted(os.listdir(tmp_path)) == ["corpus", "out"]


def test_empty_and_null_documents_are_counted_and_reported(tmp_path, capsys):
    write_corpus(tmp_path / "corpus", 30)
    (tmp_path / "corpus" / "a.jsonl").write_text('{"text": ""}\n{"text": null}\n{"text": "fine"}\n')
    out = tmp_path / "out"
    assert main(["--source", str(tmp_path / "corpus"), "--out", str(out), "--vocab-size", "270"]) == 0
    printed = capsys.readouterr().out
    assert "skipped: 1 empty documents, 1 null rows" in printed
    assert str(out) in printed
    assert json.loads((out / "manifest.json").read_text())["skipped"] == {"empty documents": 1, "null rows": 1}


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted(tmp_path, sent, code):
    """In the middle of preparing (which here waits to be interrupted): no traceback, no temporary folder."""
    corpus = write_corpus(tmp_path / "corpus", 30)
    program = (
        "import sys, time; from prepare import build; from prepare.__main__ import main\n"
        "build.Tokenizer.train = lambda *_: time.sleep(600)\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["--source", str(corpus), "--out", str(tmp_path / "out")]
    command = [sys.executable, "-c", program, *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 600
    while not list(tmp_path.glob(".out.preparing-*")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(sent)
    output, errors = process.communicate(timeout=600)
    assert process.returncode == code
    assert (output, errors) == (b"", b"")
    assert os.listdir(tmp_path) == ["corpus"]


def test_help_does_not_wait_for_torch():
    program = (
        "import sys; from prepare.__main__ import main\n"
        "try: main(['--help'])\n"
        "finally: assert not {'torch', 'numpy', 'pyarrow'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "--vocab-size" in result.stdout


def test_help_says_what_the_sources_are_and_where_it_writes(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for said in ("standard library", ".parquet", ".jsonl", ".txt", ".md", "~/.cache/timebox/<source>"):
        assert said in text


def test_options_of_another_source_are_refused(tmp_path, capsys):
    assert main(["--source", str(tmp_path), "--shards", "3", "--out", str(tmp_path / "out")]) == 2
    assert "--source climbmix" in capsys.readouterr().err
