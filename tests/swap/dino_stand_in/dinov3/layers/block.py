import torch
from dinov3.layers.attention import SelfAttention
from dinov3.layers.ffn_layers import Mlp
from dinov3.layers.layer_scale import LayerScale
from torch import nn


class SelfAttentionBlock(nn.Module):
    def __init__(
        self, dim, num_heads, qkv_bias=False, init_values=None, drop_path=0.0, ffn_layer=Mlp, mask_k_bias=False
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = SelfAttention(dim, num_heads, qkv_bias, mask_k_bias)
        self.ls1 = LayerScale(dim, init_values)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = ffn_layer(dim, 4 * dim)
        self.ls2 = LayerScale(dim, init_values)
        self.sample_drop_ratio = drop_path

    def forward(self, x_or_x_list, rope_or_rope_list=None):
        if isinstance(x_or_x_list, torch.Tensor):
            return self._forward(x_or_x_list, rope_or_rope_list)
        return [self._forward(x, rope) for x, rope in zip(x_or_x_list, rope_or_rope_list, strict=True)]

    def _forward(self, x, rope):
        def attention(x):
            return self.ls1(self.attn(self.norm1(x), rope=rope))

        def mlp(x):
            return self.ls2(self.mlp(self.norm2(x)))

        ratio = self.sample_drop_ratio if self.training else 0.0
        for branch in (attention, mlp):
            kept = torch.randperm(len(x), device=x.device)[: max(int(len(x) * (1 - ratio)), 1)]
            x = x.index_add(0, kept, branch(x[kept]), alpha=len(x) / len(kept)) if ratio else x + branch(x)
        return x
