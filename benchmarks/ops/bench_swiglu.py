"""The gated MLP of a block with its residual. M rows (batch · tokens), C channels, F features in each half."""

from __future__ import annotations

from benchmarks.ops import OpBench, by_mode, normal, weight_of
from vitkernels import ops, reference

EPS = 1e-6


def _inputs(case, dtype, device):
    C, F = case.channels, case.hidden
    tensors = {"x": normal((case.batch, case.tokens, C), dtype, device)}
    if case.mlp == "packed":
        tensors |= {"w12": weight_of(2 * F, C, dtype, device), "b12": normal((2 * F,), dtype, device, 0.1)}
    else:
        for half in ("gate", "value"):
            tensors[f"w_{half}"] = weight_of(F, C, dtype, device)
            tensors[f"b_{half}"] = normal((F,), dtype, device, 0.1)
    tensors |= {
        "w3": weight_of(C, F, dtype, device),
        "b3": normal((C,), dtype, device, 0.1),
        "residual": normal((case.batch, case.tokens, C), dtype, device),
    }
    if case.layer_scale:
        tensors["layer_scale"] = normal((C,), dtype, device, 0.2, 1.0)
    if case.mlp_norm:
        tensors |= {
            "norm_weight": normal((F,), dtype, device, 0.2, 1.0),
            "norm_bias": normal((F,), dtype, device, 0.2),
        }
    return tensors


def _on(function):
    """Return a function that passes the tensors of :func:`_inputs` to ``function`` under its own names."""

    def run(case, *, w12=None, b12=None, norm_weight=None, norm_bias=None, **tensors):
        if w12 is None:
            w12 = tensors.pop("w_gate"), tensors.pop("w_value")
            b12 = tensors.pop("b_gate"), tensors.pop("b_value")
        norm = (norm_weight, norm_bias, EPS) if case.mlp_norm else None
        return function(w12=w12, b12=b12, norm=norm, activation=case.activation, **tensors)

    return run


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


BENCHES = (
    OpBench(
        "swiglu_mlp",
        _inputs,
        _on(ops.swiglu_mlp),
        _on(reference.swiglu_mlp),
        flops,
        bytes,
        applies=lambda case: case.mlp != "mlp",
    ),
)
