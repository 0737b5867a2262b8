"""`python -m train.curves RUN`: draws `curves.png`: val_bpb, and against seconds the loss, the learning rate, the pace,
and on a GPU MFU."""

import json
import math
import sys
from itertools import accumulate
from pathlib import Path

from prepare.arguments import Parser, command
from prepare.words import printable

from .results.evals import read_evals
from .results.plot import BLUE, GREEN, GREY, INK, ORANGE, new_figure, save, tidy

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


def read_bpb(folder: Path) -> float | None:
    """The val_bpb of the run's summary; None where it has none, or none that can be read."""
    try:
        value = json.loads((folder / "summary.json").read_bytes())["val_bpb"]
        return float(value) if math.isfinite(value) else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError, OverflowError):
        return None


def _draw(folder: Path, steps: list[dict]) -> Path:
    seconds = list(accumulate(step["seconds"] for step in steps))
    first_timed = next((i for i, step in enumerate(steps) if step.get("timed_seconds", 1) > 0), 0)

    def series(key: str) -> list[float]:
        return [math.nan if step[key] is None else step[key] for step in steps]

    has_mfu = not all(math.isnan(value) for value in series("mfu"))
    figure = new_figure(10, 6.4)
    # Seconds after so many steps; of damaged ones they are not known.
    after = {0: 0.0} | {s["step"] + 1: end for s, end in zip(steps, seconds, strict=True) if type(s.get("step")) is int}
    evals = [row for row in read_evals(folder) if row["step"] <= max(after)]
    if evals:
        panels = figure.subplot_mosaic("lr;vp;vm" if has_mfu else "lr;vp", sharex=True)
    else:  # without a GPU there is no MFU: the loss has the room of two
        panels = figure.subplot_mosaic("lr;pm" if has_mfu else "lr;lp", sharex=True)
    bpb = read_bpb(folder)
    figure.suptitle(printable(folder.resolve().name) + (f": val_bpb {bpb:.6f}" if bpb is not None else ""),
                    fontsize=12, color=INK)  # fmt: skip

    loss, rate, pace = (panels[name] for name in "lrp")
    loss.plot(seconds, series("loss"), color=ORANGE, linewidth=0.7, alpha=0.6, label="step")
    loss.plot(seconds, series("smooth_loss"), color=BLUE, linewidth=1.6, label="average")
    loss.legend(frameon=False, fontsize=9, loc="upper right")
    _say(loss, "training loss", "nats per token")
    rate.plot(seconds, series("lr_multiplier"), color=BLUE, linewidth=1.6)
    rate.set_ylim(-0.03, 1.05)
    _say(rate, "learning rate", "share of the full one")
    pace.plot(seconds, series("tokens_per_second"), color=BLUE, linewidth=0.8)
    pace.set_ylim(0, 1.15 * _high(series("tokens_per_second")[first_timed:]))
    pace.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    _say(pace, "pace", "tokens per second")
    if has_mfu:
        panels["m"].plot(seconds, series("mfu"), color=BLUE, linewidth=0.8)
        panels["m"].set_ylim(0, 1.15 * _high(series("mfu")[first_timed:]))
        _say(panels["m"], "MFU", "percent of an H100's bf16 peak")
    if evals:
        at = [max(end for done, end in after.items() if done <= row["step"]) for row in evals]
        panels["v"].plot(at, [row["val_bpb"] for row in evals], color=GREEN, linewidth=1.6, marker="o", markersize=4)
        _say(panels["v"], "val_bpb on a small part", "bits per byte")
    for panel in panels.values():
        tidy(panel)
        panel.set_xlim(0, seconds[-1])
        panel.tick_params(labelbottom=True)
        panel.set_xlabel("seconds of steps" + (" (grey: untimed)" if first_timed else ""), fontsize=9, color=INK)
        if first_timed:
            panel.axvspan(0, seconds[first_timed - 1], color=GREY, alpha=0.15, linewidth=0)
    save(figure, folder / NAME)
    return folder / NAME


def _say(panel, title: str, unit: str) -> None:
    panel.set_title(title, fontsize=10, loc="left", color=INK)
    panel.set_ylabel(unit, fontsize=9, color=INK)


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
