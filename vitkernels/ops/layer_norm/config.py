"""Launch configurations of LayerNorm and RMSNorm."""

from __future__ import annotations

import dataclasses

from vitkernels import runtime, tuning
from vitkernels.runtime import DeviceFacts, cdiv

MAX_WHOLE_ROW = 8192  # most channels that a program holds at once; wider rows are read in chunks, several times


@dataclasses.dataclass(frozen=True)
class LayerNormConfig:
    """Rows per tile, channels per chunk, warps per program, and programs per launch of the backward."""

    block_m: int
    block_c: int
    num_warps: int
    programs: int


def choose_config(M: int, C: int, facts: DeviceFacts) -> LayerNormConfig:
    """Choose a configuration for M rows of C channels: a heuristic, overridden by the tuning table."""
    block_c = min(runtime.next_power_of_2(C), MAX_WHOLE_ROW)
    block_m = max(1, min(8, 1024 // block_c))
    config = {
        "block_m": block_m,
        "block_c": block_c,
        "num_warps": max(1, min(16, block_m * block_c // 256)),
        "programs": 2 * facts.num_sms,
    }
    config |= tuning.lookup("layer_norm", facts.name, f"C={C}") or {}
    return LayerNormConfig(**{**config, "programs": max(1, min(config["programs"], cdiv(M, config["block_m"])))})
