"""RMSNorm, and residual + LayerScale + RMSNorm. M rows (batch · tokens) of C channels."""

from __future__ import annotations

from benchmarks.ops import OpBench, by_mode, require
from benchmarks.ops.bench_layer_norm import EPS, bytes, bytes_with_residual, inputs_without_bias, with_residual
from vitkernels import ops, reference


def flops(case, mode):
    """Forward has one sum and the scaling; backward one mean and two more products."""
    elements = case.batch * case.tokens * case.channels
    return by_mode(mode, 4 * elements, 9 * elements)


def _liger(device):
    norm = require("liger_kernel.ops.rms_norm", device).LigerRMSNormFunction
    return lambda case, x, weight: norm.apply(x, weight, EPS, 0.0, "gemma", False)


def _applies(case):
    return case.norm == "rms_norm"


BENCHES = (
    OpBench(
        "rms_norm",
        inputs_without_bias,
        lambda case, **tensors: ops.rms_norm(**tensors, eps=EPS),
        lambda case, **tensors: reference.rms_norm(**tensors, eps=EPS),
        flops,
        bytes,
        rivals={"liger": _liger},
        applies=_applies,
    ),
    OpBench(
        "add_rms_norm",
        with_residual(inputs_without_bias),
        lambda case, **tensors: ops.add_rms_norm(**tensors, eps=EPS),
        lambda case, **tensors: reference.add_rms_norm(**tensors, eps=EPS),
        flops,
        bytes_with_residual,
        applies=_applies,
    ),
)
