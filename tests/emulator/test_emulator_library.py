"""Every kernel of the library, with its real configuration at the sizes of real models: no finding.

Two programs of each launch run, the first and the last. What they compute is another file's.
"""

import re
from pathlib import Path

import pytest
import torch

from vitkernels.aot.emulate import emulate
from vitkernels.aot.launches import launches
from vitkernels.emulator.launch import LEFT_TO_PTXAS
from vitkernels.testing.cases import CASES, DTYPES

OPS = Path(__file__).parents[2] / "vitkernels" / "ops"
# Between them the cases launch every kernel, in every regime.
RUNS = [
    ("sm_90", "vit_base_patch16_224", "bf16"),
    ("sm_90", "vit_base_patch16_224", "fp32"),
    ("sm_90", "vit_tiny_patch16_224", "bf16"),
    ("sm_90", "aimv2_large_patch14_224", "bf16"),
    ("sm_90", "eva02_large_patch14_448", "bf16"),
    ("sm_90", "vit_so400m_patch14_siglip_378", "fp16"),
    ("sm_80", "vit_base_patch16_224", "bf16"),
]


def run(arch, case, dtype, seed=1):
    """Every launch of a training step's ops."""
    case = CASES[case]

    def starts(t):  # of packed images
        if t.dtype == torch.int32:
            t.copy_(torch.arange(t.numel()) * case.tokens)

    for launcher in launches(case, DTYPES[dtype]).values():
        yield from emulate(launcher, arch, programs=2, seed=seed, fill=starts)


@pytest.fixture(scope="module")
def seen():
    return set()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("wanted", RUNS, ids=" ".join)
def test_at_real_sizes(wanted, seen):
    for run_ in run(*wanted):
        seen.add(run_.kernel)
        errors = [str(e) for e in run_.errors if e.kind not in LEFT_TO_PTXAS]
        assert not errors, "\n".join(errors)
        assert run_.programs == min(2, run_.grid[0])


def test_that_was_every_kernel(seen):
    if not seen:
        pytest.skip("the test above was not run")
    sources = "".join(file.read_text() for file in OPS.rglob("*.py"))
    assert seen == set(re.findall(r"^def (_\w+_kernel)\(", sources, re.M))
