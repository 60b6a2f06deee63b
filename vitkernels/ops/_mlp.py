"""MLP of a transformer block, with the activation and the residual sum fused into the products.

Forward:     z = x W1ᵀ + b1,  y = residual + γ · (act(z) W2ᵀ + b2)
Backward:    dz = (dy (γ ∘ W2)) · act'(z),  dx = dz W1,  dW1 = dzᵀ x,  db1 = Σ dz
             dW2, db2 and dγ as in linear.py, from dy and act(z);  dresidual = dy

Shapes: rows M (all leading dims), channels C in and C' out, hidden features F. Saved for backward: x, both weights,
z and act(z), as in PyTorch. With ``recompute`` act(z) is not saved: the product that computes dz has z loaded, so it
computes act(z) again, which is freed once dW2 is done. This halves the memory and costs one more write of M·F elements.
That product also sums db1, as one row of partial sums per block of rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vitkernels import reference, runtime
from vitkernels.ops._checks import dtypes_and_devices_match
from vitkernels.ops._linear import (
    check_activation,
    check_epilogue,
    check_input,
    check_weights,
    fold_layer_scale,
    linear_forward,
    weight_gradients,
)
from vitkernels.ops._once import once_differentiable
from vitkernels.ops._product import product, product_dact
from vitkernels.ops._registry import needs_grad, reference_gradients, register, uses_kernels
from vitkernels.runtime import promoted_dtype, wide_dtype


def mlp_forward(x, w1, b1, w2, b2, gamma, residual, activation, out_dtype=None, save_z=False, save_act=False):
    """Launch the forward on (..., C); return ``(y, z, act)``, the last two empty unless saved."""
    act, z = linear_forward(x, w1, b1, None, None, activation or "none", save_z=save_z)
    y, _ = linear_forward(act, w2, b2, gamma, residual, None, out_dtype)
    return y, z, act if save_act else x.new_empty(0)


class MlpWanted(NamedTuple):
    """Which gradients of :func:`mlp` are wanted, in the order in which they come."""

    dx: bool = False
    dw1: bool = False
    db1: bool = False
    dw2: bool = False
    db2: bool = False
    dgamma: bool = False


def mlp_backward(dy, x, w1, w2, b2, gamma, z, act, activation, needed):
    """Launch the backward; return the gradients named by :class:`MlpWanted`, each empty unless ``needed``.

    ``act`` is None if it must be computed again.
    """
    needs_dx, needs_dw1, needs_db1, needs_dw2, needs_db2, needs_dgamma = MlpWanted(*needed)
    M = x.shape[:-1].numel()
    rows, z, dy = x.reshape(M, x.shape[-1]), z.reshape(M, w1.shape[0]), dy.reshape(M, w2.shape[0]).to(x.dtype)
    make_act = act is None and (needs_dw2 or needs_dgamma)
    if needs_dx or needs_dw1 or needs_db1:
        folded, alpha = fold_layer_scale(w2, gamma)
        dz, made, db1 = product_dact(dy, folded, z, activation, alpha=alpha, save_act=make_act, sum_dz=needs_db1)
    else:
        made, db1 = reference.activate(z, activation) if make_act else None, x.new_empty(0)
    act = made if act is None else act.reshape(M, w1.shape[0])
    dw2, db2_grad, dgamma = weight_gradients(dy, act, w2, b2, gamma, needs_dw2, needs_db2, needs_dgamma)
    del act, made  # as large as z
    dx = product(dz, w1)[0].view(x.shape) if needs_dx else x.new_empty(0)
    dw1 = product(dz.t(), rows)[0] if needs_dw1 else x.new_empty(0)
    return dx, dw1, db1.to(x.dtype), dw2, db2_grad.to(x.dtype), dgamma.to(wide_dtype(x.dtype))


def _fake_forward(x, w1, b1, w2, b2, gamma, residual, activation, out_dtype=None, save_z=False, save_act=False):
    lead = x.shape[:-1]
    y = x.new_empty((*lead, w2.shape[0]), dtype=out_dtype or promoted_dtype(x, residual, gamma))
    z, act = (x.new_empty((*lead, w1.shape[0]) if save else (0,)) for save in (save_z, save_act))
    return y, z, act


def _fake_backward(dy, x, w1, w2, b2, gamma, z, act, activation, needed):
    shapes = (x.shape, w1.shape, w1.shape[:1], w2.shape, w2.shape[:1], w2.shape[:1])
    dtypes = (*[x.dtype] * 5, wide_dtype(x.dtype))
    return tuple(
        x.new_empty(shape if n else (0,), dtype=dtype) for shape, dtype, n in zip(shapes, dtypes, needed, strict=True)
    )


def _reference_forward(x, w1, b1, w2, b2, gamma, residual, activation, out_dtype=None, save_z=False, save_act=False):
    y = reference.mlp(x, w1, b1, w2, b2, activation=activation, residual=residual, layer_scale=gamma)
    z = reference.linear(x, w1, b1) if save_z else x.new_empty(0)
    act = reference.linear(x, w1, b1, activation=activation) if save_act else x.new_empty(0)
    return y.to(out_dtype or promoted_dtype(x, residual, gamma)).contiguous(), z.contiguous(), act.contiguous()


def _reference_backward(dy, x, w1, w2, b2, gamma, z, act, activation, needed):
    # b1 is not an argument but already added in z: use autograd down to z, then formulas.
    def tail(z, w2, b2, gamma):
        return reference.linear(reference.activate(z, activation), w2, b2, layer_scale=gamma)

    inputs = (z, w2, b2, None if gamma is None else gamma.to(x.dtype))
    dz, dw2, db2, dgamma = reference_gradients(tail, inputs, (dy.to(x.dtype),), (True, *needed[3:]))
    F, C = w1.shape
    dz = dz.reshape(-1, F)
    wanted = MlpWanted(*needed)
    dx = (dz @ w1).view(x.shape) if wanted.dx else x.new_empty(0)
    dw1 = dz.t() @ x.reshape(-1, C) if wanted.dw1 else x.new_empty(0)
    db1 = dz.sum(0) if wanted.db1 else x.new_empty(0)
    return dx, dw1, db1, dw2, db2, dgamma.to(wide_dtype(x.dtype))


mlp_fwd = register(
    "mlp_fwd(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? gamma, Tensor? residual, "
    "str? activation, ScalarType? out_dtype=None, bool save_z=False, bool save_act=False) -> (Tensor, Tensor, Tensor)",
    launcher=mlp_forward,
    reference=_reference_forward,
    fake=_fake_forward,
)
mlp_bwd = register(
    "mlp_bwd(Tensor dy, Tensor x, Tensor w1, Tensor w2, Tensor? b2, Tensor? gamma, Tensor z, Tensor? act, "
    "str? activation, bool[] needed) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    launcher=mlp_backward,
    reference=_reference_backward,
    fake=_fake_backward,
)


class MlpFunction(torch.autograd.Function):
    """Autograd for :func:`mlp`."""

    @staticmethod
    def forward(ctx, x, w1, b1, w2, b2, gamma, residual, activation, recompute):
        save_z = any(ctx.needs_input_grad[:6])
        save_act = (ctx.needs_input_grad[3] or ctx.needs_input_grad[5]) and not recompute
        y, z, act = mlp_fwd(x, w1, b1, w2, b2, gamma, residual, activation, None, save_z, save_act)
        ctx.save_for_backward(x, w1, w2, b2, gamma, z, act if save_act else None)
        ctx.emulated = runtime.emulated_arch()
        ctx.unsaved = (b1,)  # already added in z
        ctx.activation = activation
        ctx.gamma_dtype = None if gamma is None else gamma.dtype
        ctx.residual_dtype = None if residual is None else residual.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, saved, dy):
        needed = list(ctx.needs_input_grad[:6])
        grads = [None] * 6
        if any(needed):
            results = mlp_bwd(dy, *saved, ctx.activation, needed)
            grads = [g if n else None for g, n in zip(results, needed, strict=True)]
        if needed[5]:
            grads[5] = grads[5].to(ctx.gamma_dtype)
        dresidual = dy.to(ctx.residual_dtype) if ctx.needs_input_grad[6] else None
        return *grads, dresidual, None, None


def mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    activation: str | None = "gelu",
    residual: Tensor | None = None,
    layer_scale: Tensor | None = None,
    recompute: bool = False,
) -> Tensor:
    """Compute ``residual + layer_scale · (activation(x W1ᵀ + b1) W2ᵀ + b2)``.

    Args:
        x: (..., C), fp16, bf16, fp32 or fp64, any strides; leading dims may be empty.
        w1: (F, C); w1, b1, w2 and b2 are in ``x``'s dtype.
        b1: (F,) or None.
        w2: (C', F).
        b2: (C',) or None.
        activation: ``gelu`` (with erf), ``gelu_tanh``, ``quick_gelu`` (x·σ(1.702 x)), ``silu`` or None.
        residual: (..., C'), any floating dtype, or None.
        layer_scale: γ of LayerScale, (C',), any floating dtype, or None.
        recompute: Save one hidden tensor for the backward instead of two, and compute the other again.

    Returns:
        (..., C'), contiguous, in the widest dtype among ``x``, ``residual`` and ``layer_scale``. Under autocast the
        products run in autocast's dtype, as in PyTorch.

    Raises:
        ValueError: A shape, device or activation does not fit.
        TypeError: A dtype does not fit.
        NotImplementedError: A tensor is nested, sparse or quantized.

    Reference: arXiv 1706.03762, section 3.3; 1606.08415 (GELU); 2103.17239 (LayerScale).
    """
    op = "mlp"
    *lead, C = check_input(op, x)
    check_activation(op, activation)
    dtype = runtime.autocast_dtype(x)
    matched = dtypes_and_devices_match(x, w1, b1, w2, b2, residual, layer_scale)
    F = check_weights(op, "w1", w1, "b1", b1, x, C, matched, dtype is None)
    C_out = check_weights(op, "w2", w2, "b2", b2, x, F, matched, dtype is None)
    check_epilogue(op, residual, layer_scale, x, lead, C_out, matched)
    if not uses_kernels(x):
        y = reference.mlp(x, w1, b1, w2, b2, activation=activation, residual=residual, layer_scale=layer_scale)
        return y.contiguous()
    if dtype is not None:
        x, w1, b1, w2, b2 = (None if t is None else t.to(dtype) for t in (x, w1, b1, w2, b2))
    tensors = (x, w1, b1, w2, b2, layer_scale, residual)
    if needs_grad(*tensors):
        return MlpFunction.apply(*tensors, activation, recompute)
    return mlp_fwd(*tensors, activation)[0]
