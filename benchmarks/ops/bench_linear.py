"""Linear layers of a block: fc1 with its activation, qkv, and proj with the residual. M, N, K as in a GEMM."""

from __future__ import annotations

from benchmarks.ops import OpBench, by_mode, normal, weight_of
from vitkernels import ops, reference


def _inputs(case, dtype, device, N):
    return {
        "x": normal((case.batch, case.tokens, case.channels), dtype, device),
        "weight": weight_of(N, case.channels, dtype, device),
        "bias": normal((N,), dtype, device, 0.1),
    }


def _inputs_with_residual(case, dtype, device):
    more = {"residual": normal((case.batch, case.tokens, case.channels), dtype, device)}
    if case.layer_scale:
        more["layer_scale"] = normal((case.channels,), dtype, device, 0.2, 1.0)
    return _inputs(case, dtype, device, case.channels) | more


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
    OpBench(
        "linear_activation",
        lambda case, dtype, device: _inputs(case, dtype, device, case.hidden),
        lambda case, **tensors: ops.linear(**tensors, activation=case.activation),
        lambda case, **tensors: reference.linear(**tensors, activation=case.activation),
        lambda case, mode: product_flops(case, mode, case.hidden),
        lambda case, mode, itemsize: product_bytes(case, mode, itemsize, case.hidden, kept=1),
        applies=lambda case: case.mlp == "mlp",
    ),
    OpBench(
        "linear",
        lambda case, dtype, device: _inputs(case, dtype, device, 3 * case.channels),
        lambda case, **tensors: ops.linear(**tensors),
        lambda case, **tensors: reference.linear(**tensors),
        lambda case, mode: product_flops(case, mode, 3 * case.channels),
        lambda case, mode, itemsize: product_bytes(case, mode, itemsize, 3 * case.channels),
    ),
    OpBench(
        "linear_residual",
        _inputs_with_residual,
        lambda case, **tensors: ops.linear(**tensors),
        lambda case, **tensors: reference.linear(**tensors),
        lambda case, mode: product_flops(case, mode, case.channels),
        lambda case, mode, itemsize: product_bytes(case, mode, itemsize, case.channels, residual=1),
    ),
)
