"""The one exception for what the user can mend."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .words import printable

STDOUT, STDERR = 1, 2


class InputError(Exception):
    """Bad input or bad arguments: one line that names what is wrong and how to mend it."""


def one_line(error: Exception, mend: str) -> str:
    """What a command says before it ends with 2. An InputError says all of it; an OSError has the path and what is
    wrong there, to which `mend` adds the options that name another. One that is about no path has no such mend."""
    if not isinstance(error, OSError):
        return printable(error)
    if error.filename:
        return printable(f"{error.filename}: {error.strerror}; {mend}")
    what = error.strerror or " ".join(str(error).split())
    if lost := lost_output(error):
        return lost
    return f"{what}; {mend}" if error.errno in (errno.ENOSPC, errno.EDQUOT) else what


def lost_output(error: OSError) -> str:
    """What to say where `error` is that standard output takes nothing more, as on a full disk, and nothing where it is
    another: the errors of a stream name no file, so writing is tried again. Then the stream is silenced, since Python
    would try once more at the very end, and exit with 120."""
    if error.filename or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EPIPE):
        return ""
    try:
        print(flush=True)
    except OSError:
        silence(STDOUT)
        return f"standard output: {error.strerror}; send it elsewhere"
    return ""


def silence(descriptor: int) -> None:
    """What is written there from here on, and what waits in Python's buffer, goes nowhere."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)


def readable_size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.2f} MB"


# What the caller can mend by naming another path, or by changing its permissions.
_MENDABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP)


MEND = "name another path with TIMEBOX_HOME, or prepare's --out or --source, or change its permissions"


@contextmanager
def bad_path_is_input_error() -> Iterator[None]:
    """Turns an OSError about a path that cannot be read or written into an InputError that names it."""
    try:
        yield
    except OSError as e:
        if e.errno not in _MENDABLE or e.filename is None:
            raise
        raise InputError(one_line(e, MEND)) from e


@contextmanager
def full_disk_is_input_error(folder: Path, needed: int) -> Iterator[None]:
    """Turns "no space left" (or over quota) below `folder` into an InputError; `needed` is an estimate in bytes."""
    try:
        yield
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = readable_size(shutil.disk_usage(folder).free)
        raise InputError(
            f"the disk of {folder} is full: this needs about {readable_size(needed)} there and {free} are free; "
            "make room, or name a folder on another disk (--out, or TIMEBOX_HOME)"
        ) from e
