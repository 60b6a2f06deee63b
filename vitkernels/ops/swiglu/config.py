"""Who multiplies in a gated product, with what tiles, and how wide the hidden tensors lie in memory."""

from __future__ import annotations

import torch

from vitkernels import tuning
from vitkernels.ops._product import ProductConfig, column_parts
from vitkernels.runtime import DeviceFacts, cdiv, next_power_of_2

MAX_FUSED_K = 1536


def padded(hidden: int) -> int:
    """Return ``hidden`` rounded up to 16: rows of F = 2730 in 16 bits begin 4 bytes apart from a vector of 16.

    The columns from F on are zero. Then every load and store of the hidden tensors is 128 bits wide, and the products
    that read them find the alignment that cuBLAS and TMA ask for.
    """
    return cdiv(hidden, 16) * 16


def choose_config(M: int, F: int, K: int, dtype: torch.dtype, *, kind: str, facts: DeviceFacts) -> ProductConfig:
    """Choose how to compute an (M, K) by (K, F) product with a gate: by the tuning table, else by a heuristic.

    A Triton product pays where it reaches the fraction t / (t + saved bytes / 3.65 TB/s) of cuBLAS, t being the time
    of the product at 790 TFLOP/s (H200, bf16). What is saved is the passes of a kernel of its own over (M, F): four in
    inference, two in training and two backward. So the fraction is, at K = 1024, 1536 and 4096: 0.70, 0.78 and 0.90;
    0.83, 0.88 and 0.95; 0.70, 0.78 and 0.90. Triton's products reach 0.80 to 0.97: they pay up to K = 1536. In fp32
    the arithmetic takes twelve times as long, and nothing pays.

    Args:
        M, F, K: Rows, hidden features and the summed dim.
        dtype: The operands'.
        kind: ``forward``, which multiplies twice, or ``backward``.
        facts: The device's.
    """
    # Where a share of a tile's columns is a share of each thread's registers (see _product.py). The backward's epilogue
    # holds seven tiles: in one part it takes 216 registers on sm_90 and 235 on sm_80, in two 110 and 128.
    in_parts = kind == "backward" or (dtype.itemsize == 2 and facts.arch.startswith(("sm_90", "sm_10")))
    if dtype.itemsize == 2:
        # 64 columns of each of two accumulators, as many registers as a plain product's 128.
        block_m, block_n, block_k, num_warps = 128, 64, 64, 8
        if cdiv(M, block_m) * cdiv(F, block_n) < facts.num_sms:
            block_m, num_warps = 64, 4
    else:
        block_m, block_n, block_k, num_warps = 64, 32, 128 // dtype.itemsize, 4
    # A product on tensor cores takes at least 16 in each dim.
    block_m, block_n, block_k = (
        max(16, min(b, next_power_of_2(size))) for b, size in ((block_m, M), (block_n, F), (block_k, K))
    )
    stage = (block_m + (2 if kind == "forward" else 1) * block_n) * block_k * dtype.itemsize
    config = {
        "provider": "triton" if dtype.itemsize == 2 and K <= MAX_FUSED_K else "torch",
        "block_m": block_m,
        "block_n": block_n,
        "block_k": block_k,
        "num_warps": num_warps,
        "num_stages": max(1, min(3, facts.shared_memory // stage)),
        "parts": column_parts(block_n, in_parts),
    }
    key = f"{str(dtype).removeprefix('torch.')},F={F},K={K},{kind}"
    config |= tuning.lookup("swiglu_mlp", facts.name, key) or {}
    return ProductConfig(**config)
