"""The blocks and attention of timm's hieradet_sam2.py (SAM 2's encoder)."""

from __future__ import annotations

from timm.layers import LayerScale, Mlp
from timm.models.hieradet_sam2 import MultiScaleAttention, MultiScaleBlock
from torch import Tensor, nn

from vitkernels.layers import records
from vitkernels.swap import _hieradet
from vitkernels.swap._limits import head_dim_limit, layer_scales_limit
from vitkernels.swap._rules import PARAMETERS, Rule, add, runs_fused
from vitkernels.swap.timm.vision_transformer import BRANCHES


class FusedMultiScaleAttention(MultiScaleAttention):
    """timm's MultiScaleAttention over (B, Y, X, C); it calls the pooling of its queries."""

    def forward(self, x: Tensor) -> Tensor:
        if not runs_fused(ATTENTION, self, x) or x.ndim != 4:
            return super().forward(x)
        return _hieradet.attention(records.attention(self), x, self.q_pool)


class FusedMultiScaleBlock(MultiScaleBlock):
    """timm's MultiScaleBlock, a pre-norm block on (B, Y, X, C) with attention in windows or over the whole image."""

    def forward(self, x: Tensor) -> Tensor:
        if not runs_fused(BLOCK, self, x) or x.ndim != 4:
            return super().forward(x)
        window = tuple(self.window_size) if self.is_windowed else None
        widening = None if self.dim == self.dim_out else records.linear(self.proj)
        pooling = None if self.q_stride is None else _hieradet.Pooling(self.q_stride, self.attn.q_pool, self.pool)
        return _hieradet.block(records.block(self), x, window, widening, pooling)


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
