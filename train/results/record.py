"""What becomes of a run, from its first moment to its row in the ledger."""

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import torch

from prepare import InputError
from prepare.errors import one_line
from prepare.scoring import Evaluation
from prepare.words import printable

from ..budget import Budget
from ..clock import seconds_since_start
from ..config import MAX_SEEDS, TrainConfig, to_args
from ..leases import Turn
from ..recipes import DEVICE_DEFAULTS
from ..resilience.signals import UNREAD, Interrupted
from ..resilience.watchdog import HangError
from ..step import TrainingError
from .judge import NOT_NEEDED_NOTE, Judgement, described, judge, other_code
from .ledger import RUN, Ledger, name_of
from .metrics import Value, jsonable
from .provenance import changes, evaluating_code_sha256, machine, named_state, short_commit, source_state, versions
from .run_folder import default_run_dir
from .track.about import About, told_config, told_data

# What is no part of an experiment: how it is called, where it lies, on which GPU, which of its seeds it is.
NO_FLAGS = {
    "name": "run", "run_dir": None, "description": "", "group": None, "seed": 42, "repeat": 1, "confirm": False,
    "resume": None, "max_seeds": MAX_SEEDS, "track": None, "gpu": None,
}  # fmt: skip


class Record:
    """Collects what the ledger says of a run, and writes it once: at the end, however that comes."""

    def __init__(self, config: TrainConfig, ranks: int = 1):
        """`ranks`: on how many GPUs, or processes on a CPU, the run is trained."""
        self.config = config
        self.folder = Path(config.resume or config.run_dir or default_run_dir(config.name))
        self.began = False  # whether the run's folder is there
        self.written = False
        self.result: tuple[dict[str, Value], Evaluation] | None = None
        self.source = source_state()
        self.sources = [self.source]  # of every process that trained it, where one differs from the one before
        self.changes = changes()
        self.code_sha256 = evaluating_code_sha256()
        self.machine = machine("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu", ranks)
        self.ranks = [ranks]  # of every process that trained it, likewise
        self.model: dict = {}
        self.data: dict = {}
        self.tiles = "default"
        self.load: dict = {}
        self.init_from: dict[str, str] | None = None  # `run`, whose weights it begins with, and their `sha256`
        self.turn: Turn | None = None  # to be judged, where it is one of several runs at once
        self.needed = True
        self.flags = to_args(dataclasses.replace(config, **NO_FLAGS))
        self.seconds: dict[str, float] = {}

    def begin(self, config: TrainConfig, model: dict, data: dict, tiles: str) -> None:
        """The run's folder is there, and the configuration is resolved. `tiles`: their digest."""
        self.config, self.model, self.data, self.tiles, self.began = config, model, data, tiles, True

    def goes_on_from(self, values: dict) -> None:
        """From a checkpoint with these values."""
        # Checkpoints of before have but the name of the last. Their code was another: it wrote no `sources`.
        earlier = values.get("sources") or [named_state(values["environment"]["commit"])]
        self.sources = earlier if earlier[-1] == self.source else [*earlier, self.source]
        self.init_from = values.get("init_from")
        before = values.get("ranks", [1])
        self.ranks = before if before[-1] == self.ranks[-1] else [*before, *self.ranks]

    def beginning(self) -> dict[str, str]:
        """For the summary: whose weights it began with, where they were not random."""
        return {"init_from": f"{self.init_from['run']} ({self.init_from['sha256'][:8]})"} if self.init_from else {}

    def about(self, first_step: int) -> About:
        """What a tracker is told of the run, which has begun."""
        config, name = self.config, name_of(self.folder)
        more = {
            "model": self.model, "data": told_data(self.data), "tiles": self.tiles, "machine": self.machine["name"],
            "commit": short_commit(self.source) or "none", "init_from": self.init_from,
        }  # fmt: skip
        told = told_config(dataclasses.asdict(config), **more)
        return About(self.folder, name, config.group or name, config.description, told, first_step)

    def wait_for_turn(self, beat: Callable[[], None]) -> None:
        """Before `finish`. `beat` is called as long as it lasts."""
        if self.turn is not None:
            self.needed = self.turn.wait(beat)

    def doubts(self) -> list[str]:
        """Why its number is compared with no other, although it is one."""
        found = []
        if len(self.sources) > 1:
            names = [described(source | {"commit": short_commit(source) or "none"}) for source in self.sources]
            found.append(f"resumed with other code: {' > '.join(names)}")
        if len(self.ranks) > 1 and self.config.steps is None:
            numbers = " and then ".join(map(str, self.ranks))
            found.append(f"timed on {numbers} GPUs or processes, which is no single measurement")
        if self.seconds.get("stopped") and self.config.steps is None:
            found.append(f"stopped for {self.seconds['stopped']:.1f} s inside its budget")
        if not self.needed:
            found.append(NOT_NEEDED_NOTE)
        return found

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Counts the seconds of a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def trained(self, budget: Budget, ready: float) -> None:
        """`ready`: seconds from the process's start to the first step. What the untimed steps took beyond the usual
        pace is compiling and warming up too."""
        captured = self.seconds["compile"]
        usual = budget.timed_seconds / budget.timed_steps if budget.timed_steps else 0.0
        extra = max(budget.untimed_seconds - usual * (budget.step - budget.timed_steps), 0.0) if usual else 0.0
        self.seconds |= {
            "setup": ready - captured,
            "compile": captured + extra,
            "training": budget.timed_seconds,
            "untimed": budget.untimed_seconds,
            "overshoot": budget.overshoot,
            "stopped": budget.stopped_seconds,
        }

    def measured(self, summary: dict[str, Value], evaluation: Evaluation) -> None:
        """The run has its number: whatever comes after it, that one stands in its row."""
        self.result = summary, evaluation

    def finish(self, audit: list[str]) -> dict[str, str]:
        """Writes the row of a run that was measured. Returns what the summary has to say besides."""
        summary, evaluation = self.result
        comparable = {
            "evaluation": {**evaluation.fingerprint, "code_sha256": self.code_sha256},
            "budget": self.budget(),
            "machine": self.machine["name"],
            **({"init_from": self.init_from["sha256"]} if self.init_from else {}),
        }
        memory = summary["peak_vram_mb" if self.config.device == "cuda" else "peak_rss_mb"]
        bpb = evaluation.bpb if math.isfinite(evaluation.bpb) else None
        judgement = self._write(
            {
                "outcome": "finished" if bpb is not None else "failed",
                "error": "" if bpb is not None else f"val_bpb is {evaluation.bpb}",
                "val_bpb": bpb,
                "memory_gb": memory / 1024,
                "audit": "; ".join(audit) or "ok",
                "comparable": comparable,
                "summary": jsonable(summary),
            }
        )
        return {
            "audit": "; ".join(audit) or "ok",
            "status": judgement.status,
            "verdict": judgement.verdict + (f" ({judgement.note})" if judgement.note else ""),
        }

    def fail(self, error: BaseException) -> None:
        """Writes the row of a run that ended otherwise. Bad arguments, before there is a run, leave none."""
        if self.written or (isinstance(error, InputError | OSError) and not self.began):
            return
        if isinstance(error, BrokenPipeError):
            error = Interrupted(UNREAD)
        reason = " ".join(str(error).split())
        if not isinstance(error, InputError | TrainingError | Interrupted | HangError):
            reason = f"{type(error).__name__}: {reason}" if reason else type(error).__name__
        if self.result:
            self.finish([f"not done: {reason}"])
            return
        self._write(
            {
                "outcome": "failed" if isinstance(error, Exception) else "interrupted",
                "error": f"{reason}, after {self._steps()} steps" if self.began else f"{reason}, before the first step",
                "val_bpb": None,
                "memory_gb": None,
                "audit": None,
                "comparable": {},
                "summary": None,
            }
        )

    def _steps(self) -> int:
        try:
            return (self.folder / "metrics.jsonl").read_bytes().count(b"\n")
        except OSError:
            return 0

    def budget(self) -> str:
        """What is given for training: two runs with different budgets are not compared."""
        config = self.config
        if config.steps is not None:
            return f"{config.steps} steps"
        seconds = config.time_budget or DEVICE_DEFAULTS["cuda" if "gpu" in self.machine else "cpu"]["time_budget"]
        return f"{seconds:g} s after {config.untimed_steps} steps"

    def _write(self, facts: dict) -> Judgement:
        config = self.config
        total = facts["summary"]["total_seconds"] if facts["summary"] else seconds_since_start()
        entry = {
            "kind": RUN,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "run": name_of(self.folder),
            "group": config.group or name_of(self.folder),
            "description": config.description,
            "seed": config.seed,
            "budget": self.budget(),
            **facts,
            **self.source,
            "commit": ">".join(short_commit(source) or "none" for source in self.sources),
            "sources": self.sources,
            "ranks": self.ranks,
            "doubts": self.doubts(),
            "commit_sha": self.source["commit"],
            "config": dataclasses.asdict(config),
            "model": self.model,
            "machine": self.machine,
            "versions": versions(),
            "data": self.data,
            "tiles": self.tiles,
            "init_from": self.init_from,
            "load": self.load,
            "flags": self.flags,
            "seconds": {**self.seconds, "total": total},
        }
        ledger = Ledger.beside(self.folder)
        self.written = True
        try:
            with ledger.locked():
                earlier = ledger.runs(entry)
                entry["doubts"] += other_code(entry, earlier)
                judgement = judge(entry, earlier)
                entry |= dataclasses.asdict(judgement)
                ledger.append(entry)
        except OSError as error:  # a full disk, or a folder that cannot be written to: the run itself is whole
            reason = one_line(error, "make room there, or choose another --run-dir for the next run")
            print(f"note: no row in the ledger {printable(ledger.folder)}: {reason}", file=sys.stderr)
            judgement = Judgement("unknown", "unknown", "the ledger could not be written")
        return judgement
