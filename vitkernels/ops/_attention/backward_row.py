"""Backward of attention where one program sees whole rows: one kernel reads every operand once.

    row      one program per head; it keeps keys and values loaded, loops over queries, and holds dk and dv in registers
    windows  one tile holds all queries and keys of a window; a program processes one head of several windows, and also
             sums the gradient of a bias that they share

Both kernels see whole rows. So they recompute the softmax and delta = Σ P · dP, and read neither lse nor o: in fp32,
weights from a rounded lse have 1.6 times the error of PyTorch's, recomputed ones 1.1 times (150 keys, 40 draws).
"""

from __future__ import annotations

from vitkernels.ops._attention.tiles import (
    add_key_bias,
    columns,
    dot_heads,
    dropout_scale,
    exp_scores,
    head_ptr,
    load_head,
    load_mask,
    masked,
    masked_scores,
    scaled_head,
    store_head,
    store_sums,
    transposed,
    weighted_sum,
    weighted_sum_columns,
    zero_columns,
    zero_head,
    zeros,
)
from vitkernels.ops._triton import tl, triton


@triton.jit
def _softmax_columns(s, MASK: tl.constexpr):
    """Softmax over the keys of transposed scores; 0 if a query attends to no key."""
    maximum = tl.max(s, axis=0)
    p = exp_scores(s - tl.where(maximum == float("-inf"), 0.0, maximum)[None, :], MASK)
    total = tl.sum(p, axis=0)
    return p * (1.0 / tl.where(total == 0.0, 1.0, total))[None, :]


@triton.jit
def _attention_bwd_row_kernel(
    do_ptr,  # (B, N_q, H, D)
    q_ptr,  # (B, N_q, H, D)
    k_ptr,  # (B, N_kv, H, D)
    v_ptr,  # (B, N_kv, H, D)
    mask_ptr,  # (B, H, N_q, N_kv) by strides, with MASK
    key_bias_ptr,  # (B, N_kv) by stride, with KEY_BIAS
    seed_ptr,  # (1,), with DROPOUT
    lse_ptr,  # (B, H, N_q), base-2 log-sum-exp, without a MASK
    delta_ptr,  # (B, H, N_q), written with NEEDS_DELTA
    dq_ptr,  # (B, N_q, H, D)
    dk_ptr,  # (B, N_kv, H, D)
    dv_ptr,  # (B, N_kv, H, D), the strides of dk
    dkey_bias_ptr,  # (B, H, N_kv): the sums of dS over queries, with NEEDS_DKEY_BIAS
    sums_ptr,  # (B, 3, H, D): the sums over tokens of dq, dk and dv, with NEEDS_SUMS
    stride_do_b,
    stride_do_n,
    stride_do_h,
    stride_q_b,
    stride_q_n,
    stride_q_h,
    stride_k_b,
    stride_k_n,
    stride_k_h,
    stride_v_b,
    stride_v_n,
    stride_v_h,
    stride_dq_b,
    stride_dq_n,
    stride_dq_h,
    stride_dk_b,
    stride_dk_n,
    stride_dk_h,
    stride_mask_b,
    stride_mask_h,
    stride_mask_m,
    stride_key_bias_b,
    mask_width,
    N_q,
    N_kv,
    H,
    scale: tl.constexpr,  # a runtime argument would be fp32, even for fp64 tensors
    score_scale: tl.constexpr,
    D: tl.constexpr,
    MASK: tl.constexpr,
    MASK_M: tl.constexpr,
    MASK_N: tl.constexpr,
    KEY_BIAS: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    NEEDS_DKEY_BIAS: tl.constexpr,
    NEEDS_SUMS: tl.constexpr,
    NEEDS_DELTA: tl.constexpr,
    ALIGN: tl.constexpr,
    INDEX: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # all keys
    PARTS: tl.constexpr,
):
    bh = tl.program_id(0).to(tl.int64)
    b = bh // H
    h = bh % H
    q_head = head_ptr(q_ptr, b, h, 0, stride_q_b, stride_q_n, stride_q_h, ALIGN)
    k_head = head_ptr(k_ptr, b, h, 0, stride_k_b, stride_k_n, stride_k_h, ALIGN)
    v_head = head_ptr(v_ptr, b, h, 0, stride_v_b, stride_v_n, stride_v_h, ALIGN)
    do_head = head_ptr(do_ptr, b, h, 0, stride_do_b, stride_do_n, stride_do_h, ALIGN)
    dq_head = head_ptr(dq_ptr, b, h, 0, stride_dq_b, stride_dq_n, stride_dq_h, ALIGN)
    mask_head = mask_ptr + b * stride_mask_b + h * stride_mask_h
    bias_row = key_bias_ptr + b * stride_key_bias_b

    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < N_kv
    k = load_head(k_head, offs_n.to(INDEX), stride_k_n, mask_n, D, PARTS, ALIGN)
    v = load_head(v_head, offs_n.to(INDEX), stride_v_n, mask_n, D, PARTS, ALIGN)
    dk = zero_head(BLOCK_N, PARTS, ACC)
    dv = zero_head(BLOCK_N, PARTS, ACC)
    dq_sums = zero_columns(1, PARTS, ACC)
    dkey_bias = tl.zeros((BLOCK_N,), ACC)

    # Scores are transposed, keys by queries: wgmma needs 64 rows or more, and the products for dk and dv need no
    # transposed weights. dq is transposed, too. One piece holds all keys: split into 128, 64 and 16, the gradients of
    # 197 keys spill (sm_90, head dim 64: 1.6 KB per thread).
    for start in range(0, N_q, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        mask_m = offs_m < N_q
        q = load_head(q_head, offs_m.to(INDEX), stride_q_n, mask_m, D, PARTS, ALIGN)
        do = load_head(do_head, offs_m.to(INDEX), stride_do_n, mask_m, D, PARTS, ALIGN)
        s = dot_heads(k, q, zeros(BLOCK_N, BLOCK_M, ACC), PRECISION) * score_scale
        s = add_key_bias(s, bias_row, offs_n[:, None], mask_n[:, None], MASK, KEY_BIAS)
        s = masked_scores(
            s, mask_head, offs_m.to(INDEX)[None, :], offs_n[:, None], mask_n[:, None], N_q, mask_width, stride_mask_m,
            MASK, MASK_M, MASK_N, IS_CAUSAL, False,
        )  # fmt: skip
        if MASK == "" and not KEY_BIAS:  # with either, the row sums of the forward would cost registers
            lse = tl.load(lse_ptr + bh * N_q + offs_m, mask=mask_m, other=float("inf"))
            p = tl.exp2(s - lse[None, :])
        else:
            p = _softmax_columns(s, MASK)
        dp = dot_heads(v, do, zeros(BLOCK_N, BLOCK_M, ACC), PRECISION)
        if DROPOUT > 0:
            keep = dropout_scale(tl.load(seed_ptr), bh, offs_m[None, :], offs_n[:, None], DROPOUT, ACC)
            dv = weighted_sum(p * keep, do, dv, PRECISION)
            dp *= keep
        else:
            dv = weighted_sum(p, do, dv, PRECISION)
        delta = tl.sum(p * dp, axis=0)
        ds = p * (dp - delta[None, :])
        dk = weighted_sum(ds, q, dk, PRECISION)
        if NEEDS_DKEY_BIAS:
            dkey_bias += tl.sum(ds, axis=1)
        dq = scaled_head(weighted_sum_columns(k, ds, zero_columns(BLOCK_M, PARTS, ACC), PRECISION), scale)
        store_head(dq_head, transposed(dq), offs_m.to(INDEX), stride_dq_n, mask_m, D, PARTS, ALIGN)
        if NEEDS_DELTA:
            tl.store(delta_ptr + bh * N_q + offs_m, delta, mask=mask_m)
        if NEEDS_SUMS:
            dq_sums = _add_column_sums(dq_sums, dq)

    dk = scaled_head(dk, scale)
    dk_head = head_ptr(dk_ptr, b, h, 0, stride_dk_b, stride_dk_n, stride_dk_h, ALIGN)
    dv_head = head_ptr(dv_ptr, b, h, 0, stride_dk_b, stride_dk_n, stride_dk_h, ALIGN)
    store_head(dk_head, dk, offs_n.to(INDEX), stride_dk_n, mask_n, D, PARTS, ALIGN)
    store_head(dv_head, dv, offs_n.to(INDEX), stride_dk_n, mask_n, D, PARTS, ALIGN)
    if NEEDS_DKEY_BIAS:
        tl.store(dkey_bias_ptr + bh * N_kv + offs_n, dkey_bias, mask=mask_n)
    if NEEDS_SUMS:
        sums = sums_ptr + (b * 3 * H + h) * D
        _store_column_sums(sums, dq_sums, D, PARTS)
        store_sums(sums + H * D, dk, mask_n, D, PARTS)
        store_sums(sums + 2 * H * D, dv, mask_n, D, PARTS)


@triton.jit
def _add_column_sums(sums, columns_of):
    """Add the sums over the columns of a transposed head to ``sums``, (part, 1) each."""
    new = ()
    for j in tl.static_range(len(columns_of)):
        new = new + (sums[j] + tl.sum(columns_of[j], axis=1)[:, None],)
    return new


@triton.jit
def _add_row_sums(sums, head):
    """Add the sums over the rows of a head to ``sums``, (part, 1) each; rows beyond the last are zero."""
    new = ()
    for j in tl.static_range(len(head)):
        new = new + (sums[j] + tl.sum(head[j], axis=0)[:, None],)
    return new


@triton.jit
def _store_column_sums(ptr, sums, D: tl.constexpr, PARTS: tl.constexpr):
    for j in tl.static_range(len(PARTS)):
        cols = columns(PARTS, j)
        tl.store(ptr + cols, tl.sum(sums[j], axis=1), mask=cols < D)


@triton.jit(do_not_specialize=["B"])
def _attention_bwd_windows_kernel(
    do_ptr,  # (B, N_q, H, D)
    q_ptr,  # (B, N_q, H, D)
    k_ptr,  # (B, N_kv, H, D)
    v_ptr,  # (B, N_kv, H, D)
    mask_ptr,  # (B, H, N_q, N_kv) by strides, with MASK
    key_bias_ptr,  # (B, N_kv) by stride, with KEY_BIAS
    seed_ptr,  # (1,), with DROPOUT
    delta_ptr,  # (B, H, N_q), written with NEEDS_DELTA
    dq_ptr,  # (B, N_q, H, D)
    dk_ptr,  # (B, N_kv, H, D)
    dv_ptr,  # (B, N_kv, H, D), the strides of dk
    dkey_bias_ptr,  # (B, H, N_kv): the sums of dS over queries, with NEEDS_DKEY_BIAS
    sums_ptr,  # (groups, 3, H, D): the sums over tokens of dq, dk and dv of each program's windows, with NEEDS_SUMS
    dmask_ptr,  # (groups, H, N_q, N_kv): the sums of dS over each program's windows, with NEEDS_DMASK
    stride_do_b,
    stride_do_n,
    stride_do_h,
    stride_q_b,
    stride_q_n,
    stride_q_h,
    stride_k_b,
    stride_k_n,
    stride_k_h,
    stride_v_b,
    stride_v_n,
    stride_v_h,
    stride_dq_b,
    stride_dq_n,
    stride_dq_h,
    stride_dk_b,
    stride_dk_n,
    stride_dk_h,
    stride_mask_b,
    stride_mask_h,
    stride_mask_m,
    stride_key_bias_b,
    mask_width,
    B,
    N_q,
    N_kv,
    H,
    windows,  # images per program
    scale: tl.constexpr,  # a runtime argument would be fp32, even for fp64 tensors
    score_scale: tl.constexpr,
    D: tl.constexpr,
    MASK: tl.constexpr,
    MASK_M: tl.constexpr,
    MASK_N: tl.constexpr,
    KEY_BIAS: tl.constexpr,
    MASK_B: tl.constexpr,  # whether the mask varies over images
    IS_CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    NEEDS_DKEY_BIAS: tl.constexpr,
    NEEDS_SUMS: tl.constexpr,
    NEEDS_DELTA: tl.constexpr,
    NEEDS_DMASK: tl.constexpr,
    ALIGN: tl.constexpr,
    INDEX: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr,
):
    pid = tl.program_id(0)
    h = (pid % H).to(tl.int64)
    group = (pid // H).to(tl.int64)
    first = group * windows
    m = tl.arange(0, BLOCK_M).to(INDEX)
    n = tl.arange(0, BLOCK_N).to(INDEX)
    mask_m = m < N_q
    mask_n = n < N_kv
    mask_head = mask_ptr + h * stride_mask_h
    mask = 0
    if MASK != "" and not MASK_B:  # read once for all windows
        mask = load_mask(mask_head, m[None, :], n[:, None], N_q, mask_width, stride_mask_m, MASK_M, MASK_N)
    dq_sums = zero_columns(1, PARTS, ACC)
    dk_sums = zero_columns(1, PARTS, ACC)
    dv_sums = zero_columns(1, PARTS, ACC)
    dmask = tl.zeros((BLOCK_N, BLOCK_M), ACC)
    for b in range(first, tl.minimum(first + windows, B)):
        q = load_head(
            head_ptr(q_ptr, b, h, 0, stride_q_b, stride_q_n, stride_q_h, ALIGN), m, stride_q_n, mask_m, D, PARTS, ALIGN
        )
        do = load_head(
            head_ptr(do_ptr, b, h, 0, stride_do_b, stride_do_n, stride_do_h, ALIGN),
            m, stride_do_n, mask_m, D, PARTS, ALIGN,
        )  # fmt: skip
        k = load_head(
            head_ptr(k_ptr, b, h, 0, stride_k_b, stride_k_n, stride_k_h, ALIGN), n, stride_k_n, mask_n, D, PARTS, ALIGN
        )
        v = load_head(
            head_ptr(v_ptr, b, h, 0, stride_v_b, stride_v_n, stride_v_h, ALIGN), n, stride_v_n, mask_n, D, PARTS, ALIGN
        )
        bh = b * H + h
        s = dot_heads(k, q, zeros(BLOCK_N, BLOCK_M, ACC), PRECISION) * score_scale
        bias_row = key_bias_ptr + b * tl.cast(stride_key_bias_b, tl.int64)
        s = add_key_bias(s, bias_row, n[:, None], mask_n[:, None], MASK, KEY_BIAS)
        window_mask = mask
        if MASK != "" and MASK_B:
            window_mask = load_mask(
                mask_head + b * tl.cast(stride_mask_b, tl.int64), m[None, :], n[:, None], N_q, mask_width,
                stride_mask_m, MASK_M, MASK_N,
            )  # fmt: skip
        s = masked(s, window_mask, m[None, :], n[:, None], mask_n[:, None], MASK, IS_CAUSAL, False)
        p = _softmax_columns(s, MASK)
        dp = dot_heads(v, do, zeros(BLOCK_N, BLOCK_M, ACC), PRECISION)
        dv = zero_head(BLOCK_N, PARTS, ACC)
        if DROPOUT > 0:
            counters_m, counters_n = m.to(tl.int32)[None, :], n.to(tl.int32)[:, None]
            keep = dropout_scale(tl.load(seed_ptr), bh, counters_m, counters_n, DROPOUT, ACC)
            dv = weighted_sum(p * keep, do, dv, PRECISION)
            dp *= keep
        else:
            dv = weighted_sum(p, do, dv, PRECISION)
        delta = tl.sum(p * dp, axis=0)
        ds = p * (dp - delta[None, :])
        dk = scaled_head(weighted_sum(ds, q, zero_head(BLOCK_N, PARTS, ACC), PRECISION), scale)
        dq = scaled_head(weighted_sum_columns(k, ds, zero_columns(BLOCK_M, PARTS, ACC), PRECISION), scale)
        dq_head = head_ptr(dq_ptr, b, h, 0, stride_dq_b, stride_dq_n, stride_dq_h, ALIGN)
        dk_head = head_ptr(dk_ptr, b, h, 0, stride_dk_b, stride_dk_n, stride_dk_h, ALIGN)
        dv_head = head_ptr(dv_ptr, b, h, 0, stride_dk_b, stride_dk_n, stride_dk_h, ALIGN)
        store_head(dq_head, transposed(dq), m, stride_dq_n, mask_m, D, PARTS, ALIGN)
        store_head(dk_head, dk, n, stride_dk_n, mask_n, D, PARTS, ALIGN)
        store_head(dv_head, dv, n, stride_dk_n, mask_n, D, PARTS, ALIGN)
        if NEEDS_DELTA:
            tl.store(delta_ptr + bh * N_q + m, delta, mask=mask_m)
        if NEEDS_DMASK:
            dmask += ds
        if NEEDS_DKEY_BIAS:
            tl.store(dkey_bias_ptr + bh * N_kv + n, tl.sum(ds, axis=1), mask=mask_n)
        if NEEDS_SUMS:
            dq_sums = _add_column_sums(dq_sums, dq)
            dk_sums = _add_row_sums(dk_sums, dk)
            dv_sums = _add_row_sums(dv_sums, dv)

    if NEEDS_DMASK:
        ptrs = dmask_ptr + ((group * H + h) * N_q + m[None, :]) * N_kv + n[:, None]
        tl.store(ptrs, dmask, mask=mask_m[None, :] & mask_n[:, None])
    if NEEDS_SUMS:
        sums = sums_ptr + (group * 3 * H + h) * D
        _store_column_sums(sums, dq_sums, D, PARTS)
        _store_column_sums(sums + H * D, dk_sums, D, PARTS)
        _store_column_sums(sums + 2 * H * D, dv_sums, D, PARTS)
