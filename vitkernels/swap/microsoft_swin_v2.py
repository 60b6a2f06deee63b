"""Rules for Microsoft's own code of Swin Transformer V2, its repository's ``models.swin_transformer_v2``.

Imported only if that module is imported. Pickle needs the subclasses at module level.
"""

from __future__ import annotations

import torch
from models.swin_transformer_v2 import Mlp, PatchEmbed, PatchMerging, SwinTransformerBlock, WindowAttention

from vitkernels.layers import fused, records
from vitkernels.layers.windows import continuous_bias, cosine_scale
from vitkernels.swap import _microsoft
from vitkernels.swap._microsoft import Pair
from vitkernels.swap._rules import add
from vitkernels.swap._windows import TABLE_MLP


def _attention(attn: WindowAttention, image: Pair, shift: Pair) -> records.Attention:
    children, bias = attn._modules, records.parameter(attn, "q_bias")
    if bias is not None:  # keys have none
        v_bias = records.parameter(attn, "v_bias")
        bias = torch.cat((bias, torch.zeros_like(v_bias), v_bias))
    table = continuous_bias(children["cpb_mlp"], attn.relative_coords_table, attn.num_heads)
    scale = cosine_scale(records.parameter(attn, "logit_scale"))
    return records.Attention(
        records.Linear(records.linear(children["qkv"]).weight, bias),
        records.linear(children["proj"]),
        attn.num_heads,
        children["qkv"].in_features // attn.num_heads,
        attn_drop=records.dropout(children["attn_drop"]),
        proj_drop=records.dropout(children["proj_drop"]),
        positions=records.Windows(image, tuple(attn.window_size), shift, table, scale),
    )


class FusedMlp(_microsoft.Mlp, Mlp):
    """Microsoft's Mlp on :func:`vitkernels.ops.mlp`."""


class FusedWindowAttention(_microsoft.WindowAttention, WindowAttention):
    """Microsoft's cosine WindowAttention on :func:`vitkernels.ops.window_attention`."""

    _attention = staticmethod(_attention)


class FusedSwinTransformerBlock(_microsoft.SwinTransformerBlock, SwinTransformerBlock):
    """Microsoft's block with norms after the branches, as a chain of kernels."""

    _attention = staticmethod(_attention)
    _run = staticmethod(fused.post_norm_block)


class FusedPatchMerging(_microsoft.PatchMerging, PatchMerging):
    """Microsoft's PatchMerging, with its norm behind the product, on :func:`vitkernels.ops.patch_merging`."""

    _norm_last = True


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
        {
            "adapts": False,  # the original reads the weight of qkv
            "parameters": frozenset({"logit_scale"}),
            "optional_parameters": frozenset({"q_bias", "v_bias"}),
        },
        children=TABLE_MLP,
    )
)
