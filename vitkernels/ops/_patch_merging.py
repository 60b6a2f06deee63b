"""Patch merging: 2 × 2 patches become one, which LayerNorm and a linear layer take from there.

Swin (arXiv 2103.14030):       out = norm(m) · weightᵀ + bias
Swin V2 (arXiv 2111.09883):    out = norm(m · weightᵀ + bias)
with                           m[y, x] = [x[2y, 2x], x[2y + 1, 2x], x[2y, 2x + 1], x[2y + 1, 2x + 1]]

m is never stored: Swin's LayerNorm reads its rows, and its backward writes their gradient, where the patches lie in the
image. In Swin V2 the product does so: it is a convolution with a stride of its kernel's size, as a patch embedding is.

Shapes: images (B, Y, X, C), features F. Saved for backward: Swin's x, statistics and normed rows; V2's x and product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitkernels import reference, runtime
from vitkernels.ops._checks import check_tensor, dtypes_and_devices_match
from vitkernels.ops._layer_norm import NormWanted, autocasts, check_eps, check_parameter, layer_norm
from vitkernels.ops._layer_norm.backward import layer_norm_backward, sum_dtypes
from vitkernels.ops._layer_norm.forward import forward_outputs, layer_norm_forward
from vitkernels.ops._linear import check_weights, linear
from vitkernels.ops._once import once_differentiable
from vitkernels.ops._patch_embed import patch_embed
from vitkernels.ops._registry import needs_grad, reference_gradients, register, uses_kernels


def _forward(x, weight, bias, eps, out_dtype=None):
    y, _, mean, rstd = layer_norm_forward(x, None, weight, bias, None, None, eps, out_dtype, merges=True)
    return y, mean, rstd


def _fake_forward(x, weight, bias, eps, out_dtype=None):
    y, _, mean, rstd = forward_outputs(x, None, weight, bias, None, None, eps, out_dtype, merges=True)
    return y, mean, rstd


def _reference_forward(x, weight, bias, eps, out_dtype=None):
    merged = reference.merge_patches(x)
    rows = merged.flatten(0, -2).to(runtime.wide_dtype(x.dtype))
    y = reference.layer_norm(merged.to(out_dtype or x.dtype), weight, bias, eps)
    return y.contiguous(), rows.mean(-1), (rows.var(-1, correction=0) + eps).rsqrt()


def _backward(dy, x, weight, mean, rstd, eps, needed, bias_dtype=None):
    wanted = NormWanted(False, *needed)
    _, dx, dweight, dbias, *_ = layer_norm_backward(
        dy, None, x, None, weight, None, None, mean, rstd, eps, x.dtype, list(wanted), bias_dtype=bias_dtype,
        merges=True,
    )  # fmt: skip
    return dx, dweight, dbias


def _fake_backward(dy, x, weight, mean, rstd, eps, needed, bias_dtype=None):
    dtypes = (x.dtype, *sum_dtypes(weight, None, rstd.dtype, bias_dtype, None)[:2])
    shapes = (x.shape, dy.shape[-1:], dy.shape[-1:])
    return tuple(
        torch.empty(shape if n else (0,), dtype=dtype, device=x.device)
        for shape, dtype, n in zip(shapes, dtypes, needed, strict=True)
    )


def _reference_backward(dy, x, weight, mean, rstd, eps, needed, bias_dtype=None):
    wide_x, wide_dy, wide_weight = (None if t is None else t.to(rstd.dtype) for t in (x, dy, weight))

    def norm(x, weight, bias):
        return reference.layer_norm(reference.merge_patches(x), weight, bias, eps)

    bias = torch.zeros(dy.shape[-1], dtype=rstd.dtype, device=x.device)
    grads = reference_gradients(norm, (wide_x, wide_weight, bias), (wide_dy,), needed)
    outputs = _fake_backward(dy, x, weight, mean, rstd, eps, needed, bias_dtype)
    return tuple(output.copy_(grad) for output, grad in zip(outputs, grads, strict=True))


_merge_norm_fwd = register(
    "merge_norm_fwd(Tensor x, Tensor? weight, Tensor? bias, float eps, ScalarType? out_dtype=None) "
    "-> (Tensor, Tensor, Tensor)",
    launcher=_forward,
    reference=_reference_forward,
    fake=_fake_forward,
    work="pass",
)
_merge_norm_bwd = register(
    "merge_norm_bwd(Tensor dy, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, float eps, bool[] needed, "
    "ScalarType? bias_dtype=None) -> (Tensor, Tensor, Tensor)",
    launcher=_backward,
    reference=_reference_backward,
    fake=_fake_backward,
)


class MergeNormFunction(torch.autograd.Function):
    """Autograd for the LayerNorm of merged patches."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps, out_dtype):
        y, mean, rstd = _merge_norm_fwd(x, weight, bias, eps, out_dtype)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.emulated = runtime.emulated_arch()
        ctx.eps, ctx.bias_dtype = eps, None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, saved, dy):
        x, weight, mean, rstd = saved
        needed = ctx.needs_input_grad[:3]
        grads = _merge_norm_bwd(dy, x, weight, mean, rstd, ctx.eps, list(needed), ctx.bias_dtype)
        return *(g if n else None for g, n in zip(grads, needed, strict=True)), None, None


def patch_merging(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    norm_last: bool = False,
) -> Tensor:
    """Merge every 2 × 2 patches of images into one: ``linear(layer_norm(merged))``, Swin's patch merging.

    Args:
        x: (B, Y, X, C), fp16, bf16, fp32 or fp64; B may be 0, Y, X and C may not. Images that are not contiguous are
            copied, and so are those with odd sides with ``norm_last``. Beside such images there are zeros.
        weight: (F, 4C) with F ≥ 1, ``x``'s dtype (any floating one under autocast): the upper left patch first, then
            that below.
        bias: (F,), or None.
        norm_weight, norm_bias: (4C,), with ``norm_last`` (F,); ``x``'s dtype or fp32, or None for ones and zeros.
        eps: Added to the variance, ≥ 0.
        norm_last: Normalise what the linear layer returns, as Swin V2 does.

    Returns:
        (B, ⌈Y/2⌉, ⌈X/2⌉, F), contiguous, in ``x``'s dtype; under autocast in autocast's, with ``norm_last`` as
        :func:`vitkernels.ops.layer_norm` returns it.

    Raises:
        ValueError: A shape or device does not fit, or eps is negative or NaN.
        TypeError: A dtype does not fit.
        NotImplementedError: A tensor is nested, sparse or quantized.

    Reference: arXiv 2103.14030 (Swin), 2111.09883 (Swin V2).
    """
    op = "patch_merging"
    check_tensor(op, "x", x)
    if x.ndim != 4 or 0 in x.shape[1:]:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}; expected (B, Y, X, C), and only B may be 0")
    _, Y, X, C = x.shape
    F = check_weights(
        op, "weight", weight, "bias", bias, x, 4 * C, dtypes_and_devices_match(x, weight, bias),
        runtime.autocast_dtype(x) is None,
    )  # fmt: skip
    size, why = (F, "the weight's rows") if norm_last else (4 * C, "the channels of four patches")
    matched = dtypes_and_devices_match(x, norm_weight, norm_bias)
    for name, parameter in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if parameter is not None:
            check_parameter(op, name, parameter, x, size, matched, why)
    check_eps(op, "eps", eps)
    if not uses_kernels(x):
        norm = {"norm_weight": norm_weight, "norm_bias": norm_bias, "eps": eps, "norm_last": norm_last}
        return reference.patch_merging(x, weight, bias, **norm)
    if norm_last:
        if Y % 2 or X % 2:
            x = torch.constant_pad_nd(x, (0, 0, 0, X % 2, 0, Y % 2))
        kernel = weight.unflatten(1, (2, 2, C)).permute(0, 3, 2, 1)
        out = patch_embed(x.permute(0, 3, 1, 2), kernel, bias)
        return layer_norm(out.unflatten(1, (-(-Y // 2), -(-X // 2))), norm_weight, norm_bias, eps)
    out_dtype = torch.promote_types(x.dtype, torch.float32) if autocasts(x) else None
    if needs_grad(x, norm_weight, norm_bias):
        normed = MergeNormFunction.apply(x, norm_weight, norm_bias, eps, out_dtype)
    else:
        normed = _merge_norm_fwd(x, norm_weight, norm_bias, eps, out_dtype)[0]
    return linear(normed, weight, bias)
