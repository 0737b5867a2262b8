"""Where prepared data lives."""

import os
from pathlib import Path

from .errors import InputError

DEFAULT_SOURCE = "stdlib"
BUILT_IN_SOURCES = ("stdlib", "climbmix")


def home() -> Path:
    """`$TIMEBOX_HOME`, by default `~/.cache/timebox`."""
    return expanded(os.environ.get("TIMEBOX_HOME") or "~/.cache/timebox")


def expanded(path: str | Path) -> Path:
    """With `~` as a home. Raises InputError where there is none: in a container without HOME, or of an unknown user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        what = f"{path}: this system does not know where the home {Path(path).parts[0]} is"
        raise InputError(f"{what}; name a whole path, set HOME, or TIMEBOX_HOME") from None


def downloads_folder(source: str) -> Path:
    return home() / "downloads" / source


def default_folder(source: str = DEFAULT_SOURCE) -> Path:
    """The folder that `prepare(source)` writes: the source's name, or a folder's base name, below `home()`."""
    if source in BUILT_IN_SOURCES:
        return home() / source
    name = expanded(source).resolve().name or "root"
    # A folder that happens to be called like one of our own must not replace it.
    return home() / (f"{name}-folder" if name in (*BUILT_IN_SOURCES, "downloads") else name)
