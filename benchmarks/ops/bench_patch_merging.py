"""Patch merging between two stages of Swin: B images of N tokens of C channels to N / 4 tokens of 2C channels.

PyTorch gathers four patches into one row, norms the rows and multiplies them; Swin V2 norms the product.
"""

from __future__ import annotations

from benchmarks.ops import bench_of, by_mode


def flops(case, mode):
    """One product in forward, (B · N / 4, 4C) · (4C, 2C), and two in backward."""
    rows, C = case.batch * case.tokens // 4, case.channels
    product = 2 * rows * 4 * C * 2 * C
    return by_mode(mode, product, 2 * product)


def bytes(case, mode, itemsize):
    """Forward reads tokens and weight, writes half as many elements; backward reads all three, writes two gradients.

    Between norm and product nothing must be stored.
    """
    tokens, weight = case.batch * case.tokens * case.channels, 8 * case.channels**2
    merged = tokens // 2
    return by_mode(mode, (tokens + weight + merged) * itemsize, (2 * (tokens + weight) + merged) * itemsize)


BENCHES = (
    bench_of("patch_merging", flops, bytes, stages="swin_"),
    bench_of("patch_merging_v2", flops, bytes, stages="swinv2_"),
)
