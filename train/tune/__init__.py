"""The tiles that a run computes with: those of the GPU it meets, measured once and kept (`python -m train.tune`).

Tiles change the order of sums, and so roundings: a run keeps its own, and says by a short hash which they are.
"""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, replace

import torch

from kernels import Choice, Table, asked
from model import GPTConfig
from prepare.words import command_line, printable

from ..config import ROOT, TrainConfig, to_args
from ..memory import count
from ..precompile import step_digest
from .table import Kept, Machine, digest, in_force, path_of

__all__ = ["Tiles", "saved_tiles", "tiles_for"]

SECONDS = 90.0  # that the first run on a GPU waits at most, its compiling included
GRACE = 30.0  # more, in which a tuner that has not ended is given up


@dataclass(frozen=True)
class Tiles:
    """What a run takes in place of the defaults in the source.

    Args:
        gpu: whose they are; None where the defaults are in force.
        fused_norms, graphs: what whole steps decided; None where nothing did.
    """

    table: Table
    gpu: str | None = None
    fused_norms: bool | None = None
    graphs: bool | None = None

    @property
    def digest(self) -> str:
        return digest(self.table)

    def as_json(self) -> dict:
        return {"digest": self.digest, "gpu": self.gpu, "table": self.table}


DEFAULTS = Tiles({})


def choices_of(config: TrainConfig, shape: GPTConfig) -> list[tuple[Choice, tuple]]:
    """What a step looks up, and with which shape."""
    with asked() as calls:
        count(config, shape, rows=1)
    return list(calls.values())


def saved_tiles(saved: dict) -> Tiles:
    """Those of a run's config.json, for the commands that compute its model again, and for a run that goes on. On
    another GPU, whose memory they may not fit, the defaults; so too of a run that is older than they are."""
    tiles = saved.get("tiles")
    if not torch.cuda.is_available() or not isinstance(tiles, dict) or tiles.get("gpu") is None:
        return DEFAULTS
    if tiles["gpu"] != torch.cuda.get_device_name():
        return DEFAULTS
    return Tiles(tiles["table"], tiles["gpu"])


def tiles_for(config: TrainConfig, shape: GPTConfig) -> Tiles:
    """Those of this GPU for a new run of `config`; a GPU that has none yet is tuned first. Whatever goes wrong is said
    in a line, and the defaults are as good as they were."""
    if config.device != "cuda" or config.ops != "triton" or config.tune == "off":
        return DEFAULTS
    try:
        machine = Machine.here()
        path, wanted = path_of(machine.gpu), choices_of(config, shape)
        kept = Kept.read(path, machine)
        if kept.note:
            note(kept.note)
        missing = [choice for choice, of in wanted if len(choice.candidates(*of)) > 1 and not kept.find(choice, of)]
        if missing or config.tune == "again":
            if why := _tune_apart(config, shape):
                note(f"the kernels were not all tuned: {why}; what has no better tile keeps that of the source")
            kept = Kept.read(path, machine)
    except Exception as error:  # of any kind: a run does without
        note(f"the kernels were not tuned ({type(error).__name__}: {' '.join(str(error).split())[:200]}): the tiles of"
             " the source are used")  # fmt: skip
        return DEFAULTS
    options = kept.options.get(step_digest(config, shape.vocab_size), {})
    tiles = Tiles(in_force(kept, wanted), machine.gpu, options.get("fused_norms"), options.get("graphs"))
    print(f"tiles:  {said(tiles, kept, wanted)}", flush=True)
    return tiles


def said(tiles: Tiles, kept: Kept, wanted: list[tuple[Choice, tuple]]) -> str:
    """In a line, what they gain."""
    entries = [entry for choice, of in wanted if (entry := kept.find(choice, of))]
    better = [e for e in entries if e.best != e.default]
    gain = sum((e.default_us or 0) - (e.best_us or 0) for e in better if e.default_us and e.best_us)
    line = f"{tiles.digest}, {len(better)} of {len(wanted)} are not the source's"
    return f"{line}, which gains {gain / 1e3:.2f} ms a micro-step as measured one by one" if better else line


def note(text: str) -> None:
    print(printable(f"note: {text}"), file=sys.stderr, flush=True)


def _tune_apart(config: TrainConfig, shape: GPTConfig) -> str:
    """Tunes in a process of its own, whose progress is shown. Why that did not end well; nothing where it did."""
    free = {"resume": None, "repeat": 1, "confirm": False, "run_dir": None, "data": None, "track": None, "gpu": None}
    asked_for = replace(config, **free, init_from=None, name="run", description="", group=None, tune="auto")
    arguments = [*to_args(asked_for), f"--vocab-size={shape.vocab_size}", f"--seconds={SECONDS:g}", "--lifeline"]
    if config.tune == "again":
        arguments.append("--again")
    process = subprocess.Popen(
        [sys.executable, "-m", "train.tune", *arguments], cwd=ROOT, stdin=subprocess.PIPE, start_new_session=True,
        env=dict(os.environ),
    )  # fmt: skip
    try:
        code = process.wait(SECONDS + GRACE)
    except subprocess.TimeoutExpired:
        return f"it took longer than {SECONDS + GRACE:.0f} s"
    finally:
        with suppress(ProcessLookupError):  # with all that it has started
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdin.close()
    return "" if code == 0 else f"{command_line('train.tune')} ended with {code}"
