"""What a command line asks for: a run, its repeats on other seeds, its confirmation on fresh ones.

More than one run are processes of their own, one after another: each starts as a run by hand does.
"""

import dataclasses
import signal
import sys
from pathlib import Path
from subprocess import Popen

from prepare import InputError
from prepare.words import printable

from .config import TrainConfig, to_args
from .curves import draw_curves
from .resilience.signals import Signals
from .results.judge import KEEP, experiments, numbers
from .results.ledger import Ledger, name_of
from .results.provenance import why_no_commit
from .results.record import Record
from .results.run_folder import reserved_run_dir
from .results.statistics import spread
from .trainer import run

CONFIRMATIONS = 3  # fresh seeds, where --repeat asks for no more


def experiment(config: TrainConfig, signals: Signals) -> int:
    """Runs what is asked for. Returns the exit code; raises what a single run raises."""
    if config.repeat < 1:
        raise InputError(f"--repeat {config.repeat} must be at least 1")
    if (config.repeat > 1 or config.confirm) and not config.resume:
        return several(config)
    record = Record(config)
    if record.source["commit"] is None:
        reason, mend = why_no_commit()
        print(printable(f"note: {reason}: the ledger cannot name a commit; {mend}"), file=sys.stderr)
    try:
        summary = run(config, signals, record)
    except BaseException as error:
        record.fail(error)
        if record.began and isinstance(error, Exception):  # who interrupts does not wait for a picture
            draw_curves(record.folder)
        raise
    if summary["audit"] != "ok":
        print(f"FAIL: audit: {summary['audit']}", flush=True)
        return 1
    return 0


def several(config: TrainConfig) -> int:
    """The runs of one group. The first that does not end well ends them all."""
    if config.run_dir:
        return group_of(config, Path(config.run_dir))
    with reserved_run_dir(config.name) as base:
        return group_of(config, base)


def group_of(config: TrainConfig, base: Path) -> int:
    """The runs in the folders `base`-seed42 and so on."""
    group = config.group or name_of(base)
    seeds = range(config.seed, config.seed + config.repeat)
    for seed in seeds:
        if code := one_of(config, base, f"repeat of {group}", seed=seed, group=group):
            return code
        config = dataclasses.replace(config, tune="off" if config.tune == "off" else "auto")  # anew once is enough
    ledger = Ledger.beside(base)
    if config.confirm:
        tried = experiments(ledger.runs())[group].runs
        if not any(entry["status"] == KEEP for entry in tried):
            print(f"{group}: no new best, nothing to confirm")
        else:
            count = max(config.repeat, CONFIRMATIONS)
            for seed in range(seeds[-1] + 1, seeds[-1] + 1 + count):
                if code := one_of(config, base, f"confirmation of {group}", seed=seed, confirms=group):
                    return code
    tell(group, ledger)
    return 0


def one_of(config: TrainConfig, base: Path, what: str, *, seed: int, **fields) -> int:
    """One run as a process. A signal to this one is passed on, once: the terminal sends its own to this one alone."""
    folder = base.with_name(f"{base.name}-seed{seed}")
    config = dataclasses.replace(config, seed=seed, run_dir=str(folder), repeat=1, confirm=False, **fields)
    print(f"=== {what}: seed {seed}", flush=True)
    process = Popen([sys.executable, "-m", "train", *to_args(config)], process_group=0)
    before = {
        number: signal.signal(number, lambda number, _: process.send_signal(number))
        for number in (signal.SIGINT, signal.SIGTERM)
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def tell(group: str, ledger: Ledger) -> None:
    """The group in a few lines."""
    found = experiments(ledger.runs())[group]
    print("---")
    print(f"group:     {group}")
    print(f"tried:     {spread(numbers(found.runs))}")
    if found.confirmations:
        print(f"confirmed: {spread(numbers(found.confirmations))}")
    last = (found.confirmations or found.runs)[-1]
    print(f"verdict:   {last['verdict']}" + (f" ({last['note']})" if last["note"] else ""))
