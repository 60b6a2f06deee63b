"""Products in FP8 for inference: e4m3 operands with fp32 scales, and the passes that make these operands.

Quantized:   values = round(x · 448 / a),  scale = a / 448,  a = max |x| over a row (or over 128 channels of it)
Product:     z = scale_x · scale_W · Σ x̂ Ŵ + b,  y = residual + γ · act(z)
e4m3 has 3 bits of mantissa and ends at 448 (arXiv 2209.05433). A scale is taken from the tensor at hand, never from
calibration. Weights have one scale for each output channel; activations one for each row or, where a product writes
them, one for each row and 128 columns: a program knows its own tile of 128 columns, not the whole row.

Why so, by the bytes of M rows of F features: were act(fc1) quantized by a pass of its own, fc1 would write 2, the pass
read 2 and write 1, and fc2 read 1: 6·M·F bytes. In the epilogue it is 2·M·F, and bf16 takes 4·M·F. The rows of a
LayerNorm are quantized where they are made: 1 byte written in place of 2, and 1 read by each product of them.
Attention's output takes a pass of its own (4·M·C bytes from there to the product, bf16's 2·M·C): its kernels are not
changed, and the projection gains more than that.

Shapes: rows M (all leading dims), N output features, K input features, C channels. Products need K divisible by 16,
the bytes of a vector load; M and N are free. Sums are fp32 (see product.py). There is no backward.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vitkernels import reference
from vitkernels.ops._checks import check_like, check_shape, check_tensor, dtypes_and_devices_match
from vitkernels.ops._fp8 import product, rows
from vitkernels.ops._layer_norm import check_layer_norm
from vitkernels.ops._linear import check_activation
from vitkernels.ops._registry import needs_grad, register, uses_kernels

E4M3 = torch.float8_e4m3fn
INPUTS = (torch.float16, torch.bfloat16, torch.float32)

rows_fp8 = register(
    "rows_fp8(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? gamma, float? eps) "
    "-> (Tensor, Tensor, Tensor)",
    launcher=rows.rows_fp8,
    reference=rows.reference_rows,
    fake=rows.outputs,
    work="pass",
)
product_fp8 = register(
    "product_fp8(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor? bias, Tensor? gamma, "
    "Tensor? residual, str? activation, ScalarType out_dtype) -> (Tensor, Tensor)",
    launcher=product.product_fp8,
    reference=product.reference_product,
    fake=product.outputs,
    work="linear",
)


class Fp8(NamedTuple):
    """A tensor in e4m3.

    Attributes:
        values: (..., C), float8_e4m3fn, contiguous.
        scale: (groups, ...), fp32, contiguous: one scale for each row (1 group), or one for each 128 channels of it.
    """

    values: Tensor
    scale: Tensor


def quantize_fp8(x: Tensor) -> Fp8:
    """Round the rows of ``x`` to e4m3, with one scale each: the largest magnitude of a row becomes 448.

    A row of zeros stays zero. A row with a NaN or an infinity becomes NaN in every product. Magnitudes below 2⁻¹⁰⁰ may
    become zero.

    Args:
        x: (..., C), fp16, bf16 or fp32, any strides; leading dims may be empty. A weight (out features, in features)
            gets one scale for each output channel.

    Returns:
        ``values`` of ``x``'s shape and ``scale`` of shape (1, ...).

    Raises:
        ValueError: C is 0.
        TypeError: The dtype does not fit.
        NotImplementedError: C is above 8192, ``x`` requires a gradient, or the GPU has no e4m3 (before sm_89, AMD's).

    Reference: arXiv 2209.05433.
    """
    op = "quantize_fp8"
    check_tensor(op, "x", x, dtypes=INPUTS)
    if not x.ndim or x.shape[-1] == 0:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}; expected at least one channel in the last dim")
    return _rows(op, x, None, None, None, None, None)[0]


def layer_norm_fp8(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-6) -> Fp8:
    """:func:`quantize_fp8` of :func:`vitkernels.ops.layer_norm`, in one pass and without rounding in between.

    Args:
        x: (..., C), fp16, bf16 or fp32, any strides; leading dims may be empty.
        weight, bias, eps: As for :func:`vitkernels.ops.layer_norm`.

    Returns:
        ``values`` of ``x``'s shape and ``scale`` of shape (1, ...).

    Raises:
        ValueError, TypeError: As for :func:`vitkernels.ops.layer_norm`.
        NotImplementedError: C is above 8192, a tensor requires a gradient, or the GPU has no e4m3.

    Reference: arXiv 1607.06450, 2209.05433.
    """
    op = "layer_norm_fp8"
    check_tensor(op, "x", x, dtypes=INPUTS)
    check_layer_norm(op, x, weight, bias, eps, dtypes_and_devices_match(x, weight, bias))
    return _rows(op, x, None, weight, bias, None, float(eps))[0]


def add_layer_norm_fp8(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    layer_scale: Tensor | None = None,
) -> tuple[Fp8, Tensor]:
    """Add a branch to the residual stream, and return :func:`layer_norm_fp8` of the sum beside the sum, in one pass.

    Args:
        x: (..., C), the branch's output; dtypes and strides as for :func:`layer_norm_fp8`.
        residual: The residual stream, of ``x``'s shape, in its dtype or a wider one.
        weight, bias, eps: As for :func:`layer_norm_fp8`.
        layer_scale: γ of LayerScale, (C,), fp16, bf16 or fp32, or None for ones.

    Returns:
        ``(normed, residual + layer_scale · x)``; the sum has the widest dtype of its terms.

    Raises:
        ValueError, TypeError, NotImplementedError: As for :func:`layer_norm_fp8`.

    Reference: arXiv 1607.06450, 2103.17239 (LayerScale), 2209.05433.
    """
    op = "add_layer_norm_fp8"
    check_tensor(op, "x", x, dtypes=INPUTS)
    matched = residual is not None and dtypes_and_devices_match(x, residual, weight, bias, layer_scale)
    for name, tensor in (("residual", residual), ("layer_scale", layer_scale)):
        if not matched and (tensor is not None or name == "residual"):
            check_tensor(op, name, tensor, dtypes=INPUTS)
            check_like(op, name, tensor, "x", x, dtype=False)
    check_shape(op, "residual", residual, x.shape, "x's shape")
    wider = residual if residual.dtype.itemsize >= x.dtype.itemsize else x
    check_layer_norm(op, wider, weight, bias, eps, matched)
    if layer_scale is not None:
        check_shape(op, "layer_scale", layer_scale, x.shape[-1:], "the last dim of x")
    return _rows(op, x, residual, weight, bias, layer_scale, float(eps))


def _rows(op, x, residual, weight, bias, gamma, eps) -> tuple[Fp8, Tensor]:
    if x.shape[-1] > rows.MAX_ROW:
        raise NotImplementedError(f"{op}: rows have {x.shape[-1]} channels; the kernel takes up to {rows.MAX_ROW}")
    tensors = (x, residual, weight, bias, gamma)
    _without_gradients(op, *tensors)
    values, scale, total = (rows_fp8 if uses_kernels(x) else rows.reference_rows)(*tensors, eps)
    return Fp8(values, scale), total


def linear_fp8(
    x: Fp8,
    weight: Fp8,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    layer_scale: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor | Fp8:
    """Compute ``residual + layer_scale · activation(x Wᵀ + bias)`` of e4m3 operands in one pass, for inference.

    Args:
        x: Values (..., K) and scales, as of :func:`layer_norm_fp8`, :func:`quantize_fp8` or this function. K is
            divisible by 16; leading dims may be empty.
        weight: Values (N, K) and scales (1, N), as of :func:`quantize_fp8`.
        bias: (N,), fp16, bf16 or fp32, or None.
        activation: ``gelu`` (with erf), ``gelu_tanh``, ``quick_gelu`` (x·σ(1.702 x)), ``silu`` or None.
        residual: (..., N), fp16, bf16 or fp32, or None.
        layer_scale: γ of LayerScale, (N,), fp16, bf16 or fp32, or None.
        dtype: Of the result: bfloat16, float16, float32, or float8_e4m3fn for the next product's operand.

    Returns:
        (..., N), contiguous, in ``dtype``; for float8_e4m3fn an :class:`Fp8`, with one scale for each row and 128
        columns.

    Raises:
        ValueError: A shape, device or activation does not fit.
        TypeError: A dtype does not fit, or ``x`` or ``weight`` is not a pair.
        NotImplementedError: K is not divisible by 16, a tensor requires a gradient, or the GPU has no e4m3 products
            (before sm_89, AMD's).

    Reference: arXiv 2209.05433 (e4m3), 2412.19437, section 3.3 (scales of 128 channels, sums in fp32).
    """
    op = "linear_fp8"
    lead, K = _check_operand(op, "x", x)
    (N, width), G = _check_operand(op, "weight", weight), weight[1].shape[0]
    if len(N) != 1 or width != K or N[0] == 0 or G != 1:
        raise ValueError(
            f"{op}: the weight's values have shape {tuple(weight[0].shape)}, its scale {tuple(weight[1].shape)}; "
            f"expected (out features, {K}) and (1, out features)"
        )
    if K % 16:
        raise NotImplementedError(f"{op}: x has {K} features; products in FP8 take a multiple of 16")
    check_activation(op, activation)
    if dtype not in (*INPUTS, E4M3):
        raise TypeError(f"{op}: dtype is {dtype}; expected bfloat16, float16, float32 or float8_e4m3fn")
    expected = {"bias": (bias, N, "the rows of weight"), "residual": (residual, (*lead, *N), "the output's shape"),
                "layer_scale": (layer_scale, N, "the output's width")}  # fmt: skip
    for name, (tensor, shape, why) in expected.items():
        if tensor is not None:
            check_tensor(op, name, tensor, dtypes=INPUTS)
            check_like(op, name, tensor, "x's scale", x[1], dtype=False)
            check_shape(op, name, tensor, shape, why)
    if weight[0].device != x[0].device:
        raise ValueError(f"{op}: weight is on {weight[0].device}, x on {x[0].device}; expected one device")
    tensors = (*x, *weight, bias, layer_scale, residual)
    _without_gradients(op, *tensors)
    run = product_fp8 if uses_kernels(x[0]) else product.reference_product
    y, scale = run(*tensors, activation, dtype)
    return Fp8(y, scale) if dtype == E4M3 else y


def _check_operand(op: str, name: str, operand: Fp8) -> tuple[torch.Size, int]:
    """Require values in e4m3 with scales that fit; return the leading dims and the features."""
    if not isinstance(operand, tuple) or len(operand) != 2:
        raise TypeError(f"{op}: {name} is a {type(operand).__name__}; expected an Fp8, values and scale")
    values, scale = operand
    check_tensor(op, f"{name}'s values", values, dtypes=(E4M3,))
    check_tensor(op, f"{name}'s scale", scale, dtypes=(torch.float32,))
    if not values.ndim or values.shape[-1] == 0:
        raise ValueError(f"{op}: {name} has shape {tuple(values.shape)}; expected at least one feature in the last dim")
    lead, K = values.shape[:-1], values.shape[-1]
    groups = -(-K // reference.E4M3_GROUP)
    if scale.shape not in ((1, *lead), (groups, *lead)):
        raise ValueError(
            f"{op}: {name}'s scale has shape {tuple(scale.shape)}; expected {(1, *lead)}, or {(groups, *lead)} of "
            f"values of shape {tuple(values.shape)}"
        )
    if scale.device != values.device:
        raise ValueError(f"{op}: {name}'s scale is on {scale.device}, its values on {values.device}")
    return lead, K


def _without_gradients(op: str, *tensors: Tensor | None) -> None:
    if needs_grad(*tensors):
        raise NotImplementedError(
            f"{op}: a tensor requires a gradient, and FP8 is for inference: there is no backward; call it within "
            "torch.no_grad() or torch.inference_mode()"
        )
