"""Backward of attention: three kernels, each writing what it alone owns, and their launcher."""

from __future__ import annotations

import torch
from torch import Tensor

from vitkernels import runtime
from vitkernels.ops import _tile
from vitkernels.ops._triton import tl, triton
from vitkernels.ops.attention.config import choose_config, padded_head_dim
from vitkernels.ops.attention.forward import LOG2_E, addressing, head_ptr, load_rows, store_rows, strides


@triton.jit
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
    BLOCK_D: tl.constexpr,
):
    pid = tl.program_id(0)
    pid_m = (pid % num_blocks).to(INDEX)
    bh = (pid // num_blocks).to(tl.int64)
    b = bh // H
    h = bh % H
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < N_q
    o = load_rows(head_ptr(o_ptr, b, h, stride_o_b, stride_o_h, ALIGN), offs_m, stride_o_n, mask_m, D, BLOCK_D, ALIGN)
    do_head = head_ptr(do_ptr, b, h, stride_do_b, stride_do_h, ALIGN)
    do = load_rows(do_head, offs_m, stride_do_n, mask_m, D, BLOCK_D, ALIGN)
    tl.store(delta_ptr + bh * N_q + offs_m, tl.sum(o.to(ACC) * do.to(ACC), axis=1), mask=mask_m)


@triton.jit
def _weights(s, lse):
    """Attention weights of base-2 scores ``s``, given what broadcasts to their rows' base-2 log-sum-exp."""
    # Products summed in another order than in the forward may put a score above its row's lse, far above where
    # scores are huge; a weight is never above 1. A NaN stays one.
    return tl.exp2(tl.minimum(s - lse, 0.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def _attention_bwd_dkv_kernel(
    do_ptr,  # (B, N_q, H, D)
    q_ptr,  # (B, N_q, H, D)
    k_ptr,  # (B, N_kv, H, D)
    v_ptr,  # (B, N_kv, H, D)
    lse_ptr,  # (B, H, N_q)
    delta_ptr,  # (B, H, N_q)
    dk_ptr,  # (B, N_kv, H, D)
    dv_ptr,  # (B, N_kv, H, D), the strides of dk
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
    N_q,
    N_kv,
    H,
    num_blocks,
    scale: tl.constexpr,  # an argument would be fp32, also in fp64
    scale_log2: tl.constexpr,
    D: tl.constexpr,
    NEEDS_SUMS: tl.constexpr,
    ALIGN: tl.constexpr,
    INDEX: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid = tl.program_id(0)
    pid_n = (pid % num_blocks).to(INDEX)
    bh = (pid // num_blocks).to(tl.int64)
    b = bh // H
    h = bh % H
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N_kv
    k = load_rows(head_ptr(k_ptr, b, h, stride_k_b, stride_k_h, ALIGN), offs_n, stride_k_n, mask_n, D, BLOCK_D, ALIGN)
    v = load_rows(head_ptr(v_ptr, b, h, stride_v_b, stride_v_h, ALIGN), offs_n, stride_v_n, mask_n, D, BLOCK_D, ALIGN)
    q_head = head_ptr(q_ptr, b, h, stride_q_b, stride_q_h, ALIGN)
    do_head = head_ptr(do_ptr, b, h, stride_do_b, stride_do_h, ALIGN)

    # Scores are held transposed, keys by queries, so that no weight is transposed on its way into a product.
    dk = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    dv = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    for start in range(0, N_q, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M).to(INDEX)
        mask_m = offs_m < N_q
        q = load_rows(q_head, offs_m, stride_q_n, mask_m, D, BLOCK_D, ALIGN)
        do = load_rows(do_head, offs_m, stride_do_n, mask_m, D, BLOCK_D, ALIGN)
        # An lse of +inf gives queries beyond the last the weight 0.
        lse = tl.load(lse_ptr + bh * N_q + offs_m, mask=mask_m, other=float("inf"))
        delta = tl.load(delta_ptr + bh * N_q + offs_m, mask=mask_m, other=0.0)
        s = _tile.dot(k, tl.trans(q), tl.zeros((BLOCK_N, BLOCK_M), ACC), PRECISION) * scale_log2
        p = _weights(s, lse[None, :])
        dv = _tile.dot(_tile.cast(p, do.dtype), do, dv, PRECISION)
        dp = _tile.dot(v, tl.trans(do), tl.zeros((BLOCK_N, BLOCK_M), ACC), PRECISION)
        ds = p * (dp - delta[None, :])
        dk = _tile.dot(_tile.cast(ds, q.dtype), q, dk, PRECISION)

    dk_head = head_ptr(dk_ptr, b, h, stride_dk_b, stride_dk_h, ALIGN)
    dv_head = head_ptr(dv_ptr, b, h, stride_dk_b, stride_dk_h, ALIGN)
    store_rows(dk_head, dk * scale, offs_n, stride_dk_n, mask_n, D, BLOCK_D, ALIGN)
    store_rows(dv_head, dv, offs_n, stride_dk_n, mask_n, D, BLOCK_D, ALIGN)
    if NEEDS_SUMS:
        offs_d = tl.arange(0, BLOCK_D)
        sums = sums_ptr + ((b * num_blocks + pid % num_blocks) * 2 * H + h) * D + offs_d
        tl.store(sums, _tile.sum_rows(tl.where(mask_n[:, None], dk * scale, 0.0)), mask=offs_d < D)
        tl.store(sums + H * D, _tile.sum_rows(tl.where(mask_n[:, None], dv, 0.0)), mask=offs_d < D)


@triton.jit
def _attention_bwd_dq_kernel(
    do_ptr,  # (B, N_q, H, D)
    q_ptr,  # (B, N_q, H, D)
    k_ptr,  # (B, N_kv, H, D)
    v_ptr,  # (B, N_kv, H, D)
    lse_ptr,  # (B, H, N_q)
    delta_ptr,  # (B, H, N_q)
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
    stride_dq_b,
    stride_dq_n,
    stride_dq_h,
    N_q,
    N_kv,
    H,
    num_blocks,
    scale: tl.constexpr,  # an argument would be fp32, also in fp64
    scale_log2: tl.constexpr,
    D: tl.constexpr,
    NEEDS_SUMS: tl.constexpr,
    ALIGN: tl.constexpr,
    INDEX: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid = tl.program_id(0)
    pid_m = (pid % num_blocks).to(INDEX)
    bh = (pid // num_blocks).to(tl.int64)
    b = bh // H
    h = bh % H
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < N_q
    q = load_rows(head_ptr(q_ptr, b, h, stride_q_b, stride_q_h, ALIGN), offs_m, stride_q_n, mask_m, D, BLOCK_D, ALIGN)
    do_head = head_ptr(do_ptr, b, h, stride_do_b, stride_do_h, ALIGN)
    do = load_rows(do_head, offs_m, stride_do_n, mask_m, D, BLOCK_D, ALIGN)
    lse = tl.load(lse_ptr + bh * N_q + offs_m, mask=mask_m, other=float("inf"))
    delta = tl.load(delta_ptr + bh * N_q + offs_m, mask=mask_m, other=0.0)
    k_head = head_ptr(k_ptr, b, h, stride_k_b, stride_k_h, ALIGN)
    v_head = head_ptr(v_ptr, b, h, stride_v_b, stride_v_h, ALIGN)

    dq = tl.zeros((BLOCK_M, BLOCK_D), ACC)
    for start in range(0, N_kv, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N).to(INDEX)
        mask_n = offs_n < N_kv
        k = load_rows(k_head, offs_n, stride_k_n, mask_n, D, BLOCK_D, ALIGN)
        v = load_rows(v_head, offs_n, stride_v_n, mask_n, D, BLOCK_D, ALIGN)
        s = _tile.dot(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), ACC), PRECISION) * scale_log2
        p = tl.where(mask_n[None, :], _weights(s, lse[:, None]), 0.0)
        dp = _tile.dot(do, tl.trans(v), tl.zeros((BLOCK_M, BLOCK_N), ACC), PRECISION)
        ds = p * (dp - delta[:, None])
        dq = _tile.dot(_tile.cast(ds, k.dtype), k, dq, PRECISION)

    dq_head = head_ptr(dq_ptr, b, h, stride_dq_b, stride_dq_h, ALIGN)
    store_rows(dq_head, dq * scale, offs_m, stride_dq_n, mask_m, D, BLOCK_D, ALIGN)
    if NEEDS_SUMS:
        offs_d = tl.arange(0, BLOCK_D)
        sums = sums_ptr + ((b * num_blocks + pid % num_blocks) * H + h) * D + offs_d
        tl.store(sums, _tile.sum_rows(tl.where(mask_m[:, None], dq * scale, 0.0)), mask=offs_d < D)


def attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    scale: float,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    needs_sums: bool = False,
) -> tuple[Tensor, Tensor] | None:
    """Launch the backward into ``dq`` and into ``dk`` and ``dv``, or skip what is None; shapes as in the forward.

    ``dk`` and ``dv`` have the same strides; all gradients have unit stride along the last dim. With ``needs_sums``,
    which needs all three, returns their sums over images and tokens, (H, D) and (2, H, D): the bias gradient of the
    projection in front, at no pass of its own.
    """
    if q.numel() == 0 or (dq is None and dk is None):
        zeros = torch.zeros((3, *q.shape[2:]), dtype=lse.dtype, device=q.device)
        return (zeros[0], zeros[1:]) if needs_sums else None
    do, q, k, v = (runtime.unit_stride(t) for t in (do, q, k, v))
    B, N_q, H, D = q.shape
    N_kv = k.shape[1]
    config = choose_config(N_q, N_kv, D, q.dtype, runtime.device_facts(q.device))
    sizes = {"D": D, "ACC": _tile.accumulator(q.dtype), "BLOCK_D": padded_head_dim(D)}

    delta = torch.empty_like(lse)
    num_blocks = runtime.cdiv(N_q, config.forward.block_m)
    _attention_bwd_delta_kernel[(B * H * num_blocks,)](
        o_ptr=o,
        do_ptr=do,
        delta_ptr=delta,
        **strides("o", o),
        **strides("do", do),
        N_q=N_q,
        H=H,
        num_blocks=num_blocks,
        **sizes,
        **addressing(o, do),
        BLOCK_M=config.forward.block_m,
    )

    common = {
        "do_ptr": do,
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "lse_ptr": lse,
        "delta_ptr": delta,
        **strides("do", do),
        **strides("q", q),
        **strides("k", k),
        **strides("v", v),
        "N_q": N_q,
        "N_kv": N_kv,
        "H": H,
        "scale": scale,
        "scale_log2": scale * LOG2_E,
        **sizes,
        "NEEDS_SUMS": needs_sums,
        "PRECISION": runtime.dot_precision(q.device),
    }
    dkv_sums = dq_sums = lse
    if dk is not None:
        num_blocks = runtime.cdiv(N_kv, config.dkv.block_n)
        if needs_sums:
            dkv_sums = torch.empty((B, num_blocks, 2, H, D), dtype=lse.dtype, device=q.device)
        _attention_bwd_dkv_kernel[(B * H * num_blocks,)](
            **common,
            dk_ptr=dk,
            dv_ptr=dv,
            sums_ptr=dkv_sums,
            **strides("dk", dk),
            num_blocks=num_blocks,
            **addressing(do, q, k, v, dk, dv),
            BLOCK_M=config.dkv.block_m,
            BLOCK_N=config.dkv.block_n,
            num_warps=config.dkv.num_warps,
            num_stages=config.dkv.num_stages,
        )
    if dq is not None:
        num_blocks = runtime.cdiv(N_q, config.dq.block_m)
        if needs_sums:
            dq_sums = torch.empty((B, num_blocks, H, D), dtype=lse.dtype, device=q.device)
        _attention_bwd_dq_kernel[(B * H * num_blocks,)](
            **common,
            dq_ptr=dq,
            sums_ptr=dq_sums,
            **strides("dq", dq),
            num_blocks=num_blocks,
            **addressing(do, q, k, v, dq),
            BLOCK_M=config.dq.block_m,
            BLOCK_N=config.dq.block_n,
            num_warps=config.dq.num_warps,
            num_stages=config.dq.num_stages,
        )
    return (dq_sums.sum((0, 1)), dkv_sums.sum((0, 1))) if needs_sums else None
