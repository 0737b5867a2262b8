"""Arrow files as the library `datasets` writes them: read as they are, and never trusted."""

import json
import random
from collections import Counter

import pyarrow as pa
import pytest

from prepare import InputError
from prepare.readers import Reading
from prepare.sources import folder_source

KINDS = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
TEXTS = [f"text é {i} " + "x" * (i % 20) for i in range(60)]


def write_arrow(path, texts, kind=None, make=pa.ipc.new_stream, name="text", batch=20):
    """As `datasets` does: a stream, in batches."""
    path.parent.mkdir(parents=True, exist_ok=True)
    array = texts if isinstance(texts, pa.Array) else pa.array(texts)
    table = pa.table({"id": [*range(len(array))], name: array.cast(kind or array.type)})
    with make(str(path), table.schema) as writer:
        writer.write_table(table, batch)
    return path


def texts_of(path, skipped=None, **options) -> list[str | None]:
    return list(Reading(**options).texts(path, Counter() if skipped is None else skipped))


@pytest.mark.parametrize("make", [pa.ipc.new_stream, pa.ipc.new_file])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_kind_of_string(tmp_path, kind, make):
    path = write_arrow(tmp_path / "a.arrow", [*TEXTS, None, ""], kind, make)
    assert texts_of(path) == [*TEXTS, None, ""]
    assert Reading().estimated_bytes(path) > 0


def test_the_estimate_is_of_the_text(tmp_path):
    texts = ["some words " * 50] * 100
    path = write_arrow(tmp_path / "a.arrow", texts)
    assert Reading().estimated_bytes(path) == pytest.approx(sum(map(len, texts)), rel=0.02)


def cache(folder, *names):
    """Of one set, one revision: `folder`."""
    for name in names:
        write_arrow(folder / name, [f"{name} {i}" for i in range(30)])
    (folder / "dataset_info.json").write_text("{}")
    return folder


def test_a_cache_of_datasets(tmp_path):
    """Its splits go by their names, and what `map` and `filter` made of them is left out."""
    cache(tmp_path / "json" / "default" / "0.0.0" / "d78d", "tiny-train-00000-of-00002.arrow",
          "tiny-train-00001-of-00002.arrow", "tiny-validation.arrow", "tiny-test.arrow", "cache-3fe9.arrow",
          "cache-3fe9_00000_of_00002.arrow", "tmp12ab.arrow")  # fmt: skip
    source = folder_source(tmp_path)
    assert Counter((file.path.name, file.split) for file in source.files) == {
        ("tiny-train-00000-of-00002.arrow", None): 1, ("tiny-train-00001-of-00002.arrow", None): 1,
        ("tiny-validation.arrow", "val"): 1, ("tiny-test.arrow", "holdout"): 1,
    }  # fmt: skip
    assert source.passed_over == {"results of map and filter, cache-*.arrow (not read)": 3, ".json files (not read)": 1}
    assert Counter(split for split, _ in source.documents()) == {"train": 60, "val": 30, "holdout": 30}


def test_two_sets_in_one_cache_are_not_mixed(tmp_path):
    for revision in ("d78d", "e89e"):
        cache(tmp_path / "tiny" / "0.0.0" / revision, "tiny-train.arrow")
    with pytest.raises(InputError, match=r"holds 2 sets .*tiny/0\.0\.0/d78d, tiny/0\.0\.0/e89e.*: name the folder"):
        folder_source(tmp_path)
    assert len(folder_source(tmp_path / "tiny" / "0.0.0" / "e89e").files) == 1


def test_what_save_to_disk_wrote(tmp_path):
    for split in ("train", "test"):
        cache(tmp_path / split, "data-00000-of-00001.arrow")
        (tmp_path / split / "state.json").write_text(json.dumps({"_split": split}))
    (tmp_path / "dataset_dict.json").write_text("{}")
    assert [(file.key.split("/")[0], file.split) for file in folder_source(tmp_path).files] == [
        ("test", "holdout"), ("train", None),
    ]  # fmt: skip


def no_column(path):
    write_arrow(path, TEXTS, name="body")


def numbers(path):
    write_arrow(path, pa.array([*range(60)]))


def nothing(path):
    path.write_bytes(b"")


def no_arrow(path):
    path.write_bytes(b"some words, and nothing of Arrow" * 9)


def cut_in_a_batch(path):
    path.write_bytes(path.read_bytes()[:-700])


def cut_between_batches(path):
    path.write_bytes(path.read_bytes()[:-8])


def a_name_that_is_not_utf8(path):
    path.write_bytes(path.read_bytes().replace(b"text\0", b"\xff\xffxt\0", 1))


def not_utf8(path):
    content = path.read_bytes().replace("é 25".encode(), b"\xff\xff 25")
    path.write_bytes(content)


@pytest.mark.parametrize(("damage", "said", "counted", "left"), [
    (no_column, "has no column text, only id, body: name one with --text-column", "without one column text", 0),
    (numbers, "the column text holds int64", "without one column text", 0),
    (nothing, "is not a whole Arrow file, after row 0", "broken Arrow", 0),
    (no_arrow, "is not a whole Arrow file, after row 0", "broken Arrow", 0),
    (cut_in_a_batch, "is not a whole Arrow file, after row 40", "broken Arrow", 40),
    (cut_between_batches, "is not a whole Arrow file, after row 60 (it breaks off)", "broken Arrow", 60),
    (a_name_that_is_not_utf8, "is not a whole Arrow file, after row 0", "broken Arrow", 0),
    (not_utf8, "a.arrow, row 25 (counted from 0): not UTF-8", "not UTF-8", 59),
])  # fmt: skip
def test_what_cannot_be_read(tmp_path, damage, said, counted, left):
    path = write_arrow(tmp_path / "a.arrow", TEXTS)
    damage(path)
    with pytest.raises(InputError) as caught:
        texts_of(path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert Reading().estimated_bytes(path) >= 0
    skipped = Counter()
    assert len(texts_of(path, skipped, skip_bad=True)) == left
    ((reason, count),) = skipped.items()
    assert counted in reason
    assert count == 1


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("make", [pa.ipc.new_stream, pa.ipc.new_file])
def test_damage_is_an_error_or_other_text_and_never_the_end_of_the_process(tmp_path, kind, make):
    """Arrow itself follows an offset wherever it points."""
    path = write_arrow(tmp_path / "a.arrow", TEXTS, kind, make)
    whole, rng, refused = path.read_bytes(), random.Random(1), 0
    for trial in range(150):
        content = bytearray(whole)
        cut = trial % 3 == 0
        if cut:
            content = content[: rng.randrange(len(content))]
        for _ in range(0 if cut else rng.choice([1, 1, 4])):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        Reading().estimated_bytes(path)
        try:
            assert texts_of(path)
            assert not cut
        except InputError:
            refused += 1
    assert refused > 60
