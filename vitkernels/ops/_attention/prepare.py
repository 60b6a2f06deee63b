"""QK-norm and rotary positions (RoPE), in one pass over q or k.

Forward, for one head's row x of D channels:
    x̂ = (x − mean) · rstd · w + b     LayerNorm (arXiv 1607.06450), or x · rstd · w, RMSNorm (1910.07467)
    y = x̂ · cos + rot(x̂) · sin        RoPE (2104.09864); rot maps pairs (a, b) to (−b, a)
Backward:
    dx̂ = dy · cos + rotᵀ(dy · sin), then the norm's backward, which computes the statistics of x again

The pass reads and writes q and k once each. Inside the attention kernels it would need no pass of its own, but there
every block of queries loads all keys again, and would also load two fp32 tables: at 261 tokens of 64 channels, 134 KB
beside 67 KB of keys and values for each 64 queries. Here a table's rows are read once per image and stay in registers
for all heads.

Shapes: B batch, N tokens, H heads, D head dim; tables broadcast to (B, H, N − prefix, D).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vitkernels import reference, runtime
from vitkernels.ops import _tile
from vitkernels.ops._attention.operands import addressing, strides
from vitkernels.ops._attention.tiles import head_ptr
from vitkernels.ops._once import once_differentiable
from vitkernels.ops._registry import reference_gradients, register
from vitkernels.ops._sums import new_shares, sum_shares
from vitkernels.ops._triton import tl, triton


class Rope(NamedTuple):
    """Rotary positions (arXiv 2104.09864).

    Attributes:
        cos, sin: Tables that broadcast to (B, H, N − prefix tokens, D), any floating dtype: (N, D) shared by all,
            (H, N, D) per head, (B, 1, N, D) per image.
        interleaved: Whether channels 2j and 2j + 1 are a pair (timm's EVA); else j and j + D/2 (DINOv3, transformers).
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool = False


class QKNorm(NamedTuple):
    """A norm over each head's D channels: LayerNorm, or RMSNorm, which has no bias.

    Attributes:
        weight, bias: (D,), or None.
        eps: Added to the variance (or the mean square).
        rms: Whether it is an RMSNorm.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-6
    rms: bool = False


@triton.jit
def _partner(row, cols, mask_n, HALF: tl.constexpr):
    """Load each channel's partner, half a head away; ``row`` holds pointers (rows, 1) to the starts of rows."""
    before = tl.load(row + (cols + HALF)[None, :], mask=mask_n[:, None] & (cols < HALF)[None, :], other=0.0)
    inside = mask_n[:, None] & ((cols >= HALF) & (cols < 2 * HALF))[None, :]
    return tl.where((cols < HALF)[None, :], before, tl.load(row + (cols - HALF)[None, :], mask=inside, other=0.0))


@triton.jit
def _partner_of_vector(ptr, cols, HALF: tl.constexpr):
    before = tl.load(ptr + cols + HALF, mask=cols < HALF, other=0.0)
    return tl.where(cols < HALF, before, tl.load(ptr + cols - HALF, mask=(cols >= HALF) & (cols < 2 * HALF), other=0.0))


@triton.jit
def _swap_pairs(x, first, second, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Map neighbouring channels (a, b) to (first · b, second · a)."""
    a, b = tl.split(tl.reshape(x, (BLOCK_N, BLOCK_D // 2, 2)))
    return tl.reshape(tl.join(b * first, a * second), (BLOCK_N, BLOCK_D))


@triton.jit
def _statistics(x, in_head, eps, D: tl.constexpr, NORM: tl.constexpr):
    """Return mean and rstd, (rows, 1), of rows that are zero outside ``in_head``."""
    mean = tl.sum(x, axis=1)[:, None] / D
    if NORM == "rms":
        mean = tl.zeros_like(mean)
    centred = tl.where(in_head[None, :], x - mean, 0.0)
    return mean, 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1)[:, None] / D + eps)


@triton.jit(do_not_specialize=["N", "num_blocks"])
def _prepare_fwd_kernel(
    x_ptr,  # (B, N, H, D)
    weight_ptr,  # (D,)
    bias_ptr,  # (D,)
    cos_ptr,  # (B, H, N - prefix, D) by strides
    sin_ptr,  # the strides of cos
    y_ptr,  # (B, N, H, D)
    stride_x_b,
    stride_x_n,
    stride_x_h,
    stride_y_b,
    stride_y_n,
    stride_y_h,
    stride_table_b,
    stride_table_h,
    stride_table_n,
    N,
    H,
    prefix,
    num_blocks,
    eps: tl.constexpr,
    D: tl.constexpr,
    NORM: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROPE: tl.constexpr,
    TABLE_H: tl.constexpr,  # whether tables differ between heads
    ALIGN: tl.constexpr,
    INDEX: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid = tl.program_id(0)
    b = (pid // num_blocks).to(tl.int64)
    n = (pid % num_blocks).to(INDEX) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_D)
    in_head = cols < D
    mask_n = n < N
    mask = mask_n[:, None] & in_head[None, :]
    turned = ((n >= prefix) & mask_n)[:, None] & in_head[None, :]
    rows = b * stride_table_b + (n - prefix).to(tl.int64)[:, None] * stride_table_n + cols[None, :]
    if ROPE != "" and not TABLE_H:
        cos = tl.load(cos_ptr + rows, mask=turned, other=1.0).to(ACC)
        sin = tl.load(sin_ptr + rows, mask=turned, other=0.0).to(ACC)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + cols, mask=in_head, other=0.0).to(ACC)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + cols, mask=in_head, other=0.0).to(ACC)
    for head in range(H):
        h = b * 0 + head  # int64
        x_head = head_ptr(x_ptr, b, h, 0, stride_x_b, stride_x_n, stride_x_h, ALIGN)
        item_bytes: tl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth // 8
        x_rows = x_head + tl.multiple_of(n * stride_x_n, ALIGN // item_bytes)[:, None]
        x = tl.load(x_rows + cols[None, :], mask=mask, other=0.0).to(ACC)
        if ROPE == "half":
            partner = _partner(x_rows, cols, mask_n, D // 2).to(ACC)
        if NORM != "":
            mean, rstd = _statistics(x, in_head, eps, D, NORM)
            x = (x - mean) * rstd
            if HAS_WEIGHT:
                x *= weight[None, :]
            if HAS_BIAS:
                x += bias[None, :]
            if ROPE == "half":
                partner = (partner - mean) * rstd
                if HAS_WEIGHT:
                    partner *= _partner_of_vector(weight_ptr, cols, D // 2).to(ACC)[None, :]
                if HAS_BIAS:
                    partner += _partner_of_vector(bias_ptr, cols, D // 2).to(ACC)[None, :]
        if ROPE != "":
            if TABLE_H:
                cos = tl.load(cos_ptr + h * stride_table_h + rows, mask=turned, other=1.0).to(ACC)
                sin = tl.load(sin_ptr + h * stride_table_h + rows, mask=turned, other=0.0).to(ACC)
            if ROPE == "half":
                rotated = tl.where((cols < D // 2)[None, :], -partner, partner)
            else:
                rotated = _swap_pairs(x, -1.0, 1.0, BLOCK_N, BLOCK_D)
            x = x * cos + rotated * sin
        y_head = head_ptr(y_ptr, b, h, 0, stride_y_b, stride_y_n, stride_y_h, ALIGN)
        y_rows = y_head + tl.multiple_of(n * stride_y_n, ALIGN // item_bytes)[:, None]
        tl.store(y_rows + cols[None, :], x.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N", "num_blocks"])
def _prepare_bwd_kernel(
    dy_ptr,  # (B, N, H, D)
    x_ptr,  # (B, N, H, D), with NORM
    weight_ptr,  # (D,)
    cos_ptr,  # (B, H, N - prefix, D) by strides
    sin_ptr,  # the strides of cos
    dx_ptr,  # (B, N, H, D), may be dy
    dweight_ptr,  # (programs, D): each program's sum, with NORM
    dbias_ptr,  # (programs, D)
    stride_dy_b,
    stride_dy_n,
    stride_dy_h,
    stride_x_b,
    stride_x_n,
    stride_x_h,
    stride_dx_b,
    stride_dx_n,
    stride_dx_h,
    stride_table_b,
    stride_table_h,
    stride_table_n,
    N,
    H,
    prefix,
    num_blocks,
    eps: tl.constexpr,
    D: tl.constexpr,
    NORM: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    NEEDS_WEIGHT: tl.constexpr,
    NEEDS_BIAS: tl.constexpr,
    ROPE: tl.constexpr,
    TABLE_H: tl.constexpr,
    ALIGN: tl.constexpr,
    INDEX: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid = tl.program_id(0)
    b = (pid // num_blocks).to(tl.int64)
    n = (pid % num_blocks).to(INDEX) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_D)
    in_head = cols < D
    mask_n = n < N
    mask = mask_n[:, None] & in_head[None, :]
    is_turned = (n >= prefix) & mask_n
    turned = is_turned[:, None] & in_head[None, :]
    table_rows = b * stride_table_b + (n - prefix).to(tl.int64)[:, None] * stride_table_n
    if ROPE != "" and not TABLE_H:
        cos = tl.load(cos_ptr + table_rows + cols[None, :], mask=turned, other=1.0).to(ACC)
        if ROPE == "half":
            sin = _partner(sin_ptr + table_rows, cols, is_turned, D // 2).to(ACC)
        else:
            sin = tl.load(sin_ptr + table_rows + cols[None, :], mask=turned, other=0.0).to(ACC)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + cols, mask=in_head, other=0.0).to(ACC)
    dweight = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    dbias = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    for head in range(H):
        h = b * 0 + head  # int64
        item_bytes: tl.constexpr = dy_ptr.dtype.element_ty.primitive_bitwidth // 8
        dy_head = head_ptr(dy_ptr, b, h, 0, stride_dy_b, stride_dy_n, stride_dy_h, ALIGN)
        dy_rows = dy_head + tl.multiple_of(n * stride_dy_n, ALIGN // item_bytes)[:, None]
        g = tl.load(dy_rows + cols[None, :], mask=mask, other=0.0).to(ACC)
        if ROPE != "":
            if TABLE_H:
                head_rows = h * stride_table_h + table_rows
                cos = tl.load(cos_ptr + head_rows + cols[None, :], mask=turned, other=1.0).to(ACC)
                if ROPE == "half":
                    sin = _partner(sin_ptr + head_rows, cols, is_turned, D // 2).to(ACC)
                else:
                    sin = tl.load(sin_ptr + head_rows + cols[None, :], mask=turned, other=0.0).to(ACC)
            if ROPE == "half":
                partner = _partner(dy_rows, cols, mask_n, D // 2).to(ACC) * sin
                g = g * cos + tl.where((cols < D // 2)[None, :], partner, -partner)
            else:
                g = g * cos + _swap_pairs(g * sin, 1.0, -1.0, BLOCK_N, BLOCK_D)
        if NORM != "":
            x_head = head_ptr(x_ptr, b, h, 0, stride_x_b, stride_x_n, stride_x_h, ALIGN)
            x_rows = x_head + tl.multiple_of(n * stride_x_n, ALIGN // item_bytes)[:, None]
            x = tl.load(x_rows + cols[None, :], mask=mask, other=0.0).to(ACC)
            mean, rstd = _statistics(x, in_head, eps, D, NORM)
            x_hat = tl.where(mask, (x - mean) * rstd, 0.0)
            if NEEDS_WEIGHT:
                dweight += g * x_hat
            if NEEDS_BIAS:
                dbias += g
            if HAS_WEIGHT:
                g *= weight[None, :]
            g -= x_hat * (tl.sum(g * x_hat, axis=1)[:, None] / D)
            if NORM == "layer":
                # The mean of x_hat is zero, so the mean of g can be subtracted after the x_hat term.
                g -= tl.sum(g, axis=1)[:, None] / D
            g *= rstd
        tl.debug_barrier()  # dx may be dy, which other threads still read: RoPE partners, or a whole small tile
        dx_head = head_ptr(dx_ptr, b, h, 0, stride_dx_b, stride_dx_n, stride_dx_h, ALIGN)
        dx_rows = dx_head + tl.multiple_of(n * stride_dx_n, ALIGN // item_bytes)[:, None]
        tl.store(dx_rows + cols[None, :], g.to(dx_ptr.dtype.element_ty), mask=mask)
    sums = pid.to(tl.int64) * D + cols
    if NEEDS_WEIGHT:
        tl.store(dweight_ptr + sums, tl.sum(dweight, axis=0), mask=in_head)
    if NEEDS_BIAS:
        tl.store(dbias_ptr + sums, tl.sum(dbias, axis=0), mask=in_head)


def prepare_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, cos: Tensor | None, sin: Tensor | None, norm: str,
    eps: float, interleaved: bool, prefix: int,
) -> Tensor:  # fmt: skip
    """Launch the forward on x (B, N, H, D); tables are (B or 1, H or 1, N − prefix, D)."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    x = runtime.unit_stride(x)
    grid, arguments = _arguments(x, cos, sin, interleaved, prefix, norm, eps, 4096)
    _prepare_fwd_kernel[grid](
        x_ptr=x,
        weight_ptr=runtime.dense_or(weight, x),
        bias_ptr=runtime.dense_or(bias, x),
        y_ptr=y,
        **strides("x", x),
        **strides("y", y),
        **arguments,
        **addressing(x, y),
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
    )
    return y


def prepare_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, norm: str, eps: float,
    interleaved: bool, prefix: int, dx: Tensor, needs_weight: bool, needs_bias: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launch the backward into ``dx`` (B, N, H, D), which may be ``dy``; return the gradients of weight and bias."""
    wide, D = runtime.wide_dtype(x.dtype), x.shape[-1]
    if dy.numel() == 0:
        return tuple(torch.zeros(D if n else 0, dtype=wide, device=x.device) for n in (needs_weight, needs_bias))
    dy, x = runtime.unit_stride(dy), runtime.unit_stride(x)
    # Half the forward's tile, so that the sums for weight and bias also fit in registers.
    grid, arguments = _arguments(x, cos, sin, interleaved, prefix, norm, eps, 2048)
    shares, (dweight, dbias) = new_shares((needs_weight, needs_bias), grid[0], D, wide, x.device)
    _prepare_bwd_kernel[grid](
        dy_ptr=dy,
        x_ptr=x,
        weight_ptr=runtime.dense_or(weight, x),
        dx_ptr=dx,
        dweight_ptr=dweight,
        dbias_ptr=dbias,
        **strides("dy", dy),
        **strides("x", x),
        **strides("dx", dx),
        **arguments,
        **addressing(dy, x, dx),
        HAS_WEIGHT=weight is not None,
        NEEDS_WEIGHT=needs_weight,
        NEEDS_BIAS=needs_bias,
    )
    return tuple(sum_shares(shares, (needs_weight, needs_bias), (wide, wide)))


def _arguments(x, cos, sin, interleaved, prefix, norm, eps, elements) -> tuple[tuple[int], dict[str, object]]:
    B, N, H, D = x.shape
    block_d = max(2, runtime.next_power_of_2(D))
    block_n = max(1, min(runtime.next_power_of_2(N), elements // block_d))
    num_blocks = runtime.cdiv(N, block_n)
    table = (0,) * 3
    if cos is not None:
        cos, sin = runtime.unit_stride(cos), runtime.unit_stride(sin)
        if cos.shape != sin.shape or cos.stride() != sin.stride():
            cos, sin = (table.contiguous() for table in torch.broadcast_tensors(cos, sin))
        table = [0 if size == 1 else stride for size, stride in zip(cos.shape, cos.stride(), strict=True)]
    return (B * num_blocks,), {
        "cos_ptr": x if cos is None else cos,
        "sin_ptr": x if sin is None else sin,
        "stride_table_b": table[0],
        "stride_table_h": table[1],
        "stride_table_n": table[2],
        "N": N,
        "H": H,
        "prefix": prefix,
        "num_blocks": num_blocks,
        "eps": eps,
        "D": D,
        "NORM": norm,
        "ROPE": "" if cos is None else "interleaved" if interleaved else "half",
        "TABLE_H": cos is not None and cos.shape[1] > 1,
        "ACC": _tile.accumulator(x.dtype),
        "BLOCK_N": block_n,
        "BLOCK_D": block_d,
    }


def _fake_forward(x, weight, bias, cos, sin, norm, eps, interleaved, prefix):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _reference_forward(x, weight, bias, cos, sin, norm, eps, interleaved, prefix):
    y = reference.qk_norm(x, weight, bias, eps, norm) if norm else x
    if cos is not None:
        y = reference.rope(y.transpose(1, 2), cos, sin, interleaved, prefix).transpose(1, 2)
    return y.to(x.dtype).contiguous()


def _launch_backward(dy, x, weight, bias, cos, sin, norm, eps, interleaved, prefix, needed):
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    sums = prepare_backward(dy, x, weight, cos, sin, norm, eps, interleaved, prefix, dx, *needed)
    return dx, *sums


def _fake_backward(dy, x, weight, bias, cos, sin, norm, eps, interleaved, prefix, needed):
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    wide = runtime.wide_dtype(x.dtype)
    return dx, *(torch.empty(x.shape[-1] if n else 0, dtype=wide, device=x.device) for n in needed)


def _reference_backward(dy, x, weight, bias, cos, sin, norm, eps, interleaved, prefix, needed):
    wide = runtime.wide_dtype(x.dtype)
    dx, *sums = reference_gradients(
        lambda x, w, b: _reference_forward(x, w, b, cos, sin, norm, eps, interleaved, prefix),
        (x, weight, bias), (dy,), (True, *needed),
    )  # fmt: skip
    return dx, *(s.to(wide) for s in sums)


_SPEC = "Tensor? weight, Tensor? bias, Tensor? cos, Tensor? sin, str norm, float eps, bool interleaved, int prefix"
prepare_fwd = register(
    f"attention_prepare_fwd(Tensor x, {_SPEC}) -> Tensor",
    launcher=prepare_forward,
    reference=_reference_forward,
    fake=_fake_forward,
    work="pass",
)
prepare_bwd = register(
    f"attention_prepare_bwd(Tensor dy, Tensor x, {_SPEC}, bool[] needed) -> (Tensor, Tensor, Tensor)",
    launcher=_launch_backward,
    reference=_reference_backward,
    fake=_fake_backward,
)


class PrepareFunction(torch.autograd.Function):
    """Autograd for QK-norm and RoPE of x (B, N, H, D)."""

    @staticmethod
    def forward(ctx, x, weight, bias, cos, sin, norm, eps, interleaved, prefix):
        ctx.save_for_backward(x, weight, bias, cos, sin)
        ctx.emulated = runtime.emulated_arch()
        ctx.spec = (norm, eps, interleaved, prefix)
        return prepare_fwd(x, weight, bias, cos, sin, norm, eps, interleaved, prefix)

    @staticmethod
    @once_differentiable
    def backward(ctx, saved, dy):
        x, weight, bias, cos, sin = saved
        needs_x, needs_w, needs_b, *_ = ctx.needs_input_grad
        dx, dweight, dbias = prepare_bwd(dy, x, weight, bias, cos, sin, *ctx.spec, [needs_w, needs_b])
        return (
            dx if needs_x else None,
            dweight.to(weight.dtype) if needs_w else None,
            dbias.to(bias.dtype) if needs_b else None,
            *[None] * 6,
        )
