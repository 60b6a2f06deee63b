"""The attention and block of timm's beit.py: BEiT, BEiT v2, BEiT-3."""

from __future__ import annotations

from timm.models.beit import Attention, Block
from torch import Tensor, nn

from vitkernels.layers import fused, records
from vitkernels.swap._limits import head_dim_limit, ignored_adapter
from vitkernels.swap._rules import Rule, add, runs_fused
from vitkernels.swap.timm.vision_transformer import BRANCHES


class FusedAttention(Attention):
    """timm's BEiT Attention, with its relative position bias read from the table; a shared bias is a mask."""

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        if runs_fused(ATTENTION, self, x) and _takes(self, x, shared_rel_pos_bias):
            attn = _with_positions(self, records.attention(self))
            return fused.attention(attn, x, attn_mask=shared_rel_pos_bias)
        return super().forward(x, shared_rel_pos_bias)


class FusedBlock(Block):
    """timm's BEiT Block, with both residual sums, γ and DropPath inside the kernels."""

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        if runs_fused(BLOCK, self, x) and _takes(self.attn, x, shared_rel_pos_bias):
            block = records.block(self)
            block = block._replace(attn=_with_positions(self.attn, block.attn))
            return fused.block(block, x, attn_mask=shared_rel_pos_bias)
        return super().forward(x, shared_rel_pos_bias)


def _takes(attn: nn.Module, x: Tensor, shared: Tensor | None) -> bool:
    """Tell whether the bias is one table or one mask and fits x; else the original adds them up, or raises."""
    if attn.window_size is None:
        return fused.takes_masks(shared, False)
    return shared is None and x.shape[1] == 1 + attn.window_size[0] * attn.window_size[1]


def _with_positions(attn: nn.Module, record: records.Attention) -> records.Attention:
    if attn.window_size is None:
        return record
    table = records.parameter(attn, "relative_position_bias_table")
    return record._replace(positions=records.Relative(tuple(attn.window_size), table, 1))


def _attention_limit(attn: nn.Module) -> str | None:
    return head_dim_limit(attn.proj.in_features // attn.num_heads) or ignored_adapter(attn)


ATTENTION = Rule(
    Attention,
    FusedAttention,
    bypassed={
        "qkv": (nn.Linear,),
        "attn_drop": (nn.Dropout,),
        "proj": (nn.Linear,),
        "proj_drop": (nn.Dropout,),
    },
    optional_parameters=frozenset({"q_bias", "v_bias", "relative_position_bias_table"}),
    attributes=frozenset(
        {"num_heads", "scale", "fused_attn", "qkv_bias_separate", "window_size", "num_relative_distance"}
    ),
    limit=_attention_limit,
    limited_by=("num_heads", "proj.in_features", "qkv_bias_separate"),
)
BLOCK = Rule(
    Block,
    FusedBlock,
    bypassed=BRANCHES | {"attn": (Attention,)},
    optional_parameters=frozenset({"gamma_1", "gamma_2"}),
    attributes=frozenset({"init_values"}),
)
add(ATTENTION, BLOCK)
