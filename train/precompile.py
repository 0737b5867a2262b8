"""Every kernel of a step compiled at once, on all cores, before the first step asks for them one after another.

Triton compiles a kernel when it is first launched and keeps it on disk. The first run of a configuration therefore
waits for some fifty kernels, half a second each; any later run finds them. Here each of a few processes walks through
a step on tensors of device "meta", where nothing is allocated or computed, and compiles its share of the kernels that
it meets into the same cache. It is a head start and no more: what it misses is compiled at launch.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from kernels import set_ops
from model import GPT
from prepare import Batch
from prepare.limits import num_cores

from .config import TrainConfig
from .optimizer import Optimizer
from .provenance import ROOT
from .schedule import step_values
from .step import TrainStep

SOURCES = ("kernels", "model", "train")  # decide which kernels a step launches, and what is in them
MAX_PROCESSES = 16  # three kernels each: more would spend their time importing


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
def only_a_share(share: int, of: int) -> Iterator[dict]:
    """Inside, of the kernels that are to be compiled just every `of`-th is. Yields those, by name."""
    from triton.runtime.jit import JITFunction

    compile_one = JITFunction._do_compile
    met, compiled = {}, {}

    def do_compile(self, key, *args):
        if met.setdefault((self, key), len(met)) % of != share:
            return None
        compiled[self, key] = self.__name__
        return compile_one(self, key, *args)

    JITFunction._do_compile = do_compile
    try:
        yield compiled
    finally:
        JITFunction._do_compile = compile_one


class Precompiler:
    """Starts the processes; `wait` for them before the first launch."""

    def __init__(self, config: TrainConfig, vocab_size: int, arch: int):
        import triton

        arguments = json.dumps({"config": asdict(config), "vocab_size": vocab_size, "arch": arch})
        # Not what differs between the runs of one experiment: no kernel depends on it.
        shapes = {key: value for key, value in config.fixed().items() if key not in ("name", "run_dir", "seed")}
        digest = hashlib.sha256(json.dumps([shapes, vocab_size, arch, triton.__version__, torch.__version__]).encode())
        for path in sorted(path for folder in SOURCES for path in ROOT.glob(f"{folder}/**/*.py")):
            digest.update(path.read_bytes())
        key = digest.hexdigest()
        # Says that all of it lies in Triton's cache, and is gone when that is.
        self._stamp = Path(triton.knobs.cache.dir) / f"timebox-{key[:16]}"
        of = 0 if self._stamp.exists() else min(MAX_PROCESSES, num_cores())
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "train.precompile", arguments]
        self._processes = [
            subprocess.Popen(
                [*command, str(share), str(of)], env=environment, cwd=ROOT,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )
            for share in range(of)
        ]  # fmt: skip

    def wait(self) -> bool:
        """Whether every process did its share (or an earlier run had done it)."""
        codes = [process.wait() for process in self._processes]
        done = not any(codes)
        if done and codes:
            self._stamp.parent.mkdir(parents=True, exist_ok=True)
            self._stamp.touch()
        return done


def main(arguments: str, share: str, of: str) -> None:
    given = json.loads(arguments)
    with compiling_only(given["arch"]), only_a_share(int(share), int(of)):
        walk_step(TrainConfig(**given["config"]), given["vocab_size"])


if __name__ == "__main__":
    main(*sys.argv[1:])
