"""Compare outputs and gradients with fp64, PyTorch's own error the yardstick, without false alarms.

Both errors are random, so by chance one in some hundreds of small tensors breaks the rule of
:mod:`vitkernels.testing.compare`. Such a tensor is drawn twice more, and fails if it breaks the rule in most of the
three draws: a defect of the code shows in all. An error that luck cannot explain fails at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from vitkernels.testing.compare import Verdict, judge_op
from vitkernels.tools.verify.problems import Problem
from vitkernels.tools.verify.results import Result

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
    """Judge each output and gradient of ``problem``, with more draws if the first one fails.

    Args:
        problem: The op, its inputs and its reference.
        dtype, device: Dtype and device of the inputs.
        seed: Seed of the first draw.
        lay_out: Changes the layout of each input.
        upstream: Makes the upstream gradient for an output.
    """

    def draw(seed: int) -> list[Verdict]:
        with seeded(seed, device):
            tensors = {name: lay_out(t) for name, t in problem.draw(dtype, device).items()}
            return judge_op(
                problem.function,
                # For half-precision inputs of some layouts PyTorch computes in fp32, which would be no fair yardstick.
                lambda **given: problem.reference(**{name: t.contiguous() for name, t in given.items()}),
                tensors,
                upstream=upstream,
                gain_counts=problem.op != "block",  # a block is a chain of ops
            )

    return settled(draw, seed)


def settled(draw: Callable[[int], list[Verdict]], seed: int, draws: int = DRAWS) -> list[Verdict]:
    """Return the first draw's verdicts if luck cannot explain its failures, else those of most of ``draws`` draws."""
    first = draw(seed)
    if all(v.passed or v.ratio > BEYOND_LUCK for v in first):
        return first
    drawn = [first, *(draw(seed + 1000 * i) for i in range(1, draws))]
    return [_settle(verdicts) for verdicts in zip(*drawn, strict=True)]


def check_accuracy(id: str, problem: Problem, dtype: torch.dtype, device: torch.device, seed: int) -> Iterator[Result]:
    """Yield a result for each output and gradient of ``problem``."""
    for v in judge(problem, dtype, device, seed):
        yield Result(id, v.name, "passed" if v.passed else "failed", v.detail, v.ratio)


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed PyTorch's generators with ``seed`` in this block, and restore their states afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _settle(verdicts: tuple[Verdict, ...]) -> Verdict:
    """Return the first failed verdict if most failed or one is beyond luck, else the first passed one."""
    failed = [v for v in verdicts if not v.passed]
    lost = len(failed) > len(verdicts) // 2 or any(v.ratio > BEYOND_LUCK for v in failed)
    return failed[0] if lost else next(v for v in verdicts if v.passed)
