"""The process that holds the GPU while candidates are tried: one that breaks it, or never ends, takes this along and
nothing else.

It is told in a file what to do, and writes a line of JSON to another as it goes: before each trial which it is, after
each target all of it. What it was at when it died is then known to the process that started it.
"""

import dataclasses
import json
import time
from functools import partial
from pathlib import Path

import torch

import kernels
from kernels import Table
from prepare import InputError

from ..config import TrainConfig
from ..precompile import end_with
from .measuring import Step, compare_steps, tune
from .targets import DTYPE, targets
from .trials import Trial, Tuned, one_line

SAME_LOSS = 0.01  # nats between the same step by two tables: at random weights both are near ln V
OTHERS = 0.05  # of the GPU's memory that others may hold: a desktop's windows


class Writer:
    def __init__(self, path: str):
        self.path = Path(path)

    def __call__(self, **line) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def busy() -> str:
    """What another process holds of the GPU; nothing where it holds next to none."""
    free, total = torch.cuda.mem_get_info()
    others = total - free - torch.cuda.memory_reserved() - 2**30  # a GiB is this process's own context, or less
    return f"other processes hold {others / 2**30:.1f} GiB of it" if others > OTHERS * total else ""


def measure(given: dict, write: Writer, device: str = "cuda", dtype: torch.dtype = DTYPE) -> None:
    """The targets of `given["numbers"]`, in that order."""
    config = TrainConfig(**given["config"])
    shape = config.model_config(given["vocab_size"])
    found = targets(config, shape, given["fused_norms"])
    until = time.monotonic() + given["seconds"]
    with kernels.ops_in_force("triton"):
        for i, number in enumerate(given["numbers"]):
            trials = [Trial(**trial) for trial in given["trials"][str(number)]]
            tuned = Tuned(found[number], trials)
            share = (until - time.monotonic()) / (len(given["numbers"]) - i)
            error = None
            try:
                tune(tuned, device, dtype, share, lambda at, number=number: write(number=number, at=at))
            except Exception as raised:  # of any kind: the other kernels are still worth their time
                error = one_line(raised)
            write(
                number=number, trials=[dataclasses.asdict(trial) for trial in trials], whole=tuned.whole,
                launches=tuned.launches, error=error,
            )  # fmt: skip
            if device == "cuda":
                torch.cuda.synchronize()  # a broken GPU ends this process here, and the next target gets another
                torch.cuda.empty_cache()


def decide(given: dict, write: Writer, device: str = "cuda", dtype: torch.dtype = DTYPE) -> None:
    """What a whole step decides: each way that is no tile, in turn, on top of those that won; the norms; graphs; and
    whether all of it is faster than the defaults at all."""
    config = TrainConfig(**given["config"])
    shape = config.model_config(given["vocab_size"])
    table: Table = given["table"]
    with kernels.ops_in_force("triton"):
        step = Step(config, shape, device, dtype)
        for number, (name, key, tile) in enumerate(given["ways"]):
            write(way=number)
            other = {**table, name: {**table.get(name, {}), key: tile}}
            times = compare_steps(partial(step.seconds, table), partial(step.seconds, other))
            if times.better:
                table = other
            write(way=number, better=times.better, **dataclasses.asdict(times))
        write(what="tuned")
        times = compare_steps(lambda: step.seconds({}), lambda: step.seconds(table))
        apart = abs(step.loss(table) - step.loss({}))
        wrong = not apart < SAME_LOSS  # NaN is wrong
        write(what="tuned", better=not (times.worse or wrong), apart=apart, **dataclasses.asdict(times))
        if times.worse or wrong:
            table = {}
        if given["fused_norms"] is None:
            write(what="fused_norms")
            fused = Step(dataclasses.replace(config, fused_norms=True), shape, device, dtype)
            times = compare_steps(lambda: step.seconds(table), lambda: fused.seconds(table))
            write(what="fused_norms", better=times.better, **dataclasses.asdict(times))
            del fused
        if device == "cuda":
            write(what="graphs")
            graphs = step.captured(table)
            times = compare_steps(lambda: step.seconds(table), lambda: step.seconds(table, graphs))
            write(what="graphs", better=not times.worse, **dataclasses.asdict(times))


def main(path: str) -> int:
    end_with(0)
    given = json.loads(Path(path).read_text(encoding="utf-8"))
    write = Writer(given["results"])
    if reason := busy():
        write(busy=reason)
        return 0
    try:
        (decide if given["decide"] else measure)(given, write)
    except InputError as error:
        write(error=str(error))
    return 0
