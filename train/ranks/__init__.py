"""The processes of one run, a GPU each, and what they say to each other.

How many there are is no part of the result. What is added up is added here, in the order of the ranks, and never by a
collective whose order is its own: `all_to_all` and the gathers do no arithmetic, the small reductions are maxima, or
sums of which all terms but one are zero. A process by itself is rank 0 of 1, for which every call below is the
identity: the trainer has one code for any number.

torch.distributed does the sending: NCCL for a GPU's tensors, gloo for a CPU's and for everything said beside them.
"""

import json
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from threading import Thread
from time import monotonic, sleep
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from prepare import InputError

from ..place import Place

__all__ = ["ALONE", "LostRankError", "Place", "Ranks"]

T = TypeVar("T")
PATIENCE = 1800.0  # seconds that ranks wait for each other where no watchdog looks: one may prepare data, or tune
JOINING = 600.0  # seconds in which all of them have to be there
ASKING = 3.0  # seconds for a word with the store, which lives on the machine of rank 0
HEAD_START = 2.0  # seconds in which rank 0, if it is alive, finds that another is gone


class LostRankError(Exception):
    """Another process of the run has ended, or cannot be reached any more."""


def _named(*names: str) -> Callable:
    """The first of these functions of torch.distributed that there is: later releases renamed some."""
    return next(getattr(dist, name) for name in names if hasattr(dist, name))


class Ranks:
    """All processes of a run, seen from one of them, which `join` connects with the others.

    Every method but `where`, `speaks` and `close` is a collective: all ranks call it, in the same order. Raises
    LostRankError.
    """

    def __init__(self, place: Place):
        self.place, self.rank, self.size, self.first = place, place.rank, place.size, place.first
        self._store, self._voice = None, None
        self.together = False  # whether all ranks know that the run ends here, and how

    def join(self, cuda: bool, timeout: float = 0.0, store: dist.Store | None = None) -> None:
        """`timeout`: seconds that a collective may take at least; those of the watchdog. `store`: where the processes
        find each other (default: where torchrun says)."""
        if self.size == 1:
            return
        place = self.place
        with _losing():
            store = store or next(dist.rendezvous("env://", timeout=timedelta(seconds=JOINING)))[0]
            # One store outlives the restarts of torchrun, with the addresses of the dead in it: every attempt has names
            # of its own there (github.com/pytorch/pytorch/issues/135712).
            self._store = dist.PrefixStore(f"timebox-{place.attempt}", store)
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if cuda else "gloo", store=self._store, rank=self.rank, world_size=self.size,
                timeout=timedelta(seconds=max(PATIENCE, 2 * timeout)),
            )  # fmt: skip

    def close(self) -> None:
        """At the end that all come to `together`. Rank 0 has the most to do there, and torchrun ends all processes as
        soon as one has failed: so the others wait for it. Raises nothing."""
        if self._store is None:
            return
        try:
            if self.first:
                self._store.set("done", "1")
            end = monotonic() + PATIENCE
            while monotonic() < end and not self._store.check(["done"]):
                sleep(0.05)
            dist.destroy_process_group()
        except RuntimeError:  # the machine with the store is gone, and rank 0 with it
            pass

    # What moves tensors of a step. The tensors are contiguous, and lie where the model does.

    def all_to_all(self, received: Tensor, sent: Tensor) -> None:
        """Part r of `sent` [size·n] goes to rank r; part r of `received` is what rank r had for this one."""
        with _losing():
            dist.all_to_all_single(received, sent)

    def reduce_scatter(self, part: Tensor, summed: Tensor) -> None:
        """`part` [n] becomes this rank's part of the sum over ranks of `summed` [size·n], in an order of the backend's
        own."""
        with _losing():
            _named("reduce_scatter_single", "reduce_scatter_tensor")(part, summed)

    def all_gather(self, whole: Tensor, part: Tensor) -> None:
        """`whole` [size·n] becomes the parts [n] of all ranks; `part` may be this rank's part of it."""
        if self.size > 1:
            with _losing():
                _named("all_gather_single", "all_gather_into_tensor")(whole, part)

    def gather(self, part: Tensor) -> Tensor | None:
        """On rank 0 the parts [n] of all ranks, one behind the other; None elsewhere."""
        if self.size == 1:
            return part
        whole = part.new_empty(self.size * part.numel()) if self.first else None
        with _losing():
            dist.gather(part, list(whole.view(self.size, -1)) if self.first else None, dst=0)
        return whole

    def scatter(self, part: Tensor, whole: Tensor | None) -> None:
        """`part` [n] becomes this rank's part of what rank 0 gives as `whole` [size·n]."""
        if self.size == 1:
            part.copy_(whole)
            return
        with _losing():
            dist.scatter(part, list(whole.view(self.size, -1)) if self.first else None, src=0)

    def add_up(self, terms: Tensor) -> Tensor:
        """The sum over ranks, where each term is zero on all ranks but one: exact, in whatever order."""
        if self.size > 1:
            with _losing():
                dist.all_reduce(terms)
        return terms

    # What they tell each other beside that, through the host.

    def agree(self, *numbers: float) -> list[float]:
        """The largest of each, over the ranks."""
        if self.size == 1:
            return [*numbers]
        largest = torch.tensor(numbers, dtype=torch.float64)
        with _losing():
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest.tolist()

    def each(self, value: Any) -> list[Any]:
        """What every rank gives, in their order. Anything that JSON can hold."""
        if self.size == 1:
            return [value]
        data = json.dumps(value).encode()
        longest = int(self.agree(len(data))[0])
        sent = torch.frombuffer(bytearray(data.ljust(longest)), dtype=torch.uint8)
        received = torch.empty(self.size * longest, dtype=torch.uint8)
        self.all_gather(received, sent)
        return [json.loads(row.numpy().tobytes()) for row in received.view(self.size, -1)]

    def of_first(self, value: T) -> T:
        """What rank 0 gives, whatever the others do."""
        return self.each(value if self.first else None)[0]

    def all_do(self, work: Callable[[], T]) -> T:
        """`work()`, on every rank. What it raises of InputError and OSError on one is raised on all."""
        if self.size == 1:
            return work()
        result, error = None, None
        try:
            result = work()
        except (InputError, OSError) as raised:
            error = raised
        self._raise_together(error)
        return result

    def first_does(self, work: Callable[[], T]) -> T | None:
        """`work()` on rank 0 alone, None elsewhere. What it raises is raised on all."""
        return self.all_do(lambda: work() if self.first else None)

    def in_turn(self, work: Callable[[], T]) -> T:
        """`work()`, on the first rank of each machine before the others: they find what it has made."""
        leads = self.place.local_rank == 0
        early = self.all_do(lambda: work() if leads else None)
        late = self.all_do(lambda: None if leads else work())
        return early if leads else late

    def _raise_together(self, error: Exception | None) -> None:
        said = self.each(None if error is None else f"{error}")
        failed = [rank for rank, text in enumerate(said) if text is not None]
        if not failed:
            return
        self.together, self._voice = True, self.rank == failed[0]
        if error is not None and self._voice:
            alike = len(failed) == self.size
            raise error if alike or not isinstance(error, InputError) else InputError(f"{error} ({self.where()})")
        raise InputError(said[failed[0]])

    def where(self) -> str:
        return f"rank {self.rank}, on {socket.gethostname()}"

    # Who says how the run ended.

    def speaks(self) -> bool:
        """Whether this rank is the one that says what has ended the run, and writes its row. Where all come `together`
        to the same end it is rank 0. Otherwise it is the first that asks: the others may be gone, or have but noticed
        that it is. Rank 0 asks before the others, since it alone knows of a checkpoint that is being written."""
        if self._voice is None:
            self._voice = self.first if self.together else self._asks_first()
        return self._voice

    def _asks_first(self) -> bool:
        if self._store is None:
            return self.first
        answers = []

        def ask() -> None:
            with suppress(RuntimeError):
                end = monotonic() + (0.0 if self.first else HEAD_START)
                while monotonic() < end and not self._store.check(["ended"]):
                    sleep(0.02)
                answers.append(self._store.add("ended", 1))

        asking = Thread(target=ask, daemon=True)
        asking.start()
        asking.join(HEAD_START + ASKING)
        return answers in ([], [1])  # where the store cannot be reached each side says it


@contextmanager
def _losing() -> Iterator[None]:
    """What the backends raise when a connection is cut, or a rank does not answer in time."""
    try:
        yield
    except RuntimeError as error:
        said = re.sub(r"^\[[^]]*\] ", "", " ".join(str(error).split()))[:300]  # without the line of gloo's source
        raise LostRankError(f"another rank is gone, or does not answer ({said})") from None


ALONE = Ranks(Place())
