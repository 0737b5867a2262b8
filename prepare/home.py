"""Where prepared data lives."""

import os
import re
from pathlib import Path

from .errors import InputError

DEFAULT_SOURCE = "stdlib"
FETCHED_SOURCES = ("climbmix", "fineweb-edu", "tinystories")
BUILT_IN_SOURCES = ("stdlib", *FETCHED_SOURCES)


def home() -> Path:
    """`$TIMEBOX_HOME`, by default `~/.cache/timebox`."""
    return expanded(os.environ.get("TIMEBOX_HOME") or "~/.cache/timebox")


def expanded(path: str | Path) -> Path:
    """With `~` as a home. Raises InputError where there is none: in a container without HOME, or of an unknown user;
    and where the path is empty, which would be the current folder: a variable of a script that is not set."""
    if not str(path):
        raise InputError("an empty path was given, which names no folder: leave the option out, or name one")
    try:
        return Path(path).expanduser()
    except RuntimeError:
        what = f"{path}: this system does not know where the home {Path(path).parts[0]} is"
        raise InputError(f"{what}; name a whole path, set HOME, or TIMEBOX_HOME") from None


def downloads_folder(source: str) -> Path:
    return home() / "downloads" / source


def default_folder(source: str = DEFAULT_SOURCE) -> Path:
    """The folder that `prepare(source)` writes, below `home()`: the source's name, a folder's base name, or that of a
    file without its ending."""
    if source in BUILT_IN_SOURCES:
        return home() / source
    path = expanded(source).resolve()
    name = re.sub(r"\.\w+(\.(gz|zst))?$", "", path.name) if path.is_file() else path.name or "root"
    # A folder that happens to be called like one of our own must not replace it.
    return home() / (f"{name}-folder" if name in (*BUILT_IN_SOURCES, "downloads") else name)
