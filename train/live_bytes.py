"""How much memory a step would hold, counted on tensors of device "meta"."""

import math
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TooMuchError(Exception):
    """More is held than the limit of a `LiveBytes`: what comes after it is not worth counting."""


class LiveBytes(TorchDispatchMode):
    """Counts the memory of every tensor that is made while the mode is on, for as long as it lives.

    On tensors of device "meta" it is what an allocator without overhead would hand out, to the byte, with nothing
    allocated: `now` at any point, `peak` the most so far, both in bytes. Beyond `limit` bytes it raises TooMuchError.
    """

    def __init__(self, limit: float = math.inf):
        super().__init__()
        self.now = self.peak = 0
        self.limit = limit
        self.storages: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {storage._cdata for storage in _storages((args, kwargs))}
        out = function(*args, **(kwargs or {}))
        for storage in _storages(out):
            if storage._cdata not in given:  # else it is a view, perhaps of what was there before
                self._count(storage)
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, nbytes = storage._cdata, storage.nbytes()
        if key in self.storages:
            return
        self.storages.add(key)
        weakref.finalize(storage, self._release, key, nbytes)
        self.now += nbytes
        self.peak = max(self.peak, self.now)
        if self.now > self.limit:
            raise TooMuchError

    def _release(self, key: int, nbytes: int) -> None:
        self.storages.remove(key)
        self.now -= nbytes


def _storages(tree) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
