"""Each recipe's model in small, and one with all tricks at once; their parameters random, so that each has a say."""

import torch

from model import GPT, GPTConfig
from train.recipes import RECIPES, recipe_defaults

OF_THE_RECIPE = ("window_pattern", "short_window", "smear", "bigram_rows", "key_offset", "rope_base")
SIZE = {"vocab_size": 300, "seq_len": 24, "depth": 3, "d_model": 64, "head_dim": 16}


def of_recipe(name: str) -> GPTConfig:
    shape = {field: recipe_defaults(name)[field] for field in OF_THE_RECIPE}
    return GPTConfig(**SIZE, **shape)


SHAPES = {name: of_recipe(name) for name in RECIPES} | {
    "every trick, two heads to a key": GPTConfig(
        **SIZE, num_kv_heads=2, window_pattern="LS", short_window=4, smear=True, bigram_rows=3, key_offset=True
    ),
}


def random_model(config: GPTConfig, seed: int = 0) -> GPT:
    """In fp32, with logits that reach past 1."""
    generator = torch.Generator().manual_seed(seed)
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (1.0 if parameter.dim() == 1 else 0.2))
    return model.eval()


@torch.no_grad()
def logits_of(model: GPT, tokens: torch.Tensor) -> torch.Tensor:
    """The trained model's own, [B, T, V], each position by a forward of what leads to it."""
    return torch.stack([model(tokens[:, : t + 1]) for t in range(tokens.shape[1])], dim=1)


def random_tokens(config: GPTConfig, rows: int = 3) -> torch.Tensor:
    return torch.randint(config.vocab_size, (rows, config.seq_len), generator=torch.Generator().manual_seed(1))
