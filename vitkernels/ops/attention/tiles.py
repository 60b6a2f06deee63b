"""What the attention kernels share: heads loaded in parts, scores, masks, dropout. No kernels.

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
    """Where token ``first`` of head h of image b lies in a tensor (B, N, H, D) whose rows all lie at multiples of
    ALIGN bytes."""
    item_bytes: tl.constexpr = ptr.dtype.element_ty.primitive_bitwidth // 8
    offset = b * tl.cast(stride_b, tl.int64) + first * stride_n + h * stride_h
    return ptr + tl.multiple_of(offset, ALIGN // item_bytes)


@triton.jit
def image_of(starts_ptr, image, tokens):
    """First token and length of one of the images packed in ``tokens``, whatever ``starts_ptr`` holds."""
    first = tl.minimum(tl.maximum(tl.load(starts_ptr + image), 0), tokens)
    end = tl.minimum(tl.load(starts_ptr + image + 1), tokens)
    return first.to(tl.int64), tl.maximum(end - first, 0).to(tl.int32)


@triton.jit
def columns(PARTS: tl.constexpr, i: tl.constexpr):
    """The channels in part i of a head."""
    return (0 if i == 0 else PARTS[0]) + tl.arange(0, PARTS[i])


@triton.jit
def _part_ptrs(head, offs_n, stride_n, cols, ALIGN: tl.constexpr):
    item_bytes: tl.constexpr = head.dtype.element_ty.primitive_bitwidth // 8
    rows = tl.multiple_of(offs_n * stride_n, ALIGN // item_bytes)
    return head + rows[:, None] + cols[None, :]


@triton.jit
def load_head(head, offs_n, stride_n, mask_n, D: tl.constexpr, PARTS: tl.constexpr, ALIGN: tl.constexpr):
    """Rows ``offs_n`` of one head, a tile a part, zero outside ``mask_n`` and beyond D."""
    parts = ()
    for i in tl.static_range(len(PARTS)):
        cols = columns(PARTS, i)
        ptrs = _part_ptrs(head, offs_n, stride_n, cols, ALIGN)
        parts = parts + (tl.load(ptrs, mask=mask_n[:, None] & (cols < D)[None, :], other=0.0),)
    return parts


@triton.jit
def store_head(head, parts, offs_n, stride_n, mask_n, D: tl.constexpr, PARTS: tl.constexpr, ALIGN: tl.constexpr):
    """Store ``parts`` where :func:`load_head` would load them, in the tensor's dtype."""
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
    """Accumulators of one head's rows."""
    parts = ()
    for i in tl.static_range(len(PARTS)):
        parts = parts + (zeros(BLOCK, PARTS[i], ACC),)
    return parts


@triton.jit
def zero_columns(BLOCK: tl.constexpr, PARTS: tl.constexpr, ACC: tl.constexpr):
    """Accumulators of one head's rows, transposed."""
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
    """``factor`` times a head, one a row where it is (rows, 1)."""
    scaled = ()
    for i in tl.static_range(len(parts)):
        scaled = scaled + (parts[i] * factor,)
    return scaled


@triton.jit
def inner(a, b, acc, PRECISION: tl.constexpr):
    """acc + a bᵀ over all channels of two heads."""
    for i in tl.static_range(len(a)):
        acc = _tile.dot(a[i], tl.trans(b[i]), acc, PRECISION)
    return acc


@triton.jit
def gather(weights, head, acc, PRECISION: tl.constexpr):
    """acc + weights · head, part by part: a weighted sum of a head's rows."""
    sums = ()
    for i in tl.static_range(len(head)):
        sums = sums + (_tile.dot(weights.to(head[i].dtype), head[i], acc[i], PRECISION),)
    return sums


@triton.jit
def gather_columns(head, weights, acc, PRECISION: tl.constexpr):
    """acc + headᵀ · weights, part by part: :func:`gather` with everything transposed."""
    sums = ()
    for i in tl.static_range(len(head)):
        part = _tile.dot(tl.trans(head[i]), weights.to(head[i].dtype), acc[i], PRECISION)
        sums = sums + (part,)
    return sums


@triton.jit
def row_inner(a, b, ACC: tl.constexpr):
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
    """What ``mask_head`` holds for queries ``m`` and keys ``n``, which broadcast to a tile.

    It varies over queries with MASK_M, over keys with MASK_N: one that does not is read as a row. Its rows have
    ``mask_width`` keys, those behind the last included, as a bound of 197 keys would break up the loads.
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
    """Scores with what :func:`load_mask` gave, and -inf where a query must not look: beyond the last key, unless all
    are inside (EVEN), and, with IS_CAUSAL, behind itself."""
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
    """:func:`masked` with the mask's tile for queries ``m`` and keys ``n`` loaded, where there is a mask."""
    mask = 0
    if MASK != "":
        mask = load_mask(mask_head, m, n, N_q, mask_width, stride_mask_m, MASK_M, MASK_N)
    return masked(s, mask, m, n, in_n, MASK, IS_CAUSAL, EVEN)


@triton.jit
def _finite(mask, dtype: tl.constexpr):
    """``mask`` in ``dtype``; what is finite stays so, as finfo(fp64).min would not in fp32."""
    if mask.dtype == tl.float64 and dtype == tl.float32:
        nearest = tl.minimum(tl.maximum(mask, -LARGEST_FP32), LARGEST_FP32)
        mask = tl.where(tl.abs(mask) < float("inf"), nearest, mask)
    return mask.to(dtype)


@triton.jit
def exp_scores(x, MASK: tl.constexpr):
    """exp of a difference of scores. They are in base 2, log2(e) folded into their scale, but with a floating mask:
    finfo.min times log2(e) is -inf, and a row that it fills would look at no key."""
    return tl.exp2(x * LOG2_E if MASK == "float" else x)


@triton.jit
def statistics_of(lse_ptr, bh, N_q, MASK: tl.constexpr):
    """Where the statistics of one head's rows lie: a row's log-sum-exp, or, with a floating mask, its maximum and the
    base-2 logarithm of its sum."""
    return lse_ptr + bh * N_q * (2 if MASK == "float" else 1)


@triton.jit
def load_lse(lse_head, m, N_q, MASK: tl.constexpr):
    """The log-sum-exp, or with a floating mask the maximum, of rows ``m``; of those beyond the last, what gives the
    weight 0."""
    return tl.load(lse_head + m * (2 if MASK == "float" else 1), mask=m < N_q, other=float("inf"))


@triton.jit
def load_log_total(lse_head, m, N_q, MASK: tl.constexpr):
    """The base-2 logarithm of the sum of rows ``m`` with a floating mask, else 0."""
    if MASK == "float":
        return tl.load(lse_head + 2 * m + 1, mask=m < N_q, other=0.0)
    else:
        return tl.zeros(m.shape, lse_head.dtype.element_ty)


@triton.jit
def weights_of(s, lse, log_total, MASK: tl.constexpr):
    """Attention weights of scores ``s``, given what :func:`load_lse` and :func:`load_log_total` say of their rows."""
    # Products summed in another order than in the forward may put a score above its row's lse, far above where
    # scores are huge; a weight is never above 1. A NaN stays one.
    x = tl.minimum(s - lse, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if MASK == "float":
        x = x * LOG2_E - log_total
    return tl.exp2(x)


@triton.jit
def dropout_scale(seed, bh, m, n, DROPOUT: tl.constexpr, ACC: tl.constexpr):
    """1/(1 − p) where the weight of query ``m`` and key ``n`` stays, 0 where it is dropped; p is DROPOUT · 2⁻³¹.

    Philox4x32-10 (Salmon et al., SC 2011) on the counter (key, query, image · H + head, 0): a weight's own, so that
    every kernel finds it again whatever its tiles.
    """
    zero = m * 0 + n * 0
    if DROPOUT == 2147483648:
        return zero.to(ACC)
    else:
        bits, _, _, _ = tl.philox(seed, zero + n, zero + m, zero + bh.to(tl.int32), zero)
        return tl.where((bits >> 1).to(tl.int32) >= DROPOUT, 2147483648.0 / (2147483648 - DROPOUT), 0.0).to(ACC)
