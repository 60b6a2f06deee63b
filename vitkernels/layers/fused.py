"""Fused forward passes over modules that have timm's attribute names.

These functions read parameters where they lie and keep no state, so that the layers here and the modules
that :func:`vitkernels.accelerate` swaps in share one implementation. What they may be called on is decided
by the caller; shapes are (B, N, C).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkernels import ops


def activation_name(act: nn.Module) -> str | None:
    """Return the name by which the ops know the activation module ``act``, or None where they do not know it."""
    if type(act) is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(act.approximate)
    if type(act) is nn.SiLU:
        return "silu"
    # timm's and transformers' classes, by name: neither library is needed here.
    return {"GELU": "gelu", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu", "SiLU": "silu"}.get(
        type(act).__name__ if type(act).__module__.startswith(("timm.", "vitkernels.")) else ""
    )


def drop_path_scale(drop_path: nn.Module, x: Tensor, gamma: Tensor | None = None) -> Tensor | None:
    """Draw the scale (B,) of each sample's branch: 0 or 1/keep; None where nothing is dropped.

    Drawn exactly as timm's DropPath draws it on ``x · gamma``, so that a seed gives the same masks; in the dtype of
    that product, as 1/keep rounded to bf16 would scale every branch wrongly.
    """
    if not _drops(drop_path):
        return None
    keep = 1.0 - drop_path.drop_prob
    dtype = x.dtype if gamma is None else torch.promote_types(x.dtype, gamma.dtype)
    scale = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1), dtype=dtype).bernoulli_(keep)
    if keep > 0.0 and drop_path.scale_by_keep:
        scale.div_(keep)
    return scale.reshape(-1)


def layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """LayerNorm with the parameters of ``norm``."""
    return ops.layer_norm(x, norm.weight, norm.bias, norm.eps)


def attention(attn: nn.Module, x: Tensor) -> Tensor:
    """Self-attention with ``qkv`` and ``proj`` of ``attn``; no mask, no dropout on the scores."""
    B, N, _ = x.shape
    qkv = ops.linear(x, attn.qkv.weight, attn.qkv.bias).view(B, N, 3, attn.num_heads, attn.head_dim)
    out = ops.attention_qkvpacked(qkv, scale=attn.scale).flatten(2)
    out = ops.linear(out, attn.proj.weight, attn.proj.bias)
    return F.dropout(out, attn.proj_drop.p, attn.proj_drop.training)


def mlp(mlp: nn.Module, x: Tensor, *, residual: Tensor | None = None, layer_scale: Tensor | None = None) -> Tensor:
    """``residual + layer_scale · mlp(x)`` with ``fc1``, ``act`` and ``fc2`` of ``mlp``."""
    activation = activation_name(mlp.act)
    drop1 = mlp.drop1.p if mlp.drop1.training else 0.0
    drop2 = mlp.drop2.p if mlp.drop2.training else 0.0
    if not drop1 and not drop2:
        return ops.mlp(
            x,
            mlp.fc1.weight,
            mlp.fc1.bias,
            mlp.fc2.weight,
            mlp.fc2.bias,
            activation=activation,
            residual=residual,
            layer_scale=layer_scale,
        )
    hidden = ops.linear(x, mlp.fc1.weight, mlp.fc1.bias, activation=activation)
    out = ops.linear(F.dropout(hidden, drop1), mlp.fc2.weight, mlp.fc2.bias)
    out = F.dropout(out, drop2)
    if layer_scale is not None:
        out = out * layer_scale
    return out if residual is None else residual + out


def block(block: nn.Module, x: Tensor) -> Tensor:
    """A pre-norm block: ``x + ls1(attn(norm1(x)))``, then ``x + ls2(mlp(norm2(x)))``, with DropPath on both branches.

    One op where nothing is dropped. Else the first residual sum, LayerScale and DropPath are one pass with norm2.
    """
    attn, mlp_ = block.attn, block.mlp
    gamma1, gamma2 = getattr(block.ls1, "gamma", None), getattr(block.ls2, "gamma", None)
    dropouts = (attn.proj_drop, mlp_.drop1, mlp_.drop2)
    paths = (block.drop_path1, block.drop_path2)
    if not any(d.training and d.p for d in dropouts) and not any(_drops(path) for path in paths):
        return ops.block(
            x,
            norm1=(block.norm1.weight, block.norm1.bias),
            qkv=(attn.qkv.weight, attn.qkv.bias),
            proj=(attn.proj.weight, attn.proj.bias),
            norm2=(block.norm2.weight, block.norm2.bias),
            fc1=(mlp_.fc1.weight, mlp_.fc1.bias),
            fc2=(mlp_.fc2.weight, mlp_.fc2.bias),
            layer_scale=(gamma1, gamma2),
            num_heads=attn.num_heads,
            scale=attn.scale,
            eps=(block.norm1.eps, block.norm2.eps),
            activation=activation_name(mlp_.act),
        )
    branch = attention(attn, layer_norm(block.norm1, x))
    normed, x = ops.add_layer_norm(
        branch,
        x,
        block.norm2.weight,
        block.norm2.bias,
        block.norm2.eps,
        layer_scale=gamma1,
        drop_path_scale=drop_path_scale(block.drop_path1, branch, gamma1),
    )
    if not _drops(block.drop_path2):
        return mlp(mlp_, normed, residual=x, layer_scale=gamma2)
    branch = mlp(mlp_, normed)
    if gamma2 is not None:
        branch = branch * gamma2
    return torch.addcmul(x, branch, drop_path_scale(block.drop_path2, branch).reshape(-1, 1, 1))


def _drops(drop_path: nn.Module) -> bool:
    return drop_path.training and getattr(drop_path, "drop_prob", 0.0) > 0.0


def patch_embed(
    proj: nn.Conv2d,
    images: Tensor,
    *,
    pos_embed: Tensor | None = None,
    prefix_tokens: Tensor | None = None,
    pos_embed_prefix: bool = True,
    normalize: tuple[Sequence[float], Sequence[float]] | None = None,
) -> Tensor:
    """Tokens of ``images`` with the parameters of the convolution ``proj``, position and prefix tokens included."""
    return ops.patch_embed(
        images,
        proj.weight,
        proj.bias,
        pos_embed=pos_embed,
        prefix_tokens=prefix_tokens,
        pos_embed_prefix=pos_embed_prefix,
        normalize=normalize,
    )
