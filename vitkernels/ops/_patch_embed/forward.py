"""Forward of the patch embedding: the kernel and its launcher."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vitkernels import runtime
from vitkernels.ops import _tile
from vitkernels.ops._patch_embed.config import choose_config
from vitkernels.ops._patch_embed.pixels import (
    VARYING,
    channel_constants,
    chosen,
    exactly_multiplied,
    in_pixel_order,
    launch_options,
    patch_offsets,
    patches,
    pixel_offsets,
    scale_and_shift,
)
from vitkernels.ops._triton import tl, triton
from vitkernels.runtime import cdiv, dense_or


@triton.jit(do_not_specialize=VARYING)
def _patch_embed_fwd_kernel(
    images_ptr,  # (B, I, Y, X), floating point or uint8; strides b, i and y in UNITs
    weight_ptr,  # (C, K), contiguous
    bias_ptr,  # (C,)
    pos_ptr,  # (T - pos_start, C), contiguous
    prefix_ptr,  # (R, C), contiguous
    choice_ptr,  # (B, T - R), int32, or int64 beside fp64, contiguous: what CHOICE says
    mask_token_ptr,  # (C,), contiguous
    out_ptr,  # (B, T, C), contiguous
    stride_images_b,
    stride_images_i,
    stride_images_y,
    stride_images_x,
    M,
    C,
    T,
    R,
    N,
    patches_x,
    pos_start,
    HAS_BIAS: tl.constexpr,
    HAS_POS: tl.constexpr,
    HAS_PREFIX: tl.constexpr,
    CHOICE: tl.constexpr,  # which patches have pixels: see chosen() in pixels.py
    SCALE: tl.constexpr,  # None, or the factor of each channel; SHIFT is then added
    SHIFT: tl.constexpr,
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
    tiles_c = tl.cdiv(C, BLOCK_C)
    pid_m, pid_c = tl.program_id(0) // tiles_c, tl.program_id(0) % tiles_c
    offs_m = pid_m.to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = pid_c.to(INDEX) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_m = offs_m < M
    mask_c = offs_c < C
    b = offs_m // T
    t = offs_m - b * T
    mask_patch = mask_m & (t >= R)
    n = t - R
    pos_row = t - pos_start
    mask_pixels = mask_patch
    if CHOICE == "masked":
        mask_pixels = mask_patch & (tl.load(choice_ptr + b * N + n, mask=mask_patch, other=0) == 0)
    if CHOICE == "visible":
        n = tl.load(choice_ptr + b * (T - R) + n, mask=mask_patch, other=0).to(INDEX)
        pos_row = n + R - pos_start
        mask_pixels = mask_patch & (n >= 0) & (n < N)
    row = n // patches_x
    column = n - row * patches_x
    patch_offs = patch_offsets(b, row, column, stride_images_b, stride_images_y, stride_images_x, PY, PX)
    weight_rows = weight_ptr + offs_c[:, None] * K

    out_ptrs = out_ptr + offs_m[:, None] * C + offs_c[None, :]
    if HAS_PREFIX:
        # Store prefix tokens before the product: merged into its epilogue, their tile would take more registers.
        mask_prefix = mask_m & (t < R)
        prefix = _load_rows(prefix_ptr, t, offs_c, C, mask_prefix, mask_c).to(ACC)
        if HAS_POS:
            prefix += _load_rows(pos_ptr, t - pos_start, offs_c, C, mask_prefix & (t >= pos_start), mask_c).to(ACC)
        mask = mask_prefix[:, None] & mask_c[None, :]
        tl.store(out_ptrs, prefix.to(out_ptr.dtype.element_ty), mask=mask)

    acc = tl.zeros((BLOCK_M, BLOCK_C), ACC)
    if HAS_POS:
        acc += _load_rows(pos_ptr, pos_row, offs_c, C, mask_pixels if CHOICE == "visible" else mask_patch, mask_c).to(
            ACC
        )
    for start_k in range(0, K, BLOCK_K):
        offs_k = start_k + tl.arange(0, BLOCK_K).to(INDEX)
        mask_k = offs_k < K
        pixel_offs = pixel_offsets(offs_k, stride_images_i, stride_images_y, stride_images_x, PY, PX)
        image_offs = patch_offs[:, None] + pixel_offs[None, :]
        pixels = tl.load(images_ptr + image_offs, mask=mask_pixels[:, None] & mask_k[None, :], other=0)
        if SCALE is not None:
            # Lanes beyond the patch now hold finite values, but are multiplied with a weight of zero.
            scale = channel_constants(SCALE, offs_k, PY, PX, K, ACC)
            pixels = pixels.to(ACC) * scale + channel_constants(SHIFT, offs_k, PY, PX, K, ACC)
            if CHOICE == "masked":  # a masked patch now holds the shift
                pixels = tl.where(mask_pixels[:, None], pixels, 0.0)
        weight = tl.load(weight_rows + offs_k[None, :], mask=mask_c[:, None] & mask_k[None, :], other=0.0)
        acc = _tile.dot(pixels.to(weight.dtype), tl.trans(weight), acc, PRECISION)
    if CHOICE == "masked":
        token = tl.load(mask_token_ptr + offs_c, mask=mask_c, other=0.0).to(ACC)[None, :]
        bias = tl.load(bias_ptr + offs_c, mask=mask_c & HAS_BIAS, other=0.0).to(ACC)[None, :]
        acc += tl.where(mask_pixels[:, None], bias, token)
    elif HAS_BIAS:
        acc += tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(ACC)[None, :]
    if CHOICE == "visible":  # a patch that the image does not have must not go unseen
        acc = tl.where(mask_pixels[:, None], acc, float("nan"))
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask_patch[:, None] & mask_c[None, :])


@triton.jit
def _load_rows(ptr, rows, offs_c, C, mask_rows, mask_c):
    offs = rows[:, None] * C + offs_c[None, :]
    return tl.load(ptr + offs, mask=mask_rows[:, None] & mask_c[None, :], other=0.0)


def patch_embed_forward(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    prefix_tokens: Tensor | None,
    pos_embed_prefix: bool,
    constants: Sequence[float] | None = None,
    out_dtype: torch.dtype | None = None,
    mask: Tensor | None = None,
    mask_token: Tensor | None = None,
    visible: Tensor | None = None,
) -> Tensor:
    """Launch the forward; return tokens (B, T, C), by default in the widest dtype of all but images and bias."""
    out = empty_tokens(
        images,
        weight,
        bias,
        pos_embed,
        prefix_tokens,
        pos_embed_prefix,
        constants,
        out_dtype,
        mask,
        mask_token,
        visible,
    )
    B, T, C = out.shape
    if B * T == 0:
        return out
    scale, shift = scale_and_shift(images.dtype, constants)
    images, weight, PY, PX = in_pixel_order(exactly_multiplied(images, weight), weight)
    weight = weight.reshape(C, -1).contiguous()
    M, K = B * T, weight.shape[1]
    N = patches(images, PY, PX)
    R = T - (N if visible is None else visible.shape[1])
    facts = runtime.device_facts(images.device)
    config = choose_config(
        "forward", M, C, K, weight.dtype, facts, image_dtype=images.dtype, normalized=scale is not None,
        masked=mask is not None or visible is not None,
    )  # fmt: skip
    _patch_embed_fwd_kernel[(cdiv(M, config.block_m) * cdiv(C, config.block_c),)](
        images_ptr=images,
        weight_ptr=weight,
        bias_ptr=dense_or(bias, weight),
        pos_ptr=dense_or(pos_embed, weight),
        prefix_ptr=dense_or(prefix_tokens, weight),
        **chosen(mask, visible, weight.dtype, weight),
        mask_token_ptr=dense_or(mask_token, weight),
        out_ptr=out,
        M=M,
        C=C,
        T=T,
        R=R,
        N=N,
        pos_start=0 if pos_embed_prefix else R,
        HAS_BIAS=bias is not None,
        HAS_POS=pos_embed is not None,
        HAS_PREFIX=R > 0,
        SCALE=scale,
        SHIFT=shift,
        **launch_options(config, M, K, PY, PX, images, weight, out),
    )
    return out


def empty_tokens(
    images,
    weight,
    bias,
    pos_embed,
    prefix_tokens,
    pos_embed_prefix,
    constants=None,
    out_dtype=None,
    mask=None,
    mask_token=None,
    visible=None,
) -> Tensor:
    """Allocate the output of :func:`patch_embed_forward`."""
    B, C = images.shape[0], weight.shape[0]
    R = 0 if prefix_tokens is None else prefix_tokens.shape[-2]
    T = R + (patches(images, *weight.shape[2:]) if visible is None else visible.shape[1])
    out_dtype = out_dtype or runtime.promoted_dtype(weight, pos_embed, prefix_tokens, mask_token)
    return torch.empty((B, T, C), dtype=out_dtype, device=images.device)
