"""Several ranks on one machine, forked from the test: PyTorch is imported once, and gloo connects them."""

import faulthandler
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Timer
from typing import Any

import torch
import torch.distributed as dist

import train.__main__
import train.device
from tests.helpers.tiny_run import TINY
from train.ranks import Place, Ranks

PATIENCE = 120.0  # seconds, after which what still runs is killed


@dataclass
class Ended:
    """How a process ended, and what it printed."""

    code: int  # negative: by this signal
    out: str
    err: str


def fork(
    size: int, folder: Path, work: Callable[[int], int], at_end: Callable[[int], None] = lambda rank: None
) -> list[Ended]:
    """`work(rank)` in `size` processes of one thread each; it returns the exit code. One that has stopped itself is
    killed when the others have ended. `at_end(rank)` is called here as soon as a rank has ended."""
    folder.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    pids = [os.fork() or _child(folder, rank, work) for rank in range(size)]
    timers = [Timer(PATIENCE, os.kill, (pid, signal.SIGKILL)) for pid in pids]
    for timer in timers:
        timer.start()
    codes, stopped = {}, set()
    while len(codes) < size:
        for pid in [pid for pid in pids if pid not in codes]:
            changed, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
            if changed and os.WIFSTOPPED(status):
                stopped.add(pid)
            elif changed:
                codes[pid] = os.waitstatus_to_exitcode(status)
                at_end(pids.index(pid))
        if len(codes) + len(stopped - codes.keys()) == size:
            for each in stopped - codes.keys():
                os.kill(each, signal.SIGKILL)
        time.sleep(0.005)
    for timer in timers:
        timer.cancel()
    texts = [[(folder / f"{rank}.{name}").read_text() for name in ("out", "err")] for rank in range(size)]
    return [Ended(codes[pid], *text) for pid, text in zip(pids, texts, strict=True)]


def _child(folder: Path, rank: int, work: Callable[[int], int]) -> None:
    """Never returns: nothing of pytest runs in it."""
    code = 1
    try:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(folder / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        faulthandler.dump_traceback_later(PATIENCE - 20, file=sys.stderr)  # who waits, and for what
        torch.set_num_threads(1)
        # CUDA does not survive a fork, where another test has begun to use it.
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

    def child(rank: int) -> int:
        ranks = Ranks(Place(rank, size, rank, size))
        ranks.join(False, store=dist.FileStore(str(folder / "store"), size))
        (folder / f"{rank}.json").write_text(json.dumps(work(ranks)))
        ranks.agree(0)  # none leaves while another still talks to it
        return 0

    ended = fork(size, folder, child)
    assert not any(each.code for each in ended), [each.err for each in ended]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]


def run_ranks(
    size: int, folder: Path, *args: str, before: Callable[[int], None] = lambda rank: None,
    at_end: Callable[[int], None] = lambda rank: None,
) -> list[Ended]:  # fmt: skip
    """`python -m train` of a tiny model on `size` ranks, as torchrun would start them. `before(rank)` is called in each
    process first."""
    agent = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # which outlives every rank
    agent.set("ready", "")
    agent.get("ready")  # its thread has begun: one that is forked while it does may find a lock that nobody gives back

    def child(rank: int) -> int:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
        if size > 1:
            os.environ |= dict(zip(names, map(str, (rank, size, rank, size, agent.port)), strict=True))
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
        before(rank)
        return train.__main__.main([*args] if "--resume" in args else [*TINY, *args])

    return fork(size, folder, child, at_end)
