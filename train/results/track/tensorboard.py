"""Event files for TensorBoard, in the run's folder: `tensorboard --logdir runs` shows all of them."""

import json
from typing import Any

from .about import About, numbers


def load() -> None:
    """Raises ImportError."""
    import tensorboard  # noqa: F401 -- named, where it is missing, as the package is
    from torch.utils.tensorboard import SummaryWriter  # noqa: F401 -- seconds of import, for who asks for it


def abandon() -> None:
    """Its thread is a daemon."""


def said(about: About) -> str:
    return "tensorboard"


class Writer:
    """See `Tracker`."""

    def __init__(self, about: About):
        from torch.utils.tensorboard import SummaryWriter

        # What an interrupted process wrote after its checkpoint is not shown: those steps are made again.
        self.writer = SummaryWriter(str(about.folder / "tensorboard"), purge_step=about.first_step or None)
        self.last = about.first_step
        told = {"name": about.name, "group": about.group, "description": about.description, **about.config}
        self.writer.add_text("config", as_code(json.dumps(told, indent=2)), self.last)

    def step(self, row: dict[str, float]) -> None:
        self.last = int(row["step"])
        for name, value in row.items():
            if name != "step":
                self.writer.add_scalar(name, value, self.last)

    def end(self, summary: dict[str, Any], sample: str) -> None:
        for name, value in numbers(summary).items():
            self.writer.add_scalar(f"summary/{name}", value, self.last)
        self.writer.add_text("summary", as_code(json.dumps(summary, indent=2)), self.last)
        self.writer.add_text("verdict", as_code(str(summary["verdict"])), self.last)
        self.writer.add_text("sample", as_code(sample), self.last)

    def close(self, finished: bool) -> None:
        self.writer.close()


def as_code(text: str) -> str:
    """As Markdown, which is how TensorBoard reads a text, that shows `text` as it is."""
    return "\n".join("    " + line for line in text.splitlines())
