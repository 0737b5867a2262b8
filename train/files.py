"""Files that a crash leaves whole: written beside, on the disk before they are renamed, and so is the renaming."""

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
CHUNK = 2**23  # bytes hashed and written at a time: hashed while they are in the cache


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError names the file also where the system does not: a full disk is noticed by a write, or by a sync."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_synced(path: Path, *pieces: bytes | memoryview) -> str:
    """Writes `pieces` one after the other. On the disk when it returns their SHA-256, in hex."""
    digest = hashlib.sha256()
    with naming(path), open(path, "wb") as file:
        for piece in map(memoryview, pieces):
            for start in range(0, len(piece), CHUNK):
                chunk = piece[start : start + CHUNK]
                digest.update(chunk)
                file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Has a file's content, or a folder's names, on the disk when it returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename_synced(part: Path, path: Path) -> None:
    """`part`, itself on the disk already, becomes `path`: after a crash there is the one or the other."""
    os.replace(part, path)
    sync(path.parent)


def replace_file(path: Path, *pieces: bytes | memoryview) -> None:
    """A reader, and whoever comes after a crash, sees the old file or the new one, whole. Where it cannot be written
    nothing is left of it: the room goes back, and an export can be tried again. A link stays one, and what is no plain
    file is written to as it is: /dev/null, a pipe."""
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        path.write_bytes(b"".join(pieces))
        return
    part = path.with_name(path.name + ".part")
    try:
        write_synced(part, *pieces)
    except OSError:
        part.unlink(missing_ok=True)
        raise
    rename_synced(part, path)
