"""The attention and blocks of timm's vision_transformer_sam.py (SAM's encoder, ViTDet)."""

from __future__ import annotations

from timm.layers import LayerScale, Mlp
from timm.models.vision_transformer_sam import Attention, Block
from torch import Tensor, nn

from vitkernels.layers import fused, records
from vitkernels.layers.windows import within
from vitkernels.swap._images import tokens_of
from vitkernels.swap._limits import layer_scales_limit, packed_heads_limit
from vitkernels.swap._rules import PARAMETERS, Rule, add, runs_fused
from vitkernels.swap._windows import sam_positions
from vitkernels.swap.timm.layers import NORMS
from vitkernels.swap.timm.vision_transformer import BRANCHES


class FusedAttention(Attention):
    """timm's SAM Attention over an image or a window (B, Y, X, C), with its decomposed positions in the kernels."""

    def forward(self, x: Tensor) -> Tensor:
        if not runs_fused(ATTENTION, self, x) or x.ndim != 4:
            return super().forward(x)
        positions = sam_positions(self, self.use_rel_pos, tuple(x.shape[1:3]))
        attn = records.attention(self)._replace(positions=positions)
        return fused.attention(attn, tokens_of(x)).view(x.shape)


class FusedBlock(Block):
    """timm's SAM Block on (B, Y, X, C), in which no window is padded or cut in memory.

    Where paths are dropped in windows, timm drops them for each window apart, and this runs timm's forward.
    """

    def forward(self, x: Tensor) -> Tensor:
        if runs_fused(BLOCK, self, x) and x.ndim == 4:
            block = records.block(self)
            if self.window_size == 0 or block.drop_path1 is None:
                positions = sam_positions(self.attn, self.attn.use_rel_pos, tuple(x.shape[1:3]), self.window_size)
                return fused.block(within(block, positions), tokens_of(x)).view(x.shape)
        return super().forward(x)


def _attention_limit(attn: nn.Module) -> str | None:
    if attn.rope is not None:
        return "it rotates queries and keys"
    if not all(isinstance(norm, nn.Identity) for norm in (attn.q_norm, attn.k_norm)):
        return "it normalizes queries and keys, and attends with positions of queries"
    return packed_heads_limit(attn)


def _block_limit(block: nn.Module) -> str | None:
    return _attention_limit(block.attn) or layer_scales_limit(block)


PARAMETERS[LayerScale] = frozenset({"gamma"})

ATTENTION = Rule(
    Attention,
    FusedAttention,
    bypassed={
        "qkv": (nn.Linear,),
        "q_norm": (nn.Identity, *NORMS),
        "k_norm": (nn.Identity, *NORMS),
        "attn_drop": (nn.Dropout,),
        "proj": (nn.Linear,),
        "proj_drop": (nn.Dropout,),
    },
    optional_parameters=frozenset({"rel_pos_h", "rel_pos_w"}),
    attributes=frozenset({"num_heads", "head_dim", "scale", "fused_attn", "use_rel_pos", "rope"}),
    limit=_attention_limit,
    limited_by=("rope", "num_heads", "qkv.in_features"),
)
BLOCK = Rule(
    Block,
    FusedBlock,
    bypassed={
        **BRANCHES,
        "attn": (Attention,),
        "mlp": (Mlp,),
        "ls1": (nn.Identity, LayerScale),
        "ls2": (nn.Identity, LayerScale),
    },
    attributes=frozenset({"window_size"}),
    limit=_block_limit,
    limited_by=("attn.rope", "ls1.inplace", "ls2.inplace"),
)
add(ATTENTION, BLOCK)
