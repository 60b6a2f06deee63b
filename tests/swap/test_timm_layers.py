"""timm's layers in the forms that few of its models use, each against the original by the error rule."""

import copy
from functools import partial

import pytest
import torch
from parity import judge, no_call_of
from torch import nn

from vitkernels import accelerate, ops
from vitkernels.testing.sums import summed_alike

timm = pytest.importorskip("timm")
from timm.layers import (  # noqa: E402
    Attention,
    AttentionRope,
    GluMlp,
    LayerNorm,
    Mlp,
    RmsNorm,
    SwiGLU,
    SwiGLUPacked,
)
from timm.models.eva import EvaAttention, EvaBlock  # noqa: E402

pytestmark = pytest.mark.usefixtures("computed_by_pytorch")  # the ops are other tests'

C, N = 32, 7
MODULES = {
    "rms norm": lambda: RmsNorm(C),
    "attention, gated": lambda: Attention(C, 2, gated=True, qkv_bias=True),
    "attention, wider than its input": lambda: Attention(C, 4, attn_head_dim=16),
    "attention, qk norm": lambda: Attention(C, 2, qk_norm=True, norm_layer=RmsNorm, scale_norm=True),
    "mlp, normed": lambda: Mlp(C, 128, norm_layer=RmsNorm, act_layer=nn.SiLU),
    "glu, gate last": lambda: GluMlp(C, 256, act_layer=nn.GELU),
    "swiglu packed, rms norm": lambda: SwiGLUPacked(C, 170, norm_layer=RmsNorm),
    "swiglu, rms norm": lambda: SwiGLU(C, 85, norm_layer=RmsNorm),
    "swiglu, layer norm": lambda: SwiGLU(C, 85, norm_layer=LayerNorm, bias=False),
}
ROTARY = {
    "grouped, gated": partial(AttentionRope, qkv_fused=False, num_kv_heads=1, gated=True, num_prefix_tokens=2),
    "normed": partial(AttentionRope, qk_norm=True, scale_norm=True, norm_layer=LayerNorm, rotate_half=True),
    "eva, separate bias": partial(EvaAttention, qkv_bias_separate=True, scale_norm=False),
    "eva, normed": partial(EvaAttention, qkv_fused=False, qk_norm=True, norm_layer=LayerNorm, gated=True),
}
TABLES = {"one": (), "a head's own": (2,), "an image's own": (2, 1), "both": (2, 2)}


def angles(*shape: int, device: torch.device) -> torch.Tensor:
    """A table of random turns in timm's order, sines and cosines side by side."""
    turns = torch.randn(shape, device=device)
    return torch.cat([turns.sin(), turns.cos()], -1)


def assert_parity(module: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    """Compare the output and every gradient, those of floating inputs included."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    upstream = torch.randn_like(module(**inputs))

    def run(module, inputs, dtype):
        leaves = {k: t.to(dtype, copy=True).requires_grad_() if t.is_floating_point() else t for k, t in inputs.items()}
        module.zero_grad()
        y = module(**leaves)
        y.backward(upstream.to(dtype))
        grads = {**dict(module.named_parameters()), **leaves}
        return {"y": y.detach()} | {f"d{k}": t.grad.clone() for k, t in grads.items() if t.requires_grad}

    plain, wide = copy.deepcopy(module), copy.deepcopy(module).double()
    report = accelerate(module)
    assert "" in {entry.module for entry in report.swapped}, report

    def draw(seed):
        given = {**inputs, "x": torch.randn_like(inputs["x"])}
        with summed_alike(upstream):
            yardstick = run(plain, given, torch.float32)
        with no_call_of(type(module).__mro__[1].forward):
            actual = run(module, given, torch.float32)
        return actual, yardstick, run(wide, given, torch.float64)

    judge(draw)


@pytest.mark.parametrize("name", MODULES)
def test_layers(name, device):
    assert_parity(MODULES[name]().to(device), {"x": torch.randn(2, N, C, device=device)})


@pytest.mark.parametrize("name", ROTARY)
def test_rotary_attention(name, device):
    attn = ROTARY[name](C, 2).to(device)
    table = angles(N - attn.num_prefix_tokens, C // 2, device=device)
    assert_parity(attn, {"x": torch.randn(2, N, C, device=device), "rope": table})


@pytest.mark.parametrize("form", TABLES)
@pytest.mark.parametrize("half", [False, True])
def test_rotary_tables(form, half, device):
    """As timm hands them over: (N, 2D), (H, N, 2D), (B, 1, N, 2D) or (B, H, N, 2D), with and without a mask."""
    attn = EvaAttention(C, 2, rotate_half=half, scale_norm=False).to(device)
    table = angles(*TABLES[form], N - 1, C // 2, device=device)
    mask = {"attn_mask": torch.randn(2, 1, N, N, device=device)} if half else {}
    assert_parity(attn, {"x": torch.randn(2, N, C, device=device), "rope": table} | mask)


def test_mlp_of_pictures(device):
    """MLPs come with any leading dims, NHWC in many of timm's models."""
    assert_parity(Mlp(C, 128).to(device), {"x": torch.randn(1, 2, 5, C, device=device)})


def test_a_table_of_another_form_is_left_to_timm(device):
    attn = AttentionRope(C, 2, num_prefix_tokens=0).to(device)
    x, table = torch.randn(2, N, C, device=device), torch.randn(1, C, device=device)  # timm broadcasts it
    with torch.no_grad():
        expected = attn(x, rope=table)
        accelerate(attn)
        assert torch.equal(attn(x, rope=table), expected)


def test_a_mask_and_causality_at_once_are_left_to_timm(device):
    """What both mean together depends on the release of PyTorch."""
    attn = Attention(C, 2).to(device)
    x, mask = torch.randn(2, N, C, device=device), torch.randn(N, N, device=device)

    def run():
        try:
            return attn(x, attn_mask=mask, is_causal=True)
        except RuntimeError as error:
            return str(error)

    with torch.no_grad():
        expected = run()
        accelerate(attn)
        found = run()
    assert found == expected if isinstance(expected, str) else torch.equal(found, expected)


def test_scale_counts_where_timm_lets_it_count(device):
    x = torch.randn(2, N, C, device=device)
    with torch.no_grad():
        for fused_attn in (True, False):
            attn = Attention(C, 2).to(device)
            attn.qkv.weight.mul_(5)
            attn.scale, attn.fused_attn = 3.0, fused_attn
            expected = attn(x)
            accelerate(attn)
            torch.testing.assert_close(attn(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("child", ["q_proj", "k_norm", "gate", "proj"])
def test_hooks_on_the_parts_of_rotary_attention_fire(child, device):
    block = EvaBlock(C, 2, qkv_fused=False, qk_norm=True, gated_attn=True).to(device)
    x = torch.randn(2, N, C, device=device)
    with torch.no_grad():
        expected = block(x)
        accelerate(block)
        seen = []
        block.attn.get_submodule(child).register_forward_hook(lambda *_: seen.append(child))
        torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-4)
    assert seen == [child]
    kept = {entry.module for entry in accelerate(block).kept if entry.known}
    assert kept == (set() if child == "gate" else {"", "attn"}), "the gate is called as ever"


def test_what_is_unknown_of_rotary_attention_is_kept(device):
    for name, value in (("sink", 3), ("adapter", nn.Linear(C, C)), ("bias", nn.Parameter(torch.ones(C)))):
        block = EvaBlock(C, 2).to(device)
        setattr(block.attn, name, value)
        kept = {entry.module: entry.reason for entry in accelerate(block).kept if entry.known}
        assert name in kept[""]
        assert name in kept["attn"]
    assert type(block) is EvaBlock


def test_one_op_where_the_block_is_plain(device, monkeypatch):
    """EVA's block without RoPE is plain too, its bias in three parts put together."""
    calls = []
    whole = ops.block
    monkeypatch.setattr(ops, "block", lambda *a, **k: calls.append(1) or whole(*a, **k))
    x = torch.randn(2, N, C, device=device)
    with torch.no_grad():
        for block, rope in ((EvaBlock(C, 2, init_values=0.5), None), (EvaBlock(C, 2), torch.randn(N - 1, C))):
            block.to(device)
            rope = None if rope is None else rope.to(device)
            expected = block(x, rope=rope)
            accelerate(block)
            torch.testing.assert_close(block(x, rope=rope), expected, rtol=1e-4, atol=1e-4)
    assert calls == [1]
