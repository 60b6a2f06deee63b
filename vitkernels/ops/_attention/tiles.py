"""Device functions shared by the attention kernels: heads loaded in parts, scores, masks, dropout. No kernels.

A head's tile, (rows, D), is held as a tuple of tiles whose widths are powers of two, ``PARTS``: 72 channels are
64 + 16 and not 128. A row of scores is likewise held in pieces of keys: 197 keys are 128 + 64 + 16 and not 256.
"""

from __future__ import annotations

from vitkernels.ops import _tile
from vitkernels.ops._triton import tl, triton

LOG2_E = tl.constexpr(1.4426950408889634)
LARGEST_FP32 = tl.constexpr(3.4028234663852886e38)


@triton.jit
def head_ptr(ptr, b, h, first, stride_b, stride_n, stride_h, ALIGN: tl.constexpr):
    """Return the pointer to token ``first`` of head h of image b in a tensor (B, N, H, D) with rows aligned to ALIGN
    bytes."""
    item_bytes: tl.constexpr = ptr.dtype.element_ty.primitive_bitwidth // 8
    offset = b * tl.cast(stride_b, tl.int64) + first * stride_n + h * stride_h
    return ptr + tl.multiple_of(offset, ALIGN // item_bytes)


@triton.jit
def image_of(starts_ptr, image, tokens):
    """Return first token and length of a packed image, clamped to ``tokens`` so that no bad value reads outside."""
    first = tl.minimum(tl.maximum(tl.load(starts_ptr + image), 0), tokens)
    end = tl.minimum(tl.load(starts_ptr + image + 1), tokens)
    return first.to(tl.int64), tl.maximum(end - first, 0).to(tl.int32)


@triton.jit
def columns(PARTS: tl.constexpr, i: tl.constexpr):
    """Return the channel indices in part i of a head."""
    return (0 if i == 0 else PARTS[0]) + tl.arange(0, PARTS[i])


@triton.jit
def _part_ptrs(head, offs_n, stride_n, cols, ALIGN: tl.constexpr):
    item_bytes: tl.constexpr = head.dtype.element_ty.primitive_bitwidth // 8
    rows = tl.multiple_of(offs_n * stride_n, ALIGN // item_bytes)
    return head + rows[:, None] + cols[None, :]


@triton.jit
def load_head(head, offs_n, stride_n, mask_n, D: tl.constexpr, PARTS: tl.constexpr, ALIGN: tl.constexpr):
    """Load rows ``offs_n`` of one head, one tile per part; zero outside ``mask_n`` and beyond D."""
    parts = ()
    for i in tl.static_range(len(PARTS)):
        cols = columns(PARTS, i)
        ptrs = _part_ptrs(head, offs_n, stride_n, cols, ALIGN)
        parts = parts + (tl.load(ptrs, mask=mask_n[:, None] & (cols < D)[None, :], other=0.0),)
    return parts


@triton.jit
def store_head(head, parts, offs_n, stride_n, mask_n, D: tl.constexpr, PARTS: tl.constexpr, ALIGN: tl.constexpr):
    """Store ``parts`` at the addresses of :func:`load_head`, in the tensor's dtype."""
    for i in tl.static_range(len(PARTS)):
        cols = columns(PARTS, i)
        ptrs = _part_ptrs(head, offs_n, stride_n, cols, ALIGN)
        x = parts[i].to(head.dtype.element_ty)
        tl.store(ptrs, x, mask=mask_n[:, None] & (cols < D)[None, :])


@triton.jit
def zeros(BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ACC: tl.constexpr):
    return tl.zeros((BLOCK_M, BLOCK_N), ACC)


@triton.jit
def zero_head(BLOCK: tl.constexpr, PARTS: tl.constexpr, ACC: tl.constexpr):
    """Return zeroed accumulators for one head's rows."""
    parts = ()
    for i in tl.static_range(len(PARTS)):
        parts = parts + (zeros(BLOCK, PARTS[i], ACC),)
    return parts


@triton.jit
def zero_columns(BLOCK: tl.constexpr, PARTS: tl.constexpr, ACC: tl.constexpr):
    """Return zeroed accumulators for one head's rows, transposed."""
    parts = ()
    for i in tl.static_range(len(PARTS)):
        parts = parts + (zeros(PARTS[i], BLOCK, ACC),)
    return parts


@triton.jit
def transposed(parts):
    turned = ()
    for i in tl.static_range(len(parts)):
        turned = turned + (tl.trans(parts[i]),)
    return turned


@triton.jit
def scaled_head(parts, factor):
    """Return ``factor`` times a head; ``factor`` is a number, or (rows, 1) for one per row."""
    scaled = ()
    for i in tl.static_range(len(parts)):
        scaled = scaled + (parts[i] * factor,)
    return scaled


@triton.jit
def dot_heads(a, b, acc, PRECISION: tl.constexpr):
    """acc + a bᵀ over all channels of two heads."""
    for i in tl.static_range(len(a)):
        acc = _tile.dot(a[i], tl.trans(b[i]), acc, PRECISION)
    return acc


@triton.jit
def weighted_sum(weights, head, acc, PRECISION: tl.constexpr):
    """acc + weights · head, part by part: a weighted sum of a head's rows."""
    sums = ()
    for i in tl.static_range(len(head)):
        sums = sums + (_tile.dot(weights.to(head[i].dtype), head[i], acc[i], PRECISION),)
    return sums


@triton.jit
def weighted_sum_columns(head, weights, acc, PRECISION: tl.constexpr):
    """acc + headᵀ · weights, part by part: :func:`weighted_sum` with everything transposed."""
    sums = ()
    for i in tl.static_range(len(head)):
        part = _tile.dot(tl.trans(head[i]), weights.to(head[i].dtype), acc[i], PRECISION)
        sums = sums + (part,)
    return sums


@triton.jit
def dot_rows(a, b, ACC: tl.constexpr):
    """The inner product of each row of two heads."""
    total = tl.sum(a[0].to(ACC) * b[0].to(ACC), axis=1)
    for i in tl.static_range(1, len(a)):
        total += tl.sum(a[i].to(ACC) * b[i].to(ACC), axis=1)
    return total


@triton.jit
def store_sums(ptr, parts, mask_n, D: tl.constexpr, PARTS: tl.constexpr):
    """Store the sum of a head's rows inside ``mask_n``, (D,)."""
    for i in tl.static_range(len(PARTS)):
        cols = columns(PARTS, i)
        tl.store(ptr + cols, tl.sum(tl.where(mask_n[:, None], parts[i], 0.0), axis=0), mask=cols < D)


@triton.jit
def load_mask(mask_head, m, n, N_q, mask_width, stride_mask_m, MASK_M: tl.constexpr, MASK_N: tl.constexpr):
    """Load a head's mask for queries ``m`` and keys ``n``, which broadcast to a tile.

    The mask varies over queries with MASK_M, and over keys with MASK_N; a dim without variation is loaded once. Its
    rows have ``mask_width`` keys including the padding: a bound of 197 keys would prevent vector loads.
    """
    ptrs = mask_head
    if MASK_M:
        ptrs = ptrs + m * stride_mask_m
    if MASK_N:
        ptrs = ptrs + n
    if MASK_M and MASK_N:
        return tl.load(ptrs, mask=(m < N_q) & (n < mask_width), other=0)
    elif MASK_M:
        return tl.load(ptrs, mask=m < N_q, other=0)
    elif MASK_N:
        return tl.load(ptrs, mask=n < mask_width, other=0)
    else:
        return tl.load(ptrs)


@triton.jit
def masked(s, mask, m, n, in_n, MASK: tl.constexpr, IS_CAUSAL: tl.constexpr, EVEN: tl.constexpr):
    """Apply a mask from :func:`load_mask` to scores; set -inf beyond the last key (unless EVEN: all keys exist) and,
    with IS_CAUSAL, at keys after the query."""
    if MASK == "float":
        s += _finite(mask, s.dtype)
    elif MASK == "bool":
        s = tl.where(mask != 0, s, float("-inf"))
    if IS_CAUSAL:
        s = tl.where(m >= n, s, float("-inf"))
    if not EVEN:
        s = tl.where(in_n, s, float("-inf"))
    return s


@triton.jit
def masked_scores(
    s, mask_head, m, n, in_n, N_q, mask_width, stride_mask_m, MASK: tl.constexpr, MASK_M: tl.constexpr,
    MASK_N: tl.constexpr, IS_CAUSAL: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Load the mask's tile for queries ``m`` and keys ``n``, if there is a mask, and call :func:`masked`."""
    mask = 0
    if MASK != "":
        mask = load_mask(mask_head, m, n, N_q, mask_width, stride_mask_m, MASK_M, MASK_N)
    return masked(s, mask, m, n, in_n, MASK, IS_CAUSAL, EVEN)


@triton.jit
def add_key_bias(s, bias_row, n, in_n, MASK: tl.constexpr, KEY_BIAS: tl.constexpr):
    """Add the bias of keys ``n``, which broadcast to a tile, to scores in the base of :func:`exp_scores`."""
    if KEY_BIAS:
        bias = _finite(tl.load(bias_row + n, mask=in_n, other=0.0), s.dtype)
        s += bias if MASK == "float" else bias * LOG2_E
    return s


@triton.jit
def _finite(mask, dtype: tl.constexpr):
    """Cast ``mask`` to ``dtype``; finite values stay finite, while a plain cast turns finfo(fp64).min into -inf."""
    if mask.dtype == tl.float64 and dtype == tl.float32:
        nearest = tl.minimum(tl.maximum(mask, -LARGEST_FP32), LARGEST_FP32)
        mask = tl.where(tl.abs(mask) < float("inf"), nearest, mask)
    return mask.to(dtype)


@triton.jit
def exp_scores(x, MASK: tl.constexpr):
    """Return exp of a difference of scores. Scores are in base 2, with log2(e) folded into their scale, except with a
    floating mask: finfo.min times log2(e) is -inf, so a row full of it would attend to no key."""
    return tl.exp2(x * LOG2_E if MASK == "float" else x)


@triton.jit
def statistics_of(lse_ptr, bh, N_q, MASK: tl.constexpr):
    """Return the pointer to the statistics of one head's rows: log-sum-exp, or with a floating mask the maximum and
    the base-2 logarithm of the sum."""
    return lse_ptr + bh * N_q * (2 if MASK == "float" else 1)


@triton.jit
def load_lse(lse_head, m, N_q, MASK: tl.constexpr):
    """Load the log-sum-exp of rows ``m``, or with a floating mask their maximum; rows beyond the last get +inf, which
    makes their weights 0."""
    return tl.load(lse_head + m * (2 if MASK == "float" else 1), mask=m < N_q, other=float("inf"))


@triton.jit
def load_log_total(lse_head, m, N_q, MASK: tl.constexpr):
    """Load the base-2 logarithm of the sum of rows ``m`` with a floating mask; else return 0."""
    if MASK == "float":
        return tl.load(lse_head + 2 * m + 1, mask=m < N_q, other=0.0)
    else:
        return tl.zeros(m.shape, lse_head.dtype.element_ty)


@triton.jit
def weights_of(s, lse, log_total, MASK: tl.constexpr):
    """Return the attention weights of scores ``s``, from :func:`load_lse` and :func:`load_log_total` of their rows."""
    # The backward sums products in another order than the forward, so a score may exceed its row's lse, by far if
    # scores are huge. The minimum keeps weights at most 1, and NaN stays NaN.
    x = tl.minimum(s - lse, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if MASK == "float":
        x = x * LOG2_E - log_total
    return tl.exp2(x)


@triton.jit
def dropout_scale(seed, bh, m, n, DROPOUT: tl.constexpr, ACC: tl.constexpr):
    """Return 1/(1 − p) if the weight of query ``m`` and key ``n`` is kept, 0 if dropped; p is DROPOUT · 2⁻³¹.

    Philox4x32-10 (Salmon et al., SC 2011) runs on the counter (key, query, image · H + head, 0). It is unique to a
    weight, so that every kernel draws the same number, whatever its tiles.
    """
    zero = m * 0 + n * 0
    if DROPOUT == 2147483648:
        return zero.to(ACC)
    else:
        bits, _, _, _ = tl.philox(seed, zero + n, zero + m, zero + bh.to(tl.int32), zero)
        return tl.where((bits >> 1).to(tl.int32) >= DROPOUT, kept_factor(DROPOUT, ACC), 0.0)


@triton.jit
def kept_factor(DROPOUT: tl.constexpr, ACC: tl.constexpr):
    """Return 1/(1 − p), or 1 if nothing is kept; p is DROPOUT · 2⁻³¹."""
    FACTOR: tl.constexpr = 2147483648 / (2147483648 - DROPOUT) if DROPOUT < 2147483648 else 1.0
    return tl.full((), FACTOR, ACC)  # as a plain number it would be fp32, even for fp64 operands
