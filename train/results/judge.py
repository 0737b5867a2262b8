"""What a run's number says: which runs it may be compared with, its status, its verdict.

An experiment is a group of runs: one, or the seeds of `--repeat`, and with them the fresh seeds of `--confirm`. Where
there are fresh seeds they alone speak for it: the number that made a run a candidate is the luckiest of many.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from .statistics import verdict

CRASH, KEEP, DISCARD = "crash", "keep", "discard"


@dataclass
class Experiment:
    """The runs of one group, in the order of the ledger."""

    name: str
    runs: list[dict] = field(default_factory=list)  # as tried
    confirmations: list[dict] = field(default_factory=list)  # on fresh seeds, after it was a new best

    @property
    def first(self) -> dict:
        return (self.runs or self.confirmations)[0]

    @property
    def evidence(self) -> list[float]:
        """The val_bpb of the runs that speak for it."""
        return numbers(self.confirmations) or numbers(self.runs)


@dataclass(frozen=True)
class Judgement:
    """status: keep, discard or crash, by the number alone. verdict: baseline, better, worse, within noise, unknown, not
    compared, failed or interrupted. note: why, where that is not plain."""

    status: str
    verdict: str
    note: str = ""


def believable(run: dict) -> bool:
    """Whether its number may stand for something: it finished, the audit found nothing, and nothing speaks against
    comparing it (`doubts`)."""
    return run["outcome"] == "finished" and run.get("audit") == "ok" and not run.get("doubts")


def other_code(run: dict, earlier: Sequence[dict]) -> list[str]:
    """Why `run` does not belong to the numbers that its group has: it was trained by other code."""
    first = next((e for e in earlier if e["group"] == run["group"] and believable(e)), run)
    if all(first.get(key) == run.get(key) for key in ("commit", "diff_sha256")):
        return []
    return [f"its group began with other code: {described(first)}, here {described(run)}"]


def described(source: dict) -> str:
    """A commit as the ledger names it, and what differed from it."""
    changes = source.get("diff_sha256")
    return source["commit"] + (f" (changes {changes[:8]})" if changes else "")


def numbers(runs: Sequence[dict]) -> list[float]:
    return [run["val_bpb"] for run in runs if believable(run)]


def experiments(runs: Sequence[dict]) -> dict[str, Experiment]:
    """By group, in the order of their first runs."""
    found: dict[str, Experiment] = {}
    for run in runs:
        experiment = found.setdefault(run["group"], Experiment(run["group"]))
        (experiment.confirmations if run.get("confirms") else experiment.runs).append(run)
    return found


def differences(a: dict, b: dict) -> list[str]:
    """Why the numbers of two runs cannot be compared: nothing where evaluation, budget and machine are the same."""
    found = []
    a, b = a["comparable"], b["comparable"]
    ours, theirs = (x.get("evaluation") if isinstance(x.get("evaluation"), dict) else {} for x in (a, b))
    for key in sorted(ours.keys() | theirs.keys()):
        if ours.get(key) != theirs.get(key):
            what = "the code that evaluates" if key == "code_sha256" else f"evaluation {key}"
            found.append(f"{what}: {_short(ours.get(key))}, there {_short(theirs.get(key))}")
    for key in ("budget", "machine"):
        if a.get(key) != b.get(key):
            found.append(f"{key}: {_short(a.get(key))}, there {_short(b.get(key))}")
    return found


def _short(value) -> str:
    """A hash by its beginning."""
    return value[:8] if isinstance(value, str) and len(value) == 64 else str(value)


def metric_was_edited(run: dict, earlier: Sequence[dict]) -> bool:
    """Whether `run` is measured as earlier runs were, but for the code that evaluates. The first run of a kind sets
    that code: who edits it gets no `keep` by that."""

    def kind(entry: dict) -> dict:
        evaluation = {k: v for k, v in entry["comparable"]["evaluation"].items() if k != "code_sha256"}
        return {**entry["comparable"], "evaluation": evaluation}

    first = next((e for e in earlier if believable(e) and kind(e) == kind(run)), None)
    return first is not None and bool(differences(run, first))


def judge(run: dict, earlier: Sequence[dict]) -> Judgement:
    """The judgement on a run, by the runs that were in the ledger before it.

    keep: better than the best comparable `keep` of other experiments, or the first of its kind.
    """
    if run["outcome"] != "finished":
        return Judgement(CRASH, run["outcome"], run["error"])
    if not believable(run):
        audit = [] if run.get("audit") == "ok" else [f"audit: {run['audit']}"]
        return Judgement(DISCARD, "not compared", "; ".join([*audit, *run.get("doubts", [])]))
    others = [e for e in earlier if e["group"] != run["group"] and believable(e)]
    if metric_was_edited(run, others):
        return Judgement(
            DISCARD, "not compared", "the code that evaluates is not that of the runs before: where that is meant, move"
            " results.tsv and results.jsonl away and begin anew",
        )  # fmt: skip
    comparable = [e for e in others if not differences(run, e)]
    if not comparable:
        note = "; ".join(differences(run, others[-1])) if others else ""
        return Judgement(KEEP, "not compared" if others else "baseline", note)
    best = min((e for e in comparable if e["status"] == KEEP), key=lambda e: e["val_bpb"], default=None)
    if best is None:
        return Judgement(KEEP, "baseline")
    status = KEEP if run["val_bpb"] < best["val_bpb"] else DISCARD
    ours = experiments([*earlier, run])[run["group"]].evidence
    theirs = experiments(earlier)[best["group"]].evidence
    word = verdict(ours, theirs)
    note = f"against {best['group']}"
    if (tiles := [e.get("tiles", "default") for e in (run, best)])[0] != tiles[1]:
        note += f", whose kernels had other tiles ({tiles[1]}, here {tiles[0]})"
    if word == "unknown":
        note += f": {len(ours)} and {len(theirs)} runs show no noise"
    return Judgement(status, word, note)
