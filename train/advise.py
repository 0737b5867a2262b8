"""`python -m train.doctor --advise`: a command that suits this machine, from real steps that were timed on it.

What is measured is the pace of a few shapes. What is decided by it is the depth, by a rule, and the rows of a
micro-step, by which is fastest. Row length, vocabulary, batch and rates are the recipe's: no pace says anything of
them. The rule is not a search: which depth is better on this machine, only runs tell.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from itertools import chain, islice, repeat
from pathlib import Path

import torch

import kernels
from model import GPTConfig
from model.flops import flops_per_token
from model.gpt import matrix_parameters
from prepare import Dataset, InputError, Loader
from prepare.home import default_folder
from prepare.words import command_line, printable

from .config import TrainConfig, resolve
from .device import complete, keep_freed_memory, keep_to_the_cores_allowed
from .loop import seldom_collecting
from .memory import available_bytes, give_back, largest_batch
from .recipes import DEVICE_DEFAULTS, vocab_size
from .results.load import Load
from .trainer import embedded_folder
from .tune.steps import make_step

# Tokens of a run for each parameter that multiplies every token, where the recipe was found: the depth that comes
# nearest is advised. That tokens and parameters should grow alike is Hoffmann et al. 2022 (arXiv:2203.15556); how many
# of the one for the other depends on all else, so it is taken from where all else was.
# cpu: 60 s at 54,500 tokens a second on two cores, 655,488 such parameters (README.md, "Results so far").
# published: 499.6M tokens in 300 s on an H100, 29,360,640 of them (program.md of github.com/karpathy/autoresearch).
TOKENS_A_PARAMETER = {"cpu": 5.0, "published": 17.0}
SECONDS = 4.0  # of steps of a shape
LEAST_STEPS, WARM_UP = 3, 3
MOST_DEPTHS = 5
LESS_ROWS = (2, 4)  # parts of the default micro-batch that are tried
WORTH = 1.03  # times the default's pace, below which other rows are not worth a flag
APART = 0.1  # of the pace: where the same shape differs by more from one time to the next, it is said
BUSY = 0.2  # cores that other work took: more is said
# Over the same text, up to which it is about as good as new: Muennighoff et al. 2023, arXiv:2305.16264.
MANY_PASSES = 4
# Of a file of fineweb-edu: ten billion of GPT-2's in fourteen files, the last one smaller.
SHARD_TOKENS, SHARDS = 0.7e9, 14


@dataclasses.dataclass(frozen=True)
class Measured:
    """A shape, and how fast it trains here."""

    config: TrainConfig  # complete
    shape: GPTConfig
    tokens_per_second: float

    @property
    def tokens(self) -> float:
        """In the budget."""
        return self.tokens_per_second * self.config.time_budget

    @property
    def tokens_a_parameter(self) -> float:
        return self.tokens / matrix_parameters(self.shape)


Pace = Callable[[TrainConfig, GPTConfig], float]  # tokens a second


def advise(folder: str | None, time_budget: float | None) -> Iterator[str]:
    """The lines, as they are known. Raises InputError."""
    keep_to_the_cores_allowed()
    config = complete(TrainConfig(time_budget=time_budget, data=folder, tune="off"))
    if config.device == "cpu":
        keep_freed_memory()
    data = opened(folder, config.recipe)
    vocabulary = vocab_size(config.recipe) if data is None else data.vocab_size
    threads = f", {torch.get_num_threads()} threads" if config.device == "cpu" else ""
    yield f"machine: {config.device}{threads}, {config.ops} ops; recipe {config.recipe}"
    yield f"steps:   of {'random tokens: no corpus is prepared yet' if data is None else printable(data.folder)}"
    yield f"{'depth':>7}{'width':>7}{'rows':>6}{'tokens/s':>11}{'tokens':>9}{'tokens a parameter':>20}"
    load, best = Load(config.device), None
    with kernels.ops_in_force(config.ops, config.device):
        for found, so_far in search(config, vocabulary, lambda config, shape: timed(config, shape, data)):
            yield row(found)
            best = so_far
        again = dataclasses.replace(best, tokens_per_second=timed(best.config, best.shape, data))
        yield f"{row(again)}  (again)"
    one, other = best.tokens_per_second, again.tokens_per_second
    if abs(one - other) > APART * max(one, other):
        yield f"note:    the same shape differed by {abs(one / other - 1):.0%}: so much is the prediction uncertain by"
    if (others := load.end()["other_cores"]) > BUSY:
        yield f"note:    other work took {others} cores meanwhile: without it the pace is another"
    best = dataclasses.replace(best, tokens_per_second=2 / (1 / one + 1 / other))
    yield from said(best, None if data is None else data.split("train").num_tokens, folder)


def opened(folder: str | None, recipe: str) -> Dataset | None:
    """None where none is named and the usual one is not prepared yet."""
    path = Path(folder) if folder is not None else embedded_folder(recipe)
    return None if folder is None and not (path / "manifest.json").exists() else Dataset.open(path)


def search(config: TrainConfig, vocabulary: int, pace: Pace) -> Iterator[tuple[Measured, Measured]]:
    """Each shape that is measured, and the best so far; the last of these is the advice.

    From the recipe's depth on, one layer more or less at a time, until the rule's number is passed; then that depth
    with fewer rows at a time. Raises InputError where nothing fits.
    """
    wanted, depth, found = TOKENS_A_PARAMETER[config.recipe], config.depth, {}
    best = None
    while depth >= 1 and depth not in found and len(found) < MOST_DEPTHS:
        found[depth] = m = measured(of_depth(config, depth), vocabulary, pace)
        depth += 1 if m and m.tokens_a_parameter > wanted else -1
        if m:
            best = min(filter(None, [best, m]), key=lambda m: abs(math.log(m.tokens_a_parameter / wanted)))
            yield m, best
    if best is None:
        raise InputError("not one row of the smallest shape fits into the memory that is free: free some")
    all_rows, least = best.config.device_batch_size, WORTH * best.tokens_per_second
    for part in (part for part in LESS_ROWS if all_rows % part == 0):
        m = measured(dataclasses.replace(best.config, device_batch_size=all_rows // part), vocabulary, pace)
        if m and m.tokens_per_second > max(least, best.tokens_per_second):
            best = m
        if m:
            yield m, best


def of_depth(config: TrainConfig, depth: int) -> TrainConfig:
    """At the width that `train --depth` takes."""
    return resolve(dataclasses.replace(config, depth=depth, d_model=None), config.device)


def measured(config: TrainConfig, vocabulary: int, pace: Pace) -> Measured | None:
    """With as many rows at a time as fit, at most those of `config`; None where not one does."""
    shape = config.model_config(vocabulary)
    rows = largest_batch(config, shape, available_bytes(config.device), config.device_batch_size)
    if not rows:
        return None
    config = dataclasses.replace(config, device_batch_size=rows)
    return Measured(config, shape, pace(config, shape))


def timed(config: TrainConfig, shape: GPTConfig, data: Dataset | None) -> float:
    """Tokens a second of real steps, the loader's work among them."""
    seconds, steps = _timed(config, shape, data)
    give_back(config.device)
    return steps * config.total_batch_size / seconds


def _timed(config: TrainConfig, shape: GPTConfig, data: Dataset | None) -> tuple[float, int]:
    step, batches, values = make_step(config, shape)
    endless = chain.from_iterable(repeat(batches))
    with ExitStack() as stack:
        if data is not None:
            endless = stack.enter_context(closing(Loader(
                data.split("train"), config.device_batch_size, config.seq_len, bos=data.tokenizer.bos, seed=config.seed,
                device=config.device,
            )))  # fmt: skip
            endless.start()

        def one() -> None:
            step([*islice(endless, config.grad_accum_steps)], values)

        for _ in range(WARM_UP):
            one()
        with seldom_collecting():  # as in the loop
            return seconds_of(one, config.device)


def seconds_of(one: Callable[[], object], device: str) -> tuple[float, int]:
    """Of as many calls as SECONDS have, the device idle before and after them; and how many they were."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    begin, calls = time.perf_counter(), 0
    while calls < LEAST_STEPS or time.perf_counter() - begin < SECONDS:
        one()
        calls += 1
        if calls % LEAST_STEPS == 0:
            wait()  # else a GPU is sent all at once, and the host knows nothing of its pace
    wait()
    return time.perf_counter() - begin, calls


def row(m: Measured) -> str:
    shape = f"{m.config.depth:>7}{m.shape.d_model:>7}{m.config.device_batch_size:>6}"
    return f"{shape}{m.tokens_per_second:>11,.0f}{big(m.tokens):>9}{m.tokens_a_parameter:>20.1f}"


def said(best: Measured, corpus_tokens: int | None, folder: str | None) -> Iterator[str]:
    """The advice, and what it rests on."""
    config, recipe, seconds = best.config, best.config.recipe, best.config.time_budget
    yield (
        f"rule:    the depth nearest {TOKENS_A_PARAMETER[recipe]:g} tokens for each parameter that multiplies, as where"
        f" recipe {recipe} was found; no search: only runs tell"
    )
    yield (
        f"kept:    {config.seq_len:,} tokens a row, vocabulary {best.shape.vocab_size:,}, {config.total_batch_size:,}"
        f" tokens a step and all rates, as in the recipe"
    )
    passes = "" if corpus_tokens is None else f", {best.tokens / corpus_tokens:.2f} passes over the corpus"
    flops = best.tokens * flops_per_token(best.shape)
    yield f"predict: {big(best.tokens)} tokens, {flops:.2e} FLOPs{passes}, in {seconds:g} s"
    arguments = ["--depth", config.depth, "--device-batch-size", config.device_batch_size]
    if seconds != DEVICE_DEFAULTS[config.device]["time_budget"]:
        arguments += ["--time-budget", f"{seconds:g}"]
    if corpus_tokens is not None and best.tokens > MANY_PASSES * corpus_tokens:
        shards = min(SHARDS, math.ceil(best.tokens / SHARD_TOKENS))
        more = ["--source", "fineweb-edu", "--shards", shards, "--vocab-size", best.shape.vocab_size]
        yield f"first:   {command_line('prepare', *more)}"
        yield f"         since more than {MANY_PASSES} passes over the same text teach less each"
        folder = str(default_folder("fineweb-edu"))
    if folder is not None:
        arguments += ["--data", folder]
    yield f"command: {command_line('train', *arguments)}"


def big(number: float) -> str:
    return f"{number / 1e9:.2f}B" if number >= 1e9 else f"{number / 1e6:.2f}M"
