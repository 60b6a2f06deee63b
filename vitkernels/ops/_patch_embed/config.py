"""Launch configurations of the patch embedding's three products."""

from __future__ import annotations

import dataclasses
import math

import torch

from vitkernels import runtime, tuning
from vitkernels.ops import _triton
from vitkernels.runtime import DeviceFacts, cdiv

SUMMED = {"forward": "k", "dimages": "c", "dweight": "m"}  # the axis that each product sums over


@dataclasses.dataclass(frozen=True)
class PatchEmbedConfig:
    """One product's tile along rows, channels and pixels, splits of the sum, warps and pipeline stages."""

    block_m: int
    block_c: int
    block_k: int
    splits: int
    num_warps: int
    num_stages: int


def choose_config(
    product: str,
    M: int,
    C: int,
    K: int,
    dtype: torch.dtype,
    facts: DeviceFacts,
    *,
    image_dtype: torch.dtype | None = None,
    normalized: bool = False,
    masked: bool = False,
) -> PatchEmbedConfig:
    """Choose the configuration of ``"forward"``, ``"dimages"`` or ``"dweight"``: heuristic, then the tuning table.

    ``dtype`` is that of the products; ``image_dtype`` is that of the images in memory, if different (autocast, uint8).
    """
    summed = SUMMED[product]
    wide = product == "dweight" and facts.shared_memory > 128 << 10
    rows, step = {2: (128, 64), 4: (64, 32), 8: (32, 16)}[dtype.itemsize]
    # With 128 columns often only one program fits on an SM. Registers are the limit in the forward (positions and
    # prefix are tiles too) and in dimages (scattered stores); in dweight it is shared memory, if the chip has little.
    columns = rows if wide else min(rows, 64)
    amd = facts.arch.startswith("gfx")
    if normalized and product == "dweight" and dtype == torch.float32:
        columns = 32  # 64 columns of normalised pixels would spill
    sizes = {"m": M, "c": C, "k": K}
    kept = [a for a in sizes if a != summed]
    limits = {summed: step, kept[0]: rows, kept[1]: columns}
    blocks = {a: max(16, min(runtime.next_power_of_2(sizes[a]), limits[a])) for a in sizes}

    def tiles() -> int:
        return math.prod(cdiv(sizes[a], blocks[a]) for a in kept)

    while product != "dweight" and tiles() < facts.num_sms and max(blocks[a] for a in kept) > 32:
        blocks[max(kept, key=blocks.get)] //= 2
    itemsize = max(dtype.itemsize, (image_dtype or dtype).itemsize)

    def stages() -> int:
        return facts.shared_memory // (blocks[summed] * sum(blocks[a] for a in kept) * itemsize)

    while stages() < 2 and blocks[summed] > 16:
        blocks[summed] //= 2
    wanted_stages = 3
    if _triton.BEFORE_3_7 and product == "dimages" and dtype == torch.float32 and facts.arch.startswith("sm_10"):
        wanted_stages = 2  # 12 bytes would spill with three
    elif _triton.BEFORE_3_7 and product == "dweight" and not wide and step == 64 and K % 16 == 0 and not amd:
        blocks["m"] = min(blocks["m"], 32)  # 64 rows would spill 28 bytes; half of them leave room for a third stage
    elif product == "dweight" and not wide:
        # With a third stage the addresses of the narrow tile would spill, with a second those of unaligned patches.
        wanted_stages = 2 if K % 16 == 0 else 1
    elif product == "dweight" and normalized and dtype == torch.float32 and facts.arch.startswith("sm_8"):
        wanted_stages = 2  # normalised pixels would spill with three
    elif _triton.BEFORE_3_7 and masked and product == "forward" and dtype == torch.float32 and not amd:
        # With three 48 bytes would spill beside the indices, on Blackwell 16 with two.
        wanted_stages = 1 if facts.arch.startswith("sm_10") else 2
    elif masked and product == "dweight" and dtype.itemsize == 2 and facts.arch.startswith("sm_8"):
        wanted_stages = 2  # 16 bytes would spill with three, beside the mask
    config = {f"block_{a}": block for a, block in blocks.items()}
    config |= {
        # Splits fill the chip twice; each sums at least four steps, since it also stores a tile.
        "splits": max(1, min(2 * facts.num_sms // tiles(), M // (4 * blocks["m"]))) if product == "dweight" else 1,
        "num_warps": 8 if math.prod(blocks[a] for a in kept) > 64 * 64 else 4,
        "num_stages": max(1, min(wanted_stages, stages())),
    }
    return PatchEmbedConfig(**config | (tuning.lookup("patch_embed", facts.name, f"{product} C={C} K={K}") or {}))
