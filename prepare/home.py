"""Where prepared data lives."""

import os
from pathlib import Path

DEFAULT_SOURCE = "stdlib"
BUILT_IN_SOURCES = ("stdlib", "climbmix")


def home() -> Path:
    """`$TIMEBOX_HOME`, by default `~/.cache/timebox`."""
    return Path(os.environ.get("TIMEBOX_HOME") or "~/.cache/timebox").expanduser()


def downloads_folder(source: str) -> Path:
    return home() / "downloads" / source


def default_folder(source: str = DEFAULT_SOURCE) -> Path:
    """The folder that `prepare(source)` writes: the source's name, or a folder's base name, below `home()`."""
    if source in BUILT_IN_SOURCES:
        return home() / source
    name = Path(source).expanduser().resolve().name or "root"
    # A folder that happens to be called like one of our own must not replace it.
    return home() / (f"{name}-folder" if name in (*BUILT_IN_SOURCES, "downloads") else name)
