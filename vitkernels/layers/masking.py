"""Which patches masked image modelling hides: BEiT's blocks, and MAE's random patches."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class RandomMask(NamedTuple):
    """What :func:`random_mask` draws.

    Attributes:
        visible: (B, V), int64: the patches that stay, in the order in which they were drawn.
        mask: (B, N), bool: whether a patch is hidden.
        restore: (B, N), int64: where each patch lies in the visible ones followed by the hidden ones. Gathering by it
            puts the encoder's tokens and mask tokens behind them in the order of the image, for MAE's decoder.
    """

    visible: Tensor
    mask: Tensor
    restore: Tensor


def random_mask(
    batch: int,
    num_patches: int,
    mask_ratio: float = 0.75,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> RandomMask:
    """Hide a random share of each image's patches, as MAE trains (arXiv 2111.06377).

    Args:
        batch: Number of images B.
        num_patches: Patches N of an image.
        mask_ratio: Share of patches to hide, from 0 to below 1; ``int(N · (1 − mask_ratio))`` stay, one at least.
        generator: Where the numbers are drawn from, on ``device``; None for PyTorch's own.
        device: Device of the result.

    Raises:
        ValueError: The share is not in [0, 1), or there is no patch.
    """
    if not 0.0 <= mask_ratio < 1.0:
        raise ValueError(f"mask_ratio is {mask_ratio}; expected a share in [0, 1)")
    if num_patches < 1:
        raise ValueError(f"num_patches is {num_patches}; expected 1 at least")
    order = torch.rand(batch, num_patches, generator=generator, device=device).argsort(dim=1)
    restore = order.argsort(dim=1)
    kept = max(1, int(num_patches * (1 - mask_ratio)))
    return RandomMask(order[:, :kept], restore >= kept, restore)


def blockwise_mask(
    batch: int,
    grid_size: tuple[int, int],
    num_masked: int,
    *,
    min_block: int = 16,
    max_block: int | None = None,
    min_aspect: float = 0.3,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Hide patches in rectangles, as BEiT trains (arXiv 2106.08254, Algorithm 1).

    Rectangles are laid over one another until ``num_masked`` patches are hidden, or in ten tries none was found that
    hides some more and no more than that. That is the algorithm of BEiT's published code; the paper's ends with the
    first rectangle that hides too many.

    Args:
        batch: Number of images B.
        grid_size: Rows and columns of patches.
        num_masked: Patches to hide in each image at most; BEiT hides 75 of 14 · 14.
        min_block: Patches of the smallest rectangle; smaller ones fill what is left.
        max_block: Patches of the largest rectangle; ``num_masked`` unless given.
        min_aspect: Least aspect ratio; the largest is its reciprocal.
        generator: Where the numbers are drawn from, on the CPU; None for PyTorch's own.
        device: Device of the result.

    Returns:
        (B, rows · columns), bool: whether a patch is hidden.

    Raises:
        ValueError: A number does not fit the grid, or the aspect ratio is not in (0, 1].
    """
    rows, columns = grid_size
    if not 0 <= num_masked <= rows * columns:
        raise ValueError(f"num_masked is {num_masked}; expected 0 to {rows} · {columns}, the grid")
    max_block = num_masked if max_block is None else max_block
    if min_block < 1 or max_block < 0:
        raise ValueError(f"min_block is {min_block}, max_block {max_block}; expected 1 and 0 at least")
    if not 0.0 < min_aspect <= 1.0:
        raise ValueError(f"min_aspect is {min_aspect}; expected a ratio in (0, 1]")
    masks = torch.zeros(batch, rows, columns, dtype=torch.bool)
    for mask in masks:
        left = num_masked
        while left > 0:
            hidden = _add_rectangle(mask, min_block, min(left, max_block), math.log(min_aspect), generator)
            if not hidden:
                break
            left -= hidden
    return masks.flatten(1).to(device)


def _add_rectangle(
    mask: Tensor, min_block: int, max_block: int, log_aspect: float, generator: torch.Generator | None
) -> int:
    """Hide a random rectangle of ``mask`` (rows, columns) in place; return by how many patches it hides more."""
    rows, columns = mask.shape
    for area, shape, y, x in torch.rand(10, 4, generator=generator, dtype=torch.float64).tolist():
        patches = min_block + (max_block - min_block) * area
        aspect = math.exp(log_aspect * (1 - 2 * shape))
        height, width = round(math.sqrt(patches * aspect)), round(math.sqrt(patches / aspect))
        if height >= rows or width >= columns:
            continue
        top, left = int(y * (rows - height + 1)), int(x * (columns - width + 1))
        rectangle = mask[top : top + height, left : left + width]
        more = height * width - int(rectangle.sum())
        if 0 < more <= max_block:
            rectangle.fill_(True)
            return more
    return 0
