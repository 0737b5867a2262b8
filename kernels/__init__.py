"""The ops, one file each, and the only door to them."""

from .adamw import adamw_update
from .calls import op_names, watched
from .choice import Choice, Table, Tile, asked, choose, chosen, key_of, trying
from .common import EPS, Factors, GradScaled, compiles, layer_weight, ops_in_force, recomputed, set_ops
from .embedding import embedding
from .linear import linear
from .linear_cross_entropy import SOFTCAP, linear_cross_entropy, softcapped_logits
from .mlp import norm_relu2_mlp, relu2_mlp
from .muon import muon_update, second_moment_shape
from .polar_express import polar_express
from .qkv_projection import qkv_projection
from .rms_norm import MAX_WIDTH, norm_factors, rms_norm
from .rotary_attention import (
    HEAD_DIMS,
    ROTARY_BASE,
    compiled_attention,
    prepare_compiled_attention,
    rotary_attention,
    rotary_tables,
)

__all__ = [
    "EPS",
    "HEAD_DIMS",
    "MAX_WIDTH",
    "ROTARY_BASE",
    "SOFTCAP",
    "Choice",
    "Factors",
    "GradScaled",
    "Table",
    "Tile",
    "adamw_update",
    "asked",
    "choose",
    "chosen",
    "compiled_attention",
    "compiles",
    "embedding",
    "key_of",
    "layer_weight",
    "linear",
    "linear_cross_entropy",
    "muon_update",
    "norm_factors",
    "norm_relu2_mlp",
    "op_names",
    "ops_in_force",
    "polar_express",
    "prepare_compiled_attention",
    "qkv_projection",
    "recomputed",
    "relu2_mlp",
    "rms_norm",
    "rotary_attention",
    "rotary_tables",
    "second_moment_shape",
    "set_ops",
    "softcapped_logits",
    "trying",
    "watched",
]
