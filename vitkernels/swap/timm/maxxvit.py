"""The transformer parts of timm's maxxvit.py: MaxViT, MaxxViT, CoAtNet, CoAtNeXt.

Convolutions stay. Blocks on (B, C, Y, X) take their tokens from channels_last memory and leave them there.
"""

from __future__ import annotations

import torch
from timm.layers import ConvMlp, LayerNorm2d, Mlp
from timm.models.maxxvit import (
    Attention2d,
    AttentionCl,
    LayerScale,
    LayerScale2d,
    ParallelPartitionAttention,
    PartitionAttention2d,
    PartitionAttentionCl,
    TransformerBlock2d,
)
from torch import Tensor, nn

from vitkernels.layers import fused, records
from vitkernels.layers.records import Windows
from vitkernels.swap._images import (
    channels_first,
    pointwise,
    pointwise_limit,
    tokens_of,
    tokens_of_channels_first,
    whole_windows,
)
from vitkernels.swap._limits import head_dim_limit, layer_scales_limit
from vitkernels.swap._rules import PARAMETERS, Rule, add, runs_fused
from vitkernels.swap.timm.layers import ACTIVATIONS, DROP_PATHS
from vitkernels.swap.timm.rel_pos import REL_POS, bias_table, relative, takes_tokens
from vitkernels.swap.timm.vision_transformer import BRANCHES


class FusedAttentionCl(AttentionCl):
    """timm's AttentionCl over all tokens of (B, ..., C), with its bias read from a table; a shared bias is a mask."""

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        tokens = x.shape[1:-1].numel()
        if runs_fused(ATTENTION_CL, self, x) and takes_tokens(self.rel_pos, shared_rel_pos, tokens):
            attn, mask = relative(_attention(self), self.rel_pos, shared_rel_pos)
            out = fused.attention(attn, x.reshape(x.shape[0], tokens, -1), attn_mask=mask)
            return out.view(*x.shape[:-1], -1)
        return super().forward(x, shared_rel_pos)


class FusedPartitionAttentionCl(PartitionAttentionCl):
    """timm's PartitionAttentionCl, a pre-norm block with attention in windows or over a grid, on (B, Y, X, C)."""

    def forward(self, x: Tensor) -> Tensor:
        if runs_fused(PARTITION_ATTENTION_CL, self, x) and _partitions(self, self.attn, x.shape[1:3]):
            attn = _partitioned(self, self.attn, x.shape[1:3], not self.partition_block)
            block = records.behind_attention(self, records.mlp(self.mlp))
            block = block._replace(norm1=records.norm(self.norm1), attn=attn)
            return fused.block(block, tokens_of(x)).view(x.shape)
        return super().forward(x)


class FusedParallelPartitionAttention(ParallelPartitionAttention):
    """timm's ParallelPartitionAttention, a pre-norm block with attention in windows beside that over a grid."""

    def forward(self, x: Tensor) -> Tensor:
        if not runs_fused(PARALLEL_PARTITION_ATTENTION, self, x) or not all(
            _partitions(self, attn, x.shape[1:3]) for attn in (self.attn_block, self.attn_grid)
        ):
            return super().forward(x)
        tokens = tokens_of(x)
        normed = fused.norm(records.norm(self.norm1), tokens)
        windows = fused.attention(_partitioned(self, self.attn_block, x.shape[1:3], False), normed)
        grid = fused.attention(_partitioned(self, self.attn_grid, x.shape[1:3], True), normed)
        block = records.behind_attention(self, records.mlp(self.mlp))
        return fused.behind_attention(block, torch.cat((windows, grid), -1), tokens).view(x.shape)


class FusedPartitionAttention2d(PartitionAttention2d):
    """timm's PartitionAttention2d: :class:`FusedPartitionAttentionCl` on (B, C, Y, X)."""

    def forward(self, x: Tensor) -> Tensor:
        if runs_fused(PARTITION_ATTENTION_2D, self, x) and _partitions(self, self.attn, x.shape[2:]):
            attn = _partitioned(self, self.attn, x.shape[2:], not self.partition_block)
            block = records.behind_attention(self, _conv_mlp(self.mlp))
            block = block._replace(norm1=records.norm(self.norm1), attn=attn)
            return channels_first(fused.block(block, tokens_of_channels_first(x)), x.shape[2:])
        return super().forward(x)


class FusedTransformerBlock2d(TransformerBlock2d):
    """timm's TransformerBlock2d, CoAtNet's pre-norm block on (B, C, Y, X); it calls its shortcut and first norm."""

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        if not runs_fused(TRANSFORMER_BLOCK_2D, self, x):
            return super().forward(x, shared_rel_pos)
        laid_out = x.contiguous(memory_format=torch.channels_last)
        normed, rel_pos = self.norm1(laid_out), self.attn.rel_pos
        size = normed.shape[2:]
        if not takes_tokens(rel_pos, shared_rel_pos, size.numel()):
            return super().forward(x, shared_rel_pos)
        attn, mask = relative(_attention(self.attn), rel_pos, shared_rel_pos)
        branch = fused.attention(attn, tokens_of_channels_first(normed), attn_mask=mask)
        block = records.behind_attention(self, _conv_mlp(self.mlp))
        out = fused.behind_attention(block, branch, tokens_of_channels_first(self.shortcut(laid_out)))
        return channels_first(out, size)


def _attention(attn: nn.Module) -> records.Attention:
    """Read an AttentionCl or Attention2d, without positions."""
    children, read = attn._modules, records.linear if isinstance(attn, AttentionCl) else pointwise
    drop, calls_torch = children["attn_drop"], attn.fused_attn
    return records.Attention(
        read(children["qkv"]),
        read(children["proj"]),
        attn.num_heads,
        attn.dim_head,
        None if calls_torch else attn.scale,
        attn_drop=drop.p if (attn if calls_torch else drop).training else 0.0,
        proj_drop=records.dropout(children["proj_drop"]),
        head_first=attn.head_first,
    )


def _partitioned(block: nn.Module, attn: nn.Module, image: tuple[int, int], grid: bool) -> records.Attention:
    """Read ``attn`` with the windows of ``block``."""
    windows = Windows(tuple(image), tuple(block.partition_size), bias_table=bias_table(attn.rel_pos), grid=grid)
    return _attention(attn)._replace(positions=windows)


def _partitions(block: nn.Module, attn: nn.Module, image: tuple[int, int]) -> bool:
    """Tell whether an image consists of whole windows, and the bias is one of them; else the original raises."""
    size, rel_pos = tuple(block.partition_size), attn.rel_pos
    return whole_windows(image, size) and (rel_pos is None or tuple(rel_pos.window_size) == size)


def _conv_mlp(mlp: nn.Module) -> records.Mlp:
    children = mlp._modules
    first, last, act = pointwise(children["fc1"]), pointwise(children["fc2"]), records.activation_name(children["act"])
    return records.Mlp(first, last, act, drop1=records.dropout(children["drop"]))


def _attention_limit(attn: nn.Module) -> str | None:
    return head_dim_limit(attn.dim_head)


def _limit_2d(block: nn.Module) -> str | None:
    attn, mlp = block.attn, block.mlp
    reasons = (pointwise_limit(conv) for conv in (attn.qkv, attn.proj, mlp.fc1, mlp.fc2))
    return _attention_limit(attn) or next(filter(None, reasons), None) or layer_scales_limit(block)


# In older releases of timm these are classes of this file.
PARAMETERS |= dict.fromkeys((LayerScale, LayerScale2d), frozenset({"gamma"}))
_DROPOUTS = dict.fromkeys(("attn_drop", "proj_drop"), (nn.Dropout,))
_BRANCHES = {
    **BRANCHES,
    "attn": (AttentionCl,),
    "mlp": (Mlp,),
    "ls1": (nn.Identity, LayerScale),
    "ls2": (nn.Identity, LayerScale),
}
_BRANCHES_2D = {
    "attn": (Attention2d,),
    "attn.qkv": (nn.Conv2d,),
    "attn.rel_pos": REL_POS,
    "attn.attn_drop": (nn.Dropout,),
    "attn.proj": (nn.Conv2d,),
    "attn.proj_drop": (nn.Dropout,),
    "ls1": (nn.Identity, LayerScale2d),
    "drop_path1": DROP_PATHS,
    "norm2": (LayerNorm2d,),
    "mlp": (ConvMlp,),
    "mlp.fc1": (nn.Conv2d,),
    "mlp.norm": (nn.Identity,),
    "mlp.act": ACTIVATIONS,
    "mlp.drop": (nn.Dropout,),
    "mlp.fc2": (nn.Conv2d,),
    "ls2": (nn.Identity, LayerScale2d),
    "drop_path2": DROP_PATHS,
}
_PARTITION = frozenset({"partition_block", "partition_size"})

ATTENTION_CL = Rule(
    AttentionCl,
    FusedAttentionCl,
    bypassed={"qkv": (nn.Linear,), "rel_pos": REL_POS, "proj": (nn.Linear,), **_DROPOUTS},
    attributes=frozenset({"num_heads", "dim_head", "head_first", "scale", "fused_attn"}),
    limit=_attention_limit,
    limited_by=("dim_head",),
)
PARTITION_ATTENTION_CL = Rule(
    PartitionAttentionCl,
    FusedPartitionAttentionCl,
    bypassed=_BRANCHES,
    attributes=_PARTITION,
    limit=layer_scales_limit,
    limited_by=("ls1.inplace", "ls2.inplace"),
)
PARALLEL_PARTITION_ATTENTION = Rule(
    ParallelPartitionAttention,
    FusedParallelPartitionAttention,
    bypassed={name: classes for name, classes in _BRANCHES.items() if name != "attn"}
    | dict.fromkeys(("attn_block", "attn_grid"), (AttentionCl,)),
    attributes=_PARTITION,
    limit=layer_scales_limit,
    limited_by=("ls1.inplace", "ls2.inplace"),
)
PARTITION_ATTENTION_2D = Rule(
    PartitionAttention2d,
    FusedPartitionAttention2d,
    bypassed={"norm1": (LayerNorm2d,), **_BRANCHES_2D},
    attributes=_PARTITION,
    limit=_limit_2d,
)
TRANSFORMER_BLOCK_2D = Rule(
    TransformerBlock2d,
    FusedTransformerBlock2d,
    bypassed=_BRANCHES_2D,
    called=frozenset({"norm1", "shortcut"}),
    limit=_limit_2d,
)
add(ATTENTION_CL, PARTITION_ATTENTION_CL, PARALLEL_PARTITION_ATTENTION, PARTITION_ATTENTION_2D, TRANSFORMER_BLOCK_2D)
