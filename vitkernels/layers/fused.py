"""Fused forward passes on the records of :mod:`vitkernels.layers.records`.

The layers here and the modules that :func:`vitkernels.accelerate` swaps in share this implementation. The caller checks
that a module is supported; shapes are (B, N, C).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkernels import ops, reference, runtime
from vitkernels.layers import fp8, records, sharded
from vitkernels.layers.records import Attention, Block, Decomposed, DropPath, Linear, Mlp, Norm, Relative


class Packed(NamedTuple):
    """Images of different sizes packed into one row of tokens; passed in place of a mask.

    Attributes:
        cu_seqlens: (images + 1,): image i has tokens ``cu_seqlens[i]`` to ``cu_seqlens[i + 1]``.
        max_seqlen: Number of tokens of the longest image, or an upper bound of it.
    """

    cu_seqlens: Tensor
    max_seqlen: int


def pack(x: Tensor, valid: Tensor) -> tuple[Tensor, Packed, Tensor]:
    """Remove from images x (B, N, C) the tokens that are not ``valid`` (B, N), bool.

    Returns:
        The T tokens that stay, (1, T, C), how they are packed, and (T,): the place of each among the B · N.
    """
    places = valid.flatten().nonzero()[:, 0]
    packed = Packed(F.pad(valid.sum(1).cumsum(0), (1, 0)).int(), x.shape[1])
    return x.flatten(0, 1)[places][None], packed, places


def drop_path_scale(
    drop_path: DropPath | None, x: Tensor, gamma: Tensor | None = None, images: Packed | None = None
) -> Tensor | None:
    """Draw the scale (B,) of each sample's branch, 0 or 1/keep; return None if nothing is dropped.

    The random numbers are drawn exactly as timm's DropPath draws them on ``branch · gamma``, where the branch is the
    output of a linear layer on x: a seed gives the same masks. The scale has the dtype of that product, since 1/keep
    rounded to bf16 would scale every branch wrongly. With ``images``, x is (T, 1, C), and each token gets the scale of
    its image.
    """
    if drop_path is None:
        return None
    keep = 1.0 - drop_path.drop_prob
    dtype = runtime.autocast_dtype(x) or x.dtype
    dtype = dtype if gamma is None else torch.promote_types(dtype, gamma.dtype)
    samples = x.shape[0] if images is None else len(images.cu_seqlens) - 1
    scale = x.new_empty((samples,) + (1,) * (x.ndim - 1), dtype=dtype).bernoulli_(keep)
    if keep > 0.0 and drop_path.scale_by_keep:
        scale.div_(keep)
    scale = scale.reshape(-1)
    return scale if images is None else scale.repeat_interleave(images.cu_seqlens.diff(), output_size=x.shape[0])


def norm(norm: Norm | None, x: Tensor) -> Tensor:
    """Apply a LayerNorm or an RMSNorm; None is the identity."""
    if norm is None:
        return x
    if norm.rms:
        return ops.rms_norm(x, norm.weight, norm.eps)
    return ops.layer_norm(x, norm.weight, norm.bias, norm.eps)


def add_norm(
    norm: Norm | None,
    branch: Tensor,
    x: Tensor,
    *,
    layer_scale: Tensor | None = None,
    drop_path_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return ``(norm(r), r)`` with ``r = x + drop_path_scale · layer_scale · branch``, in one pass."""
    scales = {"layer_scale": layer_scale, "drop_path_scale": drop_path_scale}
    if norm.rms:
        return ops.add_rms_norm(branch, x, norm.weight, norm.eps, **scales)
    return ops.add_layer_norm(branch, x, norm.weight, norm.bias, norm.eps, **scales)


def linear(
    layer: Linear, x: Tensor | ops.Fp8, dtype: torch.dtype | None = None, **epilogue: object
) -> Tensor | ops.Fp8:
    """Apply ``layer``; to an x in FP8 in FP8, with a result in ``dtype``."""
    if isinstance(x, ops.Fp8):
        weight, bias = layer.plain
        return ops.linear_fp8(x, fp8.weight(weight), bias, dtype=dtype, **epilogue)
    weight, bias, lora, _ = layer
    if lora is None:
        return ops.linear(x, weight, bias, **epilogue)
    # In the adapter's dtype, in which PEFT drops: the same elements for a seed.
    dropped = F.dropout(x.to(lora.a.dtype), lora.drop).to(x.dtype) if lora.drop else None
    return ops.lora_linear(x, weight, bias, lora.a, lora.b, lora_x=dropped, **epilogue)


def attention(
    attn: Attention,
    x: Tensor | ops.Fp8,
    *,
    attn_mask: Tensor | Packed | None = None,
    is_causal: bool = False,
    rope: ops.Rope | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Self-attention, from the projections of x to the output projection.

    ``rope`` does not rotate the first ``attn.num_prefix_tokens`` tokens. With :class:`Packed`, x is (1, T, C), and the
    tables of ``rope`` broadcast to (H, T, D). For an x in FP8, ``dtype`` is that of everything else.
    """
    group = attn.proj.group if attn.proj is not None else None
    if group is not None:
        attn, attn_mask, rope = _own_part(group, attn, attn_mask, rope)
        x = group.tokens_in(x)
    if attn.fp8:
        fp8.check_inference(attn, x)
        dtype, x = x.dtype, ops.quantize_fp8(x)
    in_fp8 = isinstance(x, ops.Fp8)
    B, N, _ = (x.values if in_fp8 else x).shape
    packed = isinstance(attn_mask, Packed)
    options = {
        "scale": attn.scale,
        "is_causal": is_causal,
        "dropout_p": attn.attn_drop,
        "rope": rope,
        "q_norm": None if attn.q_norm is None else ops.QKNorm(*attn.q_norm),
        "k_norm": None if attn.k_norm is None else ops.QKNorm(*attn.k_norm),
    }
    if not packed:
        options |= {"attn_mask": attn_mask, "num_prefix_tokens": 0 if rope is None else attn.num_prefix_tokens}
    if isinstance(attn.qkv, Linear) or attn.positions is not None:
        projected = _packed(attn.qkv, x, dtype)
        qkv = _heads(attn, projected.view(B, N, projected.shape[-1]))
        if attn.positions is not None:
            out = attend_by_position(attn, qkv)
        elif packed:
            out = ops.attention_varlen(*qkv[0].unbind(1), *attn_mask, **options)[None]
        else:
            out = ops.attention_qkvpacked(qkv, **options)
    else:
        D = attn.head_dim
        q, k, v = (linear(layer, x, dtype).view(B, N, layer.weight.shape[0] // D, D) for layer in attn.qkv)
        groups = q.shape[2] // k.shape[2]
        if groups > 1:  # grouped-query attention: q heads share a k and v head (arXiv 2305.13245)
            k, v = (t.repeat_interleave(groups, dim=2) for t in (k, v))
        if packed:
            out = ops.attention_varlen(q[0], k[0], v[0], *attn_mask, **options)[None]
        else:
            out = ops.attention(*(t.transpose(1, 2) for t in (q, k, v)), **options).transpose(1, 2)
    out = norm(attn.norm, out.flatten(2))
    if attn.gate is not None:
        out = out * attn.gate(x).sigmoid()
    if attn.proj is None:
        return out
    if group is not None:
        out = group.tokens_out(linear(attn.proj._replace(bias=group.share(attn.proj.bias)), out))
        return _dropout(out, attn.proj_drop)
    return _dropout(linear(attn.proj, ops.quantize_fp8(out) if in_fp8 else out, dtype), attn.proj_drop)


def takes_masks(attn_mask: Tensor | None, is_causal: bool) -> bool:
    """Tell whether :func:`attention` takes these masks of another library's attention."""
    if attn_mask is None:
        return True
    masks = isinstance(attn_mask, Tensor) and (attn_mask.dtype == torch.bool or attn_mask.is_floating_point())
    return masks and not is_causal


def _own_part(
    group: sharded.Group, attn: Attention, attn_mask: Tensor | Packed | None, rope: ops.Rope | None
) -> tuple[Attention, Tensor | Packed | None, ops.Rope | None]:
    """Return what this process's heads take: the norms, shared by all heads, and their own masks, tables and biases."""
    if attn.attn_drop:
        raise NotImplementedError("attention whose heads are sharded cannot drop weights; set attn_drop to 0")
    positions = attn.positions
    if isinstance(positions, Relative):
        positions = positions._replace(bias_table=group.own_heads(positions.bias_table, -1))
    elif positions is not None:
        raise NotImplementedError("attention in windows or with decomposed positions cannot be sharded")
    q_norm, k_norm = (n and Norm(*group.enter(*n[:2]), *n[2:]) for n in (attn.q_norm, attn.k_norm))
    if isinstance(attn_mask, Tensor):
        attn_mask = group.own_heads(attn_mask)
    if rope is not None:
        rope = rope._replace(cos=group.own_heads(rope.cos), sin=group.own_heads(rope.sin))
    return attn._replace(q_norm=q_norm, k_norm=k_norm, positions=positions), attn_mask, rope


def cross_attention(attn: Attention, queries: Tensor, x: Tensor) -> Tensor:
    """Attention from ``queries`` to x, each (B, tokens, C), from the projections to the output projection."""
    heads = (attn.num_heads, attn.head_dim)
    of_queries, *others = attn.qkv
    q = linear(of_queries, queries).unflatten(-1, heads)
    k, v = (t for layer in others for t in linear(layer, x).unflatten(-1, (-1, *heads)).unbind(2))
    out = ops.attention(*(t.transpose(1, 2) for t in (q, k, v)), scale=attn.scale, dropout_p=attn.attn_drop)
    return _dropout(linear(attn.proj, out.transpose(1, 2).flatten(2)), attn.proj_drop)


def _packed(qkv: Linear | tuple[Linear, ...], x: Tensor | ops.Fp8, dtype: torch.dtype | None) -> Tensor:
    """Return queries, keys and values side by side; of three layers their results are copied."""
    if isinstance(qkv, Linear):
        return linear(qkv, x, dtype)
    return torch.cat([linear(layer, x, dtype) for layer in qkv], dim=-1)


def _heads(attn: Attention, packed: Tensor) -> Tensor:
    """View packed queries, keys and values, or their bias, (..., 3 · H · D) as (..., 3, H, D)."""
    if attn.head_first:
        return packed.unflatten(-1, (attn.num_heads, 3, attn.head_dim)).transpose(-2, -3)
    return packed.unflatten(-1, (3, attn.num_heads, attn.head_dim))


def _packed_bias(layers: Linear | tuple[Linear, ...], like: Tensor) -> Tensor:
    """Return what the projections make of a token of zeros."""
    layers = (layers,) if isinstance(layers, Linear) else layers
    biases = [like.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias for layer in layers]
    return torch.cat(biases) if len(biases) > 1 else biases[0]


def attend_by_position(attn: Attention, qkv: Tensor) -> Tensor:
    """Attend as ``attn.positions`` says on qkv (B, N, 3, H, D)."""
    positions, options = attn.positions, {"dropout_p": attn.attn_drop}
    if isinstance(positions, Relative):
        return ops.relative_attention(
            qkv, positions.image, bias_table=positions.bias_table, num_prefix_tokens=positions.num_prefix_tokens,
            scale=attn.scale, **options,
        )  # fmt: skip
    (Y, X), size = positions.image, positions.size or positions.image
    if Y % size[0] or X % size[1]:
        options["padding"] = _heads(attn, _packed_bias(attn.qkv, qkv))
    image = qkv.unflatten(1, (Y, X))
    if isinstance(positions, Decomposed):
        out = ops.decomposed_attention(
            image, positions.rel_pos_h, positions.rel_pos_w, window_size=size, scale=attn.scale, **options
        )
    else:
        out = ops.window_attention(
            image, size, shift=positions.shift, bias_table=positions.bias_table, logit_scale=positions.logit_scale,
            scale=attn.scale, grid=positions.grid, roll_padded=positions.roll_padded,
            mask_value=positions.mask_value, **options,
        )  # fmt: skip
    return out.flatten(1, 2)


def mlp(
    mlp: Mlp,
    x: Tensor,
    *,
    residual: Tensor | None = None,
    layer_scale: Tensor | None = None,
    drop_path_scale: Tensor | None = None,
) -> Tensor:
    """Return ``residual + drop_path_scale · layer_scale · mlp(x)``; only a :func:`_plain_mlp` takes a drop_path_scale.

    It is one op, unless features are dropped, an MLP without gate has a norm, or a gated one has an RMSNorm or an
    adapter.
    """
    if mlp.fc2.group is not None:
        return _sharded_mlp(mlp, x, residual, layer_scale, drop_path_scale)
    if mlp.fp8:
        fp8.check_inference(mlp, x)
        return _mlp_fp8(mlp, ops.quantize_fp8(x), x.dtype, residual=residual, layer_scale=layer_scale)
    x = norm(mlp.input_norm, x)
    fc1, fc2, activation = mlp.fc1, mlp.fc2, mlp.activation
    drops = mlp.drop1 or mlp.drop2
    if not mlp.gated:
        if _plain_mlp(mlp):
            scales = {"layer_scale": layer_scale, "drop_path_scale": drop_path_scale}
            options = {"activation": activation, "residual": residual, **scales}
            if fc1.lora is fc2.lora is None:
                return ops.mlp(x, *fc1.plain, *fc2.plain, **options)
            lora = {f"lora{i}": fc.lora and fc.lora[:2] for i, fc in enumerate((fc1, fc2), start=1)}
            return ops.lora_mlp(x, *fc1[:2], *fc2[:2], **lora, **options)
        hidden = linear(fc1, x, activation=activation)
    elif not (
        drops or (mlp.norm is not None and mlp.norm.rms) or any(fc.lora is not None for fc in records.linears(mlp))
    ):
        weights, biases = fc1.plain if isinstance(fc1, Linear) else zip(*(layer.plain for layer in fc1), strict=True)
        if isinstance(biases, tuple) and biases[0] is None:
            biases = None
        return ops.swiglu_mlp(
            x,
            weights,
            biases,
            *fc2.plain,
            activation=activation,
            gate_last=mlp.gate_last,
            norm=None if mlp.norm is None else mlp.norm[:3],
            residual=residual,
            layer_scale=layer_scale,
        )
    else:
        if isinstance(fc1, Linear):
            gate, value = linear(fc1, x).chunk(2, dim=-1)[:: -1 if mlp.gate_last else 1]
            gate = reference.activate(gate, activation)
        else:
            gate, value = linear(fc1[0], x, activation=activation), linear(fc1[1], x)
        hidden = gate * value
    hidden = norm(mlp.norm, _dropout(hidden, mlp.drop1))
    if not mlp.drop2:
        return linear(fc2, hidden, residual=residual, layer_scale=layer_scale)
    out = F.dropout(linear(fc2, hidden), mlp.drop2)
    if layer_scale is not None:
        out = out * layer_scale
    return out if residual is None else residual + out


def _sharded_mlp(
    whole: Mlp, x: Tensor, residual: Tensor | None, layer_scale: Tensor | None, drop_path_scale: Tensor | None
) -> Tensor:
    if whole.drop1 or whole.drop2:
        raise NotImplementedError("an MLP whose hidden features are sharded cannot drop any; set its dropout to 0")
    group, fc2 = whole.fc2.group, whole.fc2
    own = whole._replace(input_norm=None, fc2=fc2._replace(bias=group.share(fc2.bias), group=None))
    out = mlp(
        own,
        group.tokens_in(norm(whole.input_norm, x)),
        residual=residual if group.rank == 0 else None,
        layer_scale=group.enter(layer_scale)[0],
        drop_path_scale=drop_path_scale,
    )
    if residual is not None:  # under autocast it may be wider, and all processes must sum one dtype
        out = out.to(runtime.promoted_dtype(out, residual))
    return group.tokens_out(out, residual)


def _mlp_fp8(mlp: Mlp, x: ops.Fp8, dtype: torch.dtype, **epilogue: Tensor | None) -> Tensor:
    hidden = linear(mlp.fc1, x, torch.float8_e4m3fn, activation=mlp.activation)
    return linear(mlp.fc2, hidden, dtype, **epilogue)


def block(
    block: Block,
    x: Tensor,
    *,
    attn_mask: Tensor | Packed | None = None,
    is_causal: bool = False,
    rope: ops.Rope | None = None,
) -> Tensor:
    """A pre-norm block: ``x + γ1 · attn(norm1(x))``, then ``x + γ2 · mlp(norm2(x))``, with DropPath on both branches.

    A block is one op if it is plain, has no mask, rope, dropout, adapter or shards, and the tuning table picks our
    attention kernels.
    Otherwise LayerScale, DropPath and the first residual sum are fused with norm2, the second ones with a plain MLP.
    """
    norm1, attn, norm2, mlp_, gamma1, gamma2, path1, path2, in_fp8, shares_tokens = block
    if shares_tokens and x.shape[0] % mlp_.fc2.group.size == 0 and not isinstance(attn_mask, Packed):
        return _token_sharing_block(block, x, attn_mask=attn_mask, is_causal=is_causal, rope=rope)
    if in_fp8:
        fp8.check_inference(block, x)
        normed = ops.layer_norm_fp8(x, norm1.weight, norm1.bias, norm1.eps)
        branch = attention(attn, normed, attn_mask=attn_mask, is_causal=is_causal, rope=rope, dtype=x.dtype)
        normed, x = ops.add_layer_norm_fp8(branch, x, norm2.weight, norm2.bias, norm2.eps, layer_scale=gamma1)
        return _mlp_fp8(mlp_, normed, x.dtype, residual=x, layer_scale=gamma2)
    if attn_mask is None and not is_causal and rope is None and _is_plain(block) and _attends(attn, x) == "triton":
        return ops.block(
            x,
            norm1=norm1[:2],
            qkv=attn.qkv.plain,
            proj=attn.proj.plain,
            norm2=norm2[:2],
            fc1=mlp_.fc1.plain,
            fc2=mlp_.fc2.plain,
            layer_scale=(gamma1, gamma2),
            drop_path_scale=(drop_path_scale(path1, x, gamma1), drop_path_scale(path2, x, gamma2)),
            num_heads=attn.num_heads,
            scale=attn.scale,
            eps=(norm1.eps, norm2.eps),
            activation=mlp_.activation,
        )
    branch = attention(attn, norm(norm1, x), attn_mask=attn_mask, is_causal=is_causal, rope=rope)
    if not isinstance(attn_mask, Packed):
        return behind_attention(block, branch, x)
    # (T, 1, C): DropPath scales rows.
    return behind_attention(block, branch.transpose(0, 1), x.transpose(0, 1), attn_mask).transpose(0, 1)


def _token_sharing_block(block: Block, x: Tensor, **options: object) -> Tensor:
    """:func:`block` with sequence parallelism: outside the sharded layers, this process's images alone."""
    group = block.mlp.fc2.group._replace(shares_tokens=True)
    norm1, norm2 = block.norm1, block.norm2
    # Each process has gradients of its own tokens alone.
    *shared, gamma1, gamma2 = group.enter(*norm1[:2], *norm2[:2], block.gamma1, block.gamma2)
    norm1, norm2 = norm1._replace(weight=shared[0], bias=shared[1]), norm2._replace(weight=shared[2], bias=shared[3])
    attn = block.attn._replace(proj=block.attn.proj._replace(group=group))
    mlp_ = block.mlp._replace(fc2=block.mlp.fc2._replace(group=group))
    batch, rows = x.shape[0], group.share_tokens(x)

    def own_scale(path: DropPath | None, gamma: Tensor | None) -> Tensor | None:
        scale = drop_path_scale(path, rows.new_empty((batch, 1, 1)), gamma)  # drawn for all images on all processes
        return None if scale is None else group.own_rows(scale)

    branch = attention(attn, norm(norm1, rows), **options)
    normed, rows = add_norm(
        norm2, branch, rows, layer_scale=gamma1, drop_path_scale=own_scale(block.drop_path1, gamma1)
    )
    scale = own_scale(block.drop_path2, gamma2)
    branch = mlp(mlp_, normed)
    branch = branch if gamma2 is None else branch * gamma2
    return group.pass_tokens(_add_scaled(scale, branch, rows), last=block.shares_tokens == sharded.LAST)


def behind_attention(block: Block, branch: Tensor, x: Tensor, images: Packed | None = None) -> Tensor:
    """The rest of a pre-norm block, with ``branch`` in place of ``attn(norm1(x))``; reads no ``attn`` and ``norm1``."""
    scale = drop_path_scale(block.drop_path1, branch, block.gamma1, images)
    normed, x = add_norm(block.norm2, branch, x, layer_scale=block.gamma1, drop_path_scale=scale)
    return add_mlp(block, normed, x, images)


def add_mlp(block: Block, normed: Tensor, x: Tensor, images: Packed | None = None) -> Tensor:
    """Return ``x + γ2 · mlp(normed)`` with the DropPath of ``block``'s second branch."""
    path, gamma = block.drop_path2, block.gamma2
    if path is None or _plain_mlp(block.mlp):
        scale = drop_path_scale(path, normed, gamma, images)
        return mlp(block.mlp, normed, residual=x, layer_scale=gamma, drop_path_scale=scale)
    return add_dropped(path, mlp(block.mlp, normed, layer_scale=gamma), x, images)  # drawn after what the MLP draws


def post_norm_block(
    block: Block,
    x: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    rope: ops.Rope | None = None,
) -> Tensor:
    """A post-norm block: ``x + norm1(attn(x))``, then ``x + norm2(mlp(x))``, with DropPath on both branches."""
    branch = attention(block.attn, x, attn_mask=attn_mask, is_causal=is_causal, rope=rope)
    x = add_dropped(block.drop_path1, norm(block.norm1, branch), x)
    return add_dropped(block.drop_path2, norm(block.norm2, mlp(block.mlp, x)), x)


def _attends(attn: Attention, x: Tensor) -> str:
    """Attention backend that the tuning table picks for this size; ``ops.block`` supports only our kernels."""
    dtype = runtime.autocast_dtype(x) or x.dtype
    return ops.attention_provider(x.shape[1], x.shape[1], attn.head_dim, dtype, x.device)


def _plain_mlp(mlp: Mlp) -> bool:
    """Tell whether ``ops.mlp`` covers everything behind the MLP's input norm."""
    if mlp.gated or mlp.drop1 or mlp.drop2 or mlp.norm is not None:
        return False
    return not any(layer.lora is not None and layer.lora.drop for layer in (mlp.fc1, mlp.fc2))


def _is_plain(block: Block) -> bool:
    """Tell whether ``ops.block`` covers everything in the block in its present mode."""
    norm1, attn, norm2, mlp_, *_ = block
    return (
        not (norm1 is None or norm1.rms or norm2 is None or norm2.rms)
        and isinstance(attn.qkv, Linear)
        and attn.q_norm is attn.k_norm is attn.norm is attn.gate is attn.positions is None
        and not (attn.attn_drop or attn.proj_drop or attn.head_first)
        and mlp_.input_norm is None
        and _plain_mlp(mlp_)
        and attn.qkv.lora is attn.proj.lora is mlp_.fc1.lora is mlp_.fc2.lora is None
        and attn.proj.group is mlp_.fc2.group is None
    )


def add_dropped(drop_path: DropPath | None, branch: Tensor, x: Tensor, images: Packed | None = None) -> Tensor:
    """Return ``x + branch``, with the samples dropped that ``drop_path`` draws."""
    return _add_scaled(drop_path_scale(drop_path, branch, images=images), branch, x)


def _add_scaled(scale: Tensor | None, branch: Tensor, x: Tensor) -> Tensor:
    return x + branch if scale is None else torch.addcmul(x, branch, scale.reshape(-1, 1, 1))


def _dropout(x: Tensor, p: float) -> Tensor:
    return F.dropout(x, p) if p else x


def patch_merging(norm: Norm, reduction: Linear, x: Tensor, *, norm_last: bool = False) -> Tensor:
    """Merge every 2 × 2 patches of images x (B, Y, X, C): a LayerNorm, then ``reduction``; or first that."""
    return ops.patch_merging(
        x, *reduction.plain, norm_weight=norm.weight, norm_bias=norm.bias, eps=norm.eps, norm_last=norm_last
    )


def patch_embed(proj: nn.Conv2d, images: Tensor, **options: object) -> Tensor:
    """Return the tokens of ``images``: the convolution ``proj``, with options of :func:`ops.patch_embed`."""
    return ops.patch_embed(images, *records.linear(proj).plain, **options)
