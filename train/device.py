"""Which device a run takes, by which ops, and what the process has to be told for it."""

import ctypes
import dataclasses
import os
import platform
import sys
from pathlib import Path

import torch

import kernels
from model import GPTConfig
from prepare import InputError
from prepare.limits import num_cores

from .compiled import check_compiler
from .config import TrainConfig, resolve
from .launching import check_launching

OLDEST_GPU = (8, 0)  # compute capability: the first with bf16
WORKSPACE = ":4096:8"  # of cuBLAS: KiB, and how many times


def pick_device(wanted: str | None) -> str:
    """The device's type. Raises InputError where a GPU is asked for and there is none, and where there is one that
    this program, or this PyTorch, cannot use: what trains on the CPU instead is another model on another corpus."""
    if wanted == "cpu":
        return "cpu"
    if torch.version.hip is not None and torch.cuda.is_available():
        raise InputError("the kernels are written for NVIDIA's GPUs, and this PyTorch is built for AMD's (ROCm): "
                         "--device cpu trains on the CPU")  # fmt: skip
    if not torch.cuda.is_available():
        if reason := why_no_gpu():
            raise InputError(f"there is a GPU that PyTorch cannot use: {reason}; or take --device cpu")
        if wanted == "cuda":
            raise InputError("--device cuda: PyTorch sees no CUDA device here; leave the flag out to train on the CPU")
        if torch.backends.mps.is_available():
            print("note:   Apple's GPU (MPS) is not used: there are no kernels for it", flush=True)
        return "cpu"
    if (capability := torch.cuda.get_device_capability()) < OLDEST_GPU:
        has, needs = (f"{major}.{minor}" for major, minor in (capability, OLDEST_GPU))
        raise InputError(f"this GPU has compute capability {has}, bf16 needs {needs}: take another, or --device cpu")
    ask_for_workspace()
    return "cuda"


def ask_for_workspace() -> None:
    """Has PyTorch give cuBLAS a workspace of 32 MiB on every GPU, as it does by itself on Hopper and Blackwell alone;
    elsewhere it is 8 MiB. The gradient of a weight is a sum over 10⁵ rows, and cuBLAS may cut it into parts as far as
    the workspace has room for them. PyTorch reads CUBLAS_WORKSPACE_CONFIG at the first product, and cuBLASLt has the
    same memory; where it is set, it is left as it is. Each thread has one for each stream on which it multiplies, three
    or four in all: of what is in no tensor of a step, for which `memory.MARGIN` makes room.

    Which way cuBLAS takes, and so the last bits, may differ with it; not from run to run. Sources: PyTorch's "CUDA
    Environment Variables", parseChosenWorkspaceSize in its aten/src/ATen/cuda/CublasHandlePool.cpp, and cuBLAS's
    documentation, "cublasSetWorkspace".
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", WORKSPACE)


def why_no_gpu() -> str:
    """Why PyTorch sees no GPU although there is one, with what mends it; empty where there is none, or where
    CUDA_VISIBLE_DEVICES hides all there are."""
    if torch.version.cuda is None:
        return "it is built without CUDA: install the torch of pyproject.toml built for CUDA" if device_nodes() else ""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0].rstrip(".")
        if any(quiet in reason for quiet in ("Found no NVIDIA driver", "No CUDA GPUs are available")):
            return ""
        return f"{reason} (update the driver, or install a PyTorch that is built for it)"
    return ""


def device_nodes() -> list[Path]:
    """Of the NVIDIA GPUs that this machine, or container, has."""
    return [*Path("/dev").glob("nvidia[0-9]*")]


def gpu_name() -> str:
    """Of the GPU in use; where there are several, which it is and how to take another."""
    name, index, several = torch.cuda.get_device_name(), torch.cuda.current_device(), torch.cuda.device_count()
    if several < 2:
        return name
    other = (index + 1) % several
    return f"{name} (number {index} of {several}, counted from 0; CUDA_VISIBLE_DEVICES={other} takes another)"


def pick_ops(wanted: str | None, device: str) -> str:
    """Which forms of the ops, set for every op. Raises InputError where Triton has no device to run on, or no way to
    it, torch.compile no compiler, or the forms for a CPU are to run on a GPU."""
    if wanted == "triton" and device == "cpu":
        raise InputError("--ops triton needs a CUDA device: leave the flag out to train on the CPU")
    if wanted == "cpu" and device == "cuda":
        raise InputError("--ops cpu is for a CPU: leave the flag out to train by the kernels, or take --device cpu")
    if wanted == "compile":
        check_compiler(device)
    ops = wanted or ("triton" if device == "cuda" else "cpu")
    if ops == "triton":
        check_launching()
    kernels.set_ops(ops)
    return ops


def on_device(config: TrainConfig, shape: GPTConfig, device: str, compiles: bool = True) -> TrainConfig:
    """A finished run's configuration as its model is computed on `device`, the ops set for every op: its own, as long
    as it is on its own device, else the default, which is the references for a shape that the kernels do not take.
    `compiles` False: what was compiled is not, for a caller whose shapes change with every call."""
    wanted = config.ops if device == config.device else None
    if wanted == "compile" and not compiles:
        wanted = "reference"
    if wanted is None and device == "cuda" and why_not_kernels(shape.head_dim, shape.d_model):
        wanted = "reference"
    return dataclasses.replace(config, device=device, ops=pick_ops(wanted, device))


def pick_graphs(wanted: bool | None, device: str, ops: str) -> bool:
    """Whether steps are CUDA graphs. Raises InputError where they are asked for and cannot be."""
    possible = device == "cuda" and ops == "triton"
    if wanted and not possible:
        raise InputError("--graphs needs a CUDA device and --ops triton: leave the flag out")
    return possible if wanted is None else wanted


def why_not_kernels(head_dim: int, d_model: int) -> str:
    """What the kernels do not take of a shape that a model may have; empty where they take it."""
    if head_dim not in kernels.HEAD_DIMS:
        return f"--head-dim {head_dim}: the kernels take {', '.join(map(str, kernels.HEAD_DIMS))}"
    if d_model > kernels.MAX_WIDTH:
        return f"--d-model {d_model}: the kernels take at most {kernels.MAX_WIDTH}"
    return ""


def complete(config: TrainConfig, ranks: int = 1) -> TrainConfig:
    """With every field set that depends on the machine, and on how many `ranks` train. Raises InputError."""
    device = pick_device(config.device)
    config = resolve(dataclasses.replace(config, ops=pick_ops(config.ops, device)), device, ranks)
    if config.ops == "triton" and (reason := why_not_kernels(config.head_dim, config.d_model)):
        raise InputError(f"{reason}; --ops reference takes any")
    return dataclasses.replace(config, graphs=pick_graphs(config.graphs, device, config.ops))


def keep_freed_memory() -> None:
    """Has glibc keep large blocks that are freed, as PyTorch's allocator does on a GPU. Given back to the kernel, they
    come with a page fault for every 4 KiB when the next step asks for them: a sixth of a CPU step (bench/LOG.md). The
    price is a heap with holes, which `memory.MARGIN` allows for."""
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(m_mmap_threshold, 2**30)
        libc.mallopt(m_trim_threshold, 2**30)


def keep_to_the_cores_allowed() -> None:
    """Has PyTorch start no more threads than a container's CPU quota has cores. With more each is stopped in turn, and
    the others wait: twice as many cost a quarter of the speed (bench/LOG.md, 2026-11-29). OMP_NUM_THREADS, where it is
    set, is taken as it is."""
    cores = num_cores()
    if cores < torch.get_num_threads() and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(cores)
