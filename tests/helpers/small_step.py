"""A training step of a small model, away from its initial weights, and batches for it."""

import torch

from model import GPT
from prepare import Batch
from train.config import TrainConfig, resolve
from train.optimizer import Optimizer
from train.step import TrainStep

SHAPE = (4, 33)
CONFIG = resolve(
    TrainConfig(depth=2, d_model=64, head_dim=16, seq_len=32, device_batch_size=4, total_batch_size=256), "cpu"
)


def make_step(device="cpu", forward_dtype=torch.float32, config=CONFIG, vocab_size=512) -> TrainStep:
    model = GPT(config.model_config(vocab_size))
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # away from initialisation, where most gradients are zero
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    model.to(device)
    return TrainStep(model, Optimizer(model, config, forward_dtype))


def endless_batches(device="cpu"):
    generator = torch.Generator().manual_seed(2)
    index = 0
    while True:
        tokens = torch.randint(512, SHAPE, generator=generator, dtype=torch.int32).to(device)
        yield Batch(tokens=tokens, epoch=1, index=index, state={})
        index += 1
