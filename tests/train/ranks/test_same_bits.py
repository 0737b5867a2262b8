"""The number of ranks is no part of the result: a step's bits, and what must break them."""

import dataclasses
import itertools
import math
from functools import partial
from pathlib import Path

import pytest
import torch

import kernels
from model import GPT
from prepare import Batch, Dataset, Loader
from tests.helpers.ranks import on_ranks
from tests.helpers.small_step import endless_batches
from train.config import TrainConfig, resolve
from train.optimizer import Optimizer
from train.ranks import Ranks
from train.resilience.tensors import digest
from train.schedule import StepValues
from train.step import TrainStep

STEPS = 3


def configuration(micro_steps: int, **options) -> TrainConfig:
    """Three layers, which neither two ranks nor four share evenly; fewer key-value heads than heads; every trick."""
    return resolve(
        TrainConfig(
            depth=3, d_model=64, head_dim=16, num_kv_heads=2, seq_len=32, device_batch_size=4,
            total_batch_size=128 * micro_steps, autocast=False, **options,
        ), "cpu",
    )  # fmt: skip


def steps(micro_steps: int, ranks: Ranks, forward_dtype: str = "float32", ops: str = "cpu", **options) -> dict:
    """A few steps on `ranks`: losses, whether all was good, and hashes of what is left."""
    config = configuration(micro_steps, **options)
    kernels.set_ops(ops)
    model = GPT(config.model_config(300))
    model.init_weights(1)
    with torch.no_grad():  # away from initialisation, where most gradients are zero
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    step = TrainStep(model, Optimizer(model, config, getattr(torch, forward_dtype), ranks))
    before = hash_of(model)
    batches, losses, good = endless_batches(), [], []
    for number in range(STEPS):
        given = [dataclasses.replace(b, tokens=b.tokens % 300) for b in itertools.islice(batches, micro_steps)]
        loss, was_good = step(given, StepValues(number, 1.0, 0.9, 0.1))
        losses.append(loss.item().hex())
        good.append(was_good.item())
    whole = {name: kept.gathered(ranks) for name, kept in step.optimizer.kept().items()}
    moments = {name: tensor.norm().item() for name, tensor in whole.items() if ranks.first}
    return {
        "losses": losses, "good": good, "state": digest(whole) if ranks.first else None,
        "before": before, "parameters": hash_of(model), "moments": moments,
        "own": sum(tensor.numel() for tensor in step.optimizer.state().values()),
    }  # fmt: skip


def hash_of(model: GPT) -> str:
    return digest({name: p.detach().view(torch.uint8) for name, p in model.named_parameters()})


def differs(found: list[dict], alone: dict) -> list[str]:
    """What is not as one rank makes it; losses and parameters on every rank."""
    wrong = [key for key in ("losses", "good", "parameters") if any(each[key] != alone[key] for each in found)]
    return wrong + ["state"] * (found[0]["state"] != alone["state"])


@pytest.mark.parametrize(
    ("size", "micro_steps", "dtype", "ops"),
    [(2, 4, "float32", "cpu"), (4, 4, "float32", "cpu"), (2, 8, "bfloat16", "cpu"), (4, 8, "bfloat16", "cpu"),
     (2, 4, "float32", "reference"), (2, 2, "float32", "cpu")],
)  # fmt: skip
def test_as_many_ranks_as_there_are_make_the_same_bits(tmp_path, size, micro_steps, dtype, ops):
    made = partial(steps, micro_steps, forward_dtype=dtype, ops=ops)
    alone = on_ranks(1, tmp_path / "alone", made)[0]
    assert alone["good"] == [True] * STEPS
    found = on_ranks(size, tmp_path / "ranks", made)
    assert not differs(found, alone)


def test_a_rank_has_its_part_of_the_state(tmp_path):
    """All of it once; of three layers a rank of two has two or one, and what is flat is cut at 1,024 elements."""
    alone = on_ranks(1, tmp_path / "alone", partial(steps, 4))[0]["own"]
    two = [each["own"] for each in on_ranks(2, tmp_path / "two", partial(steps, 4))]
    four = [each["own"] for each in on_ranks(4, tmp_path / "four", partial(steps, 4))]
    assert sum(two) == sum(four) == alone
    assert max(two) < 2 / 3 * alone
    assert max(four) < 0.4 * alone


def test_native_sums_are_the_same_but_for_their_rounding(tmp_path):
    """Moments are compared, and no losses: Muon and AdamW hide a gradient that is eight times too large."""
    alone = on_ranks(1, tmp_path / "alone", partial(steps, 4))[0]["moments"]
    found = on_ranks(2, tmp_path / "ranks", partial(steps, 4, sums="native"))
    for name, norm in found[0]["moments"].items():
        assert norm == pytest.approx(alone[name], rel=1e-3), name
    assert found[0]["parameters"] == found[1]["parameters"]


def same_rows(patch):
    """Every rank trains on the micro-batches of rank 0."""
    call = TrainStep.__call__

    def broken(self, batches, *args, **kwargs):
        size = self.optimizer.ranks.size
        return call(self, [batches[i - i % size] for i in range(len(batches))], *args, **kwargs)

    patch.setattr(TrainStep, "__call__", broken)


def own_scale(patch):
    """Each counts for one in as many as the rank has itself."""
    micro_step = TrainStep.micro_step
    patch.setattr(TrainStep, "micro_step", lambda self, tokens, of: micro_step(self, tokens, of // 2))


def one_gather_forgotten(patch):
    gather = Ranks.all_gather
    seen = itertools.count()
    patch.setattr(Ranks, "all_gather", lambda self, *args: next(seen) == 7 or gather(self, *args))


def gradients_not_zeroed(patch):
    """What was sent once is sent again with the next micro-step; it needs two of them on a rank to show."""
    add = Optimizer.add_gradients

    def broken(self, last=True):
        kept = self.grads.clone()
        add(self, last)
        self.grads.copy_(kept)

    patch.setattr(Optimizer, "add_gradients", broken)


def summed_backwards(patch):
    """The parts are added in the order of the ranks, but the last first."""
    split = torch.Tensor.split

    def backwards(tensor, *args, **kwargs):
        return split(tensor, *args, **kwargs)[::-1]

    add = Optimizer.add_gradients

    def broken(self, last=True):
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(torch.Tensor, "split", backwards)
            add(self, last)

    patch.setattr(Optimizer, "add_gradients", broken)


def once_a_step(patch):
    """A rank adds up its own micro-steps first."""
    add = Optimizer.add_gradients
    patch.setattr(Optimizer, "add_gradients", lambda self, last=True: add(self) if last else None)


def losses_by_rank(patch):
    """The losses are added as the ranks give them, and not as the micro-batches follow each other."""
    flatten = torch.Tensor.flatten
    patch.setattr(torch.Tensor, "flatten", lambda t, *args: flatten(t.T if t.shape == (2, 2) else t, *args))


MUTANTS = [same_rows, own_scale, one_gather_forgotten, gradients_not_zeroed, summed_backwards, once_a_step,
           losses_by_rank]  # fmt: skip


def all_of_them(ranks: Ranks) -> list[dict]:
    found = []
    for mutant in MUTANTS:
        with pytest.MonkeyPatch.context() as patch:
            mutant(patch)
            found.append(steps(4, ranks))
    return [*found, steps(4, ranks)]


def test_what_would_change_the_bits_is_noticed(tmp_path):
    alone = on_ranks(1, tmp_path / "alone", partial(steps, 4))[0]
    by_rank = on_ranks(2, tmp_path / "ranks", all_of_them)
    *mutants, healthy = [differs([*found], alone) for found in zip(*by_rank, strict=True)]
    assert not healthy
    assert all(mutants), dict(zip((m.__name__ for m in MUTANTS), mutants, strict=True))


def bad_on_rank_1(ranks: Ranks) -> dict:
    micro_step = TrainStep.micro_step

    def with_nan(self, tokens, of):
        micro_step(self, tokens, of)
        if ranks.rank == 1:
            self.optimizer.grads[5] = math.nan

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainStep, "micro_step", with_nan)
        return steps(4, ranks)


def test_a_gradient_that_is_bad_on_one_rank_is_bad_on_all(tmp_path):
    found = on_ranks(2, tmp_path, bad_on_rank_1)
    assert [each["good"] for each in found] == [[False] * STEPS] * 2
    assert all(each["parameters"] == each["before"] for each in found)


def deciding_alone(ranks: Ranks) -> dict:
    update = Optimizer.update

    def locally(self, loss):
        self.checks.fill_(self.sums.sum())
        return update(self, loss)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Optimizer, "update", locally)
        return bad_on_rank_1(ranks)


def test_deciding_alone_would_be_noticed(tmp_path):
    """Where each rank asks its own gradients only, the ranks part."""
    found = on_ranks(2, tmp_path, deciding_alone)
    assert found[0]["good"] != found[1]["good"]


def packed(corpus: Path, ranks: Ranks) -> list:
    data = Dataset.open(corpus)
    with Loader(data.split("train"), 4, 32, bos=data.tokenizer.bos, rank=ranks.rank, ranks=ranks.size) as loader:
        batches: list[Batch] = list(itertools.islice(loader, 6))
        return [[digest({"tokens": b.tokens}) for b in batches], loader.state_dict()]


def test_all_ranks_pack_the_same_batches(tmp_path, corpus):
    """Each the rows of all, of which it trains on its own; the state is the same on every rank."""
    alone, *_ = on_ranks(1, tmp_path / "alone", partial(packed, corpus))
    assert on_ranks(2, tmp_path / "ranks", partial(packed, corpus)) == [alone, alone]
