"""`embedding` on a CPU: gradients are added row by row where they belong, in the order of the tokens."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens, main_grads, *tables):
        ctx.set_materialize_grads(False)
        tokens = tokens.reshape(-1)
        ctx.save_for_backward(tokens)
        ctx.main_grads, ctx.tables = main_grads, [(table.shape, table.dtype) for table in tables]
        return tuple(table.index_select(0, tokens) for table in tables)

    @staticmethod
    @once_differentiable
    def backward(ctx, *douts):
        (tokens,) = ctx.saved_tensors
        grads = []
        for dout, main_grad, (shape, dtype) in zip(douts, ctx.main_grads, ctx.tables, strict=True):
            if dout is None:
                grads.append(None)
                continue
            wide = torch.promote_types(dtype, torch.float32)  # a token may occur a thousand times
            into = torch.zeros(shape, dtype=wide, device=dout.device) if main_grad is None else main_grad
            into.index_add_(0, tokens, dout.to(into.dtype))
            grads.append(into.to(dtype) if main_grad is None else None)
        return None, None, *grads


def embedding_cpu(tokens: Tensor, tables: list[Tensor]) -> list[Tensor]:
    """`embedding`."""
    rows = _Embedding.apply(tokens, [getattr(table, "main_grad", None) for table in tables], *tables)
    return [each.view(*tokens.shape, -1) for each in rows]
