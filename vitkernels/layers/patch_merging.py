"""Patch merging, which halves an image between two stages of Swin."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from vitkernels.layers.layer_norm import LayerNorm
from vitkernels.layers.linear import Linear


class PatchMerging(nn.Module):
    """Join 2 × 2 neighbours and project them: (B, Y, X, C) to (B, ⌈Y/2⌉, ⌈X/2⌉, C′) (arXiv 2103.14030).

    An odd image gets a row or column of zeros.

    Args:
        dim: Channels C of the input.
        out_dim: Channels C′ of the output; ``2 · dim`` unless given.
        norm_layer: Callable that makes a LayerNorm from its channels, ``device`` and ``dtype``.
        post_norm: Whether the norm comes after the projection, as in Swin V2 (arXiv 2111.09883), not before it.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int | None = None,
        norm_layer: Callable[..., nn.Module] = LayerNorm,
        *,
        post_norm: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        out_dim = out_dim or 2 * dim
        self.post_norm = post_norm
        if not post_norm:
            self.norm = norm_layer(4 * dim, **dd)
        self.reduction = Linear(4 * dim, out_dim, bias=False, **dd)
        if post_norm:
            self.norm = norm_layer(out_dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        Y, X = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, X % 2, 0, Y % 2))
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 1, 3, 4, 2, 5).flatten(3)
        return self.norm(self.reduction(x)) if self.post_norm else self.reduction(self.norm(x))
