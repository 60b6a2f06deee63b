"""Every kernel of the library, with its real configuration at the sizes of real models: no finding.

Two programs of each launch run, the first and the last. What they compute is another file's.
"""

import re
from pathlib import Path

import pytest
import torch

from vitkernels.testing.cases import CASES
from vitkernels.tools.aot import trace
from vitkernels.tools.aot.emulate import emulate
from vitkernels.tools.aot.launches import launches

OPS = Path(__file__).parents[2] / "vitkernels" / "ops"
# Between them they launch every kernel; `vitkernels inspect --run` runs each at every case.
OPS_OF_CASES = [
    ("vit_tiny_patch16_224", "linear_activation"),
    ("vit_tiny_patch16_224", "mlp"),
    ("vit_tiny_patch16_224", "attention"),
    ("vit_tiny_patch16_224", "attention_windows"),
    ("vit_tiny_patch16_224", "attention_frozen_queries"),
    ("vit_tiny_patch16_224", "patch_embed"),
    ("vit_tiny_patch16_224", "block_fp8"),
    ("vit_base_patch16_224", "attention_biased"),
    ("vit_base_patch16_224", "attention_dropout"),
    ("vit_base_patch16_224", "attention_swin"),
    ("vit_base_patch16_224", "attention_swin_wide"),
    ("vit_base_patch16_224", "attention_decomposed_windows"),
    ("vit_large_patch14_reg4_dinov2_518", "attention"),
    ("eva02_large_patch14_448", "swiglu_mlp"),
    ("eva02_large_patch14_448", "attention_rope_interleaved"),
    ("aimv2_large_patch14_224", "swiglu_mlp"),
    ("deit3_base_patch16_224", "mlp_drop_path"),
    ("deit3_base_patch16_224", "cast"),
]
RUNS = [("sm_90", *which) for which in OPS_OF_CASES]
RUNS += [("sm_80", *which) for which in OPS_OF_CASES if which[1] in ("mlp", "attention_dropout", "patch_embed")]


@pytest.mark.parametrize(("arch", "case", "op"), RUNS)
def test_at_real_sizes(arch, case, op):
    def starts(t):  # of packed images
        if t.dtype == torch.int32:
            t.copy_(torch.arange(t.numel()) * CASES[case].tokens)

    runs = emulate(launches(CASES[case], torch.bfloat16)[op], arch, programs=2, seed=1, fill=starts)
    for run in runs:
        assert not run.errors, "\n".join(map(str, run.errors))
        assert run.programs == min(2, run.grid[0])
    assert runs


def test_that_is_every_kernel():
    launched = {
        launch.name for arch, case, op in RUNS for launch in trace(launches(CASES[case], torch.bfloat16)[op], arch)
    }
    sources = "".join(file.read_text() for file in OPS.rglob("*.py"))
    assert launched == set(re.findall(r"^def (_\w+_kernel)\(", sources, re.M))
