"""One optimizer, two kinds of group: `adamw` for tables and scalars, `muon` for the matrices inside the blocks.

It owns what the parameters are not: fp32 masters (the parameters themselves where they are fp32), gradients, moments.
All gradients are views of one fp32 buffer, zeroed at once and checked at once.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

import kernels
from model import GPT
from model.gpt import BLOCK_WEIGHTS
from prepare import InputError

from .config import TrainConfig
from .schedule import StepValues

ADAM_EPS = 1e-10
MAX_LOSS = 100.0


@dataclass
class AdamWGroup:
    """Tensors that AdamW updates in one launch, at one learning rate and decay."""

    names: list[str]
    lr: float
    betas: tuple[float, float]
    masters: list[Tensor]
    grads: list[Tensor]
    copies: list[Tensor | None]
    decay: float = 0.0

    def __post_init__(self):
        self.exp_avgs = [torch.zeros_like(m) for m in self.masters]
        self.exp_avg_sqs = [torch.zeros_like(m) for m in self.masters]

    def hyper(self, values: StepValues) -> tuple[float, ...]:
        beta1, beta2 = self.betas
        t = values.step + 1
        return self.lr * values.lr_multiplier, 1 - beta1**t, 1 - beta2**t, self.decay

    def state(self) -> dict[str, Tensor]:
        moments = {"exp_avg": self.exp_avgs, "exp_avg_sq": self.exp_avg_sqs}
        return {f"{kind}.{n}": t for kind, each in moments.items() for n, t in zip(self.names, each, strict=True)}

    def update(self, hyper: Tensor, apply: Tensor) -> None:
        kernels.adamw_update(
            self.masters, self.grads, self.exp_avgs, self.exp_avg_sqs, self.copies, hyper, apply, self.betas, ADAM_EPS
        )


@dataclass
class MuonGroup:
    """A batch of matrices of one shape, updated in one go."""

    name: str
    label: str  # the name, and which part of it where one stored tensor holds matrices of several shapes
    lr: float
    master: Tensor  # [batch, rows, cols]
    grad: Tensor
    copy: Tensor | None
    iterate_dtype: torch.dtype

    def __post_init__(self):
        self.momentum = torch.zeros_like(self.master)
        self.second_moment = self.master.new_zeros(kernels.second_moment_shape(self.master.shape))

    def hyper(self, values: StepValues) -> tuple[float, ...]:
        return self.lr * values.lr_multiplier, values.momentum, values.weight_decay, 0.0  # as wide as AdamW's

    def state(self) -> dict[str, Tensor]:
        return {f"momentum.{self.label}": self.momentum, f"second_moment.{self.label}": self.second_moment}

    def update(self, hyper: Tensor, apply: Tensor) -> None:
        kernels.muon_update(
            self.master, self.grad, self.momentum, self.second_moment, self.copy, hyper, apply, self.iterate_dtype
        )


def iterate_dtype(device: str, autocast: bool) -> torch.dtype:
    """Of Polar Express. Without bf16 instructions a CPU's bf16 products take tens of times as long as its fp32 ones
    (bench/LOG.md)."""
    return torch.float32 if device == "cpu" and not autocast else torch.bfloat16


def _split_rows(stack: Tensor | None, sizes: list[int]) -> list[Tensor | None]:
    """[L, R, C] as batches of the matrices stacked in R: one batch where they are alike, else one for each."""
    if stack is None:
        return [None] * (1 if len(set(sizes)) == 1 else len(sizes))
    if len(set(sizes)) == 1:
        return [stack.view(-1, sizes[0], stack.shape[2])]
    return list(stack.split(sizes, dim=1))


class Optimizer:
    """Groups the parameters of a GPT, gives each its `main_grad`, and updates them.

    Args:
        model: fp32. Its parameters become what the forward reads, in `forward_dtype`, the scalars excepted; what
            they were is kept in `masters`. At construction and after every step a parameter is its master, rounded.
        config: learning rates and decay.
        forward_dtype: bf16 on a GPU, fp32 on a CPU, where parameter and master are one tensor.
    """

    def __init__(self, model: GPT, config: TrainConfig, forward_dtype: torch.dtype = torch.float32):
        self.parameters = dict(model.named_parameters())
        device = model.wte.device
        self.masters = {name: p.data for name, p in self.parameters.items()}
        model.to_forward_dtype(forward_dtype)
        # Every view starts at a multiple of 32 elements (128 bytes): vector loads want aligned addresses.
        offsets, size = {}, 0
        for name, p in self.parameters.items():
            offsets[name] = size
            size += -(-p.numel() // 32) * 32
        self.grads = torch.zeros(size, device=device)
        for name, p in self.parameters.items():
            p.main_grad = self.grads[offsets[name] : offsets[name] + p.numel()].view(p.shape)
        self.groups = self._groups(model, config)
        self.hyper = torch.zeros(len(self.groups), 4, device=device)
        self.apply = torch.ones((), dtype=torch.bool, device=device)
        self.failed = torch.zeros((), dtype=torch.bool, device=device)

    def _copy(self, name: str) -> Tensor | None:
        parameter = self.parameters[name]
        return None if parameter.dtype == torch.float32 else parameter.data

    def _groups(self, model: GPT, config: TrainConfig) -> list[AdamWGroup | MuonGroup]:
        width_scale = (model.config.d_model / 768) ** -0.5

        def adamw(names, lr, betas=(0.8, 0.95), decay=0.0):
            masters = [self.masters[n] for n in names]
            grads = [self.parameters[n].main_grad for n in names]
            return AdamWGroup(names, lr, betas, masters, grads, [self._copy(n) for n in names], decay)

        groups: list[AdamWGroup | MuonGroup] = [
            adamw(["lm_head"], config.lm_head_lr * width_scale, decay=config.lm_head_decay),
            adamw(["wte"], config.embedding_lr * width_scale, decay=config.wte_decay),
            adamw(["value_embeddings"], config.embedding_lr * width_scale, decay=config.value_embedding_decay),
            adamw(["lambda_r"], config.scalar_lr * 0.01),
            adamw(["lambda_0"], config.scalar_lr, betas=(0.96, 0.95)),
            *([adamw(["bigram_embeddings"], config.embedding_lr * width_scale, decay=config.bigram_decay)]
              if model.config.bigram_layers else []),
            *([adamw(["lambda_s"], config.scalar_lr)] if model.config.smear else []),
        ]
        iterates = iterate_dtype(model.wte.device.type, config.autocast)
        for name in BLOCK_WEIGHTS:
            # q, k and v are stored as one tensor and orthogonalised as three matrices.
            rows = [model.config.d_model, model.config.kv_width, model.config.kv_width]
            sizes = rows if name == "w_qkv" else [self.masters[name].shape[1]]
            tensors = (self.masters[name], self.parameters[name].main_grad, self._copy(name))
            batches = list(zip(*(_split_rows(t, sizes) for t in tensors), strict=True))
            labels = [name] if len(batches) == 1 else [f"{name}.{part}" for part in "qkv"]
            for label, (master, grad, copy) in zip(labels, batches, strict=True):
                lr = config.matrix_lr * max(1.0, master.shape[-2] / master.shape[-1]) ** 0.5
                groups.append(MuonGroup(name, label, lr, master, grad, copy, iterates))
        updated = {name for g in groups for name in (g.names if isinstance(g, AdamWGroup) else [g.name])}
        if left_out := [name for name in self.parameters if name not in updated]:
            raise InputError(
                f"no group updates {', '.join(left_out)}: name a block's matrices in BLOCK_WEIGHTS of model/gpt.py, and"
                " give tables and scalars a line in the groups of train/optimizer.py"
            )
        return groups

    def state(self) -> dict[str, Tensor]:
        """What later updates depend on, by name: masters and moments. The tensors themselves; all are fp32."""
        state = {f"master.{name}": master for name, master in self.masters.items()}
        for group in self.groups:
            state |= group.state()
        return state

    def round_masters(self) -> None:
        """After the masters were written from outside: every parameter is its master again, rounded."""
        for name, master in self.masters.items():
            copy = self._copy(name)
            if copy is not None:
                copy.copy_(master)

    def zero_grad(self) -> None:
        self.grads.zero_()

    def set_hyper(self, values: StepValues, apply: bool = True) -> None:
        """Sends the scalars of the next update to the device, a row a group. Where `apply` is False it is a rehearsal,
        after which every bit is as it was."""
        self.apply.fill_(apply)
        rows = torch.tensor([group.hyper(values) for group in self.groups], pin_memory=self.hyper.is_cuda)
        self.hyper.copy_(rows, non_blocking=True)  # pinned memory of its own, which no later step overwrites

    @torch.no_grad()
    def update(self, loss: Tensor) -> Tensor:
        """Updates every parameter, unless the loss or a gradient is not finite or the loss is above 100, or was in a
        step before: the host reads the loss late, and what it sends until then must change nothing.

        Args:
            loss: scalar, on the device.

        Returns:
            whether loss and gradients were good: a scalar boolean on the device.
        """
        # A sum of finite gradients is finite, and one bad term makes it inf or NaN: one pass, one number.
        good = torch.isfinite(self.grads.sum()) & (loss <= MAX_LOSS) & ~self.failed  # NaN is not <= 100
        self.failed |= self.apply & ~good
        gate = good & self.apply
        for group, hyper in zip(self.groups, self.hyper, strict=True):
            group.update(hyper, gate)
        return good
