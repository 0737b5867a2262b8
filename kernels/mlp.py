"""The feed-forward block: out = residual + relu(x·W_fcᵀ)²·W_projᵀ.

Source of relu²: So et al., Primer, arXiv 2109.08668.
"""

import torch.nn.functional as F
from torch import Tensor


def relu2_mlp_ref(x: Tensor, w_fc: Tensor, w_proj: Tensor, residual: Tensor) -> Tensor:
    post = F.relu(F.linear(x, w_fc)).square()
    return residual + F.linear(post, w_proj)


def relu2_mlp(x: Tensor, w_fc: Tensor, w_proj: Tensor, residual: Tensor) -> Tensor:
    """The feed-forward block with its residual.

    Args:
        x: [..., D], the normed stream.
        w_fc: [F, D]; w_proj: [D, F].
        residual: [..., D], the stream itself.

    Returns:
        [..., D].
    """
    return relu2_mlp_ref(x, w_fc, w_proj, residual)
