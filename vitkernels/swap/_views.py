"""Views of other libraries' blocks under timm's attribute names, which :mod:`vitkernels.layers.fused` reads.

A view is made at each call, because a swapped module has no state of its own. torch.compile can trace dataclasses.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor, nn

from vitkernels.layers import fused
from vitkernels.ops.attention.checks import MAX_HEAD_DIM

_SILU, _IDENTITY = nn.SiLU(), nn.Identity()


@dataclasses.dataclass
class Linear:
    """Weight (out, in) and bias (out,) or None."""

    weight: Tensor
    bias: Tensor | None


@dataclasses.dataclass
class Dropout:
    """Dropout with probability ``p`` in training; the defaults drop nothing."""

    p: float = 0.0
    training: bool = False


@dataclasses.dataclass
class Attention:
    """Self-attention: packed ``qkv``, then ``proj``."""

    qkv: Linear | nn.Linear
    proj: nn.Linear
    num_heads: int
    head_dim: int
    scale: float
    proj_drop: Dropout | nn.Dropout
    attn_drop: Dropout | None = None
    num_prefix_tokens: int = 0


@dataclasses.dataclass
class Mlp:
    """``drop2(fc2(drop1(act(fc1(x)))))``."""

    fc1: nn.Linear
    act: nn.Module
    drop1: Dropout | nn.Dropout
    fc2: nn.Linear
    drop2: Dropout | nn.Dropout


@dataclasses.dataclass
class PackedSwiGLU:
    """``fc2(silu(gate) · value)`` with both halves in ``fc1``, the gate first."""

    fc1: nn.Linear
    fc2: nn.Linear
    drop1: Dropout
    drop2: Dropout
    act: nn.Module
    norm: nn.Module
    gate_last: bool = False


@dataclasses.dataclass
class SwiGLU:
    """``fc2(silu(fc1_g(x)) · fc1_x(x))``."""

    fc1_g: nn.Linear
    fc1_x: nn.Linear
    fc2: nn.Linear
    drop1: Dropout
    drop2: Dropout
    act: nn.Module
    norm: nn.Module


@dataclasses.dataclass
class Block:
    """``x + ls1(attn(norm1(x)))``, then ``x + ls2(mlp(norm2(x)))``."""

    norm1: nn.LayerNorm
    attn: Attention
    norm2: nn.LayerNorm
    mlp: Mlp | PackedSwiGLU | SwiGLU
    ls1: nn.Module | None = None
    ls2: nn.Module | None = None
    drop_path1: nn.Module | None = None
    drop_path2: nn.Module | None = None


def multihead(attn: nn.MultiheadAttention, proj_drop: Dropout | nn.Dropout) -> Attention:
    """View a ``torch.nn.MultiheadAttention`` as self-attention."""
    return Attention(
        Linear(attn.in_proj_weight, attn.in_proj_bias),
        attn.out_proj,
        attn.num_heads,
        attn.head_dim,
        attn.head_dim**-0.5,
        proj_drop,
        Dropout(attn.dropout, attn.training),
    )


def packed_swiglu(w12: nn.Linear, w3: nn.Linear) -> PackedSwiGLU:
    """View a SwiGLU whose gate and value are computed by one layer."""
    return PackedSwiGLU(w12, w3, Dropout(0.0, False), Dropout(0.0, False), _SILU, _IDENTITY)


def swiglu(w1: nn.Linear, w2: nn.Linear, w3: nn.Linear) -> SwiGLU:
    """View a SwiGLU whose gate and value are computed by two layers."""
    return SwiGLU(w1, w2, w3, Dropout(0.0, False), Dropout(0.0, False), _SILU, _IDENTITY)


def dino_mlp(mlp: nn.Module) -> Mlp:
    """View the Mlp of the DINO repositories, which applies its one dropout twice."""
    return Mlp(mlp.fc1, mlp.act, mlp.drop, mlp.fc2, mlp.drop)


# The attributes of PatchEmbed in both DINO repositories.
DINO_PATCH_EMBED_ATTRIBUTES = frozenset(
    {"img_size", "patch_size", "patches_resolution", "num_patches", "in_chans", "embed_dim", "flatten_embedding"}
)


def dino_patch_embed(embed: nn.Module, x: Tensor) -> Tensor:
    """Run the PatchEmbed of the DINO repositories on images (B, I, Y, X) whose sides are multiples of the patch's."""
    grid = (x.shape[2] // embed.patch_size[0], x.shape[3] // embed.patch_size[1])
    tokens = embed.norm(fused.patch_embed(embed.proj, x))
    return tokens if embed.flatten_embedding else tokens.unflatten(1, grid)


def fills_patches(embed: nn.Module, x: Tensor) -> bool:
    """Tell whether the sides of images ``x`` are multiples of the patch's."""
    if x.ndim != 4:
        return False
    (Y, X), (patch_y, patch_x) = x.shape[2:], embed.patch_size
    return patch_y <= Y and patch_x <= X and Y % patch_y == 0 and X % patch_x == 0


# Of nn.MultiheadAttention. The limit of a rule that reads these must call multihead_limit.
MULTIHEAD_PARAMETERS = frozenset({"in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight"})


def multihead_limit(attn: nn.MultiheadAttention) -> str | None:
    """Return why :func:`multihead` cannot view ``attn``, or None if it can."""
    if attn.in_proj_weight is None:
        return "its keys and values have other widths than its queries"
    if not attn.batch_first:
        return "its tokens come before its batch (batch_first=False)"
    if attn.bias_k is not None or attn.bias_v is not None or attn.add_zero_attn:
        return "it adds keys of its own (add_bias_kv or add_zero_attn)"
    return head_dim_limit(attn.head_dim)


def layer_scales_limit(block: nn.Module) -> str | None:
    """Return why the LayerScales ``ls1`` and ``ls2`` of ``block`` cannot be fused, or None if they can."""
    if getattr(block.ls1, "inplace", False) or getattr(block.ls2, "inplace", False):
        return "its LayerScale works in place"
    return None


def head_dim_limit(head_dim: int) -> str | None:
    """Return why no attention kernel supports heads of this width, or None if one does."""
    if head_dim > MAX_HEAD_DIM:
        return f"its head dim is {head_dim}; the attention kernel takes up to {MAX_HEAD_DIM}"
    return None


def patches_limit(conv: nn.Conv2d, patch_size: tuple[int, int]) -> str | None:
    """Return why ``conv`` does not cut an image into separate patches of ``patch_size``, or None if it does."""
    if conv.kernel_size != conv.stride or conv.kernel_size != patch_size:
        return f"its kernel {conv.kernel_size}, stride {conv.stride} and patch {patch_size} are not one size"
    if conv.padding not in ((0, 0), "valid") or conv.dilation != (1, 1) or conv.groups != 1:
        return f"its convolution has padding {conv.padding}, dilation {conv.dilation} and groups {conv.groups}"
    return None
