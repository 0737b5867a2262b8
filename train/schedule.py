"""What changes from step to step: learning rate, momentum, weight decay."""

from dataclasses import dataclass

from .config import TrainConfig


@dataclass(frozen=True)
class StepValues:
    """The scalars of one step, counted from 0."""

    step: int
    lr_multiplier: float
    momentum: float
    weight_decay: float


def step_values(config: TrainConfig, step: int, progress: float) -> StepValues:
    """Every schedule at once, for `progress` in [0, 1]."""
    return StepValues(
        step,
        lr_multiplier(progress, config.warmup_ratio, config.warmdown_ratio, config.final_lr_frac),
        muon_momentum(step, config.momentum_ramp),
        muon_weight_decay(progress, config.weight_decay),
    )


def lr_multiplier(progress: float, warmup_ratio: float, warmdown_ratio: float, final_lr_frac: float) -> float:
    """Rises linearly, stays at 1, falls linearly to `final_lr_frac`. Progress and ratios are shares of the run."""
    if progress < warmup_ratio:
        return progress / warmup_ratio
    if progress <= 1 - warmdown_ratio:
        return 1.0
    left = max(1 - progress, 0.0) / warmdown_ratio
    return left + (1 - left) * final_lr_frac


def muon_momentum(step: int, ramp: int = 300) -> float:
    """0.85 to 0.95 over the first `ramp` steps; with 0 it is 0.95 at once."""
    return 0.85 + (0.95 - 0.85) * (min(step / ramp, 1.0) if ramp else 1.0)


def muon_weight_decay(progress: float, weight_decay: float) -> float:
    """Falls to 0 linearly with progress."""
    return weight_decay * (1 - progress)
