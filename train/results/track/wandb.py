"""Weights & Biases. Where this machine has no key for it, or WANDB_MODE=offline, all stays in the run's folder.

WANDB_PROJECT names the project (default: timebox); the other variables of wandb hold too.
"""

import atexit
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from netrc import NetrcParseError, netrc
from pathlib import Path
from threading import get_ident
from typing import Any
from urllib.parse import urlsplit

import psutil

from prepare import InputError
from prepare.words import quoted

from ...resilience.durable import replace_file
from .about import About

SERVICE = "wandb-core"  # the process that wandb starts: it writes, and sends
_hooks: list[Callable] = []  # that wandb has registered for the end of this process


def load() -> Any:
    """The package. Raises ImportError, and InputError where it would ask for a key, which nobody could answer."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # it reports its own faults to its maker, offline too
    os.environ.setdefault("WANDB_SILENT", "true")  # what goes wrong is said here
    import wandb

    if mode() == "online" and not has_key():
        raise InputError("--track wandb: WANDB_MODE is online, and there is no key: wandb login, or WANDB_API_KEY; or"
                         " leave WANDB_MODE out, and the run is written offline")  # fmt: skip
    return wandb


def has_key() -> bool:
    """Whether it can log in without asking."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname
    try:
        return netrc(os.environ.get("NETRC")).authenticators(host or "") is not None
    except (OSError, NetrcParseError):
        return False


def mode() -> str:
    return os.environ.get("WANDB_MODE") or ("online" if has_key() else "offline")


def abandon() -> None:
    """Ends the process that wandb started: at its own end this one would wait for it, or complain that it is gone."""
    while _hooks:
        atexit.unregister(_hooks.pop())
    for child in psutil.Process().children():
        try:
            if child.name() == SERVICE:
                child.kill()
        except psutil.Error:  # it has ended by itself
            pass


@contextmanager
def noting_hooks() -> Iterator[None]:
    """Inside, what this thread has called at the end of the process is noted in `_hooks` too."""
    register, thread = atexit.register, get_ident()

    def note(hook, *args, **kwargs):
        if get_ident() == thread:
            _hooks.append(hook)
        return register(hook, *args, **kwargs)

    atexit.register = note
    try:
        yield
    finally:
        atexit.register = register


def said(about: About) -> str:
    if mode() != "offline":
        return "wandb"
    return f"wandb, offline (wandb sync {quoted(about.folder / 'wandb')}/offline-run-* sends it)"


def id_of(folder: Path, tracker: str) -> str:
    """Of the run in `folder`, there from its first process on: what goes on in the tracker is the same run."""
    path = folder / f"{tracker}-id"
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        new = secrets.token_hex(4)
        replace_file(path, f"{new}\n".encode())
        return new


class Writer:
    """See `Tracker`."""

    def __init__(self, about: About):
        wandb = load()
        # The console is ours, and what is sent is what `about` says: not the host, the paths, the packages, or git's
        # remote. Its samples of the machine's load would take the time of the steps that they measure.
        settings = wandb.Settings(
            silent=True, console="off", disable_git=True, disable_code=True, save_code=False, x_disable_meta=True,
            x_disable_stats=True, x_disable_machine_info=True, x_save_requirements=False, init_timeout=20.0,
            finish_timeout=15.0, host="",
        )  # fmt: skip
        with noting_hooks():
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT") or "timebox", id=id_of(about.folder, "wandb"), resume="allow",
                name=about.name, group=about.group, notes=about.description or None, config=about.config,
                dir=str(about.folder), mode=mode(), settings=settings,
            )  # fmt: skip

    def step(self, row: dict[str, float]) -> None:
        # By its own count of steps: those that a resumed run makes again it has already, and takes no second time.
        self.run.log({key: value for key, value in row.items() if key != "step"}, step=int(row["step"]))

    def end(self, summary: dict[str, Any], sample: str) -> None:
        self.run.summary.update({**summary, "sample": sample})

    def close(self, finished: bool) -> None:
        self.run.finish(exit_code=0 if finished else 1)
