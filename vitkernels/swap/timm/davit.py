"""The spatial blocks of timm's davit.py (DaViT, Florence-2); its attention over channels stays."""

from __future__ import annotations

from timm.layers import Mlp
from timm.models.davit import SpatialBlock, WindowAttention
from torch import Tensor, nn

from vitkernels.layers import fused, records
from vitkernels.swap._images import channels_first, tokens_of_channels_first
from vitkernels.swap._limits import block_heads_limit
from vitkernels.swap._rules import Rule, add, runs_fused
from vitkernels.swap.timm.vision_transformer import BRANCHES


class FusedSpatialBlock(SpatialBlock):
    """timm's SpatialBlock on (B, C, Y, X): attention in windows, and an MLP, each behind a convolution, which stays."""

    def forward(self, x: Tensor) -> Tensor:
        if not runs_fused(BLOCK, self, x) or x.ndim != 4:
            return super().forward(x)
        image, block = tuple(x.shape[2:]), records.block(self)
        attn = block.attn._replace(positions=records.Windows(image, tuple(self.window_size)))
        x = tokens_of_channels_first(self.cpe1(x))
        x = fused.add_dropped(block.drop_path1, fused.attention(attn, fused.norm(block.norm1, x)), x)
        x = tokens_of_channels_first(self.cpe2(channels_first(x, image)))
        return channels_first(fused.add_mlp(block, fused.norm(block.norm2, x), x), image)


BLOCK = Rule(
    SpatialBlock,
    FusedSpatialBlock,
    bypassed={
        **BRANCHES,
        "mlp": (Mlp,),
        "attn": (WindowAttention,),
        "attn.qkv": (nn.Linear,),
        "attn.proj": (nn.Linear,),
        "attn.softmax": (nn.Softmax,),
    },
    called=frozenset({"cpe1", "cpe2"}),
    attributes=frozenset({"dim", "ffn", "num_heads", "window_size", "mlp_ratio"}),
    limit=block_heads_limit,
    limited_by=("attn.num_heads", "attn.qkv.in_features"),
)
add(BLOCK)
