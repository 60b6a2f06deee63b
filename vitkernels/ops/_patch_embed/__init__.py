"""Patch embedding as one product that reads the pixels directly; its epilogue adds bias, positions and prefix tokens.

Forward (arXiv 2010.11929; registers arXiv 2309.16588):
    out[b, R + n, c] = Σₖ patch[b, n, k] · weight[c, k] + bias[c] + pos[R + n, c]
    out[b, r, c] = prefix[r, c] + pos[r, c],  r < R
Backward, with dtokens = dout[:, R:]:
    dpatch = dtokens · weight,  dweight = dtokensᵀ · patch
    dbias = Σ dtokens,  dpos = Σ_b dout,  dprefix = Σ_b dout[:, :R]

Shapes: images (B, I, Y, X), patches of PY × PX pixels, N = Y/PY · X/PX patches per image in row-major order, R prefix
tokens, T = R + N tokens, C channels, K = I · PY · PX pixels per patch. Products have M rows, B · T in the forward and
B · N in the backward. patch[b, n, k] is never stored: each kernel computes the address of pixel k of patch n. In the
forward, a prefix token is a row without pixels; that wastes R/T of the product and saves the copy of a concatenation.

With normalize=(mean, std), patch holds (x/255 − mean)/std. The kernel computes it from the loaded tile as a · x + b in
fp32, and rounds it to the products' dtype, as a normalised image would be; dweight computes it again, and dimages is
scaled by a. Folding it into the weight instead, a · weight and bias − Σ weight · mean/std, would save two instructions
per pixel. But it rounds the weight a second time, and all pixels are then on one side of zero: 1.5 to 2 times the RMS
error in bf16 (emulated on a CPU, ImageNet's constants, 16 × 16 patches), unless a second kernel in every call sums the
bias from the rounded weight.

A masked patch has no pixels: mask_token[c] takes the place of sum and bias, and dmask_token = Σ dtokens over those,
which dpatch, dweight and dbias leave out (BEiT, arXiv 2106.08254). With V visible patches per image, the rows are those
patches alone: T = R + V, and token n has the pixels and the position of patch visible[b, n] (MAE, arXiv 2111.06377).

Saved for backward: images, weight, mask and visible. Products take operands in the weight's dtype and sum in fp32
(fp64 for fp64), as all sums do. Each pixel belongs to one patch, so each element of dimages is stored once. dweight is
summed over ranges of rows into (splits, C, K), where splits does not grow with M; there are no atomics.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vitkernels import reference, runtime
from vitkernels.ops._cast import cast
from vitkernels.ops._checks import FLOATING, check_like, check_shape, check_tensor, dtypes_and_devices_match
from vitkernels.ops._once import once_differentiable
from vitkernels.ops._patch_embed.backward import empty_gradients, patch_embed_backward
from vitkernels.ops._patch_embed.forward import empty_tokens, patch_embed_forward
from vitkernels.ops._patch_embed.pixels import Constants, mean_and_std, patches
from vitkernels.ops._registry import needs_grad, reference_gradients, register, uses_kernels
from vitkernels.runtime import promoted_dtype, wide_dtype


def _reference_forward(
    images,
    weight,
    bias,
    pos_embed,
    prefix_tokens,
    pos_embed_prefix,
    constants=None,
    out_dtype=None,
    mask=None,
    mask_token=None,
    visible=None,
):
    tokens = reference.patch_embed(
        images if constants is not None else images.to(weight.dtype),
        weight,
        bias,
        pos_embed=pos_embed,
        prefix_tokens=prefix_tokens,
        pos_embed_prefix=pos_embed_prefix,
        normalize=None if constants is None else mean_and_std(constants),
        mask=mask,
        mask_token=mask_token,
        visible=visible,
    )
    out_dtype = out_dtype or promoted_dtype(weight, pos_embed, prefix_tokens, mask_token)
    return tokens.to(out_dtype, copy=True, memory_format=torch.contiguous_format)


def _reference_backward(dout, images, weight, needs_dimages, needs_dweight, constants=None, mask=None, visible=None):
    outputs = empty_gradients(dout, images, weight, needs_dimages, needs_dweight)
    N = patches(images, *weight.shape[2:]) if visible is None else visible.shape[1]
    dtokens = dout[:, dout.shape[1] - N :].to(weight.dtype)
    mask_token = None if mask is None else weight.new_zeros(weight.shape[0])
    embed = functools.partial(reference.patch_embed, mask=mask, mask_token=mask_token, visible=visible)
    if constants is None:
        images = images.to(weight.dtype)
    else:
        embed = functools.partial(embed, normalize=mean_and_std(constants))
    grads = reference_gradients(embed, (images, weight), (dtokens,), (needs_dimages, needs_dweight))
    return tuple(output.copy_(grad) for output, grad in zip(outputs, grads, strict=True))


_patch_embed_fwd = register(
    "patch_embed_fwd(Tensor images, Tensor weight, Tensor? bias, Tensor? pos_embed, Tensor? prefix_tokens, "
    "bool pos_embed_prefix, float[]? constants=None, ScalarType? out_dtype=None, Tensor? mask=None, "
    "Tensor? mask_token=None, Tensor? visible=None) -> Tensor",
    launcher=patch_embed_forward,
    reference=_reference_forward,
    fake=empty_tokens,
    work="linear",
)
_patch_embed_bwd = register(
    "patch_embed_bwd(Tensor dout, Tensor images, Tensor weight, bool needs_dimages, bool needs_dweight, "
    "float[]? constants=None, Tensor? mask=None, Tensor? visible=None) -> (Tensor, Tensor)",
    launcher=patch_embed_backward,
    reference=_reference_backward,
    fake=empty_gradients,
)


class PatchEmbedFunction(torch.autograd.Function):
    """Autograd for :func:`patch_embed`; ``dtype`` is that of the products."""

    @staticmethod
    def forward(
        ctx,
        images,
        weight,
        bias,
        pos_embed,
        prefix_tokens,
        mask_token,
        pos_embed_prefix,
        dtype,
        constants,
        mask,
        visible,
    ):
        # Cast here, so that autocast's gradient of an fp32 weight is never rounded to a half dtype.
        parameters = (weight, bias, pos_embed, prefix_tokens, mask_token)
        ctx.parameters = [None if p is None else (p.shape, p.dtype) for p in parameters]
        ctx.unsaved = (weight,)
        weight, bias = cast(dtype, weight, bias)
        ctx.emulated = runtime.emulated_arch()
        read = (images, weight) if any(ctx.needs_input_grad[:2]) else (None, None)
        ctx.save_for_backward(*read, mask, visible)
        ctx.pos_embed_prefix = pos_embed_prefix
        ctx.patches = patches(images, *weight.shape[2:])
        ctx.constants = constants
        more = (None, mask, mask_token, visible)
        return _patch_embed_fwd(images, weight, bias, pos_embed, prefix_tokens, pos_embed_prefix, constants, *more)

    @staticmethod
    @once_differentiable
    def backward(ctx, saved, dout):
        images, weight, mask, visible = saved
        needs_images, needs_weight, *needs_sums = ctx.needs_input_grad[:6]
        prefix = ctx.parameters[3]
        dimages = dweight = dbias = dpos = dprefix = dmask_token = None
        if needs_images or needs_weight:
            more = (ctx.constants, mask, visible)
            dimages, dweight = _patch_embed_bwd(dout, images, weight, needs_images, needs_weight, *more)
        if any(needs_sums):
            R, wide = 0 if prefix is None else prefix[0][-2], wide_dtype(dout.dtype)
            if mask is not None:
                hidden, dtokens = mask.unsqueeze(-1), dout[:, R:]
                dmask_token = dtokens.where(hidden, 0.0).sum((0, 1), dtype=wide)
                dbias = dtokens.where(~hidden, 0.0).sum((0, 1), dtype=wide)
            if visible is not None:
                dbias = dout[:, R:].sum((0, 1), dtype=wide)
                dout = _at_patches(dout, R, visible, ctx.patches) if needs_sums[1] else dout
            dout = dout.sum(0, dtype=wide)
            if dbias is None:
                dbias = dout[R:].sum(0)
            dpos = dout if ctx.pos_embed_prefix else dout[R:]
            # Two gradients must not share memory: scaling one in place would also scale the other.
            dprefix = dout[:R].clone()
        grads = [
            g.reshape(p[0]).to(p[1]) if n else None
            for g, p, n in zip(
                (dweight, dbias, dpos, dprefix, dmask_token), ctx.parameters, (needs_weight, *needs_sums), strict=True
            )
        ]
        return dimages if needs_images else None, *grads, *[None] * 5


def _at_patches(dout: Tensor, R: int, visible: Tensor, N: int) -> Tensor:
    """Return dout (B, R + N, C) with the gradients of visible patches in their places; an index_add would be atomic."""
    B, _, C = dout.shape
    at_patches = dout.new_zeros(B, R + N, C)
    at_patches[:, :R] = dout[:, :R]
    at_patches[:, R:].scatter_(1, visible.long().unsqueeze(-1).expand(-1, -1, C), dout[:, R:])
    return at_patches


def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    pos_embed: Tensor | None = None,
    prefix_tokens: Tensor | None = None,
    pos_embed_prefix: bool = True,
    normalize: tuple[Sequence[float], Sequence[float]] | None = None,
    mask: Tensor | None = None,
    mask_token: Tensor | None = None,
    visible: Tensor | None = None,
) -> Tensor:
    """Cut images into patches and project each to a token: ``tokens = conv2d(images, weight, bias, stride=patch)``.

    Args:
        images: (B, I, Y, X), fp16, bf16, fp32 or fp64, any strides (also channels_last); B may be 0, and the patch
            divides Y and X. They are normalised as the model expects, or by ``normalize``, which also allows uint8.
        weight: (C, I, PY, PX), as in Conv2d, in the images' dtype; with ``normalize`` any floating dtype.
        bias: (C,), the weight's dtype, or None for zeros.
        pos_embed: Added to the tokens, (1, R + N, C) or (R + N, C), the weight's dtype, where N = Y/PY · X/PX; with
            ``pos_embed_prefix=False`` (1, N, C) or (N, C), added only to the patches. None for zeros.
        prefix_tokens: Class and register tokens, (1, R, C) or (R, C), the weight's dtype; they precede the patches.
        pos_embed_prefix: Whether ``pos_embed`` covers the prefix tokens too.
        normalize: ``(mean, std)``, one number per channel, std > 0. uint8 pixels (0..255) become
            ``(images / 255 − mean) / std``, floating-point pixels (0..1) ``(images − mean) / std``, as with
            torchvision's ToTensor and Normalize; computed in fp32 (fp64 for an fp64 weight), then rounded to the
            product's dtype. None: pixels are used unchanged.
        mask: (B, N), bool: where it is true, ``mask_token`` takes the place of a patch's projection and bias, before
            the position is added, as BEiT trains; the patch's pixels are not read. None masks nothing.
        mask_token: (C,), (1, C) or (1, 1, C), the weight's dtype; given with ``mask`` alone.
        visible: (B, V), int64 or int32, from 0 to N − 1, distinct in an image: these patches alone become tokens, in
            this order, each with its own position, as MAE trains; not with ``mask``. A kernel gives NaN for an index
            that is out of range; the gradient of the images counts only one of equal indices. None: all patches.

    Returns:
        (B, R + N, C), with ``visible`` (B, R + V, C), contiguous, in the weight's dtype; patches in row-major order.
        Under autocast the product runs in autocast's dtype, and the result has the widest dtype of that, ``pos_embed``,
        ``prefix_tokens`` and ``mask_token``.

    Raises:
        ValueError: A shape or device does not fit, a patch does not divide the images, or ``normalize`` is not two
            sequences with one finite number per channel, the second positive.
        TypeError: A dtype does not fit (uint8 images need ``normalize``), or ``normalize`` does not hold numbers.
        NotImplementedError: A tensor is nested, sparse or quantized.

    Reference: arXiv 2010.11929 (ViT), 2309.16588 (register tokens), 2106.08254 (BEiT), 2111.06377 (MAE).
    """
    constants = _check_images(images, normalize)
    dtype = _check(images, weight, bias, pos_embed, prefix_tokens, mask_token, pos_embed_prefix, constants is not None)
    _check_choice(images, weight, mask, mask_token, visible)
    if not uses_kernels(images):
        return reference.patch_embed(
            images,
            weight,
            bias,
            pos_embed=pos_embed,
            prefix_tokens=prefix_tokens,
            pos_embed_prefix=pos_embed_prefix,
            normalize=None if constants is None else mean_and_std(constants),
            mask=mask,
            mask_token=mask_token,
            visible=visible,
        ).contiguous()
    if needs_grad(images, weight, bias, pos_embed, prefix_tokens, mask_token):
        more = (pos_embed_prefix, dtype, constants, mask, visible)
        return PatchEmbedFunction.apply(images, weight, bias, pos_embed, prefix_tokens, mask_token, *more)
    weight, bias = cast(dtype, weight, bias)
    more = (pos_embed_prefix, constants, None, mask, mask_token, visible)
    return _patch_embed_fwd(images, weight, bias, pos_embed, prefix_tokens, *more)


def _check_images(images: Tensor, normalize: tuple[Sequence[float], Sequence[float]] | None) -> Constants | None:
    """Check the images and ``normalize``; return the means and standard deviations."""
    op = "patch_embed"
    if normalize is None:
        hint = "; convert to floating point, or normalise first"
        if getattr(images, "dtype", None) == torch.uint8:
            hint = "; give normalize=(mean, std), or normalise first"
        check_tensor(op, "images", images, hint=hint)
    else:
        check_tensor(op, "images", images, dtypes=(torch.uint8, *FLOATING))
    if images.ndim != 4:
        raise ValueError(f"{op}: images have shape {tuple(images.shape)}; expected (batch, channels, height, width)")
    if normalize is None:
        return None
    return _constants(normalize, images.shape[1])


def _constants(normalize: tuple[Sequence[float], Sequence[float]], channels: int) -> Constants:
    """Check ``normalize``; return the means of all channels, followed by their standard deviations."""
    op = "patch_embed"
    try:
        mean, std = (tuple(map(float, values)) for values in normalize)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{op}: normalize is {normalize!r}; expected two sequences of numbers, (mean, std)") from error
    if len(mean) != channels or len(std) != channels:
        raise ValueError(
            f"{op}: normalize has {len(mean)} means and {len(std)} standard deviations; expected {channels} of each, "
            "one a channel of the images"
        )
    if not all(map(math.isfinite, mean + std)) or min(std, default=1.0) <= 0.0:
        raise ValueError(f"{op}: normalize is {normalize!r}; expected finite numbers, and standard deviations above 0")
    return mean + std


def _check(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    prefix_tokens: Tensor | None,
    mask_token: Tensor | None,
    pos_embed_prefix: bool,
    normalized: bool,
) -> torch.dtype:
    """Check all inputs; return the dtype of the products."""
    op = "patch_embed"
    check_like(op, "weight", weight, "images", images, dtype=False)
    shape = weight.shape
    if len(shape) != 4 or 0 in shape:
        raise ValueError(
            f"{op}: weight has shape {tuple(shape)}; expected a Conv2d's (out channels, in channels, "
            "patch height, patch width), none of them 0"
        )
    C, channels, PY, PX = shape
    _, images_channels, Y, X = images.shape
    if images_channels != channels:
        raise ValueError(f"{op}: images have {images_channels} channels; expected {channels}, the weight's")
    if Y < PY or X < PX or Y % PY or X % PX:
        raise ValueError(
            f"{op}: images of {Y}×{X} pixels do not divide into patches of {PY}×{PX}; expected a positive multiple: "
            "crop or resize them"
        )
    N = (Y // PY) * (X // PX)
    autocast = runtime.autocast_dtype(weight)
    dtype = _product_dtype(weight, autocast)
    if not normalized and _product_dtype(images, autocast) != dtype:
        raise TypeError(f"{op}: images have dtype {images.dtype}, weight has {weight.dtype}; expected the same dtype")
    matched = dtypes_and_devices_match(weight, bias, prefix_tokens, pos_embed, mask_token)
    if bias is not None:
        if not matched:
            check_like(op, "bias", bias, "weight", weight, dtype=False)
            if _product_dtype(bias, autocast) != dtype:
                raise TypeError(
                    f"{op}: bias has dtype {bias.dtype}, weight has {weight.dtype}; expected the same dtype"
                )
        check_shape(op, "bias", bias, (C,), "one number a channel of the weight")

    if mask_token is not None:
        if not matched:
            check_like(op, "mask_token", mask_token, "weight", weight, dtype=autocast is None)
        if mask_token.shape not in ((C,), (1, C), (1, 1, C)):
            raise ValueError(f"{op}: mask_token has shape {tuple(mask_token.shape)}; expected ({C},), the channels")
    R = 0
    if prefix_tokens is not None:
        if not matched:
            check_like(op, "prefix_tokens", prefix_tokens, "weight", weight, dtype=autocast is None)
        R = _check_tokens(op, "prefix_tokens", prefix_tokens, C)
    if pos_embed is not None:
        if not matched:
            check_like(op, "pos_embed", pos_embed, "weight", weight, dtype=autocast is None)
        wanted = R + N if pos_embed_prefix else N
        if _check_tokens(op, "pos_embed", pos_embed, C) != wanted:
            why = f"{R} prefix tokens and {N} patches" if pos_embed_prefix else f"{N} patches, without prefix tokens"
            raise ValueError(f"{op}: pos_embed has shape {tuple(pos_embed.shape)}; expected (1, {wanted}, {C}), {why}")
    return dtype


def _check_choice(
    images: Tensor, weight: Tensor, mask: Tensor | None, mask_token: Tensor | None, visible: Tensor | None
) -> None:
    """Check what says which patches have pixels; ``images`` and ``weight`` are checked already."""
    op, given = "patch_embed", (images.shape[0], patches(images, *weight.shape[2:]))
    if (mask is None) != (mask_token is None):
        raise ValueError(f"{op}: {'mask_token' if mask is None else 'mask'} is given alone; expected both, or neither")
    if mask is not None and visible is not None:
        raise ValueError(f"{op}: mask and visible are given; expected one of them")
    if mask is not None:
        check_tensor(op, "mask", mask, dtypes=(torch.bool,))
        check_shape(op, "mask", mask, given, "images and patches")
    if visible is not None:
        check_tensor(op, "visible", visible, dtypes=(torch.int64, torch.int32))
        if visible.ndim != 2 or visible.shape[0] != given[0] or visible.shape[1] > given[1]:
            raise ValueError(
                f"{op}: visible has shape {tuple(visible.shape)}; expected ({given[0]}, patches), {given[1]} at most"
            )
    for name, tensor in (("mask", mask), ("visible", visible)):
        if tensor is not None and tensor.device != images.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}; expected {images.device}, where the images are")


def _product_dtype(x: Tensor, autocast: torch.dtype | None) -> torch.dtype:
    # Autocast leaves fp64 alone.
    return x.dtype if autocast is None or x.dtype == torch.float64 else autocast


def _check_tokens(op: str, name: str, tokens: Tensor, C: int) -> int:
    """Check the shape of tokens; return their number."""
    shape = tokens.shape
    if len(shape) not in (2, 3) or shape[-1] != C or (len(shape) == 3 and shape[0] != 1):
        raise ValueError(
            f"{op}: {name} has shape {tuple(shape)}; expected (1, tokens, {C}) or (tokens, {C}), "
            f"with the weight's {C} channels"
        )
    return shape[-2]
