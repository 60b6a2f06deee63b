"""Backward of decomposed attention: kernels and their launcher.

dq with the gradient of the bias, then dk and dv, then (``positions.py``) what of dq comes through the bias, and the
tables' gradients. The bias along y of a query and a row is used by all keys of that row, so its gradient is the sum of
dS over them; along x likewise. There are no atomics.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitkernels import runtime
from vitkernels.ops._attention.tiles import (
    dot_heads,
    dot_rows,
    head_ptr,
    load_head,
    scaled_head,
    store_head,
    weighted_sum,
    zero_head,
    zeros,
)
from vitkernels.ops._decomposed_attention.config import tile_width
from vitkernels.ops._decomposed_attention.forward import config_of, launch_arguments, tables_of
from vitkernels.ops._decomposed_attention.positions import add_dq, biases_of, new_biases, tables_gradient
from vitkernels.ops._decomposed_attention.tiles import bias_along_x, bias_along_y, sixteen, window_keys
from vitkernels.ops._sums import new_shares, sum_shares
from vitkernels.ops._triton import tl, triton
from vitkernels.ops._window_attention.tiles import (
    image_and_place,
    load_statistics,
    load_tokens,
    of_queries,
    store_padding_sums,
    weights_of,
    window_dropout,
    window_tokens,
)
from vitkernels.ops._window_attention.windows import DecomposedOptions


@triton.jit(do_not_specialize=["Y", "X", "windows_y", "windows_x"])
def _decomposed_attention_bwd_dq_kernel(
    qkv_ptr,  # (B, N, 3, H, D)
    do_ptr,  # (B, N, H, D)
    o_ptr,  # (B, N, H, D)
    lse_ptr,  # (B, H, N, 2), of the forward
    along_y_ptr,  # (B, H, N, rows of a window)
    along_x_ptr,  # (B, H, N, columns of a window)
    padding_ptr,  # (3, H, D), with PADDING "value"
    seed_ptr,  # (1,), with DROPOUT
    delta_ptr,  # (B, H, N), written
    dqkv_ptr,  # (B, N, 3, H, D), contiguous
    dy_ptr,  # (B, H, N, tiles along x, rows of a window), written
    dx_ptr,  # (B, H, N, columns of a window), written
    stride_qkv_b,
    stride_qkv_n,
    stride_qkv_part,
    stride_qkv_h,
    stride_o_b,
    stride_o_n,
    stride_o_h,
    stride_do_b,
    stride_do_n,
    stride_do_h,
    N,
    H,
    Y,
    X,
    windows_y,
    windows_x,
    scale: tl.constexpr,
    score_scale: tl.constexpr,
    D: tl.constexpr,
    SHAPE: tl.constexpr,
    PADDING: tl.constexpr,
    DROPOUT: tl.constexpr,
    ALIGN: tl.constexpr,
    INDEX: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
):
    STEP: tl.constexpr = BLOCK_N // WIDTH
    BLOCKS: tl.constexpr = tl.cdiv(SHAPE[7], BLOCK_M)
    SHARES: tl.constexpr = tl.cdiv(SHAPE[1], WIDTH)
    EXACT_DELTA: tl.constexpr = qkv_ptr.dtype.element_ty.primitive_bitwidth > 16
    pid = tl.program_id(0)
    m = (pid % BLOCKS * BLOCK_M + tl.arange(0, BLOCK_M)).to(INDEX)
    h = (pid // BLOCKS % H).to(tl.int64)
    window = pid // BLOCKS // H
    size = (Y, X, windows_y, windows_x)
    b, place = image_and_place(window, size)
    padding_head = padding_ptr + h * D
    rows_m, _, mask_m, _ = window_tokens(m, place, size, SHAPE)
    q_head = head_ptr(qkv_ptr, b, h, 0, stride_qkv_b, stride_qkv_n, stride_qkv_h, ALIGN)
    do_head = head_ptr(do_ptr, b, h, 0, stride_do_b, stride_do_n, stride_do_h, ALIGN)
    o_head = head_ptr(o_ptr, b, h, 0, stride_o_b, stride_o_n, stride_o_h, ALIGN)
    q = load_head(q_head, rows_m, stride_qkv_n, mask_m, D, PARTS, ALIGN)
    do = load_head(do_head, rows_m, stride_do_n, mask_m, D, PARTS, ALIGN)
    query = (b * H + h) * N + rows_m
    statistics = load_statistics(lse_ptr + query * 2, mask_m)
    delta = tl.zeros((BLOCK_M,), ACC)
    if not EXACT_DELTA:
        delta = dot_rows(do, load_head(o_head, rows_m, stride_o_n, mask_m, D, PARTS, ALIGN), ACC)
    along_y = along_y_ptr + query * sixteen(SHAPE[0])
    along_x = along_x_ptr + query * sixteen(SHAPE[1])
    dy = dy_ptr + query * (SHARES * sixteen(SHAPE[0]))
    dx = dx_ptr + query * sixteen(SHAPE[1])
    dq = zero_head(BLOCK_M, PARTS, ACC)
    # Of many equal keys, as padded ones are, dS sums to what delta is wrong by. In fp32 and fp64 that is seen beside
    # PyTorch, and delta is summed from the weights themselves; do · o will do for 16 bits.
    for turn in tl.static_range(0 if EXACT_DELTA else 1, 2):
        for column in range(0, SHAPE[1], WIDTH):
            of_columns = bias_along_x(along_x, column + tl.arange(0, BLOCK_N) % WIDTH, mask_m, SHAPE, WIDTH, ACC)
            total = zeros(BLOCK_M, BLOCK_N, ACC)
            for row in range(0, SHAPE[0], STEP):
                y, _x, n, rows_n, in_window, in_image = window_keys(
                    row, column, place, size, SHAPE, WIDTH, BLOCK_N, INDEX
                )
                k = load_tokens(
                    q_head + stride_qkv_part, rows_n, stride_qkv_n, in_image, in_window, padding_head + H * D,
                    D, PARTS, ALIGN, PADDING,
                )  # fmt: skip
                v = load_tokens(
                    q_head + 2 * stride_qkv_part, rows_n, stride_qkv_n, in_image, in_window, padding_head + 2 * H * D,
                    D, PARTS, ALIGN, PADDING,
                )  # fmt: skip
                s = dot_heads(q, k, zeros(BLOCK_M, BLOCK_N, ACC), PRECISION) * score_scale + of_columns
                s += bias_along_y(along_y, row, y, mask_m, SHAPE, STEP, ACC)
                if PADDING == "hidden":
                    s = tl.where(in_image[None, :], s, float("-inf"))
                p = of_queries(weights_of(s, statistics), mask_m, PADDING)
                dp = dot_heads(do, v, zeros(BLOCK_M, BLOCK_N, ACC), PRECISION)
                if DROPOUT > 0:
                    dp *= window_dropout(seed_ptr, window, h, H, m, n, DROPOUT, ACC)
                if turn == 0:
                    delta += tl.sum(p * dp, axis=1)
                else:
                    ds = p * (dp - delta[:, None])
                    total += ds
                    _store_along_y(dy + column // WIDTH * sixteen(SHAPE[0]), ds, row, mask_m, SHAPE, STEP, WIDTH)
                    dq = weighted_sum(ds, k, dq, PRECISION)
            if turn == 1:
                _store_along_x(dx, total, column, mask_m, STEP, WIDTH)
    tl.store(delta_ptr + query, delta, mask=mask_m)
    dq_head = dqkv_ptr + (b * N * 3 * H + h) * D
    store_head(dq_head, scaled_head(dq, scale), rows_m, 3 * H * D, mask_m, D, PARTS, ALIGN)


@triton.jit
def _store_along_y(dy, ds, row, mask_m, SHAPE: tl.constexpr, STEP: tl.constexpr, WIDTH: tl.constexpr):
    """Store the gradient of the bias along y at the rows of a tile of keys: the sum of dS over the keys of a row."""
    if STEP == 1:
        tl.store(dy + row, tl.sum(ds, axis=1), mask=mask_m)
    else:
        by_row = tl.sum(tl.reshape(ds, (ds.shape[0], STEP, WIDTH)), axis=2)
        y = row + tl.arange(0, STEP)
        tl.store(dy[:, None] + y[None, :], by_row, mask=mask_m[:, None] & (y < SHAPE[0])[None, :])


@triton.jit
def _store_along_x(dx, total, column, mask_m, STEP: tl.constexpr, WIDTH: tl.constexpr):
    """Store the gradient of the bias along x at the columns of a tile of keys, whose rows ``total`` still has apart."""
    if STEP > 1:
        total = tl.sum(tl.reshape(total, (total.shape[0], STEP, WIDTH)), axis=1)
    x = column + tl.arange(0, WIDTH)
    tl.store(dx[:, None] + x[None, :], total.to(dx.dtype.element_ty), mask=mask_m[:, None])


@triton.jit(do_not_specialize=["Y", "X", "windows_y", "windows_x"])
def _decomposed_attention_bwd_dkv_kernel(
    qkv_ptr,  # (B, N, 3, H, D)
    do_ptr,  # (B, N, H, D)
    lse_ptr,  # (B, H, N, 2), of the forward
    delta_ptr,  # (B, H, N)
    along_y_ptr,  # (B, H, N, rows of a window)
    along_x_ptr,  # (B, H, N, columns of a window)
    padding_ptr,  # (3, H, D), with PADDING "value"
    seed_ptr,  # (1,), with DROPOUT
    dqkv_ptr,  # (B, N, 3, H, D), contiguous
    dpadding_ptr,  # (windows of all images · tiles, 3, H, D), with NEEDS_DPADDING
    stride_qkv_b,
    stride_qkv_n,
    stride_qkv_part,
    stride_qkv_h,
    stride_o_b,  # of do
    stride_o_n,
    stride_o_h,
    N,
    H,
    Y,
    X,
    windows_y,
    windows_x,
    scale: tl.constexpr,
    score_scale: tl.constexpr,
    D: tl.constexpr,
    SHAPE: tl.constexpr,
    PADDING: tl.constexpr,
    DROPOUT: tl.constexpr,
    NEEDS_DPADDING: tl.constexpr,
    ALIGN: tl.constexpr,
    INDEX: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
):
    STEP: tl.constexpr = BLOCK_N // WIDTH
    TILES_X: tl.constexpr = tl.cdiv(SHAPE[1], WIDTH)
    TILES: tl.constexpr = tl.cdiv(SHAPE[0], STEP) * TILES_X
    pid = tl.program_id(0)
    h = (pid // TILES % H).to(tl.int64)
    window = pid // TILES // H
    size = (Y, X, windows_y, windows_x)
    b, place = image_and_place(window, size)
    padding_head = padding_ptr + h * D
    row = pid % TILES // TILES_X * STEP
    y, x, n, rows_n, in_window, in_image = window_keys(
        row, pid % TILES_X * WIDTH, place, size, SHAPE, WIDTH, BLOCK_N, INDEX
    )
    q_head = head_ptr(qkv_ptr, b, h, 0, stride_qkv_b, stride_qkv_n, stride_qkv_h, ALIGN)
    do_head = head_ptr(do_ptr, b, h, 0, stride_o_b, stride_o_n, stride_o_h, ALIGN)
    k = load_tokens(
        q_head + stride_qkv_part, rows_n, stride_qkv_n, in_image, in_window, padding_head + H * D,
        D, PARTS, ALIGN, PADDING,
    )  # fmt: skip
    v = load_tokens(
        q_head + 2 * stride_qkv_part, rows_n, stride_qkv_n, in_image, in_window, padding_head + 2 * H * D,
        D, PARTS, ALIGN, PADDING,
    )  # fmt: skip
    dk = zero_head(BLOCK_N, PARTS, ACC)
    dv = zero_head(BLOCK_N, PARTS, ACC)
    for start in range(0, SHAPE[7], BLOCK_M):
        m = start + tl.arange(0, BLOCK_M).to(INDEX)
        rows_m, _, mask_m, _ = window_tokens(m, place, size, SHAPE)
        q = load_head(q_head, rows_m, stride_qkv_n, mask_m, D, PARTS, ALIGN)
        do = load_head(do_head, rows_m, stride_o_n, mask_m, D, PARTS, ALIGN)
        query = (b * H + h) * N + rows_m
        statistics = load_statistics(lse_ptr + query * 2, mask_m)
        delta = tl.load(delta_ptr + query, mask=mask_m, other=0.0)
        s = dot_heads(q, k, zeros(BLOCK_M, BLOCK_N, ACC), PRECISION) * score_scale
        s += bias_along_x(along_x_ptr + query * sixteen(SHAPE[1]), x, mask_m, SHAPE, WIDTH, ACC)
        s += bias_along_y(along_y_ptr + query * sixteen(SHAPE[0]), row, y, mask_m, SHAPE, STEP, ACC)
        if PADDING == "hidden":
            s = tl.where(in_image[None, :], s, float("-inf"))
        p = of_queries(weights_of(s, statistics), mask_m, PADDING)
        dp = dot_heads(do, v, zeros(BLOCK_M, BLOCK_N, ACC), PRECISION)
        kept = p
        if DROPOUT > 0:
            keep = window_dropout(seed_ptr, window, h, H, m, n, DROPOUT, ACC)
            kept = p * keep
            dp *= keep
        dv = weighted_sum(tl.trans(kept.to(do[0].dtype)), do, dv, PRECISION)
        ds = p * (dp - delta[:, None])
        dk = weighted_sum(tl.trans(ds.to(q[0].dtype)), q, dk, PRECISION)
    dk = scaled_head(dk, scale)
    dk_head = dqkv_ptr + ((b * N * 3 + 1) * H + h) * D
    store_head(dk_head, dk, rows_n, 3 * H * D, in_image, D, PARTS, ALIGN)
    store_head(dk_head + H * D, dv, rows_n, 3 * H * D, in_image, D, PARTS, ALIGN)
    if NEEDS_DPADDING:
        program = window.to(tl.int64) * TILES + pid % TILES
        store_padding_sums(dpadding_ptr + (program * 3 * H + h) * D, dk, dv, in_window & ~in_image, H, D, PARTS)


def decomposed_attention_backward(
    do: Tensor, qkv: Tensor, o: Tensor, lse: Tensor, options: DecomposedOptions, needed: tuple[bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the backward; return the gradients of qkv, of both tables, one below the other, and of the padding.

    The last two are in their parameters' dtypes, the wider of two, and empty unless ``needed``.
    """
    dqkv, dtables, dpadding = backward_outputs(qkv, options, needed)
    if qkv.numel() == 0:
        return dqkv, dtables.zero_(), dpadding.zero_()
    do, qkv = runtime.unit_stride(do), runtime.unit_stride(qkv)
    windows, dtype = options.windows, dtables.dtype
    options = options._replace(rel_pos=tables_of(qkv, options))
    needs_dtables, needs_dpadding = needed
    pads = needs_dpadding and not windows.whole
    H, D = qkv.shape[3:]
    config = config_of(qkv, options)
    gradients = dqkv.flatten(2, 3)  # its rows are those of one of the three
    shares = runtime.cdiv(windows.columns, tile_width(windows.columns, config.dq.block_n))
    biases = biases_of(qkv, options.rel_pos, windows, config)
    gradients_of_biases = new_biases(qkv, windows, shares)
    delta = lse.new_empty(lse.shape[:3])
    arguments, programs = launch_arguments(qkv, options, config.dq, biases, o, do, gradients)
    _decomposed_attention_bwd_dq_kernel[(programs * runtime.cdiv(windows.tokens, config.dq.block_m),)](
        **arguments,
        do_ptr=do,
        o_ptr=o,
        lse_ptr=lse,
        delta_ptr=delta,
        dqkv_ptr=dqkv,
        dy_ptr=gradients_of_biases[0],
        dx_ptr=gradients_of_biases[1],
        stride_do_b=do.stride(0),
        stride_do_n=do.stride(1),
        stride_do_h=do.stride(2),
        scale=options.scale,
    )
    arguments, _ = launch_arguments(qkv, options, config.dkv, biases, do, gradients)
    width = tile_width(windows.columns, config.dkv.block_n)
    tiles = runtime.cdiv(windows.rows, config.dkv.block_n // width) * runtime.cdiv(windows.columns, width)
    padding_shares, (padding_sums,) = new_shares([pads], programs // H * tiles, 3 * H * D, lse.dtype, qkv.device)
    _decomposed_attention_bwd_dkv_kernel[(programs * tiles,)](
        **arguments,
        do_ptr=do,
        lse_ptr=lse,
        delta_ptr=delta,
        dqkv_ptr=dqkv,
        dpadding_ptr=padding_sums,
        scale=options.scale,
        NEEDS_DPADDING=pads,
    )
    add_dq(dqkv, gradients_of_biases, options.rel_pos, windows, config)
    if needs_dtables:
        dtables = tables_gradient(qkv, gradients_of_biases, windows, config, dtype)
    if pads:
        dpadding = sum_shares(padding_shares, [True], [options.padding.dtype])[0].view(3, H, D)
    return dqkv, dtables, dpadding


def backward_outputs(
    qkv: Tensor, options: DecomposedOptions, needed: tuple[bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate the outputs of :func:`decomposed_attention_backward`."""
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    dtables, dpadding = qkv.new_empty(0), qkv.new_empty(0)
    if needed[0]:
        height, width = options.rel_pos
        dtype = height.dtype
        if width.dtype != dtype:
            dtype = runtime.wide_dtype(max(dtype, width.dtype, key=lambda each: each.itemsize))
        dtables = height.new_empty((len(height) + len(width), qkv.shape[-1]), dtype=dtype)
    if needed[1]:  # of whole windows no kernel writes it
        new = torch.zeros if options.windows.whole else torch.empty
        dpadding = new(options.padding.shape, dtype=options.padding.dtype, device=qkv.device)
    return dqkv, dtables, dpadding
