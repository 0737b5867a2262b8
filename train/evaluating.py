"""`--eval-every`: val_bpb on a small part of the validation text while a run trains, and a few words of its model.

It stands outside of the budget, as a checkpoint does: nothing is on its way meanwhile, and the clock begins anew. The
run is none the wiser. Nothing here draws from a generator that training draws from, and captured graphs have memory of
their own.
"""

from time import perf_counter

from torch import Tensor

import kernels
from model import GPT
from prepare import Dataset, evaluate_bpb
from prepare.scoring import Evaluation

from .config import TrainConfig
from .every import Every
from .generate import generate
from .memory import halving, is_out_of_memory
from .ranks import Ranks
from .resilience.state import Evaluated, RunState, rng_states, set_rng_states
from .resilience.watchdog import Watchdog
from .results.metrics import jsonable
from .results.progress import Reporter
from .step import TrainStep

PART = 8  # the final evaluation scores so many times as many tokens
SAMPLE_PROMPT, SAMPLE_TOKENS = "The ", 64


class _ElsewhereError(MemoryError):
    """The memory of another rank ran out."""


class Evaluations:
    """All ranks take the same ones: when they are due follows from steps and timed seconds, of which all have the same.

    Each rank scores its share of the batches, and rank 0 alone writes the words.
    """

    def __init__(
        self, config: TrainConfig, data: Dataset, step: TrainStep, state: RunState, report: Reporter,
        watchdog: Watchdog, ranks: Ranks,
    ):  # fmt: skip
        self.config, self.data, self.state, self.report, self.ranks = config, data, state, report, ranks
        self.model, self.watchdog, self.score = step.model, watchdog, watchdog.watching(step.token_losses)
        self.every = Every.of(config.eval_every)
        self.tokens = part_of(config, data)
        self.rows = config.device_batch_size  # as many as a micro-step has: of these shapes all is compiled

    def due(self, step: int) -> bool:
        """Whether one comes before step `step`, counted from 0: by steps that is known before the step is sent."""
        last = self.state.evaluated
        return self.every.due(step, self.state.budget.timed_seconds, last.step, last.timed_seconds)

    def take(self) -> None:
        """One evaluation. Nothing may be on its way."""
        start, generators = perf_counter(), rng_states()
        self.watchdog.phase()
        try:
            evaluation = halving(self._evaluated, self.rows, self.config.device)
            self.watchdog.phase()
            sample = sampled(self.model, self.data, self.config.ops) if self.ranks.first else ""
        finally:
            set_rng_states(generators)
            self.watchdog.phase()
        budget, seconds = self.state.budget, perf_counter() - start
        self.state.evaluated = Evaluated(budget.step, budget.timed_seconds, self.state.evaluated.seconds + seconds)
        self.report.evaluated(jsonable({
            "step": budget.step, "progress": budget.progress(budget.step), "timed_seconds": budget.timed_seconds,
            "tokens": budget.step * self.config.total_batch_size, "val_bpb": evaluation.bpb,
            "val_rows": evaluation.rows, "val_bytes": evaluation.bytes_scored, "seconds": seconds, "sample": sample,
        }))  # fmt: skip

    def _evaluated(self, rows: int) -> Evaluation:
        """So many rows at a time. Where the memory of one rank runs out all give up together, and try again."""
        self.rows = rows

        def add_up(terms: Tensor) -> Tensor:
            if self.ranks.agree(False)[0]:
                raise _ElsewhereError
            return self.ranks.add_up(terms)

        try:
            return evaluate_bpb(
                self.score, self.data, seq_len=self.config.seq_len, batch_size=rows, max_tokens=self.tokens,
                packing=self.config.packing, device=self.config.device, rank=self.ranks.rank, ranks=self.ranks.size,
                add_up=add_up,
            )  # fmt: skip
        except Exception as error:
            if is_out_of_memory(error) and not isinstance(error, _ElsewhereError):
                self.ranks.agree(True)
            raise


def part_of(config: TrainConfig, data: Dataset) -> int:
    """Tokens of the part: an eighth of what the final evaluation scores, evenly spaced over the validation split."""
    there = data.split("val").num_tokens
    return max(1, min(config.eval_tokens or there, there) // PART)


def sampled(model: GPT, data: Dataset, ops: str) -> str:
    """A few words of what was learned, to be read beside those of other runs; a reason, where there can be none."""
    special = list(range(data.tokenizer.bos, data.tokenizer.vocab_size))
    prompt = [data.tokenizer.bos, *data.tokenizer.encode(SAMPLE_PROMPT)]
    try:
        with kernels.ops_in_force("reference" if ops == "compile" else ops):  # its shapes change with every token
            tokens = [*generate(model, prompt, SAMPLE_TOKENS, banned=special, temperature=0.8, top_k=50, seed=0)]
        return SAMPLE_PROMPT + data.tokenizer.decode(tokens) + "\n"
    except Exception as error:  # of any kind: the run has its number
        return f"not sampled: {type(error).__name__}: {' '.join(str(error).split())}"
