"""One training step: forward and backward of its micro-batches, then the update."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from model import GPT
from prepare import Batch

from .optimizer import Optimizer
from .schedule import StepValues


class TrainStep:
    """Runs micro-steps and the optimizer. The same function for every step, rehearsals included."""

    def __init__(self, model: GPT, optimizer: Optimizer, autocast: bool = False):
        self.model, self.optimizer, self.autocast = model, optimizer, autocast
        self.device = model.wte.device

    def precision(self):
        """The context the forward runs in: bf16 matrix products on a CPU that has them, nothing elsewhere."""
        return torch.autocast("cpu", torch.bfloat16) if self.autocast else nullcontext()

    def __call__(
        self, batches: Sequence[Batch], values: StepValues, apply: bool = True
    ) -> tuple[Tensor, Tensor]:
        """One step.

        Args:
            batches: the micro-batches, [B, T + 1] tokens each; every one counts for 1/len(batches).
            values: of the schedules.
            apply: False rehearses: everything runs, and no parameter and no moment changes.

        Returns:
            the mean loss over the micro-batches, and whether it and all gradients were good; both on the device.
        """
        self.optimizer.zero_grad()
        self.optimizer.set_hyper(values)
        total = torch.zeros((), device=self.device)
        for batch in batches:
            tokens = batch.tokens.to(self.device, non_blocking=True)
            with self.precision():
                loss = self.model(tokens[:, :-1], tokens[:, 1:])
            (loss / len(batches)).backward()
            total += loss.detach() / len(batches)
        return total, self.optimizer.step(total, apply)

    @torch.no_grad()
    def token_losses(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """One loss a token, in nats, [B, T]: what evaluation sums."""
        with self.precision():
            return self.model(inputs, targets, reduction="none")

    def rehearse(self, batch_shape: tuple[int, int], micro_steps: int, values: StepValues, times: int = 3) -> None:
        """Whole steps on dummy tokens that leave no trace: kernels compile, allocators and caches fill."""
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(self.model.config.vocab_size, batch_shape, generator=generator, dtype=torch.int32)
        dummy = Batch(tokens=tokens, epoch=0, state={}, index=-1)
        for _ in range(times):
            self([dummy] * micro_steps, values, apply=False)
        self.optimizer.zero_grad()
