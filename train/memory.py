"""Whether a configuration fits, said before anything is allocated; and what would fit, where it did not.

Nothing is estimated by a formula that a change to the model would leave behind. A whole step, the real one, is walked
through on tensors without memory, and what it would hold at once is added up: parameters, moments, what autograd keeps,
and the temporaries of forward, backward and update, an attention's [T, T] mask among them.
"""

import dataclasses
import gc
import math
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TypeVar

import psutil
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

import kernels
from model import GPT, GPTConfig
from prepare import InputError
from prepare.limits import control_group_bytes

from .config import TrainConfig
from .live_bytes import LiveBytes, TooMuchError
from .optimizer import Optimizer
from .ranks import ALONE, Place, Ranks
from .step import TrainStep

try:
    import resource
except ImportError:  # Windows
    resource = None

T = TypeVar("T")

# Times what a step holds beside its state, and OVERHEAD. On a CPU the rest is holes: `keep_freed_memory` has every
# tensor in one heap (bench/LOG.md, 2026-11-29). A CPU is given more: what does not fit may be killed without a word,
# and fewer rows cost little there. GPU: not yet measured.
MARGIN = {"cpu": 2.5, "cuda": 1.2}
# Bytes whatever the rows: libraries first used after the check, threads' buffers, the drawing of the curves.
OVERHEAD = {"cpu": 64 * 2**20, "cuda": 0}
# Times parameters, gradients and moments, of which nothing is unknown but the slack.
STATE_MARGIN = 1.2
# Of a GPU's memory that a default may count on: the rest is the driver's, and a desktop's.
SHARE_OF_A_GPU = 0.9
# Counting goes on to so many times what there is: it costs time, and only says how far beyond it is.
HOPELESS = 4


def peak_rss_bytes() -> float:
    """The most memory that this process has held at once."""
    if resource is None:
        held = psutil.Process().memory_info()
        return getattr(held, "peak_wset", held.rss)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 2**10)


@dataclass(frozen=True)
class Need:
    """Bytes of a configuration, as its tensors alone need them."""

    state: int  # masters, gradients, moments, the copies that the forward reads; on a CPU a checkpoint's snapshot
    step: int  # the most that a step holds beside these

    def on(self, device: str) -> float:
        """With what is not in the tensors."""
        return STATE_MARGIN * self.state + MARGIN[device] * self.step + OVERHEAD[device]


@contextmanager
def _launches_left_out() -> Iterator[None]:
    """Inside, a launch of a Triton kernel does nothing, compiled or interpreted."""
    from triton.runtime import interpreter, jit

    launches = {(jit.JITFunction, "run"): None, (interpreter.GridExecutor, "__call__"): None}
    for owner, name in launches:
        launches[owner, name] = getattr(owner, name)
        setattr(owner, name, lambda *args, **kwargs: None)
    try:
        yield
    finally:
        for (owner, name), launch in launches.items():
            setattr(owner, name, launch)


class _AttentionWithoutScores(TorchFunctionMode):
    """On tensors without memory PyTorch takes the attention that writes all scores, and elsewhere one that does not: on
    a CPU always, on a GPU where query and key heads are as many."""

    def __init__(self, device: str):
        super().__init__()
        self.device = device

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention and not (self.device == "cuda" and kwargs["enable_gqa"]):
            mask = kwargs["attn_mask"].to(args[0].dtype)
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args, attn_mask=mask)[0]
        return function(*args, **kwargs)


@contextmanager
def _counting(config: TrainConfig, limit: float) -> Iterator[LiveBytes]:
    """Inside, ops on tensors of device "meta" do what they do on the run's device, and launch nothing. The compiled
    references are counted as they are, and autocast as fp32: neither keeps more than that."""
    ops = "reference" if config.ops == "compile" else config.ops
    with ExitStack() as stack:
        stack.enter_context(kernels.ops_in_force(ops, config.device))
        stack.enter_context(_launches_left_out() if ops == "triton" else _AttentionWithoutScores(config.device))
        yield stack.enter_context(LiveBytes(limit))


def count(
    config: TrainConfig, shape: GPTConfig, rows: int, limit: float = float("inf"), ranks: Ranks = ALONE
) -> Need:
    """What a step in micro-steps of `rows` rows needs, on rank 0 of as many as there are. Raises TooMuchError beyond
    `limit` bytes."""
    with _counting(config, limit) as memory:
        model = GPT(shape, device="meta", **config.model_options)
        config = dataclasses.replace(config, device_batch_size=rows)
        # Its kind of ranks alone: no tensor is sent.
        optimizer = Optimizer(model, config, config.forward_dtype, Ranks(Place(size=ranks.size)))
        state = memory.now
        tokens = torch.empty(rows, shape.seq_len, dtype=torch.int32, device="meta")
        loss = model(tokens, tokens)
        loss.backward()
        optimizer.update(loss.detach())
        snapshot = sum(4 * math.prod(kept.cut.shape) for kept in optimizer.kept().values())
        snapshot *= config.device == "cpu"
        return Need(state + snapshot, memory.peak - state)


def available_bytes(device: str) -> int:
    """Memory that is free now."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    free, allowed = psutil.virtual_memory().available, control_group_bytes()
    return free if allowed is None else min(free, allowed)


def fits(config: TrainConfig, shape: GPTConfig, rows: int, available: float, ranks: Ranks) -> bool:
    try:
        return count(config, shape, rows, available, ranks).on(config.device) <= available
    except TooMuchError:
        return False


def largest_batch(
    config: TrainConfig, shape: GPTConfig, available: float, at_most: int, ranks: Ranks = ALONE
) -> int:
    """Rows of the largest micro-batch, at most `at_most`, that fits and divides the step evenly over all `ranks`, so
    that nothing but the number of micro-steps changes; 0 where there is none."""
    step_rows = config.total_batch_size // config.seq_len // ranks.size
    divisors = [rows for rows in range(min(at_most, step_rows), 0, -1) if step_rows % rows == 0]
    return next((rows for rows in divisors if fits(config, shape, rows, available, ranks)), 0)


def fit_default(config: TrainConfig, shape: GPTConfig, ranks: Ranks = ALONE) -> TrainConfig:
    """On a GPU, with the default micro-batch made as small as the memory of the card demands, at the same total; says
    so. The card's memory and not what is free of it: bits must not depend on who else is there."""
    if config.device != "cuda":
        return config
    total = _gpu_bytes()
    rows = largest_batch(config, shape, SHARE_OF_A_GPU * total, config.device_batch_size, ranks)
    if rows in (0, config.device_batch_size):
        return config
    print(
        f"note:   {config.device_batch_size} rows of {config.seq_len} tokens are too many for this GPU's"
        f" {total / 2**30:.1f} GiB: --device-batch-size {rows}, at the same total",
        flush=True,
    )
    return dataclasses.replace(config, device_batch_size=rows)


def check_fits(config: TrainConfig, shape: GPTConfig, ranks: Ranks = ALONE) -> None:
    """Raises InputError, naming the --device-batch-size that fits, where the configured one would not. On a CPU the
    ranks of a machine share its memory."""
    available = available_bytes(config.device) / (ranks.place.local_size if config.device == "cpu" else 1)
    try:
        needed = count(config, shape, config.device_batch_size, HOPELESS * available, ranks).on(config.device)
        about = f"about {_readable(needed)}"
    except TooMuchError:
        needed, about = float("inf"), f"more than {_readable(HOPELESS * available)}"
    if needed > available:
        rows = largest_batch(config, shape, available, config.device_batch_size - 1, ranks)
        needs = "need" if config.device_batch_size > 1 else "needs"
        line = f"{_rows(config)} {needs} {about} and {_free(config.device, available)}"
        if needed <= SHARE_OF_A_GPU * (_gpu_bytes() if config.device == "cuda" else 0):
            line += ", since another process holds the rest (nvidia-smi names it): end it"
            raise InputError(f"{line}, or use --device-batch-size {rows}" if rows else line)
        raise InputError(line + mend_by_batch(rows))


def _gpu_bytes() -> int:
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory


def _free(device: str, available: float) -> str:
    if device == "cuda":
        return f"{_readable(available)} of this GPU's {_readable(_gpu_bytes())} are free"
    return f"{_readable(available)} are free on {device}"


def _rows(config: TrainConfig) -> str:
    return f"{config.device_batch_size} row{'s' * (config.device_batch_size > 1)} of {config.seq_len} tokens"


def mend_by_batch(rows: int) -> str:
    """The end of a line that says what to do where `rows` rows fit."""
    if rows:
        return f": use --device-batch-size {rows}"
    return ", which is less than one row needs: lower --seq-len or --depth, or prepare a smaller --vocab-size"


def _readable(nbytes: float) -> str:
    return f"{nbytes / 2**30:.1f} GiB"


# Parts of the messages of errors that have no class of their own: PyTorch's allocator on a CPU, oneDNN, CUDA, cuBLAS.
_OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory", "could not create a primitive", "could not create a memory object",
    "out of memory", "CUBLAS_STATUS_ALLOC_FAILED",
)  # fmt: skip


def is_out_of_memory(error: BaseException) -> bool:
    """Of a GPU, of PyTorch on a CPU, of Python; also where a capture that ended for it raises an error of its own."""
    if says_out_of_memory(error):
        return True
    context = error.__context__ if isinstance(error, RuntimeError) and not error.__suppress_context__ else None
    return context is not None and is_out_of_memory(context)


def says_out_of_memory(error: BaseException) -> bool:
    """By itself, whatever came before it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)


def give_back(device: str) -> None:
    """What nothing refers to any more, cycles among it, goes back to the device."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def out_of_memory_is_input_error(config: TrainConfig, step: TrainStep) -> Iterator[None]:
    """Turns running out of memory into an InputError that names the --device-batch-size to take, at the same total.

    The estimate of `check_fits` was wrong then, or another process has taken memory since: it is made anew, and what
    has failed is not advised again.
    """
    try:
        yield
        return
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # which hold what did fit of the step
    step.release()
    step.optimizer.zero_grad()
    give_back(config.device)
    shape, fewer = step.model.config, config.device_batch_size - 1
    ranks = step.optimizer.ranks
    held = STATE_MARGIN * count(config, shape, 1, ranks=ranks).state  # parameters and moments are there still
    rows = largest_batch(config, shape, available_bytes(config.device) + held, fewer, ranks)
    raise InputError(f"out of memory on {config.device} with {_rows(config)}{mend_by_batch(rows)}") from None


def halving(score: Callable[[int], T], rows: int, device: str) -> T:
    """`score(rows)`, and where memory runs out with half as many rows at a time, down to one: what is scored is the
    same. Raises what running out of memory raises where one row is too much."""
    while True:
        try:
            return score(rows)
        except Exception as error:
            if rows == 1 or not is_out_of_memory(error):
                raise
            traceback.clear_frames(error.__traceback__)
        rows //= 2
        give_back(device)
        print(f"note: out of memory: going on with {rows} row{'s' * (rows > 1)} at a time", file=sys.stderr, flush=True)
