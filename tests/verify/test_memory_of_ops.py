"""No op writes beyond its outputs, leaves part of them unwritten, reads what is not its own or changes an input."""

import pytest
import torch

from vitkernels.verify.problems import GATED, GATED_APART, WINDOW, problems
from vitkernels.verify.properties import check_memory

PROBLEMS = [p for p in problems(WINDOW) if p.op != "block"]
PROBLEMS += [p for case in (GATED, GATED_APART) for p in problems(case) if p.op == "swiglu_mlp"]


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.id)
def test_memory(problem, device):
    results = list(check_memory("memory", problem, torch.float32, device, 0))
    assert [r for r in results if r.status != "passed"] == []
    assert {r.name for r in results} == {"guard bands", "poisoned memory", "inputs unchanged"}
