"""Which run goes on, and whether it still is the same run."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from prepare import InputError
from prepare.files import read_json

from ..config import TrainConfig, parse_given, runs_folder
from . import failure
from .checkpoint import checkpoint_folders
from .durable import LOCK, hold_lock

# A run that goes on is one run: what makes it several, or part of a group, was settled when it began.
OF_A_GROUP = ("repeat", "confirm", "max_seeds", "group")


def parse(args: list[str] | None = None, launched: bool = False) -> TrainConfig:
    """The configuration that a command line asks for; with --resume the run's own, whose folder `resume` then is.
    `launched`: by torchrun.

    Raises InputError where there is no such run, or where an option differs from what it was started with.
    """
    given = parse_given(args)
    if launched:
        if "gpu" in given:
            raise InputError("torchrun gives each of its processes a GPU: leave --gpu out, or torchrun")
        given["gpu"] = None  # whatever a run began with that goes on
    if "resume" not in given:
        return TrainConfig(**given)
    folder = newest_interrupted_run() if given["resume"] == "auto" else Path(given["resume"])
    return resumed(folder, given)


def resumed(folder: Path, given: dict[str, Any]) -> TrainConfig:
    """The configuration of an interrupted run, as `given` options change what may be changed. Raises InputError."""
    path = folder / "config.json"
    # What differs in it from the checkpoint is named there; its seal could only say that something does.
    saved = read_json(path, "name the folder of an interrupted run")
    try:
        config = TrainConfig.from_json(saved["config"])
        data = str(saved["data"]["folder"])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path} is not the configuration of a run") from None
    fixed = config.fixed() | {key: getattr(config, key) for key in OF_A_GROUP}
    asked = {key: value for key, value in given.items() if key in fixed}
    check_same(f"--resume {folder}", asked, fixed, "leave these options out, or start a new run")
    free = {key: value for key, value in given.items() if key not in fixed}
    return dataclasses.replace(config, **({"data": data} | free | {"resume": str(folder)}))


def check_same(what: str, now: dict[str, Any], then: dict[str, Any], mend: str) -> None:
    """Raises InputError, with every difference named, where a value of `now` is not that of `then`."""
    different = [
        f"{key} was {then.get(key)!r} and is {value!r}" for key, value in now.items() if then.get(key) != value
    ]
    if different:
        raise InputError(f"{what}: {', '.join(different)}; {mend}")


def newest_interrupted_run() -> Path:
    """The one below `runs_folder` that has written a checkpoint last, is in no process's hands, and has neither
    finished nor failed: it would fail again."""
    candidates = []
    for run in runs_folder().glob("*"):
        checkpoints = checkpoint_folders(run / "checkpoints")
        ended = (run / "summary.json").exists() or (run / failure.FOLDER).exists()
        if checkpoints and not ended and is_free(run):
            candidates.append((checkpoints[0].stat().st_mtime, run))
    if not candidates:
        raise InputError(f"--resume auto: there is no interrupted run with a checkpoint below {runs_folder()}/")
    return max(candidates)[1]


def run_of_launch(launch: str | None, named: str | None) -> Path | None:
    """The unfinished run that an earlier attempt of this torchrun began, in the folder `named` or below runs/. None
    where it came to none. Raises InputError where it failed at a step: it would again."""
    for run in [Path(named)] if named else runs_folder().glob("*"):
        path = run / "config.json"
        if not path.is_file() or read_json(path, "start anew").get("launch") != launch:
            continue
        if (run / failure.FOLDER).exists():
            raise InputError(f"{run} failed at a step, and would again: it is not started once more")
        if not (run / "summary.json").exists():
            return run
    return None


def is_free(run: Path) -> bool:
    """Whether no process holds the run's folder. Nothing is written to find out; what this user may not write to, or
    nobody, as on a read-only medium, is no run to go on with."""
    if not os.access(run, os.W_OK):
        return False
    try:
        descriptor = os.open(run / LOCK, os.O_RDWR | os.O_APPEND)
    except FileNotFoundError:
        return True
    except PermissionError:
        return False
    try:
        return hold_lock(descriptor, run, wait=False)
    finally:
        os.close(descriptor)
