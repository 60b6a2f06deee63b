"""Launch configurations of the window attention kernels."""

from __future__ import annotations

import dataclasses

import torch

from vitkernels import runtime
from vitkernels.ops import _triton
from vitkernels.ops._attention.config import head_parts
from vitkernels.runtime import DeviceFacts

WINDOW = 64  # tokens that one tile holds


@dataclasses.dataclass(frozen=True)
class Tiling:
    """One kernel's queries and keys per tile, and warps; with ``maxnreg`` the registers that a thread may take."""

    block_m: int
    block_n: int
    num_warps: int
    maxnreg: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """The options of a launch."""
        limit = {} if self.maxnreg is None else {"maxnreg": self.maxnreg}
        return {"num_warps": self.num_warps, "num_stages": 1, **limit}


@dataclasses.dataclass(frozen=True)
class WindowConfig:
    """The tilings of the forward, of the backward of windows that fit into one tile (else None), and of its kernels
    over blocks of a window.

    ``whole_sums_table``: whether the backward of whole windows also sums the table's gradient."""

    forward: Tiling
    whole: Tiling | None
    dq: Tiling
    dkv: Tiling
    dtable: Tiling
    whole_sums_table: bool = True


def choose_config(
    tokens: int,
    D: int,
    dtype: torch.dtype,
    facts: DeviceFacts,
    *,
    dropout: bool = False,
    cosine: bool = False,
    padded: bool = False,
) -> WindowConfig:
    """Choose the tilings: of those tried, the largest without spills on any architecture.

    Args:
        tokens: Tokens of a window.
        D: Head dim.
        dtype: Dtype of the operands.
        facts: Facts of the device.
        dropout: Whether weights are dropped.
        cosine: Whether queries and keys are divided by their norms.
        padded: Whether windows are padded with a value.
    """
    width = sum(head_parts(D))
    if dtype.itemsize > 2:  # without tensor cores, products hold whole tiles in registers
        # ptxas spills some bytes for one program more on a multiprocessor, unless it is told what a thread may take.
        cuda = facts.arch.startswith("sm_")
        tile = Tiling(16, 16, 4) if dtype.itemsize == 8 else Tiling(16, 16, 8, 255 if cuda else None)
        dtable = dataclasses.replace(tile, maxnreg=None) if width > 96 else tile
        return WindowConfig(tile, None, tile, tile, dtable)
    block = max(16, runtime.next_power_of_2(min(tokens, WINDOW)))
    amd, short = facts.arch.startswith("gfx"), facts.arch.startswith(("sm_8", "sm_12"))
    crowded = short or width > 64 or dropout  # mma.sync keeps operands in registers
    # Of blocks of 64 and 32 keys, those that cover the window with less padding.
    keys = block if tokens <= WINDOW or runtime.cdiv(tokens, 64) * 2 <= runtime.cdiv(tokens, 32) else 32
    if dropout or (short and (width > 64 or tokens > WINDOW)) or (width > 32 and facts.arch.startswith("sm_10")):
        keys = min(keys, 32)
    whole = None
    if tokens <= WINDOW and width <= (32 if short or amd else 64) and not (dropout or (cosine and padded)):
        # Of cosine attention Triton 3.6 spills in four warps.
        spills = _triton.BEFORE_3_7 and cosine and facts.arch.startswith("sm_9")
        whole = Tiling(block, block, 8 if width > 32 or spills else 4)
    narrow = min(block, 32 if crowded else 64)
    eight = 8 if width > 64 else 4
    dkv = Tiling(block, block, 8) if width > 96 and not (short or amd) else Tiling(narrow, block, eight)
    if _triton.BEFORE_3_7 and short and 32 < width <= 64:  # of 64 keys 3.6 spills
        dkv = Tiling(narrow, min(block, 32), eight)
    limit = 255 if short else None
    return WindowConfig(
        Tiling(block, keys, eight, limit),
        whole,
        dq=Tiling(block, min(narrow, 16) if short and dropout else narrow, eight if short else 4),
        dkv=dkv,
        dtable=Tiling(block, min(narrow, 16) if short else narrow, 4, limit),
        whole_sums_table=not short,
    )
