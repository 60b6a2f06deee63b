"""The layer of timm's nest.py (NesT, JX-NesT): attention within blocks of an image, which lie one after another."""

from __future__ import annotations

from timm.models.nest import Attention, TransformerLayer
from torch import Tensor

from vitkernels.layers import fused, records
from vitkernels.swap._limits import block_heads_limit
from vitkernels.swap._rules import Rule, add, runs_fused
from vitkernels.swap.timm.vision_transformer import BRANCHES, PACKED_ATTENTION


class FusedTransformerLayer(TransformerLayer):
    """timm's TransformerLayer, a pre-norm block on (B, blocks, tokens, C)."""

    def forward(self, x: Tensor) -> Tensor:
        if not runs_fused(LAYER, self, x) or x.ndim != 4:
            return super().forward(x)
        B, T, N, C = x.shape
        block = _block(self)
        if block.drop_path1 is block.drop_path2 is None:
            return fused.block(block, x.reshape(B * T, N, C)).view(x.shape)
        # DropPath drops whole images. Their blocks are then windows of one row each.
        attn = block.attn._replace(positions=records.Windows((T, N), (1, N)))
        return fused.block(block._replace(attn=attn), x.reshape(B, T * N, C)).view(x.shape)


def _block(layer: TransformerLayer) -> records.Block:
    """Read ``layer``. Its ``proj`` takes the heads of each channel side by side, not the channels of each head."""
    block = records.block(layer)
    attn, proj = block.attn, block.attn.proj

    def by_head(columns: Tensor) -> Tensor:
        return columns.unflatten(1, (attn.head_dim, attn.num_heads)).transpose(1, 2).flatten(1)

    lora = proj.lora and proj.lora._replace(a=by_head(proj.lora.a))
    return block._replace(attn=attn._replace(proj=proj._replace(weight=by_head(proj.weight), lora=lora)))


LAYER = Rule(
    TransformerLayer,
    FusedTransformerLayer,
    bypassed=BRANCHES | {"attn": (Attention,)} | PACKED_ATTENTION,
    limit=block_heads_limit,
    limited_by=("attn.num_heads", "attn.qkv.in_features"),
)
add(LAYER)
