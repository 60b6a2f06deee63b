"""Launch configurations of the decomposed attention kernels."""

from __future__ import annotations

import dataclasses

import torch

from vitkernels import runtime
from vitkernels.ops._attention.config import head_parts
from vitkernels.ops._window_attention.config import Tiling
from vitkernels.runtime import DeviceFacts

NARROWEST = 8  # columns of a window in a tile of keys


@dataclasses.dataclass(frozen=True)
class DecomposedConfig:
    """The tilings of the kernels.

    Attributes:
        forward, dq, dkv: Queries and keys of a tile.
        positions: Tokens and offsets of a tile of the products with the tables.
    """

    forward: Tiling
    dq: Tiling
    dkv: Tiling
    positions: Tiling


def choose_config(D: int, dtype: torch.dtype, facts: DeviceFacts, *, dropout: bool = False) -> DecomposedConfig:
    """Choose the tilings: of those tried, the largest without spills on any architecture.

    Args:
        D: Head dim.
        dtype: Dtype of the operands.
        facts: Facts of the device.
        dropout: Whether weights are dropped.
    """
    if dtype.itemsize > 2:
        tile = Tiling(16, 16, 8, 255 if facts.arch.startswith("sm_") else None)
        return DecomposedConfig(tile, tile, tile, tile)
    width = sum(head_parts(D))
    amd, wide = facts.arch.startswith("gfx"), width > 64
    warps = 8 if wide else 4
    # mma.sync keeps operands in registers, as do the numbers of a dropout.
    if facts.arch.startswith(("sm_8", "sm_12")) or dropout or width > 96:
        limit = None if amd else 255
        return DecomposedConfig(
            forward=Tiling(64, 32, warps, limit),
            dq=Tiling(64, 32, warps if amd else 8),
            dkv=Tiling(32, 32, warps, limit),
            positions=Tiling(32, 32, warps),
        )
    if amd and wide:
        return DecomposedConfig(Tiling(64, 64, 8), Tiling(64, 32, 4), Tiling(32, 64, 4), Tiling(64, 32, 4))
    tile = Tiling(64, 64, warps)
    # Twice the queries read half as many keys and values.
    forward = Tiling(128, 64, 8) if not (amd or wide) else tile
    return DecomposedConfig(forward, Tiling(64, 32 if wide else 64, warps), tile, Tiling(64, 32, warps))


def tile_width(columns: int, block_n: int) -> int:
    """Return the columns of a window in a tile of ``block_n`` keys: a power of two, of which whole tiles cover all
    columns with the least padding."""
    largest = min(block_n, runtime.next_power_of_2(columns))
    widths = [largest >> i for i in range(largest.bit_length()) if largest >> i >= min(NARROWEST, largest)]
    return min(widths, key=lambda width: (runtime.cdiv(columns, width) * width, -width))
