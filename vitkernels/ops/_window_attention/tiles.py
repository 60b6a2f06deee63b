"""Device functions of the window attention kernels: a window's tokens, its bias and its scores. No kernels.

``SHAPE`` is (rows, columns, rows shifted, columns shifted, prefix tokens, grid, roll padded, tokens, mask value), the
constants of :class:`~vitkernels.ops._window_attention.windows.Windows`; ``size`` is (image rows, image columns, rows of
windows, columns of windows).
"""

from __future__ import annotations

from vitkernels.ops._attention.tiles import LOG2_E, columns, dot_heads, dot_rows, dropout_scale, load_head
from vitkernels.ops._triton import tl, triton

SMALLEST_NORM = tl.constexpr(1e-12)  # F.normalize's


@triton.jit
def _along(t, window, size, count, WIDTH: tl.constexpr, SHIFT: tl.constexpr, GRID: tl.constexpr, ROLL: tl.constexpr):
    """Return along one axis the position in the image of place ``t`` in a window, ``size`` or more if it is padding,
    and which of the three regions of the shifted image it comes from."""
    position = t * count + window if GRID else window * WIDTH + t
    region = position * 0
    if SHIFT > 0:
        padded = count * WIDTH
        region = (position >= padded - WIDTH).to(tl.int32) + (position >= padded - SHIFT).to(tl.int32)
        if ROLL:  # the padding moves with the image
            position += SHIFT
            position = tl.where(position >= padded, position - padded, position)
        else:  # the padding stays behind the image
            turned = position + SHIFT % size  # a window may be larger than the image
            turned = tl.where(turned >= size, turned - size, turned)
            position = tl.where(position < size, turned, position)
    return position, region


@triton.jit
def image_and_place(window, size):
    """Return the image of a window, and which of the image's windows it is."""
    return (window // (size[2] * size[3])).to(tl.int64), window % (size[2] * size[3])


@triton.jit
def window_tokens(t, window, size, SHAPE: tl.constexpr):
    """Return for places ``t`` of a window their rows in memory, whether the window has them, whether the image has
    them, and their regions, between which a shifted window attends with the mask value."""
    place = t - SHAPE[4]
    ty = place // SHAPE[1]
    tx = place - ty * SHAPE[1]
    y, region_y = _along(ty, window // size[3], size[0], size[2], SHAPE[0], SHAPE[2], SHAPE[5], SHAPE[6])
    x, region_x = _along(tx, window % size[3], size[1], size[3], SHAPE[1], SHAPE[3], SHAPE[5], SHAPE[6])
    in_window = t < SHAPE[7]
    in_image = in_window & (y < size[0]) & (x < size[1])
    row = y * size[1] + x
    if SHAPE[4] > 0:
        row = tl.where(place < 0, t, row + SHAPE[4])
        in_image = in_image | (place < 0)
    return row, in_window, in_image, region_y * 3 + region_x


@triton.jit
def _place(t, SHAPE: tl.constexpr):
    """Return a number of each place of a window such that the difference of two tells where they lie apart."""
    place = t - SHAPE[4]
    ty = place // SHAPE[1]
    return ty * (2 * SHAPE[1] - 1) + (place - ty * SHAPE[1])


@triton.jit
def padded_tokens(SHAPE: tl.constexpr):
    """Return the rows and columns of a bias of pairs: whole tiles, so that its loads need no mask."""
    return (SHAPE[7] + 63) // 64 * 64


@triton.jit
def table_entry(m, n, SHAPE: tl.constexpr):
    """Return the table's entry for queries ``m`` and keys ``n``, which broadcast to a tile."""
    COLUMNS: tl.constexpr = 2 * SHAPE[1] - 1
    ENTRIES: tl.constexpr = (2 * SHAPE[0] - 1) * COLUMNS
    entry = _place(m, SHAPE) - _place(n, SHAPE) + ((SHAPE[0] - 1) * COLUMNS + SHAPE[1] - 1)
    if SHAPE[4] > 0:  # BEiT's three entries: prefix to token, token to prefix, prefix to prefix
        of_prefix = tl.where(n < SHAPE[4], ENTRIES + 2, ENTRIES)
        entry = tl.where(m < SHAPE[4], of_prefix, tl.where(n < SHAPE[4], ENTRIES + 1, entry))
    return entry


@triton.jit
def load_bias(bias_ptr, h, m, n, SHAPE: tl.constexpr, BIAS: tl.constexpr, ENTRIES: tl.constexpr, ACC: tl.constexpr):
    """Load a head's bias of queries ``m`` and keys ``n``, which broadcast to a tile.

    From a table (BIAS "table") the loads are as many as scores, but neighbouring keys lie side by side, so that those
    of a warp touch one or two lines. It is for tiles that a program loads once for many windows. "pairs" are the
    table spread out, with −inf for keys that do not exist, so that nothing is computed for a score but its sum.
    """
    if BIAS == "table":
        inside = (m < SHAPE[7]) & (n < SHAPE[7])
        ptrs = bias_ptr + h * ENTRIES + table_entry(m, n, SHAPE)
        return tl.load(ptrs, mask=inside, other=0.0).to(ACC)
    elif BIAS == "pairs":
        return tl.load(bias_ptr + h * ENTRIES + m * padded_tokens(SHAPE) + n).to(ACC) * LOG2_E
    else:
        return 0.0


@triton.jit
def load_tokens(
    head, rows, stride_n, in_image, in_window, padding_head, D: tl.constexpr, PARTS: tl.constexpr, ALIGN: tl.constexpr,
    PADDING: tl.constexpr,
):  # fmt: skip
    """Load the keys or values ``rows`` of a head; where the window is padded, those of ``padding_head`` (D,)."""
    parts = load_head(head, rows, stride_n, in_image, D, PARTS, ALIGN)
    if PADDING == "value":
        filled = ()
        for i in tl.static_range(len(PARTS)):
            cols = columns(PARTS, i)
            value = tl.load(padding_head + cols[None, :], mask=(cols < D)[None, :], other=0.0).to(parts[i].dtype)
            filled = filled + (tl.where((in_window & ~in_image)[:, None], value, parts[i]),)
        return filled
    else:
        return parts


@triton.jit
def inverse_norms(head, COSINE: tl.constexpr, ACC: tl.constexpr):
    """Return 1/‖row‖ of each row of a head, as F.normalize takes it; without COSINE zeros, which nothing reads."""
    if COSINE:
        return 1.0 / tl.maximum(tl.sqrt(dot_rows(head, head, ACC)), SMALLEST_NORM)
    else:
        return tl.zeros((head[0].shape[0],), ACC)


@triton.jit
def load_factor(logit_ptr, h, COSINE: tl.constexpr, ACC: tl.constexpr):
    """Load a head's factor of cosine attention; without COSINE return 0, which nothing reads."""
    if COSINE:
        return tl.load(logit_ptr + h).to(ACC)
    else:
        return 0.0


@triton.jit
def window_dropout(seed_ptr, window, h, H, m, n, DROPOUT: tl.constexpr, ACC: tl.constexpr):
    """Return the factors of a dropout on the weights of queries ``m`` and keys ``n`` of a window, (queries, keys)."""
    drawn = window.to(tl.int64) * H + h
    return dropout_scale(tl.load(seed_ptr), drawn, m.to(tl.int32)[:, None], n.to(tl.int32)[None, :], DROPOUT, ACC)


@triton.jit
def masked_scores(s, region_a, region_b, exists, place, size, SHAPE: tl.constexpr, HIDES: tl.constexpr):
    """Add the mask value between regions of a shifted window; with HIDES set −inf at keys that do not exist. All
    broadcast to ``s``."""
    if SHAPE[2] > 0 or SHAPE[3] > 0:
        # Only the last windows of a row and of a column have several regions.
        if (place // size[3] == size[2] - 1) | (place % size[3] == size[3] - 1):
            s = tl.where(region_a == region_b, s, s + SHAPE[8] * LOG2_E)
    if HIDES:
        s = tl.where(exists, s, float("-inf"))
    return s


@triton.jit
def scores_of(a, b, zero, scale: tl.constexpr, factor, norms_a, norms_b, COSINE: tl.constexpr, PRECISION: tl.constexpr):
    """``scale · a bᵀ`` of two heads for a softmax in base 2, whose log₂e ``scale`` has already; with COSINE
    ``factor · a bᵀ`` of their rows by the inverse norms, (rows, 1) and (1, rows). As a variable the constant would be
    fp32, even for fp64 products."""
    s = dot_heads(a, b, zero, PRECISION)
    if COSINE:
        return s * (factor * LOG2_E) * norms_a * norms_b
    else:
        return s * scale


@triton.jit
def of_queries(p, in_image, PADDING: tl.constexpr):
    """Return weights without those of padded queries, where a NaN in a key would reach the sums over queries."""
    if PADDING != "":
        p = tl.where(in_image[:, None], p, 0.0)
    return p


@triton.jit
def load_statistics(ptrs, in_image):
    """Load each row's maximum, +inf for padded queries, which makes their weights 0, and the logarithm of its sum."""
    return tl.load(ptrs, mask=in_image, other=float("inf")), tl.load(ptrs + 1, mask=in_image, other=0.0)


@triton.jit
def weights_of(s, lse):
    """Return the weights of scores ``s`` by :func:`load_statistics`; at most 1, as sums of another order may put a
    score above its row's maximum."""
    below = tl.minimum(s - lse[0][:, None], 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.exp2(below - lse[1][:, None])


@triton.jit
def store_padding_sums(ptr, dk, dv, padded, H, D: tl.constexpr, PARTS: tl.constexpr):
    """Store the gradients of a head's padded query, key and value, (D,) each, H · D apart: zero, as the output has no
    padded rows, and the sums of dk and dv over padded rows."""
    for i in tl.static_range(len(PARTS)):
        cols = columns(PARTS, i)
        dk_sum = tl.sum(tl.where(padded[:, None], dk[i], 0.0), axis=0)
        tl.store(ptr + cols, tl.zeros_like(dk_sum), mask=cols < D)
        tl.store(ptr + H * D + cols, dk_sum, mask=cols < D)
        tl.store(ptr + 2 * H * D + cols, tl.sum(tl.where(padded[:, None], dv[i], 0.0), axis=0), mask=cols < D)
