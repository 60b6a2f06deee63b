"""LayerNorm and RMSNorm, alone and as residual + LayerScale + norm. M rows (batch · tokens) of C channels."""

from __future__ import annotations

from benchmarks.ops import bench_of, by_mode, require

EPS = 1e-6


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


def rms_flops(case, mode):
    """Forward has one sum and the scaling; backward one mean and two more products."""
    return by_mode(mode, 4 * _elements(case), 9 * _elements(case))


def _liger(device):
    norm = require("liger_kernel.ops.layer_norm", device).LigerLayerNormFunction
    return lambda case, x, weight, bias: norm.apply(x, weight, bias, EPS)


def _liger_rms(device):
    norm = require("liger_kernel.ops.rms_norm", device).LigerRMSNormFunction
    return lambda case, x, weight: norm.apply(x, weight, EPS, 0.0, "gemma", False)


BENCHES = (
    bench_of("add_layer_norm", flops, bytes_with_residual),
    bench_of("layer_norm", flops, bytes, {"liger": _liger}),
    bench_of("rms_norm", rms_flops, bytes, {"liger": _liger_rms}),
    bench_of("add_rms_norm", rms_flops, bytes_with_residual),
)
