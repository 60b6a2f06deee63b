"""The Transformer of a MobileViT block (arXiv 2110.02178) on an image that is neither unfolded nor folded. No rules.

A token attends to those at its place in every other patch, so that the image is a grid of windows, as in MaxViT, and
everything else in the Transformer takes each token by itself.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch.nn.functional as F
from torch import Tensor, nn

from vitkernels.layers import fused, records
from vitkernels.layers.windows import within
from vitkernels.swap._images import channels_first, tokens_of_channels_first


def between_patches(blocks: Iterable[records.Block], norm: nn.Module, x: Tensor, patch: tuple[int, int]) -> Tensor:
    """Run ``blocks``, then ``norm``, on x (B, C, Y, X), resized to whole patches and back as the original does it."""
    size = tuple(x.shape[2:])
    counts = tuple(-(-n // p) for n, p in zip(size, patch, strict=True))
    image = tuple(n * p for n, p in zip(counts, patch, strict=True))
    if image != size:
        x = F.interpolate(x, size=image, mode="bilinear", align_corners=False)
    tokens, windows = tokens_of_channels_first(x), records.Windows(image, counts, grid=True)
    for block in blocks:
        tokens = fused.block(within(block, windows), tokens)
    x = channels_first(norm(tokens), image)
    return x if image == size else F.interpolate(x, size=size, mode="bilinear", align_corners=False)
