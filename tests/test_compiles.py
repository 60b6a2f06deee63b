"""Every kernel compiles for real architectures, without a GPU: what the interpreter cannot tell."""

import json
import os
import subprocess
import sys

import pytest

# Compiling needs a process without the interpreter.
SCRIPT = """
import dataclasses, json, sys, torch
from vitkernels.aot import TARGETS, compile_launches, launches
from vitkernels.testing.cases import CASES
target, case, dtype = sys.argv[1:]
print(json.dumps([
    [op, *[dataclasses.asdict(report) for report in compile_launches(launch, TARGETS[target])]]
    for op, launch in launches(CASES[case], getattr(torch, dtype)).items()
]))
"""
KERNELS = {
    "_layer_norm_fwd_kernel", "_layer_norm_bwd_kernel", "_product_kernel", "_product_dact_kernel",
    "_activation_bwd_kernel", "_attention_fwd_kernel", "_attention_bwd_delta_kernel", "_attention_bwd_dkv_kernel",
    "_attention_bwd_dq_kernel", "_patch_embed_fwd_kernel", "_patch_embed_bwd_images_kernel",
    "_patch_embed_bwd_weight_kernel",
}  # fmt: skip
PRODUCTS = {k for k in KERNELS if not k.startswith("_layer_norm") and k not in (
    "_activation_bwd_kernel", "_attention_bwd_delta_kernel")}  # fmt: skip


def compile_for(target, case, dtype):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, target, case, dtype], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return [report for _, *reports in json.loads(run.stdout) for report in reports]


@pytest.mark.parametrize(
    ("target", "case", "dtype"),
    [
        ("sm_90", "deit3_base_patch16_224", "bfloat16"),
        ("sm_90", "vit_so400m_patch14_siglip_378", "float16"),
        ("sm_80", "deit3_base_patch16_224", "bfloat16"),
        ("sm_120", "deit3_base_patch16_224", "bfloat16"),
        ("gfx942", "deit3_base_patch16_224", "bfloat16"),
    ],
)
def test_kernels_compile(target, case, dtype):
    reports = compile_for(target, case, dtype)
    assert {r["kernel"] for r in reports} == KERNELS
    shared = {"sm_80": 163, "sm_90": 227, "sm_120": 99, "gfx942": 64}[target] << 10
    for r in reports:
        assert r["shared_bytes"] <= shared, r
        assert r["atomics"] == 0, r
        assert not r["tf32"], r
        if target == "sm_90":
            assert r["spilled"] == 0, r
        if r["kernel"] in PRODUCTS:
            assert r["wgmma" if target == "sm_90" else "mma"] > 0, r


def test_the_interpreter_cannot_compile():
    from vitkernels.aot import TARGETS, compile_launches
    from vitkernels.ops._triton import INTERPRETED

    if not INTERPRETED:
        pytest.skip("kernels are compiled in this process")
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"):
        compile_launches(lambda: None, TARGETS["sm_90"])
