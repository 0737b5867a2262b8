"""Several ranks on one machine, connected by gloo.

They are forked from a process that has imported PyTorch and done nothing else. A test's own process has threads, of
libraries and of the tests before it, and what is forked while one of them holds a lock waits for that lock for ever. So
what a rank does is a function of a module, or a `partial` of one, sent there by its name; and nothing that a test
patches in its own process is patched there.
"""

import faulthandler
import gc
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import chdir
from dataclasses import dataclass
from functools import partial
from multiprocessing import forkserver
from pathlib import Path
from threading import RLock
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from tqdm import tqdm

import train.__main__
import train.device
from tests.helpers.alike import no_machines_memory, short_end
from tests.helpers.tiny_run import TINY
from train.config import ROOT
from train.ranks import Place, Ranks

PATIENCE = 120.0  # seconds, after which what still runs is killed, and the test fails with what it was doing
IMPORTED = [__name__, "train.trainer", "train.experiment", "train.results.record", "scipy.stats", "torch._dynamo"]


@dataclass
class Ended:
    """How a process ended, and what it printed."""

    code: int  # negative: by this signal
    out: str
    err: str


def nothing(rank: int) -> None:
    pass


def fork(
    size: int, folder: Path, work: Callable[[int], int], at_end: Callable[[int], None] = nothing
) -> list[Ended]:
    """`work(rank)` in `size` processes of one thread each; it returns the exit code. One that has stopped itself is
    killed when the others have ended. `at_end(rank)` is called here as soon as a rank has ended."""
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    with chdir(ROOT):  # where the process that is forked finds what it imports
        context.set_forkserver_preload(IMPORTED)
        forkserver.ensure_running()
    ranks = [context.Process(target=_rank, args=(folder, rank, work, {**os.environ})) for rank in range(size)]
    for each in ranks:
        each.start()
    end, late, running = time.monotonic() + PATIENCE, [], dict(enumerate(ranks))
    while running:
        for rank in [rank for rank, each in running.items() if each.exitcode is not None]:
            del running[rank]
            at_end(rank)
        late = late or [*running] * (time.monotonic() > end)
        if late or all(_stopped(each.pid) for each in running.values()):
            for each in running.values():
                each.kill()
        time.sleep(0.005)
    texts = [[(folder / f"{rank}.{name}").read_text() for name in ("out", "err")] for rank in range(size)]
    assert not late, "\n".join(f"rank {rank} of {size} did not end:\n{''.join(texts[rank])}" for rank in late)
    return [Ended(each.exitcode, *text) for each, text in zip(ranks, texts, strict=True)]


def _stopped(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return False


def _rank(folder: Path, rank: int, work: Callable[[int], int], environment: dict[str, str]) -> None:
    code = 1
    gc.freeze()  # thousands of modules, which no collection need look at
    try:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(folder / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        faulthandler.dump_traceback_later(PATIENCE - 20, file=sys.stderr)  # who waits, and for what
        os.environ.clear()
        os.environ.update(environment)
        no_machines_memory(pytest.MonkeyPatch())
        short_end(pytest.MonkeyPatch())
        torch.set_num_threads(1)
        tqdm.set_lock(RLock())  # instead of a semaphore, which outlives a process that is killed
        # Whatever a test hides, or pretends: this is for the CPU.
        torch.cuda.is_available = lambda: False
        train.device.why_no_gpu = lambda: ""
        code = work(rank)
    except SystemExit as exit:
        code = exit.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def on_ranks(size: int, folder: Path, work: Callable[[Ranks], Any]) -> list[Any]:
    """What `work` returns on each of `size` connected ranks; JSON can hold it."""
    ended = fork(size, folder, partial(_connected, size, folder, work))
    assert not any(each.code for each in ended), [each.err for each in ended]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]


def _connected(size: int, folder: Path, work: Callable[[Ranks], Any], rank: int) -> int:
    ranks = Ranks(Place(rank, size, rank, size))
    ranks.join(False, store=dist.FileStore(str(folder / "store"), size))
    (folder / f"{rank}.json").write_text(json.dumps(work(ranks)))
    ranks.agree(0)  # none leaves while another still talks to it
    return 0


def run_ranks(
    size: int, folder: Path, *args: str, before: Callable[[int], None] = nothing,
    at_end: Callable[[int], None] = nothing,
) -> list[Ended]:  # fmt: skip
    """`python -m train` of a tiny model on `size` ranks, as torchrun would start them. `before(rank)` is called in each
    process first."""
    agent = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # which outlives every rank
    return fork(size, folder, partial(_trains, size, agent.port, args, before), at_end)


def _trains(size: int, port: int, args: tuple[str, ...], before: Callable[[int], None], rank: int) -> int:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
    if size > 1:
        os.environ |= dict(zip(names, map(str, (rank, size, rank, size, port)), strict=True))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    before(rank)
    return train.__main__.main([*args] if "--resume" in args else [*TINY, *args])
