"""What train.tune tunes, small enough for the interpreter."""

import torch

import kernels
from tests.helpers.kernel_checks import DEVICE
from train.config import TrainConfig, resolve
from train.tune.targets import Target, targets

DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


def config_of(depth: int = 2, rows: int = 1, d_model: int = 64, **more) -> TrainConfig:
    return resolve(
        TrainConfig(depth=depth, d_model=d_model, head_dim=32, seq_len=32, device_batch_size=rows,
                    total_batch_size=2 * 32 * rows, window_pattern="SL"[-depth:], ops="triton", **more), "cuda",
    )  # fmt: skip


def small_targets(config: TrainConfig, fused_norms: bool | None = None) -> list[Target]:
    with kernels.ops_in_force("triton"):
        return targets(config, config.model_config(100), fused_norms)


def small_target(name: str, config: TrainConfig | None = None) -> Target:
    """The first of that name, of a model of one layer: enough of a batch of matrices."""
    return next(target for target in small_targets(config or config_of(depth=1)) if target.name == name)
