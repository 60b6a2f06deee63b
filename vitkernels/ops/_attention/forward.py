"""Forward of attention: three kernels, one per regime, and the launcher.

row      a program holds a whole row of scores, in pieces of keys: no running maximum, no rescaling
windows  one tile holds all queries and keys of a window; a program processes one head of several windows
blocks   any number of keys, block by block with a running maximum (arXiv 1805.02867, 2205.14135); also packed
         images of different lengths

A fourth regime, ``hopper``, is forward_hopper.py's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitkernels import runtime
from vitkernels.ops._attention.config import choose_config, head_parts, key_pieces
from vitkernels.ops._attention.forward_hopper import launch_hopper, suits
from vitkernels.ops._attention.operands import LOG2_E, Options, addressing, strides
from vitkernels.ops._attention.tiles import (
    add_key_bias,
    dot_heads,
    dropout_scale,
    exp_scores,
    head_ptr,
    image_of,
    load_head,
    load_mask,
    masked,
    masked_scores,
    scaled_head,
    statistics_of,
    store_head,
    weighted_sum,
    zero_head,
    zeros,
)
from vitkernels.ops._triton import tl, triton


@triton.jit
def _store_output(
    o, total, m, o_head, lse_head, offs_m, stride_o_n, mask_m, MASK: tl.constexpr, KEY_BIAS: tl.constexpr,
    VARLEN: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Store o / total and the statistics of rows with maximum ``m``."""
    lse = m
    if MASK != "float":
        lse = m + tl.log2(total)
    if MASK != "" or KEY_BIAS or VARLEN:
        # A row that attends to no key gives 0. Its lse of +inf makes its weights and gradients 0 in the backward.
        empty = total == 0.0
        total = tl.where(empty, 1.0, total)
        lse = tl.where(empty, float("inf"), lse)
    store_head(o_head, scaled_head(o, (1.0 / total)[:, None]), offs_m, stride_o_n, mask_m, D, PARTS, ALIGN)
    if MASK == "float":  # two parts: their sum would lose the logarithm next to a maximum of -1e9
        tl.store(lse_head + 2 * offs_m, lse, mask=mask_m)
        tl.store(lse_head + 2 * offs_m + 1, tl.log2(total), mask=mask_m)
    else:
        tl.store(lse_head + offs_m, lse, mask=mask_m)


@triton.jit
def _attention_fwd_row_kernel(
    q_ptr,  # (B, N_q, H, D)
    k_ptr,  # (B, N_kv, H, D)
    v_ptr,  # (B, N_kv, H, D)
    o_ptr,  # (B, N_q, H, D)
    lse_ptr,  # (B, H, N_q), with a floating MASK (B, H, N_q, 2)
    mask_ptr,  # (B, H, N_q, N_kv) by strides, with MASK
    key_bias_ptr,  # (B, N_kv) by stride, with KEY_BIAS
    seed_ptr,  # (1,), with DROPOUT
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
    stride_mask_b,
    stride_mask_h,
    stride_mask_m,
    stride_key_bias_b,
    mask_width,
    N_q,
    N_kv,
    H,
    num_blocks,
    score_scale: tl.constexpr,
    D: tl.constexpr,
    MASK: tl.constexpr,
    MASK_M: tl.constexpr,
    MASK_N: tl.constexpr,
    KEY_BIAS: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    ALIGN: tl.constexpr,
    INDEX: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    STARTS: tl.constexpr,  # of the pieces of keys
    PIECES: tl.constexpr,  # their sizes; all but the last are full
    PARTS: tl.constexpr,
):
    pid = tl.program_id(0)
    pid_m = (pid % num_blocks).to(INDEX)
    bh = (pid // num_blocks).to(tl.int64)
    b = bh // H
    h = bh % H
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < N_q
    v_head = head_ptr(v_ptr, b, h, 0, stride_v_b, stride_v_n, stride_v_h, ALIGN)
    k_head = head_ptr(k_ptr, b, h, 0, stride_k_b, stride_k_n, stride_k_h, ALIGN)
    q_head = head_ptr(q_ptr, b, h, 0, stride_q_b, stride_q_n, stride_q_h, ALIGN)
    mask_head = mask_ptr + b * stride_mask_b + h * stride_mask_h

    # Load the values first: loaded later, they would take registers beside all the scores (sm_90, head dim 64: 251
    # registers per thread instead of 129).
    v = ()
    for i in tl.static_range(len(PIECES)):
        offs_n = STARTS[i] + tl.arange(0, PIECES[i]).to(INDEX)
        v = v + (load_head(v_head, offs_n, stride_v_n, offs_n < N_kv, D, PARTS, ALIGN),)
    q = load_head(q_head, offs_m, stride_q_n, mask_m, D, PARTS, ALIGN)

    m = tl.full((BLOCK_M,), float("-inf"), ACC)
    scores = ()
    for i in tl.static_range(len(PIECES)):
        offs_n = STARTS[i] + tl.arange(0, PIECES[i]).to(INDEX)
        mask_n = offs_n < N_kv
        k = load_head(k_head, offs_n, stride_k_n, mask_n, D, PARTS, ALIGN)
        s = dot_heads(q, k, zeros(BLOCK_M, PIECES[i], ACC), PRECISION) * score_scale
        s = add_key_bias(s, key_bias_ptr + b * stride_key_bias_b, offs_n[None, :], mask_n[None, :], MASK, KEY_BIAS)
        s = masked_scores(
            s, mask_head, offs_m[:, None], offs_n[None, :], mask_n[None, :], N_q, mask_width, stride_mask_m,
            MASK, MASK_M, MASK_N, IS_CAUSAL, i < len(PIECES) - 1,
        )  # fmt: skip
        m = tl.maximum(m, tl.max(s, axis=1))
        scores = scores + (s,)

    # If all scores of a row are -inf, subtracting their maximum would give NaN.
    shift = tl.where(m == float("-inf"), 0.0, m)
    total = tl.zeros((BLOCK_M,), ACC)
    o = zero_head(BLOCK_M, PARTS, ACC)
    for i in tl.static_range(len(PIECES)):
        p = exp_scores(scores[i] - shift[:, None], MASK)
        total += tl.sum(p, axis=1)
        if DROPOUT > 0:
            offs_n = STARTS[i] + tl.arange(0, PIECES[i])
            p *= dropout_scale(tl.load(seed_ptr), bh, offs_m.to(tl.int32)[:, None], offs_n[None, :], DROPOUT, ACC)
        o = weighted_sum(p, v[i], o, PRECISION)

    o_head = head_ptr(o_ptr, b, h, 0, stride_o_b, stride_o_n, stride_o_h, ALIGN)
    lse_head = statistics_of(lse_ptr, bh, N_q, MASK)
    _store_output(o, total, m, o_head, lse_head, offs_m, stride_o_n, mask_m, MASK, KEY_BIAS, False, D, PARTS, ALIGN)


@triton.jit(do_not_specialize=["B"])
def _attention_fwd_windows_kernel(
    q_ptr,  # (B, N_q, H, D)
    k_ptr,  # (B, N_kv, H, D)
    v_ptr,  # (B, N_kv, H, D)
    o_ptr,  # (B, N_q, H, D)
    lse_ptr,  # (B, H, N_q), with a floating MASK (B, H, N_q, 2)
    mask_ptr,  # (B, H, N_q, N_kv) by strides, with MASK
    key_bias_ptr,  # (B, N_kv) by stride, with KEY_BIAS
    seed_ptr,  # (1,), with DROPOUT
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
    score_scale: tl.constexpr,
    D: tl.constexpr,
    MASK: tl.constexpr,
    MASK_M: tl.constexpr,
    MASK_N: tl.constexpr,
    KEY_BIAS: tl.constexpr,
    MASK_B: tl.constexpr,  # whether it varies over images
    IS_CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
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
    first = (pid // H).to(tl.int64) * windows
    m = tl.arange(0, BLOCK_M).to(INDEX)
    n = tl.arange(0, BLOCK_N).to(INDEX)
    mask_m = m < N_q
    mask_n = n < N_kv
    mask_head = mask_ptr + h * stride_mask_h
    mask = 0
    if MASK != "" and not MASK_B:  # read once for all windows
        mask = load_mask(mask_head, m[:, None], n[None, :], N_q, mask_width, stride_mask_m, MASK_M, MASK_N)
    for b in range(first, tl.minimum(first + windows, B)):
        k_head = head_ptr(k_ptr, b, h, 0, stride_k_b, stride_k_n, stride_k_h, ALIGN)
        v_head = head_ptr(v_ptr, b, h, 0, stride_v_b, stride_v_n, stride_v_h, ALIGN)
        q_head = head_ptr(q_ptr, b, h, 0, stride_q_b, stride_q_n, stride_q_h, ALIGN)
        q = load_head(q_head, m, stride_q_n, mask_m, D, PARTS, ALIGN)
        k = load_head(k_head, n, stride_k_n, mask_n, D, PARTS, ALIGN)
        v = load_head(v_head, n, stride_v_n, mask_n, D, PARTS, ALIGN)
        s = dot_heads(q, k, zeros(BLOCK_M, BLOCK_N, ACC), PRECISION) * score_scale
        bias_row = key_bias_ptr + b * tl.cast(stride_key_bias_b, tl.int64)
        s = add_key_bias(s, bias_row, n[None, :], mask_n[None, :], MASK, KEY_BIAS)
        window_mask = mask
        if MASK != "" and MASK_B:
            window_mask = load_mask(
                mask_head + b * tl.cast(stride_mask_b, tl.int64), m[:, None], n[None, :], N_q, mask_width,
                stride_mask_m, MASK_M, MASK_N,
            )  # fmt: skip
        s = masked(s, window_mask, m[:, None], n[None, :], mask_n[None, :], MASK, IS_CAUSAL, False)
        maximum = tl.max(s, axis=1)
        shift = tl.where(maximum == float("-inf"), 0.0, maximum)
        p = exp_scores(s - shift[:, None], MASK)
        total = tl.sum(p, axis=1)
        bh = b * H + h
        if DROPOUT > 0:
            counters_m, counters_n = m.to(tl.int32)[:, None], n.to(tl.int32)[None, :]
            p *= dropout_scale(tl.load(seed_ptr), bh, counters_m, counters_n, DROPOUT, ACC)
        o = weighted_sum(p, v, zero_head(BLOCK_M, PARTS, ACC), PRECISION)
        o_head = head_ptr(o_ptr, b, h, 0, stride_o_b, stride_o_n, stride_o_h, ALIGN)
        lse_head = statistics_of(lse_ptr, bh, N_q, MASK)
        _store_output(
            o, total, maximum, o_head, lse_head, m, stride_o_n, mask_m, MASK, KEY_BIAS, False, D, PARTS, ALIGN
        )


@triton.jit
def _attend(
    state, q, k_head, v_head, mask_head, bias_row, seed_ptr, bh, offs_m, start, stride_k_n, stride_v_n, stride_mask_m,
    mask_width, N_q, N_kv, score_scale: tl.constexpr, D: tl.constexpr, MASK: tl.constexpr, MASK_M: tl.constexpr,
    MASK_N: tl.constexpr, KEY_BIAS: tl.constexpr, IS_CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, ALIGN: tl.constexpr,
    INDEX: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: return ``state`` after BLOCK_N keys from ``start``."""
    m, total, o = state
    offs_n = start + tl.arange(0, BLOCK_N).to(INDEX)
    mask_n = offs_n < N_kv
    k = load_head(k_head, offs_n, stride_k_n, mask_n, D, PARTS, ALIGN)
    s = dot_heads(q, k, zeros(BLOCK_M, BLOCK_N, ACC), PRECISION) * score_scale
    s = add_key_bias(s, bias_row, offs_n[None, :], mask_n[None, :], MASK, KEY_BIAS)
    s = masked_scores(
        s, mask_head, offs_m[:, None], offs_n[None, :], mask_n[None, :], N_q, mask_width, stride_mask_m,
        MASK, MASK_M, MASK_N, IS_CAUSAL, EVEN,
    )  # fmt: skip
    m_new = tl.maximum(m, tl.max(s, axis=1))
    # If all scores so far are -inf, subtracting their maximum would give NaN, also in rows with finite scores later.
    shift = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = exp_scores(s - shift[:, None], MASK)
    rescale = exp_scores(m - shift, MASK)
    total = total * rescale + tl.sum(p, axis=1)
    if DROPOUT > 0:
        counters_m, counters_n = offs_m.to(tl.int32)[:, None], offs_n.to(tl.int32)[None, :]
        p *= dropout_scale(tl.load(seed_ptr), bh, counters_m, counters_n, DROPOUT, ACC)
    v = load_head(v_head, offs_n, stride_v_n, mask_n, D, PARTS, ALIGN)
    return m_new, total, weighted_sum(p, v, scaled_head(o, rescale[:, None]), PRECISION)


@triton.jit(do_not_specialize=["T", "num_blocks"])
def _attention_fwd_blocks_kernel(
    q_ptr,  # (B, N_q, H, D); (1, all tokens, H, D) with VARLEN
    k_ptr,  # (B, N_kv, H, D)
    v_ptr,  # (B, N_kv, H, D)
    o_ptr,  # (B, N_q, H, D)
    lse_ptr,  # (B, H, N_q), with a floating MASK (B, H, N_q, 2)
    mask_ptr,  # (B, H, N_q, N_kv) by strides, with MASK
    key_bias_ptr,  # (B, N_kv) by stride, with KEY_BIAS; (1, all tokens) with VARLEN
    seed_ptr,  # (1,), with DROPOUT
    starts_ptr,  # (images + 1,), the first token of each image and the end, with VARLEN
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
    score_scale: tl.constexpr,
    D: tl.constexpr,
    MASK: tl.constexpr,
    MASK_M: tl.constexpr,
    MASK_N: tl.constexpr,
    KEY_BIAS: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    VARLEN: tl.constexpr,
    ALIGN: tl.constexpr,
    INDEX: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STARTS: tl.constexpr,  # of the pieces after the last full block, relative to its end
    PIECES: tl.constexpr,  # their sizes; none with VARLEN
    PARTS: tl.constexpr,
):
    pid = tl.program_id(0)
    pid_m = (pid % num_blocks).to(INDEX)
    bh = (pid // num_blocks).to(tl.int64)
    b = bh // H
    h = bh % H
    first = 0
    lse_head = statistics_of(lse_ptr, bh, N_q, MASK)
    if VARLEN:
        first, N_kv = image_of(starts_ptr, b, T)
        lse_head = lse_ptr + h * T + first
        N_q = N_kv
        b = b * 0
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < N_q
    q_head = head_ptr(q_ptr, b, h, first, stride_q_b, stride_q_n, stride_q_h, ALIGN)
    k_head = head_ptr(k_ptr, b, h, first, stride_k_b, stride_k_n, stride_k_h, ALIGN)
    v_head = head_ptr(v_ptr, b, h, first, stride_v_b, stride_v_n, stride_v_h, ALIGN)
    mask_head = mask_ptr + b * stride_mask_b + h * stride_mask_h
    bias_row = key_bias_ptr + b * stride_key_bias_b + first
    q = load_head(q_head, offs_m, stride_q_n, mask_m, D, PARTS, ALIGN)

    end = N_kv
    if not VARLEN:  # the keys after the last full block are split into pieces
        end = N_kv // BLOCK_N * BLOCK_N
    visible = end
    if IS_CAUSAL:
        visible = tl.minimum(end, pid_m * BLOCK_M + BLOCK_M)
    if VARLEN:  # a program beyond the last query of its image has no work
        visible = tl.where(pid_m * BLOCK_M < N_q, visible, 0)
    m = tl.full((BLOCK_M,), float("-inf"), ACC)
    total = tl.zeros((BLOCK_M,), ACC)
    o = zero_head(BLOCK_M, PARTS, ACC)
    # Before the loop: after it, the layouts of smaller products would make the compiler copy the loop's last product
    # while wgmma still computes it, and ptxas let each wgmma wait for the one before (its message C7515, sm_90).
    for i in tl.static_range(len(PIECES)):
        m, total, o = _attend(
            (m, total, o), q, k_head, v_head, mask_head, bias_row, seed_ptr, bh, offs_m, end + STARTS[i],
            stride_k_n, stride_v_n, stride_mask_m, mask_width, N_q, N_kv, score_scale, D, MASK, MASK_M, MASK_N,
            KEY_BIAS, IS_CAUSAL, DROPOUT, ALIGN, INDEX, ACC, PRECISION, BLOCK_M, PIECES[i], i < len(PIECES) - 1, PARTS,
        )  # fmt: skip
    for start in range(0, visible, BLOCK_N):
        m, total, o = _attend(
            (m, total, o), q, k_head, v_head, mask_head, bias_row, seed_ptr, bh, offs_m, start,
            stride_k_n, stride_v_n, stride_mask_m, mask_width, N_q, N_kv, score_scale, D, MASK, MASK_M, MASK_N,
            KEY_BIAS, IS_CAUSAL, DROPOUT, ALIGN, INDEX, ACC, PRECISION, BLOCK_M, BLOCK_N, not VARLEN, PARTS,
        )  # fmt: skip

    o_head = head_ptr(o_ptr, b, h, first, stride_o_b, stride_o_n, stride_o_h, ALIGN)
    _store_output(o, total, m, o_head, lse_head, offs_m, stride_o_n, mask_m, MASK, KEY_BIAS, VARLEN, D, PARTS, ALIGN)


def attention_forward(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Launch the forward on q, k and v in the layout given by ``options``; return ``(o, lse)``, o in q's layout.

    lse is (B, H, N_q), each row's base-2 log-sum-exp. With a floating mask it is (B, H, N_q, 2), each row's maximum
    and the base-2 logarithm of its sum: if a row's scores are all finfo.min, or -1e9, adding the two would lose the
    logarithm.
    """
    o, lse = forward_outputs(q, k, v, options)
    if o.numel() == 0:
        return o, lse
    q, k, v = (runtime.unit_stride(t) for t in (q, k, v))
    B, N_q, H, D = options.sizes(q)
    dims = options.dims
    N_kv = k.shape[dims[1]]
    images, longest_q, longest_kv = options.rows(B, N_q, N_kv)
    varlen = options.starts is not None
    tiling = choose_config(
        longest_q,
        longest_kv,
        D,
        q.dtype,
        runtime.device_facts(q.device),
        heads=images * H,
        varlen=varlen,
        masked=options.mask is not None,
        key_bias=options.key_bias is not None,
        dropout=options.dropout_p > 0,
        is_causal=options.is_causal,
        tma=suits(q, k, v),
    ).forward
    if tiling.regime == "hopper":
        score_scale = options.scale * LOG2_E
        launch_hopper(*options.tokens_first(q, k, v, o), lse, score_scale, tiling.block_n, tiling.num_stages)
        return o, lse
    mask_arguments = options.arguments(q)
    arguments = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "o_ptr": o,
        "lse_ptr": lse,
        **strides("q", q, dims),
        **strides("k", k, dims),
        **strides("v", v, dims),
        **strides("o", o, dims),
        **addressing(q, k, v, o, tokens=dims[1], mask_reach=N_q * mask_arguments["stride_mask_m"]),
        **mask_arguments,
        "N_q": 0 if varlen else N_q,
        "N_kv": 0 if varlen else N_kv,
        "H": H,
        "D": D,
        "BLOCK_M": tiling.block_m,
        "PARTS": head_parts(D),
        "num_warps": tiling.num_warps,
        "num_stages": tiling.num_stages,
        # As fma(dot, scale, -max), the largest score minus the maximum would not be exactly 0: at scores of 1e10,
        # which fp16 inputs reach, exp2 of the difference overflows.
        "enable_fp_fusion": False,
    }
    num_blocks = runtime.cdiv(longest_q, tiling.block_m)
    if tiling.regime == "row":
        starts, pieces = key_pieces(N_kv, tiling.block_n)
        _attention_fwd_row_kernel[(B * H * num_blocks,)](
            **arguments,
            num_blocks=num_blocks,
            STARTS=starts,
            PIECES=pieces,
        )
    elif tiling.regime == "windows":
        windows, groups = window_groups(B, H, q.device)
        _attention_fwd_windows_kernel[(groups * H,)](
            **arguments,
            B=B,
            windows=windows,
            MASK_B=not options.shares_mask,
            BLOCK_N=tiling.block_n,
        )
    else:
        # The last keys can be split ahead of the launch only if all images have the same number of keys.
        starts, pieces = ((), ()) if varlen else key_pieces(N_kv % tiling.block_n, tiling.block_n)
        _attention_fwd_blocks_kernel[(images * H * num_blocks,)](
            **arguments,
            starts_ptr=options.starts if varlen else q,
            T=N_q,
            num_blocks=num_blocks,
            VARLEN=varlen,
            BLOCK_N=tiling.block_n,
            STARTS=starts,
            PIECES=pieces,
        )
    return o, lse


def forward_outputs(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Allocate the outputs of :func:`attention_forward`; zeros if some tokens may belong to no image."""
    B, N_q, H, D = options.sizes(q)
    new = torch.empty if options.starts is None else torch.zeros
    if options.heads_first:
        o = torch.empty_strided((B, H, N_q, D), (N_q * H * D, D, H * D, 1), dtype=q.dtype, device=q.device)
    else:
        o = new(q.shape, dtype=q.dtype, device=q.device)
    rows = (N_q, 2) if options.mask_kind == "float" else (N_q,)
    return o, new((B, H, *rows), dtype=runtime.wide_dtype(q.dtype), device=q.device)


def window_groups(B: int, H: int, device: torch.device) -> tuple[int, int]:
    """Return the number of images per program of the windows kernels, and the number of programs per head."""
    # Eight programs per SM hide each other's load latency; more would only read a shared bias more often.
    windows = max(1, B * H // (8 * runtime.device_facts(device).num_sms))
    return windows, runtime.cdiv(B, windows)
