"""Pixel offsets and normalisation constants, shared by the three kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vitkernels import runtime
from vitkernels.ops import _tile
from vitkernels.ops._patch_embed.config import PatchEmbedConfig
from vitkernels.ops._triton import tl, triton

# What varies with the number and size of images. If the JIT specialised on these, it would compile the kernels anew for
# a last batch and for other images, and loads would be no wider: their width comes from strides.
VARYING = ["M", "N", "T", "patches_x"]

Constants = tuple[float, ...]  # as passed to ops: the means of all channels, then their standard deviations


@triton.jit
def patch_offsets(b, row, column, stride_b, stride_y, stride_x, PY: tl.constexpr, PX: tl.constexpr):
    """Return the offset of the first pixel of a patch of image b."""
    return b * stride_b + row * PY * stride_y + column * PX * stride_x


@triton.jit
def quotient(n, divisor, factor, shift):
    """Return n // divisor, n ≥ 0; in 32 bits without a division, which takes a dozen instructions in every step."""
    if n.dtype == tl.int32:
        return (tl.umulhi((n + n).to(tl.uint32), factor.to(tl.uint32)) >> shift.to(tl.uint32)).to(tl.int32)
    else:
        return n // divisor


def reciprocal(divisor: int) -> tuple[int, int]:
    """Return for :func:`quotient` the factor ⌈2³¹⁺ˢ / divisor⌉, which lies in [2³¹, 2³²), and s."""
    shift = (divisor - 1).bit_length()
    return -(-(1 << 31 + shift) // divisor), shift


@triton.jit
def pixel_offsets(offs_k, stride_i, stride_y, stride_x, PY: tl.constexpr, PX: tl.constexpr):
    """Return the offset of pixel k from a patch's first pixel; k is ordered as in the weight, x fastest."""
    return offs_k // (PY * PX) * stride_i + offs_k // PX % PY * stride_y + offs_k % PX * stride_x


@triton.jit
def channel_constants(
    VALUES: tl.constexpr, offs_k, PY: tl.constexpr, PX: tl.constexpr, K: tl.constexpr, ACC: tl.constexpr
):
    """Return the constant of each pixel's channel, (1, len(offs_k)); finite for k beyond the patch."""
    # For channels-last images the kernels see a single channel, and the real channel varies fastest.
    channel = offs_k % len(VALUES) if PY * PX == K else offs_k // (PY * PX)
    values = tl.full(offs_k.shape, VALUES[0], ACC)
    for i in tl.static_range(1, len(VALUES)):
        values = tl.where(channel == i, VALUES[i], values)
    return values[None, :]


def mean_and_std(constants: Sequence[float]) -> tuple[Sequence[float], Sequence[float]]:
    """Split an op's constants into means and standard deviations."""
    channels = len(constants) // 2
    return constants[:channels], constants[channels:]


def scale_and_shift(
    dtype: torch.dtype, constants: Sequence[float] | None
) -> tuple[tuple[float, ...], tuple[float, ...]] | tuple[None, None]:
    """Return factors and summands that normalise pixels of ``dtype``; None and None without normalisation."""
    if constants is None:
        return None, None
    mean, std = mean_and_std(constants)
    one = 1.0 if dtype.is_floating_point else 255.0
    return tuple(1.0 / (one * s) for s in std), tuple(-m / s for m, s in zip(mean, std, strict=True))


def exactly_multiplied(images: Tensor, weight: Tensor) -> Tensor:
    """Return ``images``, or an fp32 copy if Triton would compile the product of narrow pixels wrongly.

    For pixels loaded in a narrower dtype, Triton 3.7.1 runs fp32 products on sm_100's tcgen05 in TF32, whatever
    precision is requested. For fp64 products it chooses the layout by the narrowest dtype, and then fails to compile.
    """
    if images.dtype.itemsize >= 4:
        return images
    on_tcgen05 = weight.dtype == torch.float32 and runtime.device_facts(images.device).arch.startswith("sm_10")
    return images.float() if on_tcgen05 or weight.dtype == torch.float64 else images


def in_pixel_order(images: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, int, int]:
    """Return views of both, and the patch's size, such that the last dim of the images has the smallest stride.

    Channels-last images become images with one channel, I times as wide, and patches become I times as wide.
    """
    B, channels, Y, X = images.shape
    PY, PX = weight.shape[2:]
    if channels == 1 or images.stride(1) != 1 or images.stride(3) != channels:
        return images, weight, PY, PX
    merged = images.permute(0, 2, 3, 1).view(B, 1, Y, X * channels)
    return merged, weight.permute(0, 2, 3, 1), PY, PX * channels


def patches(images: Tensor, PY: int, PX: int) -> int:
    """Return the number of patches per image."""
    return (images.shape[2] // PY) * (images.shape[3] // PX)


def chosen(mask: Tensor | None, visible: Tensor | None, dtype: torch.dtype, unused: Tensor) -> dict[str, object]:
    """Return the arguments of the kernels that say which patches have pixels; ``dtype`` is that of the products.

    That is all, those that a mask (B, N) does not hide ("masked"), or those that indices (B, V) name ("visible").
    """
    if mask is None and visible is None:
        return {"choice_ptr": unused, "CHOICE": "all"}
    # Triton lays a product out by the narrowest dtype that its operands depend on, and fp64's fails by a narrower one.
    wide = torch.int64 if dtype == torch.float64 else torch.int32
    choice = visible if mask is None else mask
    return {"choice_ptr": choice.to(wide).contiguous(), "CHOICE": "visible" if mask is None else "masked"}


def launch_options(
    config: PatchEmbedConfig, M: int, K: int, PY: int, PX: int, images: Tensor, weights: Tensor, other: Tensor
) -> dict[str, object]:
    """Return the arguments shared by all three kernels; ``weights`` and ``other`` are their other large tensors."""
    strides = images.stride()
    # int32 offsets save a third of the instructions in dweight's loop. Half of the range is reserved for masked
    # offsets beyond the last row.
    tensors = (images, weights, other)
    reach = max(M, *(sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) for t in tensors))
    # The width of a load depends on a common divisor of all strides. The JIT tells the compiler only about 16. A
    # smaller divisor needs a multiplication in the kernel: Triton 3.7.1's AMD backend drops a hint on the offsets.
    unit = math.gcd(*strides[:3], 16)
    unit = 1 if unit == 16 else unit
    return {
        "stride_images_b": strides[0] // unit,
        "stride_images_i": strides[1] // unit,
        "stride_images_y": strides[2] // unit,
        "stride_images_x": strides[3],
        "patches_x": images.shape[3] // PX,
        "ACC": _tile.accumulator(weights.dtype),
        "PRECISION": runtime.dot_precision(images.device),
        "INDEX": tl.int32 if reach < 2**30 else tl.int64,
        "PY": PY,
        "PX": PX,
        "K": K,
        "UNIT": unit,
        "BLOCK_M": config.block_m,
        "BLOCK_C": config.block_c,
        "BLOCK_K": config.block_k,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
