"""Launch configurations of the window attention kernels."""

from __future__ import annotations

import dataclasses

import torch

from vitkernels import runtime
from vitkernels.ops._attention.config import head_parts
from vitkernels.runtime import DeviceFacts

WINDOW = 64  # tokens that one tile holds


@dataclasses.dataclass(frozen=True)
class Tiling:
    """One kernel's queries and keys per tile, warps and stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int = 1


@dataclasses.dataclass(frozen=True)
class WindowConfig:
    """The tilings of the forward, of the backward of windows that fit into one tile (else None), and of its kernels
    over blocks of a window."""

    forward: Tiling
    whole: Tiling | None
    dq: Tiling
    dkv: Tiling
    dtable: Tiling


def choose_config(tokens: int, D: int, dtype: torch.dtype, facts: DeviceFacts) -> WindowConfig:
    """Choose the tilings for windows of ``tokens`` tokens and heads of ``D`` channels."""
    width = sum(head_parts(D))
    if dtype.itemsize > 2:  # without tensor cores, products hold whole tiles in registers
        tile = Tiling(16, 16, 4) if dtype.itemsize == 8 else Tiling(32, 32, 8 if width > 32 else 4)
        return WindowConfig(tile, None, tile, tile, tile)
    block = max(16, runtime.next_power_of_2(min(tokens, WINDOW)))
    short = facts.arch.startswith(("sm_8", "sm_12"))  # mma.sync keeps operands in registers
    if tokens <= WINDOW:
        whole = Tiling(block, block, 8) if width <= 64 and not (short and width > 32) else None
        forward = Tiling(block, block, 4)
    else:
        whole = None
        # Of blocks of 64 and 32 keys, those that cover the window with less padding.
        keys = 64 if runtime.cdiv(tokens, 64) * 2 <= runtime.cdiv(tokens, 32) else 32
        forward = Tiling(64, 32 if short and width > 64 else keys, 4 if width <= 64 else 8)
    narrow = 32 if short or width > 64 else 64
    return WindowConfig(
        forward,
        whole,
        dq=Tiling(block, min(block, narrow), 4),
        dkv=Tiling(min(block, narrow), block, 4),
        dtable=Tiling(block, min(block, narrow), 4),
    )
