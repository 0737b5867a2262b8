"""`python -m train.report [RUNS…]`: a night of experiments as one picture and one table."""

import heapq
import math
import re
import statistics
import sys
import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from prepare import InputError
from prepare.arguments import Parser, command
from prepare.errors import one_line
from prepare.words import printable

from .resilience.durable import replace_file
from .results.judge import (
    CRASH,
    DISCARD,
    INCUMBENT,
    KEEP,
    Experiment,
    believable,
    differences,
    experiments,
    incumbent_of,
    next_seed,
    noise_among,
)
from .results.ledger import Ledger, name_of
from .results.markdown import markdown
from .results.plot import BLUE, DPI, GREEN, GREY, INK, ORANGE, VERMILION, new_figure, save, tidy
from .results.statistics import Numbers, difference, spread, to_go_on

LABEL_CHARS = 34
FONT_SIZE = 8.5  # of the labels, in points


def main(args: list[str] | None = None) -> int:
    parser = Parser("train.report", __doc__)
    parser.add_argument("runs", metavar="RUNS", nargs="*", type=Path, default=[Path("runs")],
                        help="folders with a ledger, or single runs (default: runs)")  # fmt: skip
    parser.add_argument("--out", metavar="FOLDER", type=Path, help="for report.png, report.md (default: the ledger's)")
    options = parser.parse_args(args)
    try:
        runs, ledgers = gather(options.runs)
        out = options.out or ledgers[0].folder
        out.mkdir(parents=True, exist_ok=True)
        text = table(runs, ledgers)
        replace_file(out / "report.md", text.encode())
        draw(runs, out / "report.png")
    except (InputError, OSError) as error:
        print(f"error: {one_line(error, 'name other RUNS, or another folder with --out')}", file=sys.stderr)
        return 2
    print(text.partition("\n\n| ")[0])
    print(f"\n{printable(out / 'report.md')}\n{printable(out / 'report.png')}")
    return 0


def gather(paths: Sequence[Path]) -> tuple[list[dict], list[Ledger]]:
    """The runs that `paths` name, oldest first, and the ledgers they are in. Raises InputError.

    Two ledgers are merged by the wall clock; inside one its own order holds, however that clock was set.
    """
    chosen: dict[Path, list[dict]] = {}
    ledgers: dict[Path, Ledger] = {}
    for path in paths:
        if (path / "results.jsonl").is_file():
            ledger, wanted = Ledger(path), None
        else:
            ledger, wanted = Ledger.beside(path), name_of(path)
        folder = ledger.folder.resolve()
        ledgers.setdefault(folder, ledger)
        runs = [run for run in ledger.runs() if wanted in (None, run["run"], run["group"])]
        if not runs:
            raise InputError(f"{path} has no run in a ledger (results.jsonl): name a folder of runs, or a run")
        chosen.setdefault(folder, []).extend(runs)
    in_order = [[run for run in ledgers[folder].runs() if run in runs] for folder, runs in chosen.items()]
    return [*heapq.merge(*in_order, key=lambda run: run["time"])], list(ledgers.values())


def comparable_sets(runs: Sequence[dict]) -> list[list[dict]]:
    """Finished runs by what they may be compared with, the largest set first."""
    sets: list[list[dict]] = []
    for run in filter(believable, runs):
        home = next((s for s in sets if not differences(s[0], run)), None)
        sets.append([run]) if home is None else home.append(run)
    return sorted(sets, key=len, reverse=True)


def headline(groups: dict[str, Experiment]) -> str:
    counts = Counter(group.status for group in groups.values())
    of = f"{len(groups)} experiment{'s' * (len(groups) != 1)}"
    return f"{of}: " + ", ".join(f"{counts[s]} {s}" for s in (KEEP, DISCARD, CRASH))


def fresh(group: Experiment) -> list[float]:
    """Its numbers on seeds that came after it was found to be better."""
    runs = group.confirmations or [run for run in group.runs if run["verdict"] == INCUMBENT]
    return [run["val_bpb"] for run in runs if believable(run)]


def verdict_of(group: Experiment) -> str:
    """Of the run that decided."""
    runs = group.confirmations or group.runs
    run = [run for run in runs if run["verdict"] != INCUMBENT][-1:] or runs[-1:]
    return _verdict(run[0])


def table(runs: Sequence[dict], ledgers: Sequence[Ledger]) -> str:
    """The report in Markdown: what was found, then a row for every experiment, in order."""
    groups = experiments(runs)
    lines = [f"# {headline(groups)}", "", *findings(runs, groups)]
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


def findings(runs: Sequence[dict], groups: dict[str, Experiment]) -> list[str]:
    """The incumbent of each set of comparable runs, what it gained and by which way, and what a new run has to beat."""
    lines = []
    sets = comparable_sets(runs)
    for members in sets:
        where, incumbent = members[0]["comparable"], incumbent_of(members)
        if incumbent is None:
            continue
        first = experiments(members)[members[0]["group"]]
        count = f"{len(members)} run{'s' * (len(members) != 1)}"
        lines.append(f"- {where['budget']} on {markdown(where['machine'])}, {count}: first"
                     f" {spread([*first.numbers.values()])}, now {spread([*incumbent.numbers.values()])}"
                     f" ({markdown(incumbent.name)}: {markdown(incumbent.first['description'])})")  # fmt: skip
        noise = noise_among(members)
        if noise is None:
            lines.append("  - nothing is known of the noise: `--repeat 3` shows it")
            continue
        if incumbent.name != first.name:
            found = difference(incumbent.numbers, first.numbers, noise)
            low, high = found.interval
            lines.append(f"  - against the first: {found.mean:+.6f}, with 95 % from {low:+.6f} to {high:+.6f};"
                         f" {markdown(way(incumbent, first, runs))}")  # fmt: skip
        seed = next_seed({}, incumbent.numbers)
        lines.append(f"  - a new run goes on to a second seed where, with seed {seed}, it is below"
                     f" {to_go_on(seed, incumbent.numbers, noise):.6f}")  # fmt: skip
    for members in sets[1:]:
        first, reasons = markdown(members[0]["run"]), markdown("; ".join(differences(members[0], sets[0][0])))
        some = "1 run," if len(members) == 1 else f"{len(members)} runs, from"
        more = f"{some} {first}, is" if len(members) == 1 else f"{some} {first} on, are"
        lines.append(f"- {more} not compared with the others: {reasons}")
    return lines


def way(ours: Experiment, theirs: Experiment, runs: Sequence[dict]) -> str:
    """Whether a gain inside a time budget came of more tokens or of better ones: by runs of equal steps where there are
    any, of the same code, else by the tokens."""
    code = ("commit_sha", "diff_sha256")
    sides: list[Numbers] = []
    steps = [run for run in runs if believable(run) and re.fullmatch(r"\d+ steps", run["budget"])]
    for experiment in (ours, theirs):
        same = [run for run in steps if all(run.get(key) == experiment.first.get(key) for key in code)]
        sides.append({run["seed"]: run["val_bpb"] for run in same if not differences(run, steps[0])})
    pace = [(run.get("summary") or {}).get("tokens_per_second") for run in (ours.latest, theirs.latest)]
    tokens = f"{pace[0] / pace[1] - 1:+.1%} tokens a second" if all(pace) else "tokens a second are not known"
    noise = noise_among([run for run in steps if not differences(run, steps[0])])
    if not all(sides) or noise is None:
        return f"{tokens}; runs of both by --steps would tell faster from better per token"
    found = difference(*sides, noise)
    low, high = found.interval
    word = "better per token" if high < 0 else "worse per token" if low > 0 else "per token no difference is seen"
    return f"{tokens}; at equal steps {found.mean:+.6f}, from {low:+.6f} to {high:+.6f}: {word}"


def _verdict(run: dict) -> str:
    return run["verdict"] + (f" ({run['note']})" if run["note"] else "")


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


def limits(shown: Sequence[dict]) -> tuple[float, float]:
    """The range of val_bpb that is worth seeing: from below the best to beyond every keep, what fresh seeds gave, and
    most others. What is worse than that would squeeze the differences that matter into a line."""
    values = sorted(run["val_bpb"] for run in shown)
    if not values:
        return 0.0, 1.0
    best = values[0]
    wanted = max((run["val_bpb"] for run in shown if run["status"] == KEEP or run.get("confirms")), default=best)
    most, middle = values[math.ceil(0.85 * (len(values) - 1))], statistics.median(values)
    high = max(wanted, min(most, best + 4 * (middle - best)))
    room = (high - best) or 0.01 * best
    return best - 0.2 * room, high + 0.12 * room


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
