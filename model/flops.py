"""FLOPs per token, counted two ways, and the peaks they are divided by.

`flops_per_token` is the convention that published MFU figures use: attention is charged for a whole window at every
position, causal or not. `flops_per_token_causal` charges only for the query-key pairs that exist. Both count forward
plus backward as three times the forward, and a multiply-add as two. Which parameters multiply a token is a property of
the model (`model.gpt.LOOKED_UP`), whoever updates them; N is the number of those.
"""

import re

from .config import GPTConfig
from .gpt import matrix_parameters

H100_PEAK = 989.5e12  # dense bf16 FLOP/s, SXM datasheet: what `mfu` divides by, on any GPU

# Dense bf16 FLOP/s by whole words of the device's name, from the vendor's datasheets; the first match counts.
DEVICE_PEAKS = {
    "H200 NVL": 835e12,
    "H200": 989.5e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989.5e12,
    "GH200": 989.5e12,
    "H800 PCIe": 756e12,
    "H800": 989.5e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
}


def device_peak(name: str) -> float | None:
    """Dense bf16 peak of a GPU by its name; None, never a wrong number, where it is not known or for a slice (MIG)."""
    if re.search(r"\bMIG\b", name):
        return None
    return next((peak for key, peak in DEVICE_PEAKS.items() if re.search(rf"\b{key}\b", name)), None)


def flops_per_token(config: GPTConfig) -> int:
    """6·N + Σ_layers 12·heads·head_dim·min(window, T)."""
    attention = sum(12 * config.d_model * min(window, config.seq_len) for window in config.windows)
    return 6 * matrix_parameters(config) + attention


def visited_pairs(seq_len: int, window: int) -> int:
    """Query-key pairs of one row of a causal window: Σ_t (min(t, window) + 1)."""
    w = min(window, seq_len - 1)
    return (w + 1) * seq_len - w * (w + 1) // 2


def flops_per_token_causal(config: GPTConfig) -> float:
    """6·N + Σ_layers 12·heads·head_dim·(visited pairs / T)."""
    pairs = sum(visited_pairs(config.seq_len, window) for window in config.windows)
    return 6 * matrix_parameters(config) + 12 * config.d_model * pairs / config.seq_len
