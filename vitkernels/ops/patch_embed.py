"""Images to tokens: one product straight from the pixels, with bias, position and prefix tokens in its epilogue.

Forward (arXiv 2010.11929; registers arXiv 2309.16588):
    out[b, R + n, c] = Σₖ patch[b, n, k] · weight[c, k] + bias[c] + pos[R + n, c]
    out[b, r, c] = prefix[r, c] + pos[r, c],  r < R
Backward, with dtokens = dout[:, R:]:
    dpatch = dtokens · weight,  dweight = dtokensᵀ · patch
    dbias = Σ dtokens,  dpos = Σ_b dout,  dprefix = Σ_b dout[:, :R]

Shapes: images (B, I, Y, X), patches of PY × PX pixels, N = Y/PY · X/PX patches an image in row-major order, R prefix
tokens, T = R + N tokens, C channels, K = I · PY · PX pixels a patch; products run over M rows, B · T forward and B · N
backward. patch[b, n, k] is never stored: each kernel works out where pixel k of patch n lies. Forward, a prefix token
is a row without pixels; that wastes R/T of the product and saves the copy that would put it in front.

Saved for backward: images and weight. Products take operands in the weight's dtype and sum in fp32 (fp64 for fp64),
as all sums do. Each pixel belongs to one patch, so dimages is stored once and whole. dweight is summed in shares of
rows, (splits, C, K), whose number does not grow with M; nothing is atomic.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vitkernels import reference, runtime, tuning
from vitkernels.ops import _tile
from vitkernels.ops._checks import check_like, check_shape, check_tensor
from vitkernels.ops._registry import needs_grad, reference_gradients, register, uses_kernels
from vitkernels.ops._triton import tl, triton
from vitkernels.runtime import DeviceFacts, cdiv, dense_or, wide_dtype

SUMMED = {"forward": "k", "dimages": "c", "dweight": "m"}  # the axis that each product sums over


@dataclasses.dataclass(frozen=True)
class PatchEmbedConfig:
    """One product's tile along rows, channels and pixels, its shares of the sum, warps and pipeline stages."""

    block_m: int
    block_c: int
    block_k: int
    splits: int
    num_warps: int
    num_stages: int


def choose_config(
    product: str,
    M: int,
    C: int,
    K: int,
    dtype: torch.dtype,
    facts: DeviceFacts,
    *,
    image_dtype: torch.dtype | None = None,
) -> PatchEmbedConfig:
    """Choose the configuration of ``"forward"``, ``"dimages"`` or ``"dweight"``: the tuning table's, else a heuristic.

    ``dtype`` is the products', ``image_dtype`` that of the images in memory where it differs (autocast).
    """
    summed = SUMMED[product]
    wide = product == "dweight" and facts.shared_memory > 128 << 10
    if facts.arch == "interpreter":
        rows = columns = step = 128
    else:
        rows, step = {2: (128, 64), 4: (64, 32), 8: (32, 16)}[dtype.itemsize]
        # 128 columns often leave room for one program on an SM: for want of registers forward (position and prefix are
        # tiles too) and in dimages (scattered stores), of shared memory in dweight where that is small.
        columns = rows if wide else min(rows, 64)
    sizes = {"m": M, "c": C, "k": K}
    kept = [a for a in sizes if a != summed]
    limits = {summed: step, kept[0]: rows, kept[1]: columns}
    blocks = {a: max(16, min(runtime.next_power_of_2(sizes[a]), limits[a])) for a in sizes}

    def tiles() -> int:
        return math.prod(cdiv(sizes[a], blocks[a]) for a in kept)

    while product != "dweight" and tiles() < facts.num_sms and max(blocks[a] for a in kept) > 32:
        blocks[max(kept, key=blocks.get)] //= 2
    itemsize = max(dtype.itemsize, (image_dtype or dtype).itemsize)

    def stages() -> int:
        return facts.shared_memory // (blocks[summed] * sum(blocks[a] for a in kept) * itemsize)

    while stages() < 2 and blocks[summed] > 16:
        blocks[summed] //= 2
    config = {f"block_{a}": block for a, block in blocks.items()}
    config |= {
        # Shares fill the chip twice; each sums at least four steps, as it costs a store of its tile.
        "splits": max(1, min(2 * facts.num_sms // tiles(), M // (4 * blocks["m"]))) if product == "dweight" else 1,
        "num_warps": 8 if math.prod(blocks[a] for a in kept) > 64 * 64 else 4,
        # With a third stage the addresses of dweight's narrow tile would spill.
        "num_stages": max(1, min(3 if wide or product != "dweight" else 2, stages())),
    }
    return PatchEmbedConfig(**config | (tuning.lookup("patch_embed", facts.name, f"{product} C={C} K={K}") or {}))


@triton.jit
def _patch_embed_fwd_kernel(
    images_ptr,  # (B, I, Y, X)
    weight_ptr,  # (C, K), contiguous
    bias_ptr,  # (C,)
    pos_ptr,  # (T - pos_start, C), contiguous
    prefix_ptr,  # (R, C), contiguous
    out_ptr,  # (B, T, C), contiguous
    stride_images_b,
    stride_images_i,
    stride_images_y,
    stride_images_x,
    M,
    C,
    T,
    R,
    patches_x,
    pos_start,
    HAS_BIAS: tl.constexpr,
    HAS_POS: tl.constexpr,
    HAS_PREFIX: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    PY: tl.constexpr,
    PX: tl.constexpr,
    K: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_c = tl.cdiv(C, BLOCK_C)
    pid_m, pid_c = tl.program_id(0) // tiles_c, tl.program_id(0) % tiles_c
    offs_m = pid_m.to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = pid_c.to(INDEX) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_m = offs_m < M
    mask_c = offs_c < C
    b = offs_m // T
    t = offs_m - b * T
    mask_patch = mask_m & (t >= R)
    patch_offs = _patch_offsets(b, t - R, patches_x, stride_images_b, stride_images_y, stride_images_x, PY, PX)
    weight_rows = weight_ptr + offs_c[:, None] * K

    out_ptrs = out_ptr + offs_m[:, None] * C + offs_c[None, :]
    if HAS_PREFIX:
        # Stored ahead of the product: merged into its epilogue, the tile would take more registers.
        mask_prefix = mask_m & (t < R)
        prefix = _load_rows(prefix_ptr, t, offs_c, C, mask_prefix, mask_c).to(ACC)
        if HAS_POS:
            prefix += _load_rows(pos_ptr, t - pos_start, offs_c, C, mask_prefix & (t >= pos_start), mask_c).to(ACC)
        mask = mask_prefix[:, None] & mask_c[None, :]
        tl.store(out_ptrs, _tile.cast(prefix, out_ptr.dtype.element_ty), mask=mask)

    acc = tl.zeros((BLOCK_M, BLOCK_C), ACC)
    if HAS_POS:
        acc += _load_rows(pos_ptr, t - pos_start, offs_c, C, mask_patch, mask_c).to(ACC)
    for start_k in range(0, K, BLOCK_K):
        offs_k = start_k + tl.arange(0, BLOCK_K).to(INDEX)
        mask_k = offs_k < K
        pixel_offs = _pixel_offsets(offs_k, stride_images_i, stride_images_y, stride_images_x, PY, PX)
        image_offs = _tile_offsets(patch_offs, pixel_offs, RUN)
        pixels = tl.load(images_ptr + image_offs, mask=mask_patch[:, None] & mask_k[None, :], other=0.0)
        weight = tl.load(weight_rows + offs_k[None, :], mask=mask_c[:, None] & mask_k[None, :], other=0.0)
        acc = _tile.dot(_tile.cast(pixels, weight.dtype), tl.trans(weight), acc, PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(ACC)[None, :]
    tl.store(out_ptrs, _tile.cast(acc, out_ptr.dtype.element_ty), mask=mask_patch[:, None] & mask_c[None, :])


@triton.jit
def _load_rows(ptr, rows, offs_c, C, mask_rows, mask_c):
    offs = rows[:, None] * C + offs_c[None, :]
    return tl.load(ptr + offs, mask=mask_rows[:, None] & mask_c[None, :], other=0.0)


@triton.jit
def _patch_embed_bwd_images_kernel(
    dout_ptr,  # (B, T, C)
    weight_ptr,  # (C, K), contiguous
    dimages_ptr,  # (B, I, Y, X)
    stride_dout_b,
    stride_dout_t,
    stride_dout_c,
    stride_images_b,
    stride_images_i,
    stride_images_y,
    stride_images_x,
    M,
    C,
    N,
    R,
    patches_x,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    PY: tl.constexpr,
    PX: tl.constexpr,
    K: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_k = tl.cdiv(K, BLOCK_K)
    pid_m, pid_k = tl.program_id(0) // tiles_k, tl.program_id(0) % tiles_k
    offs_m = pid_m.to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = pid_k.to(INDEX) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_m = offs_m < M
    mask_k = offs_k < K
    b = offs_m // N
    n = offs_m - b * N
    dout_rows = dout_ptr + (b * stride_dout_b + (R + n) * stride_dout_t)[:, None]

    acc = tl.zeros((BLOCK_M, BLOCK_K), ACC)
    for start_c in range(0, C, BLOCK_C):
        offs_c = start_c + tl.arange(0, BLOCK_C).to(INDEX)
        mask_c = offs_c < C
        dout_offs = offs_c[None, :] * stride_dout_c
        dout = tl.load(dout_rows + dout_offs, mask=mask_m[:, None] & mask_c[None, :], other=0.0)
        weight_offs = offs_c[:, None] * K + offs_k[None, :]
        weight = tl.load(weight_ptr + weight_offs, mask=mask_c[:, None] & mask_k[None, :], other=0.0)
        acc = _tile.dot(_tile.cast(dout, weight.dtype), weight, acc, PRECISION)

    patch_offs = _patch_offsets(b, n, patches_x, stride_images_b, stride_images_y, stride_images_x, PY, PX)
    pixel_offs = _pixel_offsets(offs_k, stride_images_i, stride_images_y, stride_images_x, PY, PX)
    dimages_ptrs = dimages_ptr + _tile_offsets(patch_offs, pixel_offs, RUN)
    tl.store(dimages_ptrs, _tile.cast(acc, dimages_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_k[None, :])


@triton.jit
def _patch_embed_bwd_weight_kernel(
    dout_ptr,  # (B, T, C)
    images_ptr,  # (B, I, Y, X)
    dweight_ptr,  # (splits, C, K), each share of the rows its sum
    stride_dout_b,
    stride_dout_t,
    stride_dout_c,
    stride_images_b,
    stride_images_i,
    stride_images_y,
    stride_images_x,
    M,
    C,
    N: tl.constexpr,  # this and patches_x: each step of the loop divides by both
    R,
    patches_x: tl.constexpr,
    rows_per_split,
    DTYPE: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    PY: tl.constexpr,
    PX: tl.constexpr,
    K: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_c, tiles_k = tl.cdiv(C, BLOCK_C), tl.cdiv(K, BLOCK_K)
    split = tl.program_id(0) // (tiles_c * tiles_k)
    pid = tl.program_id(0) % (tiles_c * tiles_k)
    offs_c = (pid // tiles_k).to(INDEX) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_k = (pid % tiles_k).to(INDEX) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_c = offs_c < C
    mask_k = offs_k < K
    pixel_offs = _pixel_offsets(offs_k, stride_images_i, stride_images_y, stride_images_x, PY, PX)
    dout_rows = dout_ptr + offs_c[:, None] * stride_dout_c

    acc = tl.zeros((BLOCK_C, BLOCK_K), ACC)
    first_m = split.to(INDEX) * rows_per_split
    last_m = tl.minimum(first_m + rows_per_split, M)
    for start_m in range(first_m, last_m, BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < last_m
        b = offs_m // N
        n = offs_m - b * N
        dout_offs = b * stride_dout_b + (R + n) * stride_dout_t
        dout = tl.load(dout_rows + dout_offs[None, :], mask=mask_c[:, None] & mask_m[None, :], other=0.0)
        patch_offs = _patch_offsets(b, n, patches_x, stride_images_b, stride_images_y, stride_images_x, PY, PX)
        image_offs = _tile_offsets(patch_offs, pixel_offs, RUN)
        pixels = tl.load(images_ptr + image_offs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        acc = _tile.dot(_tile.cast(dout, DTYPE), _tile.cast(pixels, DTYPE), acc, PRECISION)

    dweight_offs = (split.to(INDEX) * C + offs_c)[:, None] * K + offs_k[None, :]
    tl.store(dweight_ptr + dweight_offs, acc, mask=mask_c[:, None] & mask_k[None, :])


@triton.jit
def _patch_offsets(b, n, patches_x, stride_b, stride_y, stride_x, PY: tl.constexpr, PX: tl.constexpr):
    """Where the first pixel of patch n of image b lies."""
    row = n // patches_x
    column = n - row * patches_x
    return b * stride_b + row * PY * stride_y + column * PX * stride_x


@triton.jit
def _pixel_offsets(offs_k, stride_i, stride_y, stride_x, PY: tl.constexpr, PX: tl.constexpr):
    """Where pixel k of a patch lies from its first; k counts as in the weight, x fastest."""
    return offs_k // (PY * PX) * stride_i + offs_k // PX % PY * stride_y + offs_k % PX * stride_x


@triton.jit
def _tile_offsets(patch_offs, pixel_offs, RUN: tl.constexpr):
    # The compiler cannot see how far neighbouring pixels stay neighbours in memory; the launcher can.
    offs = patch_offs[:, None] + pixel_offs[None, :]
    return tl.max_contiguous(tl.multiple_of(offs, (1, RUN)), (1, RUN))


def patch_embed_forward(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    prefix_tokens: Tensor | None,
    pos_embed_prefix: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    """Launch the forward: tokens (B, R + N, C)."""
    out = _empty_tokens(images, weight, bias, pos_embed, prefix_tokens, pos_embed_prefix, out_dtype)
    B, T, C = out.shape
    if B == 0:
        return out
    images, weight, PY, PX = _in_pixel_order(images, weight)
    weight = weight.reshape(C, -1).contiguous()
    M, K = B * T, weight.shape[1]
    R = T - _patches(images, PY, PX)
    facts = runtime.device_facts(images.device)
    config = choose_config("forward", M, C, K, weight.dtype, facts, image_dtype=images.dtype)
    _patch_embed_fwd_kernel[(cdiv(M, config.block_m) * cdiv(C, config.block_c),)](
        images_ptr=images,
        weight_ptr=weight,
        bias_ptr=dense_or(bias, weight),
        pos_ptr=dense_or(pos_embed, weight),
        prefix_ptr=dense_or(prefix_tokens, weight),
        out_ptr=out,
        M=M,
        C=C,
        T=T,
        R=R,
        pos_start=0 if pos_embed_prefix else R,
        HAS_BIAS=bias is not None,
        HAS_POS=pos_embed is not None,
        HAS_PREFIX=R > 0,
        **_launch_options(config, M, K, PY, PX, images, weight, out),
    )
    return out


def patch_embed_backward(
    dout: Tensor, images: Tensor, weight: Tensor, needs_dimages: bool, needs_dweight: bool
) -> tuple[Tensor, Tensor]:
    """Launch the backward: gradients of (images, weight), empty where not needed; the weight's in the sums' dtype."""
    dimages, dweight = _empty_gradients(dout, images, weight, needs_dimages, needs_dweight)
    if images.shape[0] == 0:
        return dimages, dweight.zero_()
    if needs_dimages:
        _launch_bwd_images(dout, weight, dimages)
    if needs_dweight:
        _launch_bwd_weight(dout, images, weight, dweight)
    return dimages, dweight


def _launch_bwd_images(dout: Tensor, weight: Tensor, dimages: Tensor) -> None:
    dimages, weight, PY, PX = _in_pixel_order(dimages, weight)
    C = weight.shape[0]
    weight = weight.reshape(C, -1).contiguous()
    K = weight.shape[1]
    N = _patches(dimages, PY, PX)
    M = dimages.shape[0] * N
    facts = runtime.device_facts(dimages.device)
    config = choose_config("dimages", M, C, K, weight.dtype, facts)
    _patch_embed_bwd_images_kernel[(cdiv(M, config.block_m) * cdiv(K, config.block_k),)](
        dout_ptr=dout,
        weight_ptr=weight,
        dimages_ptr=dimages,
        stride_dout_b=dout.stride(0),
        stride_dout_t=dout.stride(1),
        stride_dout_c=dout.stride(2),
        M=M,
        C=C,
        N=N,
        R=dout.shape[1] - N,
        **_launch_options(config, M, K, PY, PX, dimages, weight, dout),
    )


def _launch_bwd_weight(dout: Tensor, images: Tensor, weight: Tensor, dweight: Tensor) -> None:
    images, dweight, PY, PX = _in_pixel_order(images, dweight)
    C, K = dweight.shape[0], dweight.shape[1:].numel()
    N = _patches(images, PY, PX)
    M = images.shape[0] * N
    facts = runtime.device_facts(images.device)
    config = choose_config("dweight", M, C, K, weight.dtype, facts, image_dtype=images.dtype)
    shares = torch.empty((config.splits, *dweight.shape), dtype=dweight.dtype, device=images.device)
    _patch_embed_bwd_weight_kernel[(config.splits * cdiv(C, config.block_c) * cdiv(K, config.block_k),)](
        dout_ptr=dout,
        images_ptr=images,
        dweight_ptr=shares,
        stride_dout_b=dout.stride(0),
        stride_dout_t=dout.stride(1),
        stride_dout_c=dout.stride(2),
        M=M,
        C=C,
        N=N,
        R=dout.shape[1] - N,
        rows_per_split=cdiv(cdiv(M, config.block_m), config.splits) * config.block_m,
        DTYPE=getattr(tl, str(weight.dtype).removeprefix("torch.")),
        **_launch_options(config, M, K, PY, PX, images, shares, dout),
    )
    torch.sum(shares, 0, out=dweight)


def _in_pixel_order(images: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, int, int]:
    """Views of both, and the patch's size, in which the last dim of the images has the smallest stride.

    Channels-last images are images of one channel, I times as wide, whose patches are I times as wide too.
    """
    B, channels, Y, X = images.shape
    PY, PX = weight.shape[2:]
    if channels == 1 or images.stride(1) != 1 or images.stride(3) != channels:
        return images, weight, PY, PX
    merged = images.permute(0, 2, 3, 1).view(B, 1, Y, X * channels)
    return merged, weight.permute(0, 2, 3, 1), PY, PX * channels


def _patches(images: Tensor, PY: int, PX: int) -> int:
    return (images.shape[2] // PY) * (images.shape[3] // PX)


def _launch_options(
    config: PatchEmbedConfig, M: int, K: int, PY: int, PX: int, images: Tensor, *others: Tensor
) -> dict[str, object]:
    """The arguments that all three kernels share; ``others`` are what they address beside the images."""
    strides = images.stride()
    # int32 offsets spare a third of the instructions in dweight's loop. Half of its range is left to what lies masked
    # beyond the last row.
    reach = max(M, *(sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) for t in (images, *others)))
    return {
        "stride_images_b": strides[0],
        "stride_images_i": strides[1],
        "stride_images_y": strides[2],
        "stride_images_x": strides[3],
        "patches_x": images.shape[3] // PX,
        "ACC": _tile.accumulator(images.dtype),
        "PRECISION": runtime.dot_precision(images.device),
        "INDEX": tl.int32 if reach < 2**30 else tl.int64,
        "PY": PY,
        "PX": PX,
        "K": K,
        # Pixels that lie side by side, and begin at a multiple of their number, wherever a patch lies.
        "RUN": math.gcd(PX, *strides[:3], 16) if strides[3] == 1 else 1,
        "BLOCK_M": config.block_m,
        "BLOCK_C": config.block_c,
        "BLOCK_K": config.block_k,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def _empty_tokens(images, weight, bias, pos_embed, prefix_tokens, pos_embed_prefix, out_dtype):
    B, C = images.shape[0], weight.shape[0]
    R = 0 if prefix_tokens is None else prefix_tokens.shape[-2]
    T = R + _patches(images, *weight.shape[2:])
    return torch.empty((B, T, C), dtype=out_dtype, device=images.device)


def _empty_gradients(dout, images, weight, needs_dimages, needs_dweight):
    dimages = torch.empty_like(images) if needs_dimages else images.new_empty(0)
    dweight = torch.empty(weight.shape if needs_dweight else (0,), dtype=wide_dtype(weight.dtype), device=images.device)
    return dimages, dweight


def _reference_forward(images, weight, bias, pos_embed, prefix_tokens, pos_embed_prefix, out_dtype):
    tokens = reference.patch_embed(
        images.to(weight.dtype),
        weight,
        bias,
        pos_embed=pos_embed,
        prefix_tokens=prefix_tokens,
        pos_embed_prefix=pos_embed_prefix,
    )
    return tokens.to(out_dtype, copy=True, memory_format=torch.contiguous_format)


def _reference_backward(dout, images, weight, needs_dimages, needs_dweight):
    outputs = _empty_gradients(dout, images, weight, needs_dimages, needs_dweight)
    N = _patches(images, *weight.shape[2:])
    dtokens = dout[:, dout.shape[1] - N :].to(weight.dtype)
    grads = reference_gradients(
        reference.patch_embed, (images.to(weight.dtype), weight), (dtokens,), (needs_dimages, needs_dweight)
    )
    return tuple(output.copy_(grad) for output, grad in zip(outputs, grads, strict=True))


_patch_embed_fwd = register(
    "patch_embed_fwd(Tensor images, Tensor weight, Tensor? bias, Tensor? pos_embed, Tensor? prefix_tokens, "
    "bool pos_embed_prefix, ScalarType out_dtype) -> Tensor",
    launcher=patch_embed_forward,
    reference=_reference_forward,
    fake=_empty_tokens,
)
_patch_embed_bwd = register(
    "patch_embed_bwd(Tensor dout, Tensor images, Tensor weight, bool needs_dimages, bool needs_dweight) "
    "-> (Tensor, Tensor)",
    launcher=patch_embed_backward,
    reference=_reference_backward,
    fake=_empty_gradients,
)


class PatchEmbedFunction(torch.autograd.Function):
    """Autograd for :func:`patch_embed`; ``dtype`` is the products'."""

    @staticmethod
    def forward(ctx, images, weight, bias, pos_embed, prefix_tokens, pos_embed_prefix, dtype, out_dtype):
        # Cast here, so that autocast's gradient of an fp32 weight is never rounded to a half dtype.
        ctx.parameters = [None if p is None else (p.shape, p.dtype) for p in (weight, bias, pos_embed, prefix_tokens)]
        weight, bias = _cast(dtype, weight, bias)
        if any(ctx.needs_input_grad[:2]):
            ctx.save_for_backward(images, weight)
        ctx.pos_embed_prefix = pos_embed_prefix
        return _patch_embed_fwd(images, weight, bias, pos_embed, prefix_tokens, pos_embed_prefix, out_dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        needs_images, needs_weight, *needs_sums = ctx.needs_input_grad[:5]
        prefix = ctx.parameters[-1]
        dimages = dweight = dbias = dpos = dprefix = None
        if needs_images or needs_weight:
            dimages, dweight = _patch_embed_bwd(dout, *ctx.saved_tensors, needs_images, needs_weight)
        if any(needs_sums):
            R = 0 if prefix is None else prefix[0][-2]
            dout = dout.sum(0, dtype=wide_dtype(dout.dtype))
            dbias = dout[R:].sum(0)
            dpos = dout if ctx.pos_embed_prefix else dout[R:]
            # Two gradients must not share memory: whoever scales one in place would scale the other.
            dprefix = dout[:R].clone()
        grads = [
            g.reshape(p[0]).to(p[1]) if n else None
            for g, p, n in zip(
                (dweight, dbias, dpos, dprefix), ctx.parameters, (needs_weight, *needs_sums), strict=True
            )
        ]
        return dimages if needs_images else None, *grads, None, None, None


def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    pos_embed: Tensor | None = None,
    prefix_tokens: Tensor | None = None,
    pos_embed_prefix: bool = True,
) -> Tensor:
    """Cut images into patches and project each to a token: ``tokens = conv2d(images, weight, bias, stride=patch)``.

    Args:
        images: (B, I, Y, X), fp16, bf16, fp32 or fp64, any strides (channels_last too); B may be 0, and the patch
            divides Y and X. Scaled and normalised as the weights want it.
        weight: (C, I, PY, PX), a Conv2d's, in the images' dtype.
        bias: (C,), the weight's dtype, or None for zeros.
        pos_embed: Added to the tokens, (1, R + N, C) or (R + N, C), the weight's dtype, where N = Y/PY · X/PX; with
            ``pos_embed_prefix=False`` (1, N, C) or (N, C), added to the patches alone. None for zeros.
        prefix_tokens: Class and register tokens, (1, R, C) or (R, C), the weight's dtype; put in front of each image's.
        pos_embed_prefix: Whether ``pos_embed`` covers the prefix tokens too.

    Returns:
        (B, R + N, C), contiguous, in the images' dtype; patches in row-major order. Under autocast the product
        runs in autocast's dtype, and the result has the widest dtype of that, ``pos_embed`` and ``prefix_tokens``.

    Raises:
        ValueError: A shape or device does not fit, or a patch does not divide the images.
        TypeError: A dtype does not fit (integer images are to be converted and normalised first).
        NotImplementedError: A tensor is nested, sparse or quantized.

    Reference: arXiv 2010.11929 (ViT), 2309.16588 (register tokens).
    """
    dtype, out_dtype = _check(images, weight, bias, pos_embed, prefix_tokens, pos_embed_prefix)
    if not uses_kernels(images):
        return reference.patch_embed(
            images,
            weight,
            bias,
            pos_embed=pos_embed,
            prefix_tokens=prefix_tokens,
            pos_embed_prefix=pos_embed_prefix,
        ).contiguous()
    if needs_grad(images, weight, bias, pos_embed, prefix_tokens):
        return PatchEmbedFunction.apply(
            images, weight, bias, pos_embed, prefix_tokens, pos_embed_prefix, dtype, out_dtype
        )
    weight, bias = _cast(dtype, weight, bias)
    return _patch_embed_fwd(images, weight, bias, pos_embed, prefix_tokens, pos_embed_prefix, out_dtype)


def _cast(dtype: torch.dtype, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.to(dtype) for t in tensors]


def _check(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    prefix_tokens: Tensor | None,
    pos_embed_prefix: bool,
) -> tuple[torch.dtype, torch.dtype]:
    """Check all inputs; return the dtypes of the products and of the tokens."""
    op = "patch_embed"
    check_tensor(op, "images", images, hint="; convert to floating point and normalise first")
    if images.ndim != 4:
        raise ValueError(f"{op}: images have shape {tuple(images.shape)}; expected (batch, channels, height, width)")
    check_like(op, "weight", weight, "images", images, dtype=False)
    if weight.ndim != 4 or 0 in weight.shape:
        raise ValueError(
            f"{op}: weight has shape {tuple(weight.shape)}; expected a Conv2d's (out channels, in channels, "
            "patch height, patch width), none of them 0"
        )
    C, channels, PY, PX = weight.shape
    Y, X = images.shape[2:]
    if images.shape[1] != channels:
        raise ValueError(f"{op}: images have {images.shape[1]} channels; expected {channels}, the weight's")
    if Y < PY or X < PX or Y % PY or X % PX:
        raise ValueError(
            f"{op}: images of {Y}×{X} pixels do not divide into patches of {PY}×{PX}; expected a positive multiple: "
            "crop or resize them"
        )
    N = (Y // PY) * (X // PX)
    autocast = runtime.autocast_dtype(images)
    dtype = _product_dtype(weight, autocast)
    if _product_dtype(images, autocast) != dtype:
        raise TypeError(f"{op}: images have dtype {images.dtype}, weight has {weight.dtype}; expected the same dtype")
    if bias is not None:
        check_like(op, "bias", bias, "weight", weight, dtype=False)
        if _product_dtype(bias, autocast) != dtype:
            raise TypeError(f"{op}: bias has dtype {bias.dtype}, weight has {weight.dtype}; expected the same dtype")
        check_shape(op, "bias", bias, (C,), "one number a channel of the weight")

    out_dtype = dtype
    R = 0
    if prefix_tokens is not None:
        _check_tokens("prefix_tokens", prefix_tokens, weight, autocast)
        R = prefix_tokens.shape[-2]
        out_dtype = torch.promote_types(out_dtype, prefix_tokens.dtype)
    if pos_embed is not None:
        _check_tokens("pos_embed", pos_embed, weight, autocast)
        wanted = R + N if pos_embed_prefix else N
        if pos_embed.shape[-2] != wanted:
            why = f"{R} prefix tokens and {N} patches" if pos_embed_prefix else f"{N} patches, without prefix tokens"
            raise ValueError(f"{op}: pos_embed has shape {tuple(pos_embed.shape)}; expected (1, {wanted}, {C}), {why}")
        out_dtype = torch.promote_types(out_dtype, pos_embed.dtype)
    return dtype, out_dtype


def _product_dtype(x: Tensor, autocast: torch.dtype | None) -> torch.dtype:
    # Autocast leaves fp64 alone.
    return x.dtype if autocast is None or x.dtype == torch.float64 else autocast


def _check_tokens(name: str, tokens: Tensor, weight: Tensor, autocast: torch.dtype | None) -> None:
    check_like("patch_embed", name, tokens, "weight", weight, dtype=autocast is None)
    C = weight.shape[0]
    if tokens.ndim not in (2, 3) or tokens.shape[-1] != C or (tokens.ndim == 3 and tokens.shape[0] != 1):
        raise ValueError(
            f"patch_embed: {name} has shape {tuple(tokens.shape)}; expected (1, tokens, {C}) or (tokens, {C}), "
            f"with the weight's {C} channels"
        )
