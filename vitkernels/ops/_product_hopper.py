"""The products of _product.py for sm_90: persistent programs whose warps divide the work.

One warp copies tiles of a and b into a ring of buffers in shared memory (TMA). Two warpgroups, the consumers, multiply
from the ring (wgmma), compute the epilogue, and write their results through shared memory (TMA). A program takes tiles
of the result until none are left. The consumers work in one of two ways:

    in turns    Each computes a tile of 128 x 128, in turn. One's epilogue runs while the other multiplies.
    together    Both compute one tile of 128 x 256, each 64 rows of it. This reads a quarter less through L2, and asks
                shared memory for 128 bytes a clock where turns ask for 160, but no product hides the epilogue.

A consumer that takes turns may wait for the ring only when the other has seen all of its tile: an mbarrier tells apart
only the current phase and the one before. ``turns`` orders them.

Tiles of u and v, an update of low rank, go through the ring behind those of a and b.

A tile of the residual, or of z in the backward, comes by TMA into the buffer that y, or dz, leaves by. TMA fills what
is beyond the edge with zeros, and does not write there.

Shapes and letters as in _product.py.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from vitkernels import runtime
from vitkernels.ops import _tile
from vitkernels.ops._product_config import ProductConfig
from vitkernels.ops._triton import HAS_GLUON, TensorDescriptor, gl, gluon, hopper, warn_without_gluon
from vitkernels.runtime import cdiv, dense_or

RESERVED = 2 << 10  # bytes of shared memory for mbarriers, column sums and what the warps hand over
LONGEST = 1 << 31  # coordinates of TMA have 32 bits


@gluon.jit
def _tile_at(tile, M, N, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """Return the first row and the first column of a tile; they go as in ``_product._tile_of_program``."""
    GROUP: gl.constexpr = 8
    blocks_m = gl.cdiv(M, BLOCK_M)
    blocks_n = gl.cdiv(N, BLOCK_N)
    first_m = tile // (GROUP * blocks_n) * GROUP
    height = gl.minimum(blocks_m - first_m, GROUP)
    m = (first_m + tile % height).to(gl.int64) * BLOCK_M
    n = (tile % (GROUP * blocks_n) // height).to(gl.int64) * BLOCK_N
    return m.to(gl.int32), n.to(gl.int32)  # coordinates of TMA; ``suits`` sees to it that they fit


@gluon.jit
def _produce(
    a_desc, b_desc, u_desc, v_desc, a_ring, b_ring, empty, full, M, N, K, RANK: gl.constexpr, B_BY_ROWS: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fill the ring with the tiles that the consumers multiply, in their order."""
    tiles = gl.cdiv(M, BLOCK_M) * gl.cdiv(N, BLOCK_N)
    step = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        m, n = _tile_at(tile, M, N, BLOCK_M, BLOCK_N)
        for k in range(0, K, BLOCK_K):
            _copy(a_desc, b_desc, a_ring, b_ring, empty, full, step, m, n, k, B_BY_ROWS, BLOCK_M, STAGES)
            step += 1
        if RANK > 0:
            for k in range(0, RANK, BLOCK_K):
                _copy(u_desc, v_desc, a_ring, b_ring, empty, full, step, m, n, k, B_BY_ROWS, BLOCK_M, STAGES)
                step += 1


@gluon.jit
def _copy(
    a_desc, b_desc, a_ring, b_ring, empty, full, step, m, n, k, B_BY_ROWS: gl.constexpr, BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Copy one step's tiles into the ring, once its stage is empty."""
    A_TILES: gl.constexpr = BLOCK_M // a_desc.block_shape[0]
    stage = step % STAGES
    hopper.mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
    nbytes: gl.constexpr = A_TILES * a_desc.block_type.nbytes + b_desc.block_type.nbytes
    hopper.mbarrier.expect(full.index(stage), nbytes)
    for i in gl.static_range(A_TILES):
        rows = m + i * a_desc.block_shape[0]
        hopper.tma.async_copy_global_to_shared(a_desc, [rows, k], full.index(stage), a_ring.index(stage * A_TILES + i))
    if B_BY_ROWS:
        hopper.tma.async_copy_global_to_shared(b_desc, [k, n], full.index(stage), b_ring.index(stage))
    else:
        hopper.tma.async_copy_global_to_shared(b_desc, [n, k], full.index(stage), b_ring.index(stage))


@gluon.jit
def _summed(K, RANK: gl.constexpr, BLOCK_K: gl.constexpr):
    """Return how many columns of a and u are summed, those that fill a's last tile included."""
    if RANK == 0:
        return K
    else:
        return gl.cdiv(K, BLOCK_K) * BLOCK_K + RANK


@gluon.jit
def _accumulate(
    a_ring, b_ring, empty, full, step, K, WHO: gl.constexpr, TURNS: gl.constexpr, B_BY_ROWS: gl.constexpr,
    ROWS: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Return (ROWS, BLOCK_N) of a b; the first of its tiles is in the ring's stage ``step`` % STAGES."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    acc = gl.zeros((ROWS, BLOCK_N), gl.float32, mma)
    for k in range(0, K, BLOCK_K):
        stage = step % STAGES
        hopper.mbarrier.wait(full.index(stage), step // STAGES & 1)
        a = a_ring.index(stage if TURNS else 2 * stage + WHO)
        b = b_ring.index(stage) if B_BY_ROWS else b_ring.index(stage).permute((1, 0))
        acc = hopper.warpgroup_mma(a, b, acc, is_async=True)
        acc = hopper.warpgroup_mma_wait(1, deps=(acc,))
        if k > 0:  # the product before this one has read its stage
            hopper.mbarrier.arrive(empty.index((step - 1) % STAGES), count=1)
        step += 1
    return acc, step


@gluon.jit
def _columns(x, PART: gl.constexpr, PARTS: gl.constexpr):
    """Return part PART of a tile's columns, split into PARTS equal parts; PARTS is a power of two."""
    if PARTS == 1:
        return x
    else:
        HALF: gl.constexpr = PARTS // 2
        left, right = x.reshape((x.shape[0], 2, x.shape[1] // 2)).permute((0, 2, 1)).split()
        if PART < HALF:
            return _columns(left, PART, HALF)
        else:
            return _columns(right, PART - HALF, HALF)


@gluon.jit
def _load_columns(ptr, n, N, tile):
    """Return (1, columns of ``tile``) of a vector of N elements, from element n on, in fp32 and ``tile``'s layout."""
    offs_n = n + gl.arange(0, tile.shape[1], gl.SliceLayout(0, tile.type.layout))
    return gl.expand_dims(gl.load(ptr + offs_n, mask=offs_n < N, other=0.0).to(gl.float32), 0)


@gluon.jit
def _load_path(ptr, m, M, rows_per_sample, tile):
    """Return (rows of ``tile``, 1) of DropPath's scales, from row m of M on, in fp32 and ``tile``'s layout."""
    offs_m = m + gl.arange(0, tile.shape[0], gl.SliceLayout(1, tile.type.layout))
    scales = gl.load(ptr + offs_m // rows_per_sample, mask=offs_m < M, other=0.0)
    return gl.expand_dims(scales.to(gl.float32), 1)


@gluon.jit
def _consume_product(
    WHO: gl.constexpr, a_ring, b_ring, y_parts, z_parts, empty, full, turns, given, alpha_ptr, bias_ptr, gamma_ptr,
    residual_desc, path_ptr, z_desc, y_desc, rows_per_sample, M, N, K, HAS_ALPHA: gl.constexpr, HAS_BIAS: gl.constexpr,
    HAS_GAMMA: gl.constexpr, HAS_RESIDUAL: gl.constexpr, SAVE_Z: gl.constexpr, PATH: gl.constexpr,
    ACTIVATION: gl.constexpr, B_BY_ROWS: gl.constexpr,
    TURNS: gl.constexpr, PARTS: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    ROWS: gl.constexpr = BLOCK_M if TURNS else BLOCK_M // 2
    EVERY: gl.constexpr = 2 if TURNS else 1
    WIDTH: gl.constexpr = BLOCK_N // PARTS
    steps = gl.cdiv(K, BLOCK_K)
    tiles = gl.cdiv(M, BLOCK_M) * gl.cdiv(N, BLOCK_N)
    done = 0  # tiles
    for tile in range(gl.program_id(0) + (WHO if TURNS else 0) * gl.num_programs(0), tiles, EVERY * gl.num_programs(0)):
        m, n = _tile_at(tile, M, N, BLOCK_M, BLOCK_N)
        m += 0 if TURNS else WHO * ROWS
        if HAS_RESIDUAL:
            hopper.tma.store_wait(0)
            hopper.mbarrier.expect(given.index(WHO), PARTS * residual_desc.block_type.nbytes)
            for part in gl.static_range(PARTS):
                hopper.tma.async_copy_global_to_shared(
                    residual_desc, [m, n + part * WIDTH], given.index(WHO), y_parts.index(part)
                )
        if TURNS:
            hopper.mbarrier.wait(turns.index(WHO), (done & 1) ^ (1 - WHO))
        step = (done * EVERY + (WHO if TURNS else 0)) * steps
        acc, step = _accumulate(
            a_ring, b_ring, empty, full, step, K, WHO, TURNS, B_BY_ROWS, ROWS, BLOCK_N, BLOCK_K, STAGES
        )
        if TURNS:
            hopper.mbarrier.arrive(turns.index(1 - WHO), count=1)
        acc = hopper.warpgroup_mma_wait(0, deps=(acc,))
        hopper.mbarrier.arrive(empty.index((step - 1) % STAGES), count=1)
        if HAS_ALPHA:
            acc *= gl.load(alpha_ptr).to(gl.float32)
        if HAS_RESIDUAL:
            hopper.mbarrier.wait(given.index(WHO), done & 1)
        for part in gl.static_range(PARTS):
            z = _columns(acc, part, PARTS)
            first_n = n + part * WIDTH
            if PATH != "none" and part == 0:
                path = _load_path(path_ptr, m, M, rows_per_sample, z)
            if HAS_BIAS:
                bias = _load_columns(bias_ptr, first_n, N, z)
                if PATH == "bias":
                    bias = bias * path
                z += bias
            y = _tile.activate(z, ACTIVATION)
            if PATH == "act":
                y *= path
            if HAS_GAMMA:
                y *= _load_columns(gamma_ptr, first_n, N, z)
            if HAS_RESIDUAL:
                y += y_parts.index(part).load(z.type.layout).to(gl.float32)
            if part == 0 and not HAS_RESIDUAL:
                hopper.tma.store_wait(0)  # the buffers have been read
            if SAVE_Z:
                if part > 1:
                    hopper.tma.store_wait(2)  # but for those of the part before this one
                z_parts.index(part % 2).store(z.to(z_desc.dtype))
            y_parts.index(part).store(y.to(y_desc.dtype))
            hopper.fence_async_shared()
            if SAVE_Z:
                hopper.tma.async_copy_shared_to_global(z_desc, [m, first_n], z_parts.index(part % 2))
            hopper.tma.async_copy_shared_to_global(y_desc, [m, first_n], y_parts.index(part))
        done += 1  # noqa: SIM113
    hopper.tma.store_wait(0)


@gluon.jit
def _consume_product_dact(
    WHO: gl.constexpr, a_ring, b_ring, dz_parts, act_parts, empty, full, turns, given, alpha_ptr, path_ptr, z_desc,
    dz_desc, act_desc, dbias_ptr, rows_per_sample, M, N, K, HAS_ALPHA: gl.constexpr, HAS_PATH: gl.constexpr,
    SAVE_ACT: gl.constexpr, SUM_DZ: gl.constexpr,
    ACTIVATION: gl.constexpr, B_BY_ROWS: gl.constexpr, PARTS: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    WIDTH: gl.constexpr = BLOCK_N // PARTS
    steps = gl.cdiv(K, BLOCK_K)
    tiles = gl.cdiv(M, BLOCK_M) * gl.cdiv(N, BLOCK_N)
    done = 0  # tiles
    for tile in range(gl.program_id(0) + WHO * gl.num_programs(0), tiles, 2 * gl.num_programs(0)):
        m, n = _tile_at(tile, M, N, BLOCK_M, BLOCK_N)
        hopper.tma.store_wait(0)
        hopper.mbarrier.expect(given.index(WHO), PARTS * z_desc.block_type.nbytes)
        for part in gl.static_range(PARTS):
            hopper.tma.async_copy_global_to_shared(
                z_desc, [m, n + part * WIDTH], given.index(WHO), dz_parts.index(part)
            )
        hopper.mbarrier.wait(turns.index(WHO), (done & 1) ^ (1 - WHO))
        acc, step = _accumulate(
            a_ring, b_ring, empty, full, (2 * done + WHO) * steps, K, WHO, True, B_BY_ROWS, BLOCK_M, BLOCK_N, BLOCK_K,
            STAGES,
        )  # fmt: skip
        hopper.mbarrier.arrive(turns.index(1 - WHO), count=1)
        acc = hopper.warpgroup_mma_wait(0, deps=(acc,))
        hopper.mbarrier.arrive(empty.index((step - 1) % STAGES), count=1)
        if HAS_ALPHA:
            acc *= gl.load(alpha_ptr).to(gl.float32)
        hopper.mbarrier.wait(given.index(WHO), done & 1)
        for part in gl.static_range(PARTS):
            da = _columns(acc, part, PARTS)
            first_n = n + part * WIDTH
            z = dz_parts.index(part).load(da.type.layout).to(gl.float32)
            if HAS_PATH and part == 0:
                path = _load_path(path_ptr, m, M, rows_per_sample, da)
            if HAS_PATH:
                da *= path
            dz = da if ACTIVATION == "none" else da * _tile.activate_grad(z, ACTIVATION)
            dz_parts.index(part).store(dz.to(dz_desc.dtype))
            if SAVE_ACT:
                if part > 1:
                    hopper.tma.store_wait(2)  # the buffers have been read, but for those of the part before this one
                act = _tile.activate(z, ACTIVATION)
                if HAS_PATH:
                    act *= path
                act_parts.index(part % 2).store(act.to(act_desc.dtype))
            hopper.fence_async_shared()
            if SAVE_ACT:
                hopper.tma.async_copy_shared_to_global(act_desc, [m, first_n], act_parts.index(part % 2))
            hopper.tma.async_copy_shared_to_global(dz_desc, [m, first_n], dz_parts.index(part))
            if SUM_DZ:  # rows beyond M add 0: there a and z are 0
                offs_n = first_n + gl.arange(0, WIDTH, gl.SliceLayout(0, da.type.layout))
                shares = dbias_ptr + (m // BLOCK_M).to(gl.int64) * N
                gl.store(shares + offs_n, gl.sum(dz, axis=0), mask=offs_n < N)
        done += 1  # noqa: SIM113
    hopper.tma.store_wait(0)


@gluon.jit
def _buffers(desc, COUNT: gl.constexpr):
    """Return shared memory for COUNT of the tiles that ``desc`` copies."""
    return gl.allocate_shared_memory(desc.dtype, [COUNT] + desc.block_shape, desc.layout)  # noqa: RUF005


@gluon.jit
def _barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """Return COUNT mbarriers, whose phases end with ARRIVALS arrivals each."""
    made = gl.allocate_shared_memory(gl.int64, [COUNT, 1], hopper.mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        hopper.mbarrier.init(made.index(i), count=ARRIVALS)
    return made


@gluon.jit(do_not_specialize=["M", "rows_per_sample"])
def _product_hopper_kernel(
    a_desc,  # (M, K)
    b_desc,  # (N, K), or (K, N) with B_BY_ROWS
    u_desc,  # (M, RANK), with a RANK
    v_desc,  # (N, RANK), or (RANK, N) with B_BY_ROWS
    alpha_ptr,  # (1,), with HAS_ALPHA
    bias_ptr,  # (N,)
    gamma_ptr,  # (N,), LayerScale
    residual_desc,  # (M, N), of y's dtype
    path_ptr,  # (samples,), with a PATH: scales act(z), or the bias
    z_desc,  # (M, N): alpha · (a b + u v) + bias, with SAVE_Z
    y_desc,  # (M, N): residual + gamma · act(z)
    rows_per_sample,
    M,
    N,
    K,
    RANK: gl.constexpr,
    HAS_ALPHA: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_GAMMA: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
    SAVE_Z: gl.constexpr,
    PATH: gl.constexpr,
    ACTIVATION: gl.constexpr,
    B_BY_ROWS: gl.constexpr,
    TURNS: gl.constexpr,
    PARTS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
):
    TILES: gl.constexpr = 1 if TURNS else 2
    summed = _summed(K, RANK, BLOCK_K)
    a_ring = _buffers(a_desc, STAGES * TILES)
    b_ring = _buffers(b_desc, STAGES)
    y_0 = _buffers(y_desc, PARTS)
    y_1 = _buffers(y_desc, PARTS)
    z_0, z_1 = y_0, y_1
    if SAVE_Z:
        z_0 = _buffers(z_desc, 2)
        z_1 = _buffers(z_desc, 2)
    empty, full = _barriers(STAGES, TILES), _barriers(STAGES, 1)
    # The compiler gives memory that nobody uses later to others, though it holds an mbarrier.
    turns = _barriers(2, 1) if TURNS else full
    given = _barriers(2, 1) if HAS_RESIDUAL else full
    gl.warp_specialize(
        [
            (_consume_product, (
                0, a_ring, b_ring, y_0, z_0, empty, full, turns, given, alpha_ptr, bias_ptr, gamma_ptr, residual_desc,
                path_ptr, z_desc, y_desc, rows_per_sample, M, N, summed, HAS_ALPHA, HAS_BIAS, HAS_GAMMA, HAS_RESIDUAL,
                SAVE_Z, PATH, ACTIVATION, B_BY_ROWS, TURNS, PARTS, BLOCK_M, BLOCK_N, BLOCK_K, STAGES,
            )),
            (_consume_product, (
                1, a_ring, b_ring, y_1, z_1, empty, full, turns, given, alpha_ptr, bias_ptr, gamma_ptr, residual_desc,
                path_ptr, z_desc, y_desc, rows_per_sample, M, N, summed, HAS_ALPHA, HAS_BIAS, HAS_GAMMA, HAS_RESIDUAL,
                SAVE_Z, PATH, ACTIVATION, B_BY_ROWS, TURNS, PARTS, BLOCK_M, BLOCK_N, BLOCK_K, STAGES,
            )),
            (_produce, (
                a_desc, b_desc, u_desc, v_desc, a_ring, b_ring, empty, full, M, N, K, RANK, B_BY_ROWS, BLOCK_M, BLOCK_N,
                BLOCK_K, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


@gluon.jit(do_not_specialize=["M", "rows_per_sample"])
def _product_dact_hopper_kernel(
    a_desc,  # (M, K), upstream gradient of the layer after the activation
    b_desc,  # (N, K), or (K, N) with B_BY_ROWS: that layer's weight
    u_desc,  # (M, RANK), with a RANK
    v_desc,  # (N, RANK), or (RANK, N) with B_BY_ROWS
    alpha_ptr,  # (1,), with HAS_ALPHA
    path_ptr,  # (samples,), with HAS_PATH
    z_desc,  # (M, N): pre-activations
    dz_desc,  # (M, N): path · alpha · (a b + u v) · act'(z)
    act_desc,  # (M, N): path · act(z), with SAVE_ACT
    dbias_ptr,  # (blocks of M, N): each block's column sums of dz, with SUM_DZ
    rows_per_sample,
    M,
    N,
    K,
    RANK: gl.constexpr,
    HAS_ALPHA: gl.constexpr,
    HAS_PATH: gl.constexpr,
    SAVE_ACT: gl.constexpr,
    SUM_DZ: gl.constexpr,
    ACTIVATION: gl.constexpr,
    B_BY_ROWS: gl.constexpr,
    PARTS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
):
    summed = _summed(K, RANK, BLOCK_K)
    a_ring = _buffers(a_desc, STAGES)
    b_ring = _buffers(b_desc, STAGES)
    dz_0 = _buffers(dz_desc, PARTS)
    dz_1 = _buffers(dz_desc, PARTS)
    act_0, act_1 = dz_0, dz_1
    if SAVE_ACT:
        act_0 = _buffers(act_desc, 2)
        act_1 = _buffers(act_desc, 2)
    empty, full = _barriers(STAGES, 1), _barriers(STAGES, 1)
    turns, given = _barriers(2, 1), _barriers(2, 1)
    gl.warp_specialize(
        [
            (_consume_product_dact, (
                0, a_ring, b_ring, dz_0, act_0, empty, full, turns, given, alpha_ptr, path_ptr, z_desc, dz_desc,
                act_desc, dbias_ptr, rows_per_sample, M, N, summed, HAS_ALPHA, HAS_PATH, SAVE_ACT, SUM_DZ, ACTIVATION,
                B_BY_ROWS, PARTS, BLOCK_M, BLOCK_N, BLOCK_K, STAGES,
            )),
            (_consume_product_dact, (
                1, a_ring, b_ring, dz_1, act_1, empty, full, turns, given, alpha_ptr, path_ptr, z_desc, dz_desc,
                act_desc, dbias_ptr, rows_per_sample, M, N, summed, HAS_ALPHA, HAS_PATH, SAVE_ACT, SUM_DZ, ACTIVATION,
                B_BY_ROWS, PARTS, BLOCK_M, BLOCK_N, BLOCK_K, STAGES,
            )),
            (_produce, (
                a_desc, b_desc, u_desc, v_desc, a_ring, b_ring, empty, full, M, N, K, RANK, B_BY_ROWS, BLOCK_M, BLOCK_N,
                BLOCK_K, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def suits(a: Tensor, b: Tensor, out_dtype: torch.dtype, residual: Tensor | None, save_z: bool) -> bool:
    """Tell whether the kernels here can compute a product: whether TMA can copy every operand and result.

    TMA takes rows with unit stride that begin at multiples of 16 bytes.
    """
    (M, K), N = a.shape, b.shape[1]
    if a.dtype not in (torch.float16, torch.bfloat16) or max(M, N, K) >= LONGEST:
        return False
    if not HAS_GLUON:
        warn_without_gluon(a.device)
        return False
    if out_dtype == torch.float32 and save_z:  # their buffers leave too little for the ring
        return False
    if out_dtype not in (a.dtype, torch.float32) or N * a.itemsize % 16 or min(M, N, K) == 0:
        return False
    residual_fits = residual is None or (residual.dtype == out_dtype and _copied_by_tma(residual))
    return _copied_by_tma(a) and (_copied_by_tma(b) or _copied_by_tma(b.t())) and residual_fits


def suits_low_rank(b: Tensor, low_rank: tuple[Tensor, Tensor] | None) -> bool:
    """Tell whether the kernels here can add ``low_rank`` to a product that they can compute: v has to lie as b."""
    if low_rank is None:
        return True
    u, v = low_rank
    as_b = v if _copied_by_tma(b) else v.t()
    return _copied_by_tma(u) and _copied_by_tma(as_b)


def _copied_by_tma(matrix: Tensor) -> bool:
    row, column = matrix.stride()
    starts = matrix.data_ptr() | row * matrix.itemsize
    return column == 1 and row >= matrix.shape[1] and starts % 16 == 0


def product_hopper(
    config: ProductConfig,
    a: Tensor,
    b: Tensor,
    y: Tensor,
    z: Tensor | None,
    *,
    alpha: Tensor | None,
    bias: Tensor | None,
    activation: str | None,
    gamma: Tensor | None,
    residual: Tensor | None,
    path: Tensor | None,
    path_scales: str,
    low_rank: tuple[Tensor, Tensor] | None,
) -> None:
    """Compute ``_product.product`` into ``y`` and, unless it is None, ``z``; :func:`suits` holds.

    ``path_scales`` tells what ``path`` scales: ``act``, ``bias``, or ``none`` without one.
    """
    (M, K), N = a.shape, b.shape[1]
    turns = config.block_n == 128
    rows, columns = config.block_m if turns else config.block_m // 2, config.block_n // config.parts
    b_by_rows = _copied_by_tma(b)
    _product_hopper_kernel[_programs(config, M, N, a.device)](
        a_desc=_described(a, rows, config.block_k),
        b_desc=_described_b(b, b_by_rows, config),
        u_desc=None if low_rank is None else _described(low_rank[0], rows, config.block_k),
        v_desc=None if low_rank is None else _described_b(low_rank[1], b_by_rows, config),
        alpha_ptr=a if alpha is None else alpha,
        bias_ptr=dense_or(bias, a),
        gamma_ptr=dense_or(gamma, a),
        residual_desc=None if residual is None else _described(residual, rows, columns),
        path_ptr=dense_or(path, a),
        z_desc=None if z is None else _described(z, rows, columns),
        y_desc=_described(y, rows, columns),
        rows_per_sample=1 if path is None else M // path.shape[0],
        M=M,
        N=N,
        K=K,
        RANK=0 if low_rank is None else low_rank[0].shape[1],
        HAS_ALPHA=alpha is not None,
        HAS_BIAS=bias is not None,
        HAS_GAMMA=gamma is not None,
        HAS_RESIDUAL=residual is not None,
        SAVE_Z=z is not None,
        PATH=path_scales,
        ACTIVATION=activation or "none",
        B_BY_ROWS=b_by_rows,
        TURNS=turns,
        PARTS=config.parts,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        STAGES=_stages(config, y.itemsize, rows, 0 if z is None else z.itemsize, a.device),
        num_warps=config.num_warps,
    )


def product_dact_hopper(
    config: ProductConfig,
    a: Tensor,
    b: Tensor,
    z: Tensor,
    dz: Tensor,
    act: Tensor | None,
    shares: Tensor | None,
    *,
    alpha: Tensor | None,
    path: Tensor | None,
    activation: str | None,
    low_rank: tuple[Tensor, Tensor] | None,
) -> None:
    """Compute ``_product.product_dact`` into ``dz`` and, unless they are None, ``act`` and ``shares``."""
    (M, K), N = a.shape, b.shape[1]
    columns = config.block_n // config.parts
    b_by_rows = _copied_by_tma(b)
    _product_dact_hopper_kernel[_programs(config, M, N, a.device)](
        a_desc=_described(a, config.block_m, config.block_k),
        b_desc=_described_b(b, b_by_rows, config),
        u_desc=None if low_rank is None else _described(low_rank[0], config.block_m, config.block_k),
        v_desc=None if low_rank is None else _described_b(low_rank[1], b_by_rows, config),
        alpha_ptr=a if alpha is None else alpha,
        path_ptr=dense_or(path, a),
        z_desc=_described(z, config.block_m, columns),
        dz_desc=_described(dz, config.block_m, columns),
        act_desc=None if act is None else _described(act, config.block_m, columns),
        dbias_ptr=a if shares is None else shares,
        rows_per_sample=1 if path is None else M // path.shape[0],
        M=M,
        N=N,
        K=K,
        RANK=0 if low_rank is None else low_rank[0].shape[1],
        HAS_ALPHA=alpha is not None,
        HAS_PATH=path is not None,
        SAVE_ACT=act is not None,
        SUM_DZ=shares is not None,
        ACTIVATION=activation or "none",
        B_BY_ROWS=b_by_rows,
        PARTS=config.parts,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        STAGES=_stages(config, dz.itemsize, config.block_m, 0 if act is None else act.itemsize, a.device),
        num_warps=config.num_warps,
    )


def _programs(config: ProductConfig, M: int, N: int, device: torch.device) -> tuple[int]:
    tiles = cdiv(M, config.block_m) * cdiv(N, config.block_n)
    return (min(tiles, runtime.device_facts(device).num_sms),)


def _stages(config: ProductConfig, itemsize: int, rows: int, second: int, device: torch.device) -> int:
    """Return how many of the ring's ``num_stages`` stages fit beside the buffers of both consumers' results.

    Args:
        config: The tiles.
        itemsize: Bytes of an element of the first result, whose tile has a buffer.
        rows: Rows of a consumer's tile.
        second: Bytes of an element of the second result, of whose tile two parts have buffers; 0 if there is none.
        device: The GPU.
    """
    results = 2 * rows * config.block_n * itemsize + 2 * 2 * rows * config.block_n // config.parts * second
    stage = (config.block_m + config.block_n) * config.block_k * 2
    return min(config.num_stages, (runtime.device_facts(device).shared_memory - RESERVED - results) // stage)


def _described_b(b: Tensor, by_rows: bool, config: ProductConfig) -> TensorDescriptor:
    if by_rows:
        return _described(b, config.block_k, config.block_n)
    return _described(b.t(), config.block_n, config.block_k)


def _described(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Describe ``matrix`` for copies of tiles of (``rows``, ``columns``)."""
    block = [rows, columns]
    layout = _layout(rows, columns, matrix.dtype)
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), block, layout)


@functools.cache
def _layout(rows: int, columns: int, dtype: torch.dtype):
    return gl.NVMMASharedLayout.get_default_for([rows, columns], getattr(gl, str(dtype).removeprefix("torch.")))
