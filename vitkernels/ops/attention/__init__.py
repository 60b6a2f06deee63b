"""Attention, from separate queries, keys and values, from a packed qkv projection, or over packed images.

Forward (arXiv 1706.03762), by whole rows where they are short, else by online softmax (2205.14135, 2307.08691):
    S = scale · q kᵀ + mask,  P = softmax(S),  o = (P · drop) v,  lse = log₂ Σ exp S
Backward:
    dP = drop · (do vᵀ),  delta = Σ_n P · dP = Σ_d o · do,  dS = P · (dP − delta)
    dv = (P · drop)ᵀ do,  dk = scale · dSᵀ q,  dq = scale · dS k,  dmask = Σ dS over what shares it

Shapes: batch B, queries N_q, keys N_kv (both N when packed), heads H, head dim D, tokens of all images T. The forward
takes tensors as its callers have them, (B, H, N, D), (B, N, H, D) or (T, H, D), and the backward views them as
(B, N, H, D). In memory o is (B, N, H, D) or (T, H, D), so that the output projection reads it without a copy.
Softmax is in base 2, log₂e folded into the scale, but with a floating mask, whose finfo.min times log₂e would be −inf.
Products accumulate in fp32 (fp64 for fp64 inputs); P and dS are rounded to the inputs' dtype before the second product.
Saved for backward: the inputs (as QK-norm and RoPE left them), o and lse (B, H, N_q), or its two parts apart. Every
element of every gradient has one writer: nothing is atomic, and results repeat bit for bit.

    config.py           which kernel, and its tiles       operands.py          masks, strides and options for kernels
    forward.py          three kernels, one a regime       prepare.py           QK-norm and RoPE
    backward_row.py     whole rows, everything read once  backward_blocks.py   rows of any length, and a mask's gradient
    tiles.py            what the kernels share            backward.py          which of them run
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from vitkernels import reference, runtime
from vitkernels.ops._checks import (
    FLOATING,
    alike,
    check_integer,
    check_like,
    check_number,
    check_scale,
    check_shape,
    check_tensor,
)
from vitkernels.ops._once import once_differentiable
from vitkernels.ops._registry import needs_grad, reference_gradients, register, uses_kernels
from vitkernels.ops.attention.backward import attention_backward
from vitkernels.ops.attention.config import attention_provider
from vitkernels.ops.attention.forward import attention_forward, forward_outputs
from vitkernels.ops.attention.operands import LOG2_E, Options
from vitkernels.ops.attention.prepare import PrepareFunction, QKNorm, Rope, prepare_backward, prepare_fwd

MAX_HEAD_DIM = 256


# How registered ops spell Options, and what prepares q and k. PyTorch hands on no defaults at the end: what is given
# most often comes first.
_OPTIONS = (
    "Tensor? mask=None, Tensor? seed=None, bool is_causal=False, float dropout_p=0.0, Tensor? starts=None, "
    "SymInt max_seqlen=0"
)
_SEPARATE_OPTIONS = f"bool heads_first=False, {_OPTIONS}"
_PREPARED = (
    "Tensor? q_weight, Tensor? q_bias, str q_norm, float q_eps, Tensor? k_weight, Tensor? k_bias, str k_norm, "
    "float k_eps, Tensor? cos, Tensor? sin, bool interleaved, int prefix"
)


def _forward(q, k, v, scale, *options):
    return attention_forward(q, k, v, Options(scale, *options))


def _outputs(q, k, v, scale, *options):
    return forward_outputs(q, k, v, Options(scale, *options))


def _separate_backward(do, q, k, v, o, lse, scale, needed, *options):
    dq, dk, dv, dmask = _gradients(do, q, k, v, o, lse, scale, needed, *options)
    options = Options(scale, *options)
    needs_dq, needs_dkv, needs_dmask = needed
    do, q, k, v, o = options.tokens_first(do, q, k, v, o)
    outputs = options.tokens_first(dq) if needs_dq else [None]
    outputs += options.tokens_first(dk, dv) if needs_dkv else [None, None]
    _, computed = attention_backward(do, q, k, v, o, lse, options, *outputs, needs_dmask=needs_dmask)
    return dq, dk, dv, computed if needs_dmask else dmask


def _gradients(do, q, k, v, o, lse, scale, needed, *options):
    options = Options(scale, *options)
    needs_dq, needs_dkv, needs_dmask = needed
    new = torch.empty if options.starts is None else torch.zeros  # tokens may belong to no image
    grads = []
    for x, n in ((q, needs_dq), (k, needs_dkv), (v, needs_dkv)):
        if n and options.heads_first:
            B, H, N, D = x.shape
            grads.append(torch.empty((B, N, H, D), dtype=x.dtype, device=x.device).transpose(1, 2))
        else:
            grads.append(new(x.shape if n else (0,), dtype=x.dtype, device=x.device))
    return *grads, _new_dmask(options.mask if needs_dmask else None, lse)


def _new_dmask(mask, lse):
    return torch.empty((0,) if mask is None else mask.shape, dtype=lse.dtype, device=lse.device)


def _packed_forward(qkv, scale, *options):
    return _forward(*qkv.unbind(2), scale, False, *options)


def _packed_backward(do, qkv, o, lse, scale, needs_sum, needs_dmask=False, *options):
    dqkv, dqkv_sum, dmask = _packed_gradients(do, qkv, o, lse, scale, needs_sum, needs_dmask, *options)
    sums, computed = attention_backward(
        do, *qkv.unbind(2), o, lse, Options(scale, False, *options), *dqkv.unbind(2),
        needs_sums=needs_sum, needs_dmask=needs_dmask,
    )  # fmt: skip
    return dqkv, sums if needs_sum else dqkv_sum, computed if needs_dmask else dmask


def _packed_gradients(do, qkv, o, lse, scale, needs_sum, needs_dmask=False, *options):
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    dqkv_sum = torch.empty(qkv.shape[2:] if needs_sum else (0,), dtype=lse.dtype, device=qkv.device)
    return dqkv, dqkv_sum, _new_dmask(Options(scale, False, *options).mask if needs_dmask else None, lse)


def _prepared_backward(
    do, qkv, q, k, o, lse, scale, mask, seed, is_causal, dropout_p, needs_dmask, needed,
    q_weight, q_bias, q_norm, q_eps, k_weight, k_bias, k_norm, k_eps, cos, sin, interleaved, prefix,
):  # fmt: skip
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    dq, dk, dv = dqkv.unbind(2)
    options = Options(scale, False, mask, seed, is_causal, dropout_p)
    _, dmask = attention_backward(do, q, k, qkv.select(2, 2), o, lse, options, dq, dk, dv, needs_dmask=needs_dmask)
    sums = []
    for i, dx, weight, norm, eps in ((0, dq, q_weight, q_norm, q_eps), (1, dk, k_weight, k_norm, k_eps)):
        needs = needed[2 * i : 2 * i + 2]
        if norm or cos is not None:  # in place: a row is read by the program that writes it
            sums += prepare_backward(dx, qkv.select(2, i), weight, cos, sin, norm, eps, interleaved, prefix, dx, *needs)
        else:
            sums += [lse.new_empty(0), lse.new_empty(0)]
    return dqkv, *sums, dmask if needs_dmask else _new_dmask(None, lse)


def _fake_prepared_backward(do, qkv, q, k, o, lse, scale, mask, seed, is_causal, dropout_p, needs_dmask, needed, *_):
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    sums = (torch.empty(qkv.shape[-1] if n else 0, dtype=lse.dtype, device=qkv.device) for n in needed)
    return dqkv, *sums, _new_dmask(mask if needs_dmask else None, lse)


def _reference_output(q, k, v, mask, options):
    """o of q, k and v: ``options`` but for their mask, which may be a leaf of autograd in its place."""
    if options.starts is not None:
        return reference.attention_varlen(q, k, v, options.starts, scale=options.scale, is_causal=options.is_causal)
    if not options.heads_first:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    drawn = None
    if options.dropout_p:
        shape = (*q.shape[:3], k.shape[2])
        drawn = reference.dropout_scale(int(options.seed), shape, options.dropout_p).to(q.device)
    o = reference.attention(
        q, k, v, attn_mask=mask, scale=options.scale, is_causal=options.is_causal, dropout_scale=drawn
    )
    return o if options.heads_first else o.transpose(1, 2)


def _reference_forward(q, k, v, scale, *options):
    o, lse = _outputs(q, k, v, scale, *options)
    options = Options(scale, *options)
    o = o.copy_(_reference_output(q, k, v, options.mask, options))
    q, k = options.tokens_first(q, k)
    bounds = [0, q.shape[1]] if options.starts is None else options.starts.tolist()
    lse.zero_()
    for start, end in itertools.pairwise(bounds):
        queries, keys = q[:, start:end].to(lse.dtype), k[:, start : k.shape[1] if options.starts is None else end]
        scores = torch.einsum("bmhd,bnhd->bhmn", queries, keys.to(lse.dtype)) * scale
        if options.is_causal:
            scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), float("-inf"))
        if options.mask is not None:
            if options.mask.dtype == torch.bool:
                scores = scores.masked_fill(~options.mask, float("-inf"))
            else:
                scores = scores + reference.added_mask(options.mask, lse.dtype)
        largest = scores.amax(-1, keepdim=True)
        empty = (largest == float("-inf")) & (options.mask is not None)
        shifted = scores - largest.masked_fill(empty, 0.0)
        log_total = shifted.logsumexp(-1).masked_fill(empty.squeeze(-1), 0.0) * LOG2_E
        largest = largest.masked_fill(empty, float("inf")).squeeze(-1)
        if options.mask_kind == "float":
            lse.copy_(torch.stack([largest, log_total], -1))
        else:
            lse[:, :, start:end] = largest * LOG2_E + log_total
    return o, lse


def _reference_backward(do, q, k, v, o, lse, scale, needed, *options):
    outputs = _gradients(do, q, k, v, o, lse, scale, needed, *options)
    options = Options(scale, *options)
    needs_dq, needs_dkv, needs_dmask = needed
    grads = reference_gradients(
        lambda q, k, v, mask: _reference_output(q, k, v, mask, options),
        (q, k, v, options.mask), (do,), (needs_dq, needs_dkv, needs_dkv, needs_dmask),
    )  # fmt: skip
    return tuple(output.copy_(grad) for output, grad in zip(outputs, grads, strict=True))


def _reference_packed_backward(do, qkv, o, lse, scale, needs_sum, needs_dmask=False, *options):
    options = Options(scale, False, *options)
    dqkv, dmask = reference_gradients(
        lambda x, mask: _reference_output(*x.unbind(2), mask, options), (qkv, options.mask), (do,), (True, needs_dmask)
    )
    dqkv_sum = dqkv.sum((0, 1), dtype=lse.dtype) if needs_sum else lse.new_empty(0)
    return dqkv, dqkv_sum, dmask.to(lse.dtype)


def _reference_prepared_backward(
    do, qkv, q, k, o, lse, scale, mask, seed, is_causal, dropout_p, needs_dmask, needed,
    q_weight, q_bias, q_norm, q_eps, k_weight, k_bias, k_norm, k_eps, cos, sin, interleaved, prefix,
):  # fmt: skip
    options = Options(scale, False, mask, seed, is_causal, dropout_p)

    def function(qkv, mask, q_weight, q_bias, k_weight, k_bias):
        prepared = []
        for i, w, b, norm, eps in ((0, q_weight, q_bias, q_norm, q_eps), (1, k_weight, k_bias, k_norm, k_eps)):
            x = qkv[:, :, i].transpose(1, 2)
            x = reference.qk_norm(x, w, b, eps, norm) if norm else x
            x = x if cos is None else reference.rope(x, cos, sin, interleaved, prefix)
            prepared.append(x.transpose(1, 2))
        return _reference_output(*prepared, qkv[:, :, 2], mask, options)

    dqkv, dmask, *sums = reference_gradients(
        function, (qkv, mask, q_weight, q_bias, k_weight, k_bias), (do,), (True, needs_dmask, *needed)
    )
    return dqkv, *(s.to(lse.dtype) for s in sums), dmask.to(lse.dtype)


attention_fwd = register(
    f"attention_fwd(Tensor q, Tensor k, Tensor v, float scale, {_SEPARATE_OPTIONS}) -> (Tensor, Tensor)",
    launcher=_forward,
    reference=_reference_forward,
    fake=_outputs,
)
attention_bwd = register(
    "attention_bwd(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, float scale, bool[] needed, "
    f"{_SEPARATE_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    launcher=_separate_backward,
    reference=_reference_backward,
    fake=_gradients,
)
attention_qkvpacked_fwd = register(
    f"attention_qkvpacked_fwd(Tensor qkv, float scale, {_OPTIONS}) -> (Tensor, Tensor)",
    launcher=_packed_forward,
    reference=lambda qkv, scale, *options: _reference_forward(*qkv.unbind(2), scale, False, *options),
    fake=lambda qkv, scale, *options: _outputs(*qkv.unbind(2), scale, False, *options),
)
attention_qkvpacked_bwd = register(
    "attention_qkvpacked_bwd(Tensor do, Tensor qkv, Tensor o, Tensor lse, float scale, bool needs_sum, "
    f"bool needs_dmask=False, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    launcher=_packed_backward,
    reference=_reference_packed_backward,
    fake=_packed_gradients,
)
attention_prepared_bwd = register(
    "attention_prepared_bwd(Tensor do, Tensor qkv, Tensor q, Tensor k, Tensor o, Tensor lse, float scale, "
    f"Tensor? mask, Tensor? seed, bool is_causal, float dropout_p, bool needs_dmask, bool[] needed, {_PREPARED}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    launcher=_prepared_backward,
    reference=_reference_prepared_backward,
    fake=_fake_prepared_backward,
)


class AttentionFunction(torch.autograd.Function):
    """Autograd for separate q, k and v, (B, H, N, D) each, or (T, H, D) with ``starts``, and a mask."""

    @staticmethod
    def forward(ctx, q, k, v, mask, seed, starts, scale, is_causal, dropout_p, max_seqlen):
        o, lse = attention_fwd(q, k, v, scale, starts is None, mask, seed, is_causal, dropout_p, starts, max_seqlen)
        ctx.save_for_backward(q, k, v, o, lse, mask, seed, starts)
        ctx.emulated = runtime.emulated_arch()
        ctx.options = (scale, is_causal, dropout_p, max_seqlen)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, saved, do):
        *tensors, mask, seed, starts = saved
        scale, is_causal, dropout_p, max_seqlen = ctx.options
        needs_q, needs_k, needs_v, needs_mask, *_ = ctx.needs_input_grad
        dq, dk, dv, dmask = attention_bwd(
            do, *tensors, scale, [needs_q, needs_k or needs_v, needs_mask], starts is None,
            mask, seed, is_causal, dropout_p, starts, max_seqlen,
        )  # fmt: skip
        return (
            dq if needs_q else None,
            dk if needs_k else None,
            dv if needs_v else None,
            dmask.to(mask.dtype) if needs_mask else None,
            *[None] * 6,
        )


class AttentionQkvpackedFunction(torch.autograd.Function):
    """Autograd for packed qkv, (B, N, 3, H, D), a mask, and what prepares q and k."""

    @staticmethod
    def forward(
        ctx, qkv, mask, q_weight, q_bias, k_weight, k_bias, cos, sin, seed, options, norms, interleaved, prefix
    ):
        q, k, v = qkv.unbind(2)
        q_norm, q_eps, k_norm, k_eps = norms
        if q_norm or cos is not None:
            q = prepare_fwd(q, q_weight, q_bias, cos, sin, q_norm, q_eps, interleaved, prefix)
        if k_norm or cos is not None:
            k = prepare_fwd(k, k_weight, k_bias, cos, sin, k_norm, k_eps, interleaved, prefix)
        scale, is_causal, dropout_p = options
        ctx.prepared = bool(q_norm or k_norm or cos is not None)
        if ctx.prepared:
            o, lse = attention_fwd(q, k, v, scale, False, mask, seed, is_causal, dropout_p)
        else:
            q = k = None
            o, lse = attention_qkvpacked_fwd(qkv, scale, mask, seed, is_causal, dropout_p)
        ctx.save_for_backward(qkv, q, k, o, lse, mask, seed, q_weight, q_bias, k_weight, k_bias, cos, sin)
        ctx.emulated = runtime.emulated_arch()
        ctx.options = (options, norms, interleaved, prefix)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, saved, do):
        qkv, q, k, o, lse, mask, seed, q_weight, q_bias, k_weight, k_bias, cos, sin = saved
        (scale, is_causal, dropout_p), (q_norm, q_eps, k_norm, k_eps), interleaved, prefix = ctx.options
        needs_qkv, needs_mask, *needed = ctx.needs_input_grad[:6]
        if ctx.prepared:
            dqkv, *sums, dmask = attention_prepared_bwd(
                do, qkv, qkv[:, :, 0] if q is None else q, qkv[:, :, 1] if k is None else k, o, lse, scale, mask, seed,
                is_causal, dropout_p, needs_mask, needed, q_weight, q_bias, q_norm, q_eps, k_weight, k_bias, k_norm,
                k_eps, cos, sin, interleaved, prefix,
            )  # fmt: skip
        else:
            dqkv, _, dmask = attention_qkvpacked_bwd(
                do, qkv, o, lse, scale, False, needs_mask, mask, seed, is_causal, dropout_p
            )
            sums = [None] * 4
        parameters = (q_weight, q_bias, k_weight, k_bias)
        return (
            dqkv if needs_qkv else None,
            dmask.to(mask.dtype) if needs_mask else None,
            *(s.to(p.dtype) if n else None for s, p, n in zip(sums, parameters, needed, strict=True)),
            *[None] * 7,
        )


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    rope: Rope | tuple | None = None,
    num_prefix_tokens: int = 0,
    q_norm: QKNorm | tuple | None = None,
    k_norm: QKNorm | tuple | None = None,
) -> Tensor:
    """Attend from every query to every key: ``softmax(scale · q kᵀ + mask) v``.

    Args:
        q: (B, H, N_q, D), fp16, bf16, fp32 or fp64, any strides (a last dim that is not contiguous is copied);
            B and H may be 0, N_q may not, D ≤ 256.
        k: (B, H, N_kv, D), ``q``'s dtype, any strides; N_kv ≥ 1.
        v: (B, H, N_kv, D), as ``k``.
        attn_mask: Broadcasts to (B, H, N_q, N_kv), up to four dims: bool, True where a query looks at a key, or any
            floating dtype, added to the scaled scores. What is expanded is never written out; rows that are not
            multiples of 16 elements apart are copied once, without what is expanded. A query that looks at no key
            gives 0 and gets no gradient. A floating mask that requires grad gets its gradient, summed over what
            shares it in a fixed order: a learned bias (1, H, N, N) or (H, N, N) costs no (B, H, N, N) tensor.
        scale: Factor of the scores, finite; 1/√D unless given.
        is_causal: Query i looks at keys 0 to i alone; may come with a mask.
        dropout_p: Probability with which a weight is dropped, 0 to 1; the rest are scaled by 1/(1 − p). Drawn by a
            seed from the device's generator: ``torch.manual_seed`` repeats it.
        rope: :class:`Rope` tables (or a tuple of its fields), applied to q and k behind the norms; D is even and q and
            k are equally long. Tables that require grad are applied by PyTorch's own ops.
        num_prefix_tokens: How many tokens in front rope leaves alone.
        q_norm, k_norm: :class:`QKNorm` (or a tuple of its fields) of q and of k.

    Returns:
        (B, H, N_q, D) in ``q``'s dtype (autocast's under autocast), laid out in memory as (B, N_q, H, D), so
        that ``.transpose(1, 2).flatten(2)`` makes no copy.

    Raises:
        ValueError: A shape or device does not fit, there are no tokens or channels, ``scale`` is not finite, or
            ``dropout_p`` lies outside 0 to 1.
        TypeError: A dtype does not fit.
        NotImplementedError: D > 256, or a tensor is nested, sparse or quantized.

    Reference: arXiv 1706.03762, 2205.14135, 2307.08691.
    """
    op = "attention"
    check_tensor(op, "q", q)
    q, k, v = _autocast(q, k, v)
    B, H, N_q, N_kv, D = _check_operands(op, q, k, v)
    scale = check_scale(op, scale, D)
    mask = _check_mask(op, attn_mask, q, (B, H, N_q, N_kv))
    dropout_p = _check_dropout(op, dropout_p)
    is_causal = bool(is_causal)
    rope, q_norm, k_norm, num_prefix_tokens = _check_prepared(
        op, q, q.shape, N_kv, rope, num_prefix_tokens, q_norm, k_norm
    )
    if not uses_kernels(q) or _prefers_sdpa(q, N_q, N_kv, D):
        return reference.attention(
            q, k, v, attn_mask=attn_mask, scale=scale, is_causal=is_causal, dropout_p=dropout_p, rope=rope,
            num_prefix_tokens=num_prefix_tokens, q_norm=q_norm, k_norm=k_norm,
        )  # fmt: skip
    if rope is not None or q_norm is not None or k_norm is not None:
        q = _prepare(q, q_norm, rope, num_prefix_tokens)
        k = _prepare(k, k_norm, rope, num_prefix_tokens)
    return _attend(q, k, v, mask, _seed(q, dropout_p), None, scale, is_causal, dropout_p, 0)


def attention_qkvpacked(
    qkv: Tensor,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    rope: Rope | tuple | None = None,
    num_prefix_tokens: int = 0,
    q_norm: QKNorm | tuple | None = None,
    k_norm: QKNorm | tuple | None = None,
) -> Tensor:
    """:func:`attention` straight from a qkv projection, read and written in place of any transpose or copy.

    Args:
        qkv: (B, N, 3, H, D), queries, keys and values along dim 2; dtypes, sizes and strides as for
            :func:`attention`.
        attn_mask, scale, is_causal, dropout_p, rope, num_prefix_tokens, q_norm, k_norm: As for :func:`attention`.

    Returns:
        (B, N, H, D), contiguous, in ``qkv``'s dtype (autocast's under autocast).

    Raises:
        ValueError, TypeError, NotImplementedError: As for :func:`attention`.

    Reference: as for :func:`attention`.
    """
    op = "attention_qkvpacked"
    check_tensor(op, "qkv", qkv)
    (qkv,) = _autocast(qkv)
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(f"{op}: qkv has shape {tuple(qkv.shape)}; expected (B, N, 3, H, D)")
    B, N, _, H, D = qkv.shape
    _check_sizes(op, "qkv", qkv, N, D)
    scale = check_scale(op, scale, D)
    mask = _check_mask(op, attn_mask, qkv, (B, H, N, N))
    dropout_p = _check_dropout(op, dropout_p)
    is_causal = bool(is_causal)
    rope, q_norm, k_norm, num_prefix_tokens = _check_prepared(
        op, qkv, (B, H, N, D), N, rope, num_prefix_tokens, q_norm, k_norm
    )
    late = rope is not None and needs_grad(rope.cos, rope.sin)
    on_kernels = uses_kernels(qkv) and not _prefers_sdpa(qkv, N, N, D)
    if late or not on_kernels:
        options = {
            "attn_mask": attn_mask, "scale": scale, "is_causal": is_causal, "dropout_p": dropout_p, "rope": rope,
            "num_prefix_tokens": num_prefix_tokens, "q_norm": q_norm, "k_norm": k_norm,
        }  # fmt: skip
        if not on_kernels:
            return reference.attention_qkvpacked(qkv, **options).contiguous()
        q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
        return attention(q, k, v, **options).transpose(1, 2)
    seed = _seed(qkv, dropout_p)
    as_given = rope is None and q_norm is None and k_norm is None
    if as_given and not needs_grad(qkv, mask):
        return attention_qkvpacked_fwd(qkv, scale, mask, seed, is_causal, dropout_p)[0]
    cos, sin = (None, None) if rope is None else (_table(rope.cos), _table(rope.sin))
    parameters = tuple(t for norm in (q_norm, k_norm) for t in (norm[:2] if norm else (None, None)))
    return AttentionQkvpackedFunction.apply(
        qkv, mask, *parameters, cos, sin, seed, (scale, is_causal, dropout_p),
        (_kind(q_norm), _eps(q_norm), _kind(k_norm), _eps(k_norm)),
        rope.interleaved if rope else False, num_prefix_tokens,
    )  # fmt: skip


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    rope: Rope | tuple | None = None,
    q_norm: QKNorm | tuple | None = None,
    k_norm: QKNorm | tuple | None = None,
) -> Tensor:
    """:func:`attention` within each of several images of different size, packed in one row of tokens.

    Args:
        q: (T, H, D), the tokens of all images one behind the other; dtypes, sizes and strides as for
            :func:`attention`, but T may be 0.
        k, v: (T, H, D), as ``q``.
        cu_seqlens: (images + 1,), int32 or int64, on ``q``'s device: image i has tokens ``cu_seqlens[i]`` to
            ``cu_seqlens[i + 1]``; it begins with 0. Tokens behind the last image give 0 and get no gradient.
        max_seqlen: Tokens of the longest image. Values of ``cu_seqlens`` are checked on a CPU alone, as a
            GPU would have to be waited for; there, tokens of an image beyond ``max_seqlen`` give 0.
        scale, is_causal, dropout_p, q_norm, k_norm: As for :func:`attention`.
        rope: As for :func:`attention`, with tables that broadcast to (H, T, D), prefix tokens among them.

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
    q, k, v = _autocast(q, k, v)
    if q.ndim != 3:
        raise ValueError(f"{op}: q has shape {tuple(q.shape)}; expected (T, H, D)")
    _check_like_q(op, q, k, v)
    shape = q.shape
    for name, x in (("k", k), ("v", v)):
        check_shape(op, name, x, shape, "q's shape")
    T, H, D = shape
    _check_sizes(op, "q", q, 1, D)
    scale = check_scale(op, scale, D)
    dropout_p = _check_dropout(op, dropout_p)
    max_seqlen = _check_images(op, q, cu_seqlens, max_seqlen)
    is_causal = bool(is_causal)
    rope, q_norm, k_norm, _ = _check_prepared(op, q, (1, H, T, D), T, rope, 0, q_norm, k_norm)
    if not uses_kernels(q):
        q, k = (x.transpose(0, 1).unsqueeze(0) for x in (q, k))
        q, k = (x[0].transpose(0, 1) for x in reference.prepare_qk(q, k, rope, 0, q_norm, k_norm))
        return reference.attention_varlen(
            q, k, v, cu_seqlens, scale=scale, is_causal=is_causal, dropout_p=dropout_p
        ).contiguous()
    if rope is not None or q_norm is not None or k_norm is not None:
        q, k = (x.transpose(0, 1).unsqueeze(0) for x in (q, k))
        q, k = (_prepare(x, norm, rope, 0).squeeze(0).transpose(0, 1) for x, norm in ((q, q_norm), (k, k_norm)))
    return _attend(q, k, v, None, _seed(q, dropout_p), _int32(cu_seqlens), scale, is_causal, dropout_p, max_seqlen)


def attention_weights(
    q: Tensor,
    k: Tensor,
    *,
    query: int | None = None,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    rope: Rope | tuple | None = None,
    num_prefix_tokens: int = 0,
    q_norm: QKNorm | tuple | None = None,
    k_norm: QKNorm | tuple | None = None,
) -> Tensor:
    """The weights that :func:`attention` never writes out: ``softmax(scale · q kᵀ + mask)``.

    Taken by PyTorch's own ops, in fp32 (fp64 for fp64), and differentiable.

    Args:
        q, k, attn_mask, scale, is_causal, rope, num_prefix_tokens, q_norm, k_norm: As for :func:`attention`.
        query: One query's row alone, the others' are not formed: 0 is a class token's; −1 the last.

    Returns:
        (B, H, N_q, N_kv), or (B, H, 1, N_kv) for one query; fp32, or fp64 for fp64.

    Raises:
        ValueError, TypeError, NotImplementedError: As for :func:`attention`.
        IndexError: There is no such query.
    """
    op = "attention_weights"
    check_tensor(op, "q", q)
    q, k = _autocast(q, k)
    B, H, N_q, N_kv, D = _check_operands(op, q, k, k)
    scale = check_scale(op, scale, D)
    mask = _check_mask(op, attn_mask, q, (B, H, N_q, N_kv))
    rope, q_norm, k_norm, num_prefix_tokens = _check_prepared(
        op, q, q.shape, N_kv, rope, num_prefix_tokens, q_norm, k_norm
    )
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


def _attend(q, k, v, mask, seed, starts, scale, is_causal, dropout_p, max_seqlen):
    """Attention of (B, H, N, D), or (T, H, D) with ``starts``, through autograd where it must see it."""
    if needs_grad(q, k, v, mask):
        return AttentionFunction.apply(q, k, v, mask, seed, starts, scale, is_causal, dropout_p, max_seqlen)
    return attention_fwd(q, k, v, scale, starts is None, mask, seed, is_causal, dropout_p, starts, max_seqlen)[0]


def _prepare(x: Tensor, norm: QKNorm | None, rope: Rope | None, prefix: int) -> Tensor:
    """``x`` (B, H, N, D) behind its norm and its rotary positions."""
    if norm is None and rope is None:
        return x
    late = rope is not None and needs_grad(rope.cos, rope.sin)
    cos, sin = (None, None) if rope is None or late else (_table(rope.cos), _table(rope.sin))
    if norm is not None or cos is not None:
        weight, bias = norm[:2] if norm else (None, None)
        interleaved = cos is not None and rope.interleaved
        spec = (x.transpose(1, 2), weight, bias, cos, sin, _kind(norm), _eps(norm), interleaved, prefix)
        x = (PrepareFunction.apply if needs_grad(x, weight, bias) else prepare_fwd)(*spec).transpose(1, 2)
    return reference.rope(x, *rope, num_prefix_tokens=prefix) if late else x


def _kind(norm: QKNorm | None) -> str:
    return "" if norm is None else "rms" if norm.rms else "layer"


def _eps(norm: QKNorm | None) -> float:
    return 0.0 if norm is None else norm.eps


def _table(table: Tensor) -> Tensor:
    """``table`` with four dims, of size 1 where it is expanded, but for its channels."""
    return _unexpanded(table[(None,) * (4 - table.ndim)], dims=3)


def _unexpanded(x: Tensor, dims: int = 4) -> Tensor:
    strides = x.stride()
    if 0 in strides:
        for i, stride in enumerate(strides[:dims]):
            if stride == 0 and x.shape[i] > 1:
                x = x.narrow(i, 0, 1)
    return x


def _seed(x: Tensor, dropout_p: float) -> Tensor | None:
    return torch.randint(2**62, (1,), device=x.device) if dropout_p else None


def _prefers_sdpa(x: Tensor, N_q: int, N_kv: int, D: int) -> bool:
    return not x.is_cpu and attention_provider(N_q, N_kv, D, x.dtype, x.device) == "sdpa"


def _autocast(*tensors: Tensor) -> Sequence[Tensor]:
    # As PyTorch's own attention, which casts all but fp64.
    dtype = runtime.autocast_dtype(tensors[0])
    if dtype is None:
        return tensors
    return [
        x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x
        for x in tensors
    ]


def _check_operands(op: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[int, int, int, int, int]:
    """Check (B, H, N, D) of all three; return B, H, N_q, N_kv and D."""
    shape = q.shape
    if len(shape) != 4:
        raise ValueError(f"{op}: q has shape {tuple(shape)}; expected (B, H, N, D)")
    _check_like_q(op, q, k, v)
    keys_shape = k.shape
    if len(keys_shape) != 4:
        raise ValueError(f"{op}: k has shape {tuple(keys_shape)}; expected (B, H, N, D)")
    B, H, N_q, D = shape
    N_kv = keys_shape[2]
    check_shape(op, "k", k, (B, H, N_kv, D), "q's but for the number of tokens")
    check_shape(op, "v", v, keys_shape, "k's shape")
    _check_sizes(op, "q", q, N_q, D)
    if N_kv == 0:
        _check_sizes(op, "k", k, N_kv, D)
    return B, H, N_q, N_kv, D


def _check_like_q(op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    if k is None or v is None or not alike(q, k, v):
        check_like(op, "k", k, "q", q)
        check_like(op, "v", v, "q", q)


def _check_sizes(op: str, name: str, x: Tensor, tokens: int, D: int) -> None:
    if tokens == 0:
        raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}, no tokens; expected at least one")
    if D == 0:
        raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}; expected at least one channel in the last dim")
    if D > MAX_HEAD_DIM:
        raise NotImplementedError(f"{op}: {name} has head dim {D}; expected {MAX_HEAD_DIM} at most")


def _check_dropout(op: str, dropout_p: float) -> float:
    dropout_p = check_number(op, "dropout_p", dropout_p)
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"{op}: dropout_p is {dropout_p}; expected 0 to 1")
    return dropout_p


def _check_mask(op: str, mask: Tensor | None, q: Tensor, shape: tuple[int, int, int, int]) -> Tensor | None:
    """Return ``mask`` with four dims, of size 1 where it is expanded."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(f"{op}: attn_mask is a {type(mask).__name__}; expected a torch.Tensor or None")
    if mask.dtype != torch.bool and mask.dtype not in FLOATING:
        raise TypeError(f"{op}: attn_mask has dtype {mask.dtype}; expected bool (True: look) or a floating dtype")
    if mask.is_nested or mask.layout != torch.strided:
        raise NotImplementedError(f"{op}: attn_mask is nested or sparse; expected a dense tensor")
    if mask.device != q.device:
        raise ValueError(f"{op}: attn_mask is on {mask.device}, q on {q.device}; expected one device")
    sizes = mask.shape
    if len(sizes) < 4:
        sizes = (1,) * (4 - len(sizes)) + tuple(sizes)
    fits = len(sizes) == 4
    if fits:
        (b, h, m, n), (B, H, N_q, N_kv) = sizes, shape
        # 1 first: what is exported with sizes that only data tell could not compare those with 1.
        fits = (b == 1 or b == B) and (h == 1 or h == H) and (m == 1 or m == N_q) and (n == 1 or n == N_kv)
    if not fits:
        raise ValueError(
            f"{op}: attn_mask has shape {tuple(mask.shape)}; expected one that broadcasts to {shape}, (B, H, N_q, N_kv)"
        )
    # What made an expanded tensor sums its gradient. Where nothing did, each element has one of its own.
    if mask.requires_grad and mask.is_leaf:
        return mask.reshape(sizes) if mask.ndim < 4 else mask
    return _four_dims(mask)


def _four_dims(mask: Tensor | None) -> Tensor | None:
    """``mask`` with four dims, of size 1 where it is expanded."""
    if mask is None:
        return None
    return _unexpanded(mask.reshape((1,) * (4 - mask.ndim) + mask.shape) if mask.ndim < 4 else mask)


def _int32(x: Tensor) -> Tensor:
    return x if x.dtype is torch.int32 else x.to(torch.int32)


def _check_prepared(
    op: str, q: Tensor, shape: tuple[int, int, int, int], N_kv: int, rope, prefix: int, q_norm, k_norm
) -> tuple[Rope | None, QKNorm | None, QKNorm | None, int]:
    """Check what prepares q and k, whose ``shape`` is (B, H, N, D), and return it by its own types, prefix last."""
    prefix = check_integer(op, "num_prefix_tokens", prefix)
    if rope is None and q_norm is None and k_norm is None and not prefix:
        return None, None, None, 0
    B, H, N, D = shape
    norms = []
    for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
        if norm is not None:
            norm = QKNorm(*norm)
            if norm.rms and norm.bias is not None:
                raise ValueError(f"{op}: {name} is an RMSNorm with a bias; expected none")
            eps = check_number(op, f"{name}.eps", norm.eps)
            if not (math.isfinite(eps) and eps >= 0):
                raise ValueError(f"{op}: {name}.eps is {eps}; expected a finite number, 0 at least")
            norm = norm._replace(eps=eps, rms=bool(norm.rms))
            for part, t in (("weight", norm.weight), ("bias", norm.bias)):
                if t is not None:
                    check_like(op, f"{name}.{part}", t, "q", q, dtype=False)
                    check_shape(op, f"{name}.{part}", t, (D,), "the head dim")
        norms.append(norm)
    if rope is None:
        if prefix:
            raise ValueError(f"{op}: num_prefix_tokens is {prefix} without rope; expected 0")
        return None, *norms, 0
    rope = Rope(*rope)
    rope = rope._replace(interleaved=bool(rope.interleaved))
    if N_kv != N:
        raise ValueError(f"{op}: rope needs as many keys as queries; got {N} queries and {N_kv} keys")
    if D % 2:
        raise ValueError(f"{op}: rope needs an even head dim; got {D}")
    if not 0 <= prefix <= N:
        raise ValueError(f"{op}: num_prefix_tokens is {prefix}; expected 0 to {N}, the tokens")
    for name, table in (("cos", rope.cos), ("sin", rope.sin)):
        check_like(op, f"rope.{name}", table, "q", q, dtype=False)
        sizes = (1,) * (4 - table.ndim) + tuple(table.shape)
        expected = (B, H, N - prefix, D)
        if table.ndim < 2 or table.ndim > 4 or sizes[2:] != expected[2:] or any(
            n not in (1, whole) for n, whole in zip(sizes[:2], expected[:2], strict=True)
        ):  # fmt: skip
            raise ValueError(
                f"{op}: rope.{name} has shape {tuple(table.shape)}; expected one that broadcasts to (B, H, "
                f"N − num_prefix_tokens, D) = {expected}, its last two dims in full"
            )
    check_shape(op, "rope.sin", rope.sin, rope.cos.shape, "rope.cos's shape")
    return rope, *norms, prefix


def _check_images(op: str, q: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> int:
    """Check how images are packed; return the tokens of the longest, 1 at least."""
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        got = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise TypeError(f"{op}: cu_seqlens is {got}; expected an int32 or int64 tensor")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"{op}: cu_seqlens has shape {tuple(cu_seqlens.shape)}; expected (images + 1,), one at least")
    if cu_seqlens.layout != torch.strided:
        raise NotImplementedError(f"{op}: cu_seqlens is {cu_seqlens.layout}; expected a dense (strided) tensor")
    if cu_seqlens.device != q.device:
        raise ValueError(f"{op}: cu_seqlens is on {cu_seqlens.device}, q on {q.device}; expected one device")
    max_seqlen = check_integer(op, "max_seqlen", max_seqlen)
    if max_seqlen < 0:
        raise ValueError(f"{op}: max_seqlen is {max_seqlen}; expected 0 at least")
    if q.is_cpu and not torch.compiler.is_compiling() and not isinstance(cu_seqlens, FakeTensor):
        _check_bounds(op, q, cu_seqlens, max_seqlen)
    return max_seqlen or 1  # of nothing but empty images: a grid of no programs is none


def _check_bounds(op: str, q: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> None:
    """Check the values of ``cu_seqlens``, for which a GPU would have to be waited for."""
    bounds = cu_seqlens.tolist()
    fits = bounds[0] == 0 and bounds[-1] <= q.shape[0]
    for start, end in itertools.pairwise(bounds):
        fits &= 0 <= end - start <= max_seqlen
    if not fits:
        raise ValueError(
            f"{op}: cu_seqlens is {bounds}; expected rising values, the first 0, the last {q.shape[0]} at most, the "
            f"tokens, {max_seqlen}, max_seqlen, at most apart"
        )
