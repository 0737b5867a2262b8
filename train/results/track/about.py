"""What a tracker is told of a run."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Paths, and what a tracker has a place of its own for.
HIDDEN = ("data", "run_dir", "resume", "init_from", "track", "name", "group", "description")


@dataclass(frozen=True)
class About:
    """What a tracker is told of a run before its first row."""

    folder: Path
    name: str
    group: str
    description: str
    config: dict[str, Any]  # JSON can hold it, and it names no path of this machine
    first_step: int  # 0, or where a resumed run goes on


def told_config(config: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Of a run's configuration what a tracker is told, and `more` that is known of the run: no path."""
    return {**{key: value for key, value in config.items() if key not in HIDDEN}, **more}


def told_data(fingerprint: Mapping[str, str]) -> dict[str, str]:
    """Of a corpus: its hashes, and the last part of its name, which may be a path."""
    return {**fingerprint, "source": Path(fingerprint["source"]).name}


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """Those of a row or a summary: a tracker draws nothing else. What is not finite is left out too."""
    return {
        key: value for key, value in row.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }  # fmt: skip
