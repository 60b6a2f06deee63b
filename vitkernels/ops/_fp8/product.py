"""The product of two operands in e4m3, with both sides' scales, bias, activation, LayerScale and residual.

Hopper's tensor cores keep about 14 bits of what they sum in fp8 (DeepSeek-V3, arXiv 2412.19437, section 3.3.2). So
they sum 128 products, and CUDA cores add the partial sums in fp32, as DeepGEMM and CUTLASS's "slow accumulation" do. A
second accumulator takes 64 registers a thread. Where the operand has a scale for each 128 channels, the partial sums
are multiplied by it on the way. sm_100 sums fp8 in fp32: there only such operands take partial sums.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from vitkernels import reference, runtime, tuning
from vitkernels.ops import _tile
from vitkernels.ops._fp8.rows import arch_limit, quantize
from vitkernels.ops._product import _tile_of_program
from vitkernels.ops._triton import tl, triton
from vitkernels.runtime import DeviceFacts, cdiv, dense_or, unit_stride

GROUP = reference.E4M3_GROUP


@dataclasses.dataclass(frozen=True)
class ProductFp8Config:
    """Rows of a tile, warps and pipeline stages. A tile has 128 columns, those of one scale of its e4m3 result."""

    block_m: int
    num_warps: int
    num_stages: int


def choose_config(M: int, N: int, K: int, facts: DeviceFacts) -> ProductFp8Config:
    """Choose a configuration for an (M, K) by (N, K) product: a heuristic, overridden by the tuning table."""
    block_m = 128 if cdiv(M, 128) * cdiv(N, GROUP) >= facts.num_sms else 64
    # The registers of two accumulators let one program of 8 warps, or three of 4, run on a multiprocessor of sm_90.
    room = facts.shared_memory if block_m == 128 else facts.shared_memory // 3
    config = {
        "block_m": block_m,
        "num_warps": block_m // 16,
        "num_stages": max(2, min(4, room // ((block_m + GROUP) * GROUP))),
    }
    config |= tuning.lookup("linear_fp8", facts.name, f"N={N},K={K}") or {}
    return ProductFp8Config(**config)


@triton.jit(do_not_specialize=["M"])
def _product_fp8_kernel(
    x_ptr,  # (M, K), contiguous, e4m3
    x_scale_ptr,  # (1 or blocks of K, M), contiguous
    weight_ptr,  # (N, K), contiguous, e4m3
    weight_scale_ptr,  # (N,)
    bias_ptr,  # (N,)
    gamma_ptr,  # (N,), LayerScale
    residual_ptr,  # (M, N)
    y_ptr,  # (M, N), contiguous, e4m3 with QUANTIZE
    y_scale_ptr,  # (blocks of N, M), contiguous, with QUANTIZE
    stride_residual_row,
    M,
    N,
    K,
    GROUPED: tl.constexpr,
    PARTIAL_SUMS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_GAMMA: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    QUANTIZE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pid_m, pid_n = _tile_of_program(M, N, BLOCK_M, BLOCK_N)
    first_m, first_n = pid_m * BLOCK_M, pid_n * BLOCK_N
    offs_m, offs_n, offs_k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    mask_m, mask_n = offs_m < M - first_m, offs_n < N - first_n
    x_ptrs = x_ptr + first_m * K + offs_m[:, None] * K + offs_k[None, :]
    weight_ptrs = weight_ptr + first_n * K + offs_n[None, :] * K + offs_k[:, None]
    x_scale_ptrs = x_scale_ptr + first_m + offs_m
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs, mask=mask_m[:, None], other=0.0)
            weight = tl.load(weight_ptrs, mask=mask_n[None, :], other=0.0)
        else:
            mask_k = offs_k < K - start
            x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
            weight = tl.load(weight_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        if PARTIAL_SUMS:
            partial = tl.dot(x, weight)
            if GROUPED:
                partial *= tl.load(x_scale_ptrs, mask=mask_m, other=0.0)[:, None]
                x_scale_ptrs += M
            acc += partial
        else:
            acc = tl.dot(x, weight, acc)
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K
    if not GROUPED:
        acc *= tl.load(x_scale_ptrs, mask=mask_m, other=0.0)[:, None]
    y = acc * tl.load(weight_scale_ptr + first_n + offs_n, mask=mask_n, other=0.0)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + first_n + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    y = _tile.activate(y, ACTIVATION)
    if HAS_GAMMA:
        y *= tl.load(gamma_ptr + first_n + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    mask = mask_m[:, None] & mask_n[None, :]
    if HAS_RESIDUAL:
        residual_ptrs = residual_ptr + first_m * stride_residual_row + first_n
        residual_ptrs += offs_m[:, None] * stride_residual_row + offs_n[None, :]
        y += tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
    y_ptrs = y_ptr + first_m * N + first_n + offs_m[:, None] * N + offs_n[None, :]
    if QUANTIZE:
        q, scale = quantize(y)  # columns beyond N are zero
        tl.store(y_ptrs, q, mask=mask)
        tl.store(y_scale_ptr + pid_n * M + first_m + offs_m, scale, mask=mask_m)
    else:
        tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask)


def product_fp8(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Launch; return ``(y, scale)``, scale empty unless ``out_dtype`` is float8_e4m3fn."""
    y, scale = outputs(x, x_scale, weight, weight_scale, bias, gamma, residual, activation, out_dtype)
    if y.numel() == 0:
        return y, scale
    (N, K), facts = weight.shape, runtime.device_facts(x.device)
    M = x.numel() // K
    reason = arch_limit(x.device)
    if reason is not None:
        raise NotImplementedError(f"linear_fp8: {reason}")
    config, grouped = choose_config(M, N, K, facts), x_scale.shape[0] > 1
    residual = x if residual is None else unit_stride(residual.reshape(M, N))
    _product_fp8_kernel[(cdiv(M, config.block_m) * cdiv(N, GROUP),)](
        x_ptr=x.contiguous(),
        x_scale_ptr=x_scale.contiguous(),
        weight_ptr=weight.contiguous(),
        weight_scale_ptr=weight_scale.contiguous(),
        bias_ptr=dense_or(bias, x_scale),
        gamma_ptr=dense_or(gamma, x_scale),
        residual_ptr=residual,
        y_ptr=y,
        y_scale_ptr=scale,
        stride_residual_row=residual.stride(-2) if residual is not x else 0,
        M=M,
        N=N,
        K=K,
        GROUPED=grouped,
        PARTIAL_SUMS=grouped or not facts.arch.startswith("sm_10"),
        HAS_BIAS=bias is not None,
        HAS_GAMMA=gamma is not None,
        HAS_RESIDUAL=residual is not x,
        QUANTIZE=y.dtype == torch.float8_e4m3fn,
        ACTIVATION=activation or "none",
        EVEN_K=K % GROUP == 0,
        BLOCK_M=config.block_m,
        BLOCK_N=GROUP,
        BLOCK_K=GROUP,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return y, scale


def outputs(x, x_scale, weight, weight_scale, bias, gamma, residual, activation, out_dtype):
    """Allocate the outputs of :func:`product_fp8`."""
    lead, N = x.shape[:-1], weight.shape[0]
    groups = cdiv(N, GROUP) if out_dtype == torch.float8_e4m3fn else 0
    scale = torch.empty((groups, *lead) if groups else (0,), dtype=torch.float32, device=x.device)
    return torch.empty((*lead, N), dtype=out_dtype, device=x.device), scale


def reference_product(x, x_scale, weight, weight_scale, bias, gamma, residual, activation, out_dtype):
    """Compute in PyTorch what :func:`product_fp8` computes."""
    y = reference.linear_fp8(
        (x, x_scale), (weight, weight_scale), bias, activation=activation, residual=residual, layer_scale=gamma
    )
    if out_dtype == torch.float8_e4m3fn:
        return reference.quantize_fp8(y, GROUP)
    return y.to(out_dtype).contiguous(), x_scale.new_empty(0)
