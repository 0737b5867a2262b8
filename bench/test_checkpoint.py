"""What a checkpoint costs: `pytest bench/test_checkpoint.py --benchmark-only`.

The default GPU model, 50.3M parameters, whose masters and moments are 503 MB, wherever it runs. `blocks` is the time
that training stands still; `writing` what the thread then takes, alone; `step beside` a step of the CPU's default
configuration repeated for as long as the thread writes, against the same step alone: what the writing slows. A folder
on the disk in question is named with `--basetemp`.
"""

import time
from statistics import median

import pytest
import torch

from model import GPT
from prepare import Batch
from train.budget import Budget
from train.config import TrainConfig, resolve
from train.optimizer import Optimizer
from train.resilience.checkpoint import Checkpointer
from train.resilience.state import RunState
from train.schedule import StepValues
from train.step import TrainStep

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VALUES = StepValues(0, 1.0, 0.85, 0.2)


class NoLoader:
    """A loader's state is some 25 kB of JSON, which is nothing here."""

    def state_dict(self) -> dict:
        return {}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    config = resolve(TrainConfig(), "cuda")
    model = GPT(config.model_config(8192), device=DEVICE)
    optimizer = Optimizer(model, config, torch.bfloat16 if DEVICE == "cuda" else torch.float32)
    for tensor in optimizer.state().values():
        tensor.fill_(0.5)  # memory never written to is read from one page of zeros, which is no copy to speak of
    run = tmp_path_factory.mktemp("run")
    (run / "metrics.jsonl").touch()
    taken = Checkpointer(run / "checkpoints", RunState(optimizer, NoLoader(), Budget(60.0)), 60.0, {})
    assert len(taken.bytes) > 500e6
    yield taken
    taken.wait()


def save(checkpoints: Checkpointer) -> None:
    checkpoints.state.budget.step += 1
    checkpoints.save()


def test_blocks(benchmark, checkpoints):
    """The snapshot alone: each waits for the writer of the one before, outside the time taken."""
    benchmark.pedantic(lambda: save(checkpoints), setup=checkpoints.wait, rounds=7, warmup_rounds=1)
    checkpoints.wait()
    benchmark.extra_info["MB"] = round(len(checkpoints.bytes) / 1e6)
    benchmark.extra_info["% of 60 s"] = round(100 * benchmark.stats.stats.median / 60, 2)


def test_writing(benchmark, checkpoints):
    """Hashing, writing and syncing, with nothing beside it."""
    benchmark.pedantic(checkpoints.wait, setup=lambda: save(checkpoints), rounds=3)


@pytest.mark.skipif(DEVICE == "cuda", reason="the writer has a core of its own beside a GPU")
def test_step_beside(benchmark, checkpoints):
    """Steps while one checkpoint is written. `slowed` is how much longer they took than as many alone, in seconds a
    checkpoint: together with `blocks` its whole price."""
    config = resolve(TrainConfig(), "cpu")
    model = GPT(config.model_config(1024))
    model.init_weights(0)
    step = TrainStep(model, Optimizer(model, config), config.autocast)
    tokens = torch.randint(1024, (config.device_batch_size, config.seq_len + 1), dtype=torch.int32)
    batches = [Batch(tokens, 1, 0, {})]

    def one() -> float:
        start = time.perf_counter()
        step(batches, VALUES)[1].item()
        return time.perf_counter() - start

    alone = median([one() for _ in range(20)][5:])

    def while_it_writes() -> list[float]:
        save(checkpoints)
        times = []
        while checkpoints.writer.is_alive():
            times.append(one())
        return times

    rounds = []
    checkpoints.wait()
    benchmark.pedantic(lambda: rounds.append(while_it_writes()), setup=checkpoints.wait, rounds=3)
    checkpoints.wait()
    benchmark.extra_info["ms alone"] = round(1e3 * alone, 1)
    benchmark.extra_info["ms beside"] = round(1e3 * median(time for times in rounds for time in times), 1)
    benchmark.extra_info["slowed, s"] = round(median(sum(times) - alone * len(times) for times in rounds), 2)
