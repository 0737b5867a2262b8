"""Which tile of each kernel, and which way of each product, is the fastest on this GPU: measured, and kept for every
run that comes.

`python -m train.tune [--depth N ...]` takes the options of `train` that shape a step. Every candidate that stands
beside a kernel is compiled on all cores, checked against the reference, and timed; it takes the place of the default
where it beats it by more than the default's own times differ. What is no tile is decided by whole steps. The table is a
file below $TIMEBOX_HOME; what it has already is not measured again. Interrupted, it goes on where it was.

`--offline --arch 90` compiles alone, for a GPU that is not there, and says what each candidate takes.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median

import torch

import kernels
from prepare import InputError
from prepare.arguments import Parser, command
from prepare.errors import one_line
from prepare.words import printable

from ..config import TrainConfig, parse_given, resolve
from ..device import why_not_kernels
from ..launching import check_launching
from ..memory import fit_default
from ..precompile import end_with
from ..resilience.durable import replace_file
from .compiling import compile_all
from .table import Kept, Machine, alone, path_of
from .targets import targets
from .trials import NO_TIME, Tuned, as_json, label
from .tuner import Outcome, tune_step
from .usage import ARCHS

MEND = "name another folder with TIMEBOX_HOME, or make room there"


def report_offline(tuned: Tuned, arch: int) -> None:
    print(f"\n{tuned.target.name} {tuned.target.key}: {len(tuned.trials) - 1} candidates on sm_{arch}, "
          f"{len(tuned.struck)} of no use")  # fmt: skip
    print(f"  {'tile':<28}  registers  spills   shared  CTAs/SM")
    for trial in tuned.trials:
        name = label(trial.tile) + (" (default)" if trial is tuned.present else "")
        numbers = [trial.compiled.get(key, "-") for key in ("registers", "stack", "shared", "ctas_per_sm")]
        remark = f"  {trial.fault}" if trial.fault else ""
        print("  {:<28}  {:>9}  {:>6}  {:>7}  {:>7}{}".format(name, *numbers, remark))


def report(outcome: Outcome, kept: Kept) -> None:
    """What was decided, and why something was not."""
    for what, times in outcome.step.items():
        before, after = (1e3 * median(times[side]) for side in ("before", "after"))
        verdict = "taken" if times["better"] else "not taken"
        print(f"whole step: {what}: {before:.2f} ms before, {after:.2f} after: {verdict}")
    if "tuned" in outcome.step:
        print(f"predicted gain: {outcome.predicted_us / 1e3:.2f} ms a micro-step, as the kernels' own times add up")
    for one in outcome.tuned:
        if one.present.fault not in (None, NO_TIME):
            print(f"WRONG: the default tile of {one.target.name} ({one.target.key}): {one.present.fault}")
        reasons: dict[str, list[str]] = {}
        for trial in one.struck:
            if trial is not one.present and trial.fault.startswith(("wrong", "breaks")):
                reasons.setdefault(trial.fault, []).append(label(trial.tile))
        for reason, labels in reasons.items():
            print(f"struck out: {one.target.name} ({one.target.key}), {', '.join(labels)}: {reason}")
    if outcome.nothing_is_right:
        print("nothing that was tried computes what it should: every kernel keeps the tile of the source")
    for fault in outcome.faults:
        print(f"note: {printable(fault)}")
    if outcome.untold:
        print(f"note: {outcome.untold} kernels were left for want of time: the same command goes on with them")
    print(f"kept in {printable(kept.path)}")


def offline(options: argparse.Namespace, config: TrainConfig) -> list[Tuned]:
    arch = options.arch or 90
    shape = config.model_config(options.vocab_size)
    from ..precompile import compiling_only

    with compiling_only(arch):
        found = targets(config, shape)
        numbers = [n for n, target in enumerate(found) if not options.only or target.name in options.only]
        if not numbers:
            raise InputError(f"--only {options.only[0]}: no such kernel; there are {', '.join(t.name for t in found)}")
        work = [Tuned.fresh(found[n]) for n in numbers]
    start = time.monotonic()
    compile_all(work, numbers, config, options.vocab_size, None, arch)
    print(f"{sum(len(one.trials) for one in work)} candidates of {len(work)} kernels, {time.monotonic() - start:.0f} s")
    for one in work:
        report_offline(one, arch)
    return work


def on_gpu(options: argparse.Namespace, config: TrainConfig) -> tuple[int, list[Tuned]]:
    check_launching()
    shape = config.model_config(options.vocab_size)
    config = fit_default(config, shape) if options.fits else config
    machine = Machine.here()
    path = path_of(machine.gpu)
    with alone(path):
        kept = Kept.read(path, machine)
        if kept.note:
            print(f"note: {printable(kept.note)}")
        outcome = tune_step(
            config, shape, kept, options.seconds, config.fused_norms, options.again, tuple(options.only)
        )
        if not outcome.tuned and not outcome.faults and not outcome.untold:
            print(f"nothing to tune: {printable(path)} has all of this step's kernels (--again measures them anew)")
            return 0, []
        report(outcome, kept)
    return int(outcome.nothing_is_right or not outcome.tuned), outcome.tuned


def main(args: list[str] | None = None) -> int:
    """Exit codes: 0 done, as far as the time went; 1 nothing was found to be right, or nothing could be tried; 2 bad
    input, or a busy GPU."""
    parser = Parser("train.tune", __doc__)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--seconds", type=float, default=600.0, help="for all of it, about (default: 600)")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these kernels alone")
    parser.add_argument("--again", action="store_true", help="also what the table has")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was seen there")
    parser.add_argument("--offline", action="store_true", help="compile for --arch and report; needs no GPU")
    parser.add_argument("--arch", type=int, choices=ARCHS, help="compute capability x 10, with --offline (default: 90)")
    parser.add_argument("--lifeline", action="store_true", help=argparse.SUPPRESS)  # end when standard input is closed
    options, rest = parser.parse_known_args(args)
    if options.lifeline:
        end_with(0)
    try:
        if not 1 <= options.vocab_size <= 65536:
            raise InputError(f"--vocab-size {options.vocab_size} must be from 1 to 65,536")
        if not options.seconds > 0:  # NaN is not
            raise InputError(f"--seconds {options.seconds:g} must be above 0")
        given = TrainConfig(**parse_given(rest))
        options.fits = given.device_batch_size is None
        fused_norms = given.fused_norms
        config = resolve(given, "cuda")
        if reason := why_not_kernels(config.head_dim, config.d_model):
            raise InputError(reason)
        if options.arch and not options.offline:
            raise InputError("--arch goes with --offline: here it is that of the GPU")
        if not options.offline and not torch.cuda.is_available():
            raise InputError("no CUDA device here to time anything on: --offline --arch 90 compiles the candidates")
        kernels.set_ops("triton")
        config = TrainConfig(**{**vars(config), "fused_norms": fused_norms, "ops": "triton"})
        code, tuned = (0, offline(options, config)) if options.offline else on_gpu(options, config)
        if options.json:
            replace_file(options.json, (json.dumps([as_json(one) for one in tuned], indent=1) + "\n").encode())
        return code
    except (InputError, OSError) as error:
        print(f"error: {printable(one_line(error, MEND))}", file=sys.stderr)
        return 2
    finally:
        kernels.set_ops(None)


if __name__ == "__main__":
    command(main)
