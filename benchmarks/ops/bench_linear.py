"""Linear layers of a block: fc1 with its activation, qkv, and proj with the residual. M, N, K as in a GEMM."""

from __future__ import annotations

from benchmarks.ops import bench_of, by_mode


def product_flops(case, mode, N):
    """One product in forward; two in backward, for x and for the weight."""
    product = 2 * case.batch * case.tokens * case.channels * N
    return by_mode(mode, product, 2 * product)


def product_bytes(case, mode, itemsize, N, kept=0, residual=0):
    """Forward reads x, W (and the residual), writes y; backward reads dy, x, W (and saved tensors), writes dx, dW."""
    M, K = case.batch * case.tokens, case.channels
    forward = M * K + N * K + (1 + residual) * M * N
    backward = (1 + kept) * M * N + 2 * M * K + 2 * N * K
    return by_mode(mode, forward * itemsize, backward * itemsize)


BENCHES = (
    bench_of(
        "linear_activation",
        lambda case, mode: product_flops(case, mode, case.hidden),
        lambda case, mode, itemsize: product_bytes(case, mode, itemsize, case.hidden, kept=1),
    ),
    bench_of(
        "linear",
        lambda case, mode: product_flops(case, mode, 3 * case.channels),
        lambda case, mode, itemsize: product_bytes(case, mode, itemsize, 3 * case.channels),
    ),
    bench_of(
        "linear_residual",
        lambda case, mode: product_flops(case, mode, case.channels),
        lambda case, mode, itemsize: product_bytes(case, mode, itemsize, case.channels, residual=1),
    ),
)
