"""Which tile, and which way, each kernel of a step takes on this GPU: compiled, checked, timed and kept.

The order: what the step asks for and the table does not have yet; all candidates compiled on all cores; checked and
timed by a process that may die, on the GPU; what is no tile decided by whole steps. After every kernel the table is
written, so that whatever ends this loses one kernel's time.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median

import torch

from kernels import Table, key_of
from model import GPTConfig
from prepare import InputError

from ..config import ROOT, TrainConfig
from ..precompile import step_digest
from ..results.run_folder import source_commit
from .compiling import compile_all
from .table import Entry, Kept, in_force
from .targets import targets
from .trials import HEADER, NO_TIME, Trial, Tuned, label, line_of
from .usage import ARCHS

COMPILING = 0.6  # at most so much of the time; what is not compiled by then is left for another day
DECIDING = 0.15  # so much of it is for whole steps
HANG = 60.0  # seconds in which a trial has to end: it waits for the reference, and perhaps for the compiler
DEATHS = 3  # of the measuring process at one target: then the rest of its candidates are left alone


@dataclass
class Outcome:
    """What came of it."""

    tuned: list[Tuned] = field(default_factory=list)
    untold: int = 0  # targets for which no time was left
    step: dict[str, dict] = field(default_factory=dict)  # by what was decided: seconds before and after
    faults: list[str] = field(default_factory=list)  # that are no candidate's

    @property
    def predicted_us(self) -> float:
        """Gain of a micro-step, as the kernels' times add up."""
        return sum(one.gain for one in self.tuned if not one.target.fused_norms)

    @property
    def nothing_is_right(self) -> bool:
        """Every candidate that was tried was struck out, the defaults among them."""
        tried = [one for one in self.tuned if len(one.struck) + len(one.timed)]
        return bool(tried) and not any(one.timed for one in tried)


def arch_here() -> int:
    """Raises InputError where the limits of this GPU are not known."""
    major, minor = torch.cuda.get_device_capability()
    arch = 10 * major + minor
    if arch not in ARCHS:
        raise InputError(f"this GPU is an sm_{arch}, and the limits of {', '.join(map(str, ARCHS))} alone are known")
    return arch


def tune_step(
    config: TrainConfig, shape: GPTConfig, kept: Kept, seconds: float, fused_norms: bool | None, again: bool = False,
    only: tuple[str, ...] = (), say: Callable[[str], None] = print,
) -> Outcome:  # fmt: skip
    """Tunes what a step of `config` asks for, in about so many seconds, and writes `kept` after every kernel.

    Args:
        fused_norms: as `targets` takes it; None also has a whole step decide whether norms are fused.
        again: also what the table has.
        only: kernels by name; all where it is empty.

    Raises InputError where there is no such kernel, or where this GPU is busy; OSError where the table cannot be kept.
    """
    start, outcome = time.monotonic(), Outcome()
    found = targets(config, shape, fused_norms)
    if unknown := [name for name in only if name not in {target.name for target in found}]:
        names = ", ".join(sorted({target.name for target in found}))
        raise InputError(f"--only {unknown[0]}: no such kernel; there are {names}")
    numbers = [
        number for number, target in enumerate(found)
        if (not only or target.name in only) and len(target.tiles) > 1
        and (again or kept.find(target.choice, target.shape) is None)
    ]  # fmt: skip
    if not numbers:
        return outcome
    work = [Tuned.fresh(found[number]) for number in numbers]
    given = {
        "config": asdict(config), "vocab_size": shape.vocab_size, "fused_norms": fused_norms, "decide": False,
    }  # fmt: skip
    count = sum(len(one.trials) for one in work)
    say(f"tuning: {count} candidates for {len(work)} kernels of a step, at most {seconds:.0f} s")
    compile_all(work, numbers, config, shape.vocab_size, fused_norms, arch_here(), COMPILING * seconds, say)
    ready = sum(trial.fault is None for one in work for trial in one.trials)
    say(f"tuning: {ready} of them compiled and fit, {time.monotonic() - start:.0f} s\n{HEADER}")
    by_number = dict(zip(numbers, work, strict=True))
    until = start + (1 - DECIDING) * seconds
    ready_ones = {number: one for number, one in by_number.items() if any(t.fault is None for t in one.trials[1:])}

    def finished(number: int) -> None:
        one = by_number[number]
        if one.unsteady:
            outcome.faults.append(f"{one.target.name}: its times differ by {one.noise:.0%}: something else is at work")
            return
        say(line_of(one))
        outcome.tuned.append(one)
        if one.untried == 0 or one.best is not one.present:
            kept.add(entry_of(one))
            kept.write()

    measure_all(ready_ones, given, until, finished, outcome)
    outcome.untold = len(work) - len(outcome.tuned)
    ways = [one for one in outcome.tuned if one.whole and one.best is not one.present]
    asked = [(target.choice, target.shape) for target in found]
    ways_of = {(one.target.name, one.target.key) for one in ways}
    base = in_force(kept, [(c, s) for c, s in asked if (c.name, key_of(s)) not in ways_of])
    left = start + seconds - time.monotonic()
    if outcome.tuned and left > 0 and not outcome.nothing_is_right:
        decide_all(ways, base, given, left, kept, outcome)
        kept.options[step_digest(config, shape.vocab_size)] = {
            **{name: times["better"] for name, times in outcome.step.items() if name in ("fused_norms", "graphs")},
            "predicted_us": outcome.predicted_us,
            "step_ms": {name: [1e3 * median(times[side]) for side in ("before", "after")]
                        for name, times in outcome.step.items()},
        }  # fmt: skip
    else:
        for one in ways:  # a whole step alone could have taken them
            keep_default(kept, one)
    kept.write()
    return outcome


def entry_of(one: Tuned) -> Entry:
    target, best, present = one.target, one.best, one.present
    times = {id(trial): one.us(trial) if trial.seconds else None for trial in (best, present)}
    return Entry(
        target.name, target.key, target.choice.digest(*target.shape), present.tile, best.tile, times[id(present)],
        times[id(best)], one.noise if present.seconds else None,
        {label(trial.tile): trial.fault for trial in one.struck}, source_commit(), time.strftime("%Y-%m-%d"),
    )  # fmt: skip


def keep_default(kept: Kept, one: Tuned) -> None:
    entry = kept.entries.get((one.target.name, one.target.key))
    if entry:
        kept.add(replace(entry, best=entry.default, best_us=entry.default_us))


class Measuring:
    """A measuring process, and the lines that it writes."""

    program = "import sys; from train.tune.worker import main; sys.exit(main(sys.argv[1]))"

    def __init__(self, given: dict, folder: Path):
        self.results, self.log = folder / "results", folder / "log"
        self.results.write_text("")
        arguments = folder / "given.json"
        arguments.write_text(json.dumps({**given, "results": str(self.results)}))
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", self.program, str(arguments)], cwd=ROOT, stdin=subprocess.PIPE,
                stdout=log, stderr=log, start_new_session=True, env=dict(os.environ),
            )  # fmt: skip
        self.read, self.fate = 0, ""

    def lines(self, until: float):
        """As they come. Ends where the process ends, is killed since it is past its time, or said nothing for `HANG`
        seconds: `fate` says which."""
        since = time.monotonic()
        while True:
            ended = self.process.poll() is not None
            text = self.results.read_text(encoding="utf-8")
            new = text[self.read : text.rfind("\n") + 1]
            self.read += len(new)
            for line in new.splitlines():
                since = time.monotonic()
                yield json.loads(line)
            now = time.monotonic()
            if ended:
                code = self.process.returncode
                self.fate = f"the process ends with {code}{self._last_words()}" if code else ""
                return
            if now > until or now - since > HANG:
                self.fate = NO_TIME if now > until else "it does not end"
                return
            time.sleep(0.05)

    def _last_words(self) -> str:
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return f" ({lines[-1][:160]})" if lines else ""

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.process.stdin.close()


def run_apart(given: dict, until: float, heard: Callable[[dict], None]) -> str:
    """A measuring process from its start to its end. Returns how it ended: nothing where it finished."""
    with tempfile.TemporaryDirectory() as folder:
        measuring = Measuring(given, Path(folder))
        try:
            for line in measuring.lines(until):
                heard(line)
        finally:
            measuring.close()
        return measuring.fate


def measure_all(
    work: dict[int, Tuned], given: dict, until: float, finished: Callable[[int], None], outcome: Outcome
) -> None:
    """All targets, by as many processes as it takes. Raises InputError where the GPU is busy."""
    left, deaths, at = list(work), dict.fromkeys(work, 0), (None, None)

    def heard(line: dict) -> None:
        nonlocal at
        if "busy" in line:
            raise InputError(f"this GPU is busy ({line['busy']}), and times taken on it are worth nothing: end that")
        if "trials" in line:
            number, one = line["number"], work[line["number"]]
            one.trials = [Trial(**trial) for trial in line["trials"]]
            one.whole, one.launches = line["whole"], line["launches"]
            left.remove(number)
            at = (None, None)
            if line["error"]:
                outcome.faults.append(f"{one.target.name}: {line['error']}")
            finished(number)
        elif "at" in line:
            at = line["number"], line["at"]
        elif "error" in line:
            outcome.faults.append(line["error"])

    while left and time.monotonic() < until:
        at = (None, None)
        trials = {number: [asdict(trial) for trial in work[number].trials] for number in left}
        fate = run_apart(
            {**given, "numbers": list(left), "trials": trials, "seconds": until - time.monotonic()}, until + HANG, heard
        )
        if not fate:
            if left:
                outcome.faults.append(f"{len(left)} kernels were not tried")
            return
        number, trial = at
        if number is None or fate == NO_TIME:
            outcome.faults.append(f"measuring: {fate}")
            return
        one = work[number]
        one.trials[trial].fault = f"breaks the GPU, or hangs it: {fate}"
        deaths[number] += 1
        if deaths[number] == DEATHS or trial == 0:
            for other in one.trials:
                other.fault = other.fault or "left alone: others of this kernel broke the GPU"
            left.remove(number)
            finished(number)


def decide_all(ways: list[Tuned], base: Table, given: dict, seconds: float, kept: Kept, outcome: Outcome) -> None:
    """Has whole steps decide; what they do not come to keeps its default."""
    undecided = list(ways)

    def heard(line: dict) -> None:
        if "better" in line and "way" in line:
            one = ways[line["way"]]
            undecided.remove(one)
            outcome.step[f"{one.target.name} {one.target.key}"] = line
            if not line["better"]:
                keep_default(kept, one)
        elif "better" in line:
            outcome.step[line["what"]] = line
        elif reason := line.get("error") or line.get("busy"):
            outcome.faults.append(f"whole steps: {reason}")

    fate = run_apart(
        {**given, "decide": True, "table": base,
         "ways": [(one.target.name, one.target.key, one.best.tile) for one in ways]},
        time.monotonic() + max(seconds, HANG), heard,
    )  # fmt: skip
    if fate:
        outcome.faults.append(f"whole steps: {fate}")
    for one in undecided:
        keep_default(kept, one)
    if not outcome.step.get("tuned", {}).get("better", True):
        outcome.faults.append("a whole step is slower, or computes something else, with what was chosen: nothing is")
        for one in outcome.tuned:
            keep_default(kept, one)
