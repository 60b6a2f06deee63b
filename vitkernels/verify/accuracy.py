"""Outputs and gradients against fp64, PyTorch's own error the yardstick, without a false alarm.

The rule of :mod:`vitkernels.testing.compare` raises one in some hundreds of small tensors, as both errors are draws.
So a tensor that breaks it is drawn twice more, and fails where it breaks the rule in most of the three draws: a
defect of the code is in all of them. One that is beyond all luck fails at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from vitkernels.testing.compare import Verdict, judge_op
from vitkernels.verify.problems import Problem
from vitkernels.verify.results import Result

DRAWS = 3
BEYOND_LUCK = 30.0  # times PyTorch's error


def judge(
    problem: Problem,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    *,
    lay_out: Callable[[Tensor], Tensor] = lambda t: t,
    upstream: Callable[[Tensor], Tensor] = torch.randn_like,
) -> list[Verdict]:
    """Judge each output and gradient of ``problem`` in as many draws as it takes to be sure.

    Args:
        problem: What is computed.
        dtype, device: Of its inputs.
        seed: Of the first draw.
        lay_out: Gives each input another layout.
        upstream: Makes the upstream gradient for an output.
    """

    def draw(seed: int) -> list[Verdict]:
        with seeded(seed, device):
            tensors = {name: lay_out(t) for name, t in problem.draw(dtype, device).items()}
            return judge_op(
                problem.function,
                # PyTorch takes another way, in fp32, for half inputs of some layouts: then it is no yardstick.
                lambda **given: problem.reference(**{name: t.contiguous() for name, t in given.items()}),
                tensors,
                upstream=upstream,
                gain_counts=problem.op != "block",  # which is a chain of ops
            )

    return settled(draw, seed)


def settled(draw: Callable[[int], list[Verdict]], seed: int, draws: int = DRAWS) -> list[Verdict]:
    """Return the verdicts of as many draws, made from a seed each, as it takes to be sure."""
    first = draw(seed)
    if all(v.passed or v.ratio > BEYOND_LUCK for v in first):
        return first
    drawn = [first, *(draw(seed + 1000 * i) for i in range(1, draws))]
    return [_settle(verdicts) for verdicts in zip(*drawn, strict=True)]


def check_accuracy(id: str, problem: Problem, dtype: torch.dtype, device: torch.device, seed: int) -> Iterator[Result]:
    """Yield a line for each output and gradient of ``problem``."""
    for v in judge(problem, dtype, device, seed):
        yield Result(id, v.name, "passed" if v.passed else "failed", v.detail, v.ratio)


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw from ``seed`` within, and leave the generators as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _settle(verdicts: tuple[Verdict, ...]) -> Verdict:
    """Return the first verdict of the side that most are on."""
    failed = [v for v in verdicts if not v.passed]
    lost = len(failed) > len(verdicts) // 2 or any(v.ratio > BEYOND_LUCK for v in failed)
    return failed[0] if lost else next(v for v in verdicts if v.passed)
