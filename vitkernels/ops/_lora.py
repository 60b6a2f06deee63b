"""Linear layers and MLPs with LoRA's update of low rank inside the products, forward and backward.

Forward:     u = x Aᵀ,  z = x Wᵀ + u Bᵀ + b,  y = residual + γ · act(z)
Backward:    as in _linear.py and _mlp.py, with the update's part as in _low_rank.py

A layer takes two products where one alone takes one: u, of R columns, and then both sums in one tile, so that the
update costs no pass over y. In the backward v, of R columns, and then dx with both sums in one tile.

Shapes: rows M (all leading dims), N output features, K input features, R rank; C channels and F hidden features of an
MLP. Saved for backward: what _linear.py and _mlp.py save, A, B and u.
Source: LoRA arXiv 2106.09685.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from vitkernels import reference, runtime
from vitkernels.ops._cast import cast
from vitkernels.ops._checks import check_drop_path_scale, check_like, check_shape, dtypes_and_devices_match
from vitkernels.ops._layer_scale import fold_layer_scale
from vitkernels.ops._linear import (
    activation_backward,
    check_activation,
    check_epilogue,
    check_input,
    check_weights,
    fake_linear_forward,
    linear_forward,
    weight_gradients,
)
from vitkernels.ops._low_rank import LowRank, update
from vitkernels.ops._mlp import MlpWanted, fake_mlp_forward, mlp_gradients, mlp_products
from vitkernels.ops._once import once_differentiable
from vitkernels.ops._product import product
from vitkernels.ops._registry import needs_grad, reference_gradients, register, uses_kernels
from vitkernels.runtime import promoted_dtype, wide_dtype


def lora_linear_forward(x, weight, bias, a, b, lora_x, gamma, residual, activation, out_dtype=None, save_z=False):
    """Launch the forward on (..., K); return ``(y, z, u)``, z empty unless saved, u (M, R)."""
    low, u = update(x if lora_x is None else lora_x, (a, b))
    y, z = linear_forward(x, weight, bias, gamma, residual, activation, out_dtype, save_z, low_rank=low)
    return y, z, u


class LoraLinearWanted(NamedTuple):
    """Which gradients of :func:`lora_linear` are wanted, in the order in which they come."""

    dx: bool = False
    dweight: bool = False
    dbias: bool = False
    da: bool = False
    db: bool = False
    dlora_x: bool = False
    dgamma: bool = False


def lora_linear_backward(
    dy, x, weight, bias, a, b, lora_x, u, z, gamma, activation, needed, dtype=None, lora_dtype=None
):  # fmt: skip
    """Launch the backward; return the gradients named by :class:`LoraLinearWanted`, each empty unless ``needed``.

    Those of W and the bias have ``dtype``, those of A and B ``lora_dtype``, x's if None; that of γ has γ's.
    """
    wanted = LoraLinearWanted(*needed)
    dtype, wide = dtype or x.dtype, wide_dtype(x.dtype)
    rows, dy = _rows(x), dy.reshape(-1, weight.shape[0]).to(x.dtype)
    low = LowRank(a, b, u, wanted.da, wanted.db, lora_dtype or x.dtype)
    of_weights, dbias = [wanted.dweight, wanted.dbias, wanted.dgamma], None
    if activation is not None:
        dy, dbias, dgamma = activation_backward(
            dy, z.reshape(dy.shape), gamma, activation, needed=(wanted.dbias, wanted.dgamma),
            dtypes=(dtype, wide if gamma is None else gamma.dtype),
        )  # fmt: skip
        gamma, of_weights = None, [wanted.dweight, False, False]
    upstream = low.upstream(dy, gamma, wanted.dlora_x if lora_x is not None else wanted.dx)
    dx, dlora_x = x.new_empty(0), x.new_empty(0)
    if wanted.dx:
        folded, alpha = fold_layer_scale(weight, gamma)
        dx = product(dy, folded, alpha=alpha, low_rank=upstream if lora_x is None else None)[0].view(x.shape)
    if wanted.dlora_x:
        dlora_x = product(*upstream, alpha=low.alpha)[0].view(x.shape)
    grads = weight_gradients(dy, rows, weight, bias, gamma, [*of_weights, False], dtype)
    da, db, update_dgamma = low.gradients(dy, rows if lora_x is None else _rows(lora_x), gamma, of_weights[2])
    if dbias is None:
        dbias, dgamma = grads[1], grads[2] + update_dgamma if wanted.dgamma else grads[2]
    return dx, grads[0], dbias, da, db, dlora_x, dgamma


def _rows(x: Tensor) -> Tensor:
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _fake_linear_forward(x, weight, bias, a, b, lora_x, gamma, residual, activation, out_dtype=None, save_z=False):
    u = x.new_empty((x.shape[:-1].numel(), a.shape[0]))
    return *fake_linear_forward(x, weight, bias, gamma, residual, activation, out_dtype, save_z), u


def _fake_linear_backward(
    dy, x, weight, bias, a, b, lora_x, u, z, gamma, activation, needed, dtype=None, lora_dtype=None
):  # fmt: skip
    dtype, lora_dtype = dtype or x.dtype, lora_dtype or x.dtype
    gamma_dtype = wide_dtype(x.dtype) if gamma is None else gamma.dtype
    shapes = (x.shape, weight.shape, weight.shape[:1], a.shape, b.shape, x.shape, weight.shape[:1])
    dtypes = (x.dtype, dtype, dtype, lora_dtype, lora_dtype, x.dtype, gamma_dtype)
    return _empty(x, shapes, dtypes, needed)


def _empty(x, shapes, dtypes, needed) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(s if n else (0,), dtype=d) for s, d, n in zip(shapes, dtypes, needed, strict=True))


def _reference_linear_forward(
    x, weight, bias, a, b, lora_x, gamma, residual, activation, out_dtype=None, save_z=False
):  # fmt: skip
    options = {"activation": activation, "residual": residual, "layer_scale": gamma}
    y = reference.lora_linear(x, weight, bias, a, b, lora_x=lora_x, **options)
    z = reference.lora_linear(x, weight, bias, a, b, lora_x=lora_x) if save_z else x.new_empty(0)
    u = _rows(x if lora_x is None else lora_x) @ a.t()
    return y.to(out_dtype or promoted_dtype(x, residual, gamma)).contiguous(), z.contiguous(), u


def _reference_linear_backward(
    dy, x, weight, bias, a, b, lora_x, u, z, gamma, activation, needed, dtype=None, lora_dtype=None
):  # fmt: skip
    outputs = _fake_linear_backward(
        dy, x, weight, bias, a, b, lora_x, u, z, gamma, activation, needed, dtype, lora_dtype
    )
    grads = reference_gradients(
        lambda x, weight, bias, a, b, lora_x, gamma: reference.lora_linear(
            x, weight, bias, a, b, lora_x=lora_x, activation=activation, layer_scale=gamma
        ),
        (x, weight, bias, a, b, lora_x, None if gamma is None else gamma.to(x.dtype)),
        (dy.to(x.dtype),),
        needed,
    )
    for output, grad in zip(outputs, grads, strict=True):
        output.copy_(grad)
    return outputs


lora_linear_fwd = register(
    "lora_linear_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor b, Tensor? lora_x, Tensor? gamma, "
    "Tensor? residual, str? activation, ScalarType? out_dtype=None, bool save_z=False) -> (Tensor, Tensor, Tensor)",
    launcher=lora_linear_forward,
    reference=_reference_linear_forward,
    fake=_fake_linear_forward,
    work="linear",
)
lora_linear_bwd = register(
    "lora_linear_bwd(Tensor dy, Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor b, Tensor? lora_x, Tensor u, "
    "Tensor? z, Tensor? gamma, str? activation, bool[] needed, ScalarType? dtype=None, ScalarType? lora_dtype=None) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    launcher=lora_linear_backward,
    reference=_reference_linear_backward,
    fake=_fake_linear_backward,
)


class LoraLinearFunction(torch.autograd.Function):
    """Autograd for :func:`lora_linear`; the products run in x's dtype, whatever those of the weights."""

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, lora_x, gamma, residual, activation):
        given = (weight, bias, a, b)
        ctx.unsaved = _of_other_dtypes(x, *given)
        ctx.dtypes = [None if t is None else t.dtype for t in given]
        # Cast here, so that the backward's products write the gradients of fp32 weights in fp32.
        weight, bias, a, b = cast(x.dtype, *given)
        save_z = activation is not None and any(ctx.needs_input_grad[:7])
        y, z, u = lora_linear_fwd(x, weight, bias, a, b, lora_x, gamma, residual, activation, None, save_z)
        ctx.save_for_backward(x, weight, bias, a, b, lora_x, u, z if save_z else None, gamma)
        ctx.emulated = runtime.emulated_arch()
        ctx.activation = activation
        ctx.residual_dtype = None if residual is None else residual.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, saved, dy):
        needed = list(ctx.needs_input_grad[:7])
        grads = [None] * 7
        if any(needed):
            results = lora_linear_bwd(dy, *saved, ctx.activation, needed, ctx.dtypes[0], _widest(ctx.dtypes[2:]))
            grads = _of_dtypes(results, needed, (None, *ctx.dtypes, None, None))
        dresidual = dy.to(ctx.residual_dtype) if ctx.needs_input_grad[7] else None
        return *grads, dresidual, None


def _of_other_dtypes(x: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """Return the tensors that a backward saves in x's dtype alone."""
    return tuple(t for t in tensors if t is not None and t.dtype != x.dtype)


def _widest(dtypes: list[torch.dtype | None]) -> torch.dtype:
    """Return the dtype in which the gradients of all A's and B's lose nothing: each may be in x's dtype or in fp32."""
    given = [dtype for dtype in dtypes if dtype is not None]
    return functools.reduce(torch.promote_types, given) if given else torch.float32


def _of_dtypes(grads, needed, dtypes) -> list[Tensor | None]:
    """Return the gradients that are needed, in ``dtypes``; None leaves one as it is."""
    return [
        (g if dtype is None else g.to(dtype)) if n else None for g, n, dtype in zip(grads, needed, dtypes, strict=True)
    ]


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    lora_x: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    layer_scale: Tensor | None = None,
) -> Tensor:
    """Compute ``residual + layer_scale · activation(x Wᵀ + bias + x Aᵀ Bᵀ)``, a layer with LoRA's update, in one pass.

    Several adapters are one: their A's one below the other, their B's side by side. Their scaling is part of B.

    Args:
        x: (..., K), fp16, bf16, fp32 or fp64, any strides; leading dims may be empty.
        weight: (N, K), in ``x``'s dtype.
        bias: (N,), in ``x``'s dtype, or None.
        lora_a: A, (R, K), in ``x``'s dtype, or fp32 with half inputs; it is then multiplied in ``x``'s.
        lora_b: B, (N, R), as A.
        lora_x: (..., K): what A multiplies if it is not ``x``, such as ``x`` with elements dropped; in ``x``'s dtype.
        activation: As for :func:`vitkernels.ops.linear`.
        residual: (..., N), any floating dtype, or None.
        layer_scale: γ of LayerScale, (N,), any floating dtype, or None.

    Returns:
        (..., N), contiguous, in the widest dtype among ``x``, ``residual`` and ``layer_scale``. Under autocast the
        products run in autocast's dtype, as in PyTorch.

    Raises:
        ValueError: A shape, device or activation does not fit.
        TypeError: A dtype does not fit.
        NotImplementedError: A tensor is nested, sparse or quantized.

    Reference: arXiv 2106.09685 (LoRA), 1606.08415 (GELU), 2103.17239 (LayerScale).
    """
    op = "lora_linear"
    *lead, K = check_input(op, x)
    check_activation(op, activation)
    dtype = runtime.autocast_dtype(x)
    matched = dtypes_and_devices_match(x, weight, bias, residual, layer_scale)
    N = check_weights(op, "weight", weight, "bias", bias, x, K, matched, dtype is None)
    _check_lora(op, "lora_a", lora_a, "lora_b", lora_b, x, K, N, dtype is None)
    check_epilogue(op, residual, layer_scale, x, lead, N, matched)
    if lora_x is not None:
        check_like(op, "lora_x", lora_x, "x", x, dtype=dtype is None)
        check_shape(op, "lora_x", lora_x, x.shape, "x's shape")
    options = {"activation": activation, "residual": residual, "layer_scale": layer_scale}
    if not uses_kernels(x):
        lora = [t if dtype is not None else t.to(x.dtype) for t in (lora_a, lora_b)]
        return reference.lora_linear(x, weight, bias, *lora, lora_x=lora_x, **options).contiguous()
    if dtype is not None:
        x, lora_x = x.to(dtype), None if lora_x is None else lora_x.to(dtype)
    if needs_grad(x, weight, bias, lora_a, lora_b, lora_x, layer_scale, residual):
        return LoraLinearFunction.apply(x, weight, bias, lora_a, lora_b, lora_x, layer_scale, residual, activation)
    weights = cast(x.dtype, weight, bias, lora_a, lora_b)
    return lora_linear_fwd(x, *weights, lora_x, layer_scale, residual, activation)[0]


def _check_lora(
    op: str, a_name: str, a: Tensor, b_name: str, b: Tensor, x: Tensor, K: int, N: int, strict: bool
) -> None:
    """Require A (R, K) and B (N, R) with R ≥ 1, on ``x``'s device; with ``strict`` in its dtype, or fp32."""
    for name, t in ((a_name, a), (b_name, b)):
        check_like(op, name, t, "x", x, dtype=False)
        if strict and not (t.dtype == torch.float32 and x.dtype.itemsize == 2):
            check_like(op, name, t, "x", x)
    if a.ndim != 2 or a.shape[1] != K or a.shape[0] == 0:
        raise ValueError(f"{op}: {a_name} has shape {tuple(a.shape)}; expected (rank, {K})")
    check_shape(op, b_name, b, (N, a.shape[0]), f"the out features, and the rows of {a_name}")


def lora_mlp_forward(
    x, w1, b1, w2, b2, a1, up1, a2, up2, gamma, residual, activation, out_dtype=None, save_z=False, save_act=False,
    path=None,
):  # fmt: skip
    """Launch the forward on (..., C); return ``(y, z, h, u1, u2)``, z and h empty unless saved, u1 and u2 if unused."""
    lora = None if a1 is None else (a1, up1), None if a2 is None else (a2, up2)
    results, us = mlp_products(x, w1, b1, w2, b2, gamma, residual, activation, out_dtype, save_z, save_act, path, lora)
    return *results, *(x.new_empty(0) if u is None else u for u in us)


class LoraMlpWanted(NamedTuple):
    """Which gradients of :func:`lora_mlp` are wanted, in the order in which they come."""

    dx: bool = False
    dw1: bool = False
    db1: bool = False
    dw2: bool = False
    db2: bool = False
    da1: bool = False
    dup1: bool = False
    da2: bool = False
    dup2: bool = False
    dgamma: bool = False


def lora_mlp_backward(
    dy, x, w1, w2, b2, a1, up1, a2, up2, u1, u2, gamma, z, act, activation, needed, dtype=None, lora_dtype=None,
    path=None,
):  # fmt: skip
    """Launch the backward; return the gradients named by :class:`LoraMlpWanted`, each empty unless ``needed``.

    ``act`` is the forward's h, None if it must be computed again. The gradients of weights and biases have ``dtype``,
    those of A and B ``lora_dtype``, x's if None; that of γ has γ's.
    """
    wanted = LoraMlpWanted(*needed)
    base = MlpWanted(wanted.dx, wanted.dw1, wanted.db1, wanted.dw2, wanted.db2, wanted.dgamma)
    lora_dtype = lora_dtype or x.dtype
    lora = (
        None if a1 is None else LowRank(a1, up1, u1, wanted.da1, wanted.dup1, lora_dtype),
        None if a2 is None else LowRank(a2, up2, u2, wanted.da2, wanted.dup2, lora_dtype),
    )
    grads, updates = mlp_gradients(dy, x, w1, w2, b2, gamma, z, act, activation, base, dtype, path, lora)
    *grads, dgamma, _ = grads
    none = [x.new_empty(0, dtype=lora_dtype) for _ in range(2)]
    if a1 is None:
        updates = [*none, *updates]
    if a2 is None:
        updates = [*updates, *none]
    return *grads, *updates, dgamma


def _fake_mlp_forward(
    x, w1, b1, w2, b2, a1, up1, a2, up2, gamma, residual, activation, out_dtype=None, save_z=False, save_act=False,
    path=None,
):  # fmt: skip
    plain = fake_mlp_forward(x, w1, b1, w2, b2, gamma, residual, activation, out_dtype, save_z, save_act, path)
    rows = x.shape[:-1].numel()
    return *plain, *(x.new_empty((0,) if a is None else (rows, a.shape[0])) for a in (a1, a2))


def _fake_mlp_backward(
    dy, x, w1, w2, b2, a1, up1, a2, up2, u1, u2, gamma, z, act, activation, needed, dtype=None, lora_dtype=None,
    path=None,
):  # fmt: skip
    lora = [(0,) if t is None else t.shape for t in (a1, up1, a2, up2)]
    shapes = (x.shape, w1.shape, w1.shape[:1], w2.shape, w2.shape[:1], *lora, w2.shape[:1])
    gamma_dtype = wide_dtype(x.dtype) if gamma is None else gamma.dtype
    dtypes = (x.dtype, *[dtype or x.dtype] * 4, *[lora_dtype or x.dtype] * 4, gamma_dtype)
    return _empty(x, shapes, dtypes, needed)


def _reference_mlp_forward(
    x, w1, b1, w2, b2, a1, up1, a2, up2, gamma, residual, activation, out_dtype=None, save_z=False, save_act=False,
    path=None,
):  # fmt: skip
    lora1, lora2 = None if a1 is None else (a1, up1), None if a2 is None else (a2, up2)
    y = reference.lora_mlp(
        x, w1, b1, w2, b2, lora1=lora1, lora2=lora2, activation=activation, residual=residual, layer_scale=gamma,
        drop_path_scale=path,
    )  # fmt: skip
    z = _first(x, w1, b1, lora1)
    h = reference.activate(z, activation)
    h = h if path is None else reference.scale_samples(h, path).to(x.dtype)
    u1, u2 = (x.new_empty(0) if a is None else _rows(t) @ a.t() for t, a in ((x, a1), (h, a2)))
    z, h = (t.contiguous() if save else x.new_empty(0) for t, save in ((z, save_z), (h, save_act)))
    return y.to(out_dtype or promoted_dtype(x, residual, gamma, path)).contiguous(), z, h, u1, u2


def _first(x, w1, b1, lora1) -> Tensor:
    return reference.linear(x, w1, b1) if lora1 is None else reference.lora_linear(x, w1, b1, *lora1)


def _reference_mlp_backward(
    dy, x, w1, w2, b2, a1, up1, a2, up2, u1, u2, gamma, z, act, activation, needed, dtype=None, lora_dtype=None,
    path=None,
):  # fmt: skip
    outputs = _fake_mlp_backward(
        dy, x, w1, w2, b2, a1, up1, a2, up2, u1, u2, gamma, z, act, activation, needed, dtype, lora_dtype, path
    )
    wanted = LoraMlpWanted(*needed)

    # b1 is not an argument but already added in z: differentiate behind z, then before it.
    def tail(z, w2, b2, a2, up2, gamma):
        h, layer = reference.activate(z, activation), (w2, b2)
        y = reference.linear(h, *layer) if a2 is None else reference.lora_linear(h, *layer, a2, up2)
        y = y if gamma is None else y * gamma
        return y if path is None else reference.scale_samples(y, path).to(x.dtype)

    behind = (z, w2, b2, a2, up2, None if gamma is None else gamma.to(x.dtype))
    needs = (True, wanted.dw2, wanted.db2, wanted.da2, wanted.dup2, wanted.dgamma)
    dz, dw2, db2, da2, dup2, dgamma = reference_gradients(tail, behind, (dy.to(x.dtype),), needs)
    dx, dw1, da1, dup1 = reference_gradients(
        lambda x, w1, a1, up1: _first(x, w1, None, None if a1 is None else (a1, up1)),
        (x, w1, a1, up1), (dz,), (wanted.dx, wanted.dw1, wanted.da1, wanted.dup1),
    )  # fmt: skip
    db1 = _rows(dz).sum(0) if wanted.db1 else x.new_empty(0)
    for output, grad in zip(outputs, (dx, dw1, db1, dw2, db2, da1, dup1, da2, dup2, dgamma), strict=True):
        output.copy_(grad)
    return outputs


lora_mlp_fwd = register(
    "lora_mlp_fwd(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? a1, Tensor? up1, Tensor? a2, "
    "Tensor? up2, Tensor? gamma, Tensor? residual, str? activation, ScalarType? out_dtype=None, bool save_z=False, "
    "bool save_act=False, Tensor? path=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    launcher=lora_mlp_forward,
    reference=_reference_mlp_forward,
    fake=_fake_mlp_forward,
    work="mlp",
)
lora_mlp_bwd = register(
    "lora_mlp_bwd(Tensor dy, Tensor x, Tensor w1, Tensor w2, Tensor? b2, Tensor? a1, Tensor? up1, Tensor? a2, "
    "Tensor? up2, Tensor u1, Tensor u2, Tensor? gamma, Tensor z, Tensor? act, str? activation, bool[] needed, "
    "ScalarType? dtype=None, ScalarType? lora_dtype=None, Tensor? path=None) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    launcher=lora_mlp_backward,
    reference=_reference_mlp_backward,
    fake=_fake_mlp_backward,
)


class LoraMlpFunction(torch.autograd.Function):
    """Autograd for :func:`lora_mlp`; the products run in x's dtype, whatever those of the weights."""

    @staticmethod
    def forward(ctx, x, w1, b1, w2, b2, a1, up1, a2, up2, gamma, residual, path, activation, recompute):
        given = (w1, b1, w2, b2, a1, up1, a2, up2)
        ctx.unsaved = (b1, *_of_other_dtypes(x, *given))  # b1 is already added in z
        ctx.dtypes = [None if t is None else t.dtype for t in given]
        # Cast here, so that the backward's products write the gradients of fp32 weights in fp32.
        w1, b1, w2, b2, *lora = cast(x.dtype, *given)
        needs = ctx.needs_input_grad
        save_z = any(needs[:10])
        save_act = (needs[3] or needs[7] or needs[9]) and not recompute
        options = (activation, None, save_z, save_act, path)
        y, z, act, u1, u2 = lora_mlp_fwd(x, w1, b1, w2, b2, *lora, gamma, residual, *options)
        ctx.save_for_backward(x, w1, w2, b2, *lora, u1, u2, gamma, z, act if save_act else None, path)
        ctx.emulated = runtime.emulated_arch()
        ctx.activation = activation
        ctx.residual_dtype = None if residual is None else residual.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, saved, dy):
        needed = list(ctx.needs_input_grad[:10])
        grads = [None] * 10
        if any(needed):
            *saved, path = saved
            results = lora_mlp_bwd(dy, *saved, ctx.activation, needed, ctx.dtypes[0], _widest(ctx.dtypes[4:]), path)
            grads = _of_dtypes(results, needed, (None, *ctx.dtypes, None))
        dresidual = dy.to(ctx.residual_dtype) if ctx.needs_input_grad[10] else None
        return *grads, dresidual, *[None] * 3


def lora_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    lora1: tuple[Tensor, Tensor] | None = None,
    lora2: tuple[Tensor, Tensor] | None = None,
    activation: str | None = "gelu",
    residual: Tensor | None = None,
    layer_scale: Tensor | None = None,
    drop_path_scale: Tensor | None = None,
    recompute: bool = False,
) -> Tensor:
    """Compute :func:`vitkernels.ops.mlp` with LoRA's update beside its first layer, its second, or both.

    Args:
        x, w1, b1, w2, b2, activation, residual, layer_scale, drop_path_scale, recompute: As for
            :func:`vitkernels.ops.mlp`.
        lora1: A (R, C) and B (F, R), as for :func:`lora_linear`, or None.
        lora2: A (R', F) and B (C', R'), or None.

    Returns:
        (..., C'), contiguous, in the widest dtype among ``x``, ``residual`` and the scales. Under autocast the products
        run in autocast's dtype, as in PyTorch.

    Raises:
        ValueError: A shape, device or activation does not fit.
        TypeError: A dtype does not fit, or ``lora1`` or ``lora2`` is not a pair.
        NotImplementedError: A tensor is nested, sparse or quantized, or ``drop_path_scale`` requires a gradient.

    Reference: arXiv 2106.09685 (LoRA), 1706.03762, section 3.3; 2103.17239 (LayerScale); 1603.09382 (DropPath).
    """
    op = "lora_mlp"
    *lead, C = check_input(op, x)
    check_activation(op, activation)
    dtype = runtime.autocast_dtype(x)
    matched = dtypes_and_devices_match(x, w1, b1, w2, b2, residual, layer_scale)
    F = check_weights(op, "w1", w1, "b1", b1, x, C, matched, dtype is None)
    C_out = check_weights(op, "w2", w2, "b2", b2, x, F, matched, dtype is None)
    check_epilogue(op, residual, layer_scale, x, lead, C_out, matched)
    for name, lora, K, N in (("lora1", lora1, C, F), ("lora2", lora2, F, C_out)):
        if lora is None:
            continue
        if not isinstance(lora, tuple | list) or len(lora) != 2:
            raise TypeError(f"{op}: {name} is a {type(lora).__name__}; expected a pair, A and B")
        _check_lora(op, f"{name}'s A", lora[0], f"{name}'s B", lora[1], x, K, N, dtype is None)
    if drop_path_scale is not None:
        check_drop_path_scale(op, "drop_path_scale", drop_path_scale, x)
    if not uses_kernels(x):
        if dtype is None:
            lora1, lora2 = (None if p is None else tuple(t.to(x.dtype) for t in p) for p in (lora1, lora2))
        return reference.lora_mlp(
            x, w1, b1, w2, b2, lora1=lora1, lora2=lora2, activation=activation, residual=residual,
            layer_scale=layer_scale, drop_path_scale=drop_path_scale,
        ).contiguous()  # fmt: skip
    if dtype is not None:
        x = x.to(dtype)
    weights = (w1, b1, w2, b2, *(lora1 or (None, None)), *(lora2 or (None, None)))
    if needs_grad(x, *weights, layer_scale, residual):
        return LoraMlpFunction.apply(x, *weights, layer_scale, residual, drop_path_scale, activation, recompute)
    return lora_mlp_fwd(x, *cast(x.dtype, *weights), layer_scale, residual, activation, path=drop_path_scale)[0]
