"""Forms of the ops for a CPU's speed: `--ops cpu`, the default there. The references are for being believed by reading;
these are for running, and are checked against them.

What they have in common:

- Backwards are written by hand. PyTorch's own keep and move several times as much, and on a CPU a pass over memory
  costs as much as a product.
- The stream and all sums are fp32 (or wider); the operands of products are in the dtype of the weights. Where that is
  bf16, the optimizer keeps fp32 masters, as on a GPU, and nothing is converted twice in a step.
- Gradients of weights are added to their `main_grad` where they have one (common.py).
"""

from .attention import rotary_attention_cpu
from .embedding import embedding_cpu
from .linear_cross_entropy import linear_cross_entropy_cpu, token_losses_cpu
from .norm import rms_norm_cpu
from .products import linear_cpu, qkv_projection_cpu, relu2_mlp_cpu
from .updates import adamw_update_cpu, muon_update_cpu

__all__ = [
    "adamw_update_cpu",
    "embedding_cpu",
    "linear_cpu",
    "linear_cross_entropy_cpu",
    "muon_update_cpu",
    "qkv_projection_cpu",
    "relu2_mlp_cpu",
    "rms_norm_cpu",
    "rotary_attention_cpu",
    "token_losses_cpu",
]
