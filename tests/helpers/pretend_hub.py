"""The Hugging Face hub as far as a download sees it, on loopback: a listing in pages, redirects to a store that knows
ranges, and the headers by which the real one names size and SHA-256."""

import hashlib
import json
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit


class Hub(ThreadingHTTPServer):
    """`files` by "repo@revision/path". `cut` has the store break its next answers off half way, `corrupt` flip their
    last byte. `asked` are the requests, with their range."""

    daemon_threads = True
    page = 2  # entries of the listing in one answer

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.cut = self.corrupt = 0
        self.asked: list[tuple[str, str, str | None]] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        parts = urlsplit(self.path)
        self.server.asked.append((self.command, parts.path, self.headers.get("Range")))
        routes = {
            r"/api/datasets/(\w[\w.-]*/[\w.-]+)/tree/([\w.-]+)/(.+)": self.listing,
            r"/datasets/(\w[\w.-]*/[\w.-]+)/resolve/([\w.-]+)/(.+)": self.resolve,
            r"/store/([0-9a-f]{64})": self.store,
        }
        for pattern, answer in routes.items():
            if match := re.fullmatch(pattern, parts.path):
                return answer(*match.groups(), query=parse_qs(parts.query))
        return self.answer(404, b"")

    def listing(self, repo, revision, folder, query):
        under = f"{repo}@{revision}/{folder}/"
        if not any(key.startswith(f"{repo}@{revision}/") for key in self.server.files):
            known = any(key.startswith(f"{repo}@") for key in self.server.files)
            return self.answer(404 if known else 401, b"{}", {"X-Error-Code": "RevisionNotFound"})
        paths = sorted(key for key in self.server.files if key.startswith(under) and "/" not in key[len(under) :])
        entries = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": f"{folder}/more"}]
        for key in paths:
            content, path = self.server.files[key], key.partition("/")[2].partition("/")[2]
            entry = {"type": "file", "oid": hashlib.sha1(content).hexdigest(), "size": len(content), "path": path}
            if path.endswith(".parquet"):
                sha256 = hashlib.sha256(content).hexdigest()
                entry |= {"lfs": {"oid": sha256, "size": len(content), "pointerSize": 134}, "xetHash": "f" * 64}
            entries.append(entry)
        first = int(query.get("cursor", ["0"])[0])
        after, headers = first + self.server.page, {"Content-Type": "application/json"}
        if after < len(entries):
            here = urlsplit(self.path).path
            headers["Link"] = f'<{self.server.url}{here}?cursor={after}>; rel="next"'
        self.answer(200, json.dumps(entries[first:after]).encode(), headers)

    def resolve(self, repo, revision, path, query):
        content = self.server.files.get(f"{repo}@{revision}/{path}")
        if content is None:
            return self.answer(404, b"Entry not found", {"X-Error-Code": "EntryNotFound"})
        sha256 = hashlib.sha256(content).hexdigest()
        return self.answer(302, b"moved", {
            "Location": f"/store/{sha256}?signed=once", "X-Repo-Commit": revision, "X-Linked-Size": str(len(content)),
            "X-Linked-Etag": f'"{sha256}"', "Accept-Ranges": "bytes",
        })  # fmt: skip

    def store(self, sha256, query):
        if self.command == "HEAD":
            return self.answer(403, b"")  # what is signed is signed for GET
        content = next(c for c in self.server.files.values() if hashlib.sha256(c).hexdigest() == sha256)
        if self.server.corrupt:
            self.server.corrupt -= 1
            content = content[:-1] + bytes([content[-1] ^ 1])
        headers, status = {"ETag": '"d41d8cd98f00b204e9800998ecf8427e-1"'}, 200  # the store's own name for it
        if asked := self.headers.get("Range"):
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
            headers["Content-Range"], status = f"bytes {start}-{len(content) - 1}/{len(content)}", 206
            content = content[start:]
        self.answer(status, content, headers)

    def answer(self, status, body, headers=None):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        cut = status in (200, 206) and self.path.startswith("/store") and self.server.cut > 0
        if cut:
            self.server.cut -= 1
            self.close_connection = True
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)

    def log_message(self, *_):
        pass


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
