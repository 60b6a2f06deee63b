"""Attention without a mask, from separate queries, keys and values or from a packed qkv projection.

Forward (arXiv 1706.03762), by online softmax (2205.14135, 2307.08691):
    S = scale · q kᵀ,  P = softmax(S),  o = P v,  lse = log₂ Σ exp S
Backward:
    delta = Σ_d o · do,  dP = do vᵀ,  dS = P · (dP − delta)
    dv = Pᵀ do,  dk = scale · dSᵀ q,  dq = scale · dS k

Shapes: batch B, queries N_q, keys N_kv (both N when packed), heads H, head dim D. Inside, all tensors are
(B, N, H, D) by strides, and o is so in memory, so that the output projection reads it without a copy. Softmax
is in base 2, log₂e folded into the scale. Products accumulate in fp32 (fp64 for fp64 inputs); P and dS are
rounded to the inputs' dtype before the second product. Saved for backward: the inputs, o and lse (B, H, N_q).
A program of the forward and of dq owns a block of queries and walks the keys; one of dk and dv owns a block
of keys and walks the queries: every element has one writer, nothing is atomic, and results repeat bit for bit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vitkernels import reference, runtime
from vitkernels.ops._checks import check_like, check_shape, check_tensor
from vitkernels.ops._registry import needs_grad, reference_gradients, register, uses_kernels
from vitkernels.ops.attention.backward import attention_backward
from vitkernels.ops.attention.forward import LOG2_E, attention_forward, forward_outputs

MAX_HEAD_DIM = 128


def _separate_backward(do, q, k, v, o, lse, scale, needed):
    dq, dk, dv = _gradients(do, q, k, v, o, lse, scale, needed)
    attention_backward(
        do, q, k, v, o, lse, scale, dq if needed[0] else None, dk if needed[1] else None, dv if needed[1] else None
    )
    return dq, dk, dv


def _gradients(do, q, k, v, o, lse, scale, needed):
    needs_dq, needs_dkv = needed
    return tuple(
        torch.empty(x.shape if n else (0,), dtype=x.dtype, device=x.device)
        for x, n in ((q, needs_dq), (k, needs_dkv), (v, needs_dkv))
    )


def _packed_forward(qkv, scale):
    return attention_forward(*qkv.unbind(2), scale)


def _packed_backward(do, qkv, o, lse, scale, needs_sum):
    dqkv, dqkv_sum = _packed_gradients(do, qkv, o, lse, scale, needs_sum)
    sums = attention_backward(do, *qkv.unbind(2), o, lse, scale, *dqkv.unbind(2), needs_sums=needs_sum)
    return dqkv, torch.cat([sums[0].unsqueeze(0), sums[1]]) if needs_sum else dqkv_sum


def _packed_gradients(do, qkv, o, lse, scale, needs_sum):
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    return dqkv, torch.empty(qkv.shape[2:] if needs_sum else (0,), dtype=lse.dtype, device=qkv.device)


def _reference_output(q, k, v, scale):
    return reference.attention(*(x.transpose(1, 2) for x in (q, k, v)), scale=scale).transpose(1, 2)


def _reference_forward(q, k, v, scale):
    o, lse = forward_outputs(q, k, v, scale)
    scores = torch.einsum("bmhd,bnhd->bhmn", q.to(lse.dtype), k.to(lse.dtype)) * scale
    return o.copy_(_reference_output(q, k, v, scale)), scores.logsumexp(-1) * LOG2_E


def _reference_backward(do, q, k, v, o, lse, scale, needed):
    return reference_gradients(
        lambda q, k, v: _reference_output(q, k, v, scale), (q, k, v), (do,), (needed[0], needed[1], needed[1])
    )


def _reference_packed_backward(do, qkv, o, lse, scale, needs_sum):
    (dqkv,) = reference_gradients(lambda x: _reference_output(*x.unbind(2), scale), (qkv,), (do,), (True,))
    return dqkv, dqkv.sum((0, 1), dtype=lse.dtype) if needs_sum else lse.new_empty(0)


_attention_fwd = register(
    "attention_fwd(Tensor q, Tensor k, Tensor v, float scale) -> (Tensor, Tensor)",
    launcher=attention_forward,
    reference=_reference_forward,
    fake=forward_outputs,
)
_attention_bwd = register(
    "attention_bwd(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, float scale, bool[] needed) "
    "-> (Tensor, Tensor, Tensor)",
    launcher=_separate_backward,
    reference=_reference_backward,
    fake=_gradients,
)
attention_qkvpacked_fwd = register(
    "attention_qkvpacked_fwd(Tensor qkv, float scale) -> (Tensor, Tensor)",
    launcher=_packed_forward,
    reference=lambda qkv, scale: _reference_forward(*qkv.unbind(2), scale),
    fake=lambda qkv, scale: forward_outputs(*qkv.unbind(2), scale),
)
attention_qkvpacked_bwd = register(
    "attention_qkvpacked_bwd(Tensor do, Tensor qkv, Tensor o, Tensor lse, float scale, bool needs_sum) "
    "-> (Tensor, Tensor)",
    launcher=_packed_backward,
    reference=_reference_packed_backward,
    fake=_packed_gradients,
)


class AttentionFunction(torch.autograd.Function):
    """Autograd for separate q, k and v, (B, N, H, D) each."""

    @staticmethod
    def forward(ctx, q, k, v, scale):
        o, lse = _attention_fwd(q, k, v, scale)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.scale = scale
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        needs_q, needs_k, needs_v, _ = ctx.needs_input_grad
        dq, dk, dv = _attention_bwd(do, *ctx.saved_tensors, ctx.scale, [needs_q, needs_k or needs_v])
        return dq if needs_q else None, dk if needs_k else None, dv if needs_v else None, None


class AttentionQkvpackedFunction(torch.autograd.Function):
    """Autograd for packed qkv, (B, N, 3, H, D)."""

    @staticmethod
    def forward(ctx, qkv, scale):
        o, lse = attention_qkvpacked_fwd(qkv, scale)
        ctx.save_for_backward(qkv, o, lse)
        ctx.scale = scale
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        return attention_qkvpacked_bwd(do, *ctx.saved_tensors, ctx.scale, False)[0], None


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    """Attend from every query to every key: ``softmax(scale · q kᵀ) v``.

    Args:
        q: (B, H, N_q, D), fp16, bf16, fp32 or fp64, any strides (a last dim that is not contiguous is copied);
            B and H may be 0, N_q may not, D ≤ 128.
        k: (B, H, N_kv, D), ``q``'s dtype, any strides; N_kv ≥ 1.
        v: (B, H, N_kv, D), as ``k``.
        scale: Factor of the scores, finite; 1/√D unless given.

    Returns:
        (B, H, N_q, D) in ``q``'s dtype (autocast's under autocast), laid out in memory as (B, N_q, H, D), so
        that ``.transpose(1, 2).flatten(2)`` makes no copy.

    Raises:
        ValueError: A shape or device does not fit, there are no tokens or channels, or ``scale`` is not finite.
        TypeError: A dtype does not fit.
        NotImplementedError: D > 128, or a tensor is nested, sparse or quantized.

    Reference: arXiv 1706.03762, 2205.14135, 2307.08691.
    """
    op = "attention"
    check_tensor(op, "q", q)
    q, k, v = _autocast(q, k, v)
    if q.ndim != 4:
        raise ValueError(f"{op}: q has shape {tuple(q.shape)}; expected (B, H, N, D)")
    for name, x in (("k", k), ("v", v)):
        check_like(op, name, x, "q", q)
    if k.ndim != 4:
        raise ValueError(f"{op}: k has shape {tuple(k.shape)}; expected (B, H, N, D)")
    B, H, N_q, D = q.shape
    check_shape(op, "k", k, (B, H, k.shape[2], D), "q's but for the number of tokens")
    check_shape(op, "v", v, k.shape, "k's shape")
    _check_sizes(op, "q", q, N_q, D)
    _check_sizes(op, "k", k, k.shape[2], D)
    scale = _check_scale(op, scale, D)
    if not uses_kernels(q):
        return reference.attention(q, k, v, scale=scale)
    arguments = *(x.transpose(1, 2) for x in (q, k, v)), scale
    o = AttentionFunction.apply(*arguments) if needs_grad(q, k, v) else _attention_fwd(*arguments)[0]
    return o.transpose(1, 2)


def attention_qkvpacked(qkv: Tensor, *, scale: float | None = None) -> Tensor:
    """:func:`attention` straight from a qkv projection, read and written in place of any transpose or copy.

    Args:
        qkv: (B, N, 3, H, D), queries, keys and values along dim 2; dtypes, sizes and strides as for
            :func:`attention`.
        scale: Factor of the scores, finite; 1/√D unless given.

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
    _check_sizes(op, "qkv", qkv, qkv.shape[1], qkv.shape[4])
    scale = _check_scale(op, scale, qkv.shape[4])
    if not uses_kernels(qkv):
        return reference.attention_qkvpacked(qkv, scale=scale).contiguous()
    if needs_grad(qkv):
        return AttentionQkvpackedFunction.apply(qkv, scale)
    return attention_qkvpacked_fwd(qkv, scale)[0]


def _autocast(*tensors: Tensor) -> list[Tensor]:
    # As PyTorch's own attention, which casts all but fp64.
    dtype = runtime.autocast_dtype(tensors[0])
    return [
        x.to(dtype) if dtype and isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x
        for x in tensors
    ]


def _check_sizes(op: str, name: str, x: Tensor, tokens: int, D: int) -> None:
    if tokens == 0:
        raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}, no tokens; expected at least one")
    if D == 0:
        raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}; expected at least one channel in the last dim")
    if D > MAX_HEAD_DIM:
        raise NotImplementedError(f"{op}: {name} has head dim {D}; expected {MAX_HEAD_DIM} at most")


def _check_scale(op: str, scale: float | None, D: int) -> float:
    if scale is None:
        return D**-0.5
    if not isinstance(scale, (int, float)) or isinstance(scale, bool):
        raise TypeError(f"{op}: scale is a {type(scale).__name__}; expected a number or None")
    if not math.isfinite(scale):
        raise ValueError(f"{op}: scale is {scale}; expected a finite number")
    return float(scale)
