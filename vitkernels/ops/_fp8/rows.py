"""Rows in e4m3 with their scales: of a tensor, of its LayerNorm, or of the LayerNorm of a residual sum."""

from __future__ import annotations

import torch
from torch import Tensor

from vitkernels import reference, runtime
from vitkernels.ops._layer_norm.config import choose_config
from vitkernels.ops._triton import tl, triton
from vitkernels.runtime import as_rows, cdiv, dense_or, next_power_of_2, promoted_dtype

MAX_ROW = 8192  # a program holds whole rows: the scale is known only once all of a row is

LARGEST = tl.constexpr(reference.E4M3_LARGEST)
SMALLEST_ROW = tl.constexpr(reference.E4M3_SMALLEST_ROW)


@triton.jit
def quantize(y):
    """Return the rows of an fp32 tile in e4m3, and their scales.

    The largest magnitude is taken of the bits, where a NaN exceeds infinity: a row with a NaN gets the scale NaN, as in
    the reference. A floating-point maximum would pass it over.
    """
    bits = y.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    largest = tl.max(bits, axis=1).to(tl.float32, bitcast=True)
    largest = tl.maximum(largest, SMALLEST_ROW, propagate_nan=tl.PropagateNan.ALL)
    y *= tl.div_rn(tl.full(largest.shape, LARGEST, tl.float32), largest)[:, None]
    return y.to(tl.float8e4nv), tl.div_rn(largest, tl.full(largest.shape, LARGEST, tl.float32))


@triton.jit(do_not_specialize=["M"])
def _rows_fp8_kernel(
    x_ptr,  # (M, C)
    residual_ptr,  # (M, C), with HAS_RESIDUAL
    weight_ptr,  # (C,)
    bias_ptr,  # (C,)
    gamma_ptr,  # (C,), LayerScale
    q_ptr,  # (M, C), contiguous, e4m3
    scale_ptr,  # (M,)
    r_ptr,  # (M, C), contiguous, with HAS_RESIDUAL
    stride_x_row,
    stride_residual_row,
    M,
    C,
    eps: tl.constexpr,
    NORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_GAMMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = tl.arange(0, BLOCK_C)
    mask_m, mask_c = offs_m < M, offs_c < C
    mask = mask_m[:, None] & mask_c[None, :]
    offs_out = offs_m[:, None] * C + offs_c[None, :]
    y = tl.load(x_ptr + offs_m[:, None] * stride_x_row + offs_c[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        if HAS_GAMMA:
            y *= tl.load(gamma_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)[None, :]
        residual_ptrs = residual_ptr + offs_m[:, None] * stride_residual_row + offs_c[None, :]
        y += tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
        r = y.to(r_ptr.dtype.element_ty)
        tl.store(r_ptr + offs_out, r, mask=mask)
        y = r.to(tl.float32)  # as add_layer_norm does, which normalises the rounded sum
    if NORM:
        mean = tl.sum(y, axis=1) / C
        y = tl.where(mask, y - mean[:, None], 0.0)
        y *= (1.0 / tl.sqrt(tl.sum(y * y, axis=1) / C + eps))[:, None]
        if HAS_WEIGHT:
            y *= tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)[None, :]
        if HAS_BIAS:
            y += tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)[None, :]
    q, scale = quantize(y)
    tl.store(q_ptr + offs_out, q, mask=mask)
    tl.store(scale_ptr + offs_m, scale, mask=mask_m)


def rows_fp8(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    gamma: Tensor | None,
    eps: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch; return ``(values, scale, sum)``. There is no norm if eps is None; sum is empty without a residual."""
    q, scale, r = outputs(x, residual, weight, bias, gamma, eps)
    if x.numel() == 0:
        return q, scale, r
    reason = arch_limit(x.device)
    if reason is not None:
        raise NotImplementedError(f"{'quantize_fp8' if eps is None else 'layer_norm_fp8'}: {reason}")
    rows = as_rows(x)
    M, C = rows.shape
    residual_rows = rows if residual is None else as_rows(residual)
    config = choose_config(M, C, runtime.device_facts(x.device))
    _rows_fp8_kernel[(cdiv(M, config.block_m),)](
        x_ptr=rows,
        residual_ptr=residual_rows,
        weight_ptr=dense_or(weight, rows),
        bias_ptr=dense_or(bias, rows),
        gamma_ptr=dense_or(gamma, rows),
        q_ptr=q,
        scale_ptr=scale,
        r_ptr=r,
        stride_x_row=rows.stride(0),
        stride_residual_row=residual_rows.stride(0),
        M=M,
        C=C,
        eps=0.0 if eps is None else eps,
        NORM=eps is not None,
        HAS_RESIDUAL=residual is not None,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        HAS_GAMMA=gamma is not None,
        BLOCK_M=config.block_m,
        BLOCK_C=next_power_of_2(C),  # the whole row
        num_warps=config.num_warps,
    )
    return q, scale, r


def outputs(x, residual, weight, bias, gamma, eps):
    """Allocate the outputs of :func:`rows_fp8`."""
    q = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty((1, *x.shape[:-1]), dtype=torch.float32, device=x.device)
    r_shape = (0,) if residual is None else x.shape
    return q, scale, torch.empty(r_shape, dtype=promoted_dtype(x, residual, gamma), device=x.device)


def reference_rows(x, residual, weight, bias, gamma, eps):
    """Compute in PyTorch what :func:`rows_fp8` computes."""
    y = x
    if residual is not None:
        branch = x.float() if gamma is None else x.float() * gamma.float()
        y = (residual.float() + branch).to(promoted_dtype(x, residual, gamma))
    wide = y.float()
    if eps is not None:
        wide = reference.layer_norm(wide, *(None if p is None else p.float() for p in (weight, bias)), eps)
    q, scale = reference.quantize_fp8(wide)
    return q, scale, x.new_empty(0) if residual is None else y.contiguous()


def arch_limit(device: torch.device) -> str | None:
    """Return why no FP8 kernel runs on ``device``, or None if they do, or PyTorch computes."""
    if device.type == "cpu" and runtime.emulated_arch() is None:
        return None
    arch = runtime.device_facts(device).arch
    if arch.startswith("sm_"):
        return None if int(arch[3:]) >= 89 else f"{arch} has no e4m3 products; expected sm_89 or later"
    return f"{arch} is not supported; expected an NVIDIA GPU from sm_89 on (gfx942's 8-bit floats are another format)"
