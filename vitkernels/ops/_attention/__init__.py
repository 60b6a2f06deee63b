"""Attention on separate queries, keys and values, on a packed qkv projection, or on packed images.

Forward (arXiv 1706.03762), over whole rows if they are short, else with online softmax (2205.14135, 2307.08691):
    S = scale · q kᵀ + mask + key_bias,  P = softmax(S),  o = (P · drop) v,  lse = log₂ Σ exp S
Backward:
    dP = drop · (do vᵀ),  delta = Σ_n P · dP = Σ_d o · do,  dS = P · (dP − delta)
    dv = (P · drop)ᵀ do,  dk = scale · dSᵀ q,  dq = scale · dS k,  dmask = Σ dS over the dims that the mask broadcasts,
    dkey_bias = Σ dS over heads and queries (arXiv 2210.09461), summed by the kernels that compute dk

Shapes: batch B, queries N_q, keys N_kv (both N when packed), heads H, head dim D, tokens of all images T. The forward
takes the callers' layouts, (B, H, N, D), (B, N, H, D) or (T, H, D); the backward views them as (B, N, H, D). In memory
o is (B, N, H, D) or (T, H, D), so that the output projection reads it without a copy.
Softmax is in base 2 with log₂e folded into the scale. With a floating mask it is in base e: finfo.min times log₂e would
be −inf.
Products accumulate in fp32 (fp64 for fp64 inputs); P and dS are rounded to the inputs' dtype before the second product.
Saved for backward: the inputs (after QK-norm and RoPE), o and lse (B, H, N_q), with a floating mask as two parts. One
program writes each element of a gradient: there are no atomics, and results are bit-for-bit reproducible.

    checks.py           argument checks                   autograd.py          autograd Functions
    registered.py       registered ops: launchers, references and fake outputs
    config.py           regimes and tiles                 operands.py          masks, strides and options for kernels
    forward.py          three kernels, one per regime     prepare.py           QK-norm and RoPE
    forward_hopper.py   long rows on sm_90, in Gluon
    backward_row.py     whole rows, everything read once  backward_blocks.py   rows of any length, and a mask's gradient
    tiles.py            code shared by the kernels        backward.py          launches of the backward's kernels
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitkernels import reference, runtime
from vitkernels.ops._attention.autograd import (
    AttentionFunction,
    AttentionQkvpackedBiasedFunction,
    AttentionQkvpackedFunction,
)
from vitkernels.ops._attention.checks import (
    check_dropout,
    check_images,
    check_key_bias,
    check_like_q,
    check_mask,
    check_operands,
    check_prepared,
    check_sizes,
    int32,
    unexpanded,
)
from vitkernels.ops._attention.config import attention_provider
from vitkernels.ops._attention.operands import cast_operands, draw_seed
from vitkernels.ops._attention.prepare import PrepareFunction, QKNorm, Rope, prepare_fwd
from vitkernels.ops._attention.registered import attention_fwd, attention_qkvpacked_fwd
from vitkernels.ops._checks import check_integer, check_scale, check_shape, check_tensor
from vitkernels.ops._registry import needs_grad, uses_kernels


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    attn_mask: Tensor | None = None,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    rope: Rope | tuple | None = None,
    num_prefix_tokens: int = 0,
    q_norm: QKNorm | tuple | None = None,
    k_norm: QKNorm | tuple | None = None,
) -> Tensor:
    """Attend from every query to every key: ``softmax(scale · q kᵀ + mask + key_bias) v``.

    Args:
        q: (B, H, N_q, D), fp16, bf16, fp32 or fp64, any strides (a last dim that is not contiguous is copied);
            B and H may be 0, N_q may not, D ≤ 256.
        k: (B, H, N_kv, D), ``q``'s dtype, any strides; N_kv ≥ 1.
        v: (B, H, N_kv, D), as ``k``.
        attn_mask: Broadcasts to (B, H, N_q, N_kv), up to four dims. It is bool, True where a query attends to a key,
            or of any floating dtype and added to the scaled scores. Expanded dims are never materialized; a mask whose
            row stride is not a multiple of 16 elements is copied once. A query that attends to no key gives 0 and gets
            no gradient. A floating mask may require grad; its gradient is summed over broadcast dims in a fixed order,
            so a learned bias (1, H, N, N) or (H, N, N) needs no (B, H, N, N) tensor.
        key_bias: (B, N_kv), any floating dtype: added to the scores of all heads and queries, besides a mask. The
            logarithm of the number of tokens merged into each key makes the attention proportional (arXiv 2210.09461).
            −inf hides a key. It may require grad, which is as good as free; use ``attn_mask`` for finfo.min.
        scale: Factor of the scores, finite; 1/√D unless given.
        is_causal: Query i attends only to keys 0 to i; can be combined with a mask.
        dropout_p: Probability of dropping a weight, 0 to 1; the rest are scaled by 1/(1 − p). The seed comes from the
            device's generator, so ``torch.manual_seed`` makes it reproducible.
        rope: :class:`Rope` tables (or a tuple of its fields), applied to q and k after the norms. D must be even, and
            q and k must have the same length. Tables that require grad are applied by PyTorch's own ops.
        num_prefix_tokens: Number of leading tokens that rope does not rotate.
        q_norm, k_norm: :class:`QKNorm` (or a tuple of its fields) of q and of k.

    Returns:
        (B, H, N_q, D) in ``q``'s dtype (autocast's under autocast), laid out in memory as (B, N_q, H, D), so
        that ``.transpose(1, 2).flatten(2)`` makes no copy.

    Raises:
        ValueError: A shape or device does not fit, there are no tokens or channels, ``scale`` is not finite, or
            ``dropout_p`` lies outside 0 to 1.
        TypeError: A dtype does not fit.
        NotImplementedError: D > 256, or a tensor is nested, sparse or quantized.

    Reference: arXiv 1706.03762, 2205.14135, 2307.08691, 2210.09461.
    """
    op = "attention"
    check_tensor(op, "q", q)
    q, k, v = cast_operands(q, k, v)
    B, H, N_q, N_kv, D = check_operands(op, q, k, v)
    scale = check_scale(op, scale, D)
    mask = check_mask(op, attn_mask, q, (B, H, N_q, N_kv))
    check_key_bias(op, key_bias, q, (B, N_kv), "(B, N_kv)")
    dropout_p = check_dropout(op, dropout_p)
    is_causal = bool(is_causal)
    rope, q_norm, k_norm, num_prefix_tokens = check_prepared(
        op, q, q.shape, N_kv, rope, num_prefix_tokens, q_norm, k_norm
    )
    if not uses_kernels(q) or _prefers_sdpa(q, N_q, N_kv, D):
        return reference.attention(
            q, k, v, attn_mask=attn_mask, key_bias=key_bias, scale=scale, is_causal=is_causal, dropout_p=dropout_p,
            rope=rope, num_prefix_tokens=num_prefix_tokens, q_norm=q_norm, k_norm=k_norm,
        )  # fmt: skip
    if rope is not None or q_norm is not None or k_norm is not None:
        q = _prepare(q, q_norm, rope, num_prefix_tokens)
        k = _prepare(k, k_norm, rope, num_prefix_tokens)
    return _attend(q, k, v, mask, key_bias, draw_seed(q, dropout_p), None, scale, is_causal, dropout_p, 0)


def attention_qkvpacked(
    qkv: Tensor,
    *,
    attn_mask: Tensor | None = None,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    rope: Rope | tuple | None = None,
    num_prefix_tokens: int = 0,
    q_norm: QKNorm | tuple | None = None,
    k_norm: QKNorm | tuple | None = None,
) -> Tensor:
    """:func:`attention` on the output of a qkv projection, without transposes or copies.

    Args:
        qkv: (B, N, 3, H, D), queries, keys and values along dim 2; dtypes, sizes and strides as for
            :func:`attention`.
        attn_mask, key_bias, scale, is_causal, dropout_p, rope, num_prefix_tokens, q_norm, k_norm: As for
            :func:`attention`.

    Returns:
        (B, N, H, D), contiguous, in ``qkv``'s dtype (autocast's under autocast).

    Raises:
        ValueError, TypeError, NotImplementedError: As for :func:`attention`.

    Reference: as for :func:`attention`.
    """
    op = "attention_qkvpacked"
    check_tensor(op, "qkv", qkv)
    (qkv,) = cast_operands(qkv)
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(f"{op}: qkv has shape {tuple(qkv.shape)}; expected (B, N, 3, H, D)")
    B, N, _, H, D = qkv.shape
    check_sizes(op, "qkv", qkv, N, D)
    scale = check_scale(op, scale, D)
    mask = check_mask(op, attn_mask, qkv, (B, H, N, N))
    check_key_bias(op, key_bias, qkv, (B, N), "(B, N)")
    dropout_p = check_dropout(op, dropout_p)
    is_causal = bool(is_causal)
    rope, q_norm, k_norm, num_prefix_tokens = check_prepared(
        op, qkv, (B, H, N, D), N, rope, num_prefix_tokens, q_norm, k_norm
    )
    as_given = rope is None and q_norm is None and k_norm is None
    apart = (rope is not None and needs_grad(rope.cos, rope.sin)) or (key_bias is not None and not as_given)
    on_kernels = uses_kernels(qkv) and not _prefers_sdpa(qkv, N, N, D)
    if apart or not on_kernels:
        options = {
            "attn_mask": attn_mask, "key_bias": key_bias, "scale": scale, "is_causal": is_causal,
            "dropout_p": dropout_p, "rope": rope, "num_prefix_tokens": num_prefix_tokens, "q_norm": q_norm,
            "k_norm": k_norm,
        }  # fmt: skip
        if not on_kernels:
            return reference.attention_qkvpacked(qkv, **options).contiguous()
        q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
        return attention(q, k, v, **options).transpose(1, 2)
    seed = draw_seed(qkv, dropout_p)
    if as_given and not needs_grad(qkv, mask, key_bias):
        return attention_qkvpacked_fwd(qkv, scale, mask, seed, is_causal, dropout_p, None, 0, key_bias)[0]
    if key_bias is not None:
        return AttentionQkvpackedBiasedFunction.apply(qkv, mask, key_bias, seed, scale, is_causal, dropout_p)
    cos, sin = (None, None) if rope is None else (_table(rope.cos), _table(rope.sin))
    (q_weight, q_bias, *q_kind), (k_weight, k_bias, *k_kind) = _norm(q_norm), _norm(k_norm)
    return AttentionQkvpackedFunction.apply(
        qkv, mask, q_weight, q_bias, k_weight, k_bias, cos, sin, seed, scale, is_causal, dropout_p, *q_kind, *k_kind,
        rope is not None and rope.interleaved, num_prefix_tokens,
    )  # fmt: skip


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    rope: Rope | tuple | None = None,
    q_norm: QKNorm | tuple | None = None,
    k_norm: QKNorm | tuple | None = None,
) -> Tensor:
    """:func:`attention` within each of several images of different sizes, packed in one row of tokens.

    Args:
        q: (T, H, D), the concatenated tokens of all images; dtypes, sizes and strides as for :func:`attention`, but T
            may be 0.
        k, v: (T, H, D), as ``q``.
        cu_seqlens: (images + 1,), int32 or int64, on ``q``'s device: image i has tokens ``cu_seqlens[i]`` to
            ``cu_seqlens[i + 1]``; it begins with 0. Tokens after the last image give 0 and get no gradient.
        max_seqlen: Number of tokens of the longest image. The values of ``cu_seqlens`` are checked only on a CPU, since
            a check would synchronize with a GPU; on a GPU, an image's tokens beyond ``max_seqlen`` give 0.
        key_bias: (T,), as for :func:`attention`.
        scale, is_causal, dropout_p, q_norm, k_norm: As for :func:`attention`.
        rope: As for :func:`attention`, with tables that broadcast to (H, T, D), including the prefix tokens.

    Returns:
        (T, H, D), contiguous, in ``q``'s dtype (autocast's under autocast).

    Raises:
        ValueError, TypeError, NotImplementedError: As for :func:`attention`.

    Reference: as for :func:`attention`.
    """
    op = "attention_varlen"
    check_tensor(op, "q", q)
    if torch.jit.is_tracing():
        raise NotImplementedError(f"{op}: torch.jit.trace would keep these cu_seqlens for good; use torch.export")
    q, k, v = cast_operands(q, k, v)
    if q.ndim != 3:
        raise ValueError(f"{op}: q has shape {tuple(q.shape)}; expected (T, H, D)")
    check_like_q(op, q, k, v)
    shape = q.shape
    for name, x in (("k", k), ("v", v)):
        check_shape(op, name, x, shape, "q's shape")
    T, H, D = shape
    check_sizes(op, "q", q, 1, D)
    scale = check_scale(op, scale, D)
    dropout_p = check_dropout(op, dropout_p)
    check_key_bias(op, key_bias, q, (T,), "(T,)")
    max_seqlen = check_images(op, q, cu_seqlens, max_seqlen)
    is_causal = bool(is_causal)
    rope, q_norm, k_norm, _ = check_prepared(op, q, (1, H, T, D), T, rope, 0, q_norm, k_norm)
    if not uses_kernels(q):
        q, k = (x.transpose(0, 1).unsqueeze(0) for x in (q, k))
        q, k = (x[0].transpose(0, 1) for x in reference.prepare_qk(q, k, rope, 0, q_norm, k_norm))
        return reference.attention_varlen(
            q, k, v, cu_seqlens, key_bias=key_bias, scale=scale, is_causal=is_causal, dropout_p=dropout_p
        ).contiguous()
    if rope is not None or q_norm is not None or k_norm is not None:
        q, k = (x.transpose(0, 1).unsqueeze(0) for x in (q, k))
        q, k = (_prepare(x, norm, rope, 0).squeeze(0).transpose(0, 1) for x, norm in ((q, q_norm), (k, k_norm)))
    seed, starts = draw_seed(q, dropout_p), int32(cu_seqlens)
    return _attend(q, k, v, None, key_bias, seed, starts, scale, is_causal, dropout_p, max_seqlen)


def attention_weights(
    q: Tensor,
    k: Tensor,
    *,
    query: int | None = None,
    attn_mask: Tensor | None = None,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    rope: Rope | tuple | None = None,
    num_prefix_tokens: int = 0,
    q_norm: QKNorm | tuple | None = None,
    k_norm: QKNorm | tuple | None = None,
) -> Tensor:
    """Compute the attention weights, which :func:`attention` never stores: ``softmax(scale · q kᵀ + mask + key_bias)``.

    They are computed by PyTorch's own ops, in fp32 (fp64 for fp64), and are differentiable.

    Args:
        q, k, attn_mask, key_bias, scale, is_causal, rope, num_prefix_tokens, q_norm, k_norm: As for
            :func:`attention`.
        query: Index of a query; only its row is computed. 0 is the class token, −1 the last token. None: all rows.

    Returns:
        (B, H, N_q, N_kv), or (B, H, 1, N_kv) for one query; fp32, or fp64 for fp64.

    Raises:
        ValueError, TypeError, NotImplementedError: As for :func:`attention`.
        IndexError: There is no such query.
    """
    op = "attention_weights"
    check_tensor(op, "q", q)
    q, k = cast_operands(q, k)
    B, H, N_q, N_kv, D = check_operands(op, q, k, k)
    scale = check_scale(op, scale, D)
    mask = check_mask(op, attn_mask, q, (B, H, N_q, N_kv))
    check_key_bias(op, key_bias, q, (B, N_kv), "(B, N_kv)")
    rope, q_norm, k_norm, num_prefix_tokens = check_prepared(
        op, q, q.shape, N_kv, rope, num_prefix_tokens, q_norm, k_norm
    )
    if key_bias is not None:
        mask = reference.biased_mask(mask, key_bias)
    wide = runtime.wide_dtype(q.dtype)
    q, k = reference.prepare_qk(q.to(wide), k.to(wide), rope, num_prefix_tokens, q_norm, k_norm)
    if query is None:
        return reference.attention_weights(q, k, attn_mask=mask, scale=scale, is_causal=is_causal)
    query = check_integer(op, "query", query)
    if not -N_q <= query < N_q:
        raise IndexError(f"{op}: query is {query}; expected −{N_q} to {N_q - 1}, as there are {N_q} queries")
    query %= N_q
    if mask is not None and mask.shape[2] > 1:
        mask = mask[:, :, query : query + 1]
    if is_causal:
        behind = (torch.arange(k.shape[2], device=q.device) <= query)[None, None, None]
        if mask is None:
            mask = behind
        elif mask.dtype == torch.bool:
            mask = mask & behind
        else:
            mask = mask.masked_fill(~behind, float("-inf"))
    return reference.attention_weights(q[:, :, query : query + 1], k, attn_mask=mask, scale=scale)


def _attend(q, k, v, mask, key_bias, seed, starts, scale, is_causal, dropout_p, max_seqlen):
    """Attention on (B, H, N, D), or (T, H, D) with ``starts``, through its autograd Function only if needed."""
    if needs_grad(q, k, v, mask, key_bias):
        return AttentionFunction.apply(q, k, v, mask, key_bias, seed, starts, scale, is_causal, dropout_p, max_seqlen)
    return attention_fwd(
        q, k, v, scale, starts is None, mask, seed, is_causal, dropout_p, starts, max_seqlen, key_bias
    )[0]


def _prepare(x: Tensor, norm: QKNorm | None, rope: Rope | None, prefix: int) -> Tensor:
    """Apply ``norm`` and ``rope`` to ``x`` (B, H, N, D)."""
    if norm is None and rope is None:
        return x
    late = rope is not None and needs_grad(rope.cos, rope.sin)
    cos, sin = (None, None) if rope is None or late else (_table(rope.cos), _table(rope.sin))
    if norm is not None or cos is not None:
        weight, bias, kind, eps = _norm(norm)
        interleaved = cos is not None and rope.interleaved
        spec = (x.transpose(1, 2), weight, bias, cos, sin, kind, eps, interleaved, prefix)
        x = (PrepareFunction.apply if needs_grad(x, weight, bias) else prepare_fwd)(*spec).transpose(1, 2)
    return reference.rope(x, *rope, num_prefix_tokens=prefix) if late else x


def _norm(norm: QKNorm | None) -> tuple[Tensor | None, Tensor | None, str, float]:
    """Return weight, bias, kind and eps as the registered ops take them."""
    return (None, None, "", 0.0) if norm is None else (*norm[:2], "rms" if norm.rms else "layer", norm.eps)


def _table(table: Tensor) -> Tensor:
    """Return ``table`` with four dims; expanded dims, except the channels, get size 1."""
    return unexpanded(table[(None,) * (4 - table.ndim)], dims=3)


def _prefers_sdpa(x: Tensor, N_q: int, N_kv: int, D: int) -> bool:
    return not x.is_cpu and attention_provider(N_q, N_kv, D, x.dtype, x.device) == "sdpa"
