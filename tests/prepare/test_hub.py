"""Published corpora by name, from a hub on loopback: what is listed is fetched, checked, resumed, and said before."""

import io
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prepare import Dataset, InputError, download, hub, prepare
from prepare.__main__ import main
from prepare.hub import CORPORA
from tests.helpers.pretend_hub import serving

VOCAB_SIZE = 270  # such texts do not support many more
STORIES, PAGES = CORPORA["tinystories"], CORPORA["fineweb-edu"]


def parquet(texts: list[str]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"id": [*range(len(texts))], "text": texts}), file)
    return file.getvalue()


def texts(name: str, count: int = 30) -> list[str]:
    return [f"{name}, document {i}: some words to learn from" for i in range(count)]


@pytest.fixture
def pretend(monkeypatch, tmp_path):
    monkeypatch.setattr(download, "FIRST_PAUSE", 0.0)
    monkeypatch.setattr(download, "CHUNK", 100)
    monkeypatch.setenv("TIMEBOX_HOME", str(tmp_path / "home"))
    with serving() as server:
        under = f"{STORIES.repo}@{STORIES.revision}"
        for i in range(4):
            server.files[f"{under}/data/train-0000{i}-of-00004-{i:016x}.parquet"] = parquet(texts(f"story {i}"))
        server.files[f"{under}/data/validation-00000-of-00001-ab.parquet"] = parquet(texts("told", 20))
        server.files[f"{under}/data/README.md"] = b"no text to train on"
        server.files[f"{under}/TinyStories-train.txt"] = b"elsewhere"
        under = f"{PAGES.repo}@{PAGES.revision}"
        for i in range(3):
            server.files[f"{under}/sample/10BT/{i:03d}_00000.parquet"] = parquet(texts(f"page {i}", 100))
        yield server


def fetched(server) -> list[str]:
    return sorted({path.rpartition("/")[2] for _, path, _ in server.asked if "/resolve/" in path})


def split_texts(folder, name):
    data = Dataset.open(folder)
    split = data.split(name)
    return sorted(data.tokenizer.decode(split.document(i)) for i in range(split.num_documents))


def test_tinystories_has_a_validation_of_its_own(pretend, tmp_path):
    folder = prepare("tinystories", vocab_size=VOCAB_SIZE, base_url=pretend.url + "/")
    assert folder == tmp_path / "home" / "tinystories"
    assert split_texts(folder, "val") == sorted(texts("told", 20))
    both = split_texts(folder, "train") + split_texts(folder, "holdout")
    assert sorted(both) == sorted(text for i in range(4) for text in texts(f"story {i}"))
    details = Dataset.open(folder).manifest["details"]
    assert details == {
        "shards": 4, "repo": "roneneldan/TinyStories", "revision": STORIES.revision, "license": "CDLA-Sharing 1.0",
    }  # fmt: skip
    assert len(fetched(pretend)) == 5


def test_fineweb_edu_is_split_by_hash(pretend):
    folder = prepare("fineweb-edu", vocab_size=VOCAB_SIZE, shards=2, base_url=pretend.url)
    assert fetched(pretend) == ["000_00000.parquet", "001_00000.parquet"]
    splits = {name: split_texts(folder, name) for name in ("train", "val", "holdout")}
    assert min(map(len, splits.values())) > 0
    both = texts("page 0", 100) + texts("page 1", 100)
    assert sorted([*splits["train"], *splits["val"], *splits["holdout"]]) == sorted(both)


def test_once_it_is_there_no_network_is_needed(pretend):
    prepare("tinystories", vocab_size=VOCAB_SIZE, shards=2, base_url=pretend.url)
    before = len(pretend.asked)
    prepare("tinystories", vocab_size=280, shards=1, base_url="http://127.0.0.1:9")
    assert len(pretend.asked) == before


def test_a_listing_that_was_damaged_is_asked_for_again(pretend):
    prepare("fineweb-edu", vocab_size=VOCAB_SIZE, base_url=pretend.url)
    kept = hub.downloads_folder("fineweb-edu") / PAGES.revision / hub.LISTING
    whole = kept.read_text()
    kept.write_text(whole.replace("000_", "001_", 1))
    prepare("fineweb-edu", vocab_size=VOCAB_SIZE, base_url=pretend.url)
    assert kept.read_text() == whole


def test_what_was_cut_goes_on_through_the_redirect(pretend):
    pretend.cut = 2
    prepare("fineweb-edu", vocab_size=VOCAB_SIZE, base_url=pretend.url)
    ranges = [asked for _, path, asked in pretend.asked if path.startswith("/store/")]
    assert ranges[0] is None
    assert len(ranges) == 3
    assert all(asked.startswith("bytes=") for asked in ranges[1:])


def test_bytes_that_are_not_those_listed_never_get_the_files_name(pretend):
    pretend.corrupt = 1
    prepare("fineweb-edu", vocab_size=VOCAB_SIZE, base_url=pretend.url)
    assert pretend.corrupt == 0
    place = hub.downloads_folder("fineweb-edu")
    shutil.rmtree(place)
    pretend.corrupt = 100
    with pytest.raises(InputError, match="SHA-256 is not the one the server gives"):
        prepare("fineweb-edu", vocab_size=VOCAB_SIZE, base_url=pretend.url)
    assert not list(place.rglob("*.parquet"))


@pytest.mark.parametrize("wrong", ["sha256", "size"])
def test_the_listing_is_checked_beside_what_comes_with_the_file(pretend, wrong, monkeypatch):
    """As where a mirror serves other bytes under the same name."""
    asked = hub._asked
    other = {"sha256": "0" * 64, "size": 7}[wrong]
    monkeypatch.setattr(hub, "_asked", lambda *args: [file._replace(**{wrong: other}) for file in asked(*args)])
    with pytest.raises(InputError, match="SHA-256 is not" if wrong == "sha256" else "its listing says 7"):
        prepare("fineweb-edu", vocab_size=VOCAB_SIZE, base_url=pretend.url)
    assert not list(hub.downloads_folder("fineweb-edu").rglob("*.parquet"))


def test_a_file_of_another_size_is_fetched_again(pretend):
    prepare("fineweb-edu", vocab_size=VOCAB_SIZE, base_url=pretend.url)
    path = hub.downloads_folder("fineweb-edu") / PAGES.revision / "000_00000.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    prepare("fineweb-edu", vocab_size=VOCAB_SIZE, base_url=pretend.url)
    assert path.read_bytes() == whole


def test_what_climbmix_has_is_checked_by_what_the_redirect_says(pretend, tmp_path):
    """Which is in no answer of the store behind it."""
    pretend.files["karpathy/climbmix-400b-shuffle@main/shard_00000.parquet"] = b"some bytes"
    url, pretend.corrupt = f"{pretend.url}/datasets/karpathy/climbmix-400b-shuffle/resolve/main", 100
    with pytest.raises(InputError, match="SHA-256"):
        download.fetch_all(url, ["shard_00000.parquet"], tmp_path)
    assert not list(tmp_path.glob("shard*"))


def dry_run(capsys, *arguments) -> list[str]:
    assert main([*arguments, "--dry-run"]) == 0
    return capsys.readouterr().out.splitlines()


def test_a_dry_run_says_what_it_would_fetch_and_writes_nothing(pretend, tmp_path, capsys):
    lines = dry_run(capsys, "--source", "tinystories", "--shards", "1", "--base-url", pretend.url)
    assert fetched(pretend) == []
    assert not (tmp_path / "home").exists()
    assert lines[0] == f"source:  data of roneneldan/TinyStories at {STORIES.revision}"
    assert lines[1] == "license: CDLA-Sharing 1.0; cite Eldan and Li 2023, arXiv:2305.07759"
    assert [line.split()[0] for line in lines[4:6]] == [
        "validation-00000-of-00001-ab.parquet", "train-00000-of-00004-0000000000000000.parquet",
    ]  # fmt: skip
    sizes = [len(c) for key, c in pretend.files.items() if "validation-" in key or "train-00000" in key]
    assert lines[6] == f"fetch:   2 of 2 files, {sum(sizes) / 1e6:.2f} MB"
    assert lines[7].startswith("disk: ")


def test_a_dry_run_counts_what_has_arrived(pretend, capsys):
    prepare("fineweb-edu", vocab_size=VOCAB_SIZE, base_url=pretend.url)
    for key in pretend.files:
        if key.endswith("1_00000.parquet"):
            pretend.files[key] = bytes(1_000_000)
    (hub.downloads_folder("fineweb-edu") / PAGES.revision / hub.LISTING).unlink()
    sizes = [len(c) for key, c in pretend.files.items() if "10BT" in key]
    part = hub.downloads_folder("fineweb-edu") / PAGES.revision / "001_00000.parquet.part"
    part.write_bytes(bytes(sizes[1] // 2))
    line = next(line for line in dry_run(capsys, "--source", "fineweb-edu", "--shards", "3", "--base-url",
                                             pretend.url) if "fetch:" in line)  # fmt: skip
    rest = sum(sizes[1:]) - sizes[1] // 2
    arrived = f"1 there already; {sizes[1] // 2 / 1e6:.2f} MB of the others too"
    assert line == f"fetch:   2 of 3 files, {rest / 1e6:.2f} MB; {arrived}"
    assert part.exists()


@pytest.mark.parametrize("where", ["a mirror", "the hub"])
def test_a_dry_run_of_climbmix_asks_for_sizes_alone(pretend, tmp_path, capsys, monkeypatch, where):
    if where == "a mirror":  # which sends the file itself
        monkeypatch.setattr("tests.helpers.pretend_hub.Handler.resolve", lambda self, repo, revision, path, query:
                            self.answer(200, self.server.files[f"{repo}@{revision}/{path}"]))  # fmt: skip
    content = {f"shard_{i:05d}.parquet": bytes(1_000_000 + i) for i in (0, 6542)}
    pretend.files |= {f"karpathy/climbmix-400b-shuffle@main/{name}": bytes_ for name, bytes_ in content.items()}
    url = f"{pretend.url}/datasets/karpathy/climbmix-400b-shuffle/resolve/main"
    lines = dry_run(capsys, "--source", "climbmix", "--shards", "1", "--base-url", url)
    assert {method for method, _, _ in pretend.asked} == {"HEAD"}
    assert "fetch:   2 of 2 files, 2.01 MB" in lines
    assert not (tmp_path / "home").exists()


def test_a_dry_run_of_a_folder_asks_nobody(pretend, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("some text")
    (line,) = dry_run(capsys, "--source", str(tmp_path))
    assert line == f"fetch:   nothing: {tmp_path} is here, 1 files, about 0.00 MB of text"
    assert pretend.asked == []


@pytest.mark.parametrize(("arguments", "said"), [
    (["--shards", "15"], "--shards is 15: it takes 1 to 14"),
    (["--shards", "4"], "lists 3 training and 0 validation files in sample/10BT of HuggingFaceFW/fineweb-edu"),
    (["--text-column", "body"], "are for a folder or a file"),
    (["--base-url", "http://127.0.0.1:9"], "5 tries"),
    (["--base-url", "no url"], "check --base-url"),
])  # fmt: skip
@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_what_is_refused_is_one_line(pretend, tmp_path, capsys, arguments, said, more):
    if "--base-url" not in arguments:
        arguments = [*arguments, "--base-url", pretend.url]
    assert main(["--source", "fineweb-edu", *arguments, *more]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("listing", [
    b"<html>", b"{}", b"[1]", b'[{"type": "file", "path": 3, "size": 1}]',
    b'[{"type": "file", "path": "a", "size": 1, "lfs": {"oid": "ab", "size": 1}}]',
])  # fmt: skip
def test_what_is_no_listing(pretend, capsys, monkeypatch, listing):
    monkeypatch.setattr("tests.helpers.pretend_hub.Handler.listing", lambda self, *_, query: self.answer(200, listing))
    assert main(["--source", "tinystories", "--base-url", pretend.url]) == 2
    error = capsys.readouterr().err
    assert "is no listing of the Hugging Face hub" in error or "lists 0 training" in error
    assert error.count("\n") == 1


