"""Which device a run takes, by which ops, and what the process has to be told for it."""

import ctypes
import dataclasses
import os
import platform
import sys

import torch

import kernels
from prepare import InputError
from prepare.limits import num_cores

from .compiled import check_compiler
from .config import TrainConfig, resolve
from .launching import check_launching

OLDEST_GPU = (8, 0)  # compute capability: the first with bf16


def pick_device(wanted: str | None) -> str:
    """The device's type. Raises InputError where a GPU is asked for and there is none, and where it is too old."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch sees no CUDA device here; leave the flag out to train on the CPU")
    device = wanted or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and (capability := torch.cuda.get_device_capability()) < OLDEST_GPU:
        has, needs = (f"{major}.{minor}" for major, minor in (capability, OLDEST_GPU))
        raise InputError(f"this GPU has compute capability {has}, bf16 needs {needs}: take another, or --device cpu")
    return device


def pick_ops(wanted: str | None, device: str) -> str:
    """Triton kernels, references or compiled references, set for every op. Raises InputError where Triton has no
    device to run on, or no way to it, or torch.compile no compiler."""
    if wanted == "triton" and device == "cpu":
        raise InputError("--ops triton needs a CUDA device: leave the flag out to train on the references")
    if wanted == "compile":
        check_compiler(device)
    ops = wanted or ("triton" if device == "cuda" else "reference")
    if ops == "triton":
        check_launching()
    kernels.set_ops(ops)
    return ops


def pick_graphs(wanted: bool | None, device: str, ops: str) -> bool:
    """Whether steps are CUDA graphs. Raises InputError where they are asked for and cannot be."""
    possible = device == "cuda" and ops == "triton"
    if wanted and not possible:
        raise InputError("--graphs needs a CUDA device and --ops triton: leave the flag out")
    return possible if wanted is None else wanted


def check_kernels_take(config: TrainConfig) -> None:
    """Raises InputError for a shape that a model may have and the kernels do not take."""
    if config.head_dim not in kernels.HEAD_DIMS:
        dims = ", ".join(map(str, kernels.HEAD_DIMS))
        raise InputError(f"--head-dim {config.head_dim}: the kernels take {dims}; --ops reference takes any")
    if config.d_model > kernels.MAX_WIDTH:
        raise InputError(
            f"--d-model {config.d_model}: the kernels take at most {kernels.MAX_WIDTH}; --ops reference takes any"
        )


def complete(config: TrainConfig) -> TrainConfig:
    """With every field set that depends on the machine. Raises InputError."""
    device = pick_device(config.device)
    config = resolve(dataclasses.replace(config, ops=pick_ops(config.ops, device)), device)
    if config.ops == "triton":
        check_kernels_take(config)
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
