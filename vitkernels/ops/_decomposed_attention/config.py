"""Launch configurations of the decomposed attention kernels."""

from __future__ import annotations

import dataclasses
import functools

import torch

from vitkernels import runtime
from vitkernels.ops._attention.config import head_parts
from vitkernels.ops._window_attention.config import Tiling
from vitkernels.runtime import DeviceFacts

NARROWEST = 16  # columns of a window in a tile of keys, if it has so many; ``tiles.sixteen`` relies on it


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


def choose_config(
    columns: int, D: int, dtype: torch.dtype, facts: DeviceFacts, *, dropout: bool = False
) -> DecomposedConfig:
    """Choose the tilings: of those tried, the largest without spills on any architecture.

    Args:
        columns: Columns of a window.
        D: Head dim.
        dtype: Dtype of the operands.
        facts: Facts of the device.
        dropout: Whether weights are dropped.
    """
    width, amd = sum(head_parts(D)), facts.arch.startswith("gfx")
    # Else ptxas spills some bytes for one program more on a multiprocessor.
    tiling = functools.partial(Tiling, maxnreg=None if amd else 255)
    if dtype.itemsize > 2:
        tile = tiling(16, 16, 8)
        return DecomposedConfig(tile, tile, tile, tile)
    warps = 8 if width > 64 and not amd else 4
    apart = tile_width(columns, 64) < columns  # a row of a window takes several tiles, and so several sums
    # mma.sync keeps operands in registers, as do the numbers of a dropout.
    if facts.arch.startswith(("sm_8", "sm_12")) or dropout or width > 96:
        queries = 32 if width > 96 or (width > 64 and (amd or dropout)) else 64
        return DecomposedConfig(
            forward=tiling(queries, 32, warps),
            dq=tiling(queries, 32, warps if amd else 8),
            dkv=tiling(32, 32, warps),
            positions=tiling(32, 32, warps),
        )
    if amd and width > 64:
        return DecomposedConfig(tiling(64, 64, 8), tiling(64, 32, 4), tiling(32, 64, 4), tiling(64, 32, 4))
    tile = tiling(64, 64, warps)
    return DecomposedConfig(
        forward=tile if amd or width > 64 else tiling(128, 64, 8),  # twice the queries read half as many keys, values
        dq=tiling(64, 32 if width > 64 or apart else 64, warps),
        dkv=tile,
        positions=tiling(32, 32, warps) if apart else tiling(64, 32, warps),
    )


def tile_width(columns: int, block_n: int) -> int:
    """Return the columns of a window in a tile of ``block_n`` keys: a power of two, of which whole tiles cover all
    columns with the least padding."""
    largest = min(block_n, runtime.next_power_of_2(columns))
    widths = [largest >> i for i in range(largest.bit_length()) if largest >> i >= min(NARROWEST, largest)]
    return min(widths, key=lambda width: (runtime.cdiv(columns, width) * width, -width))
