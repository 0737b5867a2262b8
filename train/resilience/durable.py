"""Files that a crash leaves whole: written beside, on the disk before they are renamed, and so is the renaming; and
locks. A file system that can do neither is said to be one, and is taken as it is."""

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prepare.files import sealed
from prepare.words import say_once

try:
    import fcntl
except ImportError:  # as on Windows: it counts as a file system without locks
    fcntl = None

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
# What NFS, Lustre, CIFS and FUSE answer where they cannot sync a folder, or have no locks.
NO_SYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
NO_LOCKS = (*NO_SYNC, errno.ENOLCK)
LOCK = "run.lock"  # in a folder that belongs to one process
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
        _fsync(file.fileno(), path.parent)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Has a file's content, or a folder's names, on the disk when it returns."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError as error:  # so Windows answers for every folder
        if not path.is_dir():
            raise
        return _no_sync(path, error)
    try:
        with naming(path):
            _fsync(descriptor, path)
    finally:
        os.close(descriptor)


def _fsync(descriptor: int, where: Path) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise
        _no_sync(where, error)


def _no_sync(where: Path, error: OSError) -> None:
    reason = f"the file system of {where} does not sync it ({error.strerror})"
    say_once("sync", f"{reason}: a power cut may cost what is newest there")


class NoLocksError(OSError):
    """The file system, or the system, has no locks."""


def try_lock(descriptor: int, wait: bool = False) -> bool:
    """Locks a file until it is closed, and until the process ends however it ends; it is open for writing, since NFS
    locks no other. Whether it could: not where another process holds it and this one does not wait. Raises NoLocksError
    where there is no such thing."""
    if fcntl is None:
        raise NoLocksError(errno.ENOSYS, "this system has no flock")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        raise NoLocksError(error.errno, error.strerror) from None
    return True


def hold_lock(descriptor: int, folder: Path, wait: bool = True) -> bool:
    """`try_lock` of a file in `folder`; where there are no locks nothing can be held off, and a note says so."""
    try:
        return try_lock(descriptor, wait)
    except NoLocksError as error:
        reason = f"the file system of {folder} has no locks ({error.strerror})"
        say_once("locks", f"{reason}: nothing keeps two processes from one run, so let there be one alone")
    return True


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


def write_json(path: Path, value: dict) -> None:
    """Sealed, for `read_sealed`."""
    replace_file(path, (json.dumps(sealed(value), indent=2) + "\n").encode())


def lock(folder: Path) -> int | None:
    """A descriptor that holds the folder's lock until it is closed, and until the process ends however it ends; None
    where another holds it. The lock is on a file inside, which stays when it is given back: whoever removed it might
    remove that of the next. Its owner may, once nobody wants the lock any more (`RunFolder.close`)."""
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    if hold_lock(descriptor, folder, wait=False):
        return descriptor
    os.close(descriptor)
    return None
