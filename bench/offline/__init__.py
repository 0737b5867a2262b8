"""Every kernel of a training step, compiled for a GPU that is not there.

`python -m bench.offline --arch 80 86 89 90 100 120` runs one whole step (forward, backward, update) of the default GPU
configuration on tensors of device "meta": nothing is allocated and nothing runs, but each kernel is compiled exactly as
the step would launch it. Options of `train`, such as --depth 20 or --fused-norms, make it another step. It prints what
each kernel costs on that architecture, and exits with 1 on a spill that `ALLOWED_SPILLS` does not name, on more shared
memory than there is, and on sm_90 on a matrix product without wgmma, or whose wgmma wait for each other.
Architectures are compiled side by side, a process each, and reported in the order in which they were named. `--loops`
adds a row for every loop around products on sm_90: its instructions by class, and what bounds it (sass.py).
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from bench.offline import sass
from prepare import InputError
from prepare.arguments import Parser
from prepare.limits import num_cores
from train.config import TrainConfig, parse_given, resolve
from train.device import why_not_kernels
from train.live_bytes import LiveBytes
from train.precompile import compiling_only, walk_step
from train.tune.usage import ARCHS, Usage, cuobjdump, usage


def report(usages: list[Usage], arch: int) -> list[str]:
    """Prints the table and returns the faults."""
    width = max(len(u.name) for u in usages)
    print(f"{'kernel':<{width}}  launches  warps  registers  spills  shared  CTAs/SM  wgmma")
    for u in usages:
        print(
            f"{u.name:<{width}}  {u.launches:>8}  {u.warps:>5}  {u.registers:>9}  {u.stack:>6}  {u.shared:>6}"
            f"  {u.ctas_per_sm(arch):>7}  {u.wgmma if u.is_matrix else '-':>5}"
        )
    faults = [fault for u in usages for fault in u.faults(arch)]
    for fault in faults:
        print(f"FAULT {fault}")
    return faults


def report_loops(usages: list[tuple[Usage, object]], arch: int) -> None:
    """The loops of the matrix kernels among these, each with what was compiled."""
    kernels = []
    for u, kernel in usages:
        if u.is_matrix:
            code = sass.instructions(cuobjdump(kernel.asm["cubin"], "-sass"))
            kernels.append((u.name, u.ctas_per_sm(arch) * u.warps / 4, sass.loops(code)))
    sass.print_loops(kernels)


def compile_step(config: TrainConfig, arch: int, vocab_size: int, loops: bool = False) -> int:
    """Compiles, reports, and returns the exit code."""
    with compiling_only(arch) as launches, LiveBytes() as memory:
        walk_step(config, vocab_size)
    found = [(usage(kernel, count, warnings=True), kernel) for kernel, count in launches.items()]
    found.sort(key=lambda pair: pair[0].name)
    usages = [u for u, _ in found]
    print(f"sm_{arch}, V = {vocab_size}: {sum(launches.values())} launches of {len(usages)} compiled kernels in a step")
    print(f"memory at the peak: {memory.peak / 2**20:,.0f} MiB, counted, not measured")
    faults = report(usages, arch)
    if loops:
        report_loops(found, arch)
    return 1 if faults else 0


def compile_apart(arch: int, vocab_sizes: list[int], given: list[str]) -> list[subprocess.CompletedProcess]:
    """One process after the other for each vocabulary: the second finds most kernels in Triton's cache."""
    # Triton keeps the target it has once compiled for, and whether it interprets: a process for each.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.offline", *given, "--arch", str(arch), "--vocab-size"]
    return [
        subprocess.run(
            [*command, str(vocab_size)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            check=False,
        )
        for vocab_size in vocab_sizes
    ]  # fmt: skip


def main(args: list[str] | None = None) -> int:
    parser = Parser("bench.offline", __doc__)
    parser.add_argument("--arch", type=int, nargs="+", default=[90], choices=ARCHS, help="compute capability x 10")
    parser.add_argument("--vocab-size", type=int, nargs="+", default=[8192])
    parser.add_argument("--loops", action="store_true", help="also the loops around products, and what bounds them")
    options, given = parser.parse_known_args(args)
    if bad := [size for size in options.vocab_size if not 1 <= size <= 65536]:
        parser.error(f"--vocab-size {bad[0]} must be from 1 to 65,536")
    try:
        config = resolve(TrainConfig(**parse_given(given)), "cuda")
        if reason := why_not_kernels(config.head_dim, config.d_model):
            raise InputError(reason)
    except InputError as error:
        parser.error(str(error))
    if len(options.arch) == len(options.vocab_size) == 1 and "TRITON_INTERPRET" not in os.environ:
        return compile_step(config, options.arch[0], options.vocab_size[0], options.loops)
    codes, given = [], given + ["--loops"] * options.loops
    with ThreadPoolExecutor(num_cores()) as pool:
        for runs in pool.map(lambda arch: compile_apart(arch, options.vocab_size, given), options.arch):
            for run in runs:
                print(run.stdout, end="", flush=True)
                codes.append(run.returncode)
    return max(codes)

