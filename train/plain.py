"""A trained model as `modeling.py` has it, in plain PyTorch with a cache: what writes text, here and where it is
exported to. model/gpt.py, which trains, has no cache."""

import torch

from kernels import EPS, SOFTCAP
from model import GPT, GPTConfig
from model.config import GATE_CHANNELS
from prepare import InputError

from . import modeling

CHECKED = 256  # tokens on which the two are compared
# How far their logits may lie from each other, as a share of them: other sums in fp32, other roundings in bf16.
TOLERANCE, BF16_TOLERANCE = 1e-3, 5e-2


def config_of(config: GPTConfig) -> dict:
    """What modeling.py reads."""
    return {
        "vocab_size": config.vocab_size,
        "seq_len": config.seq_len,
        "depth": config.depth,
        "d_model": config.d_model,
        "num_heads": config.num_heads,
        "num_kv_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "windows": config.windows,
        "smear": config.smear,
        "offset_layers": config.offset_layers,
        "ve_layers": config.ve_layers,
        "bigram_layers": config.bigram_layers,
        "bigram_rows": config.bigram_rows,
        "gate_channels": GATE_CHANNELS,
        "rotary_base": config.rope_base,
        "norm_eps": EPS,
        "softcap": SOFTCAP,
    }


@torch.no_grad()
def plain(model: GPT) -> modeling.GPT:
    """With the parameters of `model` themselves. Raises InputError where modeling.py does not compute what it does, as
    after a change to model/gpt.py alone."""
    with torch.device("meta"):
        copy = modeling.GPT(config_of(model.config))
    try:
        copy.load_state_dict(dict(model.named_parameters()), assign=True)
    except RuntimeError:
        raise InputError("train/modeling.py has not the parameters of model/gpt.py: bring it up to date") from None
    length = min(model.config.seq_len, CHECKED)
    tokens = torch.randint(model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    tokens = tokens.to(model.wte.device)
    ours, theirs = model(tokens), copy.logits(copy.features(tokens)[:, -1])
    tolerance = BF16_TOLERANCE if model.wte.dtype == torch.bfloat16 else TOLERANCE
    if not (ours - theirs).norm() <= tolerance * ours.norm():  # a NaN too is no agreement
        raise InputError("train/modeling.py gives other logits than model/gpt.py: bring it up to date")
    return copy.eval()
