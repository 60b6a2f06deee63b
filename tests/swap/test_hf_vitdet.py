"""transformers' ViTDet, accelerated: whole layers, in windows and over the image, and the convolutions behind some."""

import inspect

import pytest
import torch
from parity import Features, assert_parity, no_call_of, shake
from torch import nn

from vitkernels import accelerate, restore

transformers = pytest.importorskip("transformers", minversion="4.50")

SIZE = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2, "image_size": 48,
    "pretrain_image_size": 48, "patch_size": 8, "window_size": 3, "window_block_indices": [0],
    "residual_block_indices": [1], "use_relative_position_embeddings": True,
}  # fmt: skip


def build(**more) -> nn.Module:
    return shake(Features(transformers.VitDetModel(transformers.VitDetConfig(**SIZE | more)))).eval()


def layers(model: nn.Module) -> list[nn.Module]:
    return list(model.inner.encoder.layer)


# Windows of 3: 6 rows are whole windows, 4 are padded, and the second layer's tables are resized.
@pytest.mark.parametrize("image", [48, 32], ids=["whole", "padded"])
def test_fp32(image, device):
    model = build().to(device)
    keys, original = list(model.state_dict()), type(layers(model)[0])
    images = torch.randn(2, 3, image, image, device=device)
    report = assert_parity(model, images)
    assert list(model.state_dict()) == keys
    assert {entry.was for entry in report.swapped} >= {"VitDetLayer", "VitDetAttention", "VitDetMlp"}
    with torch.no_grad(), no_call_of(inspect.unwrap(original.forward)):
        model(images)
    restore(model)
    assert {type(layer) for layer in layers(model)} == {original}


def test_dropped_paths_and_features(device):
    model = build(drop_path_rate=0.5, dropout_prob=0.2).to(device).train()
    assert_parity(model, torch.randn(3, 3, 48, 48, device=device))


def test_without_positions(device):
    model = build(use_relative_position_embeddings=False).to(device)
    assert_parity(model, torch.randn(1, 3, 32, 32, device=device))


def test_attention_weights_come_from_transformers(device):
    model = build().to(device)
    images = torch.randn(1, 3, 32, 32, device=device)
    with torch.no_grad():
        expected = model.inner(images, output_attentions=True).attentions
        accelerate(model)
        for mine, wanted in zip(model.inner(images, output_attentions=True).attentions, expected, strict=True):
            torch.testing.assert_close(mine, wanted)


def test_the_attention_alone(device):
    model = build().to(device)
    attn, x = layers(model)[0].attention, torch.randn(1, 3, 3, 32, device=device)
    with torch.no_grad():
        expected, forward = attn(x)[0], type(attn).forward
        accelerate(model)
        with no_call_of(inspect.unwrap(forward)):
            torch.testing.assert_close(attn(x)[0], expected, rtol=1e-4, atol=1e-4)
