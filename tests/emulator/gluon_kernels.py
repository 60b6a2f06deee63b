"""Gluon kernels for sm_90: tensor maps, mbarriers and warps that run different code."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def copy_tile(x_desc, y_desc, out, SIZE: gl.constexpr, BLOCK: gl.constexpr, COORDS: gl.constexpr, LAYOUT: gl.constexpr):
    """A tile at ``COORDS`` of x goes to y, and its values, element by element, to ``out``."""
    tile = gl.allocate_shared_memory(x_desc.dtype, BLOCK, x_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(full, count=1)
    mbarrier.expect(full, x_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(x_desc, COORDS, full, tile)
    mbarrier.wait(full, 0)
    mbarrier.invalidate(full)
    values = tile.load(LAYOUT)
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    gl.store(out + gl.arange(0, SIZE, flat), gl.convert_layout(values.reshape((SIZE,)), flat))
    tile.store(values)
    fence_async_shared()
    tma.async_copy_shared_to_global(y_desc, COORDS, tile)
    tma.store_wait(0)


@gluon.jit
def gemm_producer(a_desc, b_desc, a_bufs, b_bufs, empty, full, K, m, n, BK: gl.constexpr, STAGES: gl.constexpr):
    it = 0
    for k in range(0, K, BK):
        s = it % STAGES
        mbarrier.wait(empty.index(s), ((it // STAGES) & 1) ^ 1)
        mbarrier.expect(full.index(s), a_desc.block_type.nbytes + b_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(a_desc, [m, k], full.index(s), a_bufs.index(s))
        tma.async_copy_global_to_shared(b_desc, [n, k], full.index(s), b_bufs.index(s))
        it += 1  # noqa: SIM113


@gluon.jit
def gemm_consumer(
    c_desc, a_bufs, b_bufs, c_buf, empty, full, K, m, n, FIRST: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    BK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    acc = gl.zeros((BM, BN), gl.float32, mma)
    it = FIRST
    for _ in range(0, K, BK):
        s = it % STAGES
        mbarrier.wait(full.index(s), (it // STAGES) & 1)
        acc = warpgroup_mma(a_bufs.index(s), b_bufs.index(s).permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index(s), count=1)
        it += 1
    c_buf.store(acc.to(gl.bfloat16))
    fence_async_shared()
    tma.async_copy_shared_to_global(c_desc, [m, n], c_buf)
    tma.store_wait(0)


@gluon.jit
def gemm(
    a_desc, b_desc, c_desc, K, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
    FIRST: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """c = a b^T: one warp copies, a warpgroup multiplies. With FIRST other than 0, it waits for the wrong phases."""
    a_bufs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BM, BK], a_desc.layout)
    b_bufs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BN, BK], b_desc.layout)
    c_buf = gl.allocate_shared_memory(gl.bfloat16, [BM, BN], c_desc.layout)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(empty.index(s), count=1)
        mbarrier.init(full.index(s), count=1)
    m, n = gl.program_id(0) * BM, gl.program_id(1) * BN
    gl.warp_specialize(
        [
            (gemm_consumer, (c_desc, a_bufs, b_bufs, c_buf, empty, full, K, m, n, FIRST, BM, BN, BK, STAGES)),
            (gemm_producer, (a_desc, b_desc, a_bufs, b_bufs, empty, full, K, m, n, BK, STAGES)),
        ],
        [1],
        [40],
    )


@gluon.jit
def attention_producer(
    q_desc, k_desc, v_desc, q_buf, k_bufs, v_bufs, q_full, full, empty, h, m, N, BN: gl.constexpr, STAGES: gl.constexpr
):
    mbarrier.expect(q_full, q_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(q_desc, [h, m, 0], q_full, q_buf)
    it = 0
    for n in range(0, N, BN):
        s = it % STAGES
        mbarrier.wait(empty.index(s), ((it // STAGES) & 1) ^ 1)
        mbarrier.expect(full.index(s), k_desc.block_type.nbytes + v_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(k_desc, [h, n, 0], full.index(s), k_bufs.index(s))
        tma.async_copy_global_to_shared(v_desc, [h, n, 0], full.index(s), v_bufs.index(s))
        it += 1  # noqa: SIM113


@gluon.jit
def attention_consumer(
    o_ptr, q_buf, k_bufs, v_bufs, q_full, full, empty, h, m, N, scale, BM: gl.constexpr, BN: gl.constexpr,
    D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    s_mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    o_mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    rows: gl.constexpr = gl.SliceLayout(1, s_mma)
    largest = gl.full((BM,), float("-inf"), gl.float32, rows)
    total = gl.zeros((BM,), gl.float32, rows)
    o = gl.zeros((BM, D), gl.float32, o_mma)
    zero = gl.zeros((BM, BN), gl.float32, s_mma)
    mbarrier.wait(q_full, 0)
    q = q_buf.reshape((BM, D))
    it = 0
    for n in range(0, N, BN):
        stage = it % STAGES
        mbarrier.wait(full.index(stage), (it // STAGES) & 1)
        s = warpgroup_mma(q, k_bufs.index(stage).reshape((BN, D)).permute((1, 0)), zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=(s,))
        cols = n + gl.arange(0, BN, gl.SliceLayout(0, s_mma))
        s = gl.where(gl.expand_dims(cols < N, 0), s, float("-inf"))
        now = gl.maximum(largest, gl.max(s, 1) * scale)
        p = gl.exp2(s * scale - gl.expand_dims(now, 1))
        alpha = gl.exp2(largest - now)
        total = total * alpha + gl.sum(p, 1)
        o = o * gl.expand_dims(gl.convert_layout(alpha, gl.SliceLayout(1, o_mma)), 1)
        p = gl.convert_layout(p.to(gl.bfloat16), gl.DotOperandLayout(0, o_mma, 2))
        o = warpgroup_mma(p, v_bufs.index(stage).reshape((BN, D)), o, is_async=True)
        o = warpgroup_mma_wait(0, deps=(o,))
        mbarrier.arrive(empty.index(stage), count=1)
        largest = now
        it += 1  # noqa: SIM113
    o = o * gl.expand_dims(gl.convert_layout(1.0 / total, gl.SliceLayout(1, o_mma)), 1)
    i = m + gl.arange(0, BM, gl.SliceLayout(1, o_mma))
    c = gl.arange(0, D, gl.SliceLayout(0, o_mma))
    gl.store(o_ptr + gl.expand_dims((h * N + i) * D, 1) + gl.expand_dims(c, 0), o, mask=gl.expand_dims(i < N, 1))


@gluon.jit
def attention(
    q_desc, k_desc, v_desc, o_ptr, N, scale, BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """Attention over (heads, N, D), one program a tile of queries."""
    q_buf = gl.allocate_shared_memory(gl.bfloat16, [1, BM, D], q_desc.layout)
    k_bufs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 1, BN, D], k_desc.layout)
    v_bufs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 1, BN, D], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(empty.index(s), count=1)
    m, h = gl.program_id(0) * BM, gl.program_id(1)
    gl.warp_specialize(
        [
            (
                attention_consumer,
                (o_ptr, q_buf, k_bufs, v_bufs, q_full, full, empty, h, m, N, scale, BM, BN, D, STAGES),
            ),
            (
                attention_producer,
                (q_desc, k_desc, v_desc, q_buf, k_bufs, v_bufs, q_full, full, empty, h, m, N, BN, STAGES),
            ),
        ],
        [1],
        [40],
    )
