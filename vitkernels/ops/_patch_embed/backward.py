"""Backward of the patch embedding: kernels for both gradients, and their launcher."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vitkernels import runtime
from vitkernels.ops import _tile
from vitkernels.ops._patch_embed.config import choose_config
from vitkernels.ops._patch_embed.pixels import (
    VARYING,
    Constants,
    channel_constants,
    chosen,
    exactly_multiplied,
    in_pixel_order,
    launch_options,
    patch_offsets,
    patches,
    pixel_offsets,
    quotient,
    reciprocal,
    scale_and_shift,
)
from vitkernels.ops._triton import tl, triton
from vitkernels.runtime import cdiv, wide_dtype


@triton.jit(do_not_specialize=VARYING)
def _patch_embed_bwd_images_kernel(
    dout_ptr,  # (B, T, C)
    weight_ptr,  # (C, K), contiguous
    source_ptr,  # (B, N), contiguous: the token of each patch behind the prefix, or -1
    dimages_ptr,  # (B, I, Y, X); strides b, i and y in UNITs
    stride_dout_b,
    stride_dout_t,
    stride_dout_c,
    stride_images_b,
    stride_images_i,
    stride_images_y,
    stride_images_x,
    M,
    C,
    N,
    R,
    patches_x,
    HAS_SOURCE: tl.constexpr,
    SCALE: tl.constexpr,  # None, or the factor of each channel
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    PY: tl.constexpr,
    PX: tl.constexpr,
    K: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    stride_images_b = tl.cast(stride_images_b, INDEX) * UNIT
    stride_images_i = tl.cast(stride_images_i, INDEX) * UNIT
    stride_images_y = tl.cast(stride_images_y, INDEX) * UNIT
    tiles_k = tl.cdiv(K, BLOCK_K)
    pid_m, pid_k = tl.program_id(0) // tiles_k, tl.program_id(0) % tiles_k
    offs_m = pid_m.to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = pid_k.to(INDEX) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_m = offs_m < M
    mask_k = offs_k < K
    b = offs_m // N
    n = offs_m - b * N
    mask_dout = mask_m
    if HAS_SOURCE:
        token = tl.load(source_ptr + offs_m, mask=mask_m, other=-1).to(INDEX)
        mask_dout = token >= 0  # other patches get a gradient of 0
        dout_rows = dout_ptr + (b * stride_dout_b + (R + token) * stride_dout_t)[:, None]
    else:
        dout_rows = dout_ptr + (b * stride_dout_b + (R + n) * stride_dout_t)[:, None]

    acc = tl.zeros((BLOCK_M, BLOCK_K), ACC)
    for start_c in range(0, C, BLOCK_C):
        offs_c = start_c + tl.arange(0, BLOCK_C).to(INDEX)
        mask_c = offs_c < C
        dout_offs = offs_c[None, :] * stride_dout_c
        dout = tl.load(dout_rows + dout_offs, mask=mask_dout[:, None] & mask_c[None, :], other=0.0)
        weight_offs = offs_c[:, None] * K + offs_k[None, :]
        weight = tl.load(weight_ptr + weight_offs, mask=mask_c[:, None] & mask_k[None, :], other=0.0)
        acc = _tile.dot(dout.to(weight.dtype), weight, acc, PRECISION)

    if SCALE is not None:
        acc *= channel_constants(SCALE, offs_k, PY, PX, K, ACC)
    row = n // patches_x
    column = n - row * patches_x
    patch_offs = patch_offsets(b, row, column, stride_images_b, stride_images_y, stride_images_x, PY, PX)
    pixel_offs = pixel_offsets(offs_k, stride_images_i, stride_images_y, stride_images_x, PY, PX)
    dimages_ptrs = dimages_ptr + (patch_offs[:, None] + pixel_offs[None, :])
    tl.store(dimages_ptrs, acc.to(dimages_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_k[None, :])


@triton.jit(do_not_specialize=[*VARYING, "count", "N_factor", "N_shift", "x_factor", "x_shift"])
def _patch_embed_bwd_weight_kernel(
    dout_ptr,  # (B, T, C)
    images_ptr,  # (B, I, Y, X), floating point or uint8; strides b, i and y in UNITs
    choice_ptr,  # (B, N), int32, or int64 beside fp64, contiguous: what CHOICE says
    dweight_ptr,  # (splits, C, K): the sum of each range of rows
    stride_dout_b,
    stride_dout_t,
    stride_dout_c,
    stride_images_b,
    stride_images_i,
    stride_images_y,
    stride_images_x,
    M,
    C,
    N,
    R,
    patches_x,
    N_factor,  # of the reciprocals of N and patches_x
    N_shift,
    x_factor,
    x_shift,
    rows_per_split,
    count,
    CHOICE: tl.constexpr,  # which patches have pixels: see chosen() in pixels.py
    DTYPE: tl.constexpr,
    SCALE: tl.constexpr,  # None, or the factor of each channel; SHIFT is then added
    SHIFT: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    ROW: tl.constexpr,  # integer type of rows, int32 unless there are 2**30
    PY: tl.constexpr,
    PX: tl.constexpr,
    K: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    stride_images_b = tl.cast(stride_images_b, INDEX) * UNIT
    stride_images_i = tl.cast(stride_images_i, INDEX) * UNIT
    stride_images_y = tl.cast(stride_images_y, INDEX) * UNIT
    tiles_c, tiles_k = tl.cdiv(C, BLOCK_C), tl.cdiv(K, BLOCK_K)
    split = tl.program_id(0) // (tiles_c * tiles_k)
    pid = tl.program_id(0) % (tiles_c * tiles_k)
    offs_c = (pid // tiles_k).to(INDEX) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_k = (pid % tiles_k).to(INDEX) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_c = offs_c < C
    mask_k = offs_k < K
    pixel_offs = pixel_offsets(offs_k, stride_images_i, stride_images_y, stride_images_x, PY, PX)
    if SCALE is not None:
        scale = channel_constants(SCALE, offs_k, PY, PX, K, ACC)
        shift = channel_constants(SHIFT, offs_k, PY, PX, K, ACC)
    dout_rows = dout_ptr + offs_c[:, None] * stride_dout_c

    acc = tl.zeros((BLOCK_C, BLOCK_K), ACC)
    first_m = (split.to(INDEX) * rows_per_split).to(ROW)
    last_m = tl.minimum(first_m + rows_per_split, M)
    for start_m in range(first_m, last_m, BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M).to(ROW)
        mask_m = offs_m < last_m
        b = quotient(offs_m, N, N_factor, N_shift).to(INDEX)
        n = offs_m.to(INDEX) - b * N
        dout_offs = b * stride_dout_b + (R + n) * stride_dout_t
        if CHOICE == "masked":
            mask_m = mask_m & (tl.load(choice_ptr + offs_m, mask=mask_m, other=0) == 0)
        if CHOICE == "visible":
            n = tl.load(choice_ptr + offs_m, mask=mask_m, other=0).to(INDEX)
            mask_m = mask_m & (n >= 0) & (n < count)
            n = tl.where(mask_m, n, 0)
        row = quotient(n.to(ROW), patches_x, x_factor, x_shift).to(INDEX)
        column = n - row * patches_x
        dout = tl.load(dout_rows + dout_offs[None, :], mask=mask_c[:, None] & mask_m[None, :], other=0.0)
        patch_offs = patch_offsets(b, row, column, stride_images_b, stride_images_y, stride_images_x, PY, PX)
        image_offs = patch_offs[:, None] + pixel_offs[None, :]
        pixels = tl.load(images_ptr + image_offs, mask=mask_m[:, None] & mask_k[None, :], other=0)
        if SCALE is not None:
            # Lanes beyond the last row now hold the shift, but are multiplied with a gradient of zero.
            pixels = pixels.to(ACC) * scale + shift
        acc = _tile.dot(dout.to(DTYPE), pixels.to(DTYPE), acc, PRECISION)

    dweight_offs = (split.to(INDEX) * C + offs_c)[:, None] * K + offs_k[None, :]
    tl.store(dweight_ptr + dweight_offs, acc, mask=mask_c[:, None] & mask_k[None, :])


def patch_embed_backward(
    dout: Tensor,
    images: Tensor,
    weight: Tensor,
    needs_dimages: bool,
    needs_dweight: bool,
    constants: Sequence[float] | None = None,
    mask: Tensor | None = None,
    visible: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch the backward; return the gradients of (images, weight), empty unless needed.

    The weight's gradient has the dtype of sums, fp32 or fp64.
    """
    dimages, dweight = empty_gradients(dout, images, weight, needs_dimages, needs_dweight)
    scale, shift = scale_and_shift(images.dtype, constants)
    if images.shape[0] == 0 or (visible is not None and visible.numel() == 0):
        return dimages.zero_(), dweight.zero_()
    if needs_dimages:
        N = patches(images, *weight.shape[2:])
        R = dout.shape[1] - (N if visible is None else visible.shape[1])
        _launch_bwd_images(dout, weight, dimages, scale, _source(mask, visible, N), R)
    if needs_dweight:
        _launch_bwd_weight(dout, images, weight, dweight, scale, shift, mask, visible)
    return dimages, dweight


def _source(mask: Tensor | None, visible: Tensor | None, N: int) -> Tensor | None:
    """Return the token of each patch (B, N), int32, or -1 for a patch whose pixels no token has."""
    if mask is not None:
        return torch.arange(N, dtype=torch.int32, device=mask.device).expand_as(mask).masked_fill(mask, -1)
    if visible is not None:
        token = torch.arange(visible.shape[1], dtype=torch.int32, device=visible.device).expand_as(visible)
        return token.new_full((visible.shape[0], N), -1).scatter_(1, visible.long(), token)
    return None


def _launch_bwd_images(
    dout: Tensor, weight: Tensor, dimages: Tensor, scale: Constants | None, source: Tensor | None, R: int
) -> None:
    dimages, weight, PY, PX = in_pixel_order(dimages, weight)
    C = weight.shape[0]
    weight = weight.reshape(C, -1).contiguous()
    K = weight.shape[1]
    N = patches(dimages, PY, PX)
    M = dimages.shape[0] * N
    facts = runtime.device_facts(dimages.device)
    config = choose_config("dimages", M, C, K, weight.dtype, facts)
    _patch_embed_bwd_images_kernel[(cdiv(M, config.block_m) * cdiv(K, config.block_k),)](
        dout_ptr=dout,
        weight_ptr=weight,
        source_ptr=weight if source is None else source,
        dimages_ptr=dimages,
        stride_dout_b=dout.stride(0),
        stride_dout_t=dout.stride(1),
        stride_dout_c=dout.stride(2),
        M=M,
        C=C,
        N=N,
        R=R,
        HAS_SOURCE=source is not None,
        SCALE=scale,
        **launch_options(config, M, K, PY, PX, dimages, weight, dout),
    )


def _launch_bwd_weight(
    dout: Tensor,
    images: Tensor,
    weight: Tensor,
    dweight: Tensor,
    scale: Constants | None,
    shift: Constants | None,
    mask: Tensor | None,
    visible: Tensor | None,
) -> None:
    images, dweight, PY, PX = in_pixel_order(exactly_multiplied(images, weight), dweight)
    C, K = dweight.shape[0], dweight.shape[1:].numel()
    count = patches(images, PY, PX)
    N = count if visible is None else visible.shape[1]
    M = images.shape[0] * N
    facts = runtime.device_facts(images.device)
    config = choose_config(
        "dweight",
        M,
        C,
        K,
        weight.dtype,
        facts,
        image_dtype=images.dtype,
        normalized=scale is not None,
        masked=mask is not None,
    )
    (N_factor, N_shift), (x_factor, x_shift) = reciprocal(N), reciprocal(images.shape[3] // PX)
    shares = torch.empty((config.splits, *dweight.shape), dtype=dweight.dtype, device=images.device)
    _patch_embed_bwd_weight_kernel[(config.splits * cdiv(C, config.block_c) * cdiv(K, config.block_k),)](
        dout_ptr=dout,
        images_ptr=images,
        **chosen(mask, visible, weight.dtype, images),
        dweight_ptr=shares,
        stride_dout_b=dout.stride(0),
        stride_dout_t=dout.stride(1),
        stride_dout_c=dout.stride(2),
        M=M,
        C=C,
        N=N,
        R=dout.shape[1] - N,
        N_factor=N_factor,
        N_shift=N_shift,
        x_factor=x_factor,
        x_shift=x_shift,
        rows_per_split=cdiv(cdiv(M, config.block_m), config.splits) * config.block_m,
        count=count,
        DTYPE=getattr(tl, str(weight.dtype).removeprefix("torch.")),
        SCALE=scale,
        SHIFT=shift,
        ROW=tl.int32 if M < 2**30 else tl.int64,
        **launch_options(config, M, K, PY, PX, images, shares, dout),
    )
    torch.sum(shares, 0, out=dweight)


def empty_gradients(
    dout, images, weight, needs_dimages, needs_dweight, constants=None, mask=None, visible=None
) -> tuple[Tensor, Tensor]:
    """Allocate the outputs of :func:`patch_embed_backward`."""
    dimages = torch.empty_like(images) if needs_dimages else images.new_empty(0)
    dweight = torch.empty(weight.shape if needs_dweight else (0,), dtype=wide_dtype(weight.dtype), device=images.device)
    return dimages, dweight
