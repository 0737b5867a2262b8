"""Where a step's time goes: the ten largest kernels, by torch.profiler.

`python -m bench.profile [--ops triton|compile|reference] [--vocab-size V] [--device-batch-size B] [--steps N]
[--graphs]` runs steps of the default configuration on random tokens. On a CPU it lists PyTorch's operators by their own
time. `--save FILE` keeps the trace (Chrome's JSON), `--trace FILE` reads one instead of running anything.

The steps are launched kernel by kernel, which hides behind the kernels at the default batch: what CUPTI records of a
replayed graph is said to be wrong up to CUDA 13.0 (pytorch/kineto #1165). `--graphs` replays all the same.
"""

import json
import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

import kernels
from prepare import InputError
from prepare.arguments import Parser, command
from prepare.errors import one_line
from train.config import TrainConfig, resolve
from train.device import ask_for_workspace, keep_to_the_cores_allowed, pick_ops
from train.memory import fit_default
from train.recipes import DEVICE_DEFAULTS, vocab_size
from train.tune.steps import make_step

ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
MARK = "timebox step"  # every profiled step is one such annotation
WARM_UP = 3


@dataclass
class Group:
    """Kernels that are one for a reader. Microseconds over all steps."""

    name: str
    time: float = 0.0
    launches: int = 0


def group_name(name: str) -> str:
    """A kernel's name without what varies: templates, parameters, tile sizes, a compiler's running number.

    PyTorch's elementwise kernels have one name, and what they do in a functor among their templates: it is kept.
    """
    if inner := re.search(r"cutlass::Kernel2?<(\w+)", name):
        name = inner[1]
    functor = re.search(r"\b(\w*Functor\w*|\w+_kernel_cuda)\b", name)
    base = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    base = re.split(r"[<(]", base, maxsplit=1)[0].strip().rpartition("::")[2]
    base = re.sub(r"_(tilesize)?\d+x\d+.*$", "", base)  # of cuBLAS's many variants
    base = re.sub(r"^(triton_[a-z]+_fused_.*?)_\d+$", r"\1", base)  # of torch.compile
    return f"{base} {functor[1]}" if functor and functor[1] != base else base


def read_trace(path: Path) -> list[dict]:
    """The complete events of a Chrome trace. Raises InputError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        events = content["traceEvents"] if isinstance(content, dict) else content
        return [e for e in events if e.get("ph") == "X" and "dur" in e]
    except OSError as error:
        raise InputError(f"--trace {path}: {error.strerror}: name another file") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"--trace {path} is no trace that torch.profiler exported") from None


def own_times(events: list[dict]) -> list[tuple[dict, float]]:
    """Each event with its duration less that of the events inside it, thread by thread."""
    threads = defaultdict(list)
    for event in events:
        threads[event.get("pid"), event.get("tid")].append(event)
    own = []
    for thread in threads.values():
        open_events: list[list] = []  # [event, own time], outermost first
        for event in sorted(thread, key=lambda e: (e["ts"], -e["dur"])):
            while open_events and open_events[-1][0]["ts"] + open_events[-1][0]["dur"] <= event["ts"]:
                own.append(tuple(open_events.pop()))
            if open_events:
                open_events[-1][1] -= event["dur"]
            open_events.append([event, event["dur"]])
        own += [tuple(pair) for pair in open_events]
    return own


def covered(events: Iterable[dict]) -> float:
    """Microseconds in which at least one of the events runs."""
    total, end = 0.0, float("-inf")
    for event in sorted(events, key=lambda e: e["ts"]):
        stop = event["ts"] + event["dur"]
        total += max(0.0, stop - max(event["ts"], end))
        end = max(end, stop)
    return total


@dataclass
class Profile:
    """What a trace says. `span` is from the first kernel's start to the last one's end, in microseconds."""

    groups: list[Group]  # the largest first
    span: float
    busy: float
    steps: int
    on_gpu: bool


def analyse(events: list[dict]) -> Profile:
    """Kernels where the trace has any, else the CPU's operators by their own time. Raises InputError."""
    on_gpu = any(e.get("cat") == "kernel" for e in events)
    chosen = [e for e in events if e.get("cat") in (ON_GPU if on_gpu else ("cpu_op",))]
    if not chosen:
        raise InputError("the trace holds neither kernels nor operators: was anything run while it was taken?")
    timed = [(e, e["dur"]) for e in chosen] if on_gpu else own_times(chosen)
    groups: dict[str, Group] = {}
    for event, duration in timed:
        group = groups.setdefault(name := group_name(event["name"]), Group(name))
        group.time += duration
        group.launches += 1
    span = max(e["ts"] + e["dur"] for e in chosen) - min(e["ts"] for e in chosen)
    steps = sum(e.get("cat") == "user_annotation" and e["name"] == MARK for e in events)
    ordered = sorted(groups.values(), key=lambda g: -g.time)
    return Profile(ordered, span, covered(chosen), max(steps, 1), on_gpu)


def report(profile: Profile, rows: int = 10) -> None:
    what = "kernel" if profile.on_gpu else "operator"
    print(f"{profile.steps} steps of {profile.span / profile.steps / 1e3:.2f} ms from the first {what} to the last,"
          f" {profile.busy / profile.span:.1%} of it busy")  # fmt: skip
    print(f"{'share':>6}  {'ms a step':>9}  {'a step':>7}  {what}")
    shown, rest = profile.groups[:rows], profile.groups[rows:]
    if rest:
        others = Group(f"{len(rest)} others", sum(g.time for g in rest), sum(g.launches for g in rest))
        shown = [*shown, others]
    for group in shown:
        print(
            f"{group.time / profile.span:>6.1%}  {group.time / profile.steps / 1e3:>9.3f}"
            f"  {group.launches / profile.steps:>7.0f}  {group.name}"
        )


def record(config: TrainConfig, vocab_size: int, steps: int, path: Path) -> None:
    """Profiles whole steps after a few to warm up, and writes the trace."""
    on_gpu = config.device == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * on_gpu
    kernels.set_ops(config.ops)
    try:
        step, batches, values = make_step(config, config.model_config(vocab_size))
        for _ in range(WARM_UP):
            step(batches, values)
        with torch.profiler.profile(activities=activities) as profiler:
            for _ in range(steps):
                with torch.profiler.record_function(MARK):
                    step(batches, values)
            if on_gpu:
                torch.cuda.synchronize()
    finally:
        kernels.set_ops(None)
    profiler.export_chrome_trace(str(path))


def main(args: list[str] | None = None) -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = Parser("bench.profile", __doc__)
    parser.add_argument("--ops", choices=("triton", "cpu", "compile", "reference"),
                        default="triton" if device == "cuda" else "cpu")  # fmt: skip
    parser.add_argument("--vocab-size", type=int, default=vocab_size(DEVICE_DEFAULTS[device]["recipe"]))
    parser.add_argument("--device-batch-size", type=int, help="rows of a micro-step")
    parser.add_argument("--steps", type=int, default=2, help="to profile (default: 2)")
    parser.add_argument("--graphs", action="store_true", help="replay the step's CUDA graphs, as training does")
    parser.add_argument("--rows", type=int, default=10, help="to print (default: 10)")
    parser.add_argument("--save", type=Path, metavar="FILE", help="keep the trace there")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="read this trace instead")
    options = parser.parse_args(args)
    try:
        if options.trace:
            report(analyse(read_trace(options.trace)), options.rows)
            return 0
        pick_ops(options.ops, device)
        keep_to_the_cores_allowed()
        ask_for_workspace()
        config = TrainConfig(ops=options.ops, device_batch_size=options.device_batch_size, graphs=options.graphs)
        config = resolve(config, device)
        if options.device_batch_size is None:
            config = fit_default(config, config.model_config(options.vocab_size))
        with tempfile.TemporaryDirectory() as folder:
            path = options.save or Path(folder) / "trace.json"
            path.open("ab").close()  # the profiler would not say that it cannot write there
            record(config, options.vocab_size, options.steps, path)
            report(analyse(read_trace(path)), options.rows)
    except (InputError, OSError) as error:
        print(f"error: {one_line(error, 'name another file with --save, or another TMPDIR')}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    command(main)
