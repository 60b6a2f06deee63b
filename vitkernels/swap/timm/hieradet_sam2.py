"""The blocks and attention of timm's hieradet_sam2.py (SAM 2's encoder)."""

from __future__ import annotations

import torch.nn.functional as F
from timm.layers import LayerScale, Mlp
from timm.models.hieradet_sam2 import MultiScaleAttention, MultiScaleBlock, window_partition, window_unpartition
from torch import Tensor, nn

from vitkernels import ops
from vitkernels.layers import fused, records
from vitkernels.swap._images import tokens_of
from vitkernels.swap._limits import head_dim_limit, layer_scales_limit
from vitkernels.swap._rules import PARAMETERS, Rule, add, runs_fused
from vitkernels.swap.timm.vision_transformer import BRANCHES


class FusedMultiScaleAttention(MultiScaleAttention):
    """timm's MultiScaleAttention over (B, Y, X, C); it calls the pooling of its queries."""

    def forward(self, x: Tensor) -> Tensor:
        if not runs_fused(ATTENTION, self, x) or x.ndim != 4:
            return super().forward(x)
        attn, (B, Y, X, _) = records.attention(self), x.shape
        if self.q_pool is None:
            return fused.attention(attn, tokens_of(x)).view(B, Y, X, -1)
        q, k, v = fused.linear(attn.qkv, tokens_of(x)).chunk(3, -1)
        q = self.q_pool(q.view(B, Y, X, -1).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        size = q.shape[1:3]
        q, k, v = (t.reshape(B, -1, attn.num_heads, attn.head_dim).transpose(1, 2) for t in (q, k, v))
        out = ops.attention(q, k, v, scale=attn.scale).transpose(1, 2).flatten(2)
        return fused.linear(attn.proj, out).view(B, *size, -1)


class FusedMultiScaleBlock(MultiScaleBlock):
    """timm's MultiScaleBlock, a pre-norm block on (B, Y, X, C) with attention in windows or over the whole image."""

    def forward(self, x: Tensor) -> Tensor:
        if not runs_fused(BLOCK, self, x) or x.ndim != 4:
            return super().forward(x)
        block, tokens, (B, Y, X, _) = records.block(self), tokens_of(x), x.shape
        if self.q_stride is None:
            attn = block.attn
            if self.is_windowed:
                attn = attn._replace(positions=records.Windows((Y, X), tuple(self.window_size)))
            if self.dim == self.dim_out:
                return fused.block(block._replace(attn=attn), tokens).view(x.shape)
        normed = fused.norm(block.norm1, tokens)
        if self.dim != self.dim_out:
            x = fused.linear(records.linear(self.proj), normed).view(B, Y, X, -1)
            if self.pool is not None:
                x = self.pool(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        if self.q_stride is None:
            branch = fused.attention(attn, normed)
        else:
            branch = self._pooled(normed.view(B, Y, X, -1), x.shape[1:3])
        return fused.behind_attention(block, branch, tokens_of(x)).view(x.shape)

    def _pooled(self, normed: Tensor, size: tuple[int, int]) -> Tensor:
        """Attend with fewer queries than keys, as timm does: their windows have other sizes than those of the keys."""
        if not self.is_windowed:
            return self.attn(normed).flatten(1, 2)
        (rows, columns), (Y, X) = self.window_size, normed.shape[1:3]
        windows = window_partition(F.pad(normed, (0, 0, 0, -X % columns, 0, -Y % rows)), self.window_size)
        window = rows // self.q_stride[0], columns // self.q_stride[1]
        padded = tuple(n + -n % w for n, w in zip(size, window, strict=True))
        return window_unpartition(self.attn(windows), window, padded)[:, : size[0], : size[1]].flatten(1, 2)


def _attention_limit(attn: nn.Module) -> str | None:
    return head_dim_limit(attn.dim_out // attn.num_heads)


PARAMETERS[LayerScale] = frozenset({"gamma"})  # in older releases not vision_transformer's
_LAYER_SCALES = dict.fromkeys(("ls1", "ls2"), (nn.Identity, LayerScale))

ATTENTION = Rule(
    MultiScaleAttention,
    FusedMultiScaleAttention,
    bypassed={"qkv": (nn.Linear,), "proj": (nn.Linear,)},
    called=frozenset({"q_pool"}),
    attributes=frozenset({"dim", "dim_out", "num_heads", "scale", "fused_attn"}),
    limit=_attention_limit,
    limited_by=("dim_out", "num_heads"),
)
BLOCK = Rule(
    MultiScaleBlock,
    FusedMultiScaleBlock,
    bypassed={
        **BRANCHES,
        "attn": (MultiScaleAttention,),
        "mlp": (Mlp,),
        "proj": (nn.Linear, nn.Identity),
        **_LAYER_SCALES,
    },
    called=frozenset({"pool"}),
    attributes=frozenset({"window_size", "is_windowed", "dim", "dim_out", "q_stride"}),
    limit=layer_scales_limit,
    limited_by=("ls1.inplace", "ls2.inplace"),
)
add(ATTENTION, BLOCK)
