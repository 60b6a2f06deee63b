"""Backward of LayerNorm and RMSNorm, persistent over rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vitkernels import runtime
from vitkernels.ops import _tile
from vitkernels.ops._layer_norm.config import choose_backward_config
from vitkernels.ops._layer_norm.forward import image_arguments, load_rows, merged_patches
from vitkernels.ops._sums import new_shares, sum_shares
from vitkernels.ops._triton import tl, triton
from vitkernels.runtime import as_rows, dense_or


@triton.jit(do_not_specialize=["M", "rows_per_sample", "Y", "X"])
def _layer_norm_bwd_kernel(
    dy_ptr,  # (M, C)
    dr_ptr,  # (M, C), upstream gradient of the sum, with HAS_DR
    r_ptr,  # (M, C), what was normalised; with MERGES (B, Y, X, part), contiguous
    weight_ptr,  # (WIDTH,)
    mean_ptr,  # (M,), unless RMS
    rstd_ptr,  # (M,)
    x_ptr,  # (M, C), the branch, with NEEDS_DGAMMA
    gamma_ptr,  # (C,)
    path_ptr,  # (B,)
    dr_path_ptr,  # (B,), scales dr in its sum, with HAS_DR_PATH
    dresidual_ptr,  # like r, contiguous
    dx_ptr,  # (M, C), contiguous, with NEEDS_DX
    dweight_ptr,  # (programs, C): like the next four, each program's partial sum
    dbias_ptr,  # (programs, C)
    dgamma_ptr,  # (programs, C)
    dr_sum_ptr,  # (programs, C), sum of dr_path · dr
    dresidual_sum_ptr,  # (programs, C), sum of path · dresidual
    stride_dy_row,
    stride_dr_row,
    stride_r_row,
    stride_x_row,
    M,
    C,
    width,
    rows_per_sample,
    part,  # C / 4, with MERGES, like the next two
    Y,
    X,
    RMS: tl.constexpr,
    PADDED: tl.constexpr,
    MERGES: tl.constexpr,
    HAS_DR: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_GAMMA: tl.constexpr,
    HAS_PATH: tl.constexpr,
    HAS_DR_PATH: tl.constexpr,
    NEEDS_DRESIDUAL: tl.constexpr,
    NEEDS_DX: tl.constexpr,
    NEEDS_DWEIGHT: tl.constexpr,
    NEEDS_DBIAS: tl.constexpr,
    NEEDS_DGAMMA: tl.constexpr,
    NEEDS_DR_SUM: tl.constexpr,
    NEEDS_DRESIDUAL_SUM: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WHOLE_ROW: tl.constexpr,
):
    if not PADDED:
        width = C
    pid = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0)
    # A row wider than BLOCK_C does not fit. Then the outer loop is over chunks, and both row means are computed again
    # for each chunk, so that a program still sums each parameter gradient in registers.
    for first_c in range(0, 1 if WHOLE_ROW else C, BLOCK_C):
        offs_c = first_c + tl.arange(0, BLOCK_C)
        mask_c = offs_c < C
        weight = tl.full((BLOCK_C,), 1.0, ACC)
        if HAS_WEIGHT:
            weight = tl.load(weight_ptr + offs_c, mask=offs_c < width, other=0.0).to(ACC)
        gamma = tl.full((BLOCK_C,), 1.0, ACC)
        if HAS_GAMMA:
            gamma = tl.load(gamma_ptr + offs_c, mask=mask_c, other=0.0).to(ACC)
        dweight = tl.zeros((BLOCK_C,), ACC)
        dbias = tl.zeros((BLOCK_C,), ACC)
        dgamma = tl.zeros((BLOCK_C,), ACC)
        dr_sum = tl.zeros((BLOCK_C,), ACC)
        dresidual_sum = tl.zeros((BLOCK_C,), ACC)

        for first_m in range(pid * BLOCK_M, M, programs * BLOCK_M):
            offs_m = first_m + tl.arange(0, BLOCK_M).to(tl.int64)
            mask_m = offs_m < M
            mask = mask_m[:, None] & mask_c[None, :]
            mean = tl.zeros((BLOCK_M,), ACC)
            if not RMS:
                mean = tl.load(mean_ptr + offs_m, mask=mask_m, other=0.0)
            rstd = tl.load(rstd_ptr + offs_m, mask=mask_m, other=0.0)
            dy_rows = dy_ptr + offs_m[:, None] * stride_dy_row
            r_rows = (r_ptr, offs_m, part, Y, X) if MERGES else r_ptr + offs_m[:, None] * stride_r_row

            dy = tl.load(dy_rows + offs_c[None, :], mask=mask, other=0.0).to(ACC)
            r = load_rows(r_rows, offs_c, mask, MERGES).to(ACC)
            if HAS_DR:  # loaded before the reductions, whose barriers no load passes
                upstream = tl.load(dr_ptr + offs_m[:, None] * stride_dr_row + offs_c[None, :], mask=mask, other=0.0).to(
                    ACC
                )
            mask_real = mask & (offs_c < width)[None, :] if PADDED else mask
            x_hat = tl.where(mask_real, (r - mean[:, None]) * rstd[:, None], 0.0)
            g = dy * weight[None, :]
            dbias += tl.sum(dy, axis=0)
            dweight += tl.sum(dy * x_hat, axis=0)

            if NEEDS_DRESIDUAL or NEEDS_DX or NEEDS_DGAMMA or NEEDS_DR_SUM or NEEDS_DRESIDUAL_SUM:
                if WHOLE_ROW:
                    g_mean = tl.sum(g, axis=1) / width
                    gx_mean = tl.sum(g * x_hat, axis=1) / width
                else:
                    g_mean, gx_mean = _row_means(
                        dy_rows,
                        r_rows,
                        weight_ptr,
                        mean,
                        rstd,
                        mask_m,
                        C,
                        width,
                        MERGES,
                        HAS_WEIGHT,
                        ACC,
                        BLOCK_M,
                        BLOCK_C,
                    )
                if RMS:
                    dr = rstd[:, None] * (g - x_hat * gx_mean[:, None])
                else:
                    dr = rstd[:, None] * (g - g_mean[:, None] - x_hat * gx_mean[:, None])
                if PADDED:
                    dr = tl.where(mask_real, dr, 0.0)
                if HAS_DR:
                    dr += upstream
                    if NEEDS_DR_SUM:
                        if HAS_DR_PATH:
                            upstream *= tl.load(dr_path_ptr + offs_m // rows_per_sample, mask=mask_m, other=0.0).to(
                                ACC
                            )[:, None]
                        dr_sum += tl.sum(upstream, axis=0)
                offs_out = offs_m[:, None] * C + offs_c[None, :]
                if NEEDS_DRESIDUAL:
                    dresidual_ptrs = dresidual_ptr + offs_out
                    mask_dresidual = mask
                    if MERGES:
                        image = (dresidual_ptr, offs_m, part, Y, X)
                        dresidual_ptrs, mask_dresidual = merged_patches(image, offs_c, mask)
                    tl.store(dresidual_ptrs, dr.to(dresidual_ptr.dtype.element_ty), mask=mask_dresidual)
                if HAS_PATH:
                    path = tl.load(path_ptr + offs_m // rows_per_sample, mask=mask_m, other=0.0).to(ACC)
                    dr *= path[:, None]
                if NEEDS_DRESIDUAL_SUM:
                    dresidual_sum += tl.sum(tl.where(mask, dr, 0.0), axis=0)
                if NEEDS_DX:
                    dx = dr * gamma[None, :]
                    tl.store(dx_ptr + offs_out, dx.to(dx_ptr.dtype.element_ty), mask=mask)
                if NEEDS_DGAMMA:
                    x_rows = x_ptr + offs_m[:, None] * stride_x_row
                    x = tl.load(x_rows + offs_c[None, :], mask=mask, other=0.0).to(ACC)
                    dgamma += tl.sum(tl.where(mask, dr * x, 0.0), axis=0)

        if NEEDS_DWEIGHT:
            tl.store(dweight_ptr + pid * C + offs_c, dweight, mask=mask_c)
        if NEEDS_DBIAS:
            tl.store(dbias_ptr + pid * C + offs_c, dbias, mask=mask_c)
        if NEEDS_DGAMMA:
            tl.store(dgamma_ptr + pid * C + offs_c, dgamma, mask=mask_c)
        if NEEDS_DR_SUM:
            tl.store(dr_sum_ptr + pid * C + offs_c, dr_sum, mask=mask_c)
        if NEEDS_DRESIDUAL_SUM:
            tl.store(dresidual_sum_ptr + pid * C + offs_c, dresidual_sum, mask=mask_c)


@triton.jit
def _row_means(
    dy_rows,
    r_rows,
    weight_ptr,
    mean,
    rstd,
    mask_m,
    C,
    width,
    MERGES: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Return mean(g) and mean(g · x̂) of BLOCK_M rows wider than BLOCK_C."""
    g_total = tl.zeros((BLOCK_M,), ACC)
    gx_total = tl.zeros((BLOCK_M,), ACC)
    for start in range(0, C, BLOCK_C):
        offs_c = start + tl.arange(0, BLOCK_C)
        mask_c = offs_c < C
        mask = mask_m[:, None] & mask_c[None, :]
        g = tl.load(dy_rows + offs_c[None, :], mask=mask, other=0.0).to(ACC)
        if HAS_WEIGHT:
            g *= tl.load(weight_ptr + offs_c, mask=offs_c < width, other=0.0).to(ACC)[None, :]
        r = load_rows(r_rows, offs_c, mask, MERGES).to(ACC)
        g_total += tl.sum(g, axis=1)
        gx_total += tl.sum(tl.where(mask, g * (r - mean[:, None]) * rstd[:, None], 0.0), axis=1)
    return g_total / width, gx_total / width


class NormWanted(NamedTuple):
    """Which results of the backward are wanted, in the order in which they come.

    The last two are sums over rows: of the upstream gradient ``dr``, which must be given, and of the gradient of
    γ · x. They are the bias gradients of the neighbouring linear layers, and take no pass of their own.
    """

    dx: bool = False
    dresidual: bool = False
    dweight: bool = False
    dbias: bool = False
    dgamma: bool = False
    dr_sum: bool = False
    dresidual_sum: bool = False


def layer_norm_backward(
    dy: Tensor,
    dr: Tensor | None,
    r: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    gamma: Tensor | None,
    path: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    eps: float,
    x_dtype: torch.dtype,
    needed: list[bool],
    rms: bool = False,
    width: int | None = None,
    bias_dtype: torch.dtype | None = None,
    sum_dtype: torch.dtype | None = None,
    dr_path: Tensor | None = None,
    merges: bool = False,
) -> tuple[Tensor, ...]:
    """Launch the backward; return the results named by :class:`NormWanted`, each empty unless ``needed``.

    The gradients of weight and γ have their dtypes. Those of the bias and the two sums have ``bias_dtype`` and
    ``sum_dtype``, or the dtype of the statistics. ``width`` is as in the forward: ``dy`` must be zero in the padding,
    where all gradients are zero. ``dr_path`` (B,) scales the rows of each sample of ``dr`` in its sum.
    With ``merges`` r is the image (B, Y, X, C / 4), and so is the gradient ``dresidual``.
    """
    wanted = NormWanted(*needed)
    sums_wanted = wanted[2:]
    dtypes = sum_dtypes(weight, gamma, rstd.dtype, bias_dtype, sum_dtype)
    rows, dy_rows = r.contiguous() if merges else as_rows(r), as_rows(dy)
    dr_rows = rows if dr is None else as_rows(dr)
    x_rows = rows if x is None else as_rows(x)
    M, C = dy_rows.shape
    dx = torch.empty(r.shape if wanted.dx else (0,), dtype=x_dtype, device=r.device)
    dresidual = torch.empty(r.shape if wanted.dresidual else (0,), dtype=r.dtype, device=r.device)
    config = choose_backward_config(M, C, runtime.device_facts(r.device), r.dtype, sum(sums_wanted))
    shares, parts = new_shares(sums_wanted, config.programs if M else 0, C, rstd.dtype, r.device)
    if M > 0:
        _layer_norm_bwd_kernel[(config.programs,)](
            dy_ptr=dy_rows,
            dr_ptr=dr_rows,
            r_ptr=rows,
            weight_ptr=dense_or(weight, rows),
            mean_ptr=mean,
            rstd_ptr=rstd,
            x_ptr=x_rows,
            gamma_ptr=dense_or(gamma, rows),
            path_ptr=dense_or(path, rows),
            dr_path_ptr=dense_or(dr_path, rows),
            dresidual_ptr=dresidual,
            dx_ptr=dx,
            dweight_ptr=parts[0],
            dbias_ptr=parts[1],
            dgamma_ptr=parts[2],
            dr_sum_ptr=parts[3],
            dresidual_sum_ptr=parts[4],
            stride_dy_row=dy_rows.stride(0),
            stride_dr_row=dr_rows.stride(0),
            stride_r_row=rows.stride(0),
            stride_x_row=x_rows.stride(0),
            M=M,
            C=C,
            width=width or C,
            rows_per_sample=1 if path is None and dr_path is None else M // r.shape[0],
            **image_arguments(r, merges),
            RMS=rms,
            PADDED=width is not None,
            HAS_DR=dr is not None,
            HAS_WEIGHT=weight is not None,
            HAS_GAMMA=gamma is not None,
            HAS_PATH=path is not None,
            HAS_DR_PATH=dr_path is not None,
            NEEDS_DRESIDUAL=wanted.dresidual,
            NEEDS_DX=wanted.dx,
            NEEDS_DWEIGHT=wanted.dweight,
            NEEDS_DBIAS=wanted.dbias,
            NEEDS_DGAMMA=wanted.dgamma,
            NEEDS_DR_SUM=wanted.dr_sum,
            NEEDS_DRESIDUAL_SUM=wanted.dresidual_sum,
            ACC=_tile.accumulator(r.dtype),
            BLOCK_M=config.block_m,
            BLOCK_C=config.block_c,
            WHOLE_ROW=config.block_c >= C,
            num_warps=config.num_warps,
        )
    return dx, dresidual, *sum_shares(shares, sums_wanted, dtypes)


def sum_dtypes(
    weight: Tensor | None,
    gamma: Tensor | None,
    wide: torch.dtype,
    bias_dtype: torch.dtype | None,
    sum_dtype: torch.dtype | None,
) -> tuple[torch.dtype, ...]:
    """Return the dtypes of the backward's sums over rows, in the order of :class:`NormWanted`."""
    weight_dtype, gamma_dtype = (wide if t is None else t.dtype for t in (weight, gamma))
    return weight_dtype, bias_dtype or wide, gamma_dtype, sum_dtype or wide, sum_dtype or wide
