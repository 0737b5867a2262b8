"""Shards served from loopback by a server that misbehaves as it is told."""

import hashlib
import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prepare import Dataset, InputError, download, prepare
from prepare.download import fetch_all
from tests.helpers.prepare_corpus import VOCAB_SIZE

CONTENT = bytes(i * 7 % 251 for i in range(100_000))


class Server(ThreadingHTTPServer):
    """`files` by name; `trouble` is a list of what to do to the next answers; `requests` what was asked."""

    daemon_threads = True

    def handle_error(self, request, client_address):
        """A connection that a test cut is no news; anything else is printed as usual."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.trouble: list[str] = []
        self.always: str | None = None
        self.headers: dict[str, str] = {}
        self.requests: list[tuple[str, str | None]] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server, name = self.server, self.path.rsplit("/", 1)[-1]
        asked = self.headers.get("Range")
        server.requests.append((name, asked))
        trouble = server.always or (server.trouble.pop(0) if server.trouble else None)
        if name not in server.files:
            return self.answer(404, b"")
        if trouble and trouble.isdigit():
            return self.answer(int(trouble), b"")
        content = server.files[name]
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and trouble != "no ranges" else None
        if start is None:
            return self.answer(200, content, trouble=trouble)
        if start >= len(content):
            return self.answer(416, b"")
        if trouble == "capped range":
            return self.answer(206, content[start:][:9], {"Content-Range": f"bytes {start}-{start + 8}/{len(content)}"})
        shift = 10 if trouble == "wrong range" else 0
        content_range = f"bytes {start + shift}-{len(content) - 1}/{len(content)}"
        return self.answer(206, content[start + shift :], {"Content-Range": content_range}, trouble)

    def answer(self, status, body, headers=None, trouble=None):
        self.send_response(status)
        announced = len(body) + 5_000 if trouble == "too short" else len(body)
        for name, value in ({"Content-Length": str(announced)} | (headers or {}) | self.server.headers).items():
            self.send_header(name, value)
        if trouble in ("cut", "too short"):
            self.close_connection = True
        self.end_headers()
        if trouble == "wrong bytes":
            body = bytes(len(body))
        self.wfile.write(body[: len(body) // 2] if trouble == "cut" else body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "FIRST_PAUSE", 0.0)
    monkeypatch.setattr(download, "CHUNK", 1_000)
    server = Server()
    server.files["a"] = CONTENT
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def fetched(server, folder, names=("a",)):
    paths = fetch_all(server.url, list(names), folder)
    assert not list(folder.glob("*.part"))
    return [path.read_bytes() for path in paths]


def test_files_arrive_in_parallel_and_only_once(server, tmp_path):
    names = [f"file{i}" for i in range(10)]
    server.files |= {name: name.encode() * 1_000 for name in names}
    assert fetched(server, tmp_path, names) == [server.files[name] for name in names]
    assert sorted(server.requests) == [(name, None) for name in names]
    fetched(server, tmp_path, names)
    assert len(server.requests) == 10


def test_a_cut_connection_is_resumed(server, tmp_path):
    server.trouble = ["cut", "cut"]
    assert fetched(server, tmp_path) == [CONTENT]
    assert server.requests == [("a", None), ("a", "bytes=50000-"), ("a", "bytes=75000-")]


def test_what_an_earlier_run_left_is_resumed(server, tmp_path):
    server.always = "cut"
    with pytest.raises(InputError, match=r"/a cannot be fetched: 5 tries.*what has arrived is kept"):
        fetch_all(server.url, ["a"], tmp_path)
    assert not (tmp_path / "a").exists()
    have = (tmp_path / "a.part").stat().st_size
    assert have > 90_000
    server.always = None
    assert fetched(server, tmp_path) == [CONTENT]
    assert server.requests[-1] == ("a", f"bytes={have}-")


def test_a_server_without_ranges_sends_it_all_again(server, tmp_path):
    server.trouble = ["cut", "no ranges"]
    assert fetched(server, tmp_path) == [CONTENT]


def test_a_wrong_range_is_not_appended(server, tmp_path):
    server.trouble = ["cut", "wrong range"]
    assert fetched(server, tmp_path) == [CONTENT]


def test_a_server_that_sends_less_of_a_range_than_it_could(server, tmp_path):
    server.trouble = ["cut", "capped range"]
    assert fetched(server, tmp_path) == [CONTENT]
    assert server.requests[-1] == ("a", "bytes=50009-")


def test_a_part_longer_than_the_file_is_dropped(server, tmp_path):
    (tmp_path / "a.part").write_bytes(b"x" * 200_000)
    assert fetched(server, tmp_path) == [CONTENT]


def test_a_server_that_sends_the_wrong_size(server, tmp_path):
    server.always = "too short"
    with pytest.raises(InputError, match=r"cannot be fetched: 5 tries"):
        fetch_all(server.url, ["a"], tmp_path)
    assert not (tmp_path / "a").exists()
    server.always = None
    assert fetched(server, tmp_path) == [CONTENT]


@pytest.mark.parametrize("header", ["ETag", "X-Linked-Etag"])
def test_a_checksum_given_is_checked(server, tmp_path, header):
    server.headers = {header: f'"{hashlib.sha256(CONTENT).hexdigest()}"'}
    if header == "X-Linked-Etag":
        server.headers["ETag"] = '"' + "0" * 64 + '"'  # storage behind a redirect names its blobs otherwise
    server.trouble = ["wrong bytes"]
    assert fetched(server, tmp_path) == [CONTENT]
    assert server.requests == [("a", None), ("a", None)]
    (tmp_path / "a").unlink()
    server.always = "wrong bytes"
    with pytest.raises(InputError, match="SHA-256"):
        fetch_all(server.url, ["a"], tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_etag_that_is_no_sha256_is_ignored(server, tmp_path):
    server.headers = {"ETag": 'W/"abc-123"'}
    assert fetched(server, tmp_path) == [CONTENT]


@pytest.mark.parametrize(("status", "tries"), [("500", 5), ("503", 5), ("429", 5), ("408", 5), ("403", 1), ("404", 1)])
def test_which_answers_are_tried_again(server, tmp_path, status, tries):
    server.always = status
    with pytest.raises(InputError, match=status):
        fetch_all(server.url, ["a"], tmp_path)
    assert len(server.requests) == tries


def test_one_failure_ends_the_others(server, tmp_path):
    server.files |= {f"file{i}": CONTENT for i in range(50)}
    with pytest.raises(InputError, match="404"):
        fetch_all(server.url, ["missing", *(f"file{i}" for i in range(50))], tmp_path)
    assert len(server.requests) < 50


def test_nobody_listens(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "FIRST_PAUSE", 0.0)
    with pytest.raises(InputError, match=r"cannot be fetched: 5 tries.*--base-url"):
        fetch_all("http://127.0.0.1:9", ["a"], tmp_path)
    with pytest.raises(InputError, match="--base-url"):
        fetch_all("no url", ["a"], tmp_path)


@pytest.mark.parametrize("shards", [0, -1, 6_543])
def test_number_of_shards(shards):
    with pytest.raises(InputError, match="takes 1 to 6,542"):
        download.fetch_climbmix(shards, "http://127.0.0.1:9", None)


def test_climbmix_from_a_mirror(server, tmp_path, monkeypatch):
    monkeypatch.setenv("TIMEBOX_HOME", str(tmp_path))
    texts = {}
    for number in (0, 1, 6_542):
        texts[number] = [f"shard {number}, document {i}: some words to learn from" for i in range(40)]
        path = tmp_path / "shard.parquet"
        pq.write_table(pa.table({"text": texts[number]}), path)
        server.files[f"shard_{number:05d}.parquet"] = path.read_bytes()
        path.unlink()
    folder = prepare("climbmix", vocab_size=VOCAB_SIZE, shards=2, base_url=f"{server.url}/mirror/")
    assert folder == tmp_path / "climbmix"
    assert {name for name, _ in server.requests} == set(server.files) - {"a"}
    data = Dataset.open(folder)
    val = data.split("val")
    assert sorted(data.tokenizer.decode(val.document(i)) for i in range(40)) == sorted(texts[6_542])
    assert val.num_documents == 40
    assert data.split("train").num_documents + data.split("holdout").num_documents == 80
    assert json.loads((folder / "manifest.json").read_text())["details"]["shards"] == 2
    prepare("climbmix", vocab_size=280, shards=1, base_url=server.url)
    assert len(server.requests) == 3


def test_the_bar_counts_the_files(server, tmp_path, monkeypatch):
    names = ["one", "two"]
    server.files |= {name: name.encode() for name in names}
    said = []
    monkeypatch.setattr(download.tqdm, "set_description", lambda bar, text: said.append(text))
    fetched(server, tmp_path, names)
    assert said == ["1 of 2 files", "2 of 2 files"]
