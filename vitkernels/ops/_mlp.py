"""MLP of a transformer block, with the activation and the residual sum fused into the products.

Forward:     z = x W1ᵀ + b1,  h = s · act(z),  y = residual + γ · (h W2ᵀ + s · b2)
Backward:    dz = s · (dy (γ ∘ W2)) · act'(z),  dx = dz W1,  dW1 = dzᵀ x,  db1 = Σ dz
             dW2 and dγ as in linear.py, from dy and h;  db2 = γ · Σ s · dy;  dresidual = dy
s, one number a sample, is DropPath's scale of the branch. It costs no pass, since h is written and read anyway.

Shapes: rows M (all leading dims), channels C in and C' out, hidden features F. Saved for backward: x, both weights,
z and h, as in PyTorch. With ``recompute`` h is not saved: the product that computes dz has z loaded, so it
computes h again, which is freed once dW2 is done. This halves the memory and costs one more write of M·F elements.
That product also sums db1, as one row of partial sums per block of rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vitkernels import reference, runtime
from vitkernels.ops._cast import cast
from vitkernels.ops._checks import check_drop_path_scale, dtypes_and_devices_match
from vitkernels.ops._layer_scale import fold_layer_scale
from vitkernels.ops._linear import (
    check_activation,
    check_epilogue,
    check_input,
    check_weights,
    linear_forward,
    weight_gradients,
)
from vitkernels.ops._low_rank import update
from vitkernels.ops._once import once_differentiable
from vitkernels.ops._product import product, product_dact
from vitkernels.ops._registry import needs_grad, reference_gradients, register, uses_kernels
from vitkernels.runtime import promoted_dtype, wide_dtype


def mlp_forward(
    x, w1, b1, w2, b2, gamma, residual, activation, out_dtype=None, save_z=False, save_act=False, path=None
):  # fmt: skip
    """Launch the forward on (..., C); return ``(y, z, h)``, the last two empty unless saved."""
    lora = None, None
    return mlp_products(x, w1, b1, w2, b2, gamma, residual, activation, out_dtype, save_z, save_act, path, lora)[0]


def mlp_products(x, w1, b1, w2, b2, gamma, residual, activation, out_dtype, save_z, save_act, path, lora):
    """Return what :func:`mlp_forward` does, and each layer's u, None if unused.

    ``lora`` holds LoRA's A and B or None for each layer.
    """
    low1, u1 = update(x, lora[0])
    h, z = linear_forward(x, w1, b1, None, None, activation or "none", save_z=save_z, act_path=path, low_rank=low1)
    low2, u2 = update(h, lora[1])
    out_dtype = out_dtype or promoted_dtype(x, residual, gamma, path)
    bias_path = None if b2 is None else path
    y, _ = linear_forward(h, w2, b2, gamma, residual, None, out_dtype, bias_path=bias_path, low_rank=low2)
    return (y, z, h if save_act else x.new_empty(0)), (u1, u2)


class MlpWanted(NamedTuple):
    """Which gradients of :func:`mlp` are wanted, in the order in which they come.

    ``dfolded`` is that of γ ∘ W2. It comes in place of those of W2, b2 and γ, which ``layer_scale_bwd`` makes from it.
    """

    dx: bool = False
    dw1: bool = False
    db1: bool = False
    dw2: bool = False
    db2: bool = False
    dgamma: bool = False
    dfolded: bool = False


def mlp_backward(dy, x, w1, w2, b2, gamma, z, act, activation, needed, dtype=None, path=None):
    """Launch the backward; return the gradients named by :class:`MlpWanted`, each empty unless ``needed``.

    ``act`` is the forward's h, None if it must be computed again. The gradients of weights and biases have ``dtype``,
    x's if None; that of γ has γ's, and that of γ ∘ W2 is fp32 (fp64).
    """
    lora = None, None
    return mlp_gradients(dy, x, w1, w2, b2, gamma, z, act, activation, MlpWanted(*needed), dtype, path, lora)[0]


def mlp_gradients(dy, x, w1, w2, b2, gamma, z, act, activation, wanted, dtype, path, lora):
    """Return the gradients as :func:`mlp_backward` does, and those of LoRA's A and B of each layer that has them.

    ``lora`` holds a :class:`vitkernels.ops._low_rank.LowRank` or None for each layer.
    """
    low1, low2 = lora
    dtype = dtype or x.dtype
    M, F = x.shape[:-1].numel(), w1.shape[0]
    rows, z, dy = x.reshape(M, x.shape[-1]), z.reshape(M, F), dy.reshape(M, w2.shape[0]).to(x.dtype)
    needs_dz = wanted.dx or wanted.dw1 or wanted.db1 or (low1 is not None and low1.trains)
    make_act = act is None and (wanted.dw2 or wanted.dgamma or wanted.dfolded or (low2 is not None and low2.needs_da))
    update2 = None if low2 is None else low2.upstream(dy, gamma, needs_dz)
    if needs_dz:
        folded, alpha = fold_layer_scale(w2, gamma)
        dz, made, db1 = product_dact(
            dy, folded, z, activation,
            alpha=alpha, path=path, low_rank=update2, save_act=make_act, sum_dz=wanted.db1, sum_dtype=dtype,
        )  # fmt: skip
    else:
        dz, made, db1 = None, None, x.new_empty(0, dtype=dtype)
        if make_act:
            made = reference.activate(z, activation)
            made = made if path is None else (made * path.repeat_interleave(M // len(path))[:, None]).to(x.dtype)
    act = made if act is None else act.reshape(M, F)
    d_last = weight_gradients(dy, act, w2, b2, gamma, wanted[3:], dtype, path)
    updates = []
    if low2 is not None:
        *updates, dgamma = low2.gradients(dy, act, gamma, wanted.dgamma)
        if wanted.dgamma:
            d_last = (*d_last[:2], d_last[2] + dgamma, d_last[3])
    del act, made  # as large as z
    update1 = None if low1 is None else low1.upstream(dz, None, wanted.dx)
    dx = product(dz, w1, low_rank=update1)[0].view(x.shape) if wanted.dx else x.new_empty(0)
    dw1 = product(dz.t(), rows, out_dtype=dtype)[0] if wanted.dw1 else x.new_empty(0, dtype=dtype)
    if low1 is not None:
        updates = [*low1.gradients(dz, rows, None, False)[:2], *updates]
    return (dx, dw1, db1, *d_last), updates


def fake_mlp_forward(
    x, w1, b1, w2, b2, gamma, residual, activation, out_dtype=None, save_z=False, save_act=False, path=None
):  # fmt: skip
    lead = x.shape[:-1]
    y = x.new_empty((*lead, w2.shape[0]), dtype=out_dtype or promoted_dtype(x, residual, gamma, path))
    z, act = (x.new_empty((*lead, w1.shape[0]) if save else (0,)) for save in (save_z, save_act))
    return y, z, act


def _fake_backward(dy, x, w1, w2, b2, gamma, z, act, activation, needed, dtype=None, path=None):
    shapes = (x.shape, w1.shape, w1.shape[:1], w2.shape, w2.shape[:1], w2.shape[:1], w2.shape)
    dtype, wide = dtype or x.dtype, wide_dtype(x.dtype)
    dtypes = (x.dtype, *[dtype] * 4, wide if gamma is None else gamma.dtype, wide)
    return tuple(
        x.new_empty(shape if n else (0,), dtype=dtype) for shape, dtype, n in zip(shapes, dtypes, needed, strict=True)
    )


def _reference_forward(
    x, w1, b1, w2, b2, gamma, residual, activation, out_dtype=None, save_z=False, save_act=False, path=None
):  # fmt: skip
    y = reference.mlp(
        x, w1, b1, w2, b2, activation=activation, residual=residual, layer_scale=gamma, drop_path_scale=path
    )
    z = reference.linear(x, w1, b1) if save_z else x.new_empty(0)
    act = x.new_empty(0)
    if save_act:
        act = _scaled(reference.linear(x, w1, b1, activation=activation), path)
    return y.to(out_dtype or promoted_dtype(x, residual, gamma, path)).contiguous(), z.contiguous(), act.contiguous()


def _scaled(x: Tensor, path: Tensor | None) -> Tensor:
    """Return ``path · x`` in x's dtype, with one number for each sample of x."""
    return x if path is None else reference.scale_samples(x, path).to(x.dtype)


def _reference_backward(dy, x, w1, w2, b2, gamma, z, act, activation, needed, dtype=None, path=None):
    outputs = _fake_backward(dy, x, w1, w2, b2, gamma, z, act, activation, needed, dtype, path)
    wanted = MlpWanted(*needed)
    F, C = w1.shape

    # b1 is not an argument but already added in z: use autograd down to z, then formulas.
    def tail(z, w2, b2, gamma):
        return _scaled(reference.linear(reference.activate(z, activation), w2, b2, layer_scale=gamma), path)

    inputs = (z, w2, b2, None if gamma is None else gamma.to(x.dtype))
    dz, *grads = reference_gradients(tail, inputs, (dy.to(x.dtype),), (True, *needed[3:6]))
    for output, grad in zip(outputs[3:6], grads, strict=True):
        output.copy_(grad)
    dz = dz.reshape(-1, F)
    if wanted.dx:
        outputs[0].copy_((dz @ w1).view(x.shape))
    if wanted.dw1:
        outputs[1].copy_(dz.t() @ x.reshape(-1, C))
    if wanted.db1:
        outputs[2].copy_(dz.sum(0))
    if wanted.dfolded:
        h = _scaled(reference.activate(z, activation), path).reshape(-1, F).to(outputs[6].dtype)
        outputs[6].copy_(dy.reshape(-1, w2.shape[0]).to(h.dtype).t() @ h)
    return outputs


mlp_fwd = register(
    "mlp_fwd(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? gamma, Tensor? residual, "
    "str? activation, ScalarType? out_dtype=None, bool save_z=False, bool save_act=False, "
    "Tensor? path=None) -> (Tensor, Tensor, Tensor)",
    launcher=mlp_forward,
    reference=_reference_forward,
    fake=fake_mlp_forward,
    work="mlp",
)
mlp_bwd = register(
    "mlp_bwd(Tensor dy, Tensor x, Tensor w1, Tensor w2, Tensor? b2, Tensor? gamma, Tensor z, Tensor? act, "
    "str? activation, bool[] needed, ScalarType? dtype=None, Tensor? path=None) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    launcher=mlp_backward,
    reference=_reference_backward,
    fake=_fake_backward,
)


class MlpFunction(torch.autograd.Function):
    """Autograd for :func:`mlp`; the products run in ``dtype``, that of x, whatever that of the weights."""

    @staticmethod
    def forward(ctx, x, w1, b1, w2, b2, gamma, residual, path, activation, recompute, dtype):
        ctx.unsaved = (b1,) if dtype is None else (w1, b1, w2, b2)  # b1 is already added in z
        ctx.dtypes = [None if t is None else t.dtype for t in (w1, b1, w2, b2)]
        # Cast here, so that the backward's products write the gradients of fp32 weights in fp32.
        w1, b1, w2, b2 = cast(dtype, w1, b1, w2, b2)
        save_z = any(ctx.needs_input_grad[:6])
        save_act = (ctx.needs_input_grad[3] or ctx.needs_input_grad[5]) and not recompute
        y, z, act = mlp_fwd(x, w1, b1, w2, b2, gamma, residual, activation, None, save_z, save_act, path)
        ctx.save_for_backward(x, w1, w2, b2, gamma, z, act if save_act else None, path)
        ctx.emulated = runtime.emulated_arch()
        ctx.activation = activation
        ctx.residual_dtype = None if residual is None else residual.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, saved, dy):
        needed = list(ctx.needs_input_grad[:6])
        grads = [None] * 6
        if any(needed):
            *saved, path = saved
            results = mlp_bwd(dy, *saved, ctx.activation, [*needed, False], ctx.dtypes[0], path)
            grads = [g if n else None for g, n in zip(results[:6], needed, strict=True)]
            for i, dtype in enumerate(ctx.dtypes, start=1):
                grads[i] = grads[i].to(dtype) if needed[i] else None
        dresidual = dy.to(ctx.residual_dtype) if ctx.needs_input_grad[6] else None
        return *grads, dresidual, *[None] * 4


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
    drop_path_scale: Tensor | None = None,
    recompute: bool = False,
) -> Tensor:
    """Compute ``residual + drop_path_scale[b] · layer_scale · (activation(x W1ᵀ + b1) W2ᵀ + b2)``.

    Args:
        x: (..., C), fp16, bf16, fp32 or fp64, any strides; leading dims may be empty.
        w1: (F, C); w1, b1, w2 and b2 are in ``x``'s dtype.
        b1: (F,) or None.
        w2: (C', F).
        b2: (C',) or None.
        activation: ``gelu`` (with erf), ``gelu_tanh``, ``quick_gelu`` (x·σ(1.702 x)), ``silu`` or None.
        residual: (..., C'), any floating dtype, or None.
        layer_scale: γ of LayerScale, (C',), any floating dtype, or None.
        drop_path_scale: (B,), DropPath's 0 or 1/keep of each sample of ``x`` (B, ..., C), or None for ones. It must not
            require a gradient.
        recompute: Save one hidden tensor for the backward instead of two, and compute the other again.

    Returns:
        (..., C'), contiguous, in the widest dtype among ``x``, ``residual`` and the scales. Under autocast the products
        run in autocast's dtype, as in PyTorch.

    Raises:
        ValueError: A shape, device or activation does not fit.
        TypeError: A dtype does not fit.
        NotImplementedError: A tensor is nested, sparse or quantized, or ``drop_path_scale`` requires a gradient.

    Reference: arXiv 1706.03762, section 3.3; 1606.08415 (GELU); 2103.17239 (LayerScale); 1603.09382 (DropPath).
    """
    op = "mlp"
    *lead, C = check_input(op, x)
    check_activation(op, activation)
    dtype = runtime.autocast_dtype(x)
    matched = dtypes_and_devices_match(x, w1, b1, w2, b2, residual, layer_scale)
    F = check_weights(op, "w1", w1, "b1", b1, x, C, matched, dtype is None)
    C_out = check_weights(op, "w2", w2, "b2", b2, x, F, matched, dtype is None)
    check_epilogue(op, residual, layer_scale, x, lead, C_out, matched)
    if drop_path_scale is not None:
        check_drop_path_scale(op, "drop_path_scale", drop_path_scale, x)
    if not uses_kernels(x):
        return reference.mlp(
            x, w1, b1, w2, b2, activation=activation, residual=residual, layer_scale=layer_scale,
            drop_path_scale=drop_path_scale,
        ).contiguous()  # fmt: skip
    if dtype is not None:
        x = x.to(dtype)
    if needs_grad(x, w1, b1, w2, b2, layer_scale, residual):
        return MlpFunction.apply(
            x, w1, b1, w2, b2, layer_scale, residual, drop_path_scale, activation, recompute, dtype
        )
    weights = cast(dtype, w1, b1, w2, b2)
    return mlp_fwd(x, *weights, layer_scale, residual, activation, path=drop_path_scale)[0]
