"""A small night with folders, and its page read back without a browser."""

import json
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

from tests.helpers.ledger_entries import add, entry
from train.page.facts import facts
from train.page.folders import Folders
from train.page.html import page
from train.results.ledger import Ledger
from train.results.night import gather

NOW = 1_795_000_000.0
DIFF = "diff --git a/x.py b/x.py\n--- a/x.py\n+++ b/x.py\n@@ -1 +1 @@\n-width = 1\n+width = 2 < 3 & 4\n"


def of_seeds(name: str, *values: float, first: int = 42, **more) -> list[dict]:
    return [entry(f"{name}-{s}", value, group=name, seed=s, **more) for s, value in enumerate(values, first)]


def rows_of(steps: int, loss: float = 3.0) -> list[dict]:
    """Of metrics.jsonl; the first two are not timed."""
    return [
        {"step": i, "progress": (i + 1) / steps, "loss": loss, "smooth_loss": loss + 1 / (1 + i), "lr_multiplier": 1.0,
         "seconds": 0.5, "timed_seconds": max(0, i - 1) * 0.5, "tokens_per_second": 1000.0, "mfu": None}
        for i in range(steps)
    ]  # fmt: skip


def evals_of(*steps: int, bpb: float = 1.5) -> str:
    """Of evals.jsonl, beside `rows_of`."""
    return "".join(json.dumps({"step": i, "timed_seconds": max(0, i - 2) * 0.5, "val_bpb": bpb + 1 / i,
                               "sample": f"after {i}\n<b>"}) + "\n" for i in steps)  # fmt: skip


def write_run(folder: Path, steps: int = 10, **files: str) -> Path:
    """What a run leaves that the page reads; `files`: other contents, by the first word of a name."""
    folder.mkdir(parents=True)
    contents = {
        "metrics.jsonl": "\n".join(map(json.dumps, rows_of(steps))) + "\n", "changes.diff": DIFF,
        "sample.txt": "def f():\n    return 1\n", "summary.json": "{}",
    }  # fmt: skip
    for name, content in contents.items():
        (folder / name).write_text(files.get(name.partition(".")[0], content))
    return folder


def a_small_night(folder: Path, **luck) -> Ledger:
    """A baseline, a lucky one, a gain, one that is worse and one that crashed; each has its runs' folders."""
    ledger = Ledger(folder)
    add(ledger, *of_seeds("base", 1.000, 1.004, 0.996, description="baseline"))
    add(ledger, *of_seeds("lucky", 0.992, 1.004, **({"description": "all rates higher"} | luck)))
    more = {"summary": {"total_tokens_M": 2.5, "mfu_percent": None}, "seconds": {"total": 320.0, "training": 300.0}}
    add(ledger, *of_seeds("gain", 0.970, 0.971, description="wider", flags=["--depth=9"], **more))
    add(ledger, entry("worse", 1.2, description="half the width"), entry("broken", description="no luck"))
    for run in ledger.runs():
        write_run(folder / run["run"])
    return ledger


def facts_of(*folders: Path, now: float = NOW) -> dict:
    return facts(*gather(folders, may_be_empty=True), Folders(), now)


@dataclass
class Element:
    tag: str
    attributes: dict[str, str | None]
    children: list["Element | str"] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    def all(self, tag: str | None = None, **attributes: str) -> list["Element"]:
        """Below it, in order; `class_` stands for a class among others."""
        found = []
        for child in self.children:
            if isinstance(child, Element):
                fits = tag in (None, child.tag)
                for name, value in attributes.items():
                    have = child.attributes.get(name.rstrip("_")) or ""
                    fits &= value in (have.split() if name == "class_" else [have])
                found += ([child] if fits else []) + child.all(tag, **attributes)
        return found

    def one(self, tag: str | None = None, **attributes: str) -> "Element":
        (found,) = self.all(tag, **attributes)
        return found


EMPTY = {"meta", "input", "br"}


class _Reader(HTMLParser):
    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open = [Element("", {})]

    def handle_starttag(self, tag, attrs):
        element = Element(tag, dict(attrs))
        self.open[-1].children.append(element)
        if tag not in EMPTY:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open[-1].tag == tag, f"</{tag}> ends <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data):
        self.open[-1].children.append(data)


def read_page(content: bytes) -> Element:
    """As elements: every one that is opened is closed, in its place."""
    reader = _Reader()
    reader.feed(content.decode())
    reader.close()
    (root,) = reader.open
    return root


def page_of(*folders: Path, refresh: int | None = None) -> Element:
    return read_page(page(facts_of(*folders), NOW, refresh))
