"""Gated MLP (SwiGLU) of a transformer block: an activated gate times a value, then the last layer.

Forward (arXiv 2002.05202):  g, v = x W12ᵀ + b12,  h = act(g) · v,  y = residual + γ · (norm(h) W3ᵀ + b3)
Backward:                    dh = norm'(dy (γ ∘ W3)),  dg = dh · v · act'(g),  dv = dh · act(g),  dz = [dg dv]
                             dx = dz W12,  dW12 = dzᵀ x,  db12 = Σ dz
                             dW3, db3 and dγ as in linear.py;  dresidual = dy

Shapes: rows M (all leading dims), channels C in and C' out, hidden features F, in memory P = F rounded up to 16 (see
``padded``). The pre-activations of both halves are one tensor z (M, 2, P) in the order of W12's rows, so that dx and
dW12 are one product each, with packed weights and with separate ones. The backward concatenates separate weights: 2·F·C
elements, while adding two products would pass over M·C. ``choose_config`` picks the provider: one Triton kernel with
two accumulators that share x's tile, and the gate in its epilogue, or cuBLAS followed by a kernel for the gate; the
same choice exists in the backward. The optional norm (EVA02, arXiv 2303.11331) runs on LayerNorm's kernels in between.
Saved for backward: x, the weights, z and h, and with a norm norm(h) and its statistics. With ``recompute``, z is the
only hidden tensor saved, and h is computed again: by the kernel that computes dz, or before it if a norm needs h.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vitkernels import reference, runtime
from vitkernels.ops._cast import cast
from vitkernels.ops._checks import check_shape, dtypes_and_devices_match
from vitkernels.ops._layer_norm import NormWanted, check_eps, check_parameter, layer_norm_bwd, layer_norm_fwd
from vitkernels.ops._linear import (
    LinearWanted,
    check_activation,
    check_epilogue,
    check_input,
    check_weights,
    linear_bwd,
    linear_fwd,
)
from vitkernels.ops._once import once_differentiable
from vitkernels.ops._registry import OPS, needs_grad, reference_gradients, register, uses_kernels
from vitkernels.ops._swiglu.backward import glu_backward
from vitkernels.ops._swiglu.config import padded
from vitkernels.ops._swiglu.forward import glu, glu_forward, halves, hidden_features
from vitkernels.runtime import wide_dtype


def _fake_forward(x, w1, b1, w2, b2, activation, gate_last=False, save_z=False):
    P = padded(hidden_features(w1, w2))
    return x.new_empty((*x.shape[:-1], P)), x.new_empty((*x.shape[:-1], 2, P) if save_z else (0,))


def _fake_glu(z, activation, gate_last):
    return z.new_empty((*z.shape[:-2], z.shape[-1]))


def _fake_backward(dy, w3, gamma, z, activation, gate_last, save_h, sum_dz, sum_dtype=None):
    h = z.new_empty((*z.shape[:-2], z.shape[-1]) if save_h else (0,))
    return torch.empty_like(z), h, z.new_empty(z.shape[-2:] if sum_dz else (0,), dtype=sum_dtype or wide_dtype(z.dtype))


def _reference_forward(x, w1, b1, w2, b2, activation, gate_last=False, save_z=False):
    biases = (None, None) if b1 is None else halves(b1, b2)
    both = [reference.linear(x, w, b) for w, b in zip(halves(w1, w2), biases, strict=True)]
    z = torch.stack([torch.constant_pad_nd(half, (0, padded(half.shape[-1]) - half.shape[-1])) for half in both], -2)
    return _reference_glu(z, activation, gate_last), z if save_z else x.new_empty(0)


def _reference_glu(z, activation, gate_last):
    gate, value = z.unbind(-2)[:: -1 if gate_last else 1]
    return reference.activate(gate, activation) * value


def _reference_backward(dy, w3, gamma, z, activation, gate_last, save_h, sum_dz, sum_dtype=None):
    dh = dy.to(z.dtype)
    if w3 is not None:
        dh = (dh if gamma is None else (dh * gamma).to(z.dtype)) @ w3
    (dz,) = reference_gradients(lambda z: _reference_glu(z, activation, gate_last), (z,), (dh,), (True,))
    h = _reference_glu(z, activation, gate_last) if save_h else z.new_empty(0)
    sums = dz.sum(tuple(range(z.ndim - 2)), dtype=wide_dtype(z.dtype)) if sum_dz else dz.new_empty(0)
    return dz, h, sums.to(sum_dtype or wide_dtype(z.dtype))


glu_fwd = register(
    "glu_fwd(Tensor x, Tensor w1, Tensor? b1, Tensor? w2, Tensor? b2, str? activation, bool gate_last=False, "
    "bool save_z=False) -> (Tensor, Tensor)",
    launcher=glu_forward,
    reference=_reference_forward,
    fake=_fake_forward,
    work="mlp",
)
glu_gate = register(
    "glu_gate(Tensor z, str? activation, bool gate_last) -> Tensor",
    launcher=glu,
    reference=_reference_glu,
    fake=_fake_glu,
    work="pass",
)
glu_bwd = register(
    "glu_bwd(Tensor dy, Tensor? w3, Tensor? gamma, Tensor z, str? activation, bool gate_last, bool save_h, "
    "bool sum_dz, ScalarType? sum_dtype=None) -> (Tensor, Tensor, Tensor)",
    launcher=glu_backward,
    reference=_reference_backward,
    fake=_fake_backward,
)


class _Steps(NamedTuple):
    """Functions for the three steps of the forward: the registered ops, or one of their implementations."""

    glu: Callable
    norm: Callable
    last: Callable


_OPS = _Steps(glu_fwd, layer_norm_fwd, linear_fwd)


def _in_one(role: str) -> Callable:
    """Return the forward without saved tensors, on the implementations of ``role``; as one op it is dispatched once."""
    steps = _Steps(*(getattr(OPS[name], role) for name in ("glu_fwd", "layer_norm_fwd", "linear_fwd")))

    def forward(*arguments):
        return _forward(*arguments, save=False, steps=steps)[0]

    return forward


swiglu_mlp_fwd = register(
    "swiglu_mlp_fwd(Tensor x, Tensor w1, Tensor? b1, Tensor? w2, Tensor? b2, Tensor w3, Tensor? b3, Tensor? norm_w, "
    "Tensor? norm_b, Tensor? gamma, Tensor? residual, str? activation=None, bool gate_last=False, float? eps=None) "
    "-> Tensor",
    launcher=_in_one("launcher"),
    reference=_in_one("reference"),
    fake=_in_one("fake"),
    work="mlp",
)


class SwigluMlpFunction(torch.autograd.Function):
    """Autograd for :func:`swiglu_mlp`; the products run in ``dtype``, that of x, whatever that of the weights."""

    @staticmethod
    def forward(
        ctx, x, w1, b1, w2, b2, w3, b3, norm_w, norm_b, gamma, residual, activation, gate_last, eps, recompute, dtype
    ):  # fmt: skip
        given = (x, w1, b1, w2, b2, w3, b3, norm_w, norm_b, gamma, residual)
        ctx.dtypes = [None if t is None else t.dtype for t in given]
        ctx.unsaved = (b1, b2) if dtype is None else (w1, b1, w2, b2, w3, b3)  # b1 and b2 are already added in z
        # Cast here, so that the backward's products write the gradients of fp32 weights in fp32.
        weights = cast(dtype, w1, b1, w2, b2, w3, b3)
        tensors = (x, *weights, *given[7:])
        save = any(ctx.needs_input_grad[:10])
        y, saved = _forward(*tensors, activation, gate_last, eps, recompute, save=save)
        ctx.save_for_backward(*saved)
        ctx.emulated = runtime.emulated_arch()
        ctx.options = (activation, gate_last, eps)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, saved, dy):
        x, w1, w2, w3, b3, norm_w, norm_b, gamma, z, h, normed, mean, rstd = saved
        activation, gate_last, eps = ctx.options
        (
            need_x, need_w1, need_b1, need_w2, need_b2, need_w3, need_b3, need_norm_w, need_norm_b, need_gamma, _,
        ) = ctx.needs_input_grad[:11]  # fmt: skip
        hidden = hidden_features(w1, w2)
        P = padded(hidden)
        w3 = _padded_columns(w3, P)
        need_w12, need_b12 = need_w1 or need_w2, need_b1 or need_b2
        need_z = need_x or need_w12 or need_b12
        last = LinearWanted(dweight=need_w3, dbias=need_b3, dgamma=need_gamma)

        dx = dw1 = db1 = dw2 = db2 = dw3 = db3 = d_norm_w = d_norm_b = d_gamma = None
        if not any(ctx.needs_input_grad[:10]):
            pass
        elif eps is None:
            remake_h = h is None and any(last)
            if need_z:
                dz, made, sums = glu_bwd(dy, w3, gamma, z, activation, gate_last, remake_h, need_b12, ctx.dtypes[2])
            elif remake_h:
                made = glu_gate(z, activation, gate_last)
            if any(last):
                h = made if remake_h else h
                _, dw3, db3, d_gamma, _ = linear_bwd(dy, h, w3, b3, None, gamma, None, list(last), ctx.dtypes[5])
        else:
            need_h = need_z or need_norm_w or need_norm_b
            if h is None:
                h = glu_gate(z, activation, gate_last)
                normed = _norm(layer_norm_fwd, h, norm_w, norm_b, eps, hidden)[0]
            last = last._replace(dx=need_h)
            dnormed, dw3, db3, d_gamma, _ = linear_bwd(dy, normed, w3, b3, None, gamma, None, list(last), ctx.dtypes[5])
            if need_h:
                _, dh, d_norm_w, d_norm_b, *_ = layer_norm_bwd(
                    dnormed, None, h, None, norm_w, None, None, mean, rstd, eps, h.dtype,
                    list(NormWanted(dresidual=need_z, dweight=need_norm_w, dbias=need_norm_b)), False, _width(hidden),
                )  # fmt: skip
                d_norm_w, d_norm_b = d_norm_w[:hidden], d_norm_b[:hidden]
            if need_z:
                dz, _, sums = glu_bwd(dh, None, None, z, activation, gate_last, False, need_b12, ctx.dtypes[2])
        if need_x or need_w12:
            w12 = _joined(w1, w2, P)
            wanted = LinearWanted(need_x, need_w12)
            dx, dw12, *_ = linear_bwd(dz.flatten(-2), x, w12, None, None, None, None, list(wanted), ctx.dtypes[1])
        if need_w12:
            dw1, dw2 = _apart(dw12.view(2, P, -1), hidden, w2 is not None)
        if need_b12:
            db1, db2 = _apart(sums, hidden, w2 is not None)
        if need_w3:
            dw3 = dw3[:, :hidden].contiguous()
        dresidual = dy if ctx.needs_input_grad[10] else None
        grads = (dx, dw1, db1, dw2, db2, dw3, db3, d_norm_w, d_norm_b, d_gamma, dresidual)
        return *(
            g.to(dtype) if n else None for g, dtype, n in zip(grads, ctx.dtypes, ctx.needs_input_grad[:11], strict=True)
        ), *[None] * 5


def _forward(
    x, w1, b1, w2, b2, w3, b3, norm_w, norm_b, gamma, residual, activation=None, gate_last=False, eps=None,
    recompute=False, *, save, steps=_OPS,
):  # fmt: skip
    """Return the output, and the tensors to save for the backward."""
    hidden = hidden_features(w1, w2)
    h, z = steps.glu(x, w1, b1, w2, b2, activation, gate_last, save)
    normed, mean, rstd = h, None, None
    if eps is not None:
        normed, _, mean, rstd = _norm(steps.norm, h, norm_w, norm_b, eps, hidden)
    y, _ = steps.last(normed, _padded_columns(w3, h.shape[-1]), b3, gamma, residual, None)
    keep = save and not recompute
    saved = (
        x, w1, w2, w3, b3, norm_w, norm_b, gamma, z, h if keep else None,
        normed if keep and eps is not None else None, mean, rstd,
    )  # fmt: skip
    return y, saved


def _norm(norm, h, weight, bias, eps, hidden):
    return norm(h, None, weight, bias, None, None, eps, h.dtype, False, _width(hidden))


def _width(hidden: int) -> int | None:
    return None if padded(hidden) == hidden else hidden


def _joined(w1: Tensor, w2: Tensor | None, P: int) -> Tensor:
    """Return W12 as (2P, C), zero in the padding."""
    first, second = halves(w1, w2)
    if w2 is None and first.shape[0] == P:
        return w1
    padding = first.new_zeros(P - first.shape[0], first.shape[1])
    return torch.cat([first, padding, second, padding])


def _padded_columns(w3: Tensor, P: int) -> Tensor:
    return w3 if w3.shape[1] == P else torch.constant_pad_nd(w3, (0, P - w3.shape[1]))


def _apart(both: Tensor, hidden: int, separate: bool) -> tuple[Tensor, Tensor | None]:
    """Cut the padding off gradients (2, P, ...); return those of two separate tensors, or of a packed one and None."""
    both = both[:, :hidden]
    return (both[0], both[1]) if separate else (both.flatten(0, 1), None)


def swiglu_mlp(
    x: Tensor,
    w12: Tensor | tuple[Tensor, Tensor],
    b12: Tensor | tuple[Tensor, Tensor] | None,
    w3: Tensor,
    b3: Tensor | None,
    *,
    activation: str | None = "silu",
    gate_last: bool = False,
    norm: tuple[Tensor | None, Tensor | None, float] | None = None,
    residual: Tensor | None = None,
    layer_scale: Tensor | None = None,
    recompute: bool = False,
) -> Tensor:
    """Compute ``residual + layer_scale · (norm(activation(g) · v) W3ᵀ + b3)`` with ``g, v = x W12ᵀ + b12``.

    Weights and biases are in ``x``'s dtype.

    Args:
        x: (..., C), fp16, bf16, fp32 or fp64, any strides; leading dims may be empty.
        w12: Weights of gate and value: packed, (2F, C), the gate's rows first (DINOv2), or a pair of (F, C) (EVA02's
            ``fc1_g`` and ``fc1_x``, DINOv3's ``w1`` and ``w2``).
        b12: (2F,), or a pair of (F,), or None.
        w3: (C', F).
        b3: (C',) or None.
        activation: Activation of the gate: ``silu``, ``gelu`` (with erf), ``gelu_tanh``, ``quick_gelu`` or None.
        gate_last: Whether the gate is the second half of ``w12``, not the first.
        norm: LayerNorm of the product of gate and value: weight and bias, (F,) each or None, in ``x``'s dtype or
            fp32, and eps ≥ 0.
        residual: (..., C'), any floating dtype, or None.
        layer_scale: γ of LayerScale, (C',), any floating dtype, or None.
        recompute: Save only the pre-activations for the backward and compute the rest again: 2·F instead of 3·F
            elements per token, or instead of 4·F with ``norm``.

    Returns:
        (..., C'), contiguous, in the widest dtype among ``x``, ``residual`` and ``layer_scale``. Under autocast the
        products run in autocast's dtype, as in PyTorch.

    Raises:
        ValueError: A shape, device, eps or activation does not fit.
        TypeError: A dtype does not fit.
        NotImplementedError: A tensor is nested, sparse or quantized.

    Reference: arXiv 2002.05202; 2303.11331 (the norm); 2103.17239 (LayerScale).
    """
    op = "swiglu_mlp"
    w1, b1, w2, b2 = _first_layer(op, w12, b12)
    norm_w, norm_b, eps = _norm_parts(op, norm)
    tensors = (x, w1, b1, w2, b2, w3, b3, norm_w, norm_b, layer_scale, residual)
    *lead, C = check_input(op, x)
    check_activation(op, activation)
    dtype = runtime.autocast_dtype(x)
    matched = dtypes_and_devices_match(x, w1, b1, w2, b2, w3, b3, residual, layer_scale)
    hidden = _check_first(op, x, C, w1, b1, w2, b2, matched, dtype is None)
    C_out = check_weights(op, "w3", w3, "b3", b3, x, hidden, matched, dtype is None)
    check_epilogue(op, residual, layer_scale, x, lead, C_out, matched)
    if norm is not None:
        for name, parameter in (("norm's weight", norm_w), ("norm's bias", norm_b)):
            if parameter is not None:
                check_parameter(op, name, parameter, x, hidden, False, "the hidden features")
        check_eps(op, "norm's eps", eps)
    if not uses_kernels(x):
        options = {"activation": activation, "gate_last": gate_last, "norm": norm}
        return reference.swiglu_mlp(
            x, w12, b12, w3, b3, residual=residual, layer_scale=layer_scale, **options
        ).contiguous()
    if dtype is not None:
        tensors = (x.to(dtype), *tensors[1:])
    if needs_grad(*tensors):
        return SwigluMlpFunction.apply(*tensors, activation, gate_last, eps, recompute, dtype)
    return swiglu_mlp_fwd(tensors[0], *cast(dtype, *tensors[1:7]), *tensors[7:], activation, gate_last, eps)


def _norm_parts(op, norm):
    try:
        weight, bias, eps = (None, None, None) if norm is None else norm
    except (TypeError, ValueError) as error:
        raise TypeError(f"{op}: norm is {norm!r}; expected (weight, bias, eps) or None") from error
    return weight, bias, eps


def _first_layer(op, w12, b12):
    """Check the form of the first layer; return its ``(w1, b1, w2, b2)``, the last two None if it is packed."""
    if not isinstance(w12, tuple | list):
        return w12, b12, None, None
    b12 = (None, None) if b12 is None else b12
    if len(w12) != 2 or not isinstance(b12, tuple | list) or len(b12) != 2 or (b12[0] is None) != (b12[1] is None):
        raise ValueError(f"{op}: separate weights come as a pair, with a pair of biases or None")
    if w12[1] is None:  # below, None means packed weights
        raise TypeError(f"{op}: w12[1] is a NoneType; expected a torch.Tensor")
    return w12[0], b12[0], w12[1], b12[1]


def _check_first(op, x, C, w1, b1, w2, b2, matched, strict):
    """Check the first layer's weights; return the number of hidden features."""
    if w2 is None:
        rows = check_weights(op, "w12", w1, "b12", b1, x, C, matched, strict)
        if rows % 2:
            raise ValueError(f"{op}: w12 has shape {tuple(w1.shape)}; expected an even number of rows, two halves")
        return rows // 2
    hidden = check_weights(op, "w12[0]", w1, "b12[0]", b1, x, C, matched, strict)
    check_weights(op, "w12[1]", w2, "b12[1]", b2, x, C, matched, strict)
    check_shape(op, "w12[1]", w2, (hidden, C), "the shape of w12[0]")
    return hidden
