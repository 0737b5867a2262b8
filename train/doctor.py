"""`python -m train.doctor`: what this machine has, what it lacks, and what to do about it."""

import os
import re
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import psutil
import torch

from model import GPT
from prepare import Dataset, InputError
from prepare.arguments import Parser, command
from prepare.errors import one_line
from prepare.home import home
from prepare.limits import control_group_bytes, num_cores
from prepare.words import command_line, install_line, printable

from .advise import advise
from .config import ROOT, TrainConfig, cpu_has_bf16, resolve
from .device import OLDEST_GPU, complete, gpu_name, why_no_gpu
from .memory import available_bytes, count, largest_batch
from .optimizer import Optimizer
from .place import place_of, quiet, take_one_gpu
from .ranks import Ranks
from .ranks.traffic import measured, traffic
from .recipes import DEVICE_DEFAULTS, vocab_size
from .results.provenance import cpu_name, no_identity, source_state, why_no_commit
from .results.run_folder import default_run_dir
from .trainer import embedded_folder

PYTHONS = ((3, 11), (3, 12))
OK, NOTE, WRONG = "ok", "note", "wrong"
NEEDED_DISK = 2 * 2**30  # a run's checkpoints and weights with room to spare

# A Triton kernel, launched through an op of ours: on a GPU as it runs there, elsewhere in Triton's interpreter.
KERNEL_TRIAL = """
import sys, torch, kernels
from train.launching import check_launching
device = sys.argv[1]
if device == "cuda":
    check_launching()
x = torch.randn(5, 64)
kernels.set_ops("triton")
_, y = kernels.rms_norm(x.to(device))
y = y.cpu()
truth = x.double() * (x.double().square().mean(-1, keepdim=True) + 2.0**-23).rsqrt()
worst = float((y.double() - truth).abs().max())
assert worst < 1e-5, f"rms_norm is off by {worst}"
"""


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, what was found, and where it is wrong what to do."""

    what: str
    state: str
    found: str
    remedy: str = ""

    def __str__(self) -> str:
        line = f"{self.state:<6}{self.what:<9} {printable(self.found)}"
        return f"{line}\n{'':16}-> {printable(self.remedy)}" if self.remedy else line


def main(args: list[str] | None = None) -> int:
    """Exit codes: 0 nothing is wrong; 1 something is; 2 bad arguments."""
    parser = Parser("train.doctor", __doc__)
    parser.add_argument("--data", metavar="FOLDER", help="prepared folder (default: the one that train would take)")
    parser.add_argument("--advise", action="store_true", help="time steps of a few shapes here, for about half a"
                        " minute, and print a command that suits this machine; nothing else is looked at")  # fmt: skip
    parser.add_argument("--time-budget", type=float, metavar="SECONDS", help="of the run that --advise is for (default:"
                        " the one that train would take)")  # fmt: skip
    options = parser.parse_args(args)
    if options.advise:
        return say_advice(options.data, options.time_budget)
    if options.time_budget is not None:
        parser.error("--time-budget is for --advise: add that, or leave it out")
    try:
        place = place_of()
        take_one_gpu(place)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with quiet(place):
        wrong = said(examine(options.data)) if place.first else 0
        if place.size > 1:
            wrong += said(findings("ranks", lambda: together(Ranks(place))))
        print(f"{wrong} thing{'s are' if wrong != 1 else ' is'} wrong" if wrong else "all is well")
    return 1 if wrong else 0


def said(found: Iterable[Finding]) -> int:
    """Prints them. How many are wrong."""
    wrong = 0
    for finding in found:
        print(finding, flush=True)
        wrong += finding.state == WRONG
    return wrong


def together(ranks: Ranks) -> Iterator[Finding]:
    """Of several processes that torchrun has started: who they are, and how fast they send each other what a step of
    the default model does. All ranks call it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ranks.join(device == "cuda")
    there = ranks.each([socket.gethostname(), torch.cuda.get_device_name() if device == "cuda" else "a CPU"])
    hosts = {host: [rank for rank, (name, _) in enumerate(there) if name == host] for host, _ in there}
    where = "; ".join(f"{host}: {', '.join(map(str, ranks_there))}" for host, ranks_there in hosts.items())
    backend = f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}" if device == "cuda" else "gloo"
    devices = sorted({name for _, name in there})
    state = OK if len(devices) == 1 else WRONG
    yield Finding("ranks", state, f"{ranks.size} on {' and '.join(devices)}, by {backend} ({where})",
                  "" if state == OK else "a run takes GPUs of one kind")  # fmt: skip
    if device == "cuda":
        yield Finding("links", OK, f"between the GPUs of rank 0's machine: {_links()}")
    config = complete(TrainConfig(), ranks.size)
    shape = config.model_config(vocab_size(config.recipe))
    model = GPT(shape, device=device)
    model.init_weights(0)
    optimizer = Optimizer(model, config, config.forward_dtype, ranks)
    sent = traffic(optimizer, config)
    exchange, gather = map(median, measured(optimizer, device))
    for name, num_bytes, seconds in (("exchange", sent.exchange, exchange), ("gather", sent.gather, gather)):
        yield Finding(name, OK, f"{num_bytes / 1e6:.1f} MB sent by a rank in {1e3 * seconds:.2f} ms,"
                      f" {num_bytes / seconds / 1e9:.2f} GB/s, in {sent.calls} collectives")  # fmt: skip
    ranks.close()


def _links() -> str:
    """NVLink, PCIe or what else, in the words of `nvidia-smi topo`."""
    try:
        done = subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return "nvidia-smi does not say"
    lines = [line.split() for line in done.stdout.splitlines() if re.match(r"\S*GPU\d", line)]
    kinds = {kind for line in lines for kind in line[1 : 1 + len(lines)] if kind != "X"}
    return ", ".join(sorted(kinds)) or "there is but one"


def say_advice(data: str | None, time_budget: float | None) -> int:
    try:
        for line in advise(data, time_budget):
            print(line, flush=True)
    except (InputError, OSError) as error:
        print(f"error: {one_line(error, 'name another folder with --data')}", file=sys.stderr)
        return 2
    return 0


def examine(data: str | None) -> Iterator[Finding]:
    """Every check's findings. What needs a GPU is left out where that, or the kernel on it, is wrong."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    wrong: set[str] = set()
    tokens = default_vocabulary(device)

    def corpus() -> Finding:
        nonlocal tokens
        found, tokens = dataset(data, device)
        return found

    def checked(what: str, check: Callable[[], Finding | Iterable[Finding]], needs: set[str] = frozenset()):
        if device == "cuda" and (lacking := sorted(needs & wrong)):
            yield Finding(what, NOTE, f"not looked at, since {' and '.join(lacking)} is wrong")
            return
        for finding in findings(what, check):
            if finding.state == WRONG:
                wrong.add(finding.what)
            yield finding

    yield from checked("python", python)
    yield from checked("packages", packages)
    yield from checked("code", code)
    yield from checked("gpu", gpu)
    yield from checked("memory", lambda: memory(device))
    yield from checked("disk", disk)
    yield from checked("kernel", lambda: kernel(device), needs={"gpu"})
    yield from checked("data", corpus)
    yield from checked("batch", lambda: batch(device, tokens), needs={"gpu", "kernel"})


def findings(what: str, check: Callable[[], Finding | Iterable[Finding]]) -> Iterator[Finding]:
    """Of one check; that it failed is one too."""
    try:
        found = check()
        yield from [found] if isinstance(found, Finding) else found
    except Exception as error:  # of any kind: a machine that is not well is what this is for
        said = " ".join(str(error).split())[:200]
        yield Finding(what, WRONG, f"{type(error).__name__}: {said}" if said else type(error).__name__)


def python() -> Finding:
    found = f"{sys.version.split()[0]} at {sys.executable}"
    if sys.version_info[:2] in PYTHONS:
        return Finding("python", OK, found)
    return Finding("python", WRONG, found, "timebox needs 3.11 or 3.12: make train PYTHON=python3.12")


def packages() -> Iterator[Finding]:
    """Those that pyproject.toml names, each beside what is installed."""
    named = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    off = []
    for requirement in named:
        name, wanted = re.match(r"([\w-]+)(?:==([\w.]+))?", requirement).groups()
        if "sys_platform" in requirement and sys.platform != "linux":
            continue
        try:
            installed = version(name)
        except PackageNotFoundError:
            installed = "missing"
        if installed == "missing":
            yield Finding("packages", WRONG, f"{name} is missing", install_line("-e", "."))
        elif wanted and installed.partition("+")[0] != wanted:
            off.append(f"{name} {installed} (tested with {wanted})")
    triton = f"triton {version('triton')}" if find_spec("triton") else "no triton, so no kernels"
    found = f"torch {torch.__version__}, {triton}, CUDA {torch.version.cuda or 'none'}"
    yield Finding("packages", NOTE if off else OK, "; ".join([found, *off]), install_line("-e", ".") if off else "")


def code() -> Finding:
    state = source_state()
    if state["commit"] is None:
        reason, mend = why_no_commit()
        return Finding("code", NOTE, f"{reason}: the ledger cannot name a commit", mend)
    dirty = "with changes that are not committed" if state["dirty"] else "clean"
    found = f"commit {state['commit'][:7]}, {dirty}"
    if no_identity():
        mend = "git config --global user.name NAME && git config --global user.email ADDRESS"
        return Finding("code", NOTE, f"{found}; git does not know who you are, and refuses to commit", mend)
    return Finding("code", OK, found)


def gpu() -> Finding:
    driver = _driver()
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        name = f"{gpu_name()}, compute {properties.major}.{properties.minor}, driver {driver or 'unknown'}"
        if torch.version.hip is not None:
            return Finding("gpu", WRONG, f"{name}: AMD's, and the kernels are for NVIDIA's", "use --device cpu")
        if (properties.major, properties.minor) < OLDEST_GPU:
            return Finding("gpu", WRONG, f"{name}: no bf16", "use a GPU of compute 8.0 or later, or --device cpu")
        return Finding("gpu", OK, name)
    if reason := why_no_gpu():
        return Finding("gpu", WRONG, f"there is one that PyTorch {torch.__version__} cannot use: {reason}",
                       "train takes --device cpu until then")  # fmt: skip
    if driver and "CUDA_VISIBLE_DEVICES" in os.environ:
        return Finding("gpu", NOTE, f"driver {driver}, and CUDA_VISIBLE_DEVICES hides every GPU")
    if driver:
        why = "is built without CUDA" if torch.version.cuda is None else f"wants CUDA {torch.version.cuda}"
        return Finding("gpu", WRONG, f"driver {driver}, and PyTorch {torch.__version__} {why}: it sees no GPU",
                       "install the torch of pyproject.toml built for this driver, or update the driver")  # fmt: skip
    return Finding("gpu", NOTE, "none: train takes the CPU defaults, whose val_bpb is comparable with itself alone")


def _driver() -> str | None:
    """The version of the NVIDIA driver, None where there is none that answers."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split("\n")[0].strip() or None


def memory(device: str) -> Finding:
    main_memory, allowed = psutil.virtual_memory(), control_group_bytes()
    found = f"{main_memory.available / 2**30:.1f} of {main_memory.total / 2**30:.1f} GiB free"
    if allowed is not None and allowed < main_memory.available:
        found += f", {allowed / 2**30:.1f} GiB within this process's limit"
    found += f", {cpu_name()}, {os.cpu_count()} cores"
    if num_cores() < (os.cpu_count() or 1):
        found += f" of which this process may use {num_cores()}"
    found += ", bf16 instructions" if cpu_has_bf16() else ""
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        found += f"; on the GPU {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        if free < 0.9 * total:
            return Finding("memory", WRONG, found, "another process holds the GPU (nvidia-smi names it): end it")
    busy = psutil.getloadavg()[0] / (os.cpu_count() or 1)
    if device == "cpu" and busy > 0.5:
        return Finding("memory", NOTE, f"{found}; other work keeps {100 * busy:.0f}% of the cores busy",
                       "a timed run wants its cores for itself: wait, or end the other work")  # fmt: skip
    return Finding("memory", OK, found)


def disk() -> Finding:
    places = []
    for folder in (default_run_dir("run").parent.resolve(), home()):
        existing = next(path for path in (folder, *folder.resolve().parents) if os.path.exists(path))
        free = shutil.disk_usage(existing).free
        places.append(f"{free / 2**30:.1f} GiB free for {folder}")
        if not os.access(existing, os.W_OK):
            return Finding("disk", WRONG, f"{existing} cannot be written to", "change its owner, or set TIMEBOX_HOME")
        if free < NEEDED_DISK:
            return Finding("disk", WRONG, places[-1], "make room, or point --run-dir and TIMEBOX_HOME at another disk")
    return Finding("disk", OK, "; ".join(places))


def kernel(device: str) -> Finding:
    """In a process of its own: a kernel that breaks the device breaks no other check."""
    where = "on the GPU" if device == "cuda" else "in Triton's interpreter"
    environment = os.environ | ({} if device == "cuda" else {"TRITON_INTERPRET": "1"})
    command = [sys.executable, "-c", KERNEL_TRIAL, device]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300)
        reason = "" if done.returncode == 0 else (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
    except subprocess.TimeoutExpired:
        reason = "no answer in 300 s"
    reason = reason.removeprefix("prepare.errors.InputError: ")
    if not reason:
        return Finding("kernel", OK, f"rms_norm runs {where}, and is right")
    if device == "cpu":
        return Finding("kernel", NOTE, f"rms_norm does not run {where} ({reason}): training on a CPU does without")
    return Finding("kernel", WRONG, f"rms_norm fails {where}: {reason}",
                   "Triton needs a C compiler, Python's headers and this driver's CUDA: install gcc, python3-dev and"
                   " the torch and triton of pyproject.toml; --ops reference trains without them")  # fmt: skip


def default_vocabulary(device: str) -> int:
    return vocab_size(DEVICE_DEFAULTS[device]["recipe"])


def dataset(folder: str | None, device: str) -> tuple[Finding, int]:
    """What was found, and the vocabulary it has."""
    path, usual = Path(folder or embedded_folder(DEVICE_DEFAULTS[device]["recipe"])), default_vocabulary(device)
    if folder is None and not path.exists():
        return Finding("data", NOTE, f"none at {path} yet: train prepares it by itself"), usual
    try:
        data = Dataset.open(path)
        data.split("holdout")
    except OSError as error:
        what = f"{path}: {error.strerror}"
        return Finding("data", WRONG, what, "name another folder with --data"), usual
    except InputError as error:
        again = command_line("prepare", "--out", path, "--vocab-size", usual)
        remedy = f"{again}, with the --source it had"
        return Finding("data", WRONG, str(error), remedy), usual
    tokens = data.split("train").num_tokens
    found = f"{path}: {tokens / 1e6:.1f}M training tokens, vocabulary {data.vocab_size:,}, every hash agrees"
    return Finding("data", OK, found), data.vocab_size


def batch(device: str, vocab_size: int) -> Finding:
    """The largest micro-batch of the default model that should fit."""
    config = resolve(TrainConfig(ops="triton" if device == "cuda" else "cpu"), device)
    shape, default, available = config.model_config(vocab_size), config.device_batch_size, available_bytes(device)
    one, most = (count(config, shape, rows).on(device) for rows in (default, 2 * default))
    rows = max(0, int(default + (available - one) / (most - one) * default))
    found = f"up to {rows} rows of {config.seq_len} tokens should fit, the default is {default}"
    if one <= available:
        return Finding("batch", OK, found)
    fits = largest_batch(config, shape, available, default)
    remedy = f"train with --device-batch-size {fits}" if fits else "free memory, or train with a lower --depth"
    return Finding("batch", WRONG, found, remedy)


if __name__ == "__main__":
    command(main)
