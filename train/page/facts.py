"""What the page shows, as plain data: dicts, lists, words and numbers that JSON has words for."""

from collections.abc import Sequence
from statistics import fmean, stdev

from ..results.judge import (
    BASELINE,
    CRASH,
    INCUMBENT,
    KEEP,
    NOT_COMPARED,
    Experiment,
    believable,
    experiments,
    incumbent_of,
    interval_in,
)
from ..results.ledger import Ledger
from ..results.night import comparable_sets, deciding, findings, fresh, headline, labels, limits
from ..results.statistics import BETTER, NOT_BETTER
from .folders import Folders, number
from .running import running


def facts(runs: Sequence[dict], ledgers: Sequence[Ledger], folders: Folders, now: float) -> dict:
    """Of `runs`, as `results.night.gather` gives them, at `now` (seconds since 1970)."""
    where = dict(zip(labels([ledger.folder.resolve() for ledger in ledgers]), ledgers, strict=True))
    for ledger in ledgers:
        folders.look(ledger.folder)
    sets = comparable_sets(runs)
    set_of = {run["run"]: i for i, members in enumerate(sets) for run in members}
    groups = experiments(runs)
    numbers = {name: i for i, name in enumerate(groups, 1)}
    found, levels = [], [[] for _ in sets]
    contests = _Contests(groups, set_of)
    for name, group in groups.items():
        ledger = group.first["ledger"]
        one = _experiment(numbers[name], group, contests.incumbent_before(group), numbers, set_of)
        one |= _from_folders(group, where[ledger], folders) if ledger in where else {}
        found.append(one)
        for i in contests.enter(group):
            levels[i].append({"number": numbers[name], "ledger": ledger, "time": group.first["time"],
                              "mean": number(fmean(group.numbers.values()), 9)})  # fmt: skip
    now_running = [run for label, ledger in where.items() for run in running(ledger, label, folders, now)]
    for run in now_running:
        held = contests.latest(run["ledger"])
        run["incumbent"] = numbers.get(held) if held else None
    return {
        "headline": headline(groups),
        "findings": [{"text": text, "more": more} for text, more in findings(runs)],
        "totals": _totals(runs, ledgers, found),
        "ledgers": [
            {"name": label, "runs": sum(run["ledger"] == label for run in runs), "damaged_lines": ledger.entries()[1],
             "holdout_looks": ledger.holdout_uses()} for label, ledger in where.items()
        ],
        "sets": [_set(members, levels[i]) for i, members in enumerate(sets)],
        "experiments": found,
        "running": now_running,
    }  # fmt: skip


class _Contests:
    """Who was the incumbent when: of comparable runs, and of each ledger by itself, as the verdicts were made."""

    def __init__(self, groups: dict[str, Experiment], set_of: dict[str, int]):
        self._groups, self._set_of = groups, set_of
        self._kept: dict[tuple[str, int], list[dict]] = {}
        self._latest: dict[str, str] = {}

    def _keys(self, group: Experiment) -> list[tuple[str, int]]:
        runs = [run for run in (*group.runs, *group.confirmations) if run["run"] in self._set_of]
        return list(dict.fromkeys((run["ledger"], self._set_of[run["run"]]) for run in runs))

    def incumbent_before(self, group: Experiment) -> str | None:
        """The name of what it was compared with; of one that has no number, of what is there to compare with."""
        for key in self._keys(group):
            if kept := self._kept.get(key):
                return incumbent_of(kept).name
        return None if self._keys(group) else self.latest(group.first["ledger"])

    def latest(self, ledger: str) -> str | None:
        return self._latest.get(ledger)

    def enter(self, group: Experiment) -> list[int]:
        """The sets in which it is the incumbent now."""
        won = []
        for key in self._keys(group):
            ledger, which = key
            runs = [run for run in (*group.runs, *group.confirmations) if self._set_of.get(run["run"]) == which]
            kept = self._kept.setdefault(key, [])
            kept += [run for run in runs if run["status"] == KEEP]
            if kept and incumbent_of(kept).name == group.name:
                won.append(which)
                self._latest[ledger] = group.name
        return won


def _experiment(
    place: int, group: Experiment, incumbent: str | None, numbers: dict[str, int], set_of: dict[str, int]
) -> dict:
    runs, run = [*group.runs, *group.confirmations], deciding(group)
    values, again = [*group.numbers.values()], fresh(group)
    one = {
        "number": place,
        "name": group.name,
        "ledger": group.first["ledger"],
        "description": group.first["description"],
        "commit": group.first["commit"],
        "flags": [str(flag) for flag in group.first.get("flags") or []],
        "time": group.first["time"],
        "budget": group.first["budget"],
        "status": group.status,
        "verdict": run["verdict"],
        "note": run["note"],
        "difference": interval_in(run["note"]),
        "incumbent": numbers.get(incumbent) if incumbent != group.name else None,
        "mean": number(fmean(values), 9) if values else None,
        "sd": number(stdev(values)) if len(values) > 1 else None,
        "seeds": len(values),
        "fresh": number(fmean(again), 9) if again else None,
        "memory_gb": max((number(r.get("memory_gb")) or 0.0 for r in runs), default=0.0),
        "seconds": number(sum(number(r["seconds"].get("total")) or 0.0 for r in runs)),
        "tokens": sum(map(_tokens, runs)),
        "runs": [_run(r, set_of.get(r["run"])) for r in runs],
    }
    then = (group.confirmations or group.runs)[: (group.confirmations or group.runs).index(run) + 1]
    seeds = len({r["seed"] for r in then if believable(r)})
    return one | {"result": _result(one), "in_words": _words(one, seeds)}


def _run(run: dict, number_of_set: int | None) -> dict:
    summary = run.get("summary")
    phases = {str(phase): number(seconds) for phase, seconds in run["seconds"].items()}
    return {
        "run": run["run"],
        "seed": number(run.get("seed")),
        "val_bpb": number(run["val_bpb"], 9),
        "status": run["status"],
        "verdict": run["verdict"],
        "outcome": run["outcome"],
        "error": str(run.get("error") or ""),
        "audit": str(run.get("audit") or ""),
        "doubts": [str(doubt) for doubt in run.get("doubts") or []],
        "time": run["time"],
        "set": number_of_set,
        "seconds": {phase: seconds for phase, seconds in phases.items() if seconds is not None},
        "summary": {str(k): _plain(v) for k, v in summary.items()} if isinstance(summary, dict) else None,
    }


def _plain(value) -> float | int | str | None:
    return number(value, 9) if isinstance(value, int | float) else None if value is None else str(value)


def _tokens(run: dict) -> int:
    summary = run.get("summary")
    millions = number(summary.get("total_tokens_M"), 12) if isinstance(summary, dict) else None
    return round((millions or 0) * 1e6)


def _result(one: dict) -> str:
    """What became of it, by what its reader wants to know: kept, worse, no gain, undecided, crashed, not compared."""
    if one["status"] == CRASH:
        return "crashed"
    if one["status"] == KEEP:
        return "kept"
    if one["verdict"] == NOT_COMPARED:
        return "not compared"
    if one["verdict"] != NOT_BETTER:
        return "undecided"
    return "worse" if one["difference"] and one["difference"]["low"] > 0 else "no gain"


def _words(one: dict, count: int) -> str:
    """The verdict, for somebody who has not read docs/numbers.md. `count`: seeds that it was found on."""
    seeds = f"{count} seed{'s' * (count != 1)}"
    found = one["difference"]
    by = (
        f" {found['mean']:+.6f} bits per byte against the incumbent on {seeds}, with 95 % between {found['low']:+.6f}"
        f" and {found['high']:+.6f}." if found else ""
    )  # fmt: skip
    if one["status"] == CRASH:
        return f"It has no number: {one['note'] or one['verdict']}."
    if one["verdict"] in (BASELINE, INCUMBENT) and not found:
        return f"What comes after it is compared with it; {seeds}." + (f" It is {one['note']}." if one["note"] else "")
    if one["verdict"] == NOT_COMPARED:
        return f"Its number is compared with no other: {one['note']}."
    word = {BETTER: "It is better:", NOT_BETTER: "No gain was found:"}.get(one["verdict"])
    if word == "No gain was found:" and found and found["low"] > 0:
        word = "It is worse:"
    if word and by:
        return word + by
    if by:
        return f"Nobody knows yet ({one['verdict']}):{by}"
    return one["verdict"] + (f": {one['note']}" if one["note"] else "")


def _from_folders(group: Experiment, ledger: Ledger, folders: Folders) -> dict:
    """What is left of its runs: curves of each, the changes and a sample of the first that has them, and in words
    what is missing."""
    there, curves, evals, missing = folders.of(ledger.folder), {}, {}, []
    kept: dict[str, str | None] = {"changes.diff": None, "sample.txt": None}
    gone, lines = [], {"metrics.jsonl": [], **{name: [] for name in kept}}
    for run in (*group.runs, *group.confirmations):
        folder = there.get(run["folder"])
        if folder is None:
            gone.append(run["run"])
            continue
        curve = folders.curve(folder)
        if curve is None:
            lines["metrics.jsonl"].append(run["run"])
        else:
            curves[run["run"]] = curve
        if found := folders.evals(folder):  # most runs have none
            evals[run["run"]] = found
        for name in kept:
            if kept[name] is None and (text := folders.text(folder / name)) is not None:
                kept[name] = text
            elif kept[name] is None and (name != "sample.txt" or run["outcome"] == "finished"):
                lines[name].append(run["run"])
    missing += [f"The folder of {name} is gone: what it held is not shown." for name in gone]
    missing += [f"{name} of {run} is missing or damaged." for name, runs in lines.items() for run in runs
                if kept.get(name) is None]  # fmt: skip
    return {"diff": kept["changes.diff"], "sample": kept["sample.txt"], "curves": curves,
            "evals": evals, "missing": missing}  # fmt: skip


def _totals(runs: Sequence[dict], ledgers: Sequence[Ledger], found: Sequence[dict]) -> dict:
    def seconds(phase: str) -> float:
        return sum(number(run["seconds"].get(phase)) or 0.0 for run in runs)

    results = [one["result"] for one in found]
    return {
        "experiments": len(found),
        "runs": len(runs),
        **{result.replace(" ", "_"): results.count(result)
           for result in ("kept", "worse", "no gain", "undecided", "crashed", "not compared")},
        "hours": number(seconds("total") / 3600),
        "hours_of_training": number(seconds("training") / 3600),
        "tokens": sum(one["tokens"] for one in found),
        "holdout_looks": sum(ledger.holdout_uses() for ledger in ledgers),
        "damaged_lines": sum(ledger.entries()[1] for ledger in ledgers),
    }  # fmt: skip


def _set(members: Sequence[dict], levels: list[dict]) -> dict:
    """Runs that may be compared with each other. `levels`: the incumbents, and the mean of each."""
    low, high = limits(members)
    where = members[0]["comparable"]
    return {
        "budget": str(where.get("budget")),
        "machine": str(where.get("machine")),
        "runs": len(members),
        "low": number(low, 9),
        "high": number(high, 9),
        "first": levels[0]["mean"] if levels else None,
        "now": levels[-1]["mean"] if levels else None,
        "levels": levels,
    }
