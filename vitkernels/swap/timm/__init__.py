"""Rules for timm, imported only if timm is imported.

    layers.py               LayerNorm, LayerNorm2d, RmsNorm, Attention, Mlp, GluMlp (SwiGLUPacked), SwiGLU, PatchEmbed
    vision_transformer.py   Block, ResPostBlock, ViTamin's GeGluMlp
    beit.py                 BEiT's Attention and Block
    eva.py                  EvaAttention, AttentionRope, EvaBlock, EvaBlockPostNorm
    class_attention.py      CaiT's ClassAttn and LayerScaleBlockClassAttn, VOLO's ClassAttention and ClassBlock
    davit.py                DaViT's SpatialBlock
    gcvit.py                GlobalContextVitBlock
    hieradet_sam2.py        SAM 2's MultiScaleAttention and MultiScaleBlock
    maxxvit.py              MaxViT's and CoAtNet's transformer blocks
    mobilevit.py            MobileViT's MobileVitBlock
    swin_transformer.py     Swin's SwinTransformerBlock, WindowAttention, PatchMerging
    swin_transformer_v2.py  SwinTransformerV2Block, SwinTransformerV2CrBlock, their attentions, V2's PatchMerging
    swin_transformer_v2_cr.py      the other PatchMerging
    mvitv2.py               MViTv2's MultiScaleAttention and MultiScaleBlock
    naflexvit.py            NaFlexVit: images of different sizes packed into one row of tokens
    nest.py                 NesT's TransformerLayer
    twins.py                Twins's attentions and Block
    volo.py                 VOLO's Transformer
    rel_pos.py              no rules: relative positions as tables
    vision_transformer_sam.py      SAM's Attention and Block
    vision_transformer_relpos.py   RelPosAttention, RelPosBlock, ResPostRelPosBlock

The subclasses take the same constructor arguments as timm's classes. So you can build a model from them instead of
accelerating one; its other parts are then timm's::

    from vitkernels.swap.timm import FusedAttention, FusedBlock, FusedPatchEmbed
    timm.create_model(name, block_fn=FusedBlock, embed_layer=FusedPatchEmbed)   # whole blocks
    timm.create_model(name, attn_layer=FusedAttention)                          # only the attention
"""

from vitkernels.swap.timm.beit import FusedAttention as FusedBeitAttention
from vitkernels.swap.timm.beit import FusedBlock as FusedBeitBlock
from vitkernels.swap.timm.class_attention import (
    FusedClassAttention,
    FusedClassAttn,
    FusedClassBlock,
    FusedLayerScaleBlockClassAttn,
)
from vitkernels.swap.timm.davit import FusedSpatialBlock
from vitkernels.swap.timm.eva import FusedAttentionRope, FusedEvaAttention, FusedEvaBlock, FusedEvaBlockPostNorm
from vitkernels.swap.timm.gcvit import FusedGlobalContextVitBlock
from vitkernels.swap.timm.hieradet_sam2 import FusedMultiScaleAttention, FusedMultiScaleBlock
from vitkernels.swap.timm.layers import (
    FusedAttention,
    FusedGluMlp,
    FusedLayerNorm,
    FusedLayerNorm2d,
    FusedMlp,
    FusedPatchEmbed,
    FusedRmsNorm,
    FusedSwiGLU,
)
from vitkernels.swap.timm.maxxvit import (
    FusedAttentionCl,
    FusedParallelPartitionAttention,
    FusedPartitionAttention2d,
    FusedPartitionAttentionCl,
    FusedTransformerBlock2d,
)
from vitkernels.swap.timm.mobilevit import FusedMobileVitBlock
from vitkernels.swap.timm.mvitv2 import FusedMultiScaleAttention as FusedMViTv2Attention
from vitkernels.swap.timm.mvitv2 import FusedMultiScaleBlock as FusedMViTv2Block
from vitkernels.swap.timm.naflexvit import FusedNaFlexVit
from vitkernels.swap.timm.nest import FusedTransformerLayer
from vitkernels.swap.timm.swin_transformer import FusedPatchMerging, FusedSwinTransformerBlock, FusedWindowAttention
from vitkernels.swap.timm.swin_transformer_v2 import FusedPatchMerging as FusedPatchMergingV2
from vitkernels.swap.timm.swin_transformer_v2 import (
    FusedSwinTransformerV2Block,
    FusedSwinTransformerV2CrBlock,
    FusedWindowMultiHeadAttention,
)
from vitkernels.swap.timm.swin_transformer_v2 import FusedWindowAttention as FusedWindowAttentionV2
from vitkernels.swap.timm.swin_transformer_v2_cr import FusedPatchMerging as FusedPatchMergingCr
from vitkernels.swap.timm.twins import FusedBlock as FusedTwinsBlock
from vitkernels.swap.timm.twins import FusedGlobalSubSampleAttn, FusedLocallyGroupedAttn
from vitkernels.swap.timm.vision_transformer import FusedBlock, FusedGeGluMlp, FusedResPostBlock
from vitkernels.swap.timm.vision_transformer_relpos import (
    FusedRelPosAttention,
    FusedRelPosBlock,
    FusedResPostRelPosBlock,
)
from vitkernels.swap.timm.vision_transformer_sam import FusedAttention as FusedSamAttention
from vitkernels.swap.timm.vision_transformer_sam import FusedBlock as FusedSamBlock
from vitkernels.swap.timm.volo import FusedTransformer

__all__ = [
    "FusedAttention",
    "FusedAttentionCl",
    "FusedAttentionRope",
    "FusedBeitAttention",
    "FusedBeitBlock",
    "FusedBlock",
    "FusedClassAttention",
    "FusedClassAttn",
    "FusedClassBlock",
    "FusedEvaAttention",
    "FusedEvaBlock",
    "FusedEvaBlockPostNorm",
    "FusedGeGluMlp",
    "FusedGlobalContextVitBlock",
    "FusedGlobalSubSampleAttn",
    "FusedGluMlp",
    "FusedLayerNorm",
    "FusedLayerNorm2d",
    "FusedLayerScaleBlockClassAttn",
    "FusedLocallyGroupedAttn",
    "FusedMViTv2Attention",
    "FusedMViTv2Block",
    "FusedMlp",
    "FusedMobileVitBlock",
    "FusedMultiScaleAttention",
    "FusedMultiScaleBlock",
    "FusedNaFlexVit",
    "FusedParallelPartitionAttention",
    "FusedPartitionAttention2d",
    "FusedPartitionAttentionCl",
    "FusedPatchEmbed",
    "FusedPatchMerging",
    "FusedPatchMergingCr",
    "FusedPatchMergingV2",
    "FusedRelPosAttention",
    "FusedRelPosBlock",
    "FusedResPostBlock",
    "FusedResPostRelPosBlock",
    "FusedRmsNorm",
    "FusedSamAttention",
    "FusedSamBlock",
    "FusedSpatialBlock",
    "FusedSwiGLU",
    "FusedSwinTransformerBlock",
    "FusedSwinTransformerV2Block",
    "FusedSwinTransformerV2CrBlock",
    "FusedTransformer",
    "FusedTransformerBlock2d",
    "FusedTransformerLayer",
    "FusedTwinsBlock",
    "FusedWindowAttention",
    "FusedWindowAttentionV2",
    "FusedWindowMultiHeadAttention",
]
