"""Launch configurations of LayerNorm and RMSNorm."""

from __future__ import annotations

import dataclasses

import torch

from vitkernels import runtime, tuning
from vitkernels.runtime import DeviceFacts, cdiv

MAX_WHOLE_ROW = 8192  # most channels that a program holds at once; wider rows are read in chunks, several times


@dataclasses.dataclass(frozen=True)
class LayerNormConfig:
    """Rows per tile, channels per chunk, and warps per program of the forward."""

    block_m: int
    block_c: int
    num_warps: int


@dataclasses.dataclass(frozen=True)
class LayerNormBackwardConfig:
    """Rows per tile, channels per chunk, warps per program, and programs per launch of the backward."""

    block_m: int
    block_c: int
    num_warps: int
    programs: int


def choose_config(M: int, C: int, facts: DeviceFacts) -> LayerNormConfig:
    """Choose a configuration for M rows of C channels: a heuristic, overridden by the tuning table."""
    block_c = min(runtime.next_power_of_2(C), MAX_WHOLE_ROW)
    block_m = max(1, min(8, 1024 // block_c))
    config = {"block_m": block_m, "block_c": block_c, "num_warps": max(1, min(16, block_m * block_c // 256))}
    config |= tuning.lookup("layer_norm", facts.name, f"C={C}") or {}
    return LayerNormConfig(**config)


def choose_backward_config(
    M: int, C: int, facts: DeviceFacts, dtype: torch.dtype, sums: int = 2
) -> LayerNormBackwardConfig:
    """Choose the backward's configuration: a heuristic, overridden by the tuning table.

    A row takes 256 channels of a warp, 16 bytes of bf16 a lane, and all rows of a tile lie in the same lanes: sums over
    rows then need no other lane, and the barriers of the sums over channels serve all rows. A tile has as many rows as
    registers allow beside ``sums`` sums over rows, and a multiprocessor 12 warps or more, which read enough bytes at a
    time.
    """
    block_c = min(runtime.next_power_of_2(C), MAX_WHOLE_ROW)
    num_warps = max(1, min(16, block_c // 256))
    halved = sums > 2 or num_warps >= 8
    block_m = max(1, 8 // dtype.itemsize // (4 if block_c == MAX_WHOLE_ROW else 2 if halved else 1))
    config = {
        "block_m": block_m,
        "block_c": block_c,
        "num_warps": num_warps,
        "programs": cdiv(12, num_warps) * facts.num_sms,
    }
    config |= tuning.lookup("layer_norm_backward", facts.name, f"C={C},{dtype},sums={sums}") or {}
    return LayerNormBackwardConfig(
        **{**config, "programs": max(1, min(config["programs"], cdiv(M, config["block_m"])))}
    )
