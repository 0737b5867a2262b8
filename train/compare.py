"""`python -m train.compare A B`: whether A is better than B, or only luckier. Each is a run, or a group of repeats."""

import sys
from pathlib import Path

from prepare import InputError
from prepare.arguments import Parser, command
from prepare.errors import one_line
from prepare.words import printable

from .results.judge import Experiment, differences, experiments, numbers
from .results.ledger import Ledger, name_of
from .results.statistics import SIGNIFICANCE, spread, verdict, welch_p


def main(args: list[str] | None = None) -> int:
    parser = Parser("train.compare", __doc__)
    parser.add_argument("a", metavar="A", help="group, run, or a run's folder")
    parser.add_argument("b", metavar="B", help="what to compare it with")
    parser.add_argument("--ledger", metavar="FOLDER", default="runs", help="where results.jsonl is (default: runs)")
    options = parser.parse_args(args)
    try:
        print(compare(find(options.a, options.ledger), find(options.b, options.ledger)))
    except (InputError, OSError) as error:
        print(f"error: {one_line(error, 'name another folder with --ledger')}", file=sys.stderr)
        return 2
    return 0


def find(name: str, folder: str) -> Experiment:
    """The group called `name`, or the one run. Raises InputError where the ledger has neither."""
    path = Path(name)
    ledger = Ledger.beside(path) if path.is_dir() else Ledger(folder)
    name = name_of(path) if path.is_dir() else printable(name)
    runs = ledger.runs()
    groups = experiments(runs)
    if name in groups:
        return groups[name]
    run = next((run for run in reversed(runs) if run["run"] == name), None)
    if run is None:
        raise InputError(f"{ledger.folder} has no run or group {name}: name one of {ledger.folder / 'results.tsv'}")
    return Experiment(name, [run])


def compare(a: Experiment, b: Experiment) -> str:
    """The report. Raises InputError where one of them has no number."""
    lines = []
    for label, experiment in (("A", a), ("B", b)):
        if not experiment.evidence:
            raise InputError(f"{experiment.name} has no val_bpb that counts: {experiment.first['note']}")
        line = f"{label}: {spread(experiment.evidence)}  {experiment.name}"
        if numbers(experiment.confirmations):
            line += f", on fresh seeds; as first tried {spread(numbers(experiment.runs))}"
        lines.append(line)
    runs = [run for e in (a, b) for run in (*e.runs, *e.confirmations) if run["outcome"] == "finished"]
    reasons = [reason for run in runs[1:] for reason in differences(runs[0], run)]
    if reasons:
        return "\n".join([*lines, "verdict: not compared", *(f"  {reason}" for reason in dict.fromkeys(reasons))])
    p = welch_p(a.evidence, b.evidence)
    if p is None:
        counts = f"{len(a.evidence)} and {len(b.evidence)}"
        lines.append(f"verdict: unknown: {counts} numbers show no noise to compare with; use --repeat 3 for both")
    else:
        lines.append(f"Welch's p: {p:.4g} (two-sided; a difference counts below {SIGNIFICANCE})")
        lines.append(f"verdict: {verdict(a.evidence, b.evidence)}")
    return "\n".join(lines)


if __name__ == "__main__":
    command(main)
