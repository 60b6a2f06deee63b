"""Forward of attention over long rows for sm_90, in Gluon: warps that copy, and warpgroups that compute.

A program has 128 queries of one head, 64 for each of two warpgroups. One warp copies keys and values, block by
block, into rings of buffers in shared memory (TMA). A warpgroup starts the product of the next keys before it computes
the softmax of these, so that tensor cores and special functions work at the same time (arXiv 2407.08608).

TMA reads q, k and v where they lie, in a packed projection too. Beyond the last token of an image it fills with zeros,
whatever the next image holds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitkernels.ops._triton import HAS_GLUON, TensorDescriptor, gl, gluon, hopper, warn_without_gluon
from vitkernels.runtime import cdiv

GROUPS = 2  # warpgroups that compute
ROWS = 64  # queries of each


@gluon.jit
def _produce(
    q_desc, k_desc, v_desc, q_tiles, k_ring, v_ring, q_full, k_full, v_full, k_empty, v_empty, b, h, m, N_kv,
    GROUPS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Copy the queries, then keys and values in the order in which they are used."""
    for who in gl.static_range(GROUPS):
        hopper.mbarrier.expect(q_full.index(who), q_desc.block_type.nbytes)
        rows = m + who * q_desc.block_shape[1]
        hopper.tma.async_copy_global_to_shared(q_desc, [b, rows, h, 0], q_full.index(who), q_tiles.index(who))
    step = 0
    for n in range(0, N_kv, BLOCK_N):
        stage = step % STAGES
        phase = (step // STAGES & 1) ^ 1
        hopper.mbarrier.wait(k_empty.index(stage), phase)
        hopper.mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
        hopper.tma.async_copy_global_to_shared(k_desc, [b, n, h, 0], k_full.index(stage), k_ring.index(stage))
        hopper.mbarrier.wait(v_empty.index(stage), phase)
        hopper.mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
        hopper.tma.async_copy_global_to_shared(v_desc, [b, n, h, 0], v_full.index(stage), v_ring.index(stage))
        step += 1  # noqa: SIM113


@gluon.jit
def _softmax(s, m, total, o, rest, score_scale: gl.constexpr, BLOCK_N: gl.constexpr, EVEN: gl.constexpr):
    """One step of the online softmax; of the block's keys only ``rest`` exist, unless EVEN."""
    s *= score_scale
    if not EVEN:
        offs_n = gl.arange(0, BLOCK_N, gl.SliceLayout(0, s.type.layout))
        s = gl.where(gl.expand_dims(offs_n < rest, 0), s, float("-inf"))
    m_new = gl.maximum(m, gl.max(s, axis=1))
    # If all scores so far are -inf, subtracting their maximum would give NaN.
    shift = gl.where(m_new == float("-inf"), 0.0, m_new)
    p = gl.exp2(s - gl.expand_dims(shift, 1))
    rescale = gl.exp2(m - shift)
    total = total * rescale + gl.sum(p, axis=1)
    return p, m_new, total, o * _rows_like(rescale, o)


@gluon.jit
def _rows_like(x, tile):
    """Return ``x``, one number a row, as (rows, 1) in the layout of ``tile``."""
    return gl.expand_dims(gl.convert_layout(x, gl.SliceLayout(1, tile.type.layout)), 1)


@gluon.jit
def _operand(p, o, dtype: gl.constexpr):
    """Return weights as the left operand, in registers, of the product that adds to ``o``."""
    return gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, o.type.layout, 2))


@gluon.jit
def _consume(
    WHO: gl.constexpr, o_ptr, lse_ptr, q_tiles, k_ring, v_ring, q_full, k_full, v_full, k_empty, v_empty, b, h, m0,
    stride_o_b, stride_o_n, stride_o_h, N_q, N_kv, H, score_scale: gl.constexpr, D: gl.constexpr,
    ROWS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    s_mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    dtype: gl.constexpr = o_ptr.dtype.element_ty
    m = gl.full((ROWS,), float("-inf"), gl.float32, gl.SliceLayout(1, s_mma))
    total = gl.zeros((ROWS,), gl.float32, gl.SliceLayout(1, s_mma))
    o = gl.zeros((ROWS, D), gl.float32, o_mma)
    zero = gl.zeros((ROWS, BLOCK_N), gl.float32, s_mma)

    hopper.mbarrier.wait(q_full.index(WHO), 0)
    q = q_tiles.index(WHO).reshape((ROWS, D))
    hopper.mbarrier.wait(k_full.index(0), 0)
    k = k_ring.index(0).reshape((BLOCK_N, D)).permute((1, 0))
    s = hopper.warpgroup_mma(q, k, zero, use_acc=False, is_async=True)
    s = hopper.warpgroup_mma_wait(0, deps=(s,))
    hopper.mbarrier.arrive(k_empty.index(0), count=1)
    step = 0
    for _ in range(0, N_kv - BLOCK_N, BLOCK_N):
        p, m, total, o = _softmax(s, m, total, o, BLOCK_N, score_scale, BLOCK_N, True)
        p = _operand(p, o, dtype)
        stage = step % STAGES
        following = (step + 1) % STAGES
        hopper.mbarrier.wait(k_full.index(following), (step + 1) // STAGES & 1)
        k = k_ring.index(following).reshape((BLOCK_N, D)).permute((1, 0))
        s_next = hopper.warpgroup_mma(q, k, zero, use_acc=False, is_async=True)
        hopper.mbarrier.wait(v_full.index(stage), step // STAGES & 1)
        o_next = hopper.warpgroup_mma(p, v_ring.index(stage).reshape((BLOCK_N, D)), o, is_async=True)
        s = hopper.warpgroup_mma_wait(1, deps=(s_next,))
        hopper.mbarrier.arrive(k_empty.index(following), count=1)
        o = hopper.warpgroup_mma_wait(0, deps=(o_next,))
        hopper.mbarrier.arrive(v_empty.index(stage), count=1)
        step += 1
    p, m, total, o = _softmax(s, m, total, o, N_kv - step * BLOCK_N, score_scale, BLOCK_N, False)
    hopper.mbarrier.wait(v_full.index(step % STAGES), step // STAGES & 1)
    v = v_ring.index(step % STAGES).reshape((BLOCK_N, D))
    o = hopper.warpgroup_mma(_operand(p, o, dtype), v, o)

    o = o * _rows_like(1.0 / total, o)
    out: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    offs_m = m0 + WHO * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, out))
    offs_d = gl.arange(0, D, gl.SliceLayout(0, out))
    head = o_ptr + b.to(gl.int64) * stride_o_b + h.to(gl.int64) * stride_o_h
    ptrs = head + gl.expand_dims(offs_m.to(gl.int64) * stride_o_n, 1) + gl.expand_dims(offs_d, 0)
    gl.store(ptrs, gl.convert_layout(o.to(dtype), out), mask=gl.expand_dims(offs_m < N_q, 1))
    offs_m = m0 + WHO * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, s_mma))
    lse_head = lse_ptr + (b.to(gl.int64) * H + h) * N_q
    gl.store(lse_head + offs_m, m + gl.log2(total), mask=offs_m < N_q)


@gluon.jit
def _barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """Return COUNT mbarriers, whose phases end with ARRIVALS arrivals each."""
    made = gl.allocate_shared_memory(gl.int64, [COUNT, 1], hopper.mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        hopper.mbarrier.init(made.index(i), count=ARRIVALS)
    return made


@gluon.jit
def _buffers(desc, COUNT: gl.constexpr):
    """Return shared memory for COUNT of the tiles that ``desc`` copies."""
    return gl.allocate_shared_memory(desc.dtype, [COUNT] + desc.block_shape, desc.layout)


@gluon.jit
def _attention_fwd_hopper_kernel(
    q_desc,  # (B, N_q, H, D)
    k_desc,  # (B, N_kv, H, D)
    v_desc,  # (B, N_kv, H, D)
    o_ptr,  # (B, N_q, H, D)
    lse_ptr,  # (B, H, N_q)
    stride_o_b,
    stride_o_n,
    stride_o_h,
    N_q,
    N_kv,
    H,
    num_blocks,
    score_scale: gl.constexpr,
    D: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    GROUPS: gl.constexpr = 2
    ROWS: gl.constexpr = q_desc.block_shape[1]
    q_tiles = _buffers(q_desc, GROUPS)
    k_ring, v_ring = _buffers(k_desc, STAGES), _buffers(v_desc, STAGES)
    q_full = _barriers(GROUPS, 1)
    k_full, v_full = _barriers(STAGES, 1), _barriers(STAGES, 1)
    k_empty, v_empty = _barriers(STAGES, GROUPS), _barriers(STAGES, GROUPS)
    pid = gl.program_id(0)
    m = pid % num_blocks * (GROUPS * ROWS)
    b = pid // num_blocks // H
    h = pid // num_blocks % H
    gl.warp_specialize(
        [
            (_consume, (
                0, o_ptr, lse_ptr, q_tiles, k_ring, v_ring, q_full, k_full, v_full, k_empty, v_empty, b, h, m,
                stride_o_b, stride_o_n, stride_o_h, N_q, N_kv, H, score_scale, D, ROWS, BLOCK_N, STAGES,
            )),
            (_consume, (
                1, o_ptr, lse_ptr, q_tiles, k_ring, v_ring, q_full, k_full, v_full, k_empty, v_empty, b, h, m,
                stride_o_b, stride_o_n, stride_o_h, N_q, N_kv, H, score_scale, D, ROWS, BLOCK_N, STAGES,
            )),
            (_produce, (
                q_desc, k_desc, v_desc, q_tiles, k_ring, v_ring, q_full, k_full, v_full, k_empty, v_empty, b, h, m,
                N_kv, GROUPS, BLOCK_N, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def suits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Tell whether the kernel can read these: 16 bits, head dim 64 or 128, heads and tokens that TMA can address."""
    if q.dtype not in (torch.float16, torch.bfloat16) or q.shape[-1] not in (64, 128):
        return False
    if not HAS_GLUON:
        warn_without_gluon(q.device)
        return False
    return all(
        x.data_ptr() % 16 == 0 and all(step > 0 and step % 8 == 0 for step in x.stride()[:-1]) for x in (q, k, v)
    )


def launch_hopper(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, score_scale: float, block_n: int, stages: int
) -> None:
    """Launch the kernel on tensors (B, N, H, D) that :func:`suits` accepts; it writes ``o`` and ``lse``."""
    B, N_q, H, D = q.shape
    num_blocks = cdiv(N_q, GROUPS * ROWS)
    _attention_fwd_hopper_kernel[(B * H * num_blocks,)](
        q_desc=_described(q, ROWS),
        k_desc=_described(k, block_n),
        v_desc=_described(v, block_n),
        o_ptr=o,
        lse_ptr=lse,
        stride_o_b=o.stride(0),
        stride_o_n=o.stride(1),
        stride_o_h=o.stride(2),
        N_q=N_q,
        N_kv=k.shape[1],
        H=H,
        num_blocks=num_blocks,
        score_scale=score_scale,
        D=D,
        BLOCK_N=block_n,
        STAGES=stages,
        num_warps=4,
        enable_fp_fusion=False,  # as in the other kernels
    )


def _described(x: Tensor, rows: int) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout(128, 16, rank=4)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, rows, 1, x.shape[-1]], layout)
