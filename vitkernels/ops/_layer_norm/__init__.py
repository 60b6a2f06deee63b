"""LayerNorm and RMSNorm over the last dim, alone or fused with residual sum, LayerScale and DropPath.

Forward (arXiv 1607.06450):       x̂ = (x − mean) · rstd,  y = x̂ · weight + bias,  rstd = 1 / √(var + eps)
Backward, with g = dy · weight:   dx = rstd · (g − mean(g) − x̂ · mean(g · x̂)),  dweight = Σ dy · x̂,  dbias = Σ dy
RMSNorm (arXiv 1910.07467) is the same without mean, mean(g) and bias: var is mean(x²).
add_layer_norm (LayerScale arXiv 2103.17239, DropPath arXiv 1603.09382), with row m of sample b:
                                  r = residual + s[b] · γ · x,  y = layer_norm(r)
                                  dr = d(new_residual) + layer_norm_backward(dy),  dresidual = dr
                                  dx = s[b] · γ · dr,  dγ = Σ s[b] · x · dr

Shapes: rows M (all leading dims), channels C. Saved for backward: the input of the norm (x or r), mean and rstd,
and x if γ needs a gradient. Statistics and sums are fp32 (fp64 for fp64 inputs) whatever the dtype of x.
The backward is persistent over rows: at most 2 programs run per SM, and each sums the parameter gradients of its rows
into one row of a (programs, C) buffer. So the buffer does not grow with M, and there are no atomics.
Tiles of both kernels are (BLOCK_M rows, BLOCK_C channels); lanes outside the mask hold zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitkernels import reference, runtime
from vitkernels.ops._checks import (
    check_drop_path_scale,
    check_like,
    check_number,
    check_shape,
    check_tensor,
    dtypes_and_devices_match,
)
from vitkernels.ops._layer_norm.backward import NormWanted as NormWanted
from vitkernels.ops._layer_norm.backward import layer_norm_backward, sum_dtypes
from vitkernels.ops._layer_norm.forward import forward_outputs, layer_norm_forward
from vitkernels.ops._once import once_differentiable
from vitkernels.ops._registry import needs_grad, reference_gradients, register, uses_kernels
from vitkernels.runtime import promoted_dtype, wide_dtype


def _reference_forward(x, residual, weight, bias, gamma, path, eps, out_dtype=None, rms=False, width=None):
    r = x
    if residual is not None:
        r = reference.add_layer_norm(x, residual, layer_scale=gamma, drop_path_scale=path)[1]
    out_dtype = out_dtype or r.dtype
    statistics = wide_dtype(r.dtype)
    rows = r.reshape(-1, r.shape[-1])[:, :width].to(statistics)
    variance = rows.square().mean(-1) if rms else rows.var(-1, correction=0)
    y = _reference_norm(r[..., :width].to(out_dtype), weight, bias, eps, rms)
    return (
        torch.constant_pad_nd(y, (0, r.shape[-1] - y.shape[-1])).contiguous(),
        x.new_empty(0) if residual is None else r.contiguous(),
        variance.new_empty(0) if rms else rows.mean(-1),
        (variance + eps).rsqrt(),
    )


def _reference_norm(x, weight, bias, eps, rms):
    return reference.rms_norm(x, weight, eps) if rms else reference.layer_norm(x, weight, bias, eps)


def _reference_backward(
    dy, dr, r, x, weight, gamma, path, mean, rstd, eps, x_dtype, needed, rms=False, width=None, bias_dtype=None,
    sum_dtype=None, dr_path=None,
):  # fmt: skip
    wanted = NormWanted(*needed)
    statistics = rstd.dtype
    wide_r, wide_dy, wide_weight = _cast(statistics, r, dy, weight)
    bias = None if rms else torch.zeros(width or r.shape[-1], dtype=statistics, device=r.device)

    def norm(r, weight, bias):
        y = _reference_norm(r[..., :width], weight, bias, eps, rms)
        return torch.constant_pad_nd(y, (0, r.shape[-1] - y.shape[-1]))

    d_sum, dweight, dbias = reference_gradients(
        norm, (wide_r, wide_weight, bias), (wide_dy,), (True, wanted.dweight, wanted.dbias)
    )
    dweight, dbias = (
        torch.constant_pad_nd(g, (0, r.shape[-1] - g.shape[0])) if n else g
        for g, n in ((dweight, wanted.dweight), (dbias, wanted.dbias))
    )
    rows = tuple(range(r.ndim - 1))
    dr_sum = d_sum.new_empty(0)
    if wanted.dr_sum:
        dr_sum = (dr if dr_path is None else reference.scale_samples(dr, dr_path)).sum(rows, dtype=statistics)
    if dr is not None:
        d_sum = d_sum + dr
    branch = d_sum if path is None else reference.scale_samples(d_sum, path)
    dgamma = (branch * x).sum(rows) if wanted.dgamma else d_sum.new_empty(0)
    dx = (branch if gamma is None else branch * gamma).to(x_dtype, copy=True)
    branch_sum = branch.sum(rows) if wanted.dresidual_sum else d_sum.new_empty(0)
    sums = (dweight, dbias, dgamma, dr_sum, branch_sum)
    dtypes = sum_dtypes(weight, gamma, statistics, bias_dtype, sum_dtype)
    return (
        dx if wanted.dx else dx.new_empty(0),
        d_sum.to(r.dtype, copy=True) if wanted.dresidual else r.new_empty(0),
        *(each.to(dtype) for each, dtype in zip(sums, dtypes, strict=True)),
    )


def _fake_backward(
    dy, dr, r, x, weight, gamma, path, mean, rstd, eps, x_dtype, needed, rms=False, width=None, bias_dtype=None,
    sum_dtype=None, dr_path=None,
):  # fmt: skip
    def empty(shape, dtype, n):
        return torch.empty(shape if n else (0,), dtype=dtype, device=r.device)

    wanted = NormWanted(*needed)
    dtypes = sum_dtypes(weight, gamma, rstd.dtype, bias_dtype, sum_dtype)
    parameters = [empty(r.shape[-1:], dtype, n) for dtype, n in zip(dtypes, wanted[2:], strict=True)]
    return empty(r.shape, x_dtype, wanted.dx), empty(r.shape, r.dtype, wanted.dresidual), *parameters


def _cast(dtype: torch.dtype, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.to(dtype) for t in tensors]


layer_norm_fwd = register(
    "layer_norm_fwd(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? gamma, Tensor? path, float eps, "
    "ScalarType? out_dtype=None, bool rms=False, int? width=None) -> (Tensor, Tensor, Tensor, Tensor)",
    launcher=layer_norm_forward,
    reference=_reference_forward,
    fake=forward_outputs,
    work="pass",
)
layer_norm_bwd = register(
    "layer_norm_bwd(Tensor dy, Tensor? dr, Tensor r, Tensor? x, Tensor? weight, Tensor? gamma, Tensor? path, "
    "Tensor mean, Tensor rstd, float eps, ScalarType x_dtype, bool[] needed, bool rms=False, int? width=None, "
    "ScalarType? bias_dtype=None, ScalarType? sum_dtype=None, Tensor? dr_path=None) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    launcher=layer_norm_backward,
    reference=_reference_backward,
    fake=_fake_backward,
)


class LayerNormFunction(torch.autograd.Function):
    """Autograd for LayerNorm or, with ``rms``, RMSNorm; with ``residual=None`` there is no residual sum."""

    @staticmethod
    def forward(ctx, x, residual, weight, bias, gamma, path, eps, out_dtype, rms):
        y, r, mean, rstd = layer_norm_fwd(x, residual, weight, bias, gamma, path, eps, out_dtype, rms)
        plain = residual is None
        branch = x if gamma is not None and ctx.needs_input_grad[4] else None
        ctx.save_for_backward(x if plain else r, branch, weight, gamma, path, mean, rstd)
        ctx.emulated = runtime.emulated_arch()
        ctx.eps, ctx.x_dtype, ctx.plain, ctx.rms = eps, x.dtype, plain, rms
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.residual_dtype = None if plain else residual.dtype
        ctx.set_materialize_grads(False)
        return y if plain else (y, r)

    @staticmethod
    @once_differentiable
    def backward(ctx, saved, dy, dr=None):
        r, x, weight, gamma, path, mean, rstd = saved
        needs_x, needs_residual, *needs_parameters = ctx.needs_input_grad[:5]
        if dy is None:
            dy = torch.zeros_like(r)
        if ctx.plain:
            wanted = NormWanted(False, needs_x, *needs_parameters)
        else:
            # Without LayerScale and DropPath both gradients are the same tensor.
            shared = gamma is None and path is None and ctx.x_dtype == r.dtype
            wanted = NormWanted(needs_x and not shared, needs_residual or (needs_x and shared), *needs_parameters)
        dx, dresidual, *parameters = layer_norm_bwd(
            dy, dr, r, x, weight, gamma, path, mean, rstd, ctx.eps, ctx.x_dtype, list(wanted), ctx.rms, None,
            ctx.bias_dtype,
        )  # fmt: skip
        grads = [g if n else None for g, n in zip(parameters[:3], needs_parameters, strict=True)]
        if ctx.plain:
            dx, dresidual = dresidual, None
        else:
            dx = dresidual if shared else dx
            dresidual = dresidual.to(ctx.residual_dtype) if needs_residual else None
        return dx if needs_x else None, dresidual, *grads, None, None, None, None


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """Normalise ``x`` over its last dim: ``(x − mean) / √(var + eps) · weight + bias``.

    Args:
        x: (..., C), fp16, bf16, fp32 or fp64, any strides; leading dims may be empty.
        weight: (C,), ``x``'s dtype or fp32, or None for ones.
        bias: (C,), ``x``'s dtype or fp32, or None for zeros.
        eps: Added to the variance, ≥ 0.

    Returns:
        (..., C), contiguous, in ``x``'s dtype; under CUDA autocast in fp32, as in PyTorch.

    Raises:
        ValueError: A shape or device does not fit, C is 0, or eps is negative or NaN.
        TypeError: A dtype does not fit.
        NotImplementedError: A tensor is nested, sparse or quantized.

    Reference: arXiv 1607.06450.
    """
    return norm("layer_norm", x, weight, bias, eps)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    layer_scale: Tensor | None = None,
    drop_path_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Add a branch to the residual stream and normalise the sum, in one pass.

    ``r = residual + drop_path_scale[b] · layer_scale · x``, then LayerNorm over the last dim.

    Args:
        x: (B, ..., C), the branch's output; dtypes and strides as for :func:`layer_norm`.
        residual: The residual stream, of ``x``'s shape, in its dtype or a wider one.
        weight, bias, eps: As for :func:`layer_norm`.
        layer_scale: γ of LayerScale, (C,), any floating dtype, or None for ones.
        drop_path_scale: (B,), DropPath's 0 or 1/keep of each sample, or None for ones. It must not require a gradient.

    Returns:
        ``(normed, new_residual)``, both of ``x``'s shape and contiguous. The sum ``new_residual`` has the widest dtype
        of its terms and scales; ``normed`` has the dtype of the sum (fp32 under CUDA autocast).

    Raises:
        ValueError, TypeError: As for :func:`layer_norm`.
        NotImplementedError: ``drop_path_scale`` requires a gradient, or as for :func:`layer_norm`.

    Reference: arXiv 2103.17239 (LayerScale), 1603.09382 (DropPath).
    """
    return add_norm("add_layer_norm", x, residual, weight, bias, eps, layer_scale, drop_path_scale)


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float | None = 1e-6) -> Tensor:
    """Normalise ``x`` over its last dim: ``x / √(mean(x²) + eps) · weight``.

    As in ``torch.nn.functional.rms_norm``, the result is rounded once, after the weight. With half-precision inputs,
    timm and transformers also round before the weight.

    Args:
        x: (..., C), fp16, bf16, fp32 or fp64, any strides; leading dims may be empty.
        weight: (C,), ``x``'s dtype or fp32, or None for ones.
        eps: Added to the mean of squares, ≥ 0; None, as in PyTorch, for the machine epsilon of fp32 (fp64 for fp64).

    Returns:
        (..., C), contiguous, in ``x``'s dtype; under CUDA autocast in fp32, as in PyTorch.

    Raises:
        ValueError: A shape or device does not fit, C is 0, or eps is negative or NaN.
        TypeError: A dtype does not fit.
        NotImplementedError: A tensor is nested, sparse or quantized.

    Reference: arXiv 1910.07467.
    """
    op = "rms_norm"
    return norm(op, x, weight, None, _eps(op, eps, x=x), rms=True)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float | None = 1e-6,
    *,
    layer_scale: Tensor | None = None,
    drop_path_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Add a branch to the residual stream and normalise the sum by its root mean square, in one pass.

    ``r = residual + drop_path_scale[b] · layer_scale · x``, then RMSNorm over the last dim.

    Args:
        x, residual, layer_scale, drop_path_scale: As for :func:`vitkernels.ops.add_layer_norm`.
        weight, eps: As for :func:`rms_norm`.

    Returns:
        ``(normed, new_residual)``, as :func:`vitkernels.ops.add_layer_norm` gives them.

    Raises:
        ValueError, TypeError, NotImplementedError: As for :func:`vitkernels.ops.add_layer_norm`.

    Reference: arXiv 1910.07467, 2103.17239 (LayerScale), 1603.09382 (DropPath).
    """
    op = "add_rms_norm"
    eps = _eps(op, eps, x=x, residual=residual)
    return add_norm(op, x, residual, weight, None, eps, layer_scale, drop_path_scale, rms=True)


def norm(op: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, rms: bool = False) -> Tensor:
    """Implementation of the public ops ``layer_norm`` and ``rms_norm``; ``op`` is the name for errors."""
    check_tensor(op, "x", x)
    check_layer_norm(op, x, weight, bias, eps, dtypes_and_devices_match(x, weight, bias))
    if not uses_kernels(x):
        return _reference_norm(x, weight, bias, eps, rms)
    out_dtype = torch.promote_types(x.dtype, torch.float32) if autocasts(x) else None
    if needs_grad(x, weight, bias):
        return LayerNormFunction.apply(x, None, weight, bias, None, None, eps, out_dtype, rms)
    return layer_norm_fwd(x, None, weight, bias, None, None, eps, out_dtype, rms)[0]


def add_norm(
    op: str,
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    layer_scale: Tensor | None,
    drop_path_scale: Tensor | None,
    *,
    rms: bool = False,
) -> tuple[Tensor, Tensor]:
    """Implementation of the public ops ``add_layer_norm`` and ``add_rms_norm``; ``op`` is the name for errors."""
    tensors = (x, residual, weight, bias, layer_scale, drop_path_scale)
    check_tensor(op, "x", x)
    matched = residual is not None and dtypes_and_devices_match(x, residual, weight, bias, layer_scale)
    if not matched:
        check_like(op, "residual", residual, "x", x, dtype=False)
    check_shape(op, "residual", residual, x.shape, "x's shape")
    wider = residual if residual.dtype.itemsize >= x.dtype.itemsize else x
    check_layer_norm(op, wider, weight, bias, eps, matched)
    if layer_scale is not None:
        if not matched:
            check_like(op, "layer_scale", layer_scale, "x", x, dtype=False)
        check_shape(op, "layer_scale", layer_scale, x.shape[-1:], "the last dim of x")
    if drop_path_scale is not None:
        check_drop_path_scale(op, "drop_path_scale", drop_path_scale, x)
    if not uses_kernels(x):
        scales = {"layer_scale": layer_scale, "drop_path_scale": drop_path_scale}
        if rms:
            outputs = reference.add_rms_norm(x, residual, weight, eps, **scales)
        else:
            outputs = reference.add_layer_norm(x, residual, weight, bias, eps, **scales)
        return outputs[0].contiguous(), outputs[1].contiguous()
    out_dtype = None
    if autocasts(x):
        out_dtype = promoted_dtype(x, residual, layer_scale, drop_path_scale)
        out_dtype = torch.promote_types(out_dtype, torch.float32)
    if needs_grad(x, residual, weight, bias, layer_scale):
        return LayerNormFunction.apply(*tensors, eps, out_dtype, rms)
    return layer_norm_fwd(*tensors, eps, out_dtype, rms)[:2]


def _eps(op: str, eps: float | None, **inputs: Tensor) -> float:
    if eps is not None:
        return eps
    for name, tensor in inputs.items():
        check_tensor(op, name, tensor)
    return torch.finfo(wide_dtype(promoted_dtype(*inputs.values()))).eps


def autocasts(x: Tensor) -> bool:
    """Tell whether autocast is on and makes PyTorch's LayerNorm run in fp32: it does on a GPU, not on a CPU."""
    return runtime.device_type(x) != "cpu" and runtime.autocast_dtype(x) is not None


def check_layer_norm(op: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, matched: bool) -> None:
    """Require channels ≥ 1, parameters of that size, and a valid eps; ``matched``: see :func:`check_parameter`."""
    shape = x.shape
    if not shape or shape[-1] == 0:
        raise ValueError(f"{op}: x has shape {tuple(shape)}; expected at least one channel in the last dim")
    if weight is not None:
        check_parameter(op, "weight", weight, x, shape[-1], matched)
    if bias is not None:
        check_parameter(op, "bias", bias, x, shape[-1], matched)
    check_eps(op, "eps", eps)


def check_eps(op: str, name: str, eps: float) -> None:
    """Require ``eps`` to be a number ≥ 0."""
    if not check_number(op, name, eps, "a number ≥ 0") >= 0:
        raise ValueError(f"{op}: {name} is {eps}; expected a number ≥ 0")


def check_parameter(
    op: str, name: str, parameter: Tensor, x: Tensor, size: int, matched: bool, why: str = "the last dim of x"
) -> None:
    """Require a norm's parameter (size,) on ``x``'s device, in its dtype or, with half inputs, in fp32.

    ``matched`` is the result of :func:`dtypes_and_devices_match`; if True, only the shape is checked.
    """
    if not matched:
        check_like(op, name, parameter, "x", x, dtype=False)
        mixed = x.dtype.itemsize == 2 and parameter.dtype == torch.float32
        if parameter.dtype != x.dtype and not mixed and not autocasts(x):
            wanted = f"{x.dtype} or torch.float32" if x.dtype.itemsize == 2 else f"{x.dtype}"
            raise TypeError(f"{op}: {name} has dtype {parameter.dtype}, x has {x.dtype}; expected {wanted}")
    check_shape(op, name, parameter, (size,), why)
