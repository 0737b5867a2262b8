"""`--gpu`: which GPU a run takes, where several runs share a machine.

A lease is a lock on a file that is named after the GPU, in `$TIMEBOX_HOME/leases`. The kernel gives it back when the
process ends, however it ends. Nobody hands leases out: who finds none waits, and looks again. Whoever trains without
`--gpu` asks for none and is kept from none.
"""

import json
import os
import platform
import re
import select
import subprocess
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic, sleep

from prepare import InputError
from prepare.home import home
from prepare.words import printable

from .resilience.durable import NoLocksError, try_lock

ANY = "any"
LOOK = 0.5  # seconds from one look for a free GPU to the next
LENT = "TIMEBOX_LENT"  # in the environment of a process that is given a lease by the one that starts it
GO, NOT_NEEDED = b"g", b"n"  # what one of several runs is told (`Turn`)
QUERY = ["nvidia-smi", "--query-gpu=index,uuid,name", "--format=csv,noheader"]


@dataclass(frozen=True)
class Gpu:
    index: str  # as nvidia-smi counts
    uuid: str
    name: str

    def __str__(self) -> str:
        return f"{self.index}, {self.name} ({self.uuid})"


@dataclass(frozen=True)
class Lease:
    """Of `gpu`, as long as any process has `descriptor` open."""

    gpu: Gpu
    descriptor: int

    def sign(self) -> None:
        """Writes down which process has it, for those that wait."""
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, f"{platform.node()} {os.getpid()}\n".encode(), 0)

    def give_back(self) -> None:
        os.close(self.descriptor)

    def environment(self, turn: int) -> dict[str, str]:
        """For a process that is to have the lease, and inherits its descriptor and `turn`."""
        return {LENT: json.dumps({**asdict(self.gpu), "descriptor": self.descriptor, "turn": turn})}


def folder() -> Path:
    return home() / "leases"


def gpus(wanted: str, environment: MutableMapping[str, str] = os.environ) -> list[Gpu]:
    """Those that `--gpu wanted` may mean: every one that this process may see, or the one of this number or UUID.
    Raises InputError where there is none."""
    there = _listed(wanted)
    if (visible := environment.get("CUDA_VISIBLE_DEVICES")) is not None:
        there = _visible(there, visible)
        if not there:
            raise InputError(f"--gpu {wanted}: CUDA_VISIBLE_DEVICES={visible} leaves no GPU to see: unset it")
    if wanted == ANY:
        return there
    found = [gpu for gpu in there if wanted and (wanted == gpu.index or gpu.uuid.startswith(wanted))]
    if len(found) != 1:
        names = ", ".join(f"{gpu.index} ({gpu.uuid})" for gpu in there)
        raise InputError(f"--gpu {wanted}: name one of {names}, or any")
    return found


def _listed(wanted: str) -> list[Gpu]:
    """By nvidia-smi, whose numbers are in the order of the bus."""
    mend = "leave --gpu out to train without"
    try:
        done = subprocess.run(QUERY, capture_output=True, text=True, errors="replace", timeout=60)
    except FileNotFoundError:
        raise InputError(f"--gpu {wanted}: there is no nvidia-smi, so no GPU is known here: {mend}") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InputError(f"--gpu {wanted}: nvidia-smi does not answer ({type(error).__name__}): {mend}") from None
    rows = [[cell.strip() for cell in line.split(",", 2)] for line in done.stdout.splitlines()]
    found = [Gpu(*row) for row in rows if len(row) == 3 and row[0].isdigit() and row[1].startswith("GPU-")]
    if done.returncode or not found:
        said = " ".join((done.stdout + done.stderr).split())[:200] or f"exit code {done.returncode}"
        raise InputError(f"--gpu {wanted}: nvidia-smi names no GPU ({said}): {mend}")
    return found


def _visible(there: Sequence[Gpu], visible: str) -> list[Gpu]:
    """As CUDA reads CUDA_VISIBLE_DEVICES: numbers, UUIDs or their beginnings, up to the first that is neither. A part
    of a GPU (MIG) goes by its own name, which nvidia-smi's list does not have."""
    found = []
    for entry in (entry.strip() for entry in visible.split(",")):
        if entry.startswith("MIG-"):
            found.append(Gpu(entry, entry, "a part of a GPU"))
            continue
        same = [gpu for gpu in there if entry == gpu.index or (entry[:4] == "GPU-" and gpu.uuid.startswith(entry))]
        if len(same) != 1:
            break
        found += [gpu for gpu in same if gpu not in found]
    return found


def free(among: Sequence[Gpu]) -> Lease | None:
    """A lease of the first that nobody has; None where all are lent. Raises InputError where there are no locks."""
    place = folder()
    place.mkdir(parents=True, exist_ok=True)
    for gpu in among:
        descriptor = os.open(_file_of(gpu), os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if try_lock(descriptor):
                lease, descriptor = Lease(gpu, descriptor), None
                lease.sign()
                return lease
        except NoLocksError as error:
            raise InputError(
                f"the file system of {place} has no locks ({error.strerror}), so no GPU can be lent: set TIMEBOX_HOME"
                " to a disk of this machine, or CUDA_VISIBLE_DEVICES in place of --gpu"
            ) from None
        finally:
            if descriptor is not None:
                os.close(descriptor)
    return None


def _file_of(gpu: Gpu) -> Path:
    return folder() / re.sub(r"[^\w-]", "_", gpu.uuid)


def waited_for(among: Sequence[Gpu]) -> Lease:
    """The first that becomes free."""
    told = False
    while (lease := free(among)) is None:
        if not told:
            what = f"GPU {among[0].index} is" if len(among) == 1 else f"all {len(among)} GPUs are"
            print(f"gpu:    {what} lent ({holders(among)}): waiting, until Ctrl-C", flush=True)
        told = True
        sleep(LOOK)
    return lease


def holders(among: Sequence[Gpu]) -> str:
    """As they signed: by machine and process."""
    found = []
    for gpu in among:
        try:
            found.append(printable(_file_of(gpu).read_text(errors="replace").strip()) or "unknown")
        except OSError:
            found.append("unknown")
    return ", ".join(found)


def others_lent(own: str = "") -> int:
    """How many GPUs of this machine are lent at this moment, beside those whose UUIDs `own` names."""
    count = 0
    for path in folder().glob("*") if folder().is_dir() else ():
        try:
            descriptor = os.open(path, os.O_RDWR)
        except OSError:
            continue
        try:
            here = os.read(descriptor, 300).decode(errors="replace").startswith(f"{platform.node()} ")
            count += here and path.name not in own and not try_lock(descriptor)
        except OSError:
            continue
        finally:
            os.close(descriptor)
    return count


@dataclass(frozen=True)
class Turn:
    """When a run is to be judged that is one of several (`at_once`): it is told so at `descriptor`."""

    descriptor: int

    def wait(self, beat: Callable[[], None]) -> bool:
        """Whether the run is needed. `beat` is called as long as it waits. Where nobody is left to tell it, its turn
        has come."""
        while not select.select([self.descriptor], [], [], 1.0)[0]:
            beat()
        return os.read(self.descriptor, 1) != NOT_NEEDED


@dataclass(frozen=True)
class Lent:
    """How a process came to its GPU."""

    waited: float = 0.0  # seconds
    turn: Turn | None = None  # of one of several that run at once


held: list[Lease] = []  # by this process, until it ends: so long it has memory on the GPU


def take(wanted: str | None, environment: MutableMapping[str, str] = os.environ) -> Lent:
    """From here on the process sees the GPU that it has a lease of, and no other. To be called before PyTorch looks at
    a GPU. With `wanted` None nothing is taken. Raises InputError."""
    if wanted is None:
        return Lent()
    turn, began = None, monotonic()
    if given := environment.pop(LENT, None):
        of = json.loads(given)
        lease, turn = Lease(Gpu(of["index"], of["uuid"], of["name"]), of["descriptor"]), Turn(of["turn"])
        for descriptor in (lease.descriptor, turn.descriptor):
            os.set_inheritable(descriptor, False)  # what this process starts does not outlive the lease
        lease.sign()
    else:
        lease = waited_for(gpus(printable(wanted), environment))
    held.append(lease)
    environment["CUDA_VISIBLE_DEVICES"] = lease.gpu.uuid
    print(f"gpu:    {printable(lease.gpu)}", flush=True)
    return Lent(monotonic() - began, turn)
