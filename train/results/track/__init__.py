"""Trackers, `--track`: programs of others that show a run beside its own files. None is imported unless asked for.

Each works in a thread of its own, which takes rows from a queue: however slow or broken a tracker is, no step waits for
it. It starts before the first step, which it would slow down. What it raises is said once, and it is dropped.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from queue import Full, Queue
from threading import Event, Thread
from typing import Any, Protocol

from prepare import InputError
from prepare.words import install_line, is_utf8, printable

from ...config import TRACKERS
from . import tensorboard, trackio, wandb
from .about import About, numbers

MODULES = {"tensorboard": tensorboard, "wandb": wandb, "trackio": trackio}
assert (*MODULES,) == TRACKERS
BACKLOG = 10_000  # rows that a tracker may be behind by
PATIENCE = 25.0  # seconds that a run waits for it at its beginning, and at its end


class Tracker(Protocol):
    """What each of the modules here has as `Writer`. Whatever it raises costs the run nothing."""

    def __init__(self, about: About): ...

    def step(self, row: dict[str, float]) -> None:
        """The numbers of a row of metrics.jsonl, `step` among them."""

    def end(self, summary: dict[str, Any], sample: str) -> None:
        """The summary of a finished run, its verdict included, and the words that its model makes up."""

    def close(self, finished: bool) -> None:
        """The last call. Not `finished`: the run failed, or was interrupted and may go on."""


def names_of(track: str | None) -> list[str]:
    return track.split(",") if track else []


def check_trackers(track: str | None, folder: Path) -> None:
    """Raises InputError where one of them is not installed or does not start, or cannot write below a path as that of
    `folder`."""
    for name in names_of(track):
        if name not in MODULES:
            raise InputError(f"--track: {name!r} is none of {', '.join(MODULES)}")
        try:
            MODULES[name].load()
        except ModuleNotFoundError as error:
            missing = "the package is" if error.name == name else f"its package {error.name} is"
            raise InputError(f"--track {name}: {missing} not installed: {install_line('-e', f'.[{name}]')}, or leave"
                             " the flag out") from None  # fmt: skip
        except InputError:
            raise
        except Exception as error:  # of any kind: it is the code of others
            raise InputError(f"--track {name}: the package cannot be imported ({one_line(error)}):"
                             f" {install_line('-e', f'.[{name}]')}, or leave the flag out") from None  # fmt: skip
        if not is_utf8(folder):
            what = f"the package takes no path that is not UTF-8, as {folder}"
            raise InputError(f"--track {name}: {what}: choose another --run-dir, or leave the flag out")


def one_line(error: BaseException) -> str:
    reason = printable(" ".join(str(error).split()))[:200]
    return f"{type(error).__name__}: {reason}" if reason else type(error).__name__


def track(names: str, about: About) -> "Tracking":
    """Begins, and says which they are."""
    print(f"track:  {', '.join(MODULES[name].said(about) for name in names_of(names))}", flush=True)
    return Tracking(names, about)


class Tracking:
    """The trackers of a run, as one that writes each row of its metrics too."""

    def __init__(self, names: str, about: About):
        self.finished = False
        self.each = [_Apart(name, MODULES[name].Writer, about) for name in names_of(names)]
        for one in self.each:
            one.has_begun()

    def write(self, row: dict) -> None:
        for one in self.each:
            one.does("step", numbers(row))

    def end(self, summary: dict[str, Any], sample: str) -> None:
        self.finished = True
        for one in self.each:
            one.does("end", summary, sample)

    def close(self) -> None:
        for one in self.each:
            one.does("close", self.finished)
        for one in self.each:
            one.leave()


class _Apart:
    """One tracker, and its thread. The thread is a daemon: the process ends without it where it must."""

    def __init__(self, name: str, make: Callable[[About], Tracker], about: About):
        self.name, self.gone, self.begun = name, False, Event()
        self.queue: Queue = Queue(BACKLOG)
        self.thread = Thread(target=self._work, args=(make, about), name=f"track {name}", daemon=True)
        self.thread.start()

    def has_begun(self) -> None:
        """Waits for it."""
        if not self.begun.wait(PATIENCE):
            self._drop(f"it does not start within {PATIENCE:.0f} s")

    def does(self, call: str, *arguments: Any) -> None:
        if self.gone:
            return
        try:
            self.queue.put_nowait((call, arguments))
        except Full:
            self._drop(f"it is {BACKLOG:,} rows behind")

    def leave(self) -> None:
        """After its last call."""
        self.thread.join(0.0 if self.gone else PATIENCE)
        if self.thread.is_alive():
            self._drop(f"it does not end within {PATIENCE:.0f} s")
            MODULES[self.name].abandon()

    def _work(self, make: Callable[[About], Tracker], about: About) -> None:
        try:
            tracker = make(about)
            self.begun.set()
            call = ""
            while call != "close" and not self.gone:
                call, arguments = self.queue.get()
                getattr(tracker, call)(*arguments)
        except BaseException as error:
            self._drop(one_line(error))
            self.begun.set()
            MODULES[self.name].abandon()

    def _drop(self, reason: str) -> None:
        if not self.gone:
            self.gone = True
            redrawn = "\n" * sys.stdout.isatty()
            print(f"{redrawn}note: --track {self.name} is dropped, and the run goes on: {printable(reason)}",
                  file=sys.stderr, flush=True)  # fmt: skip
