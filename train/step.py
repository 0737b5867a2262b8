"""One training step: forward and backward of its micro-batches, then the update."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model import GPT
from prepare import Batch

from .compiled import compiled, compiled_update
from .optimizer import Optimizer
from .schedule import StepValues


class TrainStep:
    """Runs micro-steps and the optimizer. The same function for every step, rehearsals and replayed graphs included.
    What several ranks send each other stands between the micro-steps and the update, outside of any graph.

    What changes from step to step lives on the device, in tensors that stay where they are: a captured step reads it
    there anew. Nothing in a micro-step or an update waits for the device.
    """

    def __init__(self, model: GPT, optimizer: Optimizer | None, autocast: bool = False):
        """`optimizer` None: for evaluation alone. `autocast` matters on a CPU alone, to parameters in fp32."""
        # The parts of a split sum are added in fp32 and rounded once, as everywhere else. Here, so that evaluations,
        # replays and benchmarks of a step multiply as the run does: the setting is the process's. And what is fp32 is
        # fp32: some containers ask for TF32 by the environment, which the audit's tolerance does not allow for.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.set_float32_matmul_precision("highest")
        self.model, self.optimizer, self.autocast = model, optimizer, autocast
        self.device = model.wte.device
        self.forward = compiled(model)
        self.update_parameters = optimizer and compiled_update(optimizer)
        self.loss = torch.zeros((), device=self.device)  # of the micro-step; at its end, of the step
        self.graphs: StepGraphs | None = None

    def precision(self):
        """The context the forward runs in: bf16 matrix products on a CPU that has them, nothing elsewhere."""
        wanted = self.autocast and self.device.type == "cpu" and self.model.wte.dtype == torch.float32
        return torch.autocast("cpu", torch.bfloat16) if wanted else nullcontext()

    def __call__(
        self, batches: Sequence[Batch], values: StepValues, apply: bool = True
    ) -> tuple[Tensor, Tensor]:
        """One step.

        Args:
            batches: the micro-batches of all ranks, [B, T + 1] tokens each; every one counts for 1/len(batches). Of N
                ranks each takes every N-th.
            values: of the schedules.
            apply: False rehearses: everything runs, and no parameter and no moment changes.

        Returns:
            the mean loss over the micro-batches, and whether it and all gradients were good; both on the device.
        """
        optimizer, ranks = self.optimizer, self.optimizer.ranks
        optimizer.zero_grad()
        optimizer.set_hyper(values, apply)
        run, losses = self.graphs or self, []
        mine = batches[ranks.rank :: ranks.size]
        for i, batch in enumerate(mine):
            self.loss.zero_()
            run.micro_step(batch.tokens, len(batches))
            losses.append(self.loss.clone())
            optimizer.add_gradients(last=i == len(mine) - 1)
        if ranks.size > 1:
            # Of each rank its micro-steps' losses, and a sum that tells of its gradients whether they are finite: all
            # decide by the same numbers.
            facts = torch.stack([*losses, optimizer.sums.sum()])
            of_all = facts.new_empty(ranks.size, len(facts))
            ranks.all_gather(of_all.view(-1), facts)
            optimizer.checks.copy_(of_all[:, -1])
            losses = of_all[:, :-1].T.flatten().unbind()  # as the micro-batches follow each other
        self.loss.zero_()
        for loss in losses:
            self.loss += loss
        good = run.update().clone()
        optimizer.share_parameters()
        return self.loss.clone(), good

    def micro_step(self, tokens: Tensor, micro_steps: int) -> None:
        """Adds the loss of `tokens` [B, T + 1], and its gradients, as one of `micro_steps`."""
        tokens = tokens.to(self.device, non_blocking=True)
        with self.precision():
            loss = self.forward(tokens[:, :-1], tokens[:, 1:])
        (loss / micro_steps).backward()
        self.loss += loss.detach() / micro_steps

    def update(self) -> Tensor:
        """Updates the parameters by the gradients so far. Returns whether these and the loss were good."""
        return self.update_parameters(self.loss)

    @torch.no_grad()
    def token_losses(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """One loss a token, in nats, [B, T]: what evaluation sums."""
        with self.precision():
            return self.forward(inputs, targets, reduction="none")

    def rehearse(self, batch_shape: tuple[int, int], micro_steps: int, values: StepValues, times: int = 3) -> None:
        """Whole steps on dummy tokens that leave no trace: kernels compile, allocators and caches fill."""
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(self.model.config.vocab_size, batch_shape, generator=generator, dtype=torch.int32)
        dummy = Batch(tokens=tokens, epoch=0, state={}, index=-1)
        for _ in range(times):
            self([dummy] * micro_steps, values, apply=False)
        self.optimizer.zero_grad()

    def capture(self, batch_shape: tuple[int, int], micro_steps: int, values: StepValues) -> None:
        """From here on steps are replays of two CUDA graphs. Their micro-batches have this shape and number."""
        self.graphs = StepGraphs(self, batch_shape, micro_steps, values)

    def release(self) -> None:
        """Gives back the memory of the captured activations; steps run eagerly again."""
        self.graphs = None


class StepGraphs:
    """A micro-step and an update as CUDA graphs: what to launch is recorded once, and replayed by one call each.

    The two share a pool of memory, which is sound because they are replayed in the order of their capture and neither
    leaves anything there for the other: loss, gradients and parameters live outside.
    """

    def __init__(self, step: TrainStep, batch_shape: tuple[int, int], micro_steps: int, values: StepValues):
        self.micro_steps = micro_steps
        self.tokens = torch.zeros(batch_shape, dtype=torch.int32, device=step.device)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Kernels compile, modules load and workspaces are made here: none of that may happen inside a capture.
            step.rehearse(batch_shape, micro_steps, values)
        # Thread-local, because the loader's thread goes on pinning memory while this one captures.
        capture = {"stream": stream, "capture_error_mode": "thread_local"}
        self._micro_step, self._update = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._micro_step, **capture):
            step.micro_step(self.tokens, micro_steps)
        with torch.cuda.graph(self._update, pool=self._micro_step.pool(), **capture):
            self._good = step.update()
        torch.cuda.current_stream().wait_stream(stream)

    def micro_step(self, tokens: Tensor, micro_steps: int) -> None:
        if micro_steps != self.micro_steps or tokens.shape != self.tokens.shape:
            raise ValueError(
                f"{micro_steps} micro-batches of {tuple(tokens.shape)}: captured were {self.micro_steps} of"
                f" {tuple(self.tokens.shape)}"
            )
        self.tokens.copy_(tokens, non_blocking=True)
        self._micro_step.replay()

    def update(self) -> Tensor:
        self._update.replay()
        return self._good


@dataclass
class Sent:
    """A step that has been sent to the device, and may still be running there."""

    values: StepValues
    batches: list[Batch]
    loss: Tensor  # this and the next: on the host, and there once `end` is reached
    good: Tensor
    end: Any  # mark of the clock


class TrainingError(Exception):
    """The loss or a gradient is not finite, or the loss is above 100. The parameters are those of the step before."""

    def __init__(self, line: str, sent: Sent):
        super().__init__(line)
        self.sent = sent
