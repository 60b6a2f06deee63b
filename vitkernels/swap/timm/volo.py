"""The Transformer blocks of timm's volo.py; its outlook attention stays."""

from __future__ import annotations

from timm.models.volo import Attention, Transformer
from torch import Tensor

from vitkernels.layers import fused, records
from vitkernels.swap._images import tokens_of
from vitkernels.swap._limits import block_heads_limit
from vitkernels.swap._rules import Rule, add, runs_fused
from vitkernels.swap.timm.vision_transformer import BRANCHES, PACKED_ATTENTION


class FusedTransformer(Transformer):
    """timm's Transformer, a pre-norm block on (B, Y, X, C)."""

    def forward(self, x: Tensor) -> Tensor:
        if runs_fused(BLOCK, self, x) and x.ndim == 4:
            return fused.block(records.block(self), tokens_of(x)).view(x.shape)
        return super().forward(x)


BLOCK = Rule(
    Transformer,
    FusedTransformer,
    bypassed=BRANCHES | {"attn": (Attention,)} | PACKED_ATTENTION,
    limit=block_heads_limit,
    limited_by=("attn.num_heads", "attn.qkv.in_features"),
)
add(BLOCK)
