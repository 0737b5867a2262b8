"""Which of a run's processes this is, as `torchrun` says it in the environment. Known before PyTorch is imported."""

import os
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass

from prepare import InputError


@dataclass(frozen=True)
class Place:
    """Rank 0 of 1 is a process that nobody has started beside others."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among those of its machine
    local_size: int = 1
    attempt: int = 0  # how often torchrun has started these processes anew
    max_attempts: int = 0
    launch: str | None = None  # what all attempts of one torchrun have in common

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def launched(self) -> bool:
        """By torchrun, be it as a single process."""
        return self.launch is not None

    @property
    def starts_again(self) -> bool:
        """Whether torchrun starts all processes again when one of them fails."""
        return self.attempt < self.max_attempts


def place_of(environment: MutableMapping[str, str] = os.environ) -> Place:
    """Raises InputError where the environment holds but a part of it."""
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        return Place()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
    try:
        rank, size, local_rank, local_size, _ = (int(environment[name]) for name in names)
        environment["MASTER_ADDR"]
        attempt, most = (int(environment.get(f"TORCHELASTIC_{name}", 0)) for name in ("RESTART_COUNT", "MAX_RESTARTS"))
    except (KeyError, ValueError) as error:
        raise InputError(
            f"the environment names a rank, but not all that belongs to it ({error}): start several processes by"
            " torchrun, or unset RANK and WORLD_SIZE"
        ) from None
    launch = environment.get("TORCHELASTIC_RUN_ID", "none")
    if launch == "none":  # torchrun's name for every run that was given none; its own process outlives its restarts
        launch = f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}-{os.getppid()}"
    return Place(rank, size, local_rank, local_size, attempt, most, launch)


def take_one_gpu(place: Place, environment: MutableMapping[str, str] = os.environ) -> None:
    """Leaves this process its own GPU alone to see, so that "cuda" and device 0 are right wherever they are written.
    To be called before PyTorch looks at a GPU. Raises InputError where there are fewer than processes."""
    if place.local_size == 1:
        return
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    entries = [str(i) for i in range(place.local_size)] if visible is None else visible.split(",")
    if visible == "":
        return  # they are hidden: this is for the CPU
    if place.local_rank >= len(entries):
        raise InputError(
            f"{place.local_size} processes on this machine, and CUDA_VISIBLE_DEVICES names {len(entries)}: start"
            f" torchrun with --nproc-per-node {len(entries)}, or name more"
        )
    environment["CUDA_VISIBLE_DEVICES"] = entries[place.local_rank].strip()


@contextmanager
def quiet(place: Place) -> Iterator[None]:
    """Inside, nothing that is printed on a rank other than 0 is seen."""
    if place.first:
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield
