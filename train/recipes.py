"""Recipes: what a run trains where no flag says otherwise, `--recipe NAME`. One entry is one recipe.

An entry names fields of TrainConfig that are None by default, and `vocab_size`, of the embedded corpus where `train`
prepares it by itself. What an entry leaves out is as in `published`. The width is not in it: 64 x depth, rounded up to
whole heads. What a machine decides, and no recipe, is in `DEVICE_DEFAULTS`.
"""

import difflib
from typing import Any

from prepare import InputError

RECIPES: dict[str, dict[str, Any]] = {
    # The published GPU configuration, github.com/karpathy/autoresearch: 50.3M parameters.
    "published": {
        "vocab_size": 8192,
        "depth": 8,
        "head_dim": 128,
        "seq_len": 2048,
        "window_pattern": "SSSL",
        "short_window": 2,
        "smear": False,
        "bigram_rows": 0,
        "key_offset": False,
        "rope_base": 10_000.0,
        "init_scale": 1.0,
        "lambda_r_init": 1.0,
        "lambda_0_init": 0.1,
        "total_batch_size": 524_288,
        "lm_head_lr": 0.004,
        "embedding_lr": 0.6,
        "scalar_lr": 0.5,
        "matrix_lr": 0.04,
        "weight_decay": 0.2,
        "lm_head_decay": 0.0,
        "wte_decay": 0.0,
        "value_embedding_decay": 0.0,
        "bigram_decay": 0.0,
        "momentum_ramp": 300,
        "warmup_ratio": 0.0,
        "warmdown_ratio": 0.5,
        "final_lr_frac": 0.0,
    },
    # Of 126 runs of other people on an H100, the one that did best: branch exp/H100/mar8 of the same repository, commit
    # 438a26e, val_bpb 0.969686 there against 0.997900 of `published`. 640 wide, 80.9M parameters. There the tables are
    # bf16, here fp32 masters. Not yet measured here.
    "tuned": {
        "depth": 9,
        "window_pattern": "SSSSL",
        "short_window": 8,
        "rope_base": 200_000.0,
        "init_scale": 0.68,
        "lambda_0_init": 0.05,
        "total_batch_size": 262_144,
        "lm_head_lr": 0.005,
        "embedding_lr": 0.9,
        "lm_head_decay": 0.01,
        "wte_decay": 0.001,
        "value_embedding_decay": 0.003,
        "momentum_ramp": 200,
        "warmdown_ratio": 0.75,
        "final_lr_frac": 0.05,
    },
    # The best that was found for a minute on two cores (bench/LOG.md, 2026-11-30).
    "cpu": {
        "vocab_size": 2048,
        "depth": 2,
        "head_dim": 64,
        "seq_len": 1024,
        "short_window": 8,
        "smear": True,
        "bigram_rows": 2,
        "key_offset": True,
        "total_batch_size": 4096,
        "bigram_decay": 0.1,
        # 4,096 tokens a step are a noisy gradient: gentler rates are steadier over seeds (bench/LOG.md, 2026-11-25).
        "embedding_lr": 0.1,
        "scalar_lr": 0.1,
        "matrix_lr": 0.02,
    },
}

# Which recipe a device takes by itself, and what is given by the machine whatever the recipe. Rows of a micro-step are
# never more than the recipe has in a step.
DEVICE_DEFAULTS: dict[str, dict[str, Any]] = {
    "cuda": {"recipe": "published", "time_budget": 300.0, "eval_tokens": 40 * 524_288, "device_batch_size": 128},
    "cpu": {"recipe": "cpu", "time_budget": 60.0, "eval_tokens": 150_000, "device_batch_size": 8},
}

# What a saved configuration without the field was trained with. No recipe: whatever becomes of those, this stays.
BEFORE_RECIPES: dict[str, Any] = {
    "recipe": "published",
    "short_window": 2,
    "smear": False,
    "bigram_rows": 0,
    "key_offset": False,
    "rope_base": 10_000.0,
    "init_scale": 1.0,
    "lambda_r_init": 1.0,
    "lambda_0_init": 0.1,
    "lm_head_decay": 0.0,
    "wte_decay": 0.0,
    "value_embedding_decay": 0.0,
    "bigram_decay": 0.0,
    "momentum_ramp": 300,
}


def why_no_recipe(name: str) -> str:
    """Why there is none of this name, and which may be meant; empty where there is one."""
    if name in RECIPES:
        return ""
    near = difflib.get_close_matches(name, RECIPES, n=1)
    return f"{name!r} is none of {', '.join(RECIPES)}" + (f": did you mean {near[0]}?" if near else "")


def recipe_defaults(name: str) -> dict[str, Any]:
    """The fields of TrainConfig that the recipe decides. Raises InputError where there is no such recipe."""
    if reason := why_no_recipe(name):
        raise InputError(f"--recipe {reason}")
    return {key: value for key, value in (RECIPES["published"] | RECIPES[name]).items() if key != "vocab_size"}


def vocab_size(name: str) -> int:
    """Tokens of the embedded corpus where `train` prepares it for this recipe."""
    return RECIPES[name].get("vocab_size", RECIPES["published"]["vocab_size"])
