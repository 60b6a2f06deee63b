"""attention_maps: of accelerated models and of others, held against weights computed by hand."""

import copy

import pytest
import timm
import torch
from torch import nn

import vitkernels
from vitkernels import layers


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 3}
    return timm.models.VisionTransformer(**kwargs, qk_norm=True, init_values=0.5).eval()


def by_hand(attn, x):
    q, k, _ = attn.qkv(x).reshape(*x.shape[:2], 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    return (attn.scale * attn.q_norm(q) @ attn.k_norm(k).transpose(-1, -2)).softmax(-1)


def test_maps_of_a_plain_and_of_an_accelerated_model(model):
    images = torch.randn(2, 3, 32, 32)
    plain = vitkernels.attention_maps(model, images)
    assert list(plain) == ["blocks.0.attn", "blocks.1.attn"]
    block = model.blocks[0]
    tokens = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
    torch.testing.assert_close(plain["blocks.0.attn"], by_hand(block.attn, block.norm1(tokens)))
    fused = copy.deepcopy(model)
    vitkernels.accelerate(fused)
    before = fused(images)
    for name, weights in vitkernels.attention_maps(fused, images).items():
        torch.testing.assert_close(weights, plain[name])
    torch.testing.assert_close(fused(images), before, rtol=0, atol=0)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in fused.modules())


def test_one_query_and_some_modules(model):
    images = torch.randn(2, 3, 32, 32)
    every = vitkernels.attention_maps(model, images)
    for query in (0, -1):
        rows = vitkernels.attention_maps(model, [images], query=query, modules=lambda name: name.startswith("blocks.1"))
        assert list(rows) == ["blocks.1.attn"] and rows["blocks.1.attn"].shape == (2, 4, 1, 17)
        torch.testing.assert_close(rows["blocks.1.attn"][:, :, 0], every["blocks.1.attn"][:, :, query])
    with pytest.raises(IndexError, match="query is 17"):
        vitkernels.attention_maps(model, {"x": images}, query=17)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("query", [None, 3])
def test_multihead_attention(query):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    maps = vitkernels.attention_maps(layer, x, query=query)
    expected = layer.self_attn(x, x, x, average_attn_weights=False)[1]
    torch.testing.assert_close(maps["self_attn"], expected if query is None else expected[:, :, [3]])


def test_rope_masks_and_our_own_layers():
    attn = layers.Attention(16, 2).eval()
    maps = vitkernels.attention_maps(nn.Sequential(attn, attn), torch.randn(1, 5, 16))
    assert list(maps) == ["0", "0#2"] and maps["0"].shape == (1, 2, 5, 5)

    eva = timm.models.Eva(
        img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, use_rot_pos_emb=True, use_abs_pos_emb=False
    ).eval()
    (weights,) = vitkernels.attention_maps(eva, torch.randn(1, 3, 32, 32)).values()
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 17))


def test_a_model_without_attention_is_told_so():
    with pytest.raises(RuntimeError, match="no attention was seen in Linear"):
        vitkernels.attention_maps(nn.Linear(3, 3), torch.randn(2, 3))
