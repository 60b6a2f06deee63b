"""Forward of attention: the kernel and its launcher."""

from __future__ import annotations

import torch
from torch import Tensor

from vitkernels import runtime
from vitkernels.ops import _tile
from vitkernels.ops._triton import tl, triton
from vitkernels.ops.attention.config import choose_config, padded_head_dim

LOG2_E = 1.4426950408889634
MAX_INT32_REACH = 2**31 - 2**16  # elements between a head's first row and its last; the rest is the row itself


@triton.jit
def head_ptr(ptr, b, h, stride_b, stride_h, ALIGN: tl.constexpr):
    """Where head h of image b starts in a tensor (B, N, H, D) whose rows all lie at multiples of ALIGN bytes."""
    item_bytes: tl.constexpr = ptr.dtype.element_ty.primitive_bitwidth // 8
    return ptr + tl.multiple_of(b * stride_b + h * stride_h, ALIGN // item_bytes)


@triton.jit
def row_ptrs(head, offs_n, stride_n, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr):
    """Pointers to rows ``offs_n`` of one head, (len(offs_n), BLOCK_D)."""
    item_bytes: tl.constexpr = head.dtype.element_ty.primitive_bitwidth // 8
    rows = tl.multiple_of(offs_n * stride_n, ALIGN // item_bytes)
    return head + rows[:, None] + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def load_rows(head, offs_n, stride_n, mask_n, D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr):
    """Rows ``offs_n`` of one head, (len(offs_n), BLOCK_D), zero outside ``mask_n`` and beyond D."""
    mask = mask_n[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
    return tl.load(row_ptrs(head, offs_n, stride_n, BLOCK_D, ALIGN), mask=mask, other=0.0)


@triton.jit
def store_rows(head, x, offs_n, stride_n, mask_n, D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr):
    """Store ``x`` (len(offs_n), BLOCK_D) where :func:`load_rows` would load it, in the tensor's dtype."""
    mask = mask_n[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
    tl.store(row_ptrs(head, offs_n, stride_n, BLOCK_D, ALIGN), _tile.cast(x, head.dtype.element_ty), mask=mask)


@triton.jit
def _attention_fwd_kernel(
    q_ptr,  # (B, N_q, H, D)
    k_ptr,  # (B, N_kv, H, D)
    v_ptr,  # (B, N_kv, H, D)
    o_ptr,  # (B, N_q, H, D)
    lse_ptr,  # (B, H, N_q)
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
    N_q,
    N_kv,
    H,
    num_blocks,
    scale_log2: tl.constexpr,
    D: tl.constexpr,
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
    k_head = head_ptr(k_ptr, b, h, stride_k_b, stride_k_h, ALIGN)
    v_head = head_ptr(v_ptr, b, h, stride_v_b, stride_v_h, ALIGN)

    m = tl.full((BLOCK_M,), float("-inf"), ACC)
    total = tl.zeros((BLOCK_M,), ACC)
    o = tl.zeros((BLOCK_M, BLOCK_D), ACC)
    for start in range(0, N_kv, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N).to(INDEX)
        mask_n = offs_n < N_kv
        k = load_rows(k_head, offs_n, stride_k_n, mask_n, D, BLOCK_D, ALIGN)
        s = _tile.dot(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), ACC), PRECISION) * scale_log2
        s = tl.where(mask_n[None, :], s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, axis=1))
        # Scores may overflow to -inf in a whole block: -inf - -inf would be NaN, in rows whose other blocks are finite.
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(s - shift[:, None])
        rescale = tl.exp2(m - shift)
        total = total * rescale + tl.sum(p, axis=1)
        v = load_rows(v_head, offs_n, stride_v_n, mask_n, D, BLOCK_D, ALIGN)
        o = _tile.dot(_tile.cast(p, v.dtype), v, o * rescale[:, None], PRECISION)
        m = m_new

    o_head = head_ptr(o_ptr, b, h, stride_o_b, stride_o_h, ALIGN)
    store_rows(o_head, o / total[:, None], offs_m, stride_o_n, mask_m, D, BLOCK_D, ALIGN)
    tl.store(lse_ptr + bh * N_q + offs_m, m + tl.log2(total), mask=mask_m)


def attention_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Launch the forward on q (B, N_q, H, D), k and v (B, N_kv, H, D): ``(o, lse)``."""
    o, lse = forward_outputs(q, k, v, scale)
    if o.numel() == 0:
        return o, lse
    q, k, v = (runtime.unit_stride(t) for t in (q, k, v))
    B, N_q, H, D = q.shape
    N_kv = k.shape[1]
    tiling = choose_config(N_q, N_kv, D, q.dtype, runtime.device_facts(q.device)).forward
    num_blocks = runtime.cdiv(N_q, tiling.block_m)
    _attention_fwd_kernel[(B * H * num_blocks,)](
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        o_ptr=o,
        lse_ptr=lse,
        **strides("q", q),
        **strides("k", k),
        **strides("v", v),
        **strides("o", o),
        N_q=N_q,
        N_kv=N_kv,
        H=H,
        num_blocks=num_blocks,
        scale_log2=scale * LOG2_E,
        D=D,
        **addressing(q, k, v, o),
        ACC=_tile.accumulator(q.dtype),
        PRECISION=runtime.dot_precision(q.device),
        BLOCK_M=tiling.block_m,
        BLOCK_N=tiling.block_n,
        BLOCK_D=padded_head_dim(D),
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        # Contracted to fma(dot, scale, -max), the largest score of a row would not be exactly its maximum:
        # at scores of 1e10, which fp16 inputs reach, exp2 of the difference overflows.
        enable_fp_fusion=False,
    )
    return o, lse


def forward_outputs(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Allocate what :func:`attention_forward` returns."""
    B, N_q, H, D = q.shape
    o = torch.empty((B, N_q, H, D), dtype=q.dtype, device=q.device)
    statistics = torch.float64 if q.dtype == torch.float64 else torch.float32
    return o, torch.empty((B, H, N_q), dtype=statistics, device=q.device)


def strides(name: str, x: Tensor) -> dict[str, int]:
    """Name the strides of ``x`` (B, N, H, D) as the kernels do."""
    return {f"stride_{name}_{dim}": x.stride(i) for i, dim in enumerate("bnh")}


def addressing(*tensors: Tensor) -> dict[str, object]:
    """Tell the kernels how tensors (B, N, H, D) lie: ``ALIGN`` and ``INDEX``.

    ALIGN is how many bytes, 16 at most, divide the address of every row: the width of a load follows from it. Triton
    itself only tells strides divisible by 16 elements from others, and would load heads of 72 channels one by one.
    INDEX is the type of offsets within a head: int64 costs up to 70 registers a thread, so int32 wherever it reaches.
    """
    bits = 16
    reach = 0
    for x in tensors:
        bits |= x.data_ptr()
        for stride in x.stride()[:-1]:
            bits |= stride * x.element_size()
        reach = max(reach, x.shape[1] * x.stride(1))
    return {"ALIGN": bits & -bits, "INDEX": tl.int32 if reach < MAX_INT32_REACH else tl.int64}
