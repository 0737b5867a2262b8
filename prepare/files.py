"""JSON that is believed only where it is whole: what steers a run is read here, and nothing read can run code."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import InputError
from .words import is_utf8

MAX_JSON_BYTES = 1 << 26  # the largest of ours, the manifest of 6,543 shards, has some 3 MB
SEAL = "sha256"


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def library_path(path: Path) -> Iterator[str]:
    """What safetensors and Arrow, which know no path but UTF-8, can open while it is entered."""
    if is_utf8(path):
        yield str(path)
    else:
        with path.open("rb") as file:
            yield f"/dev/fd/{file.fileno()}"


def seal_of(content: dict) -> str:
    """SHA-256, in hex, of all of `content` but its seal; the order of the keys and white space do not matter."""
    rest = {key: value for key, value in content.items() if key != SEAL}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode("utf-8")).hexdigest()


def sealed(content: dict) -> dict:
    """`content` and its seal: written like this, a changed bit is found on reading."""
    return {**content, SEAL: seal_of(content)}


def read_json(path: Path, mend: str) -> dict:
    """The object in a JSON file. `mend` ends the line of the InputError where there is none."""
    return parse_json(read_bytes(path, mend), path, mend)


def read_bytes(path: Path, mend: str) -> bytes:
    """Of a file that is to hold JSON. Raises InputError as `read_json`."""
    if not path.is_file():  # nor a pipe, which would be waited for
        raise InputError(f"{path} is missing; {mend}")
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"it is larger than {MAX_JSON_BYTES >> 20} MiB")
        return path.read_bytes()
    except (ValueError, OSError) as error:
        raise InputError(f"{path} cannot be read ({_one_line(error)}); {mend}") from error


def parse_json(content: bytes, path: Path, mend: str) -> dict:
    """The object in `content`, which was read from `path`. Raises InputError as `read_json`."""
    try:
        content = json.loads(content.decode("utf-8"), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({_one_line(error)}); {mend}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is no JSON object; {mend}")
    return content


def read_sealed(path: Path, mend: str) -> dict:
    """As `read_json`, of a file that was written `sealed`; without the seal. Raises InputError where it is broken."""
    content = read_json(path, mend)
    if content.pop(SEAL, None) != seal_of(content):
        raise InputError(f"{path} has changed since it was written (its {SEAL} disagrees); {mend}")
    return content


def _object(pairs: list[tuple]) -> dict:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a key appears twice")
    return content


def _one_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
