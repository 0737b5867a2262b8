"""Persistent products in place of what the ops launch by default."""

import importlib

from kernels.choice import Choice
from tests.helpers.kernel_checks import SMALL_GEMM

mlp, product = (importlib.import_module(f"kernels.{name}") for name in ("mlp", "product"))
PERSISTENT = {**SMALL_GEMM, "persistent": True}
CHOICES = [*mlp.FC_FORWARD.values(), *mlp.PROJ_BACKWARD.values(), product.PRODUCT]
PORTABLE_KERNELS = ("_fc_fwd_kernel", "_proj_bwd_kernel", "_product_kernel")
TMA_KERNELS = ("_fc_fwd_tma_kernel", "_proj_bwd_tma_kernel", "_product_tma_kernel")


def choose(monkeypatch, tile: dict) -> None:
    """`tile` wherever a product may be persistent; small portable ones for the MLP's other products."""
    tiles = {choice.name: {"way": "triton", **tile} if choice.name == "product" else tile for choice in CHOICES}
    monkeypatch.setattr(Choice, "__call__", lambda self, *shape: tiles.get(self.name) or self.default(*shape))
    monkeypatch.setattr(mlp, "gemm_config", lambda N, K, dtype: SMALL_GEMM)


def forbid(monkeypatch, kernels: tuple[str, ...]) -> None:
    """Launching one of them is an error."""
    for module in (mlp, product):
        for name in kernels:
            if hasattr(module, name):
                monkeypatch.setattr(module, name, None)
