"""What trains at this moment, by the folders of runs that have begun and not ended."""

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from statistics import median

from prepare.words import printable

from ..resilience.resume import is_free
from ..results.ledger import Ledger
from .folders import Folders, number

# Without a word for so long, a run is taken to have been killed. A run that hangs ends itself after 600 s.
SILENT = 900.0
# After so long its lock is asked for. Not sooner: a run that begins at that moment would find its folder in use.
QUIET = 10.0
KILLED = "killed, most likely: no process holds its folder"


def running(ledger: Ledger, label: str, folders: Folders, now: float) -> list[dict]:
    """The runs beside `ledger` that go on at `now`, in seconds since 1970."""
    ended = {run["run"]: run for run in ledger.runs()}
    found = []
    for name, folder in sorted(folders.of(ledger.folder).items()):
        if (folder / "summary.json").exists() or not (sign := _last_sign(folder)):
            continue
        row = ended.get(name)
        # One that was interrupted may go on; the row of its first end stays.
        over = row is not None and (row["outcome"] != "interrupted" or sign <= _seconds(row["time"]) + 5)
        if over or now - sign > SILENT:
            continue
        config = _config(folder)
        steps = folders.last_step(folder)
        last = steps[-1] if steps else {}
        evals = folders.evals(folder)
        progress = number(last.get("progress"))
        found.append({
            "run": name,
            "ledger": label,
            "description": printable(config.get("description") or ""),
            "group": printable(config.get("group") or name),
            "seed": number(config.get("seed")),
            "step": number(last.get("step")),
            "progress": progress,
            "remaining_seconds": _remaining(config, steps),
            "loss": number(last.get("smooth_loss")),
            "tokens_per_second": number(last.get("tokens_per_second")),
            "last_eval": evals and {key: values[-1] for key, values in evals.items()},
            "last_sign_seconds_ago": max(0.0, round(now - sign, 1)),
            "phase": KILLED if now - sign > QUIET and is_free(folder) else "setting up" if not steps
                     else "trained, and being evaluated" if progress == 1 else "training",
            "curve": folders.curve(folder),
        })  # fmt: skip
    return found


def _last_sign(folder: Path) -> float | None:
    """When it last wrote something. None where it has not even a configuration."""
    times = []
    for name in ("config.json", "metrics.jsonl"):
        try:
            times.append((folder / name).stat().st_mtime)
        except OSError:
            if name == "config.json":
                return None
    return max(times)


def _config(folder: Path) -> dict:
    try:
        config = json.loads((folder / "config.json").read_bytes())["config"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def _seconds(time: str) -> float:
    try:
        return datetime.fromisoformat(time).timestamp()
    except (ValueError, OverflowError):
        return 0.0


def _remaining(config: dict, steps: Sequence[dict]) -> float | None:
    """Seconds of training after the last step that was written; what comes after training is no part of it."""
    if not steps:
        return number(config.get("time_budget"))
    count, budget = number(config.get("steps")), number(config.get("time_budget"))
    step, timed = number(steps[-1].get("step")), number(steps[-1].get("timed_seconds"))
    if count is not None and step is not None:
        paces = [pace for row in steps if (pace := number(row["seconds"])) is not None]
        return round(max(0.0, count - 1 - step) * median(paces), 1) if paces else None
    if budget is not None and timed is not None:
        return round(max(0.0, budget - timed), 1)
    return None
