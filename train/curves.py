"""`python -m train.curves RUN`: draws `curves.png`, loss, learning rate, tokens/s and MFU against seconds."""

import json
import math
import sys
from itertools import accumulate
from pathlib import Path

from prepare.arguments import Parser, command
from prepare.words import printable

from .results.plot import BLUE, GREY, INK, ORANGE, new_figure, save, tidy

NAME = "curves.png"


def read_metrics(folder: Path) -> list[dict]:
    """The steps of metrics.jsonl; a damaged line is left out."""
    steps = []
    try:
        lines = (folder / "metrics.jsonl").read_bytes().splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            row = json.loads(line)
            row["seconds"], row["loss"], row["smooth_loss"], row["lr_multiplier"], row["tokens_per_second"], row["mfu"]
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
        if all(isinstance(value, int | float | None) for value in row.values()):
            steps.append(row)
    return steps


def draw_curves(folder: Path) -> Path | None:
    """Writes `curves.png` into a run's folder, from its metrics. None where there are none, or it cannot be written: a
    picture that is missing must not cost a run."""
    steps = read_metrics(folder)
    if not steps:
        return None
    try:
        return _draw(folder, steps)
    except Exception as error:  # whatever matplotlib or the disk has
        print(f"note: no {NAME}: {type(error).__name__}: {printable(error)}", file=sys.stderr)
        return None


def _draw(folder: Path, steps: list[dict]) -> Path:
    seconds = list(accumulate(step["seconds"] for step in steps))
    first_timed = next((i for i, step in enumerate(steps) if step.get("timed_seconds", 1) > 0), 0)

    figure = new_figure(10, 6.4)
    panels = figure.subplots(2, 2, sharex=True).ravel()
    figure.suptitle(printable(folder.resolve().name), fontsize=12, color=INK)

    def series(key: str) -> list[float]:
        return [math.nan if step[key] is None else step[key] for step in steps]

    loss, rate, pace, mfu = panels
    loss.plot(seconds, series("loss"), color=ORANGE, linewidth=0.7, alpha=0.6, label="step")
    loss.plot(seconds, series("smooth_loss"), color=BLUE, linewidth=1.6, label="average")
    loss.legend(frameon=False, fontsize=9, loc="upper right")
    loss.set_title("training loss, nats per token", **_TITLE)
    rate.plot(seconds, series("lr_multiplier"), color=BLUE, linewidth=1.6)
    rate.set_ylim(-0.03, 1.05)
    rate.set_title("learning rate, share of the full one", **_TITLE)
    pace.plot(seconds, series("tokens_per_second"), color=BLUE, linewidth=0.8)
    pace.set_ylim(0, 1.15 * _high(series("tokens_per_second")[first_timed:]))
    pace.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    pace.set_title("tokens per second", **_TITLE)
    if all(math.isnan(value) for value in series("mfu")):
        mfu.text(0.5, 0.5, "n/a: no GPU", transform=mfu.transAxes, ha="center", va="center", color=GREY, fontsize=11)
        mfu.set_axis_off()
    else:
        mfu.plot(seconds, series("mfu"), color=BLUE, linewidth=0.8)
        mfu.set_ylim(0, 1.15 * _high(series("mfu")[first_timed:]))
    mfu.set_title("MFU, percent of an H100's bf16 peak", **_TITLE)
    for panel in panels:
        tidy(panel)
        panel.set_xlim(0, seconds[-1])
        if first_timed and panel.axison:
            panel.axvspan(0, seconds[first_timed - 1], color=GREY, alpha=0.15, linewidth=0)
    for panel in panels[2:]:
        panel.set_xlabel("seconds of steps" + (" (grey: untimed)" if first_timed else ""), fontsize=10, color=INK)
    save(figure, folder / NAME)
    return folder / NAME


_TITLE = {"fontsize": 10, "loc": "left", "color": INK}


def _high(values: list[float]) -> float:
    """Nearly the largest: one freak step does not flatten all others."""
    finite = sorted(value for value in values if math.isfinite(value))
    return finite[math.ceil(0.99 * (len(finite) - 1))] or 1.0 if finite else 1.0


def main(args: list[str] | None = None) -> int:
    parser = Parser("train.curves", __doc__)
    parser.add_argument("run", metavar="RUN", type=Path, nargs="+", help="folder of a run")
    failed = False
    for folder in parser.parse_args(args).run:
        drawn = draw_curves(folder)
        said = drawn or f"error: {folder} has no readable metrics.jsonl: name the folder of a run"
        print(printable(said), flush=True, file=sys.stdout if drawn else sys.stderr)
        failed |= drawn is None
    return 2 if failed else 0


if __name__ == "__main__":
    command(main)
