"""The GPT, its configuration, and its parameter and FLOP counts."""

from .config import GPTConfig
from .flops import flops_per_token, flops_per_token_causal, visited_pairs
from .gpt import GPT

__all__ = ["GPT", "GPTConfig", "flops_per_token", "flops_per_token_causal", "visited_pairs"]
