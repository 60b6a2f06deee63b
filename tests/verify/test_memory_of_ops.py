"""No op writes beyond its outputs, leaves part of them unwritten, reads what is not its own or changes an input."""

import pytest
import torch

from vitkernels.tools.verify.problems import GATED, GATED_APART, WINDOW, fp8_problems, problems
from vitkernels.tools.verify.properties import check_memory

PROBLEMS = [p for case in (WINDOW, GATED, GATED_APART) for p in problems(case) if "recompute" not in p.variant]
# One of each op, and of attention one that has a gradient more; a block is a chain of ops.
PROBLEMS = {p.op: p for p in reversed(PROBLEMS) if p.op != "block"} | {
    p.variant: p for p in PROBLEMS if p.variant in ("learned bias", "residual", "scaled")
}
PROBLEMS = [*PROBLEMS.values(), *fp8_problems(WINDOW)]


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.id)
def test_memory(problem, device):
    # In which attention and gates have kernels of their own.
    results = list(check_memory("memory", problem, torch.bfloat16, device, 0))
    assert [r for r in results if r.status != "passed"] == []
    assert {r.name for r in results} == {"guard bands", "poisoned memory", "inputs unchanged"}
