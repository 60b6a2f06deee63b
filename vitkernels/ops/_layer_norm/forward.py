"""Forward of LayerNorm and RMSNorm, alone, after a residual sum, or of the merged patches of an image."""

from __future__ import annotations

import torch
from torch import Tensor

from vitkernels import runtime
from vitkernels.ops import _tile
from vitkernels.ops._layer_norm.config import choose_config
from vitkernels.ops._triton import tl, triton
from vitkernels.runtime import as_rows, cdiv, dense_or, promoted_dtype, wide_dtype


@triton.jit(do_not_specialize=["M", "rows_per_sample", "Y", "X"])
def _layer_norm_fwd_kernel(
    x_ptr,  # (M, C); with MERGES (B, Y, X, part), contiguous
    residual_ptr,  # (M, C), with HAS_RESIDUAL
    weight_ptr,  # (WIDTH,)
    bias_ptr,  # (WIDTH,)
    gamma_ptr,  # (C,), LayerScale
    path_ptr,  # (B,), DropPath
    y_ptr,  # (M, C), contiguous
    r_ptr,  # (M, C), contiguous, with HAS_RESIDUAL
    mean_ptr,  # (M,), unless RMS
    rstd_ptr,  # (M,)
    stride_x_row,
    stride_residual_row,
    M,
    C,
    width,
    rows_per_sample,
    part,  # C / 4, with MERGES, like the next two
    Y,
    X,
    eps: tl.constexpr,  # a runtime argument would be fp32, even for fp64 tensors
    RMS: tl.constexpr,
    PADDED: tl.constexpr,
    MERGES: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_GAMMA: tl.constexpr,
    HAS_PATH: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WHOLE_ROW: tl.constexpr,
):
    if not PADDED:
        width = C
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    x_rows = (x_ptr, offs_m, part, Y, X) if MERGES else x_ptr + offs_m[:, None] * stride_x_row
    residual_rows = residual_ptr + offs_m[:, None] * stride_residual_row
    path = tl.full((BLOCK_M,), 1.0, ACC)
    if HAS_PATH:
        path = tl.load(path_ptr + offs_m // rows_per_sample, mask=mask_m, other=0.0).to(ACC)

    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    mask = mask_m[:, None] & mask_c[None, :]
    r = _load_sum(x_rows, residual_rows, gamma_ptr, path, r_ptr, offs_c, mask, MERGES, HAS_RESIDUAL, HAS_GAMMA, ACC)
    mean = tl.zeros((BLOCK_M,), ACC)
    if not RMS:
        total = tl.sum(r, axis=1)
        if not WHOLE_ROW:
            for start in range(BLOCK_C, C, BLOCK_C):
                offs_c = start + tl.arange(0, BLOCK_C)
                mask = mask_m[:, None] & (offs_c < C)[None, :]
                r = _load_sum(
                    x_rows, residual_rows, gamma_ptr, path, r_ptr, offs_c, mask, MERGES, HAS_RESIDUAL, HAS_GAMMA, ACC
                )
                total += tl.sum(r, axis=1)
        mean = total / width
        tl.store(mean_ptr + offs_m, mean, mask=mask_m)

    if WHOLE_ROW:
        centred = _centre(r, mean, mask, offs_c, width, PADDED)
        square = tl.sum(centred * centred, axis=1)
    else:
        square = tl.zeros((BLOCK_M,), ACC)
        for start in range(0, C, BLOCK_C):
            offs_c = start + tl.arange(0, BLOCK_C)
            mask = mask_m[:, None] & (offs_c < C)[None, :]
            r = _load_sum(
                x_rows, residual_rows, gamma_ptr, path, r_ptr, offs_c, mask, MERGES, HAS_RESIDUAL, HAS_GAMMA, ACC
            )
            centred = _centre(r, mean, mask, offs_c, width, PADDED)
            square += tl.sum(centred * centred, axis=1)
    rstd = 1.0 / tl.sqrt(square / width + eps)
    tl.store(rstd_ptr + offs_m, rstd, mask=mask_m)

    for start in range(0, 1 if WHOLE_ROW else C, BLOCK_C):
        if not WHOLE_ROW:
            offs_c = start + tl.arange(0, BLOCK_C)
            mask_c = offs_c < C
            mask = mask_m[:, None] & mask_c[None, :]
            r = _load_sum(
                x_rows, residual_rows, gamma_ptr, path, r_ptr, offs_c, mask, MERGES, HAS_RESIDUAL, HAS_GAMMA, ACC
            )
        offs_out = offs_m[:, None] * C + offs_c[None, :]
        if HAS_RESIDUAL:
            tl.store(r_ptr + offs_out, r.to(r_ptr.dtype.element_ty), mask=mask)
        y = (r - mean[:, None]) * rstd[:, None]
        real_c = offs_c < width
        if HAS_WEIGHT:
            y *= tl.load(weight_ptr + offs_c, mask=real_c, other=0.0).to(ACC)[None, :]
        if HAS_BIAS:
            y += tl.load(bias_ptr + offs_c, mask=real_c, other=0.0).to(ACC)[None, :]
        if PADDED:
            y = tl.where(real_c[None, :], y, 0.0)
        tl.store(y_ptr + offs_out, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def merged_patches(rows, offs_c, mask):
    """Return the pointers and the mask of channels ``offs_c`` of merged patches, ``rows`` = (pointer, patches, part, Y,
    X): four neighbours in the order (0, 0), (1, 0), (0, 1), (1, 1) of row and column; outside the image are none."""
    ptr, offs_m, part, Y, X = rows
    columns = tl.cdiv(X, 2)
    x = offs_m % columns * 2
    row = offs_m // columns
    y = row % tl.cdiv(Y, 2) * 2
    b = row // tl.cdiv(Y, 2)
    neighbour = offs_c // part
    down = neighbour % 2
    right = neighbour // 2
    mask = mask & ((y[:, None] + down[None, :] < Y) & (x[:, None] + right[None, :] < X))
    first = ((b * Y + y) * X + x) * part
    return ptr + first[:, None] + ((down * X + right) * part + offs_c % part)[None, :], mask


@triton.jit
def load_rows(rows, offs_c, mask, MERGES: tl.constexpr):
    """Load channels ``offs_c`` of ``rows``, pointers or :func:`merged_patches`'s; 0 outside the mask or the image."""
    if MERGES:
        ptrs, mask = merged_patches(rows, offs_c, mask)
        return tl.load(ptrs, mask=mask, other=0.0)
    else:
        return tl.load(rows + offs_c[None, :], mask=mask, other=0.0)


@triton.jit
def _centre(r, mean, mask, offs_c, width, PADDED: tl.constexpr):
    """Return r − mean inside the row, 0 outside."""
    if PADDED:
        mask &= (offs_c < width)[None, :]
    return tl.where(mask, r - mean[:, None], 0.0)


@triton.jit
def _load_sum(
    x_rows,
    residual_rows,
    gamma_ptr,
    path,
    r_ptr,
    offs_c,
    mask,
    MERGES: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_GAMMA: tl.constexpr,
    ACC: tl.constexpr,
):
    """Load a tile of x, or compute one of residual + path · gamma · x, rounded to the stored dtype."""
    x = load_rows(x_rows, offs_c, mask, MERGES).to(ACC)
    if HAS_RESIDUAL:
        x *= path[:, None]
        if HAS_GAMMA:
            x *= tl.load(gamma_ptr + offs_c[None, :], mask=mask, other=0.0).to(ACC)
        x += tl.load(residual_rows + offs_c[None, :], mask=mask, other=0.0).to(ACC)
        # The backward reads the rounded sum, so the statistics must be computed from it, too.
        x = x.to(r_ptr.dtype.element_ty).to(ACC)
    return x


def layer_norm_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    gamma: Tensor | None,
    path: Tensor | None,
    eps: float,
    out_dtype: torch.dtype | None = None,
    rms: bool = False,
    width: int | None = None,
    merges: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the forward; return ``(normed, sum, mean, rstd)``. sum is empty without a residual, mean with ``rms``.

    normed has by default the dtype of the sum. With ``width``, only that many leading channels are normalised and have
    a weight and a bias. The other channels are padding for vector loads: they must be zero in ``x``, and are zero in
    normed. With ``merges`` x is (B, Y, X, C / 4), and a row of the norm four patches that lie together.
    """
    y, r, mean, rstd = forward_outputs(x, residual, weight, bias, gamma, path, eps, out_dtype, rms, width, merges)
    if x.numel() == 0:
        return y, r, mean, rstd
    rows = x.contiguous() if merges else as_rows(x)
    M, C = rstd.shape[0], y.shape[-1]
    residual_rows = rows if residual is None else as_rows(residual)
    config = choose_config(M, C, runtime.device_facts(x.device))
    _layer_norm_fwd_kernel[(cdiv(M, config.block_m),)](
        x_ptr=rows,
        residual_ptr=residual_rows,
        weight_ptr=dense_or(weight, rows),
        bias_ptr=dense_or(bias, rows),
        gamma_ptr=dense_or(gamma, rows),
        path_ptr=dense_or(path, rows),
        y_ptr=y,
        r_ptr=r,
        mean_ptr=mean,
        rstd_ptr=rstd,
        stride_x_row=rows.stride(0),
        stride_residual_row=residual_rows.stride(0),
        M=M,
        C=C,
        width=width or C,
        rows_per_sample=1 if path is None else M // x.shape[0],
        **image_arguments(x, merges),
        eps=eps,
        RMS=rms,
        PADDED=width is not None,
        HAS_RESIDUAL=residual is not None,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        HAS_GAMMA=gamma is not None,
        HAS_PATH=path is not None,
        ACC=_tile.accumulator(rstd.dtype),
        BLOCK_M=config.block_m,
        BLOCK_C=config.block_c,
        WHOLE_ROW=config.block_c >= C,
        num_warps=config.num_warps,
    )
    return y, r, mean, rstd


def image_arguments(x: Tensor, merges: bool) -> dict[str, int | bool]:
    """Return the kernels' arguments for the image x (B, Y, X, C / 4) that ``merges``."""
    Y, X, part = x.shape[1:] if merges else (1, 1, 1)
    return {"part": part, "Y": Y, "X": X, "MERGES": merges}


def merged_shape(x: Tensor) -> tuple[int, int, int, int]:
    """Return the shape of x (B, Y, X, C) with every four patches merged into one."""
    B, Y, X, C = x.shape
    return B, cdiv(Y, 2), cdiv(X, 2), 4 * C


def forward_outputs(x, residual, weight, bias, gamma, path, eps, out_dtype=None, rms=False, width=None, merges=False):
    """Allocate the outputs of :func:`layer_norm_forward`."""
    sum_dtype = promoted_dtype(x, residual, gamma, path)
    shape = merged_shape(x) if merges else x.shape
    y = torch.empty(shape, dtype=out_dtype or sum_dtype, device=x.device)
    r = torch.empty((0,) if residual is None else x.shape, dtype=sum_dtype, device=x.device)
    rstd = torch.empty(y.numel() // y.shape[-1], dtype=wide_dtype(sum_dtype), device=x.device)
    return y, r, rstd.new_empty(0) if rms else torch.empty_like(rstd), rstd
