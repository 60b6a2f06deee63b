"""open_clip's own towers, accelerated."""

import copy
import pickle

import pytest
import torch
from parity import assert_parity, shake
from torch import nn

from vitkernels import accelerate, explain
from vitkernels.layers import fused

open_clip = pytest.importorskip("open_clip")
from open_clip.transformer import VisionTransformer  # noqa: E402


def tower(**more) -> nn.Module:
    options = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 2, "heads": 2, "mlp_ratio": 4.0}
    return shake(VisionTransformer(**{**options, "output_dim": 32, **more}))


@pytest.fixture
def images(device):
    return torch.randn(2, 3, 32, 32, device=device)


@pytest.fixture
def fused_calls(monkeypatch):
    calls = []
    for name in ("block", "patch_embed"):
        original = getattr(fused, name)
        monkeypatch.setattr(fused, name, lambda *a, f=original, n=name, **k: (calls.append(n), f(*a, **k))[1])
    return calls


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"act_layer": open_clip.transformer.QuickGELU, "ls_init_value": 0.5},
        {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True, "norm_layer": nn.LayerNorm},
        {"attentional_pool": True, "attn_pooler_heads": 2, "layers": 1},
    ],
    ids=["clip", "quick gelu and layer scale", "average", "coca"],
)
def test_fp32(options, images, device, fused_calls):
    report = assert_parity(tower(**options).to(device), images)
    assert report.swapped[0].was == "VisionTransformer"
    assert not [k for k in report.kept if k.known]
    once = ["patch_embed"] + ["block"] * options.get("layers", 2)
    assert fused_calls in (once, 3 * once), "of one draw, or of three"


def test_bf16(images, device, computed_by_pytorch):
    assert_parity(tower(layers=1).to(device, torch.bfloat16), images.bfloat16(), gain_counts=False)


def test_whole_clip_with_its_masked_text_tower(images, device, fused_calls):
    clip = open_clip.model.CLIP(
        8,
        open_clip.CLIPVisionCfg(layers=1, width=32, head_width=16, patch_size=16, image_size=32),
        open_clip.CLIPTextCfg(context_length=6, vocab_size=50, width=32, heads=2, layers=2),
        quick_gelu=True,
    )
    shake(clip).to(device).eval()
    text = torch.randint(0, 50, (2, 6), device=device)
    with torch.no_grad():
        expected = clip(images, text)
        accelerate(clip)
        assert type(clip.transformer.resblocks[0]).__qualname__ == "FusedResidualAttentionBlock"
        torch.testing.assert_close(clip(images, text), expected, rtol=1e-4, atol=1e-4)
    assert fused_calls.count("block") == 3, "one of images and two, with a causal mask, of text"


def test_autocast_keeps_its_dtypes(images, device, computed_by_pytorch):
    model = tower().to(device)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        expected = model(images)
        tokens = model._embeds(images)
        accelerate(model)
        assert model._embeds(images).dtype == tokens.dtype
        actual = model(images)
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=0.1, atol=0.1)


def test_cross_attention_is_the_originals(device):
    block = shake(open_clip.transformer.ResidualAttentionBlock(32, 2, is_cross_attention=True)).to(device)
    report = explain(block)
    assert "a child 'ln_1_kv' (LayerNorm) that is unknown" in {k.module: k.reason for k in report.kept}[""]


def test_kept_with_a_reason():
    model = tower()
    first, second = model.transformer.resblocks
    first.mlp.append(nn.Dropout())
    second.attn = nn.MultiheadAttention(32, 2)
    kept = {k.module: k.reason for k in explain(model).kept}
    assert kept["transformer.resblocks.0"] == "its mlp has 4 layers, not c_fc, gelu and c_proj alone"
    assert "batch_first=False" in kept["transformer.resblocks.1"]
    custom = tower(block_type="custom")
    assert "Attention" in {k.cls for k in explain(custom).kept}
    hooked = tower()
    hooked.transformer.resblocks[0].mlp.c_fc.register_forward_hook(lambda *_: None)
    kept = {k.module: k.reason for k in explain(hooked).kept}
    assert "a hook on mlp.c_fc" in kept["transformer.resblocks.0"]
    assert "transformer.resblocks.1.mlp.c_fc" not in kept, "what a block reads is in neither list"


def test_copies_pickles_and_compiles(images, device):
    model = tower().to(device).eval()
    accelerate(model)
    with torch.no_grad():
        expected = model(images)
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert type(copied) is type(model)
            assert torch.equal(copied(images), expected)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(images), expected, rtol=1e-4, atol=1e-4)
