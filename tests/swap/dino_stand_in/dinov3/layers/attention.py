import torch
import torch.nn.functional as F
from torch import nn


class LinearKMaskedBias(nn.Linear):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("bias_mask", torch.full_like(self.bias, float("nan")))

    def forward(self, x):
        return F.linear(x, self.weight, self.bias * self.bias_mask.to(self.bias.dtype))


class SelfAttention(nn.Module):
    def __init__(self, dim, num_heads, qkv_bias=False, mask_k_bias=False):
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.qkv = (LinearKMaskedBias if mask_k_bias else nn.Linear)(dim, dim * 3, bias=qkv_bias)
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x, attn_bias=None, rope=None):
        return self.proj_drop(self.proj(self.compute_attention(self.qkv(x), attn_bias, rope)))

    def compute_attention(self, qkv, attn_bias=None, rope=None):
        q, k, v = qkv.unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = rotated(q, *rope), rotated(k, *rope)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def rotated(x, sin, cos):
    prefix, patches = x.to(sin.dtype).tensor_split([x.shape[2] - len(sin)], dim=2)
    first, second = patches.chunk(2, dim=-1)
    return torch.cat([prefix, patches * cos + torch.cat([-second, first], dim=-1) * sin], dim=2).to(x.dtype)
