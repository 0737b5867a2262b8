"""A GPU's memory, as the interpreter of Triton does not show it: programs run at once, and not every address is theirs.

The interpreter runs the programs of a launch one after another, reads whatever lies at an address, and gives a zero to
a lane that is masked off. Here every address that a launch touches is written down, and four rules are checked, which
on a GPU nobody checks and whose breach is seldom seen twice:

    an address lies inside one of the tensors of the launch
    what one program writes, no other program reads or writes
    what a program has written it does not read back: threads of a program wait for each other at shared memory alone
    a lane that is masked off, and has no `other`, holds nothing of use (it is made NaN, or a large integer)
"""

from collections.abc import Iterable

import numpy as np
import torch

# Kernels that find their tensors in a table of addresses, by which nothing here knows them.
BY_ADDRESS = {"_adamw_kernel"}


class Accesses:
    """Of one launch: addresses of elements, each with the program that touched it, in the order of time."""

    def __init__(self, kernel: str, arguments: Iterable):
        self.kernel = kernel
        tensors = [getattr(a, "base", a) for a in arguments]  # a descriptor's is the tensor it describes
        storages = [t.untyped_storage() for t in tensors if isinstance(t, torch.Tensor)]
        self.ranges = {(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages}
        self.program = -1
        self.reads: list[tuple[np.ndarray, int, int]] = []  # addresses, program, moment
        self.writes: list[tuple[np.ndarray, int, int]] = []
        self.broken: list[str] = []

    def add(self, to: list, pointers, mask) -> None:
        addresses, mask = np.broadcast_arrays(pointers.data, mask.data)
        addresses = addresses[mask.astype(bool)].astype(np.int64)
        inside = np.zeros(addresses.shape, dtype=bool)
        last = max(1, pointers.get_element_ty().primitive_bitwidth // 8) - 1
        for start, stop in self.ranges:
            inside |= (addresses >= start) & (addresses + last < stop)
        if not inside.all() and self.kernel not in BY_ADDRESS:
            self.broken.append(f"{(~inside).sum()} addresses that are in no tensor of the launch")
            raise IndexError  # before they are read or written: they may be nobody's
        to.append((addresses, self.program, len(self.reads) + len(self.writes)))

    def check(self) -> None:
        """Raises AssertionError for what a GPU would not forgive."""
        if self.writes:
            written, writer, when_written = flat(self.writes)
            order = np.argsort(written, kind="stable")
            written, writer, when_written = written[order], writer[order], when_written[order]
            if ((written[1:] == written[:-1]) & (writer[1:] != writer[:-1])).any():
                self.broken.append("two programs write to one address")
        if self.writes and self.reads:
            read, reader, when_read = flat(self.reads)
            first = np.minimum(np.searchsorted(written, read), len(written) - 1)
            shared = written[first] == read
            if (shared & (writer[first] != reader)).any():
                self.broken.append("a program reads what another one writes")
            if (shared & (writer[first] == reader) & (when_written[first] < when_read)).any():
                self.broken.append("a program reads back what it wrote")
        assert not self.broken, f"{self.kernel}: {'; '.join(dict.fromkeys(self.broken))}"


def flat(accesses: list[tuple[np.ndarray, int, int]]) -> list[np.ndarray]:
    addresses, programs, moments = zip(*accesses, strict=True)
    sizes = [a.size for a in addresses]
    return [np.concatenate(addresses), np.repeat(programs, sizes), np.repeat(moments, sizes)]


def watch_memory(monkeypatch) -> None:
    """Checks every launch in Triton's interpreter. Does nothing where kernels are compiled."""
    if torch.cuda.is_available():
        return
    import triton.language as tl
    from triton.runtime.errors import InterpreterError
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

    launch, begin = GridExecutor.__call__, InterpreterBuilder.set_grid_idx
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    now: list[Accesses] = []

    def watched_launch(self, *args, **kwargs):
        now.append(accesses := Accesses(self.fn.__name__, [*args, *kwargs.values()]))
        try:
            return launch(self, *args, **kwargs)
        except InterpreterError:
            if not accesses.broken:
                raise
        finally:
            now.pop()
            accesses.check()

    def begin_program(self, *index):
        now[-1].program += 1
        begin(self, *index)

    def watched_load(self, pointers, mask, other, *rest, **options):
        now[-1].add(now[-1].reads, pointers, mask)
        loaded = load(self, pointers, mask, other, *rest, **options)
        # An `other` of one zero is taken for none by the interpreter.
        if other is not None or loaded.data.size == 1 or mask.data.all():
            return loaded
        data, element = np.array(loaded.data), pointers.get_element_ty()
        nothing = np.nan if data.dtype.kind == "f" else np.iinfo(data.dtype).max // 2
        data[~np.broadcast_to(mask.data.astype(bool), data.shape)] = 0x7FC0 if element == tl.bfloat16 else nothing
        return TensorHandle(data, element)

    def watched_store(self, pointers, value, mask, *rest):
        now[-1].add(now[-1].writes, pointers, mask)
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(GridExecutor, "__call__", watched_launch)
    monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", begin_program)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", watched_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", watched_store)
