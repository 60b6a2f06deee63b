"""The blocks of timm's gcvit.py (GC ViT)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import Mlp, RelPosBias
from timm.models.gcvit import GlobalContextVitBlock, LayerScale, WindowAttentionGlobal
from torch import Tensor, nn

from vitkernels.layers import fused, records
from vitkernels.swap._images import tokens_of, whole_windows
from vitkernels.swap._limits import block_heads_limit, layer_scales_limit
from vitkernels.swap._rules import PARAMETERS, Rule, add, runs_fused
from vitkernels.swap.timm.rel_pos import bias_table
from vitkernels.swap.timm.vision_transformer import BRANCHES, PACKED_ATTENTION


class FusedGlobalContextVitBlock(GlobalContextVitBlock):
    """timm's GlobalContextVitBlock on (B, Y, X, C), with the windows' own queries or those of the whole image."""

    def forward(self, x: Tensor, q_global: Tensor | None = None) -> Tensor:
        if not runs_fused(BLOCK, self, x) or not _fits(self, x, q_global):
            return super().forward(x, q_global)
        block, image = records.block(self), tuple(x.shape[1:3])
        windows = records.Windows(image, tuple(self.window_size), bias_table=bias_table(self.attn.rel_pos))
        block = block._replace(attn=block.attn._replace(head_dim=self.attn.head_dim, positions=windows))
        tokens = tokens_of(x)
        if self.attn.use_global:
            branch = _attend_with(q_global, block.attn, fused.norm(block.norm1, tokens))
            return fused.behind_attention(block, branch, tokens).view(x.shape)
        return fused.block(block, tokens).view(x.shape)


def _fits(block: nn.Module, x: Tensor, q_global: Tensor | None) -> bool:
    size = tuple(block.window_size)
    if x.ndim != 4 or not whole_windows(x.shape[1:3], size) or tuple(block.attn.rel_pos.window_size) != size:
        return False
    if not block.attn.use_global:
        return True
    return isinstance(q_global, Tensor) and tuple(q_global.shape) == (x.shape[0], *size, x.shape[3])


def _attend_with(q: Tensor, attn: records.Attention, normed: Tensor) -> Tensor:
    """Attend with the queries q (B, rows, columns, C) in every window; ``attn.qkv`` makes keys and values only."""
    (Y, X), (rows, columns) = attn.positions.image, attn.positions.size
    kv = fused.linear(attn.qkv, normed).unflatten(-1, (2, attn.num_heads, attn.head_dim))
    q = q[:, None, :, None].expand(-1, Y // rows, -1, X // columns, -1, -1)  # (B, windows, rows, windows, columns, C)
    q = q.reshape(len(q), Y * X, 1, attn.num_heads, attn.head_dim).to(kv.dtype)
    out = fused.attend_by_position(attn, torch.cat((q, kv), 2)).flatten(2)
    out = fused.linear(attn.proj, out)
    return F.dropout(out, attn.proj_drop) if attn.proj_drop else out


def _limit(block: nn.Module) -> str | None:
    if block.attn.use_global and "repeat_interleave" not in WindowAttentionGlobal.forward.__code__.co_names:
        return "this release of timm gives windows the queries of other images"
    return block_heads_limit(block) or layer_scales_limit(block)


PARAMETERS[LayerScale] = frozenset({"gamma"})  # in older releases of timm a class of this file
BLOCK = Rule(
    GlobalContextVitBlock,
    FusedGlobalContextVitBlock,
    bypassed={
        **BRANCHES,
        "mlp": (Mlp,),
        "attn": (WindowAttentionGlobal,),
        **PACKED_ATTENTION,
        "attn.rel_pos": (RelPosBias,),
        "ls1": (nn.Identity, LayerScale),
        "ls2": (nn.Identity, LayerScale),
    },
    attributes=frozenset({"window_size", "num_windows"}),
    limit=_limit,
    limited_by=("attn.use_global", "attn.num_heads", "attn.qkv.in_features", "ls1.inplace", "ls2.inplace"),
)
add(BLOCK)
