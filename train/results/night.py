"""What a night of experiments says, for whoever shows it: the picture, the table, the page, a script.

Runs of several ledgers, one a GPU perhaps, are put together here, and judged as each ledger judged its own.
"""

import heapq
import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from prepare import InputError
from prepare.words import printable

from .judge import (
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
from .ledger import Ledger, name_of
from .statistics import Numbers, difference, spread, to_go_on


def gather(paths: Sequence[Path], may_be_empty: bool = False) -> tuple[list[dict], list[Ledger]]:
    """The runs that `paths` name, oldest first, and the ledgers they are in. Raises InputError, also where a path has
    no run, unless it is a folder and `may_be_empty`: of a night that has just begun.

    Two ledgers are merged by the wall clock; inside one its own order holds, however that clock was set. Each run has
    besides the row of the ledger: `ledger`, which one it is from, and `folder`, what its own is called there.
    """
    chosen: dict[Path, list[dict]] = {}
    ledgers: dict[Path, Ledger] = {}
    for path in paths:
        if (path / "results.jsonl").is_file() or (may_be_empty and path.is_dir()):
            ledger, wanted = Ledger(path), None
        else:
            ledger, wanted = Ledger.beside(path), name_of(path)
        folder = ledger.folder.resolve()
        ledgers.setdefault(folder, ledger)
        runs = [run for run in ledger.runs() if wanted in (None, run["run"], run["group"])]
        if not runs and not (may_be_empty and path.is_dir()):
            raise InputError(f"{path} has no run in a ledger (results.jsonl): name a folder of runs, or a run")
        chosen.setdefault(folder, []).extend(runs)
    in_order = [[run for run in ledgers[folder].runs() if run in runs] for folder, runs in chosen.items()]
    in_order = _told_apart(in_order, labels([*chosen]))
    return [*heapq.merge(*in_order, key=lambda run: run["time"])], list(ledgers.values())


def labels(folders: Sequence[Path]) -> list[str]:
    """What to call each of them: by its last name, or by as much of its path as tells it from the others."""
    for parts in range(1, max((len(folder.parts) for folder in folders), default=0) + 1):
        names = [printable(Path(*folder.parts[-parts:])) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [printable(folder) for folder in folders]


def _told_apart(ledgers: list[list[dict]], names: Sequence[str]) -> list[list[dict]]:
    """Two GPUs may each have a run that began in one second, and so has one name: these get their ledger's before."""
    of_each = [{run[key] for run in runs for key in ("run", "group")} for runs in ledgers]
    twice = {name for name, count in Counter(name for names in of_each for name in names).items() if count > 1}

    def told(run: dict, ledger: str) -> dict:
        own = {key: f"{ledger}/{run[key]}" for key in ("run", "group") if run[key] in twice}
        return {**run, "folder": run["run"], "ledger": ledger, **own}

    return [[told(run, name) for run in runs] for runs, name in zip(ledgers, names, strict=True)]


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


def deciding(group: Experiment) -> dict:
    """The run whose verdict speaks for the experiment."""
    return group.deciding


def verdict_of(group: Experiment) -> str:
    run = deciding(group)
    return run["verdict"] + (f" ({run['note']})" if run["note"] else "")


def findings(runs: Sequence[dict], quoted: Callable[[str], str] = str) -> list[tuple[str, list[str]]]:
    """The incumbent of each set of comparable runs, what it gained and by which way, and what a new run has to beat:
    sentences, each with those that belong to it. `quoted`: how words that people wrote are put into them."""
    lines: list[tuple[str, list[str]]] = []
    sets = comparable_sets(runs)
    for members in sets:
        where, incumbent = members[0]["comparable"], incumbent_of(members)
        if incumbent is None:
            continue
        first = experiments(members)[members[0]["group"]]
        count = f"{len(members)} run{'s' * (len(members) != 1)}"
        under: list[str] = []
        lines.append((f"{where['budget']} on {quoted(where['machine'])}, {count}: first"
                     f" {spread([*first.numbers.values()])}, now {spread([*incumbent.numbers.values()])}"
                     f" ({quoted(incumbent.name)}: {quoted(incumbent.first['description'])})", under))  # fmt: skip
        noise = noise_among(members)
        if noise is None:
            under.append("nothing is known of the noise: `--repeat 3` shows it")
            continue
        if incumbent.name != first.name:
            found = difference(incumbent.numbers, first.numbers, noise)
            low, high = found.interval
            under.append(f"against the first: {found.mean:+.6f}, with 95 % from {low:+.6f} to {high:+.6f};"
                         f" {quoted(way(incumbent, first, runs))}")  # fmt: skip
        seed = next_seed({}, incumbent.numbers)
        under.append(f"a new run goes on to a second seed where, with seed {seed}, it is below"
                     f" {to_go_on(seed, incumbent.numbers, noise):.6f}")  # fmt: skip
    for members in sets[1:]:
        first, reasons = quoted(members[0]["run"]), quoted("; ".join(differences(members[0], sets[0][0])))
        some = "1 run," if len(members) == 1 else f"{len(members)} runs, from"
        more = f"{some} {first}, is" if len(members) == 1 else f"{some} {first} on, are"
        lines.append((f"{more} not compared with the others: {reasons}", []))
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
