"""Trackio, which has wandb's interface and keeps its runs on this machine: `trackio show --project timebox`."""

import os
import sys
from typing import Any

from .about import About
from .wandb import id_of


def load() -> Any:
    """Raises ImportError."""
    import trackio

    # It prints where it likes. Its modules are told to print nothing: `sys.stdout` belongs to all threads.
    for name, module in [*sys.modules.items()]:
        if name.partition(".")[0] == "trackio":
            module.print = lambda *words, **options: None
    return trackio


def abandon() -> None:
    """Its thread is a daemon."""


def said(about: About) -> str:
    return "trackio"


class Writer:
    """See `Tracker`. A run is known by its name: to that of the folder its id is added, since folders of one name may
    lie in several places."""

    def __init__(self, about: About):
        name = f"{about.name}-{id_of(about.folder, 'trackio')}"
        self.run = load().init(
            project=os.environ.get("TRACKIO_PROJECT") or "timebox", name=name, group=about.group,
            config={"description": about.description, **about.config}, resume="allow", embed=False,
            auto_log_gpu=False, auto_log_cpu=False,
        )  # fmt: skip
        self.last = about.first_step

    def step(self, row: dict[str, float]) -> None:
        self.last = int(row["step"])
        self.run.log({key: value for key, value in row.items() if key != "step"}, step=self.last)

    def end(self, summary: dict[str, Any], sample: str) -> None:
        told = {key: value for key, value in summary.items() if value is not None}
        self.run.log({**{f"summary/{key}": value for key, value in told.items()}, "sample": sample}, step=self.last)

    def close(self, finished: bool) -> None:
        self.run.finish()
