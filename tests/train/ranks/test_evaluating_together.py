"""`--eval-every` on several ranks: all come to it at the same step, and it is the evaluation of one rank alone."""

import json
import random
from functools import partial

import numpy as np
import pytest
import torch

import train.evaluating
from tests.helpers.ranks import nothing, run_ranks
from tests.helpers.tiny_run import assert_same
from train.clock import HostClock
from train.resilience.checkpoint import checkpoint_folders, read_checkpoint
from train.results.evals import read_evals
from train.step import TrainStep

ARGS = ["--steps", "10", "--untimed-steps", "3", "--keep-checkpoints", "--eval-tokens", "4096",
        "--total-batch-size", "512"]  # fmt: skip


def four_batches(before, rank: int) -> None:
    train.evaluating.PART = 2
    before(rank)


def go(size, corpus, folder, *args, before=nothing):
    ended = run_ranks(size, folder.parent / f"{folder.name}-streams", "--data", str(corpus), "--run-dir", str(folder),
                      *args, before=partial(four_batches, before))  # fmt: skip
    assert [each.code for each in ended] == [0] * size, ended
    assert all(each.out == "" for each in ended[1:])
    return ended


def numbers(folder) -> list[tuple]:
    return [(row["step"], row["val_bpb"], row["val_rows"], row["sample"]) for row in read_evals(folder)]


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "alone"
    go(1, corpus, folder, *ARGS)
    return folder


@pytest.fixture(scope="module")
def evaluated(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "evaluated"
    go(1, corpus, folder, *ARGS, "--eval-every", "4")
    return folder


def draws_on_rank_0(rank: int) -> None:
    """The words that rank 0 alone writes would draw from every generator of its process."""
    inside = train.evaluating.sampled

    def greedy(*args) -> str:
        assert rank == 0
        torch.rand(3), np.random.rand(3), random.random()
        return inside(*args)

    train.evaluating.sampled = greedy


def test_it_changes_no_bit_and_is_the_same_on_two_ranks(corpus, tmp_path, alone, evaluated):
    ended = go(2, corpus, tmp_path / "run", *ARGS, "--eval-every", "4", before=draws_on_rank_0)
    assert_same(tmp_path / "run", alone)
    assert numbers(tmp_path / "run") == numbers(evaluated)
    assert [step for step, *_ in numbers(tmp_path / "run")] == [4, 8]
    ends = [read_checkpoint(checkpoint_folders(run / "checkpoints")[0]) for run in (tmp_path / "run", alone)]
    assert ends[0].values["rng"]["torch"] == ends[1].values["rng"]["torch"]
    assert ended[0].out.count("\neval 0") == 2


def slow_clock_on_rank_1(rank: int) -> None:
    HostClock.seconds = lambda self, start, end: 1.0 if rank == 0 else 100.0


def test_by_seconds_it_is_rank_0s_clock_that_counts(corpus, tmp_path):
    """However slow another seems to itself: else one would wait for a step, and the other for an evaluation."""
    go(2, corpus, tmp_path / "run", *ARGS, "--eval-every", "2.5s", before=slow_clock_on_rank_1)
    assert [step for step, *_ in numbers(tmp_path / "run")] == [6, 8]  # the first three steps are not timed


def scarce_on_rank_1(rank: int) -> None:
    token_losses = TrainStep.token_losses

    def scarce(self, inputs, targets):
        if rank == 1 and len(inputs) == 4 and self.optimizer.ranks.size == 2 and scarce.left:
            scarce.left -= 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return token_losses(self, inputs, targets)

    scarce.left = 1
    TrainStep.token_losses = scarce


def test_where_the_memory_of_one_rank_runs_out_all_take_fewer_rows(corpus, tmp_path, alone, evaluated):
    ended = go(2, corpus, tmp_path / "run", *ARGS, "--eval-every", "4", before=scarce_on_rank_1)
    assert "note: out of memory: going on with 2 rows at a time" in ended[0].err
    assert_same(tmp_path / "run", alone)
    for (step, bpb, *_), (then, whole, *_) in zip(numbers(tmp_path / "run"), numbers(evaluated), strict=True):
        assert step == then
        assert bpb == pytest.approx(whole)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["audit"] == "ok"
