"""Rules for Microsoft's own code of Swin Transformer, its repository's ``models.swin_transformer``.

Imported only if that module is imported. Pickle needs the subclasses at module level.
"""

from __future__ import annotations

from models.swin_transformer import Mlp, PatchEmbed, PatchMerging, SwinTransformerBlock, WindowAttention

from vitkernels.layers import fused, records
from vitkernels.swap import _microsoft
from vitkernels.swap._microsoft import Pair
from vitkernels.swap._rules import add


def _attention(attn: WindowAttention, image: Pair, shift: Pair) -> records.Attention:
    table = records.parameter(attn, "relative_position_bias_table")
    windows = records.Windows(image, tuple(attn.window_size), shift, table)
    return records.attention(attn)._replace(positions=windows)


def _products(block: SwinTransformerBlock) -> records.Block:
    return _microsoft.block_of(block, records.attention(block.attn))


class FusedMlp(_microsoft.Mlp, Mlp):
    """Microsoft's Mlp on :func:`vitkernels.ops.mlp`."""


class FusedWindowAttention(_microsoft.WindowAttention, WindowAttention):
    """Microsoft's WindowAttention on :func:`vitkernels.ops.window_attention`."""

    _attention = staticmethod(_attention)


class FusedSwinTransformerBlock(_microsoft.SwinTransformerBlock, SwinTransformerBlock):
    """Microsoft's pre-norm block, with both residual sums inside the kernels."""

    _attention = staticmethod(_attention)
    _run = staticmethod(fused.block)


class FusedPatchMerging(_microsoft.PatchMerging, PatchMerging):
    """Microsoft's PatchMerging on :func:`vitkernels.ops.patch_merging`."""


class FusedPatchEmbed(_microsoft.PatchEmbed, PatchEmbed):
    """Microsoft's PatchEmbed on :func:`vitkernels.ops.patch_embed`."""


add(
    *_microsoft.rules(
        {
            Mlp: FusedMlp,
            WindowAttention: FusedWindowAttention,
            SwinTransformerBlock: FusedSwinTransformerBlock,
            PatchMerging: FusedPatchMerging,
            PatchEmbed: FusedPatchEmbed,
        },
        {"parameters": frozenset({"relative_position_bias_table"})},
        products=_products,
    )
)
