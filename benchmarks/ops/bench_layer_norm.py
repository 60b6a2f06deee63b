"""LayerNorm, and residual + LayerScale + LayerNorm. M rows (batch · tokens) of C channels."""

from __future__ import annotations

from benchmarks.ops import OpBench, by_mode, normal, require
from vitkernels import ops, reference

EPS = 1e-6


def _inputs(case, dtype, device):
    return inputs_without_bias(case, dtype, device) | {"bias": normal((case.channels,), dtype, device, 0.2)}


def inputs_without_bias(case, dtype, device):
    """Return x and weight, RMSNorm's inputs."""
    return {
        "x": normal((case.batch, case.tokens, case.channels), dtype, device),
        "weight": normal((case.channels,), dtype, device, 0.2, 1.0),
    }


def with_residual(inputs):
    """Return a function that adds the residual, and LayerScale if the case has it, to ``inputs``."""

    def make(case, dtype, device):
        more = {"residual": normal((case.batch, case.tokens, case.channels), dtype, device)}
        if case.layer_scale:
            more["layer_scale"] = normal((case.channels,), dtype, device, 0.2, 1.0)
        return inputs(case, dtype, device) | more

    return make


def _applies(case):
    return case.norm == "layer_norm"


def _elements(case):
    return case.batch * case.tokens * case.channels


def flops(case, mode):
    """Forward has two sums, the centring and the scaling; backward two means and three more products."""
    return by_mode(mode, 8 * _elements(case), 14 * _elements(case))


def bytes(case, mode, itemsize):
    """Read x, write y; read dy and x, write dx. Weights are small."""
    return by_mode(mode, 2 * _elements(case) * itemsize, 3 * _elements(case) * itemsize)


def bytes_with_residual(case, mode, itemsize):
    """Read x and residual, write normed and sum; read both upstream gradients and the sum, write dresidual.

    With LayerScale x is read once more, for its gradient, and dx differs from dresidual.
    """
    backward = 6 if case.layer_scale else 4
    return by_mode(mode, 4 * _elements(case) * itemsize, backward * _elements(case) * itemsize)


def _liger(device):
    norm = require("liger_kernel.ops.layer_norm", device).LigerLayerNormFunction
    return lambda case, x, weight, bias: norm.apply(x, weight, bias, EPS)


BENCHES = (
    OpBench(
        "add_layer_norm",
        with_residual(_inputs),
        lambda case, **tensors: ops.add_layer_norm(**tensors, eps=EPS),
        lambda case, **tensors: reference.add_layer_norm(**tensors, eps=EPS),
        flops,
        bytes_with_residual,
        applies=_applies,
    ),
    OpBench(
        "layer_norm",
        _inputs,
        lambda case, **tensors: ops.layer_norm(**tensors, eps=EPS),
        lambda case, **tensors: reference.layer_norm(**tensors, eps=EPS),
        flops,
        bytes,
        rivals={"liger": _liger},
        applies=_applies,
    ),
)
