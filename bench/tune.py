"""Which tile of each kernel is the fastest: tried on a GPU, for a person to copy into the constants of kernels/.

`python -m bench.tune` compiles every candidate of `bench.targets` on all cores, strikes out what does not compile,
spills or does not fit, and times the others at the shapes of the default step, one kernel after the other. What a
candidate computes is compared with what the present tile computes, in memory that was filled with NaN: a wrong one gets
no time. A candidate has to beat the present tile by more than that one's own times differ. Tile sizes stay constants in
the source, and nothing here changes them.

`--offline --arch 90` compiles alone, for a GPU that is not there, and fills Triton's cache on the way.
"""

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

import kernels
from bench.ceilings import device_name
from bench.offline import ARCHS
from bench.targets import Target
from bench.tiles import compile_all, launches_of, prepared, step_targets
from bench.timing import time_call
from bench.tuned import HEADER, NO_TIME, Trial, Tuned, as_json, line_of, one_line, report_gains, report_offline
from prepare import InputError
from prepare.arguments import Parser, command
from prepare.words import printable
from train.resilience.durable import replace_file
from train.results.provenance import versions
from train.results.run_folder import source_commit

HOPELESS = 1.3  # times the best of the first pass: not timed again
VISITS = 5  # of each of the others, in turn: what drifts, drifts for all


@contextmanager
def nan_filled() -> Iterator[None]:
    """Inside, memory that nothing was written to yet is NaN: PyTorch fills it where it is to be deterministic."""
    torch.set_deterministic_debug_mode("warn")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode("default")


def difference(got: list[Tensor], expected: list[Tensor]) -> float:
    """The largest ‖difference‖ / ‖expected‖; NaN where there is one."""
    worst = []
    for a, b in zip(got, expected, strict=True):
        if a.shape != b.shape:
            return float("nan")
        norm, off = (torch.linalg.vector_norm(x, dtype=torch.float32).item() for x in (b, a - b))
        worst.append(off / norm if norm else off)
    return max(worst, key=lambda error: (error != error, error))  # NaN is larger than any


def tune(tuned: Tuned, device: str, dtype: torch.dtype, seconds: float) -> None:
    """Checks and times the trials of a target that nothing speaks against, in about so many seconds.

    A first visit to each drops those that are hopeless; the rest are visited in turn. A trial that fails leaves its
    reason behind, and costs the others nothing.
    """
    until = time.monotonic() + seconds
    call = prepared(tuned.target, device, dtype)
    with nan_filled():
        launches, tuned.asked = launches_of(tuned.target, call, None)
    expected, tuned.launches = launches.outputs, tuned.target.calls * len(launches.again)
    del launches

    def visit(trial: Trial, seconds: float = 0.0) -> None:
        launches, _ = launches_of(tuned.target, call, trial.tile)
        trial.seconds.append(time_call(launches, device, seconds).median)

    present, *candidates = tuned.trials
    random.Random(0).shuffle(candidates)  # where time runs out, no corner of the grid is left out as a whole
    for trial in (present, *candidates):
        if trial.fault and trial is not present:
            continue
        if time.monotonic() > until and trial is not present:
            trial.fault = NO_TIME
            continue
        try:
            with nan_filled():
                launches, _ = launches_of(tuned.target, call, trial.tile)
            error = difference(launches.outputs, expected)
            if not error <= tuned.target.tolerance:
                trial.fault = f"wrong: off by {error:.1e} of the present tile's norm"
                continue
            trial.error = error
            visit(trial)
        except Exception as error:  # of any kind: a launch may fail in many ways
            trial.fault, trial.seconds = one_line(error), []
        finally:
            launches = None  # its memory is the next trial's
    if not present.seconds:
        raise RuntimeError(f"{tuned.target.name}: the present tile cannot be timed: {present.fault}")
    best = min(trial.median for trial in tuned.timed)
    left = [trial for trial in tuned.timed if trial is present or trial.median <= HOPELESS * best]
    for trial in left:
        trial.seconds.clear()  # the device was still warming up
    each = max(0.0, until - time.monotonic()) / (VISITS * len(left))
    for _ in range(VISITS):
        for trial in left:
            visit(trial, each)


def pick(found: list[Target], only: list[str]) -> list[Target]:
    """Those named, in their order; all where none is. Raises InputError."""
    names = [target.name for target in found]
    if unknown := [name for name in only if name not in names]:
        raise InputError(f"--only {unknown[0]}: no such kernel; there are {', '.join(names)}")
    return [target for target in found if not only or target.name in only]


def compiled(chosen: list[Target], arch: int, vocab_size: int) -> list[Tuned]:
    """Every target with its trials; those that are no use on `arch` are struck out."""
    jobs = [(target.name, tile) for target in chosen for tile in (None, *target.tiles)]
    with tempfile.TemporaryDirectory() as folder:
        results = iter(compile_all(jobs, arch, vocab_size, Path(folder)))
    all_tuned = []
    for target in chosen:
        tiles = (None, *target.tiles)
        found = list(islice(results, len(tiles)))
        asked = [each.pop("asked", {}) for each in found]
        present, *candidates = (Trial(tile, each, each.pop("fault")) for tile, each in zip(tiles, found, strict=True))
        tuned = Tuned(target, [present], asked[0])
        tuned.trials += [trial for trial in candidates if trial.tile != tuned.tile(present)]
        all_tuned.append(tuned)
    return all_tuned


def run(options: argparse.Namespace) -> None:
    """Raises InputError."""
    on_gpu = torch.cuda.is_available() and not options.offline
    if not on_gpu and not options.offline:
        raise InputError("no CUDA device here to time anything on: --offline --arch 90 compiles the candidates alone")
    if not 1 <= options.vocab_size <= 65536:
        raise InputError(f"--vocab-size {options.vocab_size} must be from 1 to 65,536")
    if not options.seconds > 0:  # NaN is not
        raise InputError(f"--seconds {options.seconds:g} must be above 0")
    if options.arch and on_gpu:
        raise InputError("--arch goes with --offline: here it is that of the GPU")
    major, minor = torch.cuda.get_device_capability() if on_gpu else divmod(options.arch or 90, 10)
    arch = 10 * major + minor
    if arch not in ARCHS:
        raise InputError(f"this GPU is an sm_{arch}, and the limits of {', '.join(map(str, ARCHS))} alone are known")
    chosen = pick(step_targets(options.vocab_size), options.only)
    about = {
        "device": device_name("cuda") if on_gpu else None, "arch": arch, "vocab_size": options.vocab_size,
        "commit": source_commit(), "date": time.strftime("%Y-%m-%d"), "versions": versions(),
    }  # fmt: skip

    def save(done: list[Tuned]) -> None:
        if options.json:
            try:
                replace_file(options.json, as_json(done, about).encode())
            except OSError as error:
                raise InputError(f"--json {options.json}: {error.strerror}: name another file") from None

    save([])
    start = time.monotonic()
    tuned = compiled(chosen, arch, options.vocab_size)
    took, count, struck = time.monotonic() - start, sum(len(t.trials) - 1 for t in tuned), sum(t.struck for t in tuned)
    print(f"{count} candidates for {len(tuned)} kernels, compiled in {took:.0f} s; {struck} struck out", flush=True)
    save(tuned)
    if options.offline:
        for one in tuned:
            report_offline(one, arch)
        return
    print(f"{about['device']}, commit {about['commit']}, {about['date']}; ms of all launches in a micro-step\n{HEADER}")
    done: list[Tuned] = []
    until = time.monotonic() + options.seconds
    try:
        for i, one in enumerate(tuned):
            try:
                tune(one, "cuda", torch.bfloat16, (until - time.monotonic()) / (len(tuned) - i))
                done.append(one)
                print(line_of(one), flush=True)
            except Exception as error:  # of any kind: the other kernels are still worth their time
                print(f"{one.target.name:<22}  {one_line(error)}", flush=True)
            torch.cuda.empty_cache()
            save(tuned)
    finally:
        report_gains(done)


def main(args: list[str] | None = None) -> int:
    parser = Parser("bench.tune", __doc__)
    parser.add_argument("--offline", action="store_true", help="compile for --arch and report; needs no GPU")
    parser.add_argument("--arch", type=int, choices=ARCHS,
                        help="compute capability x 10, for --offline (default: 90)")  # fmt: skip
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--seconds", type=float, default=240.0, help="of timing; compiling comes first (default: 240)")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these kernels alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there, after every kernel")
    options = parser.parse_args(args)
    kernels.set_ops("triton")
    try:
        run(options)
    except InputError as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        return 2
    finally:
        kernels.set_ops(None)
    return 0


if __name__ == "__main__":
    command(main)
