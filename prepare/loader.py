"""Batches for training, packed in a thread of their own and, where asked, already on the GPU."""

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .dataset import Split
from .errors import InputError
from .packing import Packer

_POLL = 0.05  # seconds between two looks at whether the loader was closed


@dataclass(frozen=True)
class Batch:
    """`tokens` is int32 [B, T + 1]: inputs are [:, :-1], targets [:, 1:]; int32 is half the copy of int64.

    The memory is the batch's own: it may be kept.
    """

    tokens: torch.Tensor
    epoch: int  # of its last token, counted from 1
    index: int  # of the batch, counted from 0
    state: dict  # of the loader right after this batch; JSON can hold it


class Loader:
    """Endless iterator of batches.

    A batch carries the state that resumes right after it: what the thread has packed ahead is never state. An
    exception in the thread is raised by `next`. Close it, or use it as a context manager, to end the thread.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        seq_len: int,
        *,
        bos: int,
        packing: str = "lossless",
        seed: int = 0,
        device: str | torch.device | None = None,
        prefetch: int = 2,
        rank: int = 0,
        ranks: int = 1,
    ):
        """`device` a CUDA device: batches arrive there through pinned memory on a stream of the loader's own. Otherwise
        they stay on the CPU. `prefetch` batches are kept ready.

        Of several `ranks` each packs all batches, which costs little, and so has the state of all; those that another
        `rank` trains on, whose index is not `rank` modulo `ranks`, stay on the CPU.

        Raises InputError where the split is shorter than one batch.
        """
        if batch_size < 1 or prefetch < 1:
            raise InputError(f"batch size {batch_size}, prefetch {prefetch}: both take 1 or more")
        if split.num_tokens < batch_size * seq_len:
            raise InputError(
                f"the {split.name} split has {split.num_tokens:,} tokens, a batch takes {batch_size:,} * {seq_len:,} = "
                f"{batch_size * seq_len:,}: use a smaller batch or a shorter sequence, or prepare more text"
            )
        self.batch_size = batch_size
        self._split_name, self._bos = split.name, bos
        self._packer = Packer(split, seq_len, bos=bos, packing=packing, seed=seed)
        self._identity = {"split": split.sha256, "seq_len": seq_len, "bos": bos, "packing": packing, "seed": seed}
        self._copies = _CopiesToDevice(torch.device(device)) if _is_cuda(device) else None
        self._prefetch, self._rank, self._ranks = prefetch, rank, ranks
        self._index = 0  # of the next batch to pack
        self._state = self._pack_state()
        self._ready: queue.Queue = queue.Queue(prefetch)
        self._next = None  # taken from there, and not handed out yet
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._closed = False

    def __iter__(self) -> Iterator[Batch]:
        return self

    def start(self) -> None:
        """Begins to pack, and waits for the first batch: `next` has it at once. An error is raised there."""
        if self._closed:
            raise RuntimeError("the loader is closed")
        if self._thread is None:
            self._thread = threading.Thread(target=self._produce, name="loader", daemon=True)
            self._thread.start()
        if self._next is None:
            self._next = self._ready.get()

    def __next__(self) -> Batch:
        self.start()
        item, self._next = self._next, None
        if isinstance(item, BaseException):
            self.close()
            raise item
        batch, copied = item
        if copied is not None:
            # The consumer's stream waits for the copy, and the allocator for the consumer before reusing the memory.
            stream = torch.cuda.current_stream(batch.tokens.device)
            stream.wait_event(copied)
            batch.tokens.record_stream(stream)
        self._state = batch.state
        return batch

    @property
    def cropped_share(self) -> float:
        """Share of the tokens, up to the batch handed out last, that packing threw away: 0 where it is lossless."""
        packer = self._state["packer"]
        return packer["cropped"] / max(1, packer["cropped"] + packer["placed"])

    def state_dict(self) -> dict:
        """The state right after the batch handed out last."""
        return self._state

    def load_state_dict(self, state: dict) -> None:
        """Goes on right after the batch that `state` came with; the batch size may be another one.

        Raises InputError where the state belongs to other data, another sequence length, packing or seed.
        """
        for name, ours in self._identity.items():
            if state.get(name) != ours:
                raise InputError(
                    f"the loader's state was saved with {name} {state.get(name)!r} and this run has {ours!r}: "
                    "resume with the same data and settings"
                )
        self._end_thread()
        self._packer.load_state_dict(state["packer"])
        self._index = state["index"]
        self._state = state

    def close(self) -> None:
        self._closed = True
        self._end_thread()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _end_thread(self) -> None:
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join()
        self._thread = None
        self._stop = threading.Event()
        self._ready, self._next = queue.Queue(self._prefetch), None

    def _pack_state(self) -> dict:
        return self._identity | {"index": self._index, "packer": self._packer.state_dict()}

    def _produce(self) -> None:
        try:
            while not self._stop.is_set():
                self._put(self._pack())
        except BaseException as e:  # handed to the consumer, who can tell an interrupt from a bug
            self._put(e)

    def _put(self, item) -> None:
        while not self._stop.is_set():
            try:
                return self._ready.put(item, timeout=_POLL)
            except queue.Full:
                continue

    def _pack(self) -> tuple[Batch, "torch.cuda.Event | None"]:
        shape = (self.batch_size, self._packer.seq_len + 1)
        copies = self._copies if self._index % self._ranks == self._rank else None
        # Pinned memory comes from PyTorch's caching allocator, which gives a block out again only when the copies
        # that were queued from it are done: a fresh tensor a batch is cheap, and never overwritten under a copy.
        tokens = torch.empty(shape, dtype=torch.int32, pin_memory=copies is not None)
        for row in tokens.numpy():
            self._packer.fill(row)
        # Of a large corpus a bit that the disk has turned is not noticed at the start (prepare/dataset.py).
        if (largest := int(tokens.max())) > self._bos:
            raise InputError(
                f"the {self._split_name} shards hold token {largest:,} and the vocabulary ends at {self._bos:,}: one of"
                " them is damaged; `touch` them, and the next start hashes them all and says which"
            )
        copied = None
        if copies is not None:
            tokens, copied = copies.start(tokens)
        self._index += 1
        return Batch(tokens, self._packer.epoch, self._index - 1, self._pack_state()), copied


class _CopiesToDevice:
    """Copies to a GPU on a stream of its own, so that they run beside the training step."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def start(self, tokens: torch.Tensor) -> tuple[torch.Tensor, "torch.cuda.Event"]:
        with torch.cuda.stream(self.stream):
            on_device = tokens.to(self.device, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(self.stream)
        return on_device, copied


def _is_cuda(device: str | torch.device | None) -> bool:
    return device is not None and torch.device(device).type == "cuda"
