"""The GPT. Shapes: B batch, T time, D model width, H heads, KVH key-value heads, V vocabulary, L layers.

Parameters of one kind are one tensor for all layers, [L, rows, cols]: the optimizer updates each stack as a batch.
A new weight is one line in `parameter_shapes`, one in `init_weights`, its use in `features` or `_layer`, and its name
where it is updated: in `BLOCK_WEIGHTS`, or in a group of the optimizer. It counts as a matrix that multiplies every
token, in MFU too, unless `LOOKED_UP` or `SCALARS` names it.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels

from .config import GATE_CHANNELS, GPTConfig


def parameter_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter by name. Those of three dimensions are stacks: of matrices, but for `LOOKED_UP`."""
    L, D, V = config.depth, config.d_model, config.vocab_size
    return {
        "wte": (V, D),
        "value_embeddings": (len(config.ve_layers), V, config.kv_width),
        "lm_head": (V, D),
        "w_qkv": (L, D + 2 * config.kv_width, D),
        "w_out": (L, D, D),
        "w_fc": (L, 4 * D, D),
        "w_proj": (L, D, 4 * D),
        "w_gate": (len(config.gated_layers), config.kv_heads, GATE_CHANNELS),
        "lambda_r": (L,),
        "lambda_0": (L,),
        **({"lambda_s": (1,)} if config.smear else {}),
        **({"bigram_embeddings": (len(config.bigram_layers), config.bigram_rows * V, config.kv_width)}
           if config.bigram_layers else {}),
    }


# What a parameter does in the forward: of these a token reads its row, or one number. Every other multiplies it.
LOOKED_UP = ("wte", "value_embeddings", "bigram_embeddings")
SCALARS = ("lambda_r", "lambda_0", "lambda_s")

BLOCK_WEIGHTS = ("w_qkv", "w_out", "w_fc", "w_proj", "w_gate")  # updated by Muon, as batches of matrices


def count_parameters(config: GPTConfig) -> dict[str, int]:
    """Parameters by kind: blocks (the stacks of matrices), scalars, every other by its name, and their total."""
    counts, stacks, scalars = {}, 0, 0
    for name, shape in parameter_shapes(config).items():
        if name in SCALARS:
            scalars += math.prod(shape)
        elif len(shape) == 3 and name not in LOOKED_UP:
            stacks += math.prod(shape)
        else:
            counts[name] = math.prod(shape)
    counts |= {"blocks": stacks, "scalars": scalars}
    return {**counts, "total": sum(counts.values())}


def matrix_parameters(config: GPTConfig) -> int:
    """Parameters that multiply every token: all but the tables that are looked up and the scalars."""
    shapes = parameter_shapes(config)
    return sum(math.prod(shape) for name, shape in shapes.items() if name not in LOOKED_UP + SCALARS)


class GPT(nn.Module):
    """A decoder-only transformer; see `forward` for its equations and `init_weights` for where it starts.

    Args:
        config: its shape.
        recompute: the backward makes the largest tensors of each layer again instead of keeping them: the same
            gradients, bit by bit, in less memory and more time.
        fused_norms: inside the layers, norms live in the epilogues of the kernels' products; references do not differ.
            A layer is the same code: its norms come as `kernels.Factors`, an error where they are read as a tensor.
    """

    def __init__(self, config: GPTConfig, device=None, recompute: bool = False, fused_norms: bool = False):
        super().__init__()
        self.config, self.recompute, self.fused_norms = config, recompute, fused_norms
        for name, shape in parameter_shapes(config).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device)))
        cos, sin = kernels.rotary_tables(config.seq_len, config.head_dim, config.rope_base, device=device)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fills every parameter. Drawn on the CPU in fp32, so that a seed means the same weights on every device."""
        generator = torch.Generator().manual_seed(seed)
        # A uniform of variance init_scale² / d_model.
        bound = self.config.init_scale * math.sqrt(3 / self.config.d_model)

        def normal(shape, std):
            return torch.randn(shape, generator=generator) * std

        def uniform(shape):
            return (torch.rand(shape, generator=generator) * 2 - 1) * bound

        self.wte.copy_(normal(self.wte.shape, 1.0))
        self.lm_head.copy_(normal(self.lm_head.shape, 0.001))
        self.value_embeddings.copy_(uniform(self.value_embeddings.shape))
        self.w_qkv.copy_(uniform(self.w_qkv.shape))
        self.w_fc.copy_(uniform(self.w_fc.shape))
        self.w_out.zero_()
        self.w_proj.zero_()
        self.w_gate.zero_()
        self.lambda_r.fill_(self.config.lambda_r_init)
        self.lambda_0.fill_(self.config.lambda_0_init)
        if self.config.smear:
            self.lambda_s.zero_()
        if self.config.bigram_layers:
            self.bigram_embeddings.zero_()

    def to_forward_dtype(self, dtype: torch.dtype) -> None:
        """Rounds every parameter but the scalars to what the forward reads: bf16 on a GPU, fp32 on a CPU."""
        for name, parameter in self.named_parameters():
            if name not in SCALARS:
                parameter.data = parameter.data.to(dtype)

    def forward(self, tokens: Tensor, targets: Tensor | None = None, reduction: str = "mean") -> Tensor:
        """The loss in nats, or the logits.

        Args:
            tokens: [B, T] integers, T ≤ seq_len.
            targets: [B, T] integers, or None.
            reduction: "mean" for one number, "none" for one loss a token.

        Returns:
            with targets, the loss: a scalar or [B, T]; without, the last position's logits [B, V]. All in fp32.
        """
        x = self.features(tokens)
        lm_head = kernels.layer_weight(self.lm_head)
        if targets is None:
            return kernels.softcapped_logits(x[:, -1], lm_head)
        loss = kernels.linear_cross_entropy(x.flatten(0, 1), lm_head, targets.flatten(), reduction=reduction)
        return loss.view_as(targets) if reduction == "none" else loss

    def features(self, tokens: Tensor) -> Tensor:
        """The final normed stream [B, T, D]: what the head reads."""
        config, weight = self.config, kernels.layer_weight
        tables = [weight(self.wte), *(weight(self.value_embeddings, j) for j in range(len(config.ve_layers)))]
        x, *values = kernels.embedding(tokens, tables)
        sources = {i: (tokens, table) for i, table in zip(config.ve_layers, tables[1:], strict=True)}
        values = dict(zip(config.ve_layers, values, strict=True))
        if config.bigram_layers:
            pairs = self._hashed_pairs(tokens)
            tables = [weight(self.bigram_embeddings, j) for j in range(len(config.bigram_layers))]
            sources |= {i: (pairs, table) for i, table in zip(config.bigram_layers, tables, strict=True)}
            values |= dict(zip(config.bigram_layers, kernels.embedding(pairs, tables), strict=True))
        x = x0 = self._smeared_norm(x) if self.config.smear else kernels.rms_norm(x)[1]
        for i in range(config.depth):
            value = None
            if i in values:  # popped: a layer may forget its own
                ids, table = sources[i]
                value = values.pop(i), partial(kernels.embedding, ids, [table])
            x, x0 = self._layer(i, x, x0, value)
        return kernels.rms_norm(x)[1]

    def _hashed_pairs(self, tokens: Tensor) -> Tensor:
        """Of each token and the one before it a row of the tables of pairs: [B, T]. Before the first is token 0."""
        tokens = tokens.long()
        before = F.pad(tokens, (1, -1))
        # Two odd factors and an exclusive or, as in modded-nanogpt's record of hashed bigrams.
        return (before * 36313 ^ tokens * 27191) % (self.config.bigram_rows * self.config.vocab_size)

    def _smeared_norm(self, x: Tensor) -> Tensor:
        """The norm of each token's embedding with λₛ times that of the token before: x [B, T, D]."""
        before = F.pad(x, (0, 0, 1, -1))  # 0 before the first
        one = torch.ones((), dtype=self.lambda_s.dtype, device=x.device)
        return kernels.rms_norm(x, before, one, kernels.layer_weight(self.lambda_s, 0))[1]

    def _layer(
        self, i: int, x: Tensor, x0: Tensor, value: tuple[Tensor, Callable] | None
    ) -> tuple[Tensor, Tensor]:
        """One layer: x [B, T, D], its value embedding [B, T, KVH·head_dim] and how to look it up again. Returns x, and
        x0 for the layer after it."""
        config, weight = self.config, kernels.layer_weight
        # The last layer's backward comes first: what it keeps is there at the peak anyway.
        recompute = self.recompute and i < config.depth - 1
        streams = x, x0, weight(self.lambda_r, i), weight(self.lambda_0, i)
        w_qkv, w_fc, w_proj = weight(self.w_qkv, i), weight(self.w_fc, i), weight(self.w_proj, i)
        ve, look_up = value or (None, None)
        w_gate = None if value is None else weight(self.w_gate, config.gated_layers.index(i))
        # Fused, a norm comes as factors, which only the ops that have it in their epilogues can read.
        norm = kernels.norm_factors if self.fused_norms else kernels.rms_norm
        x, y, x0 = norm(*streams)
        with _forgetting(y, lambda: norm(*streams, y_only=True)[1], recompute):
            qkv, gate = kernels.qkv_projection(y, w_qkv, w_gate)
        with _forgetting(ve, lambda: look_up()[0], recompute and value is not None):
            attn = kernels.rotary_attention(
                qkv, self.cos, self.sin, config.num_heads, config.windows[i], ve, gate, overwrite=True,
                key_offset=i in config.offset_layers,
            )  # fmt: skip
        # A factor is also what the products before attention have kept.
        x = kernels.linear(attn, weight(self.w_out, i), residual=x, overwrite=not self.fused_norms)
        x, y = norm(x)
        return kernels.relu2_mlp(y, w_fc, w_proj, residual=x, recompute=recompute, overwrite=True), x0


def _forgetting(
    tensor: Tensor | kernels.Factors | None, again: Callable[[], Tensor | kernels.Factors], when: bool
) -> AbstractContextManager:
    return kernels.recomputed(tensor, again) if when else nullcontext()
