"""The products of queries and tables of relative positions, forward and backward.

A query at row y has along y the bias  q · rel_pos_h[y − y' + rows − 1]  for keys at row y'. The product with all of the
table has it for every y', at another place for each y: it is stored from there to where attention reads it, and its
gradient is loaded back the same way. So the products stay dense, and nothing is gathered.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitkernels import runtime
from vitkernels.ops._attention import operands
from vitkernels.ops._attention.config import head_parts
from vitkernels.ops._attention.tiles import LOG2_E, dot_heads, load_head, store_head, zero_head, zeros
from vitkernels.ops._decomposed_attention.config import DecomposedConfig
from vitkernels.ops._decomposed_attention.tiles import offsets, sixteen
from vitkernels.ops._sums import new_shares, sum_shares
from vitkernels.ops._tile import accumulator, dot
from vitkernels.ops._triton import tl, triton
from vitkernels.ops._window_attention.windows import Windows


@triton.jit
def _token(t, N, X, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return row and column in their window of tokens ``t`` of an image, and whether the image has them."""
    return t // X % ROWS, t % X % COLUMNS, t < N


@triton.jit
def _cast_head(parts, like):
    cast = ()
    for i in tl.static_range(len(parts)):
        cast = cast + (parts[i].to(like[i].dtype),)
    return cast


@triton.jit
def _store_bias(
    bias_ptr, query, q, position, in_image, table_ptr, LENGTH: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr,
    ALIGN: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Store the bias of queries along an axis in the rows ``query`` of bias."""
    row = bias_ptr + query * sixteen(LENGTH)
    for start in range(0, 2 * LENGTH - 1, BLOCK_E):
        e, key, inside = offsets(position, start, LENGTH, BLOCK_E)
        table = _cast_head(load_head(table_ptr, e, D, e < 2 * LENGTH - 1, D, PARTS, ALIGN), q)
        bias = dot_heads(q, table, zeros(q[0].shape[0], BLOCK_E, ACC), PRECISION) * LOG2_E
        tl.store(row[:, None] + key, bias.to(row.dtype.element_ty), mask=inside & in_image[:, None])


@triton.jit(do_not_specialize=["N", "X"])
def _positions_fwd_kernel(
    qkv_ptr,  # (B, N, 3, H, D)
    rel_pos_h_ptr,  # (2 · ROWS − 1, D)
    rel_pos_w_ptr,  # (2 · COLUMNS − 1, D)
    along_y_ptr,  # (B, H, N, ROWS to the next multiple of 16)
    along_x_ptr,  # (B, H, N, COLUMNS to the next multiple of 16)
    stride_qkv_b,
    stride_qkv_n,
    stride_qkv_h,
    N,
    H,
    X,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGN: tl.constexpr,
    INDEX: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PARTS: tl.constexpr,
):
    blocks = tl.cdiv(N, BLOCK_M)
    head = (tl.program_id(0) // blocks).to(tl.int64)  # of all images
    t = (tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)).to(INDEX)
    y, x, in_image = _token(t, N, X, ROWS, COLUMNS)
    q_head = qkv_ptr + (head // H * stride_qkv_b + head % H * stride_qkv_h)
    q = load_head(q_head, t, stride_qkv_n, in_image, D, PARTS, ALIGN)
    query = head * N + t
    _store_bias(along_y_ptr, query, q, y, in_image, rel_pos_h_ptr, ROWS, D, PARTS, ALIGN, ACC, PRECISION, BLOCK_E)
    _store_bias(along_x_ptr, query, q, x, in_image, rel_pos_w_ptr, COLUMNS, D, PARTS, ALIGN, ACC, PRECISION, BLOCK_E)


@triton.jit
def _load_gradient(grad_ptr, query, key, inside, SHARES: tl.constexpr, LENGTH: tl.constexpr, ACC: tl.constexpr):
    """Load the gradient of the bias at places ``key`` in the rows ``query``, the sum of SHARES."""
    row = grad_ptr + query * (SHARES * sixteen(LENGTH))
    total = tl.load(row[:, None] + key, mask=inside, other=0.0).to(ACC)
    for share in tl.static_range(1, SHARES):
        total += tl.load(row[:, None] + share * sixteen(LENGTH) + key, mask=inside, other=0.0).to(ACC)
    return total


@triton.jit
def _add_through(
    dq, grad_ptr, query, position, in_image, table_ptr, like, LENGTH: tl.constexpr, SHARES: tl.constexpr,
    D: tl.constexpr,
    PARTS: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Add to dq what comes through the bias along an axis; ``like`` has the dtype of the products."""
    for start in range(0, 2 * LENGTH - 1, BLOCK_E):
        e, key, inside = offsets(position, start, LENGTH, BLOCK_E)
        grad = _load_gradient(grad_ptr, query, key, inside & in_image[:, None], SHARES, LENGTH, ACC)
        table = _cast_head(load_head(table_ptr, e, D, e < 2 * LENGTH - 1, D, PARTS, ALIGN), like)
        dq = _finite_sum(grad, inside, table, dq, PRECISION)
    return dq


@triton.jit
def _finite_sum(weights, inside, head, acc, PRECISION: tl.constexpr):
    """acc + weights · head, where weights outside ``inside`` are zero: a NaN or an infinity in a row of ``head``
    reaches the sums alone that have the row inside, as if the others were not multiplied with it."""
    sums = ()
    for i in tl.static_range(len(head)):
        wrong = head[i] * 0.0 != 0.0
        wrong_rows = tl.sum(wrong.to(tl.int32), axis=1) > 0
        part = tl.where(wrong, 0.0, head[i])
        total = dot(weights.to(part.dtype), part, acc[i], PRECISION)
        if tl.sum(wrong_rows.to(tl.int32), axis=0) > 0:
            hits = tl.dot(inside.to(part.dtype), wrong.to(part.dtype), input_precision=PRECISION)
            total = tl.where(hits > 0, float("nan"), total)
        sums = sums + (total,)
    return sums


@triton.jit(do_not_specialize=["N", "X"])
def _positions_bwd_dq_kernel(
    rel_pos_h_ptr,  # (2 · ROWS − 1, D)
    rel_pos_w_ptr,  # (2 · COLUMNS − 1, D)
    dy_ptr,  # (B, H, N, SHARES, ROWS to the next multiple of 16)
    dx_ptr,  # (B, H, N, COLUMNS to the next multiple of 16)
    dqkv_ptr,  # (B, N, 3, H, D), contiguous; dq is added to
    N,
    H,
    X,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SHARES: tl.constexpr,
    ALIGN: tl.constexpr,
    INDEX: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PARTS: tl.constexpr,
):
    blocks = tl.cdiv(N, BLOCK_M)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    t = (tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)).to(INDEX)
    y, x, in_image = _token(t, N, X, ROWS, COLUMNS)
    dq_head = dqkv_ptr + (head // H * N * 3 * H + head % H) * D
    like = load_head(dq_head, t, 3 * H * D, in_image, D, PARTS, ALIGN)
    dq = ()
    for i in tl.static_range(len(PARTS)):
        dq = dq + (like[i].to(ACC),)
    query = head * N + t
    dq = _add_through(
        dq, dy_ptr, query, y, in_image, rel_pos_h_ptr, like, ROWS, SHARES, D, PARTS, ALIGN, ACC, PRECISION, BLOCK_E
    )
    dq = _add_through(
        dq, dx_ptr, query, x, in_image, rel_pos_w_ptr, like, COLUMNS, 1, D, PARTS, ALIGN, ACC, PRECISION, BLOCK_E
    )
    store_head(dq_head, dq, t, 3 * H * D, in_image, D, PARTS, ALIGN)


@triton.jit(do_not_specialize=["N", "X", "tiles", "per_program"])
def _positions_bwd_tables_kernel(
    qkv_ptr,  # (B, N, 3, H, D)
    dy_ptr,  # (B, H, N, SHARES, ROWS to the next multiple of 16)
    dx_ptr,  # (B, H, N, COLUMNS to the next multiple of 16)
    sums_ptr,  # (programs of a table's rows, 2 · ROWS − 1 + 2 · COLUMNS − 1, D)
    stride_qkv_b,
    stride_qkv_n,
    stride_qkv_h,
    N,
    H,
    X,
    tiles,  # of tokens, of all heads of all images
    per_program,  # tiles
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SHARES: tl.constexpr,
    ALIGN: tl.constexpr,
    INDEX: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PARTS: tl.constexpr,
):
    LENGTH_H: tl.constexpr = 2 * ROWS - 1
    LENGTH_W: tl.constexpr = 2 * COLUMNS - 1
    BLOCKS_H: tl.constexpr = tl.cdiv(LENGTH_H, BLOCK_E)
    BLOCKS: tl.constexpr = BLOCKS_H + tl.cdiv(LENGTH_W, BLOCK_E)
    block = tl.program_id(0) % BLOCKS
    group = (tl.program_id(0) // BLOCKS).to(tl.int64)
    first = tl.program_id(0) // BLOCKS * per_program
    last = tl.minimum(first + per_program, tiles)
    sums = sums_ptr + group * (LENGTH_H + LENGTH_W) * D
    if block < BLOCKS_H:
        _table_sums(
            qkv_ptr, dy_ptr, sums, block * BLOCK_E, first, last, stride_qkv_b, stride_qkv_n, stride_qkv_h, N, H,
            X, True, D, ROWS, COLUMNS, SHARES, ALIGN, INDEX, ACC, PRECISION, BLOCK_M, BLOCK_E, PARTS,
        )  # fmt: skip
    else:
        _table_sums(
            qkv_ptr, dx_ptr, sums + LENGTH_H * D, (block - BLOCKS_H) * BLOCK_E, first, last, stride_qkv_b, stride_qkv_n,
            stride_qkv_h, N, H, X, False, D, ROWS, COLUMNS, 1, ALIGN, INDEX, ACC, PRECISION, BLOCK_M, BLOCK_E, PARTS,
        )  # fmt: skip


@triton.jit
def _table_sums(
    qkv_ptr, grad_ptr, sums_ptr, start, first, last, stride_qkv_b, stride_qkv_n, stride_qkv_h, N, H, X,
    ALONG_Y: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    SHARES: tl.constexpr, ALIGN: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Store the gradient of a table's rows from ``start``, summed over tiles ``first`` to ``last``."""
    LENGTH: tl.constexpr = ROWS if ALONG_Y else COLUMNS
    blocks = tl.cdiv(N, BLOCK_M)
    total = zero_head(BLOCK_E, PARTS, ACC)
    for tile in range(first, last):
        head = (tile // blocks).to(tl.int64)
        t = (tile % blocks * BLOCK_M + tl.arange(0, BLOCK_M)).to(INDEX)
        y, x, in_image = _token(t, N, X, ROWS, COLUMNS)
        q_head = qkv_ptr + (head // H * stride_qkv_b + head % H * stride_qkv_h)
        q = load_head(q_head, t, stride_qkv_n, in_image, D, PARTS, ALIGN)
        _, key, inside = offsets(y if ALONG_Y else x, start, LENGTH, BLOCK_E)
        grad = _load_gradient(grad_ptr, head * N + t, key, inside & in_image[:, None], SHARES, LENGTH, ACC)
        total = _finite_sum(tl.trans(grad.to(q[0].dtype)), tl.trans(inside), q, total, PRECISION)
    e = start + tl.arange(0, BLOCK_E)
    item_bytes: tl.constexpr = sums_ptr.dtype.element_ty.primitive_bitwidth // 8
    store_head(sums_ptr, total, e, D, e < 2 * LENGTH - 1, D, PARTS, item_bytes)


def new_biases(qkv: Tensor, windows: Windows, shares: int = 1) -> tuple[Tensor, Tensor]:
    """Allocate the bias of each query along y, ``shares`` times, and along x, as ``tiles.py`` has them."""
    B, N, _, H, _ = qkv.shape
    along_y = qkv.new_empty((B, H, N, shares * _sixteen(windows.rows)), dtype=runtime.wide_dtype(qkv.dtype))
    return along_y, qkv.new_empty((B, H, N, _sixteen(windows.columns)))


def biases_of(
    qkv: Tensor, rel_pos: tuple[Tensor, Tensor], windows: Windows, config: DecomposedConfig
) -> tuple[Tensor, Tensor]:
    """Return the bias of each query along y and along x."""
    B, N, _, H, _ = qkv.shape
    along_y, along_x = new_biases(qkv, windows)
    _positions_fwd_kernel[(B * H * runtime.cdiv(N, config.positions.block_m),)](
        **_arguments(qkv, windows, config, qkv, *rel_pos),
        **_strides(qkv),
        **_tables(rel_pos),
        qkv_ptr=qkv,
        along_y_ptr=along_y,
        along_x_ptr=along_x,
    )
    return along_y, along_x


def add_dq(
    dqkv: Tensor, grads: tuple[Tensor, Tensor], rel_pos: tuple[Tensor, Tensor], windows: Windows,
    config: DecomposedConfig,
) -> None:  # fmt: skip
    """Add to the queries' part of dqkv what comes through their biases, of which ``grads`` are the gradients."""
    B, N, _, H, _ = dqkv.shape
    _positions_bwd_dq_kernel[(B * H * runtime.cdiv(N, config.positions.block_m),)](
        **_arguments(dqkv, windows, config, dqkv.flatten(2, 3), *rel_pos),
        **_tables(rel_pos),
        **_gradients(grads, windows),
        dqkv_ptr=dqkv,
    )


def tables_gradient(
    qkv: Tensor, grads: tuple[Tensor, Tensor], windows: Windows, config: DecomposedConfig, dtype: torch.dtype
) -> Tensor:
    """Return the gradients of both tables, one below the other, in ``dtype``, from those of the biases."""
    B, N, _, H, D = qkv.shape
    rows = (2 * windows.rows - 1, 2 * windows.columns - 1)
    block_m, block_e = config.positions.block_m, config.positions.block_n
    tiles, blocks = B * H * runtime.cdiv(N, block_m), sum(runtime.cdiv(n, block_e) for n in rows)
    # Enough programs to fill the device four times, as each writes a share.
    groups = min(tiles, runtime.cdiv(4 * runtime.device_facts(qkv.device).num_sms, blocks))
    per_program = runtime.cdiv(tiles, groups)
    groups = runtime.cdiv(tiles, per_program)
    kept, (sums,) = new_shares([True], groups, sum(rows) * D, runtime.wide_dtype(qkv.dtype), qkv.device)
    _positions_bwd_tables_kernel[(groups * blocks,)](
        **_arguments(qkv, windows, config, qkv),
        **_strides(qkv),
        **_gradients(grads, windows),
        qkv_ptr=qkv,
        sums_ptr=sums,
        tiles=tiles,
        per_program=per_program,
    )
    return sum_shares(kept, [True], [dtype])[0].view(-1, D)


def _gradients(grads: tuple[Tensor, Tensor], windows: Windows) -> dict[str, object]:
    return {"dy_ptr": grads[0], "dx_ptr": grads[1], "SHARES": grads[0].shape[-1] // _sixteen(windows.rows)}


def _sixteen(n: int) -> int:
    return runtime.cdiv(n, 16) * 16


def _strides(qkv: Tensor) -> dict[str, int]:
    return {"stride_qkv_b": qkv.stride(0), "stride_qkv_n": qkv.stride(1), "stride_qkv_h": qkv.stride(3)}


def _tables(rel_pos: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    return dict(zip(("rel_pos_h_ptr", "rel_pos_w_ptr"), rel_pos, strict=True))


def _arguments(qkv: Tensor, windows: Windows, config: DecomposedConfig, *aligned: Tensor) -> dict[str, object]:
    """Return what the three kernels share; ``aligned`` are the tensors whose rows they load as heads."""
    _, N, _, H, D = qkv.shape
    return {
        "N": N,
        "H": H,
        "X": windows.X,
        "D": D,
        "ROWS": windows.rows,
        "COLUMNS": windows.columns,
        "ACC": accumulator(qkv.dtype),
        "PRECISION": runtime.dot_precision(qkv.device),
        "BLOCK_M": config.positions.block_m,
        "BLOCK_E": config.positions.block_n,
        "PARTS": head_parts(D),
        **config.positions.options,
        **operands.addressing(*aligned),
    }
