"""The MLP of a block with its residual. M rows (batch · tokens), C channels, F hidden features."""

from __future__ import annotations

from benchmarks.ops import OpBench, by_mode, normal, weight_of
from vitkernels import ops, reference


def _inputs(case, dtype, device):
    C, F = case.channels, case.hidden
    tensors = {
        "x": normal((case.batch, case.tokens, C), dtype, device),
        "w1": weight_of(F, C, dtype, device),
        "b1": normal((F,), dtype, device, 0.1),
        "w2": weight_of(C, F, dtype, device),
        "b2": normal((C,), dtype, device, 0.1),
        "residual": normal((case.batch, case.tokens, C), dtype, device),
    }
    if case.layer_scale:
        tensors["layer_scale"] = normal((C,), dtype, device, 0.2, 1.0)
    return tensors


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


BENCHES = (
    OpBench(
        "mlp",
        _inputs,
        lambda case, **tensors: ops.mlp(**tensors, activation=case.activation),
        lambda case, **tensors: reference.mlp(**tensors, activation=case.activation),
        flops,
        bytes,
        applies=lambda case: case.mlp == "mlp",
    ),
)
