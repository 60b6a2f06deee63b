"""Attention over long rows on Hopper: the Gluon kernel against fp64, and what ptxas makes of the products."""

import subprocess
import sys

import pytest
import torch
from triton import knobs

from vitkernels import ops, reference
from vitkernels.ops import _plan
from vitkernels.testing import check_op
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


FORWARD = sys.modules["vitkernels.ops._attention.forward"]


@pytest.fixture
def launched(monkeypatch):
    """The number of queries of each launch of the Gluon kernel."""
    found = []
    launch = FORWARD.launch_hopper

    def spied(q, *arguments):
        found.append(q.shape[1])
        launch(q, *arguments)

    monkeypatch.setattr(FORWARD, "launch_hopper", spied)
    return found


def make(*shape, dtype, device):
    return torch.randn(*shape, dtype=torch.float64).to(device, dtype).requires_grad_()


@pytest.mark.parametrize(
    ("N", "D", "dtype"),
    [(577, 64, torch.bfloat16), (577, 128, torch.float16), (1025, 64, torch.float16), (1370, 64, torch.bfloat16)],
    ids=str,
)
def test_packed(N, D, dtype, device, launched):
    check_op(
        ops.attention_qkvpacked, reference.attention_qkvpacked, {"qkv": make(1, N, 3, 1, D, dtype=dtype, device=device)}
    )
    assert set(launched) == {N}


@pytest.mark.parametrize(("N_q", "N_kv"), [(512, 640), (643, 517)], ids=str)
def test_separate(N_q, N_kv, device, launched):
    lengths = {"q": N_q, "k": N_kv, "v": N_kv}
    tensors = {x: make(2, 2, n, 64, dtype=torch.bfloat16, device=device) for x, n in lengths.items()}
    check_op(ops.attention, reference.attention, tensors, options={"scale": -0.2})
    assert set(launched) == {N_q}


def test_the_next_image_does_not_leak(device, launched):
    qkv = torch.randn(2, 577, 3, 1, 64, device=device).bfloat16()
    expected = ops.attention_qkvpacked(qkv)[0]
    qkv[1] = float("nan")
    assert torch.equal(ops.attention_qkvpacked(qkv)[0], expected) and expected.isfinite().all()
    assert len(launched) == 2


def test_plans_take_other_tensors(device, launched):
    first, *others = (torch.randn(1, 577, 3, 2, 64, device=device).bfloat16() for _ in range(4))
    outputs = [ops.attention_qkvpacked(x) for x in (first, first, *others)]
    assert len(launched) == 2  # called, then recorded; the plan launches the rest
    for x, o in zip(others, outputs[2:], strict=True):
        _plan.forget()
        assert torch.equal(o, ops.attention_qkvpacked(x))


def misaligned(x):
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


@pytest.mark.parametrize("other", ["misaligned", "causal", "short", "head dim"])
def test_what_triton_keeps(other, device, launched):
    N, D = 512 - (other == "short"), 72 if other == "head dim" else 64
    qkv = torch.randn(1, N, 3, 1, D, device=device).bfloat16()
    qkv = misaligned(qkv) if other == "misaligned" else qkv
    check_op(
        ops.attention_qkvpacked, reference.attention_qkvpacked, {"qkv": qkv.requires_grad_()},
        options={"is_causal": other == "causal"},
    )  # fmt: skip
    assert not launched
