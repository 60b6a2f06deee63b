"""Rules for torchvision's Swin Transformers: the blocks, their attentions and MLPs, patch merging.

Imported only if torchvision's model is imported. Pickle needs the subclasses at module level.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models.swin_transformer import (
    PatchMerging,
    PatchMergingV2,
    ShiftedWindowAttention,
    ShiftedWindowAttentionV2,
    SwinTransformerBlock,
    SwinTransformerBlockV2,
)
from torchvision.ops.misc import MLP
from torchvision.ops.stochastic_depth import StochasticDepth

from vitkernels.layers import fused, records
from vitkernels.layers.windows import continuous_bias, cosine_scale
from vitkernels.swap import _patch_merging
from vitkernels.swap._limits import packed_heads_limit
from vitkernels.swap._rules import Rule, add, runs_fused
from vitkernels.swap._windows import TABLE_MLP, is_shift
from vitkernels.swap.torchvision import MLP_CHILDREN, drop_path, drop_path_limit, mlp


class FusedMLP(MLP):
    """torchvision's MLP of two layers, a Sequential, on :func:`vitkernels.ops.mlp`."""

    def forward(self, input: Tensor) -> Tensor:
        if runs_fused(MLP_RULE, self, input):
            return fused.mlp(mlp(self), input)
        return super().forward(input)


class FusedShiftedWindowAttention(ShiftedWindowAttention):
    """torchvision's ShiftedWindowAttention, in which no window is rolled, padded, cut or masked in memory."""

    def forward(self, x: Tensor) -> Tensor:
        if runs_fused(ATTENTION, self, x) and _fits(self, x):
            return fused.attention(_attention(self, x), x.flatten(1, 2)).unflatten(1, x.shape[1:3])
        return super().forward(x)


class FusedShiftedWindowAttentionV2(ShiftedWindowAttentionV2):
    """torchvision's ShiftedWindowAttentionV2: cosine attention, with a bias that an MLP makes."""

    def forward(self, x: Tensor) -> Tensor:
        if runs_fused(ATTENTION_V2, self, x) and _fits(self, x):
            return fused.attention(_attention_v2(self, x), x.flatten(1, 2)).unflatten(1, x.shape[1:3])
        return super().forward(x)


class FusedSwinTransformerBlock(SwinTransformerBlock):
    """torchvision's pre-norm SwinTransformerBlock, with both residual sums inside the kernels."""

    def forward(self, x: Tensor) -> Tensor:
        if runs_fused(BLOCK, self, x) and _fits(self.attn, x):
            return fused.block(_block(self, _attention(self.attn, x)), x.flatten(1, 2)).view(x.shape)
        return super().forward(x)


class FusedSwinTransformerBlockV2(SwinTransformerBlockV2):
    """torchvision's SwinTransformerBlockV2, with norms after the branches, as a chain of kernels."""

    def forward(self, x: Tensor) -> Tensor:
        if runs_fused(BLOCK_V2, self, x) and _fits(self.attn, x):
            return fused.post_norm_block(_block(self, _attention_v2(self.attn, x)), x.flatten(1, 2)).view(x.shape)
        return super().forward(x)


class FusedPatchMerging(PatchMerging):
    """torchvision's PatchMerging on :func:`vitkernels.ops.patch_merging`."""

    def forward(self, x: Tensor) -> Tensor:
        if runs_fused(MERGING, self, x) and _patch_merging.has_patches(self, x):
            return _patch_merging.merge(self, x)
        return super().forward(x)


class FusedPatchMergingV2(PatchMergingV2):
    """torchvision's PatchMergingV2, with its norm behind the product, on :func:`vitkernels.ops.patch_merging`."""

    def forward(self, x: Tensor) -> Tensor:
        if runs_fused(MERGING_V2, self, x) and _patch_merging.has_patches(self, x):
            return _patch_merging.merge(self, x, norm_last=True)
        return super().forward(x)


def _fits(attn: ShiftedWindowAttention, x: Tensor) -> bool:
    return x.ndim == 4 and is_shift(attn.shift_size, attn.window_size)


def _block(block: SwinTransformerBlock, attn: records.Attention | None = None) -> records.Block:
    children = block._modules
    path = drop_path(children["stochastic_depth"])
    return records.Block(
        records.norm(children["norm1"]),
        _attention(children["attn"]) if attn is None else attn,
        records.norm(children["norm2"]),
        mlp(children["mlp"]),
        drop_path1=path,
        drop_path2=path,
        fp8=records.runs_fp8(block),
    )


def _attention(attn: ShiftedWindowAttention, x: Tensor | None = None) -> records.Attention:
    """Read ``attn`` for images x (B, Y, X, C)."""
    children = attn._modules
    read = records.Attention(
        records.linear(children["qkv"]),
        records.linear(children["proj"]),
        attn.num_heads,
        children["qkv"].in_features // attn.num_heads,
        attn_drop=attn.attention_dropout if attn.training else 0.0,
        proj_drop=attn.dropout if attn.training else 0.0,
    )
    if x is None:
        return read
    image, size = tuple(x.shape[1:3]), tuple(attn.window_size)
    # A window that covers the padded image is not shifted.
    shift = tuple(0 if n <= w else s for n, w, s in zip(image, size, attn.shift_size, strict=True))
    table = attn._parameters.get("relative_position_bias_table")
    return read._replace(positions=records.Windows(image, size, shift, table, roll_padded=True))


def _attention_v2(attn: ShiftedWindowAttentionV2, x: Tensor) -> records.Attention:
    """Read ``attn`` for images x (B, Y, X, C); keys have no bias, whatever the parameter holds."""
    read = _attention(attn, x)
    weight, bias = read.qkv.plain
    if bias is not None:
        q, k, v = bias.chunk(3)
        bias = torch.cat((q, torch.zeros_like(k), v))
    table = continuous_bias(attn.cpb_mlp, attn.relative_coords_table, attn.num_heads)
    positions = read.positions._replace(bias_table=table, logit_scale=cosine_scale(attn.logit_scale))
    return read._replace(qkv=records.Linear(weight, bias), positions=positions)


def _block_limit(block: SwinTransformerBlock) -> str | None:
    return drop_path_limit(block.stochastic_depth)


MLP_RULE = Rule(MLP, FusedMLP, bypassed=MLP_CHILDREN)
ATTENTION = Rule(
    ShiftedWindowAttention,
    FusedShiftedWindowAttention,
    bypassed={"qkv": (nn.Linear,), "proj": (nn.Linear,)},
    adapts=False,  # torchvision reads their weights
    parameters=frozenset({"relative_position_bias_table"}),
    attributes=frozenset({"window_size", "shift_size", "num_heads", "attention_dropout", "dropout"}),
    limit=packed_heads_limit,
    limited_by=("num_heads", "qkv.in_features"),
)
ATTENTION_V2 = Rule(
    ShiftedWindowAttentionV2,
    FusedShiftedWindowAttentionV2,
    bypassed=ATTENTION.bypassed | TABLE_MLP,
    adapts=False,
    parameters=frozenset({"logit_scale"}),
    attributes=ATTENTION.attributes,
    limit=packed_heads_limit,
    limited_by=ATTENTION.limited_by,
)
_BRANCHES = {
    "norm1": (nn.LayerNorm,),
    "stochastic_depth": (StochasticDepth,),
    "norm2": (nn.LayerNorm,),
    "mlp": (MLP,),
}
BLOCK = Rule(
    SwinTransformerBlock,
    FusedSwinTransformerBlock,
    bypassed=_BRANCHES | {"attn": (ShiftedWindowAttention,)},
    limit=_block_limit,
    limited_by=("stochastic_depth.mode",),
    products=_block,
)
BLOCK_V2 = Rule(
    SwinTransformerBlockV2,
    FusedSwinTransformerBlockV2,
    bypassed=_BRANCHES | {"attn": (ShiftedWindowAttentionV2,)},
    limit=_block_limit,
    limited_by=("stochastic_depth.mode",),
)
MERGING, MERGING_V2 = (
    Rule(original, swapped, bypassed=_patch_merging.CHILDREN, adapts=False, attributes=frozenset({"dim"}))
    for original, swapped in ((PatchMerging, FusedPatchMerging), (PatchMergingV2, FusedPatchMergingV2))
)
add(MLP_RULE, ATTENTION, ATTENTION_V2, BLOCK, BLOCK_V2, MERGING, MERGING_V2)
