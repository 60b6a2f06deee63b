"""The gated MLP of a block with its residual. M rows (batch · tokens), C channels, F features in each half."""

from __future__ import annotations

from benchmarks.ops import bench_of, by_mode


def flops(case, mode):
    """Three products in forward, six in backward."""
    products = 6 * case.batch * case.tokens * case.channels * case.hidden
    return by_mode(mode, products, 2 * products)


def bytes(case, mode, itemsize):
    """Count the operands and results of the three products: x, residual, weights, hidden (written and read), y.

    Backward reads dy, x, the weights, the saved gate and value and, for dW3, the hidden tensor. It writes the gradients
    of gate and value once and reads them twice. It writes dx and the gradients of the weights.
    """
    M, C, F = case.batch * case.tokens, case.channels, case.hidden
    forward = 3 * M * C + 2 * M * F + 3 * C * F
    backward = 3 * M * C + 9 * M * F + 6 * C * F
    return by_mode(mode, forward * itemsize, backward * itemsize)


BENCHES = (bench_of("swiglu_mlp", flops, bytes),)
