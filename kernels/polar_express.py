"""Polar Express: the nearest (semi-)orthogonal matrix to G, by five odd polynomials of growing accuracy.

    X ← G / (1.02·‖G‖_F + 1e-6), then five times X ← aX + (bA + cA²)X, A = XXᵀ

on the short side (XᵀX for a tall G). Every singular value of G goes to about 1 where it is not tiny. The iterates are
bf16 on purpose: the polynomials correct the rounding of the ones before. Coefficients: Amsel, Persson, Musco, Gower,
"The Polar Express", arXiv 2505.16932, for 5 steps and a lower bound of 1e-3, with a safety factor of 1.02.
"""

import torch
from torch import Tensor

COEFFICIENTS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def polar_express_ref(g: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    tall = g.shape[-2] > g.shape[-1]
    norm = g.norm(dim=(-2, -1), keepdim=True)
    x = (g / (1.02 * norm + 1e-6)).to(dtype)
    if tall:
        x = x.mT
    for a, b, c in COEFFICIENTS:
        A = x @ x.mT
        # Fused, so that each sum is rounded once: bf16 is then 2% from fp64, and 5% unfused.
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        x = torch.baddbmm(x, B, x, beta=a)
    return x.mT if tall else x


def polar_express(g: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The orthogonal factor of each matrix of a batch.

    Args:
        g: [batch, rows, cols], fp32 or fp64; zero matrices stay zero.
        dtype: of the iterates.

    Returns:
        the same shape, in `dtype`.
    """
    return polar_express_ref(g, dtype)
