"""Launch configurations of the attention kernels."""

from __future__ import annotations

import dataclasses

import torch

from vitkernels import runtime, tuning
from vitkernels.runtime import DeviceFacts


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Queries and keys a tile, warps a program, and pipeline stages of one kernel."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """The tilings of the forward, of the gradients of keys and values, and of the gradient of queries."""

    forward: Tiling
    dkv: Tiling
    dq: Tiling


def choose_config(N_q: int, N_kv: int, D: int, dtype: torch.dtype, facts: DeviceFacts) -> AttentionConfig:
    """Choose tilings for N_q queries and N_kv keys of head dim D: the tuning table's, else a heuristic."""
    block_d = padded_head_dim(D)
    itemsize = dtype.itemsize
    kernels = ("forward", "dkv", "dq")
    if facts.arch == "interpreter":
        start = dict.fromkeys(kernels, Tiling(64, 64, 4, 1))
    elif itemsize > 2:  # products of fp32 without tensor cores hold whole tiles in registers
        start = dict.fromkeys(kernels, Tiling(32, 32, 8 if block_d > 32 else 4, 2))
        if facts.arch.startswith("gfx"):  # 32 queries would spill
            start["dkv"] = Tiling(16, 32, 8 if block_d > 32 else 4, 2)
    else:
        start = dict.fromkeys(kernels, Tiling(64, 64, 4, 2))
        # mma.sync, of these chips, keeps operands in registers, where wgmma and tcgen05 read shared memory.
        registers_short = facts.arch.startswith(("sm_8", "sm_12"))
        if block_d > 64 or registers_short:  # 64 queries would spill
            start["dkv"] = Tiling(32, 64, 8 if block_d > 64 and registers_short else 4, 2)
        if block_d > 64 and registers_short:  # 64 keys would spill
            start["dq"] = Tiling(64, 32, 4, 2)
    chosen = {}
    for kernel, tiling in start.items():
        tuned = tuning.lookup(f"attention_{kernel}", facts.name, f"N_q={N_q},N_kv={N_kv},D={D},{dtype}")
        chosen[kernel] = Tiling(**tuned) if tuned else _fit(kernel, tiling, block_d, itemsize, facts.shared_memory)
    return AttentionConfig(**chosen)


def padded_head_dim(D: int) -> int:
    """Return the head dim of the tiles: a power of two, 16 at least, which is the least that ``tl.dot`` takes."""
    return max(16, runtime.next_power_of_2(D))


def shared_bytes(kernel: str, tiling: Tiling, block_d: int, itemsize: int) -> int:
    """Bound the shared memory of a program: two tiles a pipeline stage, and those that stay for the whole loop."""
    resident, streamed = tiling.block_m, tiling.block_n
    if kernel == "dkv":
        resident, streamed = streamed, resident
    kept = 1 if kernel == "forward" else 2
    statistics = 2 * tiling.num_stages * streamed * 4 if kernel == "dkv" else 0  # lse and delta of the queries
    return (kept * resident + 2 * tiling.num_stages * streamed) * block_d * itemsize + statistics


def _fit(kernel: str, tiling: Tiling, block_d: int, itemsize: int, shared_memory: int) -> Tiling:
    """Take stages, then rows, from a tiling until it fits."""
    while shared_bytes(kernel, tiling, block_d, itemsize) > shared_memory:
        if tiling.num_stages > 1:
            tiling = dataclasses.replace(tiling, num_stages=tiling.num_stages - 1)
        elif tiling.block_n > 16:
            tiling = dataclasses.replace(tiling, block_n=tiling.block_n // 2)
        elif tiling.block_m > 16:
            tiling = dataclasses.replace(tiling, block_m=tiling.block_m // 2)
        else:
            break
    return tiling
