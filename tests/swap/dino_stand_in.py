"""The layers of DINOv2's and DINOv3's code: their own where torch.hub has fetched it, else stand-ins of their shape.

The repositories are in no package index, so that CI has the stand-ins alone: modules of the same paths, classes,
attributes and results, and no more. ``find("dinov2")`` tells which of the two a run has tested.
"""

import importlib
import sys
import types
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn


def find(library: str) -> str:
    """Make ``library`` importable; return ``"hub"`` or ``"stand-in"``."""
    folder = Path(torch.hub.get_dir()) / f"facebookresearch_{library}_main"
    if folder.exists():
        sys.path.insert(0, str(folder))
        importlib.import_module(f"{library}.models.vision_transformer")
        sys.path.remove(str(folder))  # as torch.hub does
        return "hub"
    if library not in sys.modules:
        for path, classes in STAND_INS[library].items():
            module = types.ModuleType(path)
            for cls in classes:
                settle(cls, module)
            sys.modules[path] = module
    return "stand-in"


def settle(cls, module):
    """Make ``cls`` what it would be, had it been written in ``module``: its methods see that module's names."""
    vars(module).update({name: value for name, value in globals().items() if name not in vars(module)})
    cls.__module__ = module.__name__
    setattr(module, cls.__name__, cls)
    for name, method in list(vars(cls).items()):
        if isinstance(method, types.FunctionType):
            moved = types.FunctionType(method.__code__, vars(module), name, method.__defaults__, method.__closure__)
            moved.__qualname__, moved.__module__ = f"{cls.__qualname__}.{name}", module.__name__
            setattr(cls, name, moved)


def heads(qkv, num_heads):
    return qkv.unflatten(2, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)


class LayerScale(nn.Module):
    def __init__(self, dim, init_values=1e-5, inplace=False):
        super().__init__()
        self.inplace, self.init_values = inplace, init_values
        self.gamma = nn.Parameter(torch.full((dim,), init_values))

    def forward(self, x):
        return x.mul_(self.gamma) if self.inplace else x * self.gamma


class DropPath(nn.Module):
    def __init__(self, drop_prob=None):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        if not self.training:
            return x
        keep = 1 - self.drop_prob
        return x * (torch.rand(x.shape[0], 1, 1, device=x.device) < keep) / keep


class Mlp(nn.Module):
    def __init__(self, in_features, hidden_features=None, act_layer=nn.GELU, drop=0.0, bias=True, **_):
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features, bias=bias)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_features, in_features, bias=bias)
        self.drop = nn.Dropout(drop)

    def forward(self, x):
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class PatchEmbed(nn.Module):
    def __init__(self, img_size=224, patch_size=16, in_chans=3, embed_dim=768, norm_layer=None, flatten_embedding=True):
        super().__init__()
        self.img_size, self.patch_size = (img_size, img_size), (patch_size, patch_size)
        self.patches_resolution = (img_size // patch_size, img_size // patch_size)
        self.num_patches = self.patches_resolution[0] ** 2
        self.in_chans, self.embed_dim, self.flatten_embedding = in_chans, embed_dim, flatten_embedding
        self.proj = nn.Conv2d(in_chans, embed_dim, self.patch_size, self.patch_size)
        self.norm = norm_layer(embed_dim) if norm_layer else nn.Identity()

    def forward(self, x):
        assert not any(size % patch for size, patch in zip(x.shape[2:], self.patch_size, strict=True)), "no multiple"
        maps = self.proj(x)
        tokens = self.norm(maps.flatten(2).mT)
        return tokens if self.flatten_embedding else tokens.unflatten(1, maps.shape[2:])


class Attention(nn.Module):
    def __init__(self, dim, num_heads=8, qkv_bias=False, proj_bias=True, attn_drop=0.0, proj_drop=0.0):
        super().__init__()
        self.dim, self.num_heads, self.scale = dim, num_heads, (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.attn_drop = attn_drop
        self.proj = nn.Linear(dim, dim, bias=proj_bias)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x, is_causal=False):
        q, k, v = heads(self.qkv(x), self.num_heads)
        drop = self.attn_drop if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=drop, is_causal=is_causal)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class MemEffAttention(Attention):
    def forward(self, x, attn_bias=None):
        assert attn_bias is None, "xFormers is required for using nested tensors"
        return super().forward(x)


class SwiGLUFFN(nn.Module):
    def __init__(self, in_features, hidden_features=None, bias=True, **_):
        super().__init__()
        self.w12 = nn.Linear(in_features, 2 * hidden_features, bias=bias)
        self.w3 = nn.Linear(hidden_features, in_features, bias=bias)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class SwiGLUFFNFused(SwiGLUFFN):
    def __init__(self, in_features, hidden_features=None, bias=True, **_):
        super().__init__(in_features, (int(hidden_features * 2 / 3) + 7) // 8 * 8, bias)


class Block(nn.Module):
    def __init__(
        self, dim, num_heads, mlp_ratio=4.0, qkv_bias=False, init_values=None, drop_path=0.0, norm_layer=nn.LayerNorm,
        attn_class=Attention, ffn_layer=Mlp, drop=0.0, attn_drop=0.0,
    ):  # fmt: skip
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = attn_class(dim, num_heads=num_heads, qkv_bias=qkv_bias, attn_drop=attn_drop, proj_drop=drop)
        self.ls1 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = norm_layer(dim)
        self.mlp = ffn_layer(in_features=dim, hidden_features=int(dim * mlp_ratio), drop=drop)
        self.ls2 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()
        self.sample_drop_ratio = drop_path

    def forward(self, x):
        ratio = self.sample_drop_ratio if self.training else 0.0
        for branch in (lambda x: self.ls1(self.attn(self.norm1(x))), lambda x: self.ls2(self.mlp(self.norm2(x)))):
            if not ratio:
                x = x + branch(x)
                continue
            kept = torch.randperm(len(x), device=x.device)[: max(int(len(x) * (1 - ratio)), 1)]
            x = x.index_add(0, kept, branch(x[kept]), alpha=len(x) / len(kept))
        return x


class NestedTensorBlock(Block):
    def forward(self, x_or_x_list):
        assert isinstance(x_or_x_list, torch.Tensor), "xFormers is required for using nested tensors"
        return super().forward(x_or_x_list)


def once_more(cls):
    """The same class again: each library has its own."""
    return type(cls.__name__, (cls,), {})


Mlp3, LayerScale3, PatchEmbed3 = (once_more(cls) for cls in (Mlp, LayerScale, PatchEmbed))


class LinearKMaskedBias(nn.Linear):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("bias_mask", torch.full_like(self.bias, float("nan")))

    def forward(self, x):
        return F.linear(x, self.weight, self.bias * self.bias_mask.to(self.bias.dtype))


class SelfAttention(nn.Module):
    def __init__(
        self, dim, num_heads=8, qkv_bias=False, proj_bias=True, attn_drop=0.0, proj_drop=0.0, mask_k_bias=False
    ):
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.qkv = (LinearKMaskedBias if mask_k_bias else nn.Linear)(dim, dim * 3, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x, attn_bias=None, rope=None):
        return self.proj_drop(self.proj(self.compute_attention(self.qkv(x), attn_bias, rope)))

    def forward_list(self, x_list, attn_bias=None, rope_list=None):
        return [self.forward(x, attn_bias, rope) for x, rope in zip(x_list, rope_list, strict=True)]

    def compute_attention(self, qkv, attn_bias=None, rope=None):
        q, k, v = heads(qkv, self.num_heads)
        if rope is not None:
            q, k = rotated(q, *rope), rotated(k, *rope)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def rotated(x, sin, cos):
    front, back = x.to(sin.dtype).split([x.shape[2] - len(sin), len(sin)], dim=2)
    first, second = back.chunk(2, dim=-1)
    return torch.cat([front, back * cos + torch.cat([-second, first], dim=-1) * sin], dim=2).to(x.dtype)


class SwiGLUFFN3(nn.Module):
    def __init__(self, in_features, hidden_features=None, bias=True, align_to=8, **_):
        super().__init__()
        hidden = int(hidden_features * 2 / 3)
        hidden += -hidden % align_to
        self.w1 = nn.Linear(in_features, hidden, bias=bias)
        self.w2 = nn.Linear(in_features, hidden, bias=bias)
        self.w3 = nn.Linear(hidden, in_features, bias=bias)

    def forward(self, x):
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


SwiGLUFFN3.__name__ = SwiGLUFFN3.__qualname__ = "SwiGLUFFN"


class SelfAttentionBlock(nn.Module):
    def __init__(
        self, dim, num_heads, ffn_ratio=4.0, qkv_bias=False, init_values=None, drop_path=0.0,
        norm_layer=nn.LayerNorm, attn_class=SelfAttention, ffn_layer=Mlp3, mask_k_bias=False,
    ):  # fmt: skip
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = attn_class(dim, num_heads, qkv_bias=qkv_bias, mask_k_bias=mask_k_bias)
        self.ls1 = LayerScale3(dim, init_values) if init_values else nn.Identity()
        self.norm2 = norm_layer(dim)
        self.mlp = ffn_layer(in_features=dim, hidden_features=int(dim * ffn_ratio))
        self.ls2 = LayerScale3(dim, init_values) if init_values else nn.Identity()
        self.sample_drop_ratio = drop_path

    def forward(self, x_or_x_list, rope_or_rope_list=None):
        if isinstance(x_or_x_list, torch.Tensor):
            return self.forward([x_or_x_list], [rope_or_rope_list])[0]
        return [self.one(x, rope) for x, rope in zip(x_or_x_list, rope_or_rope_list, strict=True)]

    def one(self, x, rope):
        ratio = self.sample_drop_ratio if self.training else 0.0
        size = max(int(len(x) * (1 - ratio)), 1)
        for branch in (
            lambda x: self.ls1(self.attn(self.norm1(x), rope=rope)),
            lambda x: self.ls2(self.mlp(self.norm2(x))),
        ):
            kept = torch.randperm(len(x), device=x.device)[:size] if ratio else torch.arange(len(x), device=x.device)
            x = x.index_add(0, kept, branch(x[kept]), alpha=len(x) / len(kept))
        return x


STAND_INS = {
    "dinov2": {
        "dinov2": [],
        "dinov2.layers": [],
        "dinov2.layers.attention": [Attention, MemEffAttention],
        "dinov2.layers.block": [Block, NestedTensorBlock],
        "dinov2.layers.layer_scale": [LayerScale],
        "dinov2.layers.mlp": [Mlp],
        "dinov2.layers.patch_embed": [PatchEmbed],
        "dinov2.layers.swiglu_ffn": [SwiGLUFFN, SwiGLUFFNFused],
    },
    "dinov3": {
        "dinov3": [],
        "dinov3.layers": [],
        "dinov3.layers.attention": [LinearKMaskedBias, SelfAttention],
        "dinov3.layers.block": [SelfAttentionBlock],
        "dinov3.layers.ffn_layers": [Mlp3, SwiGLUFFN3],
        "dinov3.layers.layer_scale": [LayerScale3],
        "dinov3.layers.patch_embed": [PatchEmbed3],
    },
}
