"""Attention's forward over long rows on Hopper: what ptxas makes of it."""

import subprocess

import pytest
import torch
from triton import knobs

from vitkernels.testing.cases import CASES
from vitkernels.tools.aot import trace
from vitkernels.tools.aot.build import compile_launch
from vitkernels.tools.aot.launches import launches


@pytest.mark.parametrize(
    ("case", "op"),
    [
        ("vit_large_patch14_reg4_dinov2_518", "attention"),
        ("vit_huge_patch14_clip_224", "attention"),
        ("vit_base_patch16_224", "attention_dropout"),
        ("vit_so400m_patch14_siglip_378", "attention_key_mask"),
    ],
)
def test_products_overlap(case, op, tmp_path):
    for launch in trace(launches(CASES[case], torch.bfloat16)[op], "sm_90"):
        if "_fwd_" not in launch.name:
            continue
        ptx = tmp_path / f"{launch.name}.ptx"
        ptx.write_text(compile_launch(launch).asm["ptx"])
        command = [knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", ptx, "-o", tmp_path / "out"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        assert "Used" in said and "C7515" not in said  # "wgmma.mma_async instructions are serialized due to ..."
