"""Launch configurations of the decomposed attention kernels."""

from __future__ import annotations

import dataclasses

import torch

from vitkernels import runtime
from vitkernels.ops._attention.config import head_parts
from vitkernels.ops._window_attention.config import Tiling
from vitkernels.runtime import DeviceFacts

NARROWEST, WIDEST = 8, 64  # columns of a window in one tile of keys


@dataclasses.dataclass(frozen=True)
class DecomposedConfig:
    """The tilings of the kernels.

    Attributes:
        forward, dq, dkv: Queries and keys of a tile.
        positions: Tokens and offsets of a tile of the products with the tables.
        width: Columns of a window in a tile of keys, which has ``block_n / width`` of its rows.
    """

    forward: Tiling
    dq: Tiling
    dkv: Tiling
    positions: Tiling
    width: int


def choose_config(columns: int, D: int, dtype: torch.dtype, facts: DeviceFacts) -> DecomposedConfig:
    """Choose the tilings: of those tried, the largest without spills on any architecture.

    Args:
        columns: Columns of a window.
        D: Head dim.
        dtype: Dtype of the operands.
        facts: Facts of the device.
    """
    if dtype.itemsize > 2:
        tile = Tiling(16, 16, 4)
        return DecomposedConfig(tile, tile, tile, tile, tile_width(columns, 16))
    warps = 8 if sum(head_parts(D)) > 64 else 4
    tile = Tiling(64, 64, warps)
    return DecomposedConfig(tile, tile, tile, Tiling(64, 32, 4), tile_width(columns, WIDEST))


def tile_width(columns: int, block_n: int) -> int:
    """Return the power of two, at most ``block_n``, whose multiple covers the columns with the least padding."""
    largest = min(block_n, runtime.next_power_of_2(columns))
    widths = [largest >> i for i in range(largest.bit_length()) if largest >> i >= min(NARROWEST, largest)]
    return min(widths, key=lambda width: (runtime.cdiv(columns, width) * width, -width))
