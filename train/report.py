"""`python -m train.report [RUNS…]`: a night of experiments as a page, a picture and a table."""

import json
import math
import statistics
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from time import sleep, time
from typing import NoReturn

from prepare import InputError
from prepare.arguments import Parser, command
from prepare.errors import one_line
from prepare.words import printable, say_once

from .config import runs_folder
from .page.facts import facts
from .page.folders import Folders
from .page.html import page
from .resilience.durable import replace_file
from .results.judge import CRASH, believable, experiments, incumbent_of
from .results.ledger import Ledger
from .results.markdown import markdown
from .results.night import comparable_sets, findings, fresh, gather, headline, limits, verdict_of
from .results.plot import BLUE, DPI, GREEN, GREY, INK, ORANGE, VERMILION, new_figure, save, tidy
from .results.statistics import spread

LABEL_CHARS = 34
WATCH = 15  # seconds between two pages of a night that goes on
FONT_SIZE = 8.5  # of the labels, in points


def main(args: list[str] | None = None) -> int:
    parser = Parser("train.report", __doc__)
    parser.add_argument("runs", metavar="RUNS", nargs="*", type=Path,
                        help="folders with a ledger, or single runs (default: $TIMEBOX_RUNS, else runs)")  # fmt: skip
    parser.add_argument("--out", metavar="FOLDER", type=Path,
                        help="for report.html, report.png, report.md (default: the first ledger's)")  # fmt: skip
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--no-page", action="store_true", help="the picture and the table alone, without report.html")
    what.add_argument("--json", action="store_true", help="print what the page shows, as JSON; write nothing")
    what.add_argument("--watch", metavar="SECONDS", nargs="?", type=int, const=WATCH,
                      help=f"make the page anew so often, until Ctrl-C (default: {WATCH})")  # fmt: skip
    options = parser.parse_args(args)
    if options.watch is not None and options.watch < 1:
        parser.error(f"--watch {options.watch} must be at least 1")
    try:
        options.runs = options.runs or [runs_folder()]
        if options.json:
            runs, ledgers = gather(options.runs)
            print(json.dumps(facts(runs, ledgers, Folders(), time()), allow_nan=False))
            return 0
        if options.watch:
            watch(options.runs, options.out, options.watch)
        runs, ledgers = gather(options.runs)
        out = options.out or ledgers[0].folder
        out.mkdir(parents=True, exist_ok=True)
        text = table(runs, ledgers)
        replace_file(out / "report.md", text.encode())
        draw(runs, out / "report.png")
        written = [out / "report.md", out / "report.png"]
        if not options.no_page:
            write_page(runs, ledgers, Folders(), out)
            written.append(out / "report.html")
    except (InputError, OSError) as error:
        print(f"error: {one_line(error, 'name other RUNS, or another folder with --out')}", file=sys.stderr)
        return 2
    print(text.partition("\n\n| ")[0], end="\n\n")
    print("\n".join(map(printable, written)))
    return 0


def write_page(
    runs: Sequence[dict], ledgers: Sequence[Ledger], folders: Folders, out: Path, refresh: int | None = None
) -> None:
    now = time()
    replace_file(out / "report.html", page(facts(runs, ledgers, folders, now), now, refresh))


def watch(paths: Sequence[Path], out: Path | None, seconds: int) -> NoReturn:
    """Makes the page anew, also of a night that has no run yet. What cannot be read or written the first time is the
    caller's to mend; later on the night goes on, and so does this."""
    folders, first = Folders(), True
    while True:
        try:
            runs, ledgers = gather(paths, may_be_empty=True)
            where = out or ledgers[0].folder
            where.mkdir(parents=True, exist_ok=True)
            write_page(runs, ledgers, folders, where, seconds)
        except OSError as error:
            if first:
                raise
            say_once("watch", f"the page stays as it was: {one_line(error, 'it is tried again')}")
        if first:
            print(f"{printable(where / 'report.html')}\nmade anew every {seconds} s, until Ctrl-C", flush=True)
        first = False
        sleep(seconds)


def table(runs: Sequence[dict], ledgers: Sequence[Ledger]) -> str:
    """The report in Markdown: what was found, then a row for every experiment, in order."""
    groups = experiments(runs)
    lines = [f"# {headline(groups)}", ""]
    for words, under in findings(runs, markdown):
        lines += [f"- {words}", *(f"  - {more}" for more in under)]
    damaged = sum(ledger.entries()[1] for ledger in ledgers)
    looks = sum(ledger.holdout_uses() for ledger in ledgers)
    if looks:
        lines.append(f"- looks at the holdout split: {looks}")
    if damaged:
        lines.append(f"- damaged lines of the ledger, left out: {damaged}")
    head = ("", "experiment", "commit", "val_bpb", "fresh seeds", "GB", "status", "verdict", "flags", "description")
    lines += ["", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for i, group in enumerate(groups.values(), 1):
        tried = group.runs or group.confirmations
        memory = max(run["memory_gb"] or 0.0 for run in tried)
        cells = (
            str(i), group.name, tried[0]["commit"], spread([*group.numbers.values()]), spread(fresh(group)),
            f"{memory:.1f}", group.status, verdict_of(group), " ".join(tried[0].get("flags") or []),
            tried[0]["description"],
        )  # fmt: skip
        lines.append("| " + " | ".join(map(markdown, cells)) + " |")
    return "\n".join(lines) + "\n"



def draw(runs: Sequence[dict], path: Path) -> None:
    """val_bpb over experiments: keeps, discards, crashes, the incumbent, and what fresh seeds said of it.

    Only runs that may be compared share an axis: the largest such set is drawn, with all crashes.
    """
    sets = comparable_sets(runs)
    shown = {run["run"] for run in sets[0]} if sets else set()
    # By the numbers of the table, in which every experiment has a row.
    places = {name: x for x, name in enumerate(experiments(runs), 1)}
    groups = experiments([run for run in runs if run["run"] in shown or run["status"] == CRASH])
    figure = new_figure(12, 6.5)
    axes = figure.subplots()
    tidy(axes)
    low, high = limits(sets[0] if sets else [])
    axes.set_ylim(low, high)
    axes.set_xlim(0, len(places) + 1)
    big, small = (8, 5) if len(groups) <= 60 else (5.5, 3.5)
    styles = {
        "keep": {"marker": "o", "color": GREEN, "ms": big, "zorder": 5},
        "discard": {"marker": "s", "color": "none", "mec": GREY, "ms": small, "mew": 1.2, "zorder": 3},
        "discard, above the picture": {"marker": "^", "color": GREY, "ms": small + 1, "zorder": 3},
        "crash": {"marker": "x", "color": VERMILION, "ms": big, "mew": 2, "zorder": 4},
        "mean ± sd on fresh seeds": {"marker": "D", "color": ORANGE, "mec": INK, "ms": big - 1, "zorder": 6},
        "incumbent, mean": {"color": BLUE, "lw": 1.8, "zorder": 2},
    }
    used = set()

    def put(kind: str, x: float, y: float, **more) -> None:
        axes.plot(x, y, ls="", **styles[kind], **more)
        used.add(kind)

    before: list[dict] = []
    line, keeps, best = [], [], math.nan
    edge = axes.get_xaxis_transform()  # x in data, y as a share of the picture
    for name, group in groups.items():
        x = places[name]
        for run in group.runs:
            if run["status"] == CRASH:
                put("crash", x, 0.02, transform=edge)
            elif run["val_bpb"] > high:
                put("discard, above the picture", x, 0.985, transform=edge)
            else:
                put(run["status"], x, run["val_bpb"])
        if again := fresh(group):
            mean = statistics.fmean(again)
            lowest = min((run["val_bpb"] for run in group.runs if believable(run)), default=mean)
            axes.plot([x, x + 0.25], [lowest, mean], color=ORANGE, lw=1, zorder=5)
            if len(again) > 1:
                axes.errorbar(x + 0.25, mean, statistics.stdev(again), color=ORANGE, capsize=4, zorder=5)
            put("mean ± sd on fresh seeds", x + 0.25, mean)
        before += [run for run in (*group.runs, *group.confirmations) if run["run"] in shown]
        if (incumbent := incumbent_of(before)) and incumbent.name == group.name:
            level = statistics.fmean(incumbent.numbers.values())
            keeps.append((x, level, best - level if best == best else 0.0, group.first["description"] or group.name))
            best = level
        line.append((x, best))
    if keeps:
        line.append((len(places) + 1, line[-1][1]))
        axes.step(*zip(*line, strict=True), where="post", **styles["incumbent, mean"])
        used.add("incumbent, mean")
    for kind, style in styles.items():
        if kind in used:
            axes.plot([], [], label=kind, ls="-" if kind == "incumbent, mean" else "", **style)
    figure.legend(loc="outside lower center", ncols=len(styles), frameon=False, fontsize=9)
    axes.set_xlabel("experiment", fontsize=10, color=INK)
    axes.set_ylabel("val_bpb (less is better)", fontsize=10, color=INK)
    axes.xaxis.get_major_locator().set_params(integer=True)
    title = headline(experiments(runs))
    if sets:
        title += f"; {sets[0][0]['comparable']['budget']} on {sets[0][0]['comparable']['machine']}"
    if others := sum(map(len, sets[1:])):
        title += f"\n{others} runs with another evaluation, budget or machine stand in the table alone"
    axes.set_title(title, fontsize=11, loc="left", color=INK)
    figure.draw_without_rendering()  # only now is it known where a point lies
    label(axes, keeps)
    save(figure, path)


def label(axes, keeps: Sequence[tuple[float, float, float, str]]) -> None:
    """Says what a new best was, beside its point, for (x, y, gain, text) in order of x: the largest gains first, and
    none where it would lie on another or on the line. To the left and below a new best there is nothing else."""
    pixels = axes.transData.transform
    taken: list[tuple[float, float, float, float]] = []
    width, height = 0.62 * FONT_SIZE * DPI / 72, 1.5 * FONT_SIZE * DPI / 72  # of a character
    for i, (x, y, _, text) in sorted(enumerate(keeps), key=lambda item: -item[1][2]):
        text = textwrap.shorten(" ".join(text.split()), LABEL_CHARS, placeholder="…")
        px, py = pixels((x, y))
        next_px = pixels((keeps[i + 1][0], y))[0] if i + 1 < len(keeps) else math.inf
        if px - 8 - width * len(text) > pixels((0, y))[0]:
            place = {"xytext": (-8, -6), "ha": "right", "va": "top"}
            box = (px - 8 - width * len(text), px - 8, py - 6 - height, py - 6)
        elif px + width * len(text) < next_px:  # no room at the left, and a long enough stretch of the line to go below
            place = {"xytext": (0, -6), "ha": "left", "va": "top"}
            box = (px, px + width * len(text), py - 6 - height, py - 6)
        elif i == 0:
            place = {"xytext": (4, 6), "ha": "left", "va": "bottom"}
            box = (px + 4, px + 4 + width * len(text), py + 6, py + 6 + height)
        else:
            continue
        if any(box[0] < b[1] and b[0] < box[1] and box[2] < b[3] and b[2] < box[3] for b in taken):
            continue
        taken.append(box)
        axes.annotate(text, (x, y), textcoords="offset pixels", fontsize=FONT_SIZE, color=INK, zorder=7, **place)


if __name__ == "__main__":
    command(main)
