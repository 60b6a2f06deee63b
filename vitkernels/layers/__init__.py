"""Modules with timm's names, arguments and state-dict keys, on the ops of :mod:`vitkernels.ops`."""

from torch import nn

from vitkernels.layers import _own
from vitkernels.layers.activation import QuickGELU, create_activation
from vitkernels.layers.attention import Attention
from vitkernels.layers.block import Block
from vitkernels.layers.drop_path import DropPath
from vitkernels.layers.layer_norm import LayerNorm
from vitkernels.layers.layer_scale import LayerScale
from vitkernels.layers.linear import Linear
from vitkernels.layers.mlp import Mlp
from vitkernels.layers.patch_dropout import PatchDropout
from vitkernels.layers.patch_embed import PatchEmbed
from vitkernels.layers.pos_embed import resample_pos_embed, sincos1d, sincos2d
from vitkernels.layers.rms_norm import RmsNorm
from vitkernels.layers.swiglu import SwiGLU, SwiGLUPacked

__all__ = [
    "Attention",
    "Block",
    "DropPath",
    "LayerNorm",
    "LayerScale",
    "Linear",
    "Mlp",
    "PatchDropout",
    "PatchEmbed",
    "QuickGELU",
    "RmsNorm",
    "SwiGLU",
    "SwiGLUPacked",
    "create_activation",
    "resample_pos_embed",
    "sincos1d",
    "sincos2d",
]

# Classes whose parameters a fused forward may read instead of calling the module.
for _cls in (Attention, DropPath, LayerNorm, LayerScale, Mlp, QuickGELU, RmsNorm):
    _own.note(_cls)
for _cls in (nn.Dropout, nn.GELU, nn.Identity, nn.LayerNorm, nn.Linear, nn.SiLU):
    _own.note(_cls)
