"""Fetches published shards: in parallel, resumed where they broke off, checked before they get their name."""

import os
import re
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple, TypeVar
from urllib.parse import urljoin

import requests
from tqdm import tqdm

from .errors import InputError, full_disk_is_input_error
from .files import sha256_of

CLIMBMIX_URL = "https://huggingface.co/datasets/karpathy/climbmix-400b-shuffle/resolve/main"
CLIMBMIX_TRAIN_SHARDS = 6542  # numbers 0..6541; the next one is pinned for validation
DEFAULT_SHARDS = 10
THREADS = 4
TRIES = 5
FIRST_PAUSE = 1.0  # seconds before the second try; each further pause is twice as long
TIMEOUT = (10, 60)  # seconds to connect, and between two reads
CHUNK = 1 << 16  # what arrived of a chunk that was cut is lost
MAX_REDIRECTS = 10
RETRIED_STATUS = (408, 429)  # of the 4xx; every 5xx is retried


T = TypeVar("T")


class _TryAgainError(Exception):
    """This try failed in a way that another may not."""


class Remote(NamedTuple):
    """A file that a server has. What it does not say of it is None."""

    name: str
    size: int | None = None  # bytes
    sha256: str | None = None

    def is_at(self, path: Path) -> bool:
        """Whether it has arrived: a file gets its name only once it was checked."""
        return path.exists() and self.size in (None, path.stat().st_size)


def climbmix_names(shards: int) -> list[str]:
    """The first `shards` training shards and the validation shard, which comes last. Raises InputError."""
    check_shards(shards, CLIMBMIX_TRAIN_SHARDS)
    return [f"shard_{i:05d}.parquet" for i in (*range(shards), CLIMBMIX_TRAIN_SHARDS)]


def check_shards(shards: int, most: int) -> None:
    if not 1 <= shards <= most:
        raise InputError(f"--shards is {shards:,}: it takes 1 to {most:,}")


def fetch_climbmix(shards: int, base_url: str, folder: Path) -> list[Path]:
    """In the order of `climbmix_names`. Raises InputError."""
    return fetch_all(base_url, climbmix_names(shards), folder)


def fetch_all(base_url: str, names: list[str], folder: Path, known: Mapping[str, Remote] | None = None) -> list[Path]:
    """Downloads `base_url`/name to `folder`/name, those that are not there yet. What is `known` of a file is checked
    beside what the server says when it sends it. Raises InputError.

    What a failure or Ctrl-C leaves are `.part` files, which the next call goes on with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remotes = {folder / name: (known or {}).get(name, Remote(name)) for name in names}
    paths = [*remotes]
    missing = [path for path in paths if not remotes[path].is_at(path)]
    stop = threading.Event()
    with (
        tqdm(unit="B", unit_scale=True, desc=f"0 of {len(missing)} files", disable=None, leave=False) as bar,
        ThreadPoolExecutor(THREADS) as pool,
    ):
        base_url = base_url.rstrip("/")
        futures = [pool.submit(_fetch, f"{base_url}/{path.name}", path, remotes[path], bar, stop) for path in missing]
        try:
            for done, future in enumerate(as_completed(futures), 1):
                future.result()
                bar.set_description(f"{done} of {len(missing)} files")
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
    return paths


def sizes(base_url: str, names: list[str]) -> list[Remote]:
    """What the server says of files, without fetching them. Raises InputError."""

    def of(name: str) -> Remote:
        answer = _headers(f"{base_url.rstrip('/')}/{name}")
        size = answer.headers.get("X-Linked-Size") or answer.headers.get("Content-Length", "")
        return Remote(name, int(size) if size.isdecimal() else None, _sha256_given([answer]))

    with ThreadPoolExecutor(THREADS) as pool:
        return [*pool.map(of, names)]


def _headers(url: str) -> requests.Response:
    """Of a file, as the first server that knows its size gives them. The hub does, and redirects to a store whose
    signed addresses may be for GET alone."""
    for _ in range(MAX_REDIRECTS):
        answer = ask(url, "HEAD", allow_redirects=False)
        if not answer.is_redirect or "X-Linked-Size" in answer.headers:
            return answer
        url = urljoin(url, answer.headers["Location"])
    raise InputError(f"{url} redirects without an end: check --base-url")


def ask(url: str, method: str = "GET", allow_redirects: bool = True) -> requests.Response:
    """The answer to a small question. Raises InputError."""

    def once() -> requests.Response:
        response = requests.request(method, url, headers={"Accept-Encoding": "identity"}, timeout=TIMEOUT,
                                    allow_redirects=allow_redirects)  # fmt: skip
        _check_status(response)
        return response

    return _tried(url, once, threading.Event())


def _fetch(url: str, path: Path, known: Remote, bar: tqdm, stop: threading.Event) -> None:
    part = path.with_name(path.name + ".part")
    _tried(url, lambda: _fetch_once(url, part, known, bar, stop), stop)
    if not stop.is_set():
        os.replace(part, path)


def _tried(url: str, once: Callable[[], T], stop: threading.Event) -> T | None:
    """`once()`, again where that may help; None where it is stopped meanwhile. Raises InputError."""
    for attempt in range(TRIES):
        if attempt and stop.wait(FIRST_PAUSE * 2 ** (attempt - 1)):
            return None
        try:
            return once()
        except (
            _TryAgainError,
            requests.ConnectionError,
            requests.Timeout,
            requests.exceptions.ChunkedEncodingError,
        ) as e:
            reason = e
        except requests.RequestException as e:
            raise InputError(f"{url} cannot be fetched ({e}): check --base-url") from e
    raise InputError(
        f"{url} cannot be fetched: {TRIES} tries, the last ended with: {' '.join(str(reason).split())}; "
        "check the network, or name a mirror with --base-url, and run it again: what has arrived is kept"
    )


def _check_status(response: requests.Response) -> None:
    if response.status_code in RETRIED_STATUS or response.status_code >= 500:
        raise _TryAgainError(f"status {response.status_code}")
    response.raise_for_status()


def _fetch_once(url: str, part: Path, known: Remote, bar: tqdm, stop: threading.Event) -> None:
    """Appends to `part` what it lacks, and checks size and checksum. A part that turns out wrong is removed."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        if response.status_code == 416:  # nothing beyond what is there: it was not ours to begin with, or is all there
            part.unlink(missing_ok=True)
            raise _TryAgainError("the server has fewer bytes than had arrived")
        _check_status(response)
        start, size = _extent(response, have)
        with full_disk_is_input_error(part.parent, size or 0), part.open("ab" if start else "wb") as file:
            for chunk in response.iter_content(CHUNK):
                if stop.is_set():
                    return
                file.write(chunk)
                bar.update(len(chunk))
        got = part.stat().st_size
        if size is not None and got < size:
            raise _TryAgainError(f"the connection was cut after {got:,} of {size:,} bytes")
        if size is not None and got > size:
            part.unlink()
            raise _TryAgainError(f"the server sent {got:,} bytes and had announced {size:,}")
        checksums = {_sha256_given([*response.history, response]), known.sha256} - {None}
    if known.size not in (None, got):
        part.unlink()
        raise _TryAgainError(f"the server sent {got:,} bytes and its listing says {known.size:,}")
    if checksums and checksums != {sha256_of(part)}:
        part.unlink()
        raise _TryAgainError("the SHA-256 is not the one the server gives")


def _extent(response: requests.Response, have: int) -> tuple[int, int | None]:
    """Where the answer's first byte belongs in the file, and the whole file's size where the server says it."""
    length = response.headers.get("Content-Length")
    if response.status_code != 206:  # the server ignores ranges, or none was asked for: all over again
        return 0, int(length) if length else None
    match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", response.headers.get("Content-Range", ""))
    if not match or int(match[1]) != have:
        raise _TryAgainError(f"asked for bytes from {have}, the server sent {response.headers.get('Content-Range')!r}")
    return have, None if match[3] == "*" else int(match[3])


def _sha256_given(answers: list[requests.Response]) -> str | None:
    """The checksum some servers give: of a file in large-file storage, the (linked) ETag is the SHA-256."""
    tags = [a.headers["X-Linked-Etag"] for a in answers if "X-Linked-Etag" in a.headers]
    tag = (tags or [answers[-1].headers.get("ETag", "")])[0].removeprefix("W/").strip('"')
    return tag.lower() if re.fullmatch(r"[0-9a-fA-F]{64}", tag) else None
