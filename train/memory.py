"""Whether a configuration fits, said before anything large is allocated.

Activations are not estimated by a formula that a change to the model would leave behind: one row and then two go
through the real forward, and what autograd keeps of them is added up.
"""

import weakref
from collections import Counter
from contextlib import AbstractContextManager

import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import GPT, GPTConfig
from model.gpt import count_parameters
from prepare import InputError

from .config import TrainConfig

# On top of what autograd keeps: a layer's temporaries in the backward, the allocator's slack.
MARGIN = 1.2


class LiveBytes(TorchDispatchMode):
    """Counts the memory of every tensor that is made while the mode is on, for as long as it lives.

    On tensors of device "meta" it is what an allocator without overhead would hand out, to the byte, with nothing
    allocated: `now` at any point, `peak` the most so far, both in bytes.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.storages: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, nbytes = storage._cdata, storage.nbytes()
        if key in self.storages:
            return
        self.storages.add(key)
        weakref.finalize(storage, self._release, key, nbytes)
        self.now += nbytes
        self.peak = max(self.peak, self.now)

    def _release(self, key: int, nbytes: int) -> None:
        self.storages.remove(key)
        self.now -= nbytes


def state_bytes(model: GPTConfig, forward_bytes: int) -> int:
    """Masters, gradients, moments (two for AdamW, one for Muon) and, on a GPU, the copies that the forward reads."""
    counts = count_parameters(model)
    muon = counts["blocks"]
    adamw = counts["total"] - muon
    copies = forward_bytes * counts["total"] if forward_bytes < 4 else 0
    update = 6 * 4 * model.depth * 4 * model.d_model**2  # temporaries of Muon's largest stack
    return 4 * (4 * adamw + 3 * muon) + copies + update


class _Kept:
    """Stands in the graph for a tensor that autograd keeps, and counts its storage once for as long as it lives."""

    def __init__(self, tensor: torch.Tensor, users: Counter, peak: list[int]):
        self.tensor, self.users = tensor, users
        storage = tensor.untyped_storage()
        self.key = (storage.data_ptr(), storage.nbytes())
        users[self.key] += 1
        if users[self.key] == 1:
            peak[0] = max(peak[0], sum(nbytes for (_, nbytes), count in users.items() if count))

    def __del__(self):
        self.users[self.key] -= 1


def activation_bytes(model: GPT, rows: int, precision: AbstractContextManager) -> int:
    """The most that autograd keeps at once in the forward of `rows` rows, parameters left out. `precision` is the
    context that the forward runs in."""
    users: Counter = Counter()
    peak = [0]
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor):
        return tensor if tensor.untyped_storage().data_ptr() in parameters else _Kept(tensor, users, peak)

    tokens = torch.zeros(rows, model.config.seq_len, dtype=torch.int32, device=model.wte.device)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: getattr(kept, "tensor", kept)), precision:
        model(tokens, tokens)
    return peak[0]


def available_bytes(device: str) -> int:
    """Memory that is free now."""
    return torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available


def check_state_fits(config: TrainConfig, model: GPTConfig, dtype: torch.dtype) -> None:
    """Raises InputError where parameters and optimizer alone would not fit: before any of them is allocated."""
    needed, available = state_bytes(model, dtype.itemsize), available_bytes(config.device)
    if needed * MARGIN > available:
        raise InputError(
            f"parameters and optimizer need about {needed * MARGIN / 2**30:.1f} GiB and {available / 2**30:.1f} GiB are"
            f" free on {config.device}: lower --depth, or prepare a smaller --vocab-size"
        )


def check_batch_fits(config: TrainConfig, model: GPT, precision: AbstractContextManager, available: int) -> None:
    """Raises InputError, naming the --device-batch-size that fits, where the configured one would not.

    `available` is in bytes, with parameters and optimizer already allocated.
    """
    one, two = (MARGIN * activation_bytes(model, rows, precision) for rows in (1, 2))
    per_row, fixed = two - one, 2 * one - two  # the gradient of lm_head is one for all rows
    rows = int((available - fixed) // per_row)
    if rows >= config.device_batch_size:
        return
    needed = fixed + per_row * config.device_batch_size
    line = (
        f"{config.device_batch_size} rows of {config.seq_len} tokens need about {needed / 2**30:.1f} GiB and"
        f" {available / 2**30:.1f} GiB are free on {config.device}"
    )
    # The largest that fits and divides the step evenly, so that nothing but the number of micro-steps changes.
    step_rows = config.total_batch_size // config.seq_len
    fitting = [n for n in range(1, rows + 1) if step_rows % n == 0]
    if not fitting:
        raise InputError(f"{line}, which is less than one row needs: lower --seq-len or --depth")
    raise InputError(f"{line}: use --device-batch-size {fitting[-1]}")
