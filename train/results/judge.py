"""What a run's number says: which runs it may be compared with, its status, its verdict.

An experiment is a group of runs, one for each seed. One experiment at a time is the incumbent: the first of its kind,
and then whichever was found to be better. The others are compared with it, seed by seed (`statistics`).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

from .load import pace_note
from .statistics import (
    BETTER,
    MAX_SEEDS,
    NOT_BETTER,
    Noise,
    Numbers,
    decide,
    difference,
    looks,
    noise_of,
    paired,
)

CRASH, KEEP, DISCARD = "crash", "keep", "discard"
BASELINE, INCUMBENT, NOT_COMPARED, NOT_NEEDED = "baseline", "incumbent", "not compared", "not needed"
NOT_NEEDED_NOTE = "trained beside the runs of its experiment that decided: its number would be one more look"
REFRESH = 12  # experiments after which the incumbent is run again: a machine drifts, and luck should not last


@dataclass
class Experiment:
    """The runs of one group, in the order of the ledger."""

    name: str
    runs: list[dict] = field(default_factory=list)  # as tried
    confirmations: list[dict] = field(default_factory=list)  # of ledgers of before: on fresh seeds, after a new best

    @property
    def first(self) -> dict:
        return (self.runs or self.confirmations)[0]

    @property
    def latest(self) -> dict:
        """Of the runs that have a number."""
        return [run for run in (*self.runs, *self.confirmations) if believable(run)][-1]

    @property
    def numbers(self) -> dict[int, float]:
        """By seed, those that speak for it: `confirmations` alone, where there are any. Of one seed twice, the mean."""
        runs = [run for run in self.confirmations if believable(run)] or [run for run in self.runs if believable(run)]
        by_seed: dict[int, list[float]] = {}
        for run in runs:
            by_seed.setdefault(run["seed"], []).append(run["val_bpb"])
        return {seed: fmean(values) for seed, values in by_seed.items()}

    @property
    def deciding(self) -> dict:
        """The run whose verdict speaks for it."""
        runs = self.confirmations or self.runs
        return ([run for run in runs if run["verdict"] not in (INCUMBENT, NOT_NEEDED)][-1:] or runs[-1:])[0]

    @property
    def status(self) -> str:
        """Of its runs as tried: keep where one is, else discard where one is."""
        found = {run["status"] for run in self.runs or self.confirmations}
        return next(status for status in (KEEP, DISCARD, CRASH) if status in found)


@dataclass(frozen=True)
class Judgement:
    """status: keep, once the experiment is the baseline, the incumbent, or better; else discard; or crash. verdict:
    baseline, incumbent, better, not better, undecided and what would decide, not compared, not needed, failed or
    interrupted. note: why, where that is not plain."""

    status: str
    verdict: str
    note: str = ""
    rule: str = "by seeds"  # rows of before have none: their status was that of one number


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
    """Why the numbers of two runs cannot be compared: nothing where evaluation, budget, machine, and the
    weights that they began with are the same."""
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
    if (began := a.get("init_from")) != (there := b.get("init_from")):
        found.append(f"it began with {_weights(began)}, there with {_weights(there)}")
    return found


def _weights(sha256) -> str:
    return f"the weights {_short(sha256)} of a finished run" if sha256 else "random weights"


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


def incumbent_of(runs: Sequence[dict]) -> Experiment | None:
    """Of comparable runs: the experiment that was kept last; in a ledger of before, the one of its lowest `keep`."""
    kept = [run for run in runs if believable(run) and run["status"] == KEEP]
    if not kept:
        return None
    by_seeds = [run for run in kept if run.get("rule")]
    last = by_seeds[-1] if by_seeds else min(kept, key=lambda run: run["val_bpb"])
    return experiments(runs)[last["group"]]


def next_seed(ours: Numbers, theirs: Numbers) -> int:
    """With which seed an experiment goes on: the incumbent's latest first, since a later run is nearer in time, and
    those that came after it was kept owe nothing to luck; then one that nobody has had."""
    of_theirs = next((seed for seed in reversed(theirs) if seed not in ours), None)
    return max([*ours, *theirs]) + 1 if of_theirs is None else of_theirs


def noise_among(runs: Sequence[dict]) -> Noise | None:
    """Of comparable runs."""
    return noise_of([experiment.numbers for experiment in experiments(runs).values()])


def judge(run: dict, earlier: Sequence[dict]) -> Judgement:
    """The judgement on a run, by the runs that were in the ledger before it."""
    if run["outcome"] != "finished":
        return Judgement(CRASH, run["outcome"], run["error"])
    if not believable(run):
        if run.get("audit") == "ok" and run.get("doubts") == [NOT_NEEDED_NOTE]:
            return Judgement(DISCARD, NOT_NEEDED, NOT_NEEDED_NOTE)
        audit = [] if run.get("audit") == "ok" else [f"audit: {run['audit']}"]
        return Judgement(DISCARD, NOT_COMPARED, "; ".join([*audit, *run.get("doubts", [])]))
    others = [e for e in earlier if e["group"] != run["group"] and believable(e)]
    if metric_was_edited(run, others):
        return Judgement(
            DISCARD, NOT_COMPARED, "the code that evaluates is not that of the runs before: where that is meant, move"
            " results.tsv and results.jsonl away and begin anew",
        )  # fmt: skip
    comparable = [e for e in earlier if believable(e) and not differences(run, e)]
    incumbent = incumbent_of(comparable)
    if incumbent is None:  # the first of its kind: another budget, another machine or other data begin anew
        note = f"the first of its kind: {'; '.join(differences(run, others[-1]))}" if others else ""
        return Judgement(KEEP, BASELINE, note)
    if incumbent.name == run["group"]:
        is_first = not any(e["group"] != run["group"] for e in comparable)
        return Judgement(KEEP, BASELINE if is_first else INCUMBENT)
    return _against(incumbent, run, comparable)


def _against(incumbent: Experiment, run: dict, comparable: Sequence[dict]) -> Judgement:
    together = [*comparable, run]
    ours, theirs = experiments(together)[run["group"]].numbers, incumbent.numbers
    note = f"against {incumbent.name}"
    if (tiles := [e.get("tiles", "default") for e in (run, incumbent.latest)])[0] != tiles[1]:
        note += f", whose kernels had other tiles ({tiles[1]}, here {tiles[0]})"
    if pace := pace_note(run, incumbent.latest):
        note += f", with {pace}"
    noise = noise_among(together)
    seed = next_seed(ours, theirs)
    if noise is None:
        return Judgement(
            DISCARD, f"undecided: next seed {seed}",
            f"{note}; nothing is known of the noise yet: a second seed of any experiment shows it, a third better",
        )  # fmt: skip
    found = difference(ours, theirs, noise)
    low, high = found.interval
    max_seeds = max((run.get("config") or {}).get("max_seeds") or MAX_SEEDS, len(ours))
    plan, look = looks(max_seeds), len(ours) - 1
    note += (
        f": {found.mean:+.6f}, with 95 % from {low:+.6f} to {high:+.6f}; p {found.p:.3f}, a gain below"
        f" {plan.better[look]:.3f}, given up above {plan.stop[look]:.3f}{_by_seed(ours, theirs)}"
    )
    word = decide(ours, theirs, noise, max_seeds)
    if word == BETTER:
        return Judgement(KEEP, BETTER, note)
    return Judgement(DISCARD, word if word == NOT_BETTER else f"undecided: next seed {seed}", note)


def interval_in(note: str) -> dict[str, float] | None:
    """The difference that a note speaks of, as `mean`, `low`, `high` (95 %) and `p`; None where it speaks of none."""
    # The last one: what stands before it is a name, which may be anything.
    found = re.findall(r": ([+-]\d+\.\d+), with 95 % from ([+-]\d+\.\d+) to ([+-]\d+\.\d+); p (\d\.\d+)", note)
    return dict(zip(("mean", "low", "high", "p"), map(float, found[-1]), strict=True)) if found else None


def _by_seed(ours: Numbers, theirs: Numbers) -> str:
    """What two runs of one seed differ by: nothing, where the code computes the same."""
    return "".join(f"; on seed {seed} {value:+.6f}" for seed, value in paired(ours, theirs).items())


def refresh_due(runs: Sequence[dict], incumbent: Experiment) -> bool:
    """Whether so many experiments have come since the incumbent's last run that it should be run once more."""
    last = max(i for i, run in enumerate(runs) if run["group"] == incumbent.name)
    return len({run["group"] for run in runs[last + 1 :]}) >= REFRESH
