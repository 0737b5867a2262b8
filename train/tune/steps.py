"""A training step to measure: the trainer's own, on random tokens."""

import torch

from model import GPT, GPTConfig
from prepare import Batch

from ..config import TrainConfig
from ..device import pick_graphs
from ..optimizer import Optimizer
from ..ranks import ALONE, Ranks
from ..schedule import StepValues, step_values
from ..step import TrainStep


def make_step(
    config: TrainConfig, shape: GPTConfig, dtype: torch.dtype | None = None, ranks: Ranks = ALONE
) -> tuple[TrainStep, list[Batch], StepValues]:
    """What `step(batches, values)` takes, for a resolved configuration whose `ops` are set (`kernels.set_ops`).
    `dtype`: of its parameters, where it is not the configuration's own.

    No parameter is zero: at initialisation half of the products would multiply zeros, which run faster.
    """
    torch.manual_seed(0)
    model = GPT(shape, device=config.device, **config.model_options)
    model.init_weights(0)
    with torch.no_grad():
        for name in ("w_out", "w_proj", "w_gate", "lm_head"):
            getattr(model, name).normal_(std=shape.d_model**-0.5)
    size = (config.grad_accum_steps, config.device_batch_size, config.seq_len + 1)
    tokens = torch.randint(shape.vocab_size, size, dtype=torch.int32, device=config.device)
    batches = [Batch(rows, epoch=1, index=i, state={}) for i, rows in enumerate(tokens)]
    step = TrainStep(model, Optimizer(model, config, dtype or config.forward_dtype, ranks), config.autocast)
    values = step_values(config, 0, 0.0)
    if pick_graphs(config.graphs, config.device, config.ops):
        step.capture(size[1:], config.grad_accum_steps, values)
    return step, batches, values
