"""Text from a model, token by token."""

import torch
from torch import Tensor

from model import GPT
from prepare import InputError


def next_token(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    """One draw from logits [V]; the likeliest where temperature is 0. Raises InputError where no logit is a number."""
    logits = logits.float().cpu()
    if not logits.max().isfinite():
        raise InputError("the model's logits are not finite: it has learned nothing; name another RUN")
    if temperature == 0:
        return int(logits.argmax())
    if top_k:
        least = logits.topk(min(top_k, logits.numel())).values[-1]
        logits = logits.masked_fill(logits < least, float("-inf"))
    # Of differences from the largest, and in fp64: no temperature above 0 makes a NaN of them, however large or small.
    probabilities = torch.softmax((logits - logits.max()).double() / temperature, dim=-1).float()
    return int(torch.multinomial(probabilities, 1, generator=generator))


@torch.no_grad()
def generate(
    model: GPT, tokens: list[int], count: int, *, banned: list[int], temperature: float, top_k: int, seed: int
) -> list[int]:
    """`count` tokens after `tokens`, none of them from `banned`. The context is the last seq_len tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens, device = list(tokens), model.wte.device
    start = len(tokens)
    for _ in range(count):
        context = torch.tensor([tokens[-model.config.seq_len :]], device=device)
        logits = model(context)[0]
        logits[banned] = float("-inf")
        tokens.append(next_token(logits, temperature, top_k, generator))
    return tokens[start:]
