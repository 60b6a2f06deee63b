"""Backward of window attention: kernels and their launcher.

    whole   one tile holds all queries and keys of a window: everything is read once, and where registers suffice a
            program also sums the table's gradient over its windows
    blocks  dq, then dk and dv, then the table's gradient, each over blocks of a window

The table's gradient is first (H, tokens, tokens), the sum of dS over all windows, then each entry sums the pairs of
tokens that lie as far apart as it says: there are no atomics. Cosine attention divides rows by their norms, so that
    dq = ls/‖q‖ · (g − q (q·g)/‖q‖²),  g = Σ_n dS k/‖k‖,  and dk alike;  dls = Σ (q·g)/‖q‖.
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
from vitkernels.ops._sums import new_shares, sum_shares
from vitkernels.ops._tile import accumulator
from vitkernels.ops._triton import tl, triton
from vitkernels.ops._window_attention.forward import bias_of, config_of, groups_of, launch_arguments
from vitkernels.ops._window_attention.tiles import (
    image_and_place,
    inverse_norms,
    load_bias,
    load_factor,
    load_statistics,
    load_tokens,
    masked_scores,
    of_queries,
    scores_of,
    store_padding_sums,
    weights_of,
    window_dropout,
    window_tokens,
)
from vitkernels.ops._window_attention.windows import Options, Windows


@triton.jit
def _through_norm(grad, head, norms, factor, scale: tl.constexpr, COSINE: tl.constexpr, ACC: tl.constexpr):
    """Return the gradient of a head's rows from ``grad``, that of the rows as they were multiplied, without its
    factor; and for each row the product of the two, divided by the norm."""
    if COSINE:
        along = dot_rows(head, grad, ACC) * norms
        parts = ()
        for i in tl.static_range(len(head)):
            part = (grad[i] - head[i].to(ACC) * (along * norms)[:, None]) * (factor * norms)[:, None]
            parts = parts + (part,)
        return parts, along
    else:
        return scaled_head(grad, scale), norms


@triton.jit(do_not_specialize=["Y", "X", "windows_y", "windows_x", "total", "windows"])
def _window_attention_bwd_whole_kernel(
    qkv_ptr,  # (B, N, 3, H, D)
    do_ptr,  # (B, N, H, D)
    bias_ptr,  # (H, entries) of bias_of, with BIAS
    padding_ptr,  # (3, H, D), with PADDING "value"
    logit_ptr,  # (H,), with COSINE
    seed_ptr,  # (1,), with DROPOUT
    dqkv_ptr,  # (B, N, 3, H, D), contiguous
    delta_ptr,  # (B, H, N), written with NEEDS_DELTA
    dbias_ptr,  # (groups, H, tokens, tokens), with NEEDS_DTABLE
    dpadding_ptr,  # (groups, 3, H, D), with NEEDS_DPADDING
    dlogit_ptr,  # (groups, H), with NEEDS_DLOGIT
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
    total,  # windows of all images
    windows,  # windows per program
    scale: tl.constexpr,
    score_scale: tl.constexpr,
    D: tl.constexpr,
    SHAPE: tl.constexpr,
    ENTRIES: tl.constexpr,
    BIAS: tl.constexpr,
    PADDING: tl.constexpr,
    COSINE: tl.constexpr,
    DROPOUT: tl.constexpr,
    NEEDS_DTABLE: tl.constexpr,
    NEEDS_DPADDING: tl.constexpr,
    NEEDS_DLOGIT: tl.constexpr,
    NEEDS_DELTA: tl.constexpr,
    ALIGN: tl.constexpr,
    INDEX: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HIDES: tl.constexpr,  # whether scores of keys that do not exist need -inf; a bias of pairs has it already
    PARTS: tl.constexpr,
):
    TOKENS: tl.constexpr = SHAPE[7]
    pid = tl.program_id(0)
    h = (pid % H).to(tl.int64)
    group = (pid // H).to(tl.int64)
    first = pid // H * windows
    size = (Y, X, windows_y, windows_x)
    m = tl.arange(0, BLOCK_M).to(INDEX)
    n = tl.arange(0, BLOCK_N).to(INDEX)
    padding_head = padding_ptr + h * D
    bias = load_bias(bias_ptr, h, m[:, None], n[None, :], SHAPE, BIAS, ENTRIES, ACC)
    factor = load_factor(logit_ptr, h, COSINE, ACC)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    dk_padding = zero_head(1, PARTS, ACC)
    dv_padding = zero_head(1, PARTS, ACC)
    dlogit = tl.zeros((BLOCK_M,), ACC)
    for window in range(first, tl.minimum(first + windows, total)):
        b, place = image_and_place(window, size)
        rows, _, in_image, region = window_tokens(m, place, size, SHAPE)
        rows_n, in_window_n, in_image_n, region_n = window_tokens(n, place, size, SHAPE)
        q_head = head_ptr(qkv_ptr, b, h, 0, stride_qkv_b, stride_qkv_n, stride_qkv_h, ALIGN)
        do_head = head_ptr(do_ptr, b, h, 0, stride_o_b, stride_o_n, stride_o_h, ALIGN)
        q = load_head(q_head, rows, stride_qkv_n, in_image, D, PARTS, ALIGN)
        do = load_head(do_head, rows, stride_o_n, in_image, D, PARTS, ALIGN)
        k = load_tokens(
            q_head + stride_qkv_part, rows_n, stride_qkv_n, in_image_n, in_window_n, padding_head + H * D,
            D, PARTS, ALIGN, PADDING,
        )  # fmt: skip
        v = load_tokens(
            q_head + 2 * stride_qkv_part, rows_n, stride_qkv_n, in_image_n, in_window_n, padding_head + 2 * H * D,
            D, PARTS, ALIGN, PADDING,
        )  # fmt: skip
        norms_m = inverse_norms(q, COSINE, ACC)
        norms_n = inverse_norms(k, COSINE, ACC)
        zero = zeros(BLOCK_M, BLOCK_N, ACC)
        s = scores_of(q, k, zero, score_scale, factor, norms_m[:, None], norms_n[None, :], COSINE, PRECISION)
        exists = in_image_n if PADDING == "hidden" else in_window_n
        s += bias
        s = masked_scores(s, region[:, None], region_n[None, :], exists[None, :], place, size, SHAPE, HIDES)
        p = tl.exp2(s - tl.max(s, axis=1)[:, None])
        p = of_queries(p * (1.0 / tl.sum(p, axis=1))[:, None], in_image, PADDING)
        dp = dot_heads(do, v, zeros(BLOCK_M, BLOCK_N, ACC), PRECISION)
        kept = p
        if DROPOUT > 0:
            keep = window_dropout(seed_ptr, window, h, H, m, n, DROPOUT, ACC)
            kept = p * keep
            dp *= keep
        # Turned in shared memory, from where the matrix unit reads them: rows of queries stay within a warp, so that
        # the softmax needs no exchange between warps.
        dv = weighted_sum(tl.trans(kept.to(do[0].dtype)), do, zero_head(BLOCK_N, PARTS, ACC), PRECISION)
        delta = tl.sum(p * dp, axis=1)
        ds = p * (dp - delta[:, None])
        if NEEDS_DELTA:
            tl.store(delta_ptr + (b * H + h) * N + rows, delta, mask=in_image)
        if NEEDS_DTABLE:
            dbias += ds
        ds_m = ds
        ds_n = ds
        if COSINE:
            ds_m = ds * norms_m[:, None]
            ds_n = ds * norms_n[None, :]
        dk = weighted_sum(tl.trans(ds_m.to(q[0].dtype)), q, zero_head(BLOCK_N, PARTS, ACC), PRECISION)
        dq = weighted_sum(ds_n, k, zero_head(BLOCK_M, PARTS, ACC), PRECISION)
        dq, along = _through_norm(dq, q, norms_m, factor, scale, COSINE, ACC)
        dk, _ = _through_norm(dk, k, norms_n, factor, scale, COSINE, ACC)
        if NEEDS_DLOGIT:
            dlogit += along
        dq_head = dqkv_ptr + (b * N * 3 * H + h) * D
        store_head(dq_head, dq, rows, 3 * H * D, in_image, D, PARTS, ALIGN)
        store_head(dq_head + H * D, dk, rows_n, 3 * H * D, in_image_n, D, PARTS, ALIGN)
        store_head(dq_head + 2 * H * D, dv, rows_n, 3 * H * D, in_image_n, D, PARTS, ALIGN)
        if NEEDS_DPADDING:
            padded = (in_window_n & ~in_image_n)[:, None]
            dk_sum = ()
            dv_sum = ()
            for i in tl.static_range(len(PARTS)):
                dk_sum = dk_sum + (dk_padding[i] + tl.sum(tl.where(padded, dk[i], 0.0), axis=0)[None, :],)
                dv_sum = dv_sum + (dv_padding[i] + tl.sum(tl.where(padded, dv[i], 0.0), axis=0)[None, :],)
            dk_padding = dk_sum
            dv_padding = dv_sum

    if NEEDS_DTABLE:
        ptrs = dbias_ptr + ((group * H + h) * TOKENS + m[:, None]) * TOKENS + n[None, :]
        tl.store(ptrs, dbias, mask=(m < TOKENS)[:, None] & (n < TOKENS)[None, :])
    if NEEDS_DPADDING:
        sums = dpadding_ptr + (group * 3 * H + h) * D
        store_padding_sums(sums, dk_padding, dv_padding, tl.full((1,), 1, tl.int1), H, D, PARTS)
    if NEEDS_DLOGIT:
        tl.store(dlogit_ptr + group * H + h, tl.sum(dlogit, axis=0))


@triton.jit(do_not_specialize=["Y", "X", "windows_y", "windows_x", "total"])
def _window_attention_bwd_dq_kernel(
    qkv_ptr,  # (B, N, 3, H, D)
    do_ptr,  # (B, N, H, D)
    o_ptr,  # (B, N, H, D)
    lse_ptr,  # (B, H, N, 2)
    bias_ptr,  # (H, entries) of bias_of, with BIAS
    padding_ptr,  # (3, H, D), with PADDING "value"
    logit_ptr,  # (H,), with COSINE
    seed_ptr,  # (1,), with DROPOUT
    delta_ptr,  # (B, H, N), written
    dqkv_ptr,  # (B, N, 3, H, D), contiguous
    dlogit_ptr,  # (windows of all images · blocks · BLOCK_M, H), with NEEDS_DLOGIT
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
    total,
    scale: tl.constexpr,
    score_scale: tl.constexpr,
    D: tl.constexpr,
    SHAPE: tl.constexpr,
    ENTRIES: tl.constexpr,
    BIAS: tl.constexpr,
    PADDING: tl.constexpr,
    COSINE: tl.constexpr,
    DROPOUT: tl.constexpr,
    NEEDS_DLOGIT: tl.constexpr,
    ALIGN: tl.constexpr,
    INDEX: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HIDES: tl.constexpr,  # whether scores of keys that do not exist need -inf; a bias of pairs has it already
    PARTS: tl.constexpr,
):
    TOKENS: tl.constexpr = SHAPE[7]
    BLOCKS: tl.constexpr = tl.cdiv(TOKENS, BLOCK_M)
    pid = tl.program_id(0)
    m = (pid % BLOCKS * BLOCK_M + tl.arange(0, BLOCK_M)).to(INDEX)
    h = (pid // BLOCKS % H).to(tl.int64)
    window = pid // BLOCKS // H
    size = (Y, X, windows_y, windows_x)
    b, place = image_and_place(window, size)
    padding_head = padding_ptr + h * D
    factor = load_factor(logit_ptr, h, COSINE, ACC)
    rows, _, in_image, region = window_tokens(m, place, size, SHAPE)
    q_head = head_ptr(qkv_ptr, b, h, 0, stride_qkv_b, stride_qkv_n, stride_qkv_h, ALIGN)
    do_head = head_ptr(do_ptr, b, h, 0, stride_do_b, stride_do_n, stride_do_h, ALIGN)
    o_head = head_ptr(o_ptr, b, h, 0, stride_o_b, stride_o_n, stride_o_h, ALIGN)
    q = load_head(q_head, rows, stride_qkv_n, in_image, D, PARTS, ALIGN)
    do = load_head(do_head, rows, stride_do_n, in_image, D, PARTS, ALIGN)
    statistics = (b * H + h) * N + rows
    lse = load_statistics(lse_ptr + statistics * 2, in_image)
    delta = dot_rows(do, load_head(o_head, rows, stride_o_n, in_image, D, PARTS, ALIGN), ACC)
    tl.store(delta_ptr + statistics, delta, mask=in_image)
    norms_m = inverse_norms(q, COSINE, ACC)
    dq = zero_head(BLOCK_M, PARTS, ACC)
    for start in range(0, TOKENS, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N).to(INDEX)
        rows_n, in_window_n, in_image_n, region_n = window_tokens(n, place, size, SHAPE)
        k = load_tokens(
            q_head + stride_qkv_part, rows_n, stride_qkv_n, in_image_n, in_window_n, padding_head + H * D,
            D, PARTS, ALIGN, PADDING,
        )  # fmt: skip
        v = load_tokens(
            q_head + 2 * stride_qkv_part, rows_n, stride_qkv_n, in_image_n, in_window_n, padding_head + 2 * H * D,
            D, PARTS, ALIGN, PADDING,
        )  # fmt: skip
        norms_n = inverse_norms(k, COSINE, ACC)
        zero = zeros(BLOCK_M, BLOCK_N, ACC)
        s = scores_of(q, k, zero, score_scale, factor, norms_m[:, None], norms_n[None, :], COSINE, PRECISION)
        s += load_bias(bias_ptr, h, m[:, None], n[None, :], SHAPE, BIAS, ENTRIES, ACC)
        exists = in_image_n if PADDING == "hidden" else in_window_n
        s = masked_scores(s, region[:, None], region_n[None, :], exists[None, :], place, size, SHAPE, HIDES)
        p = of_queries(weights_of(s, lse), in_image, PADDING)
        dp = dot_heads(do, v, zeros(BLOCK_M, BLOCK_N, ACC), PRECISION)
        if DROPOUT > 0:
            dp *= window_dropout(seed_ptr, window, h, H, m, n, DROPOUT, ACC)
        ds = p * (dp - delta[:, None])
        if COSINE:
            ds *= norms_n[None, :]
        dq = weighted_sum(ds, k, dq, PRECISION)
    dq, along = _through_norm(dq, q, norms_m, factor, scale, COSINE, ACC)
    store_head(dqkv_ptr + (b * N * 3 * H + h) * D, dq, rows, 3 * H * D, in_image, D, PARTS, ALIGN)
    if NEEDS_DLOGIT:
        program = window.to(tl.int64) * BLOCKS + pid % BLOCKS
        # Not their sum: for sm_100 Triton 3.7.1 cannot compile it ("parent layout must have at least rank >= 2").
        of_rows = program * BLOCK_M + tl.arange(0, BLOCK_M)
        tl.store(dlogit_ptr + of_rows * H + h, along)


@triton.jit(do_not_specialize=["Y", "X", "windows_y", "windows_x", "total"])
def _window_attention_bwd_dkv_kernel(
    qkv_ptr,  # (B, N, 3, H, D)
    do_ptr,  # (B, N, H, D)
    lse_ptr,  # (B, H, N, 2)
    delta_ptr,  # (B, H, N)
    bias_ptr,  # (H, entries) of bias_of, with BIAS
    padding_ptr,  # (3, H, D), with PADDING "value"
    logit_ptr,  # (H,), with COSINE
    seed_ptr,  # (1,), with DROPOUT
    dqkv_ptr,  # (B, N, 3, H, D), contiguous
    dpadding_ptr,  # (windows of all images · blocks, 3, H, D), with NEEDS_DPADDING
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
    total,
    scale: tl.constexpr,
    score_scale: tl.constexpr,
    D: tl.constexpr,
    SHAPE: tl.constexpr,
    ENTRIES: tl.constexpr,
    BIAS: tl.constexpr,
    PADDING: tl.constexpr,
    COSINE: tl.constexpr,
    DROPOUT: tl.constexpr,
    NEEDS_DPADDING: tl.constexpr,
    ALIGN: tl.constexpr,
    INDEX: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HIDES: tl.constexpr,  # whether scores of keys that do not exist need -inf; a bias of pairs has it already
    PARTS: tl.constexpr,
):
    TOKENS: tl.constexpr = SHAPE[7]
    BLOCKS: tl.constexpr = tl.cdiv(TOKENS, BLOCK_N)
    pid = tl.program_id(0)
    n = (pid % BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)).to(INDEX)
    h = (pid // BLOCKS % H).to(tl.int64)
    window = pid // BLOCKS // H
    size = (Y, X, windows_y, windows_x)
    b, place = image_and_place(window, size)
    padding_head = padding_ptr + h * D
    factor = load_factor(logit_ptr, h, COSINE, ACC)
    rows_n, in_window_n, in_image_n, region_n = window_tokens(n, place, size, SHAPE)
    exists = in_image_n if PADDING == "hidden" else in_window_n
    q_head = head_ptr(qkv_ptr, b, h, 0, stride_qkv_b, stride_qkv_n, stride_qkv_h, ALIGN)
    do_head = head_ptr(do_ptr, b, h, 0, stride_o_b, stride_o_n, stride_o_h, ALIGN)
    k = load_tokens(
        q_head + stride_qkv_part, rows_n, stride_qkv_n, in_image_n, in_window_n, padding_head + H * D,
        D, PARTS, ALIGN, PADDING,
    )  # fmt: skip
    v = load_tokens(
        q_head + 2 * stride_qkv_part, rows_n, stride_qkv_n, in_image_n, in_window_n, padding_head + 2 * H * D,
        D, PARTS, ALIGN, PADDING,
    )  # fmt: skip
    norms_n = inverse_norms(k, COSINE, ACC)
    dk = zero_head(BLOCK_N, PARTS, ACC)
    dv = zero_head(BLOCK_N, PARTS, ACC)
    for start in range(0, TOKENS, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M).to(INDEX)
        rows, _, in_image, region = window_tokens(m, place, size, SHAPE)
        q = load_head(q_head, rows, stride_qkv_n, in_image, D, PARTS, ALIGN)
        do = load_head(do_head, rows, stride_o_n, in_image, D, PARTS, ALIGN)
        statistics = (b * H + h) * N + rows
        lse = load_statistics(lse_ptr + statistics * 2, in_image)
        delta = tl.load(delta_ptr + statistics, mask=in_image, other=0.0)
        norms_m = inverse_norms(q, COSINE, ACC)
        zero = zeros(BLOCK_M, BLOCK_N, ACC)
        s = scores_of(q, k, zero, score_scale, factor, norms_m[:, None], norms_n[None, :], COSINE, PRECISION)
        s += load_bias(bias_ptr, h, m[:, None], n[None, :], SHAPE, BIAS, ENTRIES, ACC)
        s = masked_scores(s, region[:, None], region_n[None, :], exists[None, :], place, size, SHAPE, HIDES)
        p = of_queries(weights_of(s, lse), in_image, PADDING)
        dp = dot_heads(do, v, zeros(BLOCK_M, BLOCK_N, ACC), PRECISION)
        kept = p
        if DROPOUT > 0:
            keep = window_dropout(seed_ptr, window, h, H, m, n, DROPOUT, ACC)
            kept = p * keep
            dp *= keep
        dv = weighted_sum(tl.trans(kept.to(do[0].dtype)), do, dv, PRECISION)
        ds = p * (dp - delta[:, None])
        if COSINE:
            ds *= norms_m[:, None]
        dk = weighted_sum(tl.trans(ds.to(q[0].dtype)), q, dk, PRECISION)
    dk, _ = _through_norm(dk, k, norms_n, factor, scale, COSINE, ACC)
    dk_head = dqkv_ptr + ((b * N * 3 + 1) * H + h) * D
    store_head(dk_head, dk, rows_n, 3 * H * D, in_image_n, D, PARTS, ALIGN)
    store_head(dk_head + H * D, dv, rows_n, 3 * H * D, in_image_n, D, PARTS, ALIGN)
    if NEEDS_DPADDING:
        program = window.to(tl.int64) * BLOCKS + pid % BLOCKS
        sums = dpadding_ptr + (program * 3 * H + h) * D
        store_padding_sums(sums, dk, dv, in_window_n & ~in_image_n, H, D, PARTS)


@triton.jit(do_not_specialize=["Y", "X", "windows_y", "windows_x", "total", "windows"])
def _window_attention_bwd_dbias_kernel(
    qkv_ptr,  # (B, N, 3, H, D)
    do_ptr,  # (B, N, H, D)
    lse_ptr,  # (B, H, N, 2)
    delta_ptr,  # (B, H, N)
    bias_ptr,  # (H, entries) of bias_of
    padding_ptr,  # (3, H, D), with PADDING "value"
    logit_ptr,  # (H,), with COSINE
    seed_ptr,  # (1,), with DROPOUT
    dbias_ptr,  # (groups, H, tokens, tokens)
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
    total,
    windows,  # windows per program
    score_scale: tl.constexpr,
    D: tl.constexpr,
    SHAPE: tl.constexpr,
    ENTRIES: tl.constexpr,
    BIAS: tl.constexpr,
    PADDING: tl.constexpr,
    COSINE: tl.constexpr,
    DROPOUT: tl.constexpr,
    ALIGN: tl.constexpr,
    INDEX: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HIDES: tl.constexpr,  # whether scores of keys that do not exist need -inf; a bias of pairs has it already
    PARTS: tl.constexpr,
):
    TOKENS: tl.constexpr = SHAPE[7]
    BLOCKS_M: tl.constexpr = tl.cdiv(TOKENS, BLOCK_M)
    BLOCKS_N: tl.constexpr = tl.cdiv(TOKENS, BLOCK_N)
    pid = tl.program_id(0)
    n = (pid % BLOCKS_N * BLOCK_N + tl.arange(0, BLOCK_N)).to(INDEX)
    m = (pid // BLOCKS_N % BLOCKS_M * BLOCK_M + tl.arange(0, BLOCK_M)).to(INDEX)
    h = (pid // BLOCKS_N // BLOCKS_M % H).to(tl.int64)
    group = pid // BLOCKS_N // BLOCKS_M // H
    first = group * windows
    size = (Y, X, windows_y, windows_x)
    padding_head = padding_ptr + h * D
    bias = load_bias(bias_ptr, h, m[:, None], n[None, :], SHAPE, BIAS, ENTRIES, ACC)
    factor = load_factor(logit_ptr, h, COSINE, ACC)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for window in range(first, tl.minimum(first + windows, total)):
        b, place = image_and_place(window, size)
        rows, _, in_image, region = window_tokens(m, place, size, SHAPE)
        rows_n, in_window_n, in_image_n, region_n = window_tokens(n, place, size, SHAPE)
        q_head = head_ptr(qkv_ptr, b, h, 0, stride_qkv_b, stride_qkv_n, stride_qkv_h, ALIGN)
        do_head = head_ptr(do_ptr, b, h, 0, stride_o_b, stride_o_n, stride_o_h, ALIGN)
        q = load_head(q_head, rows, stride_qkv_n, in_image, D, PARTS, ALIGN)
        k = load_tokens(
            q_head + stride_qkv_part, rows_n, stride_qkv_n, in_image_n, in_window_n, padding_head + H * D,
            D, PARTS, ALIGN, PADDING,
        )  # fmt: skip
        norms_m = inverse_norms(q, COSINE, ACC)
        norms_n = inverse_norms(k, COSINE, ACC)
        zero = zeros(BLOCK_M, BLOCK_N, ACC)
        s = scores_of(q, k, zero, score_scale, factor, norms_m[:, None], norms_n[None, :], COSINE, PRECISION)
        exists = in_image_n if PADDING == "hidden" else in_window_n
        s += bias
        s = masked_scores(s, region[:, None], region_n[None, :], exists[None, :], place, size, SHAPE, HIDES)
        statistics = (b * H + h) * N + rows
        lse = load_statistics(lse_ptr + statistics * 2, in_image)
        delta = tl.load(delta_ptr + statistics, mask=in_image, other=0.0)
        do = load_head(do_head, rows, stride_o_n, in_image, D, PARTS, ALIGN)
        v = load_tokens(
            q_head + 2 * stride_qkv_part, rows_n, stride_qkv_n, in_image_n, in_window_n, padding_head + 2 * H * D,
            D, PARTS, ALIGN, PADDING,
        )  # fmt: skip
        dp = dot_heads(do, v, zeros(BLOCK_M, BLOCK_N, ACC), PRECISION)
        if DROPOUT > 0:
            dp *= window_dropout(seed_ptr, window, h, H, m, n, DROPOUT, ACC)
        dbias += of_queries(weights_of(s, lse), in_image, PADDING) * (dp - delta[:, None])
    ptrs = dbias_ptr + ((group.to(tl.int64) * H + h) * TOKENS + m[:, None]) * TOKENS + n[None, :]
    tl.store(ptrs, dbias, mask=(m < TOKENS)[:, None] & (n < TOKENS)[None, :])


@triton.jit
def _window_attention_table_kernel(
    dbias_ptr,  # (H, tokens, tokens)
    dtable_ptr,  # (entries, H)
    H,
    SHAPE: tl.constexpr,
    ENTRIES: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    TOKENS: tl.constexpr = SHAPE[7]
    COLUMNS: tl.constexpr = 2 * SHAPE[1] - 1
    BLOCKS: tl.constexpr = tl.cdiv(ENTRIES, BLOCK_E)
    pid = tl.program_id(0)
    h = (pid // BLOCKS).to(tl.int64)
    entry = pid % BLOCKS * BLOCK_E + tl.arange(0, BLOCK_E)
    dy = entry // COLUMNS - (SHAPE[0] - 1)
    dx = entry % COLUMNS - (SHAPE[1] - 1)
    exists = entry < (2 * SHAPE[0] - 1) * COLUMNS
    head = dbias_ptr + h * TOKENS * TOKENS
    total = tl.zeros((BLOCK_M, BLOCK_E), ACC)
    for start in range(0, TOKENS, BLOCK_M):
        m = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
        place = m - SHAPE[4]
        y = (place // SHAPE[1])[:, None] - dy[None, :]
        x = (place % SHAPE[1])[:, None] - dx[None, :]
        inside = (y >= 0) & (y < SHAPE[0]) & (x >= 0) & (x < SHAPE[1]) & exists[None, :]
        n = SHAPE[4] + y * SHAPE[1] + x
        if SHAPE[4] > 0:
            inside = inside & (place >= 0)[:, None]
        inside = inside & (m < TOKENS)[:, None]
        total += tl.load(head + m[:, None] * TOKENS + n, mask=inside, other=0.0)
    sums = tl.sum(total, axis=0)
    if SHAPE[4] > 0 and (pid % BLOCKS + 1) * BLOCK_E > ENTRIES - 3:  # BEiT's three entries are the last
        of_row = tl.zeros((BLOCK_M,), ACC)
        of_column = tl.zeros((BLOCK_M,), ACC)
        for prefix in range(0, SHAPE[4]):
            for start in range(0, TOKENS, BLOCK_M):
                m = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
                token = (m >= SHAPE[4]) & (m < TOKENS)
                of_row += tl.load(head + prefix * TOKENS + m, mask=token, other=0.0)
                of_column += tl.load(head + m * TOKENS + prefix, mask=token, other=0.0)
        corner = tl.zeros((BLOCK_M,), ACC)
        for prefix in range(0, SHAPE[4]):
            m = tl.arange(0, BLOCK_M).to(tl.int64)
            corner += tl.load(head + prefix * TOKENS + m, mask=m < SHAPE[4], other=0.0)
        sums = tl.where(entry == ENTRIES - 3, tl.sum(of_row, axis=0), sums)
        sums = tl.where(entry == ENTRIES - 2, tl.sum(of_column, axis=0), sums)
        sums = tl.where(entry == ENTRIES - 1, tl.sum(corner, axis=0), sums)
    tl.store(dtable_ptr + entry.to(tl.int64) * H + h, sums.to(dtable_ptr.dtype.element_ty), mask=entry < ENTRIES)


def window_attention_backward(
    do: Tensor, qkv: Tensor, o: Tensor, lse: Tensor, options: Options, needed: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the backward; return the gradients of qkv, table, padding and logit scale.

    The last three are in their parameters' dtypes, and empty unless ``needed``.
    """
    dqkv, dtable, dpadding, dlogit = backward_outputs(qkv, options, needed)
    if qkv.numel() == 0:
        return dqkv, dtable.zero_(), dpadding.zero_(), dlogit.zero_()
    do, qkv = runtime.unit_stride(do), runtime.unit_stride(qkv)
    gradients = dqkv.flatten(2, 3)  # its rows are those of one of the three
    windows = options.windows
    needs_dtable, needs_dpadding, needs_dlogit = needed
    pads = needs_dpadding and not windows.whole
    H, D = qkv.shape[3:]
    config = config_of(qkv, options)
    wide = lse.dtype
    pairs = H * windows.tokens**2

    def shares(needed: bool, programs: int, width: int) -> tuple[Tensor, Tensor]:
        kept, (argument,) = new_shares([needed], programs, width, wide, qkv.device)
        return kept, argument

    fused = config.whole is not None
    bias = bias_of(options, pairs=not fused, in_fp64=qkv.dtype == torch.float64)
    sums_table = needs_dtable and fused and config.whole_sums_table
    delta = lse.new_empty(lse.shape[:3]) if not fused or (needs_dtable and not sums_table) else lse
    if fused:
        arguments, total = launch_arguments(qkv, options, config.whole, bias, do, gradients)
        per_program, groups = groups_of(total, H, True, qkv)
        bias_shares, dbias = shares(sums_table, groups, pairs)
        padding_shares, padding_sums = shares(pads, groups, 3 * H * D)
        logit_shares, logit_sums = shares(needs_dlogit, groups, H)
        _window_attention_bwd_whole_kernel[(groups * H,)](
            **arguments,
            do_ptr=do,
            dqkv_ptr=dqkv,
            delta_ptr=delta,
            dbias_ptr=dbias,
            dpadding_ptr=padding_sums,
            dlogit_ptr=logit_sums,
            windows=per_program,
            scale=options.scale,
            NEEDS_DTABLE=sums_table,
            NEEDS_DPADDING=pads,
            NEEDS_DLOGIT=needs_dlogit,
            NEEDS_DELTA=delta is not lse,
        )
    else:
        arguments, total = launch_arguments(qkv, options, config.dq, bias, o, do, gradients)
        blocks = runtime.cdiv(windows.tokens, config.dq.block_m)
        logit_shares, logit_sums = shares(needs_dlogit, total * blocks * config.dq.block_m, H)
        _window_attention_bwd_dq_kernel[(total * H * blocks,)](
            **arguments,
            do_ptr=do,
            o_ptr=o,
            lse_ptr=lse,
            delta_ptr=delta,
            dqkv_ptr=dqkv,
            dlogit_ptr=logit_sums,
            stride_do_b=do.stride(0),
            stride_do_n=do.stride(1),
            stride_do_h=do.stride(2),
            scale=options.scale,
            NEEDS_DLOGIT=needs_dlogit,
        )
        arguments, _ = launch_arguments(qkv, options, config.dkv, bias, do, gradients)
        blocks = runtime.cdiv(windows.tokens, config.dkv.block_n)
        padding_shares, padding_sums = shares(pads, total * blocks, 3 * H * D)
        _window_attention_bwd_dkv_kernel[(total * H * blocks,)](
            **arguments,
            do_ptr=do,
            lse_ptr=lse,
            delta_ptr=delta,
            dqkv_ptr=dqkv,
            dpadding_ptr=padding_sums,
            scale=options.scale,
            NEEDS_DPADDING=pads,
        )
    if needs_dtable and not sums_table:
        tiling = config.dtable
        arguments, _ = launch_arguments(qkv, options, tiling, bias, do)
        tiles = runtime.cdiv(windows.tokens, tiling.block_m) * runtime.cdiv(windows.tokens, tiling.block_n)
        per_program, groups = _table_groups(total, tiles * H, qkv)
        bias_shares, dbias = shares(True, groups, pairs)
        _window_attention_bwd_dbias_kernel[(groups * H * tiles,)](
            **arguments,
            do_ptr=do,
            lse_ptr=lse,
            delta_ptr=delta,
            dbias_ptr=dbias,
            windows=per_program,
        )
    if needs_dtable:
        _fold(sum_shares(bias_shares, [True], [wide])[0], dtable, windows, H)
    if pads:
        dpadding = sum_shares(padding_shares, [True], [options.padding.dtype])[0].view(3, H, D)
    if needs_dlogit:
        dlogit = sum_shares(logit_shares, [True], [options.logit_scale.dtype])[0]
    return dqkv, dtable, dpadding, dlogit


def _table_groups(total: int, programs: int, qkv: Tensor) -> tuple[int, int]:
    """Return the windows per program and the programs per tile of the table's gradient: just enough to fill the device
    twice, since each writes a tile."""
    groups = min(total, runtime.cdiv(2 * runtime.device_facts(qkv.device).num_sms, programs))
    windows = runtime.cdiv(total, groups)
    return windows, runtime.cdiv(total, windows)


def _fold(dbias: Tensor, dtable: Tensor, windows: Windows, H: int) -> None:
    """Sum dbias (H, tokens, tokens) into dtable (entries, H)."""
    block_e = 32
    _window_attention_table_kernel[(H * runtime.cdiv(windows.entries, block_e),)](
        dbias_ptr=dbias,
        dtable_ptr=dtable,
        H=H,
        SHAPE=windows.constants,
        ENTRIES=windows.entries,
        ACC=accumulator(dbias.dtype),
        BLOCK_E=block_e,
        BLOCK_M=32,
        num_warps=4,
    )


def backward_outputs(
    qkv: Tensor, options: Options, needed: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Allocate the outputs of :func:`window_attention_backward`."""
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    parameters = (options.table, options.padding, options.logit_scale)
    # Of whole windows no kernel writes a gradient of the padding.
    return dqkv, *(
        (torch.zeros if p is options.padding and options.windows.whole else torch.empty)(
            p.shape, dtype=p.dtype, device=qkv.device
        )
        if n
        else qkv.new_empty(0)
        for p, n in zip(parameters, needed, strict=True)
    )
