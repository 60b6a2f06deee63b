"""FP8's ops as functions of plain tensors that return plain tensors, and their references, by the names of their ops.

What is rounded to e4m3 before an op is rounded by the reference, in fp32: our result, PyTorch's and the truth in fp64
begin with the same operands. What an op itself rounds to e4m3 is given back as values · scale, and is not rounded in
the truth: a value beside a tie may go either way, and is as far from the truth on both sides. The scale, by which a
row was divided, is a result of its own, and no coarser than any in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitkernels import ops, reference

E4M3 = torch.float8_e4m3fn
NAMES = ("quantize_fp8", "layer_norm_fp8", "add_layer_norm_fp8", "linear_fp8")


def call_op(op: str, /, **arguments) -> tuple[Tensor, ...]:
    """Call the public function ``op``.

    Args:
        op: One of :data:`NAMES`.
        **arguments: Tensors and options by the function's names. For ``linear_fp8``, ``x`` and ``weight`` are in fp16,
            bf16 or fp32, and are quantized here; ``grouped`` gives ``x`` a scale for each 128 features, and
            ``quantized`` asks for a result in e4m3, else in ``x``'s dtype.

    Returns:
        A result in e4m3 as two tensors in fp32: values · scale, of its shape, and the scales (groups, ...); and what
        the function returns beside it.
    """
    if op == "linear_fp8":
        x, weight, dtype = _operands(arguments)
        result = ops.linear_fp8(ops.Fp8(*x), ops.Fp8(*weight), dtype=dtype, **arguments)
    else:
        result = getattr(ops, op)(**arguments)
    if isinstance(result, Tensor):
        return (result,)
    quantized, *more = (result,) if isinstance(result, ops.Fp8) else result
    return reference.dequantize_fp8(*quantized), quantized.scale, *more


def call_reference(op: str, /, **arguments) -> tuple[Tensor, ...]:
    """Compute in plain PyTorch what :func:`call_op` does; of tensors in fp64 the truth, whose result is not rounded."""
    x = arguments["x"]
    wide = torch.promote_types(x.dtype, torch.float32)
    if op == "linear_fp8":
        *operands, dtype = _operands(arguments)
        y = reference.linear_fp8(*((values, scale.to(wide)) for values, scale in operands), **arguments)
        return _rounded(y, reference.E4M3_GROUP) if dtype == E4M3 else (y.to(dtype),)
    more = ()
    if op == "add_layer_norm_fp8":
        added = {name: arguments.pop(name) for name in ("residual", "layer_scale") if name in arguments}
        x = reference.add_layer_norm(x, **added)[1]
        more = (x,)
    y = x.to(wide)
    if op != "quantize_fp8":
        affine = {n: t.to(wide) for n in ("weight", "bias") if (t := arguments.get(n)) is not None}
        y = reference.layer_norm(y, **affine, eps=arguments["eps"])
    return *_rounded(y, None), *more


def _operands(arguments: dict) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], torch.dtype]:
    """Take both operands out of ``arguments``, quantized, and the dtype of the result."""
    x, weight = arguments.pop("x"), arguments.pop("weight")
    group = reference.E4M3_GROUP if arguments.pop("grouped", False) else None
    dtype = E4M3 if arguments.pop("quantized", False) else x.dtype
    return reference.quantize_fp8(x.float(), group), reference.quantize_fp8(weight.float()), dtype


def _rounded(y: Tensor, group: int | None) -> tuple[Tensor, Tensor]:
    values, scale = reference.quantize_fp8(y, group)
    return y if y.dtype == torch.float64 else reference.dequantize_fp8(values, scale), scale
