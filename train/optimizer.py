"""One optimizer, two kinds of group: `adamw` for tables and scalars, `muon` for the matrices inside the blocks.

It owns what the parameters are not: fp32 masters (the parameters themselves where they are fp32), gradients, moments.
All gradients are views of one fp32 buffer, zeroed at once. Of masters, moments and summed gradients each rank has its
part alone (ranks/parts.py), and nothing in an update depends on how many ranks there are:

- AdamW is a formula of one element, whatever lies beside it.
- Muon's is one of a matrix. Its kernels take a tile by the shape of one matrix, never by how many there are, and each
  program reads one matrix (kernels/choice.py, kernels/polar_express.py). References and forms for a CPU multiply as
  many at once as there are, and a vendor's library could choose its way by that. On a CPU it was seen to give the same
  bits, at one thread a rank; one matrix at a time would promise it, and takes up to twice as long (bench/LOG.md). For
  `--ops reference` and `compile` on a GPU nothing is promised.
- Gradients are added micro-step by micro-step, in their order, by additions of their own (`add_gradients`). A kernel
  that adds to what is there already may round once where two roundings are meant: with a fused multiply-add, as in the
  loss, or in the parts of a product that cuBLAS splits. So it always begins with zeros.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

import kernels
from model import GPT
from model.gpt import BLOCK_WEIGHTS, SCALARS
from prepare import InputError

from .config import TrainConfig
from .ranks import ALONE, Ranks
from .ranks.parts import Cut, Kept, store
from .schedule import StepValues

ADAM_EPS = 1e-10
MAX_LOSS = 100.0


@dataclass
class AdamWGroup:
    """Tensors that AdamW updates in one launch, at one learning rate and decay: this rank's part of them."""

    names: list[str]
    lr: float
    betas: tuple[float, float]
    masters: list[Tensor]
    grads: list[Tensor]
    copies: list[Tensor | None]
    cuts: list[Cut]
    decay: float = 0.0

    def __post_init__(self):
        self.exp_avgs = [torch.zeros_like(m) for m in self.masters]
        self.exp_avg_sqs = [torch.zeros_like(m) for m in self.masters]

    def hyper(self, values: StepValues) -> tuple[float, ...]:
        beta1, beta2 = self.betas
        t = values.step + 1
        return self.lr * values.lr_multiplier, 1 - beta1**t, 1 - beta2**t, self.decay

    def kept(self) -> dict[str, Kept]:
        moments = {"exp_avg": self.exp_avgs, "exp_avg_sq": self.exp_avg_sqs}
        named = {kind: zip(self.names, self.cuts, each, strict=True) for kind, each in moments.items()}
        return {f"{kind}.{name}": Kept(cut, own) for kind, each in named.items() for name, cut, own in each}

    def update(self, hyper: Tensor, apply: Tensor) -> None:
        if not any(master.numel() for master in self.masters):
            return
        kernels.adamw_update(
            self.masters, self.grads, self.exp_avgs, self.exp_avg_sqs, self.copies, hyper, apply, self.betas, ADAM_EPS
        )


@dataclass
class MuonGroup:
    """A batch of matrices of one shape, updated in one go: those that this rank has."""

    name: str
    label: str  # the name, and which part of it where one stored tensor holds matrices of several shapes
    lr: float
    master: Tensor  # [batch, rows, cols]
    grad: Tensor
    copy: Tensor | None
    iterate_dtype: torch.dtype
    of_all: int  # matrices, on all ranks
    unit: int  # of them come from one layer
    ranks: Ranks

    def __post_init__(self):
        self.momentum = torch.zeros_like(self.master)
        self.second_moment = self.master.new_zeros(kernels.second_moment_shape(self.master.shape))

    def hyper(self, values: StepValues) -> tuple[float, ...]:
        return self.lr * values.lr_multiplier, values.momentum, values.weight_decay, 0.0  # as wide as AdamW's

    def kept(self) -> dict[str, Kept]:
        moments = {"momentum": self.momentum, "second_moment": self.second_moment}
        return {
            f"{kind}.{self.label}": Kept(Cut.of((self.of_all, *own.shape[1:]), True, self.ranks, self.unit), own)
            for kind, own in moments.items()
        }

    def update(self, hyper: Tensor, apply: Tensor) -> None:
        if not len(self.master):
            return
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
            they were is kept in `masters`, of which a rank has its part. At construction and after every step a
            parameter is its master, rounded, on every rank.
        config: learning rates and decay, how many micro-steps a step has, and how their sums are made.
        forward_dtype: bf16 on a GPU, fp32 on a CPU, where parameter and master are one tensor.
        ranks: those that train the model together.
    """

    def __init__(
        self, model: GPT, config: TrainConfig, forward_dtype: torch.dtype = torch.float32, ranks: Ranks = ALONE
    ):
        self.parameters, self.ranks = dict(model.named_parameters()), ranks
        device = model.wte.device
        self.native = config.sums == "native"
        apart = ranks.size > 1 or (config.grad_accum_steps > 1 and not self.native)
        self.stored, self.grads, self.sums = store(
            self.parameters, lambda name: torch.float32 if name in SCALARS else forward_dtype, BLOCK_WEIGHTS, ranks,
            apart,
        )  # fmt: skip
        self.masters = {name: stored.cut.own(stored.master) for name, stored in self.stored.items()}
        exchanges = ranks.size > 1 and not self.native
        largest = max(stored.cut.padded for stored in self.stored.values())
        self.received = torch.empty(largest, device=device) if exchanges else None
        self.groups = self._groups(model, config)
        self.hyper = torch.zeros(len(self.groups), 4, device=device)
        self.apply = torch.ones((), dtype=torch.bool, device=device)
        self.failed = torch.zeros((), dtype=torch.bool, device=device)
        self.checks = torch.zeros(ranks.size, device=device)  # of each rank the sum of its summed gradients

    def _copy(self, name: str) -> Tensor | None:
        stored = self.stored[name]
        return None if stored.copy is None else stored.cut.own(stored.copy)

    def summed(self, name: str) -> Tensor:
        """The gradient of this rank's part, over the micro-steps so far."""
        return self.stored[name].cut.own(self.stored[name].sum)

    def _groups(self, model: GPT, config: TrainConfig) -> list[AdamWGroup | MuonGroup]:
        width_scale = (model.config.d_model / 768) ** -0.5

        def adamw(names, lr, betas=(0.8, 0.95), decay=0.0):
            masters, grads = [self.masters[n] for n in names], [self.summed(n) for n in names]
            cuts = [self.stored[n].cut for n in names]
            return AdamWGroup(names, lr, betas, masters, grads, [self._copy(n) for n in names], cuts, decay)

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
            tensors = (self.masters[name], self.summed(name), self._copy(name))
            batches = list(zip(*(_split_rows(t, sizes) for t in tensors), strict=True))
            labels = [name] if len(batches) == 1 else [f"{name}.{part}" for part in "qkv"]
            for label, (master, grad, copy) in zip(labels, batches, strict=True):
                lr = config.matrix_lr * max(1.0, master.shape[-2] / master.shape[-1]) ** 0.5
                unit = len(sizes) if len(batches) == 1 else 1
                of_all = self.parameters[name].shape[0] * unit
                groups.append(MuonGroup(name, label, lr, master, grad, copy, iterates, of_all, unit, self.ranks))
        updated = {name for g in groups for name in (g.names if isinstance(g, AdamWGroup) else [g.name])}
        if left_out := [name for name in self.parameters if name not in updated]:
            raise InputError(
                f"no group updates {', '.join(left_out)}: name a block's matrices in BLOCK_WEIGHTS of model/gpt.py, and"
                " give tables and scalars a line in the groups of train/optimizer.py"
            )
        return groups

    def kept(self) -> dict[str, Kept]:
        """What later updates depend on, by name: masters and moments, all fp32."""
        kept = {f"master.{name}": Kept(self.stored[name].cut, master) for name, master in self.masters.items()}
        for group in self.groups:
            kept |= group.kept()
        return kept

    def state(self) -> dict[str, Tensor]:
        """This rank's part of that: the tensors themselves."""
        return {name: kept.own for name, kept in self.kept().items()}

    def whole_masters(self) -> dict[str, Tensor]:
        """On rank 0, by name; empty elsewhere. All ranks call it."""
        kept = {name: Kept(self.stored[name].cut, master) for name, master in self.masters.items()}
        whole = {name: each.gathered(self.ranks) for name, each in kept.items()}
        return whole if self.ranks.first else {}

    def round_masters(self) -> None:
        """After the masters were written from outside: every parameter is its master again, rounded."""
        for name, master in self.masters.items():
            copy = self._copy(name)
            if copy is not None:
                copy.copy_(master)
        self.share_parameters()

    def zero_grad(self) -> None:
        self.grads.zero_()
        if self.sums is not self.grads:
            self.sums.zero_()

    def add_gradients(self, last: bool = True) -> None:
        """After each micro-step, the `last` of a step or not: adds the gradients to the sums, those of rank 0 first, as
        if the ranks' micro-steps had been made one after the other."""
        if self.sums is self.grads:
            return
        if self.ranks.size == 1:
            self.sums += self.grads
        elif self.native:
            if last:
                for stored in self.stored.values():
                    self.ranks.reduce_scatter(stored.sum, stored.grad)
            return
        else:
            for stored in self.stored.values():
                received = self.received[: stored.cut.padded]
                self.ranks.all_to_all(received, stored.grad)
                for part in received.split(stored.cut.part):
                    stored.sum += part
        self.grads.zero_()

    def share_parameters(self) -> None:
        """After an update: every rank has all that the forward reads."""
        for stored in self.stored.values():
            self.ranks.all_gather(stored.forward, stored.forward[stored.cut.begin : stored.cut.begin + stored.cut.part])

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
        check = self.sums.sum() if self.ranks.size == 1 else self.checks.sum()
        good = torch.isfinite(check) & (loss <= MAX_LOSS) & ~self.failed  # NaN is not <= 100
        self.failed |= self.apply & ~good
        gate = good & self.apply
        for group, hyper in zip(self.groups, self.hyper, strict=True):
            group.update(hyper, gate)
        return good
