"""Launch configurations of the attention kernels: regimes, tiles, and how rows and heads are split."""

from __future__ import annotations

import dataclasses

import torch

from vitkernels import runtime, tuning
from vitkernels.ops import _triton
from vitkernels.runtime import DeviceFacts

WINDOW = 64  # tokens that one tile holds
LONGEST_ROW = 256  # most keys whose scores a program holds at once; twice as many would spill registers
LONG_ROW = 512  # from so many queries on, tiles of 128 rows waste little


@dataclasses.dataclass(frozen=True)
class Tiling:
    """One kernel's regime (``row``, ``windows``, ``blocks``, ``hopper``), queries and keys per tile, warps, stages."""

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
    dmask: Tiling


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
    key_bias: bool = False,
    dropout: bool = False,
    is_causal: bool = False,
    tma: bool = False,
) -> AttentionConfig:
    """Choose regimes and tilings from the tuning table, else by a heuristic.

    Args:
        N_q, N_kv: Queries and keys of the longest image.
        D: Head dim.
        dtype: Dtype of the operands.
        facts: Facts of the device.
        heads: Heads of all images together.
        varlen: Whether images of different lengths are packed.
        masked: Whether there is a mask.
        key_bias: Whether there is a bias of keys.
        dropout: Whether weights are dropped.
        is_causal: Whether queries attend to no later key.
        tma: Whether the operands suit the forward's kernel for Hopper.
    """
    width = sum(head_parts(D))
    start = _blocks(N_q, width, dtype.itemsize, facts, masked, key_bias, dropout)
    if not varlen:
        start |= _whole_rows(N_q, N_kv, width, dtype.itemsize, facts, heads, masked, key_bias, dropout, is_causal)
    tma = tma and facts.arch.startswith("sm_9") and not (varlen or masked or key_bias or dropout or is_causal)
    if tma and min(N_q, N_kv) >= LONG_ROW:
        start["forward"] = Tiling("hopper", 128, 128, 4, 2)  # block_m and num_warps are the kernel's own
    options = ",varlen" * varlen + ",masked" * masked + ",key_bias" * key_bias + ",dropout" * dropout
    key = f"N_q={N_q},N_kv={N_kv},D={D},{dtype}{options}"
    chosen = {}
    for kernel, tiling in start.items():
        tuned = tuning.lookup(f"attention_{kernel}", facts.name, key)
        if tuned and tuned["regime"] == "hopper" and not tma:  # the key tells neither alignment nor causality
            tuned = None
        chosen[kernel] = Tiling(**tuned) if tuned else _fit(kernel, tiling, width, dtype.itemsize, facts.shared_memory)
    return AttentionConfig(**chosen)


def _blocks(
    N_q: int, width: int, itemsize: int, facts: DeviceFacts, masked: bool, key_bias: bool, dropout: bool
) -> dict[str, Tiling]:
    """Tilings for rows of any length and heads of ``width`` channels: of those tried, the largest without spills."""
    kernels = ("forward", "backward", "dkv", "dq", "dmask")

    def tile(block_m: int, block_n: int, num_warps: int, num_stages: int = 2) -> Tiling:
        return Tiling("blocks", block_m, block_n, num_warps, num_stages)

    amd = facts.arch.startswith("gfx")
    if itemsize == 8:
        return dict.fromkeys(kernels, tile(16, 16, 4))
    short = _short_of_registers(facts)
    if itemsize > 2:  # fp32 products without tensor cores hold whole tiles in registers
        warps = 8 if width > 32 or masked else 4
        tilings = dict.fromkeys(kernels, tile(32, 32, warps)) | {"dmask": tile(16, 32, 4)}
        if amd:
            return tilings | {"dkv": tile(16, 32, warps)} | ({"dq": tile(16, 32, warps)} if masked else {})
        # With more pipeline stages, Triton 3.6 spills the prefetched tiles.
        if not short:
            # Eight warps spill beside a mask of heads of 32 channels.
            forward = tile(32, 32, 8 if width > 32 else 4)
            return tilings | {"forward": forward, "dkv": tile(32, 32, warps, 1)}
        dkv = tile(32, 16, warps, 1) if dropout else tile(32, 32, 4, 1)
        return tilings | {"dkv": dkv, "dq": tile(32, 32, 4)}
    tilings = dict.fromkeys(kernels, tile(64, 64, 4))
    if key_bias and (facts.arch.startswith("sm_10") or (amd and masked)):
        tilings["forward"] = tile(64, 32, 4)  # 64 keys spill: on sm_100 with a causal mask or dropout
    if not short:
        # Twice the queries halve the reads of keys and values through L2, and two programs still fit on an SM.
        if facts.arch.startswith("sm_9") and N_q >= LONG_ROW and width <= 64 and not (masked or dropout):
            tilings["forward"] = tile(128, 64, 8)
        # With two stages Triton 3.6 spills 8 bytes of heads of 72 channels beside a mask.
        stages = 3 if _triton.BEFORE_3_7 and masked and width > 64 and facts.arch.startswith("sm_10") else 2
        # Beside dropout's counters heads of 128 channels spill with four warps.
        crowded = dropout and width >= 128 and not amd
        if crowded:
            tilings["forward"] = tile(64, 64, 8)
        warps = 8 if crowded else 4
        return tilings | {"dkv": tile(32 if width > 64 or dropout or (masked and amd) else 64, 64, warps, stages)}
    tilings |= {"dq": tile(64, 32, 4), "dmask": tile(64, 32, 4)}
    if width <= 64:
        forward = tile(64, 16 if masked else 32, 4)
        return tilings | {"forward": forward, "dkv": tile(32, 32 if masked else 64, 4)}
    # Each of eight warps multiplies 16 rows: with 64 rows, half of the products would be computed twice.
    wide = tile(64, 32 if key_bias else 64, 8) if dropout else tile(128, 32 if masked or key_bias else 64, 8)
    # With 64 keys 8 bytes spill beside dropout on sm_80 and, before Triton 3.7, on sm_120.
    narrow = dropout and (facts.arch.startswith("sm_8") or _triton.BEFORE_3_7)
    tilings["forward"] = wide if width < 128 else tile(32, 32 if narrow else 64, 4)
    return tilings | {"dkv": tile(16, 32, 4) if masked and width < 128 else tile(32, 64, 8)}


def _whole_rows(
    N_q: int,
    N_kv: int,
    width: int,
    itemsize: int,
    facts: DeviceFacts,
    heads: int,
    masked: bool,
    key_bias: bool,
    dropout: bool,
    is_causal: bool,
) -> dict[str, Tiling]:
    """Tilings for kernels that hold a whole row of scores, where that spills no registers on any architecture."""
    if itemsize > 2 or width > 128 or N_kv > LONGEST_ROW:
        return {}
    block_m, block_n = (max(16, runtime.next_power_of_2(n)) for n in (N_q, N_kv))
    is_window = max(N_q, N_kv) <= WINDOW
    short, amd = _short_of_registers(facts), facts.arch.startswith("gfx")
    # A mask's tile and dropout's counters take registers, too: on sm_100 Triton 3.6 spills 960 bytes.
    short_and_masked = short and (masked or dropout)
    crowded = short_and_masked or dropout or (masked and facts.arch.startswith("sm_10"))
    tilings = {}
    if is_window and width <= 64:
        tilings["forward"] = Tiling("windows", block_m, block_n, 4, 1)
    elif width <= (80 if short else 128) and not crowded:
        tilings["forward"] = Tiling("row", 64, 128 if width <= 64 else 64, 4, 1)

    # The backward also holds the gradients of all keys and values, and runs one program per head.
    if is_window and width <= 32:
        tilings["backward"] = Tiling("windows", block_m, block_n, 4 if amd else 8, 1)
    elif width <= 64 and heads >= facts.num_sms:
        if N_kv <= 64 and not short_and_masked and not (short and key_bias):
            tilings["backward"] = Tiling("row", 32, block_n, 4, 1)
        elif 64 < N_kv <= (128 if short else 256) and not (masked or dropout):
            # wgmma reads keys and values from shared memory again for each tile of queries: with 32 of them half as
            # often. On CDNA 3 that spills, and so do a causal mask, a bias of keys and Triton 3.6.
            wide = facts.arch.startswith("sm_9") and not (is_causal or key_bias or _triton.BEFORE_3_7)
            tilings["backward"] = Tiling("row", 32 if wide else 16, block_n, 8, 1)
    return tilings


def _short_of_registers(facts: DeviceFacts) -> bool:
    # On these chips mma.sync keeps operands in registers; wgmma and tcgen05 read them from shared memory.
    return facts.arch.startswith(("sm_8", "sm_12"))


def head_parts(D: int) -> tuple[int, ...]:
    """Return the widths (powers of two) of the tiles for a head's D channels: one, or two if that saves a quarter."""
    whole = max(16, runtime.next_power_of_2(D))
    if whole >= 64 and whole * 3 // 4 >= D:
        return whole // 2, max(16, runtime.next_power_of_2(D - whole // 2))
    return (whole,)


def key_pieces(N: int, largest: int, smallest: int = 16) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Split N keys into pieces; return the starts and the sizes, which are powers of two. Only the last may be partial.

    There are pieces of ``largest`` keys, then at most two smaller ones: for 128, 197 keys are 128 + 64 + 16.
    """
    full, rest = divmod(N, largest)
    sizes = [largest] * full
    if rest:
        first = largest
        while first // 2 >= max(rest, smallest):
            first //= 2
        # A piece of ``first`` holds the rest; half of it and a still smaller piece may also hold it.
        if first > smallest:
            second = max(smallest, runtime.next_power_of_2(rest - first // 2))
            sizes += [first // 2, second] if second < first // 2 else [first]
        else:
            sizes += [first]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return tuple(starts), tuple(sizes)


def useful_share(N_q: int, N_kv: int, tiling: Tiling) -> float:
    """Return the fraction of the scores computed by a forward that belong to a real query and key, not to padding."""
    rows = runtime.cdiv(N_q, tiling.block_m) * tiling.block_m
    if tiling.regime in ("windows", "hopper"):
        keys = runtime.cdiv(N_kv, tiling.block_n) * tiling.block_n
    else:
        keys = sum(key_pieces(N_kv, tiling.block_n)[1])
    return N_q * N_kv / (rows * keys)


def shared_bytes(kernel: str, tiling: Tiling, width: int, itemsize: int) -> int:
    """Bound the shared memory of a ``blocks`` program: two tiles per pipeline stage, and those kept during the loop."""
    resident, streamed = tiling.block_m, tiling.block_n
    if kernel == "dkv":
        resident, streamed = streamed, resident
    kept = 1 if kernel == "forward" else 2
    statistics = 2 * tiling.num_stages * streamed * 4 if kernel == "dkv" else 0  # lse and delta of the queries
    return (kept * resident + 2 * tiling.num_stages * streamed) * width * itemsize + statistics


def _fit(kernel: str, tiling: Tiling, width: int, itemsize: int, shared_memory: int) -> Tiling:
    """Reduce the stages, then the tile, of a ``blocks`` tiling until it fits into shared memory."""
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
    """Return the attention backend on ``device``: ``triton`` (our kernels) or ``sdpa`` (the fastest one of PyTorch).

    The tuning table decides if both were measured. Otherwise it is our kernels: PyTorch's are not deterministic, and
    they need a packed projection to be unpacked.
    """
    # torch.compile cannot trace reading the table's file, so compiled graphs use our kernels.
    if device.type not in ("cuda", "xpu") or torch.compiler.is_compiling():
        return "triton"
    key = f"N_q={N_q},N_kv={N_kv},D={D},{dtype}"
    tuned = tuning.lookup("attention", runtime.device_facts(device).name, key)
    return tuned["provider"] if tuned else "triton"
