"""What a command line asks for: a run, its repeats on other seeds, or as many seeds as it takes to know.

More than one run are processes of their own, one after another: each starts as a run by hand does.
"""

import dataclasses
import signal
import sys
from pathlib import Path
from statistics import fmean
from subprocess import Popen

import torch

from prepare import InputError
from prepare.words import command_line, printable

from .clock import leave_out
from .config import TrainConfig, to_args
from .curves import draw_curves
from .leases import lent
from .ranks import ALONE, LostRankError, Ranks
from .resilience.resume import resumed, run_of_launch
from .resilience.signals import Signals
from .results.judge import (
    BETTER,
    INCUMBENT,
    REFRESH,
    Experiment,
    believable,
    differences,
    experiments,
    incumbent_of,
    next_seed,
    refresh_due,
)
from .results.ledger import Ledger, name_of
from .results.provenance import why_no_commit
from .results.record import Record
from .results.run_folder import reserved_run_dir
from .results.statistics import UNDECIDED, spread
from .trainer import run


def experiment(config: TrainConfig, signals: Signals, ranks: Ranks = ALONE) -> int:
    """Runs what is asked for, a single run on all `ranks`. Returns the exit code; raises what a single run raises."""
    if config.repeat < 1:
        raise InputError(f"--repeat {config.repeat} must be at least 1")
    if config.max_seeds < 1:
        raise InputError(f"--max-seeds {config.max_seeds} must be at least 1")
    if config.repeat > 1 and config.confirm:
        raise InputError("--confirm takes its seeds one by one: leave --repeat out, or --confirm")
    if (config.repeat > 1 or config.confirm) and not config.resume:
        if ranks.place.launched:
            raise InputError("torchrun starts a single run: leave --repeat and --confirm out, and start the seeds one"
                             " after the other, with --group and --seed")  # fmt: skip
        return several(config)
    with lent(config.gpu) as gpu:
        leave_out(gpu.waited)
        return single(config, signals, ranks)


def single(config: TrainConfig, signals: Signals, ranks: Ranks) -> int:
    """One run, on the GPU that this process sees."""
    ranks.join(config.device != "cpu" and torch.cuda.is_available(), config.hang_timeout)
    config = begun_before(config, ranks)
    record = Record(config, ranks.size)
    record.folder = Path(ranks.of_first(str(record.folder)))
    if record.source["commit"] is None:
        reason, mend = why_no_commit()
        print(printable(f"note: {reason}: the ledger cannot name a commit; {mend}"), file=sys.stderr)
    try:
        summary = run(config, signals, record, ranks)
    except BaseException as error:
        if not ranks.speaks():
            raise
        # What torchrun starts again goes on from its checkpoint: that run will have a row of its own.
        if not (isinstance(error, LostRankError) and ranks.place.starts_again):
            record.fail(error)
        if record.began and isinstance(error, Exception):  # who interrupts does not wait for a picture
            draw_curves(record.folder)
        raise
    ranks.together = True
    if not ranks.first:
        return 0
    verdict = summary["verdict"]
    if verdict.startswith(UNDECIDED) and config.group is None:
        seed = int(verdict.removeprefix(f"{UNDECIDED}: next seed ").split()[0])
        line = command_line("train", "--group", name_of(record.folder), "--seed", seed)
        print(f"to know more: {line}, and the other options as they were; --confirm does it by itself", flush=True)
    if summary["audit"] != "ok":
        print(f"FAIL: audit: {summary['audit']}", flush=True)
        return 1
    return 0


def begun_before(config: TrainConfig, ranks: Ranks) -> TrainConfig:
    """Where torchrun starts a run again, that run, to go on from its last checkpoint."""
    if not ranks.place.attempt or config.resume:
        return config
    place = ranks.place
    found = ranks.first_does(lambda: run_of_launch(place.launch, config.run_dir))
    saved = ranks.first_does(lambda: found and dataclasses.asdict(resumed(found, {})))
    saved = ranks.of_first(saved)
    return TrainConfig(**saved) if saved else config


def several(config: TrainConfig) -> int:
    """The runs of one group. The first that does not end well ends them all."""
    if config.run_dir:
        return group_of(config, Path(config.run_dir))
    with reserved_run_dir(config.name) as base:
        return group_of(config, base)


def group_of(config: TrainConfig, base: Path) -> int:
    """The runs in the folders `base`-seed42 and so on."""
    group = config.group or name_of(base)
    code = confirmed(config, base, group) if config.confirm else repeated(config, base, group)
    if code == 0:
        tell(group, Ledger.beside(base))
    return code


def repeated(config: TrainConfig, base: Path, group: str) -> int:
    for seed in range(config.seed, config.seed + config.repeat):
        if code := one_of(config, base, f"repeat of {group}", seed=seed, group=group):
            return code
        config = dataclasses.replace(config, tune="off" if config.tune == "off" else "auto")  # anew once is enough
    return 0


def confirmed(config: TrainConfig, base: Path, group: str) -> int:
    """Seed after seed, until the ledger says what is known; then, where it is better, a fresh one, which owes nothing
    to having been chosen."""
    ledger, ran = Ledger.beside(base), 0
    incumbent = incumbent_at(config, ledger)
    theirs = incumbent.numbers if incumbent else {}
    ours: dict[int, float] = {}
    if incumbent:
        took = [run["seconds"]["total"] for run in incumbent.runs if believable(run)]
        about = f" of about {fmean(took):.0f} s" if took else ""
        print(f"{group} against {incumbent.name}: 1 to {config.max_seeds} runs{about}, and one more if it is better")
    while True:
        seed = next_seed(ours, theirs) if theirs else config.seed
        what = f"{group}, seed {ran + 1} of at most {config.max_seeds}"
        if code := one_of(config, base, what, seed=seed, group=group):
            return code
        config = dataclasses.replace(config, tune="off" if config.tune == "off" else "auto")
        ran += 1
        runs = ledger.runs()
        last = experiments(runs)[group].runs[-1]
        ours = experiments(runs)[group].numbers
        if not last["verdict"].startswith("undecided") or ran >= config.max_seeds:
            break
    if last["verdict"] == BETTER:
        fresh = max([*ours, *theirs]) + 1
        if code := one_of(config, base, f"{group} is better, on a fresh seed", seed=fresh, group=group):
            return code
        ran += 1
    print(f"{group}: {ran} run{'s' * (ran > 1)}")
    return 0


def incumbent_at(config: TrainConfig, ledger: Ledger) -> Experiment | None:
    """The incumbent among the latest runs of this budget on this machine, as far as that can be known before a run."""
    record = Record(config)
    alike = [
        run for run in ledger.runs() if believable(run) and run["comparable"]["machine"] == record.machine["name"]
        and run["comparable"]["budget"] == record.budget()
    ]  # fmt: skip
    return incumbent_of([run for run in alike if not differences(run, alike[-1])])


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
    """The group in a few lines, and what is to be done next."""
    runs = ledger.runs()
    found = experiments(runs)[group]
    last = found.runs[-1]
    verdicts = [run for run in found.runs if run["verdict"] != INCUMBENT] or [last]
    print("---")
    print(f"group:     {group}")
    print(f"val_bpb:   {spread([*found.numbers.values()])}")
    print(f"status:    {found.status}")
    print(f"verdict:   {verdicts[-1]['verdict']}" + (f" ({verdicts[-1]['note']})" if verdicts[-1]["note"] else ""))
    alike = [run for run in runs if believable(run) and believable(last) and not differences(run, last)]
    incumbent = incumbent_of(alike)
    if incumbent and incumbent.name != group and refresh_due(alike, incumbent):
        seed, first = max(run["seed"] for run in alike) + 1, incumbent.first
        flags = [*(first.get("flags") or []), *(["--description", first["description"]] * bool(first["description"]))]
        again = command_line("train", *flags, "--group", incumbent.name, "--seed", seed)
        print(f"due:       {incumbent.name} was last run {REFRESH} experiments ago: once more, at its commit"
              f" ({first['commit']}): {again}")  # fmt: skip
