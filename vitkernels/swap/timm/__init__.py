"""Rules for timm, imported only if timm is imported.

    layers.py               LayerNorm, RmsNorm, Attention, Mlp, GluMlp (SwiGLUPacked), SwiGLU, PatchEmbed
    vision_transformer.py   Block, ResPostBlock, ViTamin's GeGluMlp
    eva.py                  EvaAttention, AttentionRope, EvaBlock, EvaBlockPostNorm
    swin_transformer.py     Swin's SwinTransformerBlock, WindowAttention
    swin_transformer_v2.py  SwinTransformerV2Block, SwinTransformerV2CrBlock, and their attentions
    naflexvit.py            NaFlexVit: images of different sizes packed into one row of tokens

The subclasses take the same constructor arguments as timm's classes. So you can build a model from them instead of
accelerating one; its other parts are then timm's::

    from vitkernels.swap.timm import FusedAttention, FusedBlock, FusedPatchEmbed
    timm.create_model(name, block_fn=FusedBlock, embed_layer=FusedPatchEmbed)   # whole blocks
    timm.create_model(name, attn_layer=FusedAttention)                          # only the attention
"""

from vitkernels.swap.timm.eva import FusedAttentionRope, FusedEvaAttention, FusedEvaBlock, FusedEvaBlockPostNorm
from vitkernels.swap.timm.layers import (
    FusedAttention,
    FusedGluMlp,
    FusedLayerNorm,
    FusedMlp,
    FusedPatchEmbed,
    FusedRmsNorm,
    FusedSwiGLU,
)
from vitkernels.swap.timm.naflexvit import FusedNaFlexVit
from vitkernels.swap.timm.swin_transformer import FusedSwinTransformerBlock, FusedWindowAttention
from vitkernels.swap.timm.swin_transformer_v2 import (
    FusedSwinTransformerV2Block,
    FusedSwinTransformerV2CrBlock,
    FusedWindowMultiHeadAttention,
)
from vitkernels.swap.timm.swin_transformer_v2 import FusedWindowAttention as FusedWindowAttentionV2
from vitkernels.swap.timm.vision_transformer import FusedBlock, FusedGeGluMlp, FusedResPostBlock

__all__ = [
    "FusedAttention",
    "FusedAttentionRope",
    "FusedBlock",
    "FusedEvaAttention",
    "FusedEvaBlock",
    "FusedEvaBlockPostNorm",
    "FusedGeGluMlp",
    "FusedGluMlp",
    "FusedLayerNorm",
    "FusedMlp",
    "FusedNaFlexVit",
    "FusedPatchEmbed",
    "FusedResPostBlock",
    "FusedRmsNorm",
    "FusedSwiGLU",
    "FusedSwinTransformerBlock",
    "FusedSwinTransformerV2Block",
    "FusedSwinTransformerV2CrBlock",
    "FusedWindowAttention",
    "FusedWindowAttentionV2",
    "FusedWindowMultiHeadAttention",
]
