"""The code of DINOv2's and DINOv3's repositories, accelerated: the real one where it is on the path, else an imitation.

    git clone https://github.com/facebookresearch/dinov2 && git clone https://github.com/facebookresearch/dinov3
    PYTHONPATH=dinov2:dinov3 pytest tests/swap/test_dino.py

Meta publishes neither as a package, and DINOv3's licence is not this project's. (PyPI's ``dinov2`` is somebody else's
copy of April 2023, by its metadata CC BY-NC.) The modules in ``dino_stand_in/`` have the paths, classes, attributes,
results and errors of dinov2 at b8931f7 (August 2025) and dinov3 at 6876159 (July 2026), as far as these tests see them;
the constructors take the options that they set. A package on the path goes before them, as they are namespaces.
"""

import copy
import pickle
import sys
import warnings
from pathlib import Path

import pytest
import torch
from parity import assert_parity, shake
from torch import nn

from vitkernels import accelerate, explain
from vitkernels.layers import fused

sys.path.append(str(Path(__file__).parent / "dino_stand_in"))
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that xFormers is not there
    from dinov2.layers.attention import Attention, MemEffAttention
    from dinov2.layers.block import Block, NestedTensorBlock
    from dinov2.layers.patch_embed import PatchEmbed
    from dinov2.layers.swiglu_ffn import SwiGLUFFNFused
    from dinov3.layers.attention import LinearKMaskedBias
    from dinov3.layers.block import SelfAttentionBlock
    from dinov3.layers.ffn_layers import SwiGLUFFN
    from dinov3.layers.patch_embed import PatchEmbed as PatchEmbed3

SOURCE = {lib: "repository" if sys.modules[lib].__file__ else "imitation" for lib in ("dinov2", "dinov3")}


@pytest.fixture(autouse=True, params=[" and ".join(f"{v} of {k}" for k, v in SOURCE.items())])
def source(request):
    """Shows in the tests' names what they ran on."""


@pytest.fixture
def fused_calls(monkeypatch):
    calls = []
    for name in ("attention", "mlp", "block", "patch_embed"):
        original = getattr(fused, name)
        monkeypatch.setattr(fused, name, lambda *a, f=original, n=name, **k: (calls.append(n), f(*a, **k))[1])
    return calls


def dinov2(block=NestedTensorBlock, flatten=True, **more) -> nn.Module:
    embed = PatchEmbed(img_size=32, patch_size=16, embed_dim=32, flatten_embedding=flatten)
    options = {"num_heads": 2, "qkv_bias": True, "attn_class": MemEffAttention, "init_values": 0.5, **more}
    return shake(nn.Sequential(embed, block(dim=32, **options), nn.LayerNorm(32)))


class DINOv3(nn.Module):
    """As its model calls it: a class token, patches in a map, one pair of tables for all blocks."""

    def __init__(self, **more):
        super().__init__()
        self.patch_embed = PatchEmbed3(img_size=32, patch_size=16, embed_dim=32, flatten_embedding=False)
        self.cls_token = nn.Parameter(torch.zeros(1, 2, 32))
        self.blocks = nn.ModuleList([SelfAttentionBlock(32, 2, **{"init_values": 0.5, "qkv_bias": True, **more})])
        angles = torch.randn(4, 8).tile(2)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
        nn.init.ones_(self.blocks[0].ls1.gamma)  # the repository leaves that to init_weights
        nn.init.ones_(self.blocks[0].ls2.gamma)
        shake(self)

    def forward(self, x):
        x = self.patch_embed(x).flatten(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x, (self.sin, self.cos))
        return x


@pytest.fixture
def images(device):
    return torch.randn(2, 3, 32, 32, device=device)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"block": Block, "attn_class": Attention, "init_values": None},
        {"ffn_layer": SwiGLUFFNFused},
    ],
    ids=["nested", "plain", "swiglu"],
)
def test_dinov2(options, images, device, fused_calls):
    report = assert_parity(dinov2(**options).to(device), images)
    assert [s.module for s in report.swapped][:2] == ["0", "1"]
    assert not report.kept
    assert fused_calls.count("block") in (1, 3), "of one draw, or of three"


@pytest.mark.parametrize(
    "options",
    [{}, {"ffn_layer": SwiGLUFFN, "qkv_bias": False}, {"mask_k_bias": True}],
    ids=["mlp", "swiglu", "masked"],
)
def test_dinov3(options, images, device, fused_calls):
    model = DINOv3(**options).to(device)
    if options.get("mask_k_bias"):
        model.blocks[0].attn.qkv.bias_mask.copy_(torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(32))
    report = assert_parity(model, images)
    assert {"blocks.0", "blocks.0.attn", "blocks.0.mlp", "patch_embed"} <= {s.module for s in report.swapped}
    assert fused_calls.count("block") in (1, 3), "of one draw, or of three"


def test_the_mask_of_the_keys_bias_is_nan_until_a_checkpoint_is_loaded(images, device):
    model = DINOv3(mask_k_bias=True).to(device)
    accelerate(model)
    assert isinstance(model.blocks[0].attn.qkv, LinearKMaskedBias)
    assert model(images).isnan().all()


def test_bf16(images, device, computed_by_pytorch):
    assert_parity(dinov2().to(device, torch.bfloat16), images.bfloat16(), gain_counts=False)
    assert_parity(DINOv3().to(device, torch.bfloat16), images.bfloat16(), gain_counts=False)


def test_maps_of_patches(images, device):
    embed = dinov2(flatten=False).to(device)[0]
    expected = embed(images)
    accelerate(embed)
    torch.testing.assert_close(embed(images), expected)
    with pytest.raises(AssertionError):
        embed(images[..., :31])


@pytest.mark.parametrize("library", ["dinov2", "dinov3"])
def test_dropped_samples_are_the_originals(library, images, device, fused_calls):
    model = (dinov2(drop_path=0.5) if library == "dinov2" else DINOv3(drop_path=0.5)).to(device).train()
    torch.manual_seed(1)
    expected = model(images)
    accelerate(model)
    torch.manual_seed(1)
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)
    assert "block" not in fused_calls
    assert "mlp" in fused_calls, "what the block calls is fused all the same"
    model.eval()(images)
    assert "block" in fused_calls


def test_lists(images, device, fused_calls):
    block = dinov2().to(device)[1]
    accelerate(block)
    with pytest.raises(AssertionError, match="xFormers is required for using nested tensors"):
        block([torch.randn(1, 5, 32, device=device)])
    model = DINOv3().to(device)
    block, rope = model.blocks[0], (model.sin, model.cos)
    tokens = [torch.randn(2, 6, 32, device=device), torch.randn(1, 5, 32, device=device)]
    expected = block(tokens, [rope, rope])
    accelerate(model)
    torch.testing.assert_close(block(tokens, [rope, rope]), expected, rtol=1e-4, atol=1e-4)
    assert fused_calls.count("mlp") == 2


def test_causal_attention_is_the_originals(device):
    attn = shake(Attention(32, 2)).to(device)
    x = torch.randn(2, 5, 32, device=device)
    expected = attn(x, is_causal=True)
    accelerate(attn)
    assert torch.equal(attn(x, is_causal=True), expected)


def dropping(kind, rate, of_2023, device) -> nn.Module:
    """An attention that drops its weights; in the code of 2023 the rate was that of an nn.Dropout."""
    attn = shake(kind(32, 2, attn_drop=rate))
    if of_2023 and not isinstance(attn.attn_drop, nn.Module):
        del attn.attn_drop
        attn.attn_drop = nn.Dropout(rate)
    return attn.to(device)


@pytest.mark.parametrize(
    ("kind", "of_2023"), [(Attention, True), (MemEffAttention, False)], ids=["a module's rate", "a number"]
)
def test_attention_dropout(kind, of_2023, device, fused_calls):
    """The masks are another generator's than PyTorch's: the mean over many of them is what must agree."""
    attn = dropping(kind, 0.4, of_2023, device)
    x = torch.randn(1, 5, 32, device=device)
    with torch.no_grad():
        expected = attn.eval()(x)
        accelerate(attn, strict=True)
        torch.testing.assert_close(attn(x), expected, rtol=1e-4, atol=1e-4)
        attn.train()
        torch.manual_seed(1)
        dropped = attn(x.expand(64, -1, -1))
        torch.manual_seed(1)
        assert torch.equal(attn(x.expand(64, -1, -1)), dropped)
    assert fused_calls == ["attention"] * 3
    deviation = dropped.std(0) / len(dropped) ** 0.5
    assert deviation.min() > 0
    assert ((dropped.mean(0) - expected) / deviation).square().mean() < 2.0


def test_a_whole_block_drops_attention_weights(device, fused_calls):
    block, x = dinov2(attn_drop=0.4)[1].to(device), torch.randn(2, 5, 32, device=device)
    expected = block.eval()(x)
    accelerate(block, strict=True)
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-4)
    assert (block.train()(x) - expected).abs().max() > 1e-2
    assert fused_calls.count("block") == 2


def test_xformers_is_told_of_no_attention_dropout(device, monkeypatch):
    """Where xFormers attends in the original, nothing is dropped, whatever the rate."""
    attn = dropping(MemEffAttention, 0.4, False, device)
    x = torch.randn(2, 5, 32, device=device)
    with torch.no_grad():
        expected = attn.eval()(x)
        accelerate(attn)
        monkeypatch.setattr(sys.modules[Attention.__module__], "XFORMERS_AVAILABLE", True, raising=False)
        torch.testing.assert_close(attn.train()(x), expected, rtol=1e-4, atol=1e-4)


def test_kept_with_a_reason():
    attn = dropping(Attention, 0.4, True, "cpu")
    attn.attn_drop.register_forward_hook(lambda *_: None)
    assert explain(attn).kept[0].reason == "a hook on attn_drop, which fusion would not call"
    block = dinov2()[1]
    block.attn.register_module("gate", nn.Linear(2, 2))
    assert "a child 'gate' (Linear) that is unknown" in {k.module: k.reason for k in explain(block).kept}["attn"]
    block = DINOv3().blocks[0]
    block.attn.qkv = nn.Bilinear(2, 2, 2)
    assert "qkv is a Bilinear" in {k.module: k.reason for k in explain(block).kept}["attn"]


def test_copies_pickles_and_compiles(images, device):
    for model in (dinov2(), DINOv3()):
        model.to(device).eval()
        accelerate(model)
        with torch.no_grad():
            expected = model(images)
            block = model[1] if isinstance(model, nn.Sequential) else model.blocks[0]
            assert type(pickle.loads(pickle.dumps(block))) is type(block)
            assert torch.equal(copy.deepcopy(model)(images), expected)
            compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
            torch.testing.assert_close(compiled(images), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(SOURCE["dinov2"] == "imitation", reason="it takes facebookresearch/dinov2 on the path")
@pytest.mark.parametrize("ffn", ["mlp", "swiglufused"])
def test_whole_dinov2_of_the_repository(ffn, images, device):
    from dinov2.models.vision_transformer import vit_small

    model = vit_small(patch_size=16, img_size=32, init_values=0.5, num_register_tokens=4, ffn_layer=ffn, block_chunks=0)
    model.blocks = model.blocks[:2]
    report = assert_parity(shake(model).to(device), images)
    assert not [k for k in report.kept if k.known]


@pytest.mark.skipif(SOURCE["dinov3"] == "imitation", reason="it takes facebookresearch/dinov3 on the path")
def test_whole_dinov3_of_the_repository(images, device):
    from dinov3.models.vision_transformer import vit_small

    model = vit_small(
        patch_size=16, img_size=32, layerscale_init=0.5, n_storage_tokens=4, mask_k_bias=True,
        norm_layer="layernormbf16", pos_embed_rope_dtype="fp32",
    )  # fmt: skip
    model.init_weights()
    model.blocks = model.blocks[:2]
    for block in model.blocks:
        block.attn.qkv.bias_mask.copy_(torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(384))
    report = assert_parity(shake(model).to(device), images)
    assert not [k for k in report.kept if k.known]
