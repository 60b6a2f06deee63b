"""Backward of attention for rows of any length, where no program sees all keys.

dq      one program per block of queries, loops over keys; also computes delta = Σ o · do, for dkv
dkv     one program per block of keys, loops over queries
dmask   one program per tile of a bias, loops over the images (or heads) that share it
delta   computes delta if dq is not needed

Weights are computed from the forward's lse, which is rounded: in fp32 their RMS error is 1.6 times PyTorch's (150 keys,
40 draws). It is visible in the gradient of a bias, where no sum averages it out; in 16 bits rounding hides it.
"""

from __future__ import annotations

from vitkernels.ops._attention.tiles import (
    add_key_bias,
    dot_heads,
    dot_rows,
    dropout_scale,
    head_ptr,
    image_of,
    load_head,
    load_log_total,
    load_lse,
    masked_scores,
    scaled_head,
    statistics_of,
    store_head,
    store_sums,
    weighted_sum,
    weights_of,
    zero_head,
    zeros,
)
from vitkernels.ops._triton import tl, triton


@triton.jit(do_not_specialize=["N_q", "num_blocks"])
def _attention_bwd_delta_kernel(
    o_ptr,  # (B, N_q, H, D)
    do_ptr,  # (B, N_q, H, D)
    delta_ptr,  # (B, H, N_q)
    stride_o_b,
    stride_o_n,
    stride_o_h,
    stride_do_b,
    stride_do_n,
    stride_do_h,
    N_q,
    H,
    num_blocks,
    D: tl.constexpr,
    ALIGN: tl.constexpr,
    INDEX: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PARTS: tl.constexpr,
):
    pid = tl.program_id(0)
    pid_m = (pid % num_blocks).to(INDEX)
    bh = (pid // num_blocks).to(tl.int64)
    b = bh // H
    h = bh % H
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < N_q
    o_head = head_ptr(o_ptr, b, h, 0, stride_o_b, stride_o_n, stride_o_h, ALIGN)
    do_head = head_ptr(do_ptr, b, h, 0, stride_do_b, stride_do_n, stride_do_h, ALIGN)
    o = load_head(o_head, offs_m, stride_o_n, mask_m, D, PARTS, ALIGN)
    do = load_head(do_head, offs_m, stride_do_n, mask_m, D, PARTS, ALIGN)
    tl.store(delta_ptr + bh * N_q + offs_m, dot_rows(o, do, ACC), mask=mask_m)


@triton.jit(do_not_specialize=["T", "num_blocks"])
def _attention_bwd_dq_kernel(
    do_ptr,  # (B, N_q, H, D); (1, all tokens, H, D) with VARLEN
    q_ptr,  # (B, N_q, H, D)
    k_ptr,  # (B, N_kv, H, D)
    v_ptr,  # (B, N_kv, H, D)
    o_ptr,  # (B, N_q, H, D)
    lse_ptr,  # (B, H, N_q), with a floating MASK (B, H, N_q, 2)
    mask_ptr,  # (B, H, N_q, N_kv) by strides, with MASK
    key_bias_ptr,  # (B, N_kv) by stride, with KEY_BIAS; (1, all tokens) with VARLEN
    seed_ptr,  # (1,), with DROPOUT
    starts_ptr,  # (images + 1,), the first token of each image and the end, with VARLEN
    delta_ptr,  # (B, H, N_q), written
    dq_ptr,  # (B, N_q, H, D)
    sums_ptr,  # (B, blocks, H, D): each block's sum over queries of dq, with NEEDS_SUMS
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
    stride_o_b,
    stride_o_n,
    stride_o_h,
    stride_dq_b,
    stride_dq_n,
    stride_dq_h,
    stride_mask_b,
    stride_mask_h,
    stride_mask_m,
    stride_key_bias_b,
    mask_width,
    N_q,
    N_kv,
    T,  # tokens of all images, with VARLEN; N_q and N_kv are then 0
    H,
    num_blocks,
    scale: tl.constexpr,  # a runtime argument would be fp32, even for fp64 tensors
    score_scale: tl.constexpr,
    D: tl.constexpr,
    MASK: tl.constexpr,
    MASK_M: tl.constexpr,
    MASK_N: tl.constexpr,
    KEY_BIAS: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    VARLEN: tl.constexpr,
    NEEDS_SUMS: tl.constexpr,
    ALIGN: tl.constexpr,
    INDEX: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr,
):
    pid = tl.program_id(0)
    pid_m = (pid % num_blocks).to(INDEX)
    bh = (pid // num_blocks).to(tl.int64)
    b = bh // H
    h = bh % H
    first = 0
    rows = bh * N_q
    lse_head = statistics_of(lse_ptr, bh, N_q, MASK)
    if VARLEN:
        first, N_kv = image_of(starts_ptr, b, T)
        rows = h * T + first
        lse_head = lse_ptr + rows
        N_q = N_kv
        b = b * 0
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < N_q
    q_head = head_ptr(q_ptr, b, h, first, stride_q_b, stride_q_n, stride_q_h, ALIGN)
    do_head = head_ptr(do_ptr, b, h, first, stride_do_b, stride_do_n, stride_do_h, ALIGN)
    o_head = head_ptr(o_ptr, b, h, first, stride_o_b, stride_o_n, stride_o_h, ALIGN)
    k_head = head_ptr(k_ptr, b, h, first, stride_k_b, stride_k_n, stride_k_h, ALIGN)
    v_head = head_ptr(v_ptr, b, h, first, stride_v_b, stride_v_n, stride_v_h, ALIGN)
    mask_head = mask_ptr + b * stride_mask_b + h * stride_mask_h
    bias_row = key_bias_ptr + b * stride_key_bias_b + first
    q = load_head(q_head, offs_m, stride_q_n, mask_m, D, PARTS, ALIGN)
    do = load_head(do_head, offs_m, stride_do_n, mask_m, D, PARTS, ALIGN)
    lse = load_lse(lse_head, offs_m, N_q, MASK)
    delta = dot_rows(load_head(o_head, offs_m, stride_o_n, mask_m, D, PARTS, ALIGN), do, ACC)
    tl.store(delta_ptr + rows + offs_m, delta, mask=mask_m)

    visible = N_kv
    if IS_CAUSAL:
        visible = tl.minimum(N_kv, pid_m * BLOCK_M + BLOCK_M)
    if VARLEN:  # a program beyond the last query of its image has no work
        visible = tl.where(pid_m * BLOCK_M < N_q, visible, 0)
    dq = zero_head(BLOCK_M, PARTS, ACC)
    if MASK == "bool" and q_ptr.dtype.element_ty.primitive_bitwidth == 16:  # as in the dkv kernel
        tl.assume(visible > 0)
    for start in range(0, visible, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N).to(INDEX)
        mask_n = offs_n < N_kv
        k = load_head(k_head, offs_n, stride_k_n, mask_n, D, PARTS, ALIGN)
        v = load_head(v_head, offs_n, stride_v_n, mask_n, D, PARTS, ALIGN)
        s = dot_heads(q, k, zeros(BLOCK_M, BLOCK_N, ACC), PRECISION) * score_scale
        s = add_key_bias(s, bias_row, offs_n[None, :], mask_n[None, :], MASK, KEY_BIAS)
        s = masked_scores(
            s, mask_head, offs_m[:, None], offs_n[None, :], mask_n[None, :], N_q, mask_width, stride_mask_m,
            MASK, MASK_M, MASK_N, IS_CAUSAL, False,
        )  # fmt: skip
        p = weights_of(s, lse[:, None], 0.0, MASK)  # with a floating mask, division by the row's sum follows below
        dp = dot_heads(do, v, zeros(BLOCK_M, BLOCK_N, ACC), PRECISION)
        if DROPOUT > 0:
            counters_m, counters_n = offs_m.to(tl.int32)[:, None], offs_n.to(tl.int32)[None, :]
            dp *= dropout_scale(tl.load(seed_ptr), bh, counters_m, counters_n, DROPOUT, ACC)
        dq = weighted_sum(p * (dp - delta[:, None]), k, dq, PRECISION)

    if MASK == "float":
        dq = scaled_head(dq, tl.exp2(-load_log_total(lse_head, offs_m, N_q, MASK))[:, None])
    dq = scaled_head(dq, scale)
    dq_head = head_ptr(dq_ptr, b, h, first, stride_dq_b, stride_dq_n, stride_dq_h, ALIGN)
    store_head(dq_head, dq, offs_m, stride_dq_n, mask_m, D, PARTS, ALIGN)
    if NEEDS_SUMS:
        store_sums(sums_ptr + ((b * num_blocks + pid % num_blocks) * H + h) * D, dq, mask_m, D, PARTS)


@triton.jit(do_not_specialize=["T", "num_blocks"])
def _attention_bwd_dkv_kernel(
    do_ptr,  # (B, N_q, H, D); (1, all tokens, H, D) with VARLEN
    q_ptr,  # (B, N_q, H, D)
    k_ptr,  # (B, N_kv, H, D)
    v_ptr,  # (B, N_kv, H, D)
    lse_ptr,  # (B, H, N_q), with a floating MASK (B, H, N_q, 2)
    mask_ptr,  # (B, H, N_q, N_kv) by strides, with MASK
    key_bias_ptr,  # (B, N_kv) by stride, with KEY_BIAS; (1, all tokens) with VARLEN
    seed_ptr,  # (1,), with DROPOUT
    starts_ptr,  # (images + 1,), the first token of each image and the end, with VARLEN
    delta_ptr,  # (B, H, N_q)
    dk_ptr,  # (B, N_kv, H, D)
    dv_ptr,  # (B, N_kv, H, D), the strides of dk
    dkey_bias_ptr,  # (B, H, N_kv): the sums of dS over queries, with NEEDS_DKEY_BIAS
    sums_ptr,  # (B, blocks, 2, H, D): each block's sums over keys of dk and dv, with NEEDS_SUMS
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
    T,  # tokens of all images, with VARLEN; N_q and N_kv are then 0
    H,
    num_blocks,
    scale: tl.constexpr,  # a runtime argument would be fp32, even for fp64 tensors
    score_scale: tl.constexpr,
    D: tl.constexpr,
    MASK: tl.constexpr,
    MASK_M: tl.constexpr,
    MASK_N: tl.constexpr,
    KEY_BIAS: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    VARLEN: tl.constexpr,
    NEEDS_DKEY_BIAS: tl.constexpr,
    NEEDS_SUMS: tl.constexpr,
    ALIGN: tl.constexpr,
    INDEX: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr,
):
    pid = tl.program_id(0)
    pid_n = (pid % num_blocks).to(INDEX)
    bh = (pid // num_blocks).to(tl.int64)
    b = bh // H
    h = bh % H
    first = 0
    rows = bh * N_q
    lse_head = statistics_of(lse_ptr, bh, N_q, MASK)
    if VARLEN:
        first, N_kv = image_of(starts_ptr, b, T)
        rows = h * T + first
        lse_head = lse_ptr + rows
        N_q = N_kv
        b = b * 0
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N_kv
    q_head = head_ptr(q_ptr, b, h, first, stride_q_b, stride_q_n, stride_q_h, ALIGN)
    do_head = head_ptr(do_ptr, b, h, first, stride_do_b, stride_do_n, stride_do_h, ALIGN)
    k_head = head_ptr(k_ptr, b, h, first, stride_k_b, stride_k_n, stride_k_h, ALIGN)
    v_head = head_ptr(v_ptr, b, h, first, stride_v_b, stride_v_n, stride_v_h, ALIGN)
    mask_head = mask_ptr + b * stride_mask_b + h * stride_mask_h
    bias_row = key_bias_ptr + b * stride_key_bias_b + first
    k = load_head(k_head, offs_n, stride_k_n, mask_n, D, PARTS, ALIGN)
    v = load_head(v_head, offs_n, stride_v_n, mask_n, D, PARTS, ALIGN)

    last = N_q
    if VARLEN:  # a program beyond the last key of its image has no work
        last = tl.where(pid_n * BLOCK_N < N_kv, N_q, 0)
    from_query = 0
    if IS_CAUSAL:
        from_query = pid_n * BLOCK_N // BLOCK_M * BLOCK_M
    # Scores are transposed, keys by queries, so that the products need no transposed weights.
    dk = zero_head(BLOCK_N, PARTS, ACC)
    dv = zero_head(BLOCK_N, PARTS, ACC)
    dkey_bias = tl.zeros((BLOCK_N,), ACC)
    # Could the loop be left out, ptxas would let each wgmma wait for the one before (its message C7515, sm_90). Without
    # a mask it would be told at the price of a program an SM, and without tensor cores for nothing.
    if MASK != "" and not IS_CAUSAL and q_ptr.dtype.element_ty.primitive_bitwidth == 16:
        tl.assume(last > 0)
    for start in range(from_query, last, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M).to(INDEX)
        mask_m = offs_m < N_q
        q = load_head(q_head, offs_m, stride_q_n, mask_m, D, PARTS, ALIGN)
        do = load_head(do_head, offs_m, stride_do_n, mask_m, D, PARTS, ALIGN)
        lse = load_lse(lse_head, offs_m, N_q, MASK)
        log_total = load_log_total(lse_head, offs_m, N_q, MASK)
        delta = tl.load(delta_ptr + rows + offs_m, mask=mask_m, other=0.0)
        s = dot_heads(k, q, zeros(BLOCK_N, BLOCK_M, ACC), PRECISION) * score_scale
        s = add_key_bias(s, bias_row, offs_n[:, None], mask_n[:, None], MASK, KEY_BIAS)
        # Keys beyond the last need no mask: their gradients are not stored.
        s = masked_scores(
            s, mask_head, offs_m[None, :], offs_n[:, None], mask_n[:, None], N_q, mask_width, stride_mask_m,
            MASK, MASK_M, MASK_N, IS_CAUSAL, True,
        )  # fmt: skip
        p = weights_of(s, lse[None, :], log_total[None, :], MASK)
        dp = dot_heads(v, do, zeros(BLOCK_N, BLOCK_M, ACC), PRECISION)
        if DROPOUT > 0:
            counters_m, counters_n = offs_m.to(tl.int32)[None, :], offs_n.to(tl.int32)[:, None]
            keep = dropout_scale(tl.load(seed_ptr), bh, counters_m, counters_n, DROPOUT, ACC)
            dv = weighted_sum(p * keep, do, dv, PRECISION)
            dp *= keep
        else:
            dv = weighted_sum(p, do, dv, PRECISION)
        ds = p * (dp - delta[None, :])
        dk = weighted_sum(ds, q, dk, PRECISION)
        if NEEDS_DKEY_BIAS:
            dkey_bias += tl.sum(ds, axis=1)

    dk = scaled_head(dk, scale)
    dk_head = head_ptr(dk_ptr, b, h, first, stride_dk_b, stride_dk_n, stride_dk_h, ALIGN)
    dv_head = head_ptr(dv_ptr, b, h, first, stride_dk_b, stride_dk_n, stride_dk_h, ALIGN)
    store_head(dk_head, dk, offs_n, stride_dk_n, mask_n, D, PARTS, ALIGN)
    store_head(dv_head, dv, offs_n, stride_dk_n, mask_n, D, PARTS, ALIGN)
    if NEEDS_DKEY_BIAS:
        key_rows = bh * N_kv
        if VARLEN:
            key_rows = rows
        tl.store(dkey_bias_ptr + key_rows + offs_n, dkey_bias, mask=mask_n)
    if NEEDS_SUMS:
        sums = sums_ptr + ((b * num_blocks + pid % num_blocks) * 2 * H + h) * D
        store_sums(sums, dk, mask_n, D, PARTS)
        store_sums(sums + H * D, dv, mask_n, D, PARTS)


@triton.jit(do_not_specialize=["B", "num_splits"])
def _attention_bwd_dmask_kernel(
    do_ptr,  # (B, N_q, H, D)
    q_ptr,  # (B, N_q, H, D)
    k_ptr,  # (B, N_kv, H, D)
    v_ptr,  # (B, N_kv, H, D)
    lse_ptr,  # (B, H, N_q), with a floating MASK (B, H, N_q, 2)
    mask_ptr,  # (B, H, N_q, N_kv) by strides
    key_bias_ptr,  # (B, N_kv) by stride, with KEY_BIAS
    seed_ptr,  # (1,), with DROPOUT
    delta_ptr,  # (B, H, N_q)
    dmask_ptr,  # (splits, B or 1, H or 1, N_q, N_kv): sums of dS over the images and heads that share the mask
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
    stride_mask_b,
    stride_mask_h,
    stride_mask_m,
    stride_key_bias_b,
    mask_width,
    B,
    N_q,
    N_kv,
    H,
    blocks_m,
    blocks_n,
    num_splits,
    scale: tl.constexpr,  # a runtime argument would be fp32, even for fp64 tensors
    score_scale: tl.constexpr,
    D: tl.constexpr,
    MASK: tl.constexpr,
    MASK_M: tl.constexpr,
    MASK_N: tl.constexpr,
    KEY_BIAS: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    MASK_B: tl.constexpr,  # whether the mask varies over images
    MASK_H: tl.constexpr,  # and over heads
    ALIGN: tl.constexpr,
    INDEX: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr,
):
    pid = tl.program_id(0)
    pid_n = (pid % blocks_n).to(INDEX)
    pid_m = (pid // blocks_n % blocks_m).to(INDEX)
    split = pid // (blocks_n * blocks_m) % num_splits
    kept = (pid // (blocks_n * blocks_m) // num_splits).to(tl.int64)  # which (image, head) of the mask
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m < N_q
    mask_n = offs_n < N_kv
    if MASK_B and MASK_H:
        shared = 1
    elif MASK_B:
        shared = H
    elif MASK_H:
        shared = B
    else:
        shared = B * H
    dmask = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for turn in range(split, shared, num_splits):
        i = kept * 0 + turn  # int64, even if the loop counter is int32
        if MASK_B and MASK_H:
            bh = kept
        elif MASK_B:
            bh = kept * H + i
        elif MASK_H:
            bh = i * H + kept
        else:
            bh = i
        b = bh // H
        h = bh % H
        q_head = head_ptr(q_ptr, b, h, 0, stride_q_b, stride_q_n, stride_q_h, ALIGN)
        do_head = head_ptr(do_ptr, b, h, 0, stride_do_b, stride_do_n, stride_do_h, ALIGN)
        k_head = head_ptr(k_ptr, b, h, 0, stride_k_b, stride_k_n, stride_k_h, ALIGN)
        v_head = head_ptr(v_ptr, b, h, 0, stride_v_b, stride_v_n, stride_v_h, ALIGN)
        mask_head = mask_ptr + b * stride_mask_b + h * stride_mask_h
        q = load_head(q_head, offs_m, stride_q_n, mask_m, D, PARTS, ALIGN)
        do = load_head(do_head, offs_m, stride_do_n, mask_m, D, PARTS, ALIGN)
        k = load_head(k_head, offs_n, stride_k_n, mask_n, D, PARTS, ALIGN)
        v = load_head(v_head, offs_n, stride_v_n, mask_n, D, PARTS, ALIGN)
        lse_head = statistics_of(lse_ptr, bh, N_q, MASK)
        lse = load_lse(lse_head, offs_m, N_q, MASK)
        log_total = load_log_total(lse_head, offs_m, N_q, MASK)
        delta = tl.load(delta_ptr + bh * N_q + offs_m, mask=mask_m, other=0.0)
        s = dot_heads(q, k, zeros(BLOCK_M, BLOCK_N, ACC), PRECISION) * score_scale
        bias_row = key_bias_ptr + b * stride_key_bias_b
        s = add_key_bias(s, bias_row, offs_n[None, :], mask_n[None, :], MASK, KEY_BIAS)
        s = masked_scores(
            s, mask_head, offs_m[:, None], offs_n[None, :], mask_n[None, :], N_q, mask_width, stride_mask_m,
            MASK, MASK_M, MASK_N, IS_CAUSAL, True,
        )  # fmt: skip
        p = weights_of(s, lse[:, None], log_total[:, None], MASK)
        dp = dot_heads(do, v, zeros(BLOCK_M, BLOCK_N, ACC), PRECISION)
        if DROPOUT > 0:
            counters_m, counters_n = offs_m.to(tl.int32)[:, None], offs_n.to(tl.int32)[None, :]
            dp *= dropout_scale(tl.load(seed_ptr), bh, counters_m, counters_n, DROPOUT, ACC)
        dmask += p * (dp - delta[:, None])
    num_kept = tl.num_programs(0) // (blocks_m * blocks_n * num_splits)
    tile = dmask_ptr + (split * num_kept + kept) * N_q * N_kv
    ptrs = tile + offs_m.to(tl.int64)[:, None] * N_kv + offs_n[None, :]
    tl.store(ptrs, dmask, mask=mask_m[:, None] & mask_n[None, :])
