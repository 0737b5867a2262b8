"""What several ranks send each other in a step: `pytest bench/test_collectives.py --benchmark-only`.

On a machine with several GPUs one rank each, by NCCL; on a CPU two ranks of one thread each, by gloo. The ranks are
processes of their own (bench/collectives.py, which also runs over several machines); the time that is kept is that of
an exchange, and the rest is in the JSON and printed.
"""

import json
import subprocess
import sys

import pytest
import torch

from bench.conftest import DEVICE
from bench.suite.replay import device_time, replay
from train.config import ROOT
from train.tune.timing import Timing

RANKS = torch.cuda.device_count() if DEVICE == "cuda" else 2


@pytest.mark.skipif(RANKS < 2, reason="one GPU has nobody to send to")
@pytest.mark.benchmark(timer=device_time)
@pytest.mark.parametrize("sums", ["ordered", "native"])
def test_collectives(benchmark, tmp_path, capsys, sums):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS), "-m",
               "bench.collectives", "--json", str(tmp_path / "found.json"), "--sums", sums]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with capsys.disabled():
        print(f"\n{done.stdout}", end="")
    found = json.loads((tmp_path / "found.json").read_text())
    replay(benchmark, Timing(found["exchange_seconds"], "host clock"))
    benchmark.extra_info["collectives"] = found
