"""A tile in place of a kernel's own: put there, launched, and compiled for a GPU that is not there.

Compiling takes a process for each core. They fill Triton's cache, where a launch on the GPU then finds its kernel.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import kernels
from bench.offline import usage
from bench.targets import Call, Random, Target, Tile, targets
from prepare.limits import num_cores
from train.config import TrainConfig, resolve
from train.precompile import compiling_only

STUCK = 120  # seconds without a result: the compiler hangs


@contextmanager
def tiled(target: Target, tile: Tile | None) -> Iterator[dict]:
    """Inside, the kernel has `tile`, or its own for None. Yields {what was asked for: the tile that stands there},
    filled in as kernels are launched."""
    tile = tile or {}
    own = {k: v for k, v in tile.items() if k not in target.constants}
    asked: dict[str, Tile] = {}
    with ExitStack() as stack:

        def put(name: str, value: object) -> None:
            stack.callback(setattr, target.module, name, getattr(target.module, name))
            setattr(target.module, name, value)

        constants = {name: getattr(target.module, name) for name in target.constants}
        for name in target.constants:
            put(name, tile.get(name, constants[name]))
        if target.config is None:
            asked[", ".join(target.constants)] = constants
        else:
            config = getattr(target.module, target.config)

            def replacement(*args):
                given = config(*args)
                part, with_tile = _with_part(given, target.part, own)
                shown = ", ".join(str(arg) for arg in args if not isinstance(arg, torch.dtype))
                which = "" if target.part is None else f".{target.part}"
                module = config.__module__.removeprefix("kernels.")
                asked[f"{module}.{config.__name__}({shown}){which}"] = {**part, **constants}
                return with_tile

            put(target.config, replacement)
        yield asked


def _with_part(given, part: int | str | None, tile: Tile) -> tuple[Tile, object]:
    """What a config function gave: the part of it that is the tile, and all of it with `tile` there."""
    if part is None:
        return given, {**given, **tile}
    if isinstance(part, int):
        return given[part], (*given[:part], {**given[part], **tile}, *given[part + 1 :])
    field = getattr(given, part)
    return field._asdict(), given._replace(**{part: field._replace(**tile)})


class Launch(NamedTuple):
    kernel: object  # as Triton made it
    grid: tuple[int, ...]
    args: tuple
    kwargs: dict

    def __call__(self) -> None:
        self.kernel[self.grid](*self.args, **self.kwargs)


@dataclass
class Launches:
    """What a call launched of a target's kernels, to be repeated; `outputs` keeps its memory alive. Repeated, a kernel
    that works in place finds its own results: that changes the numbers, and not what it does with them."""

    outputs: list[Tensor]
    again: list[Launch]

    def __call__(self) -> None:
        for launch in self.again:
            launch()


def launches_of(target: Target, call: Call, tile: Tile | None) -> tuple[Launches, dict[str, Tile]]:
    """Runs `call` with `tile`, and says what `tiled` yields."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    launches = Launches([], [])

    def recorded(run):
        def wrapper(self, *args, grid, warmup, **kwargs):
            if self.__name__ in target.kernels:
                launches.again.append(Launch(self, grid, args, kwargs))
            return run(self, *args, grid=grid, warmup=warmup, **kwargs)

        return wrapper

    with tiled(target, tile) as asked, ExitStack() as stack:
        for kind in (JITFunction, InterpretedFunction):
            stack.callback(setattr, kind, "run", kind.run)
            kind.run = recorded(kind.run)
        launches.outputs += call()
    return launches, asked


def step_targets(vocab_size: int) -> list[Target]:
    """Those of the default step on a GPU."""
    config = resolve(TrainConfig(), "cuda")
    return targets(config, config.model_config(vocab_size))


def prepared(target: Target, device: str, dtype: torch.dtype) -> Call:
    torch.manual_seed(0)
    return target.prepare(Random(device, dtype))


def compile_one(target: Target, call: Call, tile: Tile | None, arch: int) -> dict:
    """Registers, spills and shared memory of a tile on `arch`, the most of all variants; `fault` where it is no use.
    `asked` as `tiled` yields it."""
    try:
        with compiling_only(arch) as launches:
            _, asked = launches_of(target, call, tile)
        used = [usage(kernel, n) for kernel, n in launches.items() if kernel.metadata.name in target.kernels]
    except Exception as error:  # of any kind: the compiler's own assertions too
        return {"fault": f"does not compile: {type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    faults = [fault for u in used for fault in u.faults(arch)]
    found = {key: max(getattr(u, key) for u in used) for key in ("registers", "stack", "shared")}
    found["ctas_per_sm"] = min(u.ctas_per_sm(arch) for u in used)
    return {**found, "asked": asked, "fault": faults[0] if faults else None}


def compile_share(arguments: str) -> None:
    """In a process of its own: appends a line of JSON to a file for each job, [name of target, tile or None]."""
    given = json.loads(arguments)
    found = {t.name: t for t in step_targets(given["vocab_size"])}
    kernels.set_ops("triton")
    calls = {}
    for name, tile in given["jobs"]:
        if name not in calls:
            with compiling_only(given["arch"]):
                calls[name] = prepared(found[name], "meta", torch.bfloat16)
        line = compile_one(found[name], calls[name], tile, given["arch"])
        with Path(given["results"]).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def compile_all(jobs: list[tuple[str, Tile | None]], arch: int, vocab_size: int, folder: Path) -> list[dict]:
    """`compile_one` of every job, on all cores. What crashes the compiler, or hangs it, is one job's fault alone."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    program = "import sys; from bench.tiles import compile_share; compile_share(sys.argv[1])"

    def share(jobs: list, results: Path) -> list[dict]:
        done: list[dict] = []
        while len(done) < len(jobs):
            given = {"jobs": jobs[len(done) :], "arch": arch, "vocab_size": vocab_size, "results": str(results)}
            results.write_text("")
            log = results.with_suffix(".log")
            with log.open("w") as file:
                process = subprocess.Popen([sys.executable, "-c", program, json.dumps(given)], env=environment,
                                           cwd=Path(__file__).parents[1], stdout=file, stderr=file)  # fmt: skip
            hangs = _wait(process, results)
            done += [json.loads(line) for line in results.read_text().splitlines()]
            if process.returncode > 0:
                raise RuntimeError(f"compiling failed: {log.read_text()[-2000:]}")
            if len(done) < len(jobs):
                fate = "hangs" if hangs else f"crashes ({process.returncode})"
                done.append({"fault": f"the compiler {fate}"})
        return done

    cores = min(num_cores(), len(jobs))
    with ThreadPoolExecutor(cores) as pool:
        shares = list(pool.map(share, (jobs[i::cores] for i in range(cores)), (folder / str(i) for i in range(cores))))
    return [shares[i % cores][i // cores] for i in range(len(jobs))]


def _wait(process: subprocess.Popen, results: Path) -> bool:
    """Until the process has ended, or no result came for `STUCK` seconds: then it is killed. Returns whether it was."""
    size, since = 0, time.monotonic()
    while process.poll() is None:
        time.sleep(0.1)
        if results.stat().st_size != size:
            size, since = results.stat().st_size, time.monotonic()
        elif time.monotonic() - since > STUCK:
            process.kill()
            process.wait()
            return True
    return False
