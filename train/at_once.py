"""The runs of one experiment: one after another, or with `--gpu any` on as many GPUs at once as are free.

However many run at once, the ledger has them in the order of their seeds, as if each had waited for the one before: a
run that is trained waits for its `Turn` before it is judged. So what decides is what would have decided one by one, and
who is the last to end has no say in it. `--confirm` looks after each seed, with limits that hold for that order
(`results.statistics`): what is trained beside a seed that decides was not needed. Its number takes no part, neither in
the verdict nor in the noise, since it would be one more look.

Each run is a process of its own, which starts as a run by hand does.
"""

import dataclasses
import os
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL, STDOUT, Popen
from time import sleep
from types import TracebackType

from prepare.words import printable

from .config import TrainConfig, to_args
from .leases import ANY, GO, NOT_NEEDED, Gpu, Lease, free, gpus, holders
from .resilience.signals import WORDS
from .results.ledger import Ledger

POLL = 0.2  # seconds from one look at the runs, and for a free GPU, to the next
SHOWN = 20  # last lines of a run that failed


class Runs:
    """Runs of the group `group` in the folders `base`-seed42 and so on. `code` is the exit code of the first that did
    not end well, which ends them all."""

    def __init__(self, config: TrainConfig, base: Path, group: str):
        self.base, self.code = base, 0
        self._config = dataclasses.replace(config, group=group, repeat=1, confirm=False)

    def folder(self, seed: int) -> Path:
        return self.base.with_name(f"{self.base.name}-seed{seed}")

    def command(self, seed: int) -> list[str]:
        """Of the next run. Tuning anew once is enough."""
        config = dataclasses.replace(self._config, seed=seed, run_dir=str(self.folder(seed)))
        self._config = dataclasses.replace(self._config, tune="off" if config.tune == "off" else "auto")
        return [sys.executable, "-m", "train", *to_args(config)]

    def begin(self, seeds: Mapping[int, str]) -> list[int]:
        """Begins the first of `seeds`, when it can be, and as many that follow as can be at the same moment. Which were
        begun: none where `code` is set. Beside each stands what it is, to be printed."""
        raise NotImplementedError

    def due(self, seed: int) -> None:
        """It is to be judged, after all that were due before it."""
        raise NotImplementedError

    def judged(self, seed: int) -> int:
        """`due`, and waits until it has ended, or another has failed. Returns `code`."""
        raise NotImplementedError

    def not_needed(self, seed: int) -> None:
        """It was begun, and is not to be judged: everything is known already."""
        raise NotImplementedError

    def finish(self) -> int:
        """Waits until all have ended. Returns `code`."""
        raise NotImplementedError

    def __enter__(self) -> "Runs":
        return self

    def __exit__(self, *_) -> None:
        pass


class OneByOne(Runs):
    """A signal to this process is passed on: the terminal sends its own to this one alone. `popen` starts a process."""

    def __init__(self, config: TrainConfig, base: Path, group: str, popen: Callable = Popen):
        super().__init__(config, base, group)
        self._popen, self._what = popen, {}

    def begin(self, seeds: Mapping[int, str]) -> list[int]:
        self._what |= seeds
        return [] if self.code else [*seeds][:1]

    def due(self, seed: int) -> None:
        print(f"=== {self._what[seed]}: seed {seed}", flush=True)
        process = self._popen(self.command(seed), process_group=0)
        with passed_on(lambda number: process.send_signal(number)):
            code = process.wait()
        self.code = self.code or exit_code(code)

    def judged(self, seed: int) -> int:
        self.due(seed)
        return self.code

    def finish(self) -> int:
        return self.code


@dataclass
class Run:
    """One that was begun at once with others."""

    seed: int
    gpu: Gpu
    process: Popen
    log: Path
    turn: int | None  # where it is told its turn; None when it has been
    needed: bool = True
    ended: bool = False

    def tell(self, word: bytes) -> None:
        if self.turn is not None:
            with suppress(BrokenPipeError):  # it has ended, and not well
                os.write(self.turn, word)
            os.close(self.turn)
            self.turn = None


class AtOnce(Runs):
    """Each run has a lease, which it inherits: it is the run's, whatever becomes of this process. What it prints goes
    into a file beside its folder. A signal is passed on to all, and no other run is begun."""

    def __init__(self, config: TrainConfig, base: Path, group: str):
        super().__init__(config, base, group)
        self._gpus = gpus(config.gpu)
        self._runs: list[Run] = []
        self._due: list[Run] = []
        self._signal: int | None = None
        self._passing = passed_on(self._got)
        self._silent = False

    def __enter__(self) -> "AtOnce":
        self._passing.__enter__()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is not None:
                self._silent = True  # what went wrong may be that nobody reads
                self._end_all()
            self.finish()
        finally:
            self._passing.__exit__(kind, error, trace)

    def begin(self, seeds: Mapping[int, str]) -> list[int]:
        begun = []
        for seed, what in seeds.items():
            lease = self._lease() if not begun else free(self._gpus)
            if lease is None:
                break
            self._start(seed, what, lease)
            begun.append(seed)
        return begun

    def _lease(self) -> Lease | None:
        """Waited for; None where nothing is to be begun any more."""
        told = False
        while not self._over():
            if lease := free(self._gpus):
                return self._after(lease)
            if not told and not self._going():
                print(f"=== all GPUs are lent ({holders(self._gpus)}): waiting, until Ctrl-C", flush=True)
                told = True
            sleep(POLL)
        return None

    def _after(self, lease: Lease) -> Lease | None:
        """What had it before is ending, if it was ours: how, is to be known first."""
        for run in self._going():
            if run.gpu == lease.gpu:
                run.process.wait()
        if not self._over():
            return lease
        lease.give_back()
        return None

    def _start(self, seed: int, what: str, lease: Lease) -> None:
        heard, told = os.pipe()
        folder = self.folder(seed)
        log = folder.with_name(f"{folder.name}.log")
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            with log.open("wb") as output:
                process = Popen(
                    self.command(seed), process_group=0, stdin=DEVNULL, stdout=output,
                    stderr=STDOUT, pass_fds=(lease.descriptor, heard),
                    env=os.environ | lease.environment(heard),
                )  # fmt: skip
        finally:
            os.close(heard)
            lease.give_back()
        self._runs.append(Run(seed, lease.gpu, process, log, told))
        if self._signal is not None:  # it came in between
            process.send_signal(self._signal)
        print(f"=== {what}: seed {seed} on GPU {lease.gpu.index}, output in {printable(log)}", flush=True)

    def due(self, seed: int) -> None:
        self._due += [run for run in self._runs if run.seed == seed]
        self._over()

    def judged(self, seed: int) -> int:
        self.due(seed)
        while not self._over() and not self._due[-1].ended:
            sleep(POLL)
        return self.finish() if self._over() else 0

    def not_needed(self, seed: int) -> None:
        for run in self._runs:
            if run.seed == seed:
                run.needed = False
                run.tell(NOT_NEEDED)

    def finish(self) -> int:
        while self._going():
            self._over()
            sleep(POLL)
        self._over()
        return self.code

    def _going(self) -> list[Run]:
        return [run for run in self._runs if not run.ended]

    def _over(self) -> bool:
        """Looks at all runs. Whether one has failed, or a signal came."""
        for run in self._going():
            if (code := run.process.poll()) is None:
                continue
            run.ended = True
            run.tell(GO)
            code = exit_code(code)
            self._say_end(run, code)
            if code and run.needed and not self.code:
                self.code = code
                self._end_all()
        if self._signal is not None and not self.code and not self._going():
            self.code = 128 + self._signal
        waiting = [run for run in self._due if not run.ended]
        if waiting and not self.code:
            waiting[0].tell(GO)
        return bool(self.code) or self._signal is not None

    def _end_all(self) -> None:
        """In an orderly way: each writes a checkpoint, and its row."""
        for run in self._going():
            run.process.send_signal(signal.SIGTERM)

    def _got(self, number: int) -> None:
        if self._signal is None:
            text = f"\n{WORDS[number]}: {len(self._going())} runs finish their steps; a second signal stops at once\n"
            os.write(2, text.encode())  # the handler may stand inside a print
        self._signal = number
        for run in self._going():
            run.process.send_signal(number)

    def _say_end(self, run: Run, code: int) -> None:
        if self._silent:
            return
        if code:
            lines = run.log.read_text(errors="replace").splitlines()
            said = [f"seed {run.seed} | {printable(line)}" for line in lines if line.strip()]
            said = said[-SHOWN:] if code < 128 else said[-2:]  # of what was interrupted, the command that goes on
            print("\n".join([*said, f"=== seed {run.seed} ended with {code}"]), flush=True)
            return
        row = Ledger.beside(self.base).row_of(self.folder(run.seed)) or {}
        number = row.get("val_bpb")
        print(f"=== seed {run.seed}: val_bpb {number if number is None else f'{number:.6f}'},"
              f" {row.get('verdict', 'no row in the ledger')}", flush=True)  # fmt: skip


class passed_on:  # noqa: N801 -- a context, used as a function
    """Inside, SIGINT and SIGTERM go to `handle` and do nothing else, where they were not ignored."""

    def __init__(self, handle: Callable[[int], None]):
        self._handle, self._before = handle, {}

    def __enter__(self) -> None:
        for number in WORDS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, lambda number, _: self._handle(number))

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def exit_code(code: int) -> int:
    """Of a process, as a shell says it."""
    return code if code >= 0 else 128 - code


def at_once(config: TrainConfig) -> bool:
    """Whether the runs of an experiment may run at once. Where the tiles are to be measured anew, all runs of the group
    are to have those that the first finds."""
    return config.gpu == ANY and config.tune != "again"
