"""Fused forward passes for modules with timm's attribute names.

These functions read the modules' own parameters and keep no state. So the layers here and the modules that
:func:`vitkernels.accelerate` swaps in share one implementation. The caller checks that a module is supported; shapes
are (B, N, C).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkernels import ops, runtime

_NO_NORM = (nn.Identity, type(None))


def activation_name(act: nn.Module) -> str | None:
    """Return the ops' name for the activation module ``act``, or None if they do not support it."""
    if type(act) is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(act.approximate)
    if type(act) is nn.SiLU:
        return "silu"
    # Compare other libraries' classes by name, so that nothing imports these libraries.
    return {"GELU": "gelu", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu", "SiLU": "silu"}.get(
        type(act).__name__ if type(act).__module__.startswith(("timm.", "vitkernels.", "open_clip.")) else ""
    )


class Packed(NamedTuple):
    """Images of different sizes packed into one row of tokens; passed in place of a mask.

    Attributes:
        cu_seqlens: (images + 1,): image i has tokens ``cu_seqlens[i]`` to ``cu_seqlens[i + 1]``.
        max_seqlen: Number of tokens of the longest image, or an upper bound of it.
    """

    cu_seqlens: Tensor
    max_seqlen: int


def drop_path_scale(
    drop_path: nn.Module, x: Tensor, gamma: Tensor | None = None, images: Packed | None = None
) -> Tensor | None:
    """Draw the scale (B,) of each sample's branch, 0 or 1/keep; return None if nothing is dropped.

    The random numbers are drawn exactly as timm's DropPath draws them on ``x · gamma``: a seed gives the same masks.
    The scale has the dtype of that product, since 1/keep rounded to bf16 would scale every branch wrongly. With
    ``images``, x is (T, 1, C), and each token gets the scale of its image.
    """
    if not _drops(drop_path):
        return None
    keep = 1.0 - drop_path.drop_prob
    dtype = x.dtype if gamma is None else torch.promote_types(x.dtype, gamma.dtype)
    samples = x.shape[0] if images is None else len(images.cu_seqlens) - 1
    scale = x.new_empty((samples,) + (1,) * (x.ndim - 1), dtype=dtype).bernoulli_(keep)
    if keep > 0.0 and drop_path.scale_by_keep:
        scale.div_(keep)
    scale = scale.reshape(-1)
    return scale if images is None else scale.repeat_interleave(images.cu_seqlens.diff(), output_size=x.shape[0])


def layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """LayerNorm with the parameters of ``norm``."""
    return ops.layer_norm(x, norm.weight, norm.bias, norm.eps)


def rms_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """RMSNorm with the parameters of ``norm``."""
    return ops.rms_norm(x, norm.weight, norm.eps)


def norm(module: nn.Module, x: Tensor) -> Tensor:
    """Apply ``module``: an ``nn.Identity``, an ``nn.LayerNorm``, or else an RMSNorm."""
    if isinstance(module, nn.Identity):
        return x
    return layer_norm(module, x) if isinstance(module, nn.LayerNorm) else rms_norm(module, x)


def add_norm(
    norm: nn.Module,
    branch: Tensor,
    x: Tensor,
    *,
    layer_scale: Tensor | None = None,
    drop_path_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return ``(norm(r), r)`` with ``r = x + drop_path_scale · layer_scale · branch``, in one pass."""
    scales = {"layer_scale": layer_scale, "drop_path_scale": drop_path_scale}
    if isinstance(norm, nn.LayerNorm):
        return ops.add_layer_norm(branch, x, norm.weight, norm.bias, norm.eps, **scales)
    return ops.add_rms_norm(branch, x, norm.weight, norm.eps, **scales)


def attention(
    attn: nn.Module,
    x: Tensor,
    *,
    attn_mask: Tensor | Packed | None = None,
    is_causal: bool = False,
    rope: ops.Rope | None = None,
) -> Tensor:
    """Self-attention with the layers of ``attn``: ``qkv`` (or ``q_proj``, ``k_proj`` and ``v_proj``) and ``proj``.

    If ``attn`` has them, its QK-norm, its norm and gate before ``proj``, and its dropout are applied. ``rope`` does not
    rotate the first ``attn.num_prefix_tokens`` tokens. With :class:`Packed`, x is (1, T, C), and the tables of ``rope``
    broadcast to (H, T, D).
    """
    B, N, _ = x.shape
    options = {"scale": _scale(attn), "is_causal": is_causal, "dropout_p": attention_dropout(attn), "rope": rope}
    options |= {name: _qk_norm(getattr(attn, name, None)) for name in ("q_norm", "k_norm")}
    packed = isinstance(attn_mask, Packed)
    if not packed:
        options |= {"attn_mask": attn_mask, "num_prefix_tokens": 0 if rope is None else attn.num_prefix_tokens}
    if getattr(attn, "qkv", None) is not None:
        head_dim = attn.qkv.weight.shape[0] // (3 * attn.num_heads)
        qkv = ops.linear(x, attn.qkv.weight, qkv_bias(attn)).view(B, N, 3, attn.num_heads, head_dim)
        if not packed:
            out = ops.attention_qkvpacked(qkv, **options)
        else:
            out = ops.attention_varlen(*qkv[0].unbind(1), *attn_mask, **options)
    else:
        head_dim = attn.q_proj.weight.shape[0] // attn.num_heads
        q, k, v = (
            ops.linear(x, proj.weight, proj.bias).view(B, N, proj.weight.shape[0] // head_dim, head_dim)
            for proj in (attn.q_proj, attn.k_proj, attn.v_proj)
        )
        groups = getattr(attn, "num_kv_groups", 1)
        if groups > 1:  # grouped-query attention: q heads share a k and v head (arXiv 2305.13245)
            k, v = (t.repeat_interleave(groups, dim=2) for t in (k, v))
        if not packed:
            out = ops.attention(*(t.transpose(1, 2) for t in (q, k, v)), **options).transpose(1, 2)
        else:
            out = ops.attention_varlen(q[0], k[0], v[0], *attn_mask, **options)
    out = out.reshape(B, N, attn.num_heads * head_dim)
    if hasattr(attn, "norm"):
        out = norm(attn.norm, out)
    if getattr(attn, "gate", None) is not None:
        out = out * attn.gate(x).sigmoid()
    out = ops.linear(out, attn.proj.weight, attn.proj.bias)
    return F.dropout(out, attn.proj_drop.p, attn.proj_drop.training)


def qkv_bias(attn: nn.Module) -> Tensor | None:
    """Return the bias of packed queries, keys and values; EVA stores it in three parts (that of the keys is zero)."""
    if getattr(attn, "q_bias", None) is None:
        return attn.qkv.bias
    return torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))


def _scale(attn: nn.Module) -> float | None:
    # With ``fused_attn``, timm calls PyTorch's attention, which scales by 1/√D and ignores ``attn.scale``.
    return None if getattr(attn, "fused_attn", False) else attn.scale


def attention_dropout(attn: nn.Module) -> float:
    """Return the dropout probability of attention weights in ``attn``'s current mode (training or eval)."""
    drop = getattr(attn, "attn_drop", None)
    if drop is None:
        return 0.0
    # With ``fused_attn``, timm looks at the mode of ``attn``, not of its dropout module.
    training = attn.training if getattr(attn, "fused_attn", False) else drop.training
    return drop.p if training else 0.0


def _qk_norm(norm: nn.Module | None) -> ops.QKNorm | None:
    if isinstance(norm, _NO_NORM):
        return None
    rms = not isinstance(norm, nn.LayerNorm)
    return ops.QKNorm(norm.weight, None if rms else norm.bias, norm.eps, rms)


def mlp(mlp: nn.Module, x: Tensor, *, residual: Tensor | None = None, layer_scale: Tensor | None = None) -> Tensor:
    """Return ``residual + layer_scale · mlp(x)``; the layers are ``fc1``, ``act``, ``norm`` if there is one, ``fc2``.

    A gated MLP (``fc1`` computes two halves, or there are two layers in its place) goes to :func:`swiglu`.
    """
    if _is_gated(mlp):
        return swiglu(mlp, x, residual=residual, layer_scale=layer_scale)
    activation = activation_name(mlp.act)
    if not _drops_features(mlp) and not _has_norm(mlp):
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
    return _behind_activation(mlp, hidden, residual, layer_scale)


def swiglu(mlp: nn.Module, x: Tensor, *, residual: Tensor | None = None, layer_scale: Tensor | None = None) -> Tensor:
    """Return ``residual + layer_scale · mlp(x)`` of a gated MLP.

    Its layers are ``fc1`` (or ``fc1_g`` and ``fc1_x``), ``norm`` and ``fc2``; in ViTamin ``norm`` (on x), ``w0``,
    ``w1`` and ``w2``. It is one op, unless features are dropped or the inner norm is an RMSNorm.
    """
    if hasattr(mlp, "w0"):
        x, gate, value, last, inner, gate_last = norm(mlp.norm, x), mlp.w0, mlp.w1, mlp.w2, nn.Identity(), False
    else:
        last, inner = mlp.fc2, mlp.norm
        gate, value = (mlp.fc1, None) if hasattr(mlp, "fc1") else (mlp.fc1_g, mlp.fc1_x)
        gate_last = getattr(mlp, "gate_last", False)
    if _drops_features(mlp) or not isinstance(inner, (nn.Identity, nn.LayerNorm)):
        parts = [ops.linear(x, part.weight, part.bias) for part in (gate, value) if part is not None]
        gated, values = parts if value is not None else parts[0].chunk(2, dim=-1)[:: -1 if gate_last else 1]
        return _behind_activation(mlp, mlp.act(gated) * values, residual, layer_scale, inner, last)
    both = (gate.bias, None if value is None else value.bias)
    return ops.swiglu_mlp(
        x,
        gate.weight if value is None else (gate.weight, value.weight),
        gate.bias if value is None or gate.bias is None else both,
        last.weight,
        last.bias,
        activation=activation_name(mlp.act),
        gate_last=gate_last,
        norm=None if isinstance(inner, nn.Identity) else (inner.weight, inner.bias, inner.eps),
        residual=residual,
        layer_scale=layer_scale,
    )


def _behind_activation(mlp, hidden, residual, layer_scale, inner=None, last=None) -> Tensor:
    """Dropout, the inner norm, the last layer, dropout, LayerScale and the residual sum."""
    last = mlp.fc2 if last is None else last
    inner = getattr(mlp, "norm", None) if inner is None else inner
    hidden = F.dropout(hidden, mlp.drop1.p, mlp.drop1.training)
    if inner is not None:
        hidden = norm(inner, hidden)
    if not (mlp.drop2.training and mlp.drop2.p):
        return ops.linear(hidden, last.weight, last.bias, residual=residual, layer_scale=layer_scale)
    out = F.dropout(ops.linear(hidden, last.weight, last.bias), mlp.drop2.p)
    if layer_scale is not None:
        out = out * layer_scale
    return out if residual is None else residual + out


def _is_gated(mlp: nn.Module) -> bool:
    return hasattr(mlp, "gate_last") or hasattr(mlp, "fc1_g") or hasattr(mlp, "w0")


def _has_norm(mlp: nn.Module) -> bool:
    return not isinstance(getattr(mlp, "norm", None), _NO_NORM)


def _drops_features(mlp: nn.Module) -> bool:
    return any(drop.training and drop.p for drop in (mlp.drop1, mlp.drop2))


def block(
    block: nn.Module,
    x: Tensor,
    *,
    attn_mask: Tensor | Packed | None = None,
    is_causal: bool = False,
    rope: ops.Rope | None = None,
) -> Tensor:
    """A pre-norm block: ``x + γ1 · attn(norm1(x))``, then ``x + γ2 · mlp(norm2(x))``, with DropPath on both branches.

    γ1 is ``ls1.gamma`` (timm's ViT) or ``gamma_1`` (EVA). A block is one op if it is plain, has no mask, rope or
    dropout, and the tuning table picks our attention kernels. Otherwise LayerScale, DropPath and the first residual
    sum are fused with norm2.
    """
    attn, mlp_ = block.attn, block.mlp
    gamma1, gamma2 = _layer_scales(block)
    paths = (block.drop_path1, block.drop_path2)
    plain = attn_mask is None and not is_causal and rope is None and _is_plain(block)
    if plain and not any(_drops(path) for path in paths) and _attends(attn, x) == "triton":
        return ops.block(
            x,
            norm1=(block.norm1.weight, block.norm1.bias),
            qkv=(attn.qkv.weight, qkv_bias(attn)),
            proj=(attn.proj.weight, attn.proj.bias),
            norm2=(block.norm2.weight, block.norm2.bias),
            fc1=(mlp_.fc1.weight, mlp_.fc1.bias),
            fc2=(mlp_.fc2.weight, mlp_.fc2.bias),
            layer_scale=(gamma1, gamma2),
            num_heads=attn.num_heads,
            scale=_scale(attn),
            eps=(block.norm1.eps, block.norm2.eps),
            activation=activation_name(mlp_.act),
        )
    branch = attention(attn, norm(block.norm1, x), attn_mask=attn_mask, is_causal=is_causal, rope=rope)
    images = attn_mask if isinstance(attn_mask, Packed) else None
    if images is not None:
        branch, x = branch.transpose(0, 1), x.transpose(0, 1)  # (T, 1, C): DropPath scales rows
    scale = drop_path_scale(block.drop_path1, branch, gamma1, images)
    normed, x = add_norm(block.norm2, branch, x, layer_scale=gamma1, drop_path_scale=scale)
    if _drops(block.drop_path2):
        x = _add_dropped(block.drop_path2, mlp(mlp_, normed, layer_scale=gamma2), x, images)
    else:
        x = mlp(mlp_, normed, residual=x, layer_scale=gamma2)
    return x if images is None else x.transpose(0, 1)


def post_norm_block(
    block: nn.Module,
    x: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    rope: ops.Rope | None = None,
) -> Tensor:
    """A post-norm block: ``x + norm1(attn(x))``, then ``x + norm2(mlp(x))``, with DropPath on both branches."""
    branch = attention(block.attn, x, attn_mask=attn_mask, is_causal=is_causal, rope=rope)
    x = _add_dropped(block.drop_path1, norm(block.norm1, branch), x)
    return _add_dropped(block.drop_path2, norm(block.norm2, mlp(block.mlp, x)), x)


def _attends(attn: nn.Module, x: Tensor) -> str:
    """Attention backend that the tuning table picks for this size; ``ops.block`` supports only our kernels."""
    dtype = runtime.autocast_dtype(x) or x.dtype
    return ops.attention_provider(x.shape[1], x.shape[1], attn.head_dim, dtype, x.device)


def _layer_scales(block: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    if hasattr(block, "ls1"):
        return getattr(block.ls1, "gamma", None), getattr(block.ls2, "gamma", None)
    return block.gamma_1, block.gamma_2


def _is_plain(block: nn.Module) -> bool:
    """Tell whether ``ops.block`` covers everything in the block in its current mode, apart from DropPath."""
    attn, mlp_ = block.attn, block.mlp
    return (
        isinstance(block.norm1, nn.LayerNorm)
        and isinstance(block.norm2, nn.LayerNorm)
        and getattr(attn, "qkv", None) is not None
        and getattr(attn, "gate", None) is None
        and all(isinstance(getattr(attn, name, None), _NO_NORM) for name in ("q_norm", "k_norm", "norm"))
        and not attention_dropout(attn)
        and not (attn.proj_drop.training and attn.proj_drop.p)
        and not _is_gated(mlp_)
        and not _has_norm(mlp_)
        and not _drops_features(mlp_)
    )


def _add_dropped(drop_path: nn.Module, branch: Tensor, x: Tensor, images: Packed | None = None) -> Tensor:
    scale = drop_path_scale(drop_path, branch, images=images)
    return x + branch if scale is None else torch.addcmul(x, branch, scale.reshape(-1, 1, 1))


def _drops(drop_path: nn.Module) -> bool:
    return getattr(drop_path, "drop_prob", 0.0) > 0.0 and drop_path.training


def patch_embed(
    proj: nn.Conv2d,
    images: Tensor,
    *,
    pos_embed: Tensor | None = None,
    prefix_tokens: Tensor | None = None,
    pos_embed_prefix: bool = True,
    normalize: tuple[Sequence[float], Sequence[float]] | None = None,
) -> Tensor:
    """Return the tokens of ``images``: the convolution ``proj``, position embeddings and prefix tokens."""
    return ops.patch_embed(
        images,
        proj.weight,
        proj.bias,
        pos_embed=pos_embed,
        prefix_tokens=prefix_tokens,
        pos_embed_prefix=pos_embed_prefix,
        normalize=normalize,
    )
