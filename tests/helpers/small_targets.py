"""The targets of bench.tune, small enough for the interpreter."""

import torch

from bench import tiles
from bench.targets import Target
from tests.helpers.kernel_checks import DEVICE
from train.config import TrainConfig, resolve

DTYPE, TOLERANCE = (torch.bfloat16, 5e-2) if DEVICE == "cuda" else (torch.float32, 1e-4)


def config_of(depth: int = 2, rows: int = 1) -> TrainConfig:
    return resolve(
        TrainConfig(depth=depth, d_model=64, head_dim=32, seq_len=32, device_batch_size=rows,
                    total_batch_size=2 * 32 * rows, window_pattern="SL"[-depth:]), "cuda",
    )  # fmt: skip


def small_targets(config: TrainConfig) -> dict[str, Target]:
    return {target.name: target for target in tiles.targets(config, config.model_config(100))}


# One layer is enough of a batch of matrices; 128 tokens are a piece of the embedding's backward.
SMALL = small_targets(config_of())
SMALL |= {name: target for name, target in small_targets(config_of(depth=1)).items() if target.calls < 1}
SMALL |= {name: target for name, target in small_targets(config_of(rows=8)).items() if name.startswith("embedding")}
