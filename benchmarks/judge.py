"""Decide whether a result is right before it is timed: its error against fp64, compared with PyTorch's error."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from vitkernels.testing.compare import check

MODEL_LIMIT = 1.5


@dataclasses.dataclass(frozen=True)
class Judgement:
    """Whether a result is right, why not, and its largest error, relative to the truth and as a ratio to PyTorch's."""

    right: bool
    reason: str
    error: float
    ratio: float


def judge_op(got: Mapping[str, Tensor], yardstick: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> Judgement:
    """Judge each output and gradient by the rule of ``vitkernels/testing/compare.py``."""
    verdicts = [check(name, got[name], yardstick[name], truth[name]) for name in truth]
    wrong = [f"{v.name}: {v.detail}" for v in verdicts if not v.passed]
    errors = [_rms(got[n].double() - truth[n]) / max(_rms(truth[n]), 1e-300) for n in truth if _alike(got[n], truth[n])]
    return Judgement(not wrong, "; ".join(wrong), max(errors, default=0.0), max(v.ratio for v in verdicts))


def judge_model(got: Mapping[str, Tensor], yardstick: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> Judgement:
    """Judge a whole network: RMS errors of the output and of all gradients together are at most 1.5 × PyTorch's.

    Gradients are judged together, as one early rounding may change a single small gradient a lot, in PyTorch too.
    """
    parts = {"output": [n for n in truth if n == "output"], "gradients": [n for n in truth if n != "output"]}
    wrong, errors, ratios = [], [], []
    for part, names in parts.items():
        if not names:
            continue
        different = [n for n in names if not _alike(got[n], truth[n])]
        if different:
            return Judgement(False, f"{different[0]} has another shape than PyTorch's, or is not finite", 0.0, 0.0)
        size = max(_together([truth[n] for n in names]), 1e-300)
        error = _together([got[n].double() - truth[n] for n in names])
        torch_error = _together([yardstick[n].double() - truth[n] for n in names])
        rounding = _together([truth[n].to(yardstick[n].dtype).double() - truth[n] for n in names])
        limit = MODEL_LIMIT * max(torch_error, rounding)
        if not error <= limit:
            wrong.append(f"{part}: RMS error {error:.3g}, limit {limit:.3g}")
        errors.append(error / size)
        ratios.append(error / max(torch_error, rounding, 1e-300))
    return Judgement(not wrong, "; ".join(wrong), max(errors), max(ratios))


def _alike(got: Tensor, truth: Tensor) -> bool:
    return got.shape == truth.shape and bool(got.isfinite().all())


def _rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item() if x.numel() else 0.0


def _together(tensors: list[Tensor]) -> float:
    power = sum(t.double().square().sum().item() for t in tensors)
    return (power / max(1, sum(t.numel() for t in tensors))) ** 0.5
