"""Candidates compiled on all cores, into Triton's cache, where a launch on the GPU then finds them.

Nothing here touches a GPU: the processes run the ops on tensors without memory, for the compute capability they are
told.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path

import kernels
from prepare.limits import num_cores

from ..config import ROOT, TrainConfig
from ..precompile import compiling_only, end_with
from .targets import Target, call_of, launches_of, targets
from .trials import NO_TIME, Trial, Tuned, one_line
from .usage import usage

STUCK = 120.0  # seconds without a result: the compiler hangs
SAY_EVERY = 10.0  # seconds
LIMIT = 1e9  # seconds, where none is given


def compile_one(target: Target, call, tile: dict, arch: int) -> dict:
    """Registers, spills and shared memory of a candidate on `arch`, the most of all variants; or {"fault": why it is no
    use}. Spills are no fault: a few bytes outside the loops cost nothing, and time tells."""
    try:
        with compiling_only(arch) as launches:
            launches_of(target, call, tile)
        names = {kernel.__name__ for kernel in target.choice.kernels}
        used = [usage(kernel, n) for kernel, n in launches.items() if kernel.metadata.name in names]
    except Exception as error:  # of any kind: the compiler's own assertions too
        return {"fault": f"does not compile: {one_line(error)}"}
    if not used:
        return {}  # a vendor's product, or no kernel's affair
    found = {key: max(getattr(u, key) for u in used) for key in ("registers", "stack", "shared")}
    found["ctas_per_sm"] = min(u.ctas_per_sm(arch) for u in used)
    faults = [fault for u in used for fault in u.misfits(arch)]
    return {**found, **({"fault": faults[0]} if faults else {})}


def compile_share(path: str) -> None:
    """In a process of its own, told by a file: appends a line of JSON to another for each job, [number of a target,
    tile]."""
    end_with(0)
    given = json.loads(Path(path).read_text(encoding="utf-8"))
    config, arch = TrainConfig(**given["config"]), given["arch"]
    with compiling_only(arch):
        found = targets(config, config.model_config(given["vocab_size"]), given["fused_norms"])
    kernels.set_ops("triton")
    calls = {}
    for number, tile in given["jobs"]:
        if number not in calls:
            with compiling_only(arch):
                calls[number] = call_of(found[number].op, "meta")
        line = compile_one(found[number], calls[number], tile, arch)
        with Path(given["results"]).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def compile_all(
    tuned: list[Tuned], numbers: list[int], config: TrainConfig, vocab_size: int, fused_norms: bool | None, arch: int,
    seconds: float = LIMIT, say: Callable[[str], None] = lambda line: None,
) -> None:  # fmt: skip
    """Fills in what the compiler makes of every trial, on all cores. What crashes it, or hangs it, is one trial's fault
    alone; for what is not compiled after so many seconds no time was left.

    Args:
        numbers: of the targets among those of `targets(config, ..., fused_norms)`.

    Raises RuntimeError where compiling fails for a reason of its own.
    """
    jobs = [(number, trial) for number, one in zip(numbers, tuned, strict=True) for trial in one.trials]
    given = {"config": asdict(config), "vocab_size": vocab_size, "fused_norms": fused_norms, "arch": arch}
    until = time.monotonic() + seconds
    cores = max(1, min(num_cores(), len(jobs)))
    stop = threading.Event()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(cores) as pool:
        files = [Path(folder) / str(i) for i in range(cores)]
        shares = [pool.submit(_compile, jobs[i::cores], files[i], given, until, stop) for i in range(cores)]
        try:
            while wait(shares, timeout=SAY_EVERY).not_done:
                done = sum(file.read_bytes().count(b"\n") for file in files if file.exists())
                say(f"tuning: {done} of {len(jobs)} compiled")
            for share in shares:
                share.result()
        finally:
            stop.set()  # interrupted, nobody waits for what has no use any more


def _compile(jobs: list[tuple[int, Trial]], results: Path, given: dict, until: float, stop: threading.Event) -> None:
    """One share: a process, and after a crash another for what is left."""
    program = "import sys; from train.tune.compiling import compile_share; compile_share(sys.argv[1])"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    left, log, told = list(jobs), results.with_suffix(".log"), results.with_suffix(".json")
    while left and time.monotonic() < until and not stop.is_set():
        results.write_text("")
        wanted = {**given, "jobs": [(number, trial.tile) for number, trial in left], "results": str(results)}
        told.write_text(json.dumps(wanted))
        with log.open("w") as file, subprocess.Popen(
            [sys.executable, "-c", program, str(told)], env=environment, cwd=ROOT, stdin=subprocess.PIPE,
            stdout=file, stderr=file, start_new_session=True,
        ) as process:  # fmt: skip
            fate = _wait(process, results, until, stop)
        done = [json.loads(line) for line in results.read_text().split("\n")[:-1]]  # the last may be torn
        for (_, trial), line in zip(left, done, strict=False):
            trial.fault, trial.compiled = line.pop("fault", None), line
        left = left[len(done) :]
        if process.returncode > 0:
            raise RuntimeError(f"compiling failed: {log.read_text()[-2000:]}")
        if left and fate != NO_TIME:
            left.pop(0)[1].fault = fate or f"the compiler crashes ({process.returncode})"
    for _, trial in left:
        trial.fault = NO_TIME


def _wait(process: subprocess.Popen, results: Path, until: float, stop: threading.Event) -> str:
    """Until the process has ended; or it is killed, since no result came for `STUCK` seconds, or no time is left: then
    that is returned."""
    size, since = 0, time.monotonic()
    while process.poll() is None:
        time.sleep(0.1)
        now = time.monotonic()
        if results.stat().st_size != size:
            size, since = results.stat().st_size, now
        if now - since > STUCK or now > until or stop.is_set():
            process.kill()
            process.wait()
            return "the compiler hangs" if now - since > STUCK else NO_TIME
    return ""
