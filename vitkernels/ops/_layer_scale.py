"""LayerScale of a linear layer without a pass over its activations: γ is folded into the weight.

Forward:     y = γ · (x Wᵀ + b) = x W'ᵀ + γ · b,  W' = γ ∘ W  (γ scales the rows)
Backward:    dW = γ ∘ dW',  dγⱼ = Σᵢ Wⱼᵢ dW'ⱼᵢ + bⱼ Σ dyⱼ,  db = γ · Σ dy

Shapes: weight (N, K), γ and b (N,). Source: LayerScale arXiv 2103.17239.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vitkernels.ops import _tile
from vitkernels.ops._registry import register
from vitkernels.ops._triton import tl, triton
from vitkernels.runtime import cdiv, dense_or, next_power_of_2, wide_dtype


@triton.jit
def _fold_layer_scale_kernel(
    weight_ptr,  # (N, K), contiguous
    gamma_ptr,  # (N,)
    folded_ptr,  # (N, K), contiguous: gamma / alpha · weight
    alpha_ptr,  # (1,), with FACTORED
    N,
    K,
    FACTORED: tl.constexpr,
    ACC: tl.constexpr,
    ALL_N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    blocks_k = tl.cdiv(K, BLOCK_K)
    offs_n = (tl.program_id(0) // blocks_k).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.program_id(0) % blocks_k * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_n = offs_n < N
    mask = mask_n[:, None] & (offs_k < K)[None, :]
    gamma = tl.load(gamma_ptr + offs_n, mask=mask_n, other=0.0).to(ACC)
    if FACTORED:
        offs_all = tl.arange(0, ALL_N)
        largest = tl.max(tl.abs(tl.load(gamma_ptr + offs_all, mask=offs_all < N, other=0.0).to(tl.float32)), axis=0)
        # Without its mantissa an fp32 number is a power of two.
        largest = tl.minimum(tl.maximum(largest, 1e-30), 1e38)
        alpha = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        gamma = gamma / alpha
        if tl.program_id(0) == 0:
            tl.store(alpha_ptr, alpha)
    weight = tl.load(weight_ptr + offs_n[:, None] * K + offs_k[None, :], mask=mask, other=0.0).to(ACC)
    folded = (gamma[:, None] * weight).to(folded_ptr.dtype.element_ty)
    tl.store(folded_ptr + offs_n[:, None] * K + offs_k[None, :], folded, mask=mask)


def fold_layer_scale(weight: Tensor, gamma: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return ``(W', alpha)`` with ``alpha · W' = γ ∘ W``; alpha, (1,) in fp32, is None if it would be 1.

    In fp16, LayerScale's initial γ = 1e-5 would make W' underflow. So alpha, a power of two, is factored out of γ: the
    largest |γ| left in W' lies between 1 and 2.
    """
    if gamma is None:
        return weight, None
    N, K = weight.shape
    factored = weight.dtype == torch.float16
    folded = torch.empty((N, K), dtype=weight.dtype, device=weight.device)
    alpha = torch.empty(1, dtype=torch.float32, device=weight.device) if factored else None
    block_k = min(1024, next_power_of_2(K))
    block_n = max(1, 2048 // block_k)
    _fold_layer_scale_kernel[(cdiv(N, block_n) * cdiv(K, block_k),)](
        weight_ptr=weight.contiguous(),
        gamma_ptr=gamma.contiguous(),
        folded_ptr=folded,
        alpha_ptr=alpha if factored else folded,
        N=N,
        K=K,
        FACTORED=factored,
        ACC=_tile.accumulator(weight.dtype),
        ALL_N=next_power_of_2(N),
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=4,
    )
    return folded, alpha


@triton.jit
def _layer_scale_bwd_kernel(
    dfolded_ptr,  # (N, K), contiguous, fp32 (fp64)
    weight_ptr,  # (N, K), contiguous, with NEEDS_DGAMMA
    gamma_ptr,  # (N,)
    bias_ptr,  # (N,), with HAS_BIAS and NEEDS_DGAMMA
    dy_sum_ptr,  # (N,), sums of dy over rows, with HAS_BIAS
    dweight_ptr,  # (N, K), contiguous, with NEEDS_DWEIGHT
    dbias_ptr,  # (N,), with NEEDS_DBIAS
    dgamma_ptr,  # (N,), with NEEDS_DGAMMA
    N,
    K,
    HAS_BIAS: tl.constexpr,
    NEEDS_DWEIGHT: tl.constexpr,
    NEEDS_DBIAS: tl.constexpr,
    NEEDS_DGAMMA: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    gamma = tl.load(gamma_ptr + offs_n, mask=mask_n, other=0.0).to(ACC)
    total = tl.zeros((BLOCK_N, BLOCK_K), ACC)
    if NEEDS_DWEIGHT or NEEDS_DGAMMA:
        for first_k in range(0, K, BLOCK_K):
            offs_k = first_k + tl.arange(0, BLOCK_K)
            mask = mask_n[:, None] & (offs_k < K)[None, :]
            offs = offs_n[:, None] * K + offs_k[None, :]
            dfolded = tl.load(dfolded_ptr + offs, mask=mask, other=0.0).to(ACC)
            if NEEDS_DWEIGHT:
                dweight = gamma[:, None] * dfolded
                tl.store(dweight_ptr + offs, dweight.to(dweight_ptr.dtype.element_ty), mask=mask)
            if NEEDS_DGAMMA:
                total += tl.load(weight_ptr + offs, mask=mask, other=0.0).to(ACC) * dfolded
    if NEEDS_DBIAS or (HAS_BIAS and NEEDS_DGAMMA):
        dy_sum = tl.load(dy_sum_ptr + offs_n, mask=mask_n, other=0.0).to(ACC)
    if NEEDS_DBIAS:
        tl.store(dbias_ptr + offs_n, (gamma * dy_sum).to(dbias_ptr.dtype.element_ty), mask=mask_n)
    if NEEDS_DGAMMA:
        dgamma = tl.sum(total, axis=1)
        if HAS_BIAS:
            dgamma += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(ACC) * dy_sum
        tl.store(dgamma_ptr + offs_n, dgamma.to(dgamma_ptr.dtype.element_ty), mask=mask_n)


class LayerScaleWanted(NamedTuple):
    """Which gradients are wanted of a layer that is scaled, in the order in which they come."""

    dweight: bool = False
    dbias: bool = False
    dgamma: bool = False


def layer_scale_backward(dfolded, weight, gamma, bias, dy_sum, needed, dtype=None):
    """Launch the backward; return the gradients named by :class:`LayerScaleWanted`, each empty unless ``needed``.

    Args:
        dfolded: (N, K), dW', fp32 (fp64 for fp64); read only for the gradients of W and γ.
        weight, gamma, bias: (N, K), (N,), and (N,) or None.
        dy_sum: (N,), Σ dy over rows; required for the gradient of b, and for that of γ if there is a bias.
        dtype: Dtype of the gradients of W and b; the weight's if None. That of γ has γ's.
    """
    outputs = _fake_backward(dfolded, weight, gamma, bias, dy_sum, needed, dtype)
    wanted = LayerScaleWanted(*needed)
    N, K = weight.shape
    block_k = min(1024, next_power_of_2(K))
    block_n = max(1, 1024 // block_k)
    _layer_scale_bwd_kernel[(cdiv(N, block_n),)](
        dfolded_ptr=dfolded,
        weight_ptr=weight.contiguous(),
        gamma_ptr=gamma.contiguous(),
        bias_ptr=dense_or(bias, gamma),
        dy_sum_ptr=dense_or(dy_sum, gamma),
        dweight_ptr=outputs[0],
        dbias_ptr=outputs[1],
        dgamma_ptr=outputs[2],
        N=N,
        K=K,
        HAS_BIAS=bias is not None,
        NEEDS_DWEIGHT=wanted.dweight,
        NEEDS_DBIAS=wanted.dbias,
        NEEDS_DGAMMA=wanted.dgamma,
        ACC=_tile.accumulator(weight.dtype),
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=4,
    )
    return outputs


def _fake_backward(dfolded, weight, gamma, bias, dy_sum, needed, dtype=None):
    dtype = dtype or weight.dtype
    shapes, dtypes = (weight.shape, weight.shape[:1], gamma.shape), (dtype, dtype, gamma.dtype)
    return tuple(
        torch.empty(shape if n else (0,), dtype=dtype, device=weight.device)
        for shape, dtype, n in zip(shapes, dtypes, needed, strict=True)
    )


def _reference_backward(dfolded, weight, gamma, bias, dy_sum, needed, dtype=None):
    outputs = _fake_backward(dfolded, weight, gamma, bias, dy_sum, needed, dtype)
    wanted = LayerScaleWanted(*needed)
    wide_gamma = gamma.to(wide_dtype(weight.dtype))
    if wanted.dweight:
        outputs[0].copy_(wide_gamma[:, None] * dfolded)
    if wanted.dbias:
        outputs[1].copy_(wide_gamma * dy_sum)
    if wanted.dgamma:
        dgamma = (weight * dfolded).sum(1)
        outputs[2].copy_(dgamma if bias is None else dgamma + bias * dy_sum)
    return outputs


layer_scale_bwd = register(
    "layer_scale_bwd(Tensor dfolded, Tensor weight, Tensor gamma, Tensor? bias, Tensor? dy_sum, bool[] needed, "
    "ScalarType? dtype=None) -> (Tensor, Tensor, Tensor)",
    launcher=layer_scale_backward,
    reference=_reference_backward,
    fake=_fake_backward,
)
