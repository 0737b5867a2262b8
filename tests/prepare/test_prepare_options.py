"""What `python -m prepare` can be told about the text, and what it says of it."""

import gzip
import json
import random
import shutil

import pytest

from prepare import Dataset, InputError, prepare
from prepare.__main__ import main
from prepare.readers import Reading
from prepare.sources import folder_source
from tests.helpers.prepare_corpus import VOCAB_SIZE, sentence, write_corpus


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    corpus = write_corpus(tmp_path_factory.mktemp("corpus"), 60)
    return prepare(str(corpus), tmp_path_factory.mktemp("prepared") / "data", vocab_size=VOCAB_SIZE)


def stories(path, separator: str, count: int = 60):
    """One file of many documents."""
    rng = random.Random(1)
    content = f"\n{separator}\n".join(f"story {i}\n" + sentence(rng, 30) for i in range(count)).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def test_one_file_with_a_separator(tmp_path, capsys):
    source, out = stories(tmp_path / "stories.txt.gz", "<|endoftext|>"), tmp_path / "out"
    arguments = ["--source", str(source), "--separator", "<|endoftext|>", "--out", str(out), "--vocab-size", "270"]
    assert main(arguments) == 0
    assert "skipped: nothing" in capsys.readouterr().out
    manifest = Dataset.open(out).manifest
    assert sum(split["documents"] for split in manifest["splits"].values()) == 60
    assert manifest["details"] == {
        "files": 1, "validation_files": 0, "holdout_files": 0,
        "text_column": "text", "separator": "<|endoftext|>", "skip_bad": False,
    }  # fmt: skip


def test_the_same_text_gives_the_same_tokens_however_it_is_kept(tmp_path):
    plain, packed = (stories(tmp_path / name, "|") for name in ("a.txt", "b.txt.gz"))
    folders = [prepare(str(path), tmp_path / path.stem, 270, separator="|") for path in (plain, packed)]
    contents = [{path.name: path.read_bytes() for path in folder.glob("*.npy")} for folder in folders]
    assert contents[0] == contents[1]


@pytest.mark.parametrize("what", ["folder", "file"])
def test_a_tokenizer_prepared_elsewhere(tmp_path, prepared, what):
    corpus = stories(tmp_path / "a.txt", "|")
    given = prepared if what == "folder" else prepared / "tokenizer.json"
    data = Dataset.open(prepare(str(corpus), tmp_path / "out", separator="|", tokenizer=given))
    assert data.manifest["tokenizer_sha256"] == Dataset.open(prepared).manifest["tokenizer_sha256"]
    assert (data.vocab_size, data.manifest["tokenizer"]) == (VOCAB_SIZE, "given")
    split = data.split("train")
    texts = {data.tokenizer.decode(split.document(i)) for i in range(split.num_documents)}
    documents = folder_source(corpus, Reading(separator="|")).documents()
    assert texts == {text for name, text in documents if name == "train"}
    again = prepare(str(corpus), tmp_path / "again", VOCAB_SIZE, separator="|", tokenizer=given)
    assert Dataset.open(again).manifest["splits"]["val"]["bytes"] == data.manifest["splits"]["val"]["bytes"]


def test_a_tokenizer_that_disagrees(tmp_path, prepared):
    corpus = stories(tmp_path / "a.txt", "|")
    with pytest.raises(InputError, match="has 300 tokens and --vocab-size is 280: leave --vocab-size out"):
        prepare(str(corpus), tmp_path / "out", 280, separator="|", tokenizer=prepared)
    copy = shutil.copytree(prepared, tmp_path / "copy")
    content = json.loads((copy / "tokenizer.json").read_text())
    content["merges"] = content["merges"][:-1]
    (copy / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="is not the tokenizer its shards were made with"):
        prepare(str(corpus), tmp_path / "out", separator="|", tokenizer=copy)
    assert not (tmp_path / "out").exists()


def test_what_is_skipped_is_named(tmp_path, capsys):
    corpus, out = write_corpus(tmp_path / "corpus", 30), tmp_path / "out"
    (corpus / "a.jsonl").write_text('{"text": "fine"}\n{"text": \n[]\n')
    (corpus / "b.txt").write_bytes(b"\xff")
    (corpus / "c.json").write_text("[]")
    arguments = ["--source", str(corpus), "--out", str(out), "--vocab-size", "270"]
    assert main(arguments) == 2
    assert capsys.readouterr().err.rstrip().endswith("or skip what is bad with --skip-bad")
    assert main([*arguments, "--skip-bad"]) == 0
    expected = {
        ".json files (not read)": 1, "documents that are not UTF-8": 1, 'lines without "text"': 1,
        "lines that are not JSON": 1,
    }  # fmt: skip
    assert json.loads((out / "manifest.json").read_text())["skipped"] == expected
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("skipped: "))
    assert line == "skipped: " + ", ".join(f"{count} {reason}" for reason, count in sorted(expected.items()))


def test_files_that_are_held_out_by_their_names_are_announced(tmp_path, capsys):
    corpus = write_corpus(tmp_path / "corpus", 30)
    arguments = ["--source", str(corpus), "--out", str(tmp_path / "out"), "--vocab-size", "270"]
    assert main(arguments) == 0
    assert "names:" not in capsys.readouterr().out
    (corpus / "val-0.txt").write_text("validation")
    (corpus / "test.md").write_text("test")
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "names:   2 of 32 files are for evaluation by their names: 1 val, 1 holdout (test)" in out
    assert "note:" not in out


def test_little_text_for_training_is_announced(tmp_path, capsys):
    corpus = write_corpus(tmp_path / "corpus", 30)
    (corpus / "valid.txt").write_text("a long text " * 20_000)
    out = tmp_path / "out"
    assert main(["--source", str(corpus), "--out", str(out), "--vocab-size", "270"]) == 0
    sizes = {name: split["bytes"] for name, split in Dataset.open(out).manifest["splits"].items()}
    share = sizes["train"] / sum(sizes.values())
    assert share < 0.1
    assert f"note:    only {share:.0%} of the text is for training: " in capsys.readouterr().out
