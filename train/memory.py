"""Whether a configuration fits, said before anything large is allocated; and what would fit, where it did not.

Activations are not estimated by a formula that a change to the model would leave behind: one row and then two go
through the real forward, and what autograd keeps of them is added up.
"""

import gc
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import psutil
import torch

from model import GPT, GPTConfig
from model.gpt import count_parameters
from prepare import InputError
from prepare.limits import control_group_bytes

from .compiled import partitioned
from .config import TrainConfig
from .step import TrainStep

# Times what autograd keeps, beside OVERHEAD. On a CPU most of it is holes: `keep_freed_memory` has every tensor in one
# heap, and whole runs grew by up to 2.4 times what was kept (bench/LOG.md, 2026-11-29). A CPU is given more: what does
# not fit may be killed without a word, and fewer rows cost little there. GPU: not yet measured.
MARGIN = {"cpu": 3.0, "cuda": 1.2}
# Bytes whatever the rows: libraries first used after the check, threads' buffers, the drawing of the curves.
OVERHEAD = {"cpu": 64 * 2**20, "cuda": 0}
# Times parameters, gradients and moments, of which nothing is unknown but the slack.
STATE_MARGIN = 1.2


def state_bytes(model: GPTConfig, forward_bytes: int) -> int:
    """Masters, gradients, moments (two for AdamW, one for Muon); on a GPU the copies that the forward reads, on a CPU
    the checkpoint's snapshot of masters and moments."""
    counts = count_parameters(model)
    muon = counts["blocks"]
    adamw = counts["total"] - muon
    copies = forward_bytes * counts["total"] if forward_bytes < 4 else 4 * (3 * adamw + 2 * muon)
    update = 6 * 4 * model.depth * 4 * model.d_model**2  # temporaries of Muon's largest stack
    return 4 * (4 * adamw + 3 * muon) + copies + update


class _Kept:
    """Stands in the graph for a tensor that autograd keeps, and counts its storage once for as long as it lives."""

    def __init__(self, tensor: torch.Tensor, users: Counter, peak: list[int]):
        # Detached: the tensor itself may be the node's own output, and would keep the node that keeps it.
        self.tensor, self.users = tensor.detach(), users
        storage = tensor.untyped_storage()
        self.key = (storage.data_ptr(), storage.nbytes())
        users[self.key] += 1
        if users[self.key] == 1:
            peak[0] = max(peak[0], sum(nbytes for (_, nbytes), count in users.items() if count))

    def __del__(self):
        self.users[self.key] -= 1


def activation_bytes(model: GPT, rows: int, precision: AbstractContextManager) -> int:
    """The most that autograd keeps at once in the forward of `rows` rows, parameters and their gradients left out.
    `precision` is the context that the forward runs in."""
    users: Counter = Counter()
    peak = [0]
    # A compiled model is given the gradients' buffers as well, to add to them in its backward.
    state = {t.untyped_storage().data_ptr() for p in model.parameters() for t in (p, getattr(p, "main_grad", p))}

    def keep(tensor):
        return tensor if tensor.untyped_storage().data_ptr() in state else _Kept(tensor, users, peak)

    forward = partitioned(model)
    tokens = torch.zeros(rows, model.config.seq_len, dtype=torch.int32, device=model.wte.device)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: getattr(kept, "tensor", kept)), precision:
        forward(tokens, tokens)
    return peak[0]


def bytes_of_rows(model: GPT, precision: AbstractContextManager) -> tuple[float, float]:
    """Bytes that each row of a micro-batch needs, and bytes that any number of rows needs once: lm_head's gradient and
    OVERHEAD."""
    device = model.wte.device.type
    one, two = (MARGIN[device] * activation_bytes(model, rows, precision) for rows in (1, 2))
    return two - one, 2 * one - two + OVERHEAD[device]


def available_bytes(device: str) -> int:
    """Memory that is free now."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    free, allowed = psutil.virtual_memory().available, control_group_bytes()
    return free if allowed is None else min(free, allowed)


def check_state_fits(config: TrainConfig, model: GPTConfig, dtype: torch.dtype) -> None:
    """Raises InputError where parameters and optimizer alone would not fit: before any of them is allocated."""
    needed, available = STATE_MARGIN * state_bytes(model, dtype.itemsize), available_bytes(config.device)
    if needed > available:
        raise InputError(
            f"parameters and optimizer need about {needed / 2**30:.1f} GiB and {available / 2**30:.1f} GiB are"
            f" free on {config.device}: lower --depth, or prepare a smaller --vocab-size"
        )


def check_batch_fits(config: TrainConfig, model: GPT, precision: AbstractContextManager, available: int) -> None:
    """Raises InputError, naming the --device-batch-size that fits, where the configured one would not.

    `available` is in bytes, with parameters and optimizer already allocated.
    """
    per_row, fixed = bytes_of_rows(model, precision)
    rows = int((available - fixed) // per_row)
    if rows >= config.device_batch_size:
        return
    needed = fixed + per_row * config.device_batch_size
    line = (
        f"{config.device_batch_size} rows of {config.seq_len} tokens need about {needed / 2**30:.1f} GiB and"
        f" {available / 2**30:.1f} GiB are free on {config.device}"
    )
    raise InputError(f"{line}{mend_by_batch(config, rows)}")


def largest_batch(config: TrainConfig, rows: int) -> int:
    """Rows of the largest micro-batch, at most `rows`, that divides the step evenly, so that nothing but the number of
    micro-steps changes; 0 where there is none."""
    step_rows = config.total_batch_size // config.seq_len
    return max((n for n in range(1, rows + 1) if step_rows % n == 0), default=0)


def mend_by_batch(config: TrainConfig, rows: int) -> str:
    """The end of a line that says what to do where `rows` rows fit."""
    if fits := largest_batch(config, rows):
        return f": use --device-batch-size {fits}"
    return ", which is less than one row needs: lower --seq-len or --depth"


# Parts of the messages of errors that have no class of their own: PyTorch's allocator on a CPU, CUDA, cuBLAS, Triton.
_OUT_OF_MEMORY = ("DefaultCPUAllocator: can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


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


@contextmanager
def out_of_memory_is_input_error(config: TrainConfig, step: TrainStep) -> Iterator[None]:
    """Turns running out of memory into an InputError that names the --device-batch-size to take, at the same total.

    The estimate of `check_batch_fits` was wrong then, or another process has taken memory since: it is made anew, and
    what has failed is not advised again.
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
    gc.collect()
    if config.device == "cuda":
        torch.cuda.empty_cache()
    try:
        per_row, fixed = bytes_of_rows(step.model, step.precision())
        rows = min(int((available_bytes(config.device) - fixed) // per_row), config.device_batch_size - 1)
    except Exception as error:  # not for want of memory: what a capture broke off in may be of no more use
        rows = 0 if says_out_of_memory(error) else config.device_batch_size - 1
    line = f"out of memory on {config.device} with {config.device_batch_size} rows of {config.seq_len} tokens"
    raise InputError(f"{line}{mend_by_batch(config, rows)}") from None
