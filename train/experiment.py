"""What a command line asks for: a run, its repeats on other seeds, or as many seeds as it takes to know.

More than one run are processes of their own (`at_once`).
"""

import dataclasses
import sys
from pathlib import Path
from statistics import fmean
from subprocess import Popen

import torch

from prepare import InputError
from prepare.words import command_line, printable

from .at_once import AtOnce, OneByOne, Runs, at_once
from .clock import leave_out
from .config import TrainConfig
from .curves import draw_curves
from .init_from import Weights
from .leases import Turn, take
from .ranks import ALONE, LostRankError, Ranks
from .resilience.resume import resumed, run_of_launch
from .resilience.signals import Signals
from .results.judge import (
    BETTER,
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
    gpu = take(config.gpu)
    leave_out(gpu.waited)
    return single(config, signals, ranks, gpu.turn)


def single(config: TrainConfig, signals: Signals, ranks: Ranks, turn: Turn | None) -> int:
    """One run, on the GPU that this process sees; one of several waits for its `turn` to be judged."""
    ranks.join(config.device != "cpu" and torch.cuda.is_available(), config.hang_timeout)
    config = begun_before(config, ranks)
    record = Record(config, ranks.size)
    record.turn = turn
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
    runs = AtOnce(config, base, group) if at_once(config) else OneByOne(config, base, group, Popen)
    with runs:
        code = confirmed(config, base, group, runs) if config.confirm else repeated(config, group, runs)
    if code == 0:
        tell(group, Ledger.beside(base))
    return code


def repeated(config: TrainConfig, group: str, runs: Runs) -> int:
    for seed in range(config.seed, config.seed + config.repeat):
        for begun in runs.begin({seed: f"repeat of {group}"}):
            runs.due(begun)
    return runs.finish()


def confirmed(config: TrainConfig, base: Path, group: str, runs: Runs) -> int:
    """Seed after seed, until the ledger says what is known; then, where it is better, a fresh one, which owes nothing
    to having been chosen. Those that may still be needed run at once where they can, and are judged one by one."""
    ledger, ran = Ledger.beside(base), 0
    incumbent = incumbent_at(config, ledger)
    theirs = incumbent.numbers if incumbent else {}
    ours: dict[int, float] = {}
    if incumbent:
        took = [run["seconds"]["total"] for run in incumbent.runs if believable(run)]
        about = f" of about {fmean(took):.0f} s" if took else ""
        print(f"{group} against {incumbent.name}: 1 to {config.max_seeds} runs{about}, and one more if it is better")
    known, begun = False, []
    while not known:
        seeds = coming(ours, theirs, config.max_seeds - ran) if theirs else [config.seed + ran]
        begun = runs.begin({seed: f"{group}, seed {number} of at most {config.max_seeds}"
                            for number, seed in enumerate(seeds, ran + 1)})  # fmt: skip
        if not begun:
            return runs.finish()
        while begun and not known:
            if code := runs.judged(begun.pop(0)):
                return code
            ran += 1
            found = experiments(ledger.runs())[group]
            last, ours = found.runs[-1], found.numbers
            known = not last["verdict"].startswith("undecided") or ran >= config.max_seeds
    if last["verdict"] == BETTER:
        # One that was trained beside those that decided had no part in it: it is as fresh as a new one.
        fresh = begun or runs.begin({max([*ours, *theirs]) + 1: f"{group} is better, on a fresh seed"})
        if code := runs.judged(fresh.pop(0)) if fresh else runs.finish():
            return code
        ran += 1
    for seed in begun:
        runs.not_needed(seed)
    if begun:
        print(f"{group}: trained beside and not needed: {', '.join(f'seed {seed}' for seed in begun)}")
    print(f"{group}: {ran} run{'s' * (ran > 1)}")
    return runs.finish()


def coming(ours: dict[int, float], theirs: dict[int, float], count: int) -> list[int]:
    """The seeds with which it goes on, as far as `count`, whatever their numbers will be."""
    seeds: list[int] = []
    while len(seeds) < count:
        seeds.append(next_seed({**ours, **dict.fromkeys(seeds, 0.0)}, theirs))
    return seeds


def incumbent_at(config: TrainConfig, ledger: Ledger) -> Experiment | None:
    """The incumbent among the latest runs of this budget on this machine, as far as that can be known before a run."""
    record = Record(config)
    weights = Weights.of(config.init_from).name["sha256"] if config.init_from else None
    alike = [
        run for run in ledger.runs() if believable(run) and run["comparable"]["machine"] == record.machine["name"]
        and run["comparable"]["budget"] == record.budget() and run["comparable"].get("init_from") == weights
    ]  # fmt: skip
    return incumbent_of([run for run in alike if not differences(run, alike[-1])])


def tell(group: str, ledger: Ledger) -> None:
    """The group in a few lines, and what is to be done next."""
    runs = ledger.runs()
    found = experiments(runs)[group]
    last = found.runs[-1]
    deciding = found.deciding
    print("---")
    print(f"group:     {group}")
    print(f"val_bpb:   {spread([*found.numbers.values()])}")
    print(f"status:    {found.status}")
    print(f"verdict:   {deciding['verdict']}" + (f" ({deciding['note']})" if deciding["note"] else ""))
    alike = [run for run in runs if believable(run) and believable(last) and not differences(run, last)]
    incumbent = incumbent_of(alike)
    if incumbent and incumbent.name != group and refresh_due(alike, incumbent):
        seed, first = max(run["seed"] for run in alike) + 1, incumbent.first
        flags = [*(first.get("flags") or []), *(["--description", first["description"]] * bool(first["description"]))]
        again = command_line("train", *flags, "--group", incumbent.name, "--seed", seed)
        print(f"due:       {incumbent.name} was last run {REFRESH} experiments ago: once more, at its commit"
              f" ({first['commit']}): {again}")  # fmt: skip
