"""The attention and blocks of timm's vision_transformer_relpos.py."""

from __future__ import annotations

from timm.models.vision_transformer_relpos import LayerScale, RelPosAttention, RelPosBlock, ResPostRelPosBlock
from torch import Tensor, nn

from vitkernels.layers import fused, records
from vitkernels.swap._limits import layer_scales_limit
from vitkernels.swap._rules import PARAMETERS, Rule, add, runs_fused
from vitkernels.swap.timm.layers import ATTENTION_CHILDREN, ATTENTION_LIMITED_BY, attention_limit
from vitkernels.swap.timm.rel_pos import REL_POS, relative, takes_tokens
from vitkernels.swap.timm.vision_transformer import BRANCHES


class FusedRelPosAttention(RelPosAttention):
    """timm's RelPosAttention, with its bias read from a table; a shared bias is a mask."""

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        if runs_fused(ATTENTION, self, x) and takes_tokens(self.rel_pos, shared_rel_pos, x.shape[1]):
            attn, mask = relative(records.attention(self), self.rel_pos, shared_rel_pos)
            return fused.attention(attn, x, attn_mask=mask)
        return super().forward(x, shared_rel_pos)


class FusedRelPosBlock(RelPosBlock):
    """timm's pre-norm RelPosBlock, with both residual sums, LayerScale and DropPath inside the kernels."""

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        if runs_fused(BLOCK, self, x) and takes_tokens(self.attn.rel_pos, shared_rel_pos, x.shape[1]):
            block, mask = _block(self, shared_rel_pos)
            return fused.block(block, x, attn_mask=mask)
        return super().forward(x, shared_rel_pos)


class FusedResPostRelPosBlock(ResPostRelPosBlock):
    """timm's ResPostRelPosBlock, with norms after the branches, as a chain of kernels."""

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        if runs_fused(RES_POST_BLOCK, self, x) and takes_tokens(self.attn.rel_pos, shared_rel_pos, x.shape[1]):
            block, mask = _block(self, shared_rel_pos)
            return fused.post_norm_block(block, x, attn_mask=mask)
        return super().forward(x, shared_rel_pos)


def _block(module: nn.Module, shared: Tensor | None) -> tuple[records.Block, Tensor | None]:
    block = records.block(module)
    attn, mask = relative(block.attn, module.attn.rel_pos, shared)
    return block._replace(attn=attn), mask


PARAMETERS[LayerScale] = frozenset({"gamma"})  # in older releases of timm a class of this file
_BRANCHES = BRANCHES | {"attn": (RelPosAttention,)}

ATTENTION = Rule(
    RelPosAttention,
    FusedRelPosAttention,
    bypassed={"qkv": (nn.Linear,), "rel_pos": REL_POS}
    | {name: classes for name, classes in ATTENTION_CHILDREN.items() if name != "norm"},
    attributes=frozenset({"num_heads", "head_dim", "scale", "fused_attn"}),
    limit=attention_limit,
    limited_by=ATTENTION_LIMITED_BY,
)
BLOCK = Rule(
    RelPosBlock,
    FusedRelPosBlock,
    bypassed={**_BRANCHES, "ls1": (nn.Identity, LayerScale), "ls2": (nn.Identity, LayerScale)},
    limit=layer_scales_limit,
    limited_by=("ls1.inplace", "ls2.inplace"),
)
RES_POST_BLOCK = Rule(
    ResPostRelPosBlock, FusedResPostRelPosBlock, bypassed=_BRANCHES, attributes=frozenset({"init_values"})
)
add(ATTENTION, BLOCK, RES_POST_BLOCK)
