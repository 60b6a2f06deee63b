"""RMSNorm over the last dim, and residual + LayerScale + DropPath + RMSNorm in one pass.

LayerNorm without its mean and its bias (arXiv 1910.07467): the kernels, the equations and what is saved for backward
are those of layer_norm/, with no mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitkernels.ops._checks import check_tensor
from vitkernels.ops.layer_norm import add_norm, norm
from vitkernels.runtime import promoted_dtype, wide_dtype


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float | None = 1e-6) -> Tensor:
    """Normalise ``x`` over its last dim: ``x / √(mean(x²) + eps) · weight``.

    As ``torch.nn.functional.rms_norm``: the result is rounded once, after the weight. timm and transformers round
    half-precision inputs before the weight as well.

    Args:
        x: (..., C), fp16, bf16, fp32 or fp64, any strides; leading dims may be empty.
        weight: (C,), ``x``'s dtype or fp32, or None for ones.
        eps: Added to the mean of squares, ≥ 0; None, as in PyTorch, for the spacing of fp32 (fp64 for fp64) at 1.

    Returns:
        (..., C), contiguous, in ``x``'s dtype; under CUDA autocast in fp32, as PyTorch's does.

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


def _eps(op: str, eps: float | None, **inputs: Tensor) -> float:
    if eps is not None:
        return eps
    for name, tensor in inputs.items():
        check_tensor(op, name, tensor)
    return torch.finfo(wide_dtype(promoted_dtype(*inputs.values()))).eps
