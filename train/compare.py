"""`python -m train.compare A B`: whether A is better than B, or only luckier. Each is a run, or a group of repeats."""

import sys
from pathlib import Path

from prepare import InputError
from prepare.arguments import Parser, command
from prepare.errors import one_line
from prepare.words import printable

from .config import runs_folder
from .results.judge import Experiment, believable, differences, experiments, noise_among
from .results.ledger import Ledger, name_of
from .results.statistics import difference, spread


def main(args: list[str] | None = None) -> int:
    parser = Parser("train.compare", __doc__)
    parser.add_argument("a", metavar="A", help="group, run, or a run's folder")
    parser.add_argument("b", metavar="B", help="what to compare it with")
    parser.add_argument("--ledger", metavar="FOLDER", help="where results.jsonl is (default: $TIMEBOX_RUNS, else runs)")
    options = parser.parse_args(args)
    try:
        options.ledger = runs_folder() if options.ledger is None else options.ledger
        a, b = (find(name, options.ledger) for name in (options.a, options.b))
        print(compare(a, b, ledger_of(options.a, options.ledger).runs()))
    except (InputError, OSError) as error:
        print(f"error: {one_line(error, 'name another folder with --ledger')}", file=sys.stderr)
        return 2
    return 0


def ledger_of(name: str, folder: str | Path) -> Ledger:
    return Ledger.beside(name) if Path(name).is_dir() else Ledger(folder)


def find(name: str, folder: str | Path) -> Experiment:
    """The group called `name`, or the one run. Raises InputError where the ledger has neither."""
    path, ledger = Path(name), ledger_of(name, folder)
    name = name_of(path) if path.is_dir() else printable(name)
    runs = ledger.runs()
    groups = experiments(runs)
    if name in groups:
        return groups[name]
    run = next((run for run in reversed(runs) if run["run"] == name), None)
    if run is None:
        raise InputError(f"{ledger.folder} has no run or group {name}: name one of {ledger.folder / 'results.tsv'}")
    return Experiment(name, [run])


def compare(a: Experiment, b: Experiment, runs: list[dict]) -> str:
    """The report; `runs` of the ledger show the noise. Raises InputError where one of them has no number."""
    lines = []
    for label, experiment in (("A", a), ("B", b)):
        if not experiment.numbers:
            raise InputError(f"{experiment.name} has no val_bpb that counts: {experiment.first['note']}")
        lines.append(f"{label}: {spread([*experiment.numbers.values()])}  {experiment.name}")
    both = [run for e in (a, b) for run in (*e.runs, *e.confirmations) if run["outcome"] == "finished"]
    reasons = [reason for run in both[1:] for reason in differences(both[0], run)]
    if reasons:
        return "\n".join([*lines, "verdict: not compared", *(f"  {reason}" for reason in dict.fromkeys(reasons))])
    noise = noise_among([run for run in runs if believable(run) and not differences(run, both[0])])
    if noise is None:
        lines.append("verdict: unknown: nothing is known of the noise; --repeat 3 of either shows it")
        return "\n".join(lines)
    found = difference(a.numbers, b.numbers, noise)
    low, high = found.interval
    common = len(a.numbers.keys() & b.numbers.keys())
    lines.append(f"A less B: {found.mean:+.6f}, with 95 % from {low:+.6f} to {high:+.6f} (t of {found.df} degrees of"
                 f" freedom; {common} seed{'s' * (common != 1)} in common)")  # fmt: skip
    lines.append(f"verdict: {'better' if high < 0 else 'worse' if low > 0 else 'within noise'}")
    return "\n".join(lines)


if __name__ == "__main__":
    command(main)
