"""The attentions and blocks of timm's eva.py: EVA, EVA02, DINOv3, Perception Encoder, RoPE-ViT, rotary NaFlex."""

from __future__ import annotations

from timm.layers import AttentionRope
from timm.models.eva import EvaAttention, EvaBlock, EvaBlockPostNorm
from torch import Tensor, nn

from vitkernels import ops
from vitkernels.layers import fused, records, sharded
from vitkernels.swap._rules import Rule, add, runs_fused
from vitkernels.swap.timm.layers import (
    ABSENT,
    ATTENTION_CHILDREN,
    ATTENTION_LIMITED_BY,
    attention_limit,
    given,
    head_dim,
)
from vitkernels.swap.timm.vision_transformer import BRANCHES


class FusedEvaAttention(EvaAttention):
    """timm's EvaAttention, without a key bias, and with RoPE inside the kernels."""

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        if _runs(EVA_ATTENTION, self, self, x, rope, attn_mask, is_causal):
            return fused.attention(records.attention(self), x, **_options(self, rope, attn_mask, is_causal))
        return super().forward(x, rope=rope, **given(attn_mask, is_causal))


class FusedAttentionRope(AttentionRope):
    """timm's AttentionRope, with RoPE inside the kernels; supports grouped keys and values."""

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        if _runs(ATTENTION_ROPE, self, self, x, rope, attn_mask, is_causal):
            return fused.attention(records.attention(self), x, **_options(self, rope, attn_mask, is_causal))
        return super().forward(x, rope=rope, **given(attn_mask, is_causal))


class FusedEvaBlock(EvaBlock):
    """timm's pre-norm EvaBlock, with both residual sums, γ and DropPath inside the kernels."""

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        # Only FusedNaFlexVit passes Packed, after it has checked that this block runs fused.
        if isinstance(attn_mask, fused.Packed) or _runs(EVA_BLOCK, self, self.attn, x, rope, attn_mask, is_causal):
            return fused.block(records.block(self), x, **_options(self.attn, rope, attn_mask, is_causal))
        return super().forward(x, rope=rope, **given(attn_mask, is_causal))


class FusedEvaBlockPostNorm(EvaBlockPostNorm):
    """timm's EvaBlockPostNorm, with norms after the branches, as a chain of kernels."""

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        if _runs(EVA_BLOCK_POST_NORM, self, self.attn, x, rope, attn_mask, is_causal):
            options = _options(self.attn, rope, attn_mask, is_causal)
            return fused.post_norm_block(records.block(self), x, **options)
        return super().forward(x, rope=rope, **given(attn_mask, is_causal))


def split_rope(attn: nn.Module, rope: Tensor | None) -> ops.Rope | None:
    """Split timm's table (..., N, 2D), sines first, then cosines, into an :class:`ops.Rope`."""
    if rope is None:
        return None
    sin, cos = rope.chunk(2, dim=-1)
    return ops.Rope(cos, sin, interleaved=not getattr(attn, "rotate_half", False))


def _options(attn: nn.Module, rope: Tensor | None, attn_mask: Tensor | None, is_causal: bool) -> dict[str, object]:
    return {"attn_mask": attn_mask, "is_causal": is_causal, "rope": split_rope(attn, rope)}


def _runs(
    rule: Rule,
    module: nn.Module,
    attn: nn.Module,
    x: Tensor,
    rope: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
) -> bool:
    return runs_fused(rule, module, x) and fused.takes_masks(attn_mask, is_causal) and _takes_rope(attn, x, rope)


def _takes_rope(attn: nn.Module, x: Tensor, rope: Tensor | None) -> bool:
    """Tell whether ``rope`` has a row for every patch; other tables, which timm broadcasts, run in timm's forward."""
    if rope is None:
        return True
    full = (x.shape[1] - attn.num_prefix_tokens, 2 * head_dim(attn))
    return isinstance(rope, Tensor) and 2 <= rope.ndim <= 4 and tuple(rope.shape[-2:]) == full


_ATTRIBUTES = frozenset(
    {"num_heads", "head_dim", "scale", "num_prefix_tokens", "fused_attn", "qkv_bias_separate", "rotate_half"}
)
_PROJECTIONS = dict.fromkeys(("qkv", "q_proj", "k_proj", "v_proj"), (nn.Linear, ABSENT))
_SHARDS = sharded.Layers(tuple(_PROJECTIONS), "proj", packed=3)
_EVA_BRANCHES = BRANCHES | {"attn": (EvaAttention, AttentionRope)}

EVA_ATTENTION = Rule(
    EvaAttention,
    FusedEvaAttention,
    bypassed=_PROJECTIONS | ATTENTION_CHILDREN,
    called=frozenset({"gate"}),
    optional_parameters=frozenset({"q_bias", "v_bias"}),
    attributes=_ATTRIBUTES,
    shards=_SHARDS,
    limit=attention_limit,
    limited_by=ATTENTION_LIMITED_BY,
)
ATTENTION_ROPE = Rule(
    AttentionRope,
    FusedAttentionRope,
    bypassed=_PROJECTIONS | ATTENTION_CHILDREN,
    called=frozenset({"gate"}),
    attributes=_ATTRIBUTES | {"num_kv_heads", "num_kv_groups", "attn_dim", "kv_dim"},
    shards=_SHARDS,
    limit=attention_limit,
    limited_by=ATTENTION_LIMITED_BY,
)
EVA_BLOCK = Rule(
    EvaBlock,
    FusedEvaBlock,
    bypassed=_EVA_BRANCHES,
    optional_parameters=frozenset({"gamma_1", "gamma_2"}),
    attributes=frozenset({"init_values"}),
    products=records.block,
)
EVA_BLOCK_POST_NORM = Rule(EvaBlockPostNorm, FusedEvaBlockPostNorm, bypassed=_EVA_BRANCHES)
add(EVA_ATTENTION, ATTENTION_ROPE, EVA_BLOCK, EVA_BLOCK_POST_NORM)
