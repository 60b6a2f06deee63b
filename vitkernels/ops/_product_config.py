"""Who computes a product, and in which tiles."""

from __future__ import annotations

import dataclasses

import torch

from vitkernels import tuning
from vitkernels.runtime import DeviceFacts, cdiv, next_power_of_2

# Configurations of the kernels for Hopper, by block_n.
HOPPER = {
    block_n: {
        "provider": "gluon", "block_m": 128, "block_n": block_n, "block_k": 64, "num_warps": 4, "num_stages": 4,
        "parts": block_n // 32,
    }
    for block_n in (128, 256)
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ProductConfig:
    """The provider (``triton``, ``gluon`` or ``torch``), and the kernel's tile sizes, warps and pipeline stages.

    With ``gluon``, ``block_n`` is 128 or 256, ``num_warps`` is 4 for each of two consumers, and fewer stages are used
    if more do not fit.

    ``parts``: Number of column ranges of a tile that the epilogue processes in turn; a power of two.
    """

    provider: str
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    parts: int = 1


def choose_config(
    M: int, N: int, K: int, dtype: torch.dtype, *, kind: str, facts: DeviceFacts, tma: bool = False
) -> ProductConfig:
    """Choose how to compute an (M, K) by (K, N) product: a heuristic, overridden by the tuning table.

    Args:
        M, N, K: Rows, columns and the summed dim.
        dtype: Dtype of the operands.
        kind: ``plain``; ``epilogue``, which saves a pass; or ``dact``, whose epilogue holds three tiles.
        facts: Facts of the device.
        tma: Whether the layouts suit TMA; without it, a row of the table for ``gluon`` does not count.
    """
    # With wgmma and tcgen05, the same threads hold every column of a row: a range of columns is a range of each
    # thread's registers. With mma.sync the split goes through shared memory, which costs less than the registers of an
    # unsplit epilogue: an SM then holds two programs (three of dact) and not one. CDNA's MFMA keeps its tile whole, and
    # 128 columns of dact would spill.
    half, amd = dtype.itemsize == 2, facts.arch.startswith("gfx")
    mma_sync = facts.arch.startswith(("sm_8", "sm_12"))
    num_stages = 3
    gluon = tma and facts.arch == "sm_90" and kind != "plain" and cdiv(M, 128) * cdiv(N, 128) >= facts.num_sms
    if half:
        block_m, block_n, block_k, num_warps = 128, 128, 64, 8
        if mma_sync:
            block_k, num_stages = 32, 4
        if kind == "dact" and (mma_sync or amd):
            block_n, num_warps = 64, 4 if mma_sync else 8
        if cdiv(M, 128) * cdiv(N, 128) < facts.num_sms:
            block_m, block_n, num_warps = 64, 64, 4
    else:
        # In fp64 an epilogue with 64 columns would spill.
        block_m, block_n, block_k, num_warps = 64, 64 if dtype.itemsize == 4 else 32, 128 // dtype.itemsize, 4
    # Tensor cores need at least 16 in each dim.
    block_m, block_n, block_k = (
        max(16, min(b, next_power_of_2(size))) for b, size in ((block_m, M), (block_n, N), (block_k, K))
    )
    stage = (block_m + block_n) * block_k * dtype.itemsize
    config = {
        "provider": "torch" if kind == "plain" else "triton",
        "block_m": block_m,
        "block_n": block_n,
        "block_k": block_k,
        "num_warps": num_warps,
        "num_stages": max(1, min(num_stages, facts.shared_memory // stage)),
        "parts": column_parts(block_n, half and not amd),
    }
    key = f"{str(dtype).removeprefix('torch.')},N={N},K={K},{kind}"
    row = tuning.lookup("linear", facts.name, key) or {}
    if row.get("provider") == "gluon" and not tma:
        row = {}
    if row.get("provider", "gluon" if gluon else "") == "gluon":
        # From K = 2048 on, the epilogue takes so small a share of a tile's time that nothing need run beside it.
        together = kind == "epilogue" and K >= 2048 and cdiv(M, 128) * cdiv(N, 256) >= facts.num_sms
        config |= HOPPER[256 if together else 128]
    config |= row
    return ProductConfig(**config)


def column_parts(block_n: int, in_parts: bool) -> int:
    """Return the number of parts of ``block_n`` columns: parts of 32 columns with ``in_parts``, else one part."""
    return max(1, block_n // 32) if in_parts else 1
