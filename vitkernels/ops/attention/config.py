"""Launch configurations of the attention kernels: regimes, tiles, pieces of rows and of heads."""

from __future__ import annotations

import dataclasses

import torch

from vitkernels import runtime, tuning
from vitkernels.runtime import DeviceFacts

WINDOW = 64  # tokens that one tile holds
LONGEST_ROW = 256  # keys whose scores a program holds at once; twice as many spill registers


@dataclasses.dataclass(frozen=True)
class Tiling:
    """One kernel's regime (``row``, ``windows`` or ``blocks``), queries and keys a tile, warps, pipeline stages."""

    regime: str
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """The tilings of the forward, of the backward over whole rows, and of its kernels over ``blocks``."""

    forward: Tiling
    backward: Tiling
    dkv: Tiling
    dq: Tiling


def choose_config(
    N_q: int,
    N_kv: int,
    D: int,
    dtype: torch.dtype,
    facts: DeviceFacts,
    *,
    heads: int,
    varlen: bool = False,
    masked: bool = False,
) -> AttentionConfig:
    """Choose regimes and tilings: the tuning table's, else a heuristic.

    Args:
        N_q, N_kv: Queries and keys, of the longest image.
        D: Head dim.
        dtype: Of the operands.
        facts: The device's.
        heads: Heads of all images together.
        varlen: Whether images of different length are packed.
        masked: Whether a mask or a dropout stands between scores and weights.
    """
    width = sum(head_parts(D))
    start = _blocks(width, dtype.itemsize, facts)
    if not varlen:
        start |= _whole_rows(N_q, N_kv, width, dtype.itemsize, facts, heads, masked)
    key = f"N_q={N_q},N_kv={N_kv},D={D},{dtype}" + ",varlen" * varlen + ",masked" * masked
    chosen = {}
    for kernel, tiling in start.items():
        tuned = tuning.lookup(f"attention_{kernel}", facts.name, key)
        chosen[kernel] = Tiling(**tuned) if tuned else _fit(kernel, tiling, width, dtype.itemsize, facts.shared_memory)
    return AttentionConfig(**chosen)


def _blocks(width: int, itemsize: int, facts: DeviceFacts) -> dict[str, Tiling]:
    """Tilings for rows of any length and heads of ``width`` channels."""
    kernels = ("forward", "backward", "dkv", "dq")
    if facts.arch == "interpreter":
        return dict.fromkeys(kernels, Tiling("blocks", 64, 64, 4, 1))
    if itemsize > 2:  # products of fp32 without tensor cores hold whole tiles in registers
        warps = 8 if width > 32 else 4
        tilings = dict.fromkeys(kernels, Tiling("blocks", 32, 32, warps, 2))
        if facts.arch.startswith("gfx"):  # 32 queries would spill
            tilings["dkv"] = Tiling("blocks", 16, 32, warps, 2)
        return tilings
    tilings = dict.fromkeys(kernels, Tiling("blocks", 64, 64, 4, 2))
    short = _short_of_registers(facts)
    if width > 64 or short:  # 64 queries would spill
        tilings["dkv"] = Tiling("blocks", 32, 64, 8 if width > 64 and short else 4, 2)
    if width > 64 and short:  # 64 keys would spill
        tilings["dq"] = Tiling("blocks", 64, 32, 4, 2)
    return tilings


def _whole_rows(
    N_q: int, N_kv: int, width: int, itemsize: int, facts: DeviceFacts, heads: int, masked: bool
) -> dict[str, Tiling]:
    """Tilings for rows whose scores a program holds at once, where it can, without a spill on any architecture."""
    interpreted = facts.arch == "interpreter"
    if (itemsize > 2 and not interpreted) or width > 128 or N_kv > LONGEST_ROW:
        return {}
    block_m, block_n = (max(16, runtime.next_power_of_2(n)) for n in (N_q, N_kv))
    is_window = max(N_q, N_kv) <= WINDOW
    short = _short_of_registers(facts)
    tilings = {}
    if is_window and (width <= 64 or interpreted):
        tilings["forward"] = Tiling("windows", block_m, block_n, 4, 1)
    elif width <= (80 if short else 128):
        tilings["forward"] = Tiling("row", 64, 128 if width <= 64 else 64, 4, 1)

    # The backward holds the gradients of all keys and values as well, and has one program a head.
    if is_window and width <= 32:
        tilings["backward"] = Tiling("windows", block_m, block_n, 8, 1)
    elif interpreted:
        tilings["backward"] = Tiling("row", 32, block_n, 4, 1)
    elif width <= 64 and heads >= facts.num_sms:
        if N_kv <= 64 and not (short and masked):
            tilings["backward"] = Tiling("row", 32, block_n, 4, 1)
        elif 64 < N_kv <= (128 if short else 256) and not masked:
            tilings["backward"] = Tiling("row", 16, block_n, 8, 1)
    return tilings


def _short_of_registers(facts: DeviceFacts) -> bool:
    # mma.sync, of these chips, keeps operands in registers, where wgmma and tcgen05 read shared memory.
    return facts.arch.startswith(("sm_8", "sm_12"))


def head_parts(D: int) -> tuple[int, ...]:
    """The widths, powers of two, of the tiles that hold a head's D channels: one, or two where that saves a quarter."""
    whole = max(16, runtime.next_power_of_2(D))
    if whole >= 64 and whole * 3 // 4 >= D:
        return whole // 2, max(16, runtime.next_power_of_2(D - whole // 2))
    return (whole,)


def key_pieces(N: int, largest: int, smallest: int = 16) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where the pieces of N keys start, and their sizes: powers of two, full but for the last.

    Pieces of ``largest`` keys, and behind them two at most: 197 keys are 128 + 64 + 16 with a largest piece of 128.
    """
    full, rest = divmod(N, largest)
    sizes = [largest] * full
    if rest:
        first = largest
        while first // 2 >= max(rest, smallest):
            first //= 2
        # ``first`` alone holds the rest; half of it and a smaller one may, too.
        if first > smallest:
            second = max(smallest, runtime.next_power_of_2(rest - first // 2))
            sizes += [first // 2, second] if second < first // 2 else [first]
        else:
            sizes += [first]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return tuple(starts), tuple(sizes)


def useful_share(N_q: int, N_kv: int, tiling: Tiling) -> float:
    """The share of the scores that a forward computes which belong to a query and a key."""
    rows = runtime.cdiv(N_q, tiling.block_m) * tiling.block_m
    _, sizes = ((), (tiling.block_n,)) if tiling.regime == "windows" else key_pieces(N_kv, tiling.block_n)
    return N_q * N_kv / (rows * sum(sizes))


def shared_bytes(kernel: str, tiling: Tiling, width: int, itemsize: int) -> int:
    """Bound the shared memory of a ``blocks`` program: two tiles a pipeline stage, and those that stay for the loop."""
    resident, streamed = tiling.block_m, tiling.block_n
    if kernel == "dkv":
        resident, streamed = streamed, resident
    kept = 1 if kernel == "forward" else 2
    statistics = 2 * tiling.num_stages * streamed * 4 if kernel == "dkv" else 0  # lse and delta of the queries
    return (kept * resident + 2 * tiling.num_stages * streamed) * width * itemsize + statistics


def _fit(kernel: str, tiling: Tiling, width: int, itemsize: int, shared_memory: int) -> Tiling:
    """Take stages, then rows, from a tiling of blocks until it fits."""
    while tiling.regime == "blocks" and shared_bytes(kernel, tiling, width, itemsize) > shared_memory:
        if tiling.num_stages > 1:
            tiling = dataclasses.replace(tiling, num_stages=tiling.num_stages - 1)
        elif tiling.block_n > 16:
            tiling = dataclasses.replace(tiling, block_n=tiling.block_n // 2)
        elif tiling.block_m > 16:
            tiling = dataclasses.replace(tiling, block_m=tiling.block_m // 2)
        else:
            break
    return tiling


def attention_provider(N_q: int, N_kv: int, D: int, dtype: torch.dtype, device: torch.device) -> str:
    """Who attends on ``device``: ``triton``, the kernels here, or ``sdpa``, the fastest of PyTorch's own.

    The tuning table's word where it has measured both, else the kernels: PyTorch's are not deterministic, and take
    and give tensors that a packed projection must be unpacked for.
    """
    if device.type not in ("cuda", "xpu"):
        return "triton"
    key = f"N_q={N_q},N_kv={N_kv},D={D},{dtype}"
    tuned = tuning.lookup("attention", runtime.device_facts(device).name, key)
    return tuned["provider"] if tuned else "triton"
