"""Every kernel of a step compiled at once, on all cores, before the first step asks for them one after another.

Triton compiles a kernel when it is first launched and keeps it on disk. The first run of a configuration would wait for
some fifty kernels, half a second each. Here a process beside the set-up walks through a step on tensors of device
"meta", where nothing is allocated or computed, notes which kernels it would launch, and divides itself into a few that
compile their shares of them into the same cache. What is there already takes no time, and Triton's own keys say what
is: a change that no kernel depends on compiles nothing. Where nothing has changed that they might depend on, there is
no process either. It is a head start and no more: what it misses is compiled at launch.
"""

import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from kernels import Table, chosen, set_ops
from model import GPT
from prepare import Batch
from prepare.limits import num_cores

from .config import ROOT, TrainConfig
from .optimizer import Optimizer
from .schedule import step_values
from .step import TrainStep

SOURCES = ("kernels", "model", "train")  # decide which kernels a step launches, and what is in them
# Options that no kernel of a step depends on. Any other may.
NO_KERNELS = (
    "name", "run_dir", "seed", "time_budget", "steps", "untimed_steps", "total_batch_size", "packing", "eval_tokens",
    "lm_head_lr", "embedding_lr", "scalar_lr", "matrix_lr", "weight_decay", "warmup_ratio", "warmdown_ratio",
    "final_lr_frac", "graphs", "recipe", "lm_head_decay", "wte_decay", "value_embedding_decay", "bigram_decay",
    "momentum_ramp", "rope_base", "init_scale", "lambda_r_init", "lambda_0_init", "sums", "init_from",
)  # fmt: skip
MAX_PROCESSES = 16  # three kernels each, and the slowest takes as long as three
LIMIT = 300.0  # seconds that a run waits for its kernels: two slow cores need one of these five minutes


class AbsentGpu:
    """What Triton's compiler asks of a driver, answered for a GPU of compute capability `arch` / 10."""

    def __init__(self, arch: int):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("meta")

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty


def walk_step(config: TrainConfig, vocab_size: int) -> None:
    """One step of the real trainer on meta tensors, with every kernel there is."""
    model = GPT(config.model_config(vocab_size), device="meta", **config.model_options)
    optimizer = Optimizer(model, config, torch.bfloat16)
    tokens = torch.empty(config.device_batch_size, config.seq_len + 1, dtype=torch.int32, device="meta")
    batch = Batch(tokens=tokens, epoch=0, state={}, index=0)
    set_ops("triton")
    try:
        TrainStep(model, optimizer)([batch] * config.grad_accum_steps, step_values(config, 0, 0.0))
    finally:
        set_ops(None)


@contextmanager
def compiling_only(arch: int) -> Iterator[Counter]:
    """Inside, a launch compiles for `arch` and does nothing else. Yields the launches of each compiled kernel."""
    import triton
    from triton.runtime.jit import JITFunction

    launches: Counter = Counter()
    launch = JITFunction.run

    def run(self, *args, grid, warmup, **kwargs):
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        launches[kernel] += 1
        return kernel

    triton.runtime.driver.set_active(AbsentGpu(arch))
    JITFunction.run = run
    try:
        yield launches
    finally:
        JITFunction.run = launch


@contextmanager
def noting_kernels() -> Iterator[list[Callable[[], object]]]:
    """Inside, a kernel that is to be compiled is noted instead. Yields what compiles each, in the order they came."""
    from triton.runtime.jit import JITFunction

    compile_one = JITFunction._do_compile
    met, noted = set(), []

    def note(self, key, *args):
        if (self, key) not in met:
            met.add((self, key))
            noted.append(partial(compile_one, self, key, *args))

    JITFunction._do_compile = note
    try:
        yield noted
    finally:
        JITFunction._do_compile = compile_one


def step_digest(config: TrainConfig, vocab_size: int) -> str:
    """Changes with the options that a step's kernels depend on, those that a tuner decides left out."""
    shapes = {key: value for key, value in config.fixed().items() if key not in (*NO_KERNELS, "fused_norms")}
    return hashlib.sha256(json.dumps([shapes, vocab_size]).encode()).hexdigest()[:16]


def stamp(config: TrainConfig, vocab_size: int, arch: int, table: Table) -> Path:
    """A file that says that all of it lies in Triton's cache, and is gone when that is."""
    import triton

    shapes = {key: value for key, value in config.fixed().items() if key not in NO_KERNELS}
    versions = triton.__version__, torch.__version__
    digest = hashlib.sha256(json.dumps([shapes, vocab_size, arch, table, *versions], sort_keys=True).encode())
    for path in sorted(path for folder in SOURCES for path in ROOT.glob(f"{folder}/**/*.py")):
        digest.update(path.read_bytes())
    return Path(triton.knobs.cache.dir) / f"timebox-{digest.hexdigest()[:16]}"


class Precompiler:
    """Starts the process; `wait` for it before the first launch, and `close` it whatever happens."""

    command = (sys.executable, "-m", "train.precompile")

    def __init__(self, config: TrainConfig, vocab_size: int, arch: int, table: Table):
        arguments = json.dumps({"config": asdict(config), "vocab_size": vocab_size, "arch": arch, "table": table})
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        self._stamp = stamp(config, vocab_size, arch, table)
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 -- open until `close`
        # In a session of its own it is one group with all that it starts, to be ended as a whole; and the terminal's
        # signals are this process's to handle.
        self._process = subprocess.Popen(
            [*self.command, arguments], env=environment, cwd=ROOT,
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=self._errors, start_new_session=True,
        )  # fmt: skip

    def wait(self, seconds: float = LIMIT) -> str:
        """Why not every kernel is compiled, in a line; nothing where they are. Takes no longer than `seconds`."""
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.close()
            return f"not done in {seconds:.0f} s"
        if code == 0:
            with suppress(OSError):  # without, the next run looks again
                self._stamp.parent.mkdir(parents=True, exist_ok=True)
                self._stamp.touch()
            return ""
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(said) if line.strip()), f"exit code {code}")

    def close(self) -> None:
        """Ends what still runs."""
        if self._process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._process.stdin.close()
        self._errors.close()


def end_with(lifeline: int) -> None:
    """Has this process, and all of its group, end when the pipe `lifeline` is closed at its other end: so it is when
    the process that holds that ends, however it does."""

    def watch():
        while os.read(lifeline, 1):
            pass
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def compile_share(compilers: list[Callable[[], object]], lifeline: int) -> None:
    """One that fails costs the others nothing, and is said."""
    end_with(lifeline)
    failed = False
    for compile_one in compilers:
        try:
            compile_one()
        except Exception as error:  # of any kind: the compiler's own assertions too
            failed = True
            print(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", file=sys.stderr, flush=True)
    if failed:
        sys.exit(1)


def main(arguments: str) -> int:
    """The process: 0 where every kernel is in the cache. Its standard input is its `lifeline`."""
    lifeline = os.dup(0)  # multiprocessing gives its processes another standard input
    end_with(lifeline)
    given = json.loads(arguments)
    with compiling_only(given["arch"]):
        with noting_kernels() as compilers, chosen(given["table"]):
            walk_step(TrainConfig(**given["config"]), given["vocab_size"])
        # Forked, they have what was imported and noted. No GPU is open here, and the one other thread does but read.
        fork = multiprocessing.get_context("fork")
        of = min(MAX_PROCESSES, num_cores(), len(compilers))
        shares = [fork.Process(target=compile_share, args=(compilers[i::of], lifeline)) for i in range(of)]
        for share in shares:
            share.start()
        for share in shares:
            share.join()
    return int(any(share.exitcode for share in shares))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
