"""Device functions of the decomposed attention kernels: tiles of keys, and the bias by relative position. No kernels.

A tile of keys has WIDTH columns of a window and BLOCK_N / WIDTH of its rows. So the bias along x is one tile for all
rows, and that along y is a column where a tile has one row. Both biases are (B, H, N, places) in base 2, with places
rounded up by :func:`sixteen`: along x in the operands' dtype, and along y, of which a thread reads one number at a
time, in fp32 or wider.
"""

from __future__ import annotations

from vitkernels.ops._triton import tl, triton
from vitkernels.ops._window_attention.tiles import window_tokens


@triton.jit
def sixteen(n):
    """Return n rounded up to a multiple of 16: whole tiles of columns, and whole vectors."""
    return (n + 15) // 16 * 16


@triton.jit
def window_keys(row, column, place, size, SHAPE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr,
                INDEX: tl.constexpr):  # fmt: skip
    """Return for the keys of a tile, whose first is at ``row`` and ``column`` of a window, these for each key, its
    number in the window, and rows in memory, whether the window has them, and whether the image has them."""
    y = row + tl.arange(0, BLOCK_N) // WIDTH
    x = column + tl.arange(0, BLOCK_N) % WIDTH
    n = (y * SHAPE[1] + x).to(INDEX)
    rows, in_window, in_image, _ = window_tokens(n, place, size, SHAPE)
    exists = x < SHAPE[1]
    return y, x, n, rows, in_window & exists, in_image & exists


@triton.jit
def bias_along_x(along_x, x, mask_m, SHAPE: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr):
    """Load the bias of queries by their pointers ``along_x`` at columns ``x``; −inf beyond the window's columns."""
    # Places beyond the columns belong to the row, though nothing writes them: a mask would halve the loads' width.
    bias = tl.load(along_x[:, None] + x[None, :], mask=mask_m[:, None], other=0.0).to(ACC)
    if SHAPE[1] % WIDTH != 0:
        bias = tl.where((x < SHAPE[1])[None, :], bias, float("-inf"))
    return bias


@triton.jit
def bias_along_y(along_y, row, y, mask_m, SHAPE: tl.constexpr, STEP: tl.constexpr, ACC: tl.constexpr):
    """Load the bias of queries by their pointers ``along_y`` at the rows of a tile of keys, (queries, 1) if it has one
    row; −inf beyond the window's rows."""
    if STEP == 1:
        return tl.load(along_y + row, mask=mask_m, other=0.0).to(ACC)[:, None]
    else:
        exists = (y < SHAPE[0])[None, :]
        bias = tl.load(along_y[:, None] + y[None, :], mask=mask_m[:, None] & exists, other=0.0).to(ACC)
        if SHAPE[0] % STEP != 0:
            bias = tl.where(exists, bias, float("-inf"))
        return bias


@triton.jit
def offsets(position, start, LENGTH: tl.constexpr, BLOCK_E: tl.constexpr):
    """Return for queries at ``position`` along an axis of LENGTH places, and table rows from ``start``, the rows, and
    for each query and row the place of the key, and whether there is one."""
    e = start + tl.arange(0, BLOCK_E)
    key = position[:, None] + (LENGTH - 1) - e[None, :]
    return e, key, (key >= 0) & (key < LENGTH)
