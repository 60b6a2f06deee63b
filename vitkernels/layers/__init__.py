"""Modules with timm's names, arguments and state-dict keys, on the ops of :mod:`vitkernels.ops`."""

from torch import nn

from vitkernels.layers import _own
from vitkernels.layers.activation import QuickGELU, create_activation
from vitkernels.layers.attention import Attention
from vitkernels.layers.beit_block import BeitAttention, BeitBlock, RelativePositionBias
from vitkernels.layers.block import Block
from vitkernels.layers.drop_path import DropPath
from vitkernels.layers.layer_norm import LayerNorm
from vitkernels.layers.layer_scale import LayerScale
from vitkernels.layers.linear import Linear
from vitkernels.layers.masking import RandomMask, blockwise_mask, random_mask
from vitkernels.layers.mlp import Mlp
from vitkernels.layers.patch_dropout import PatchDropout
from vitkernels.layers.patch_embed import PatchEmbed
from vitkernels.layers.patch_merging import PatchMerging
from vitkernels.layers.pos_embed import resample_pos_embed, rope2d, sincos1d, sincos2d
from vitkernels.layers.rel_pos import resize_rel_pos_bias_table
from vitkernels.layers.rms_norm import RmsNorm
from vitkernels.layers.swiglu import SwiGLU, SwiGLUPacked
from vitkernels.layers.swin_block import SwinTransformerBlock, SwinTransformerV2Block
from vitkernels.layers.window_attention import WindowAttention, WindowAttentionV2

__all__ = [
    "Attention",
    "BeitAttention",
    "BeitBlock",
    "Block",
    "DropPath",
    "LayerNorm",
    "LayerScale",
    "Linear",
    "Mlp",
    "PatchDropout",
    "PatchEmbed",
    "PatchMerging",
    "QuickGELU",
    "RandomMask",
    "RelativePositionBias",
    "RmsNorm",
    "SwiGLU",
    "SwiGLUPacked",
    "SwinTransformerBlock",
    "SwinTransformerV2Block",
    "WindowAttention",
    "WindowAttentionV2",
    "blockwise_mask",
    "create_activation",
    "random_mask",
    "resample_pos_embed",
    "resize_rel_pos_bias_table",
    "rope2d",
    "sincos1d",
    "sincos2d",
]

# Classes whose parameters a fused forward may read instead of calling the module.
for _cls in (Attention, BeitAttention, DropPath, LayerNorm, LayerScale, Mlp, QuickGELU, RmsNorm, SwiGLU, SwiGLUPacked):
    _own.note(_cls)
for _cls in (WindowAttention, WindowAttentionV2):
    _own.note(_cls)
for _cls in (nn.Dropout, nn.GELU, nn.Identity, nn.LayerNorm, nn.Linear, nn.SiLU):
    _own.note(_cls)
