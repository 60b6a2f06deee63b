"""The MLP of a block with its residual. M rows (batch · tokens), C channels, F hidden features."""

from __future__ import annotations

from benchmarks.ops import bench_of, by_mode


def flops(case, mode):
    """Two products in forward, four in backward."""
    products = 4 * case.batch * case.tokens * case.channels * case.hidden
    return by_mode(mode, products, 2 * products)


def bytes(case, mode, itemsize):
    """Count the operands and results of the two products: x, residual, W1, W2, hidden (written and read), y.

    Backward reads dy, x, W1, W2, the saved pre-activation and, for dW2, the activation. It writes the pre-activation's
    gradient once and reads it twice. It writes dx, dW1 and dW2.
    """
    M, C, F = case.batch * case.tokens, case.channels, case.hidden
    forward = 3 * M * C + 2 * M * F + 2 * C * F
    backward = 3 * M * C + 5 * M * F + 4 * C * F
    return by_mode(mode, forward * itemsize, backward * itemsize)


BENCHES = (bench_of("mlp", flops, bytes),)
