"""Swin's patch merging, whose classes have the same children in every library."""

from __future__ import annotations

from torch import Tensor, nn

from vitkernels.layers import fused, records

CHILDREN = {"norm": (nn.LayerNorm,), "reduction": (nn.Linear,)}


def has_patches(merging: nn.Module, x: Tensor) -> bool:
    """Tell whether x are images (B, Y, X, C) of the channels that ``merging`` takes; for others the original raises."""
    return x.ndim == 4 and 0 not in x.shape[1:] and 4 * x.shape[-1] == merging._modules["reduction"].in_features


def merge(merging: nn.Module, x: Tensor, *, norm_last: bool = False) -> Tensor:
    """Merge the patches of images x (B, Y, X, C)."""
    children = merging._modules
    return fused.patch_merging(
        records.norm(children["norm"]), records.linear(children["reduction"]), x, norm_last=norm_last
    )
