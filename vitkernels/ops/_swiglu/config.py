"""Provider and tiles of a gated product, and the padded width of hidden tensors."""

from __future__ import annotations

import torch

from vitkernels import tuning
from vitkernels.ops._product_config import ProductConfig, column_parts
from vitkernels.runtime import DeviceFacts, cdiv, next_power_of_2

MAX_FUSED_K = 1536


def padded(hidden: int) -> int:
    """Return ``hidden`` rounded up to 16, so that rows are aligned; those of F = 2730 in 16 bits start 4 bytes off.

    The columns from F on are zero. With the padding, every load and store of the hidden tensors is 128 bits wide, and
    the products that read them get the alignment that cuBLAS and TMA require.
    """
    return cdiv(hidden, 16) * 16


def choose_config(M: int, F: int, K: int, dtype: torch.dtype, *, kind: str, facts: DeviceFacts) -> ProductConfig:
    """Choose how to compute an (M, K) by (K, F) product with a gate: a heuristic, overridden by the tuning table.

    A Triton product is worth it if its speed, as a fraction of cuBLAS's, is at least
    t / (t + saved bytes / 3.65 TB/s), where t is the time of the product at 790 TFLOP/s (H200, bf16). It saves the
    passes over (M, F) of a separate kernel for the gate: four in inference, two in training and two in the backward. At
    K = 1024, 1536 and 4096 the fraction is 0.70, 0.78 and 0.90 in inference, 0.83, 0.88 and 0.95 in training, and 0.70,
    0.78 and 0.90 in the backward. Triton's products reach 0.80 to 0.97, so they are worth it up to K = 1536. In fp32
    the arithmetic takes twelve times as long, and Triton is never worth it.

    Args:
        M, F, K: Rows, hidden features and the summed dim.
        dtype: Dtype of the operands.
        kind: ``forward``, which multiplies twice, or ``backward``.
        facts: Facts of the device.
    """
    # Splitting the columns helps where it also splits each thread's registers (see _product.py). The backward's
    # epilogue holds seven tiles: in one part it takes 216 registers on sm_90 and 235 on sm_80, in two 110 and 128.
    in_parts = kind == "backward" or (dtype.itemsize == 2 and facts.arch.startswith(("sm_90", "sm_10")))
    if dtype.itemsize == 2:
        # Two accumulators of 64 columns take as many registers as the 128 columns of a plain product.
        block_m, block_n, block_k, num_warps = 128, 64, 64, 8
        if cdiv(M, block_m) * cdiv(F, block_n) < facts.num_sms:
            block_m, num_warps = 64, 4
    else:
        block_m, block_n, block_k, num_warps = 64, 32, 128 // dtype.itemsize, 4
    # Tensor cores need at least 16 in each dim.
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
