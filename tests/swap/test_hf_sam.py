"""transformers' vision encoders of SAM, SAM-HQ, GOT-OCR 2 and SLANeXt: whole layers, in windows and over the image."""

import copy
import importlib
import inspect

import pytest
import torch
from parity import Features, assert_parity, no_call_of, shake
from torch import nn

from vitkernels import accelerate, restore

transformers = pytest.importorskip("transformers", minversion="4.50")

EAGER = {"got_ocr2": "GotOcr2", "slanext": "SLANeXt"}  # have no other implementation of attention
FAMILIES = {"sam": "Sam", "sam_hq": "SamHQ"} | EAGER
SIZE = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_dim": 64, "patch_size": 8,
    "window_size": 3, "global_attn_indexes": [1], "output_channels": 16,
}  # fmt: skip


def build(family: str, image: int, **more) -> nn.Module:
    if not hasattr(transformers.models, family):
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    prefix, modeling = FAMILIES[family], f"transformers.models.{family}.modeling_{family}"
    config = getattr(transformers, f"{prefix}VisionConfig")(**SIZE | {"image_size": image} | more)
    chosen = "eager" if family in EAGER else "sdpa"  # which releases 4.5x do not choose here
    config._attn_implementation = more.get("attn_implementation", chosen)
    return shake(Features(getattr(importlib.import_module(modeling), f"{prefix}VisionEncoder")(config))).eval()


def layers(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if type(m).__name__.endswith("VisionLayer")]


# Windows of 3: 6 rows are whole windows, 4 are padded.
@pytest.mark.parametrize("image", [48, 32], ids=["whole", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_fp32(family, image, device):
    model = build(family, image).to(device)
    keys, original = list(model.state_dict()), type(layers(model)[0])
    images = torch.randn(2, 3, image, image, device=device)
    report = assert_parity(model, images)
    assert list(model.state_dict()) == keys
    assert original.__name__ in {entry.was for entry in report.swapped}
    assert not [k for k in report.kept if k.known]
    with torch.no_grad(), no_call_of(inspect.unwrap(original.forward)):
        model(images)
    restore(model)
    assert {type(layer) for layer in layers(model)} == {original}


def test_without_positions(device):
    model = build("sam", 32, use_rel_pos=False).to(device)
    assert_parity(model, torch.randn(1, 3, 32, 32, device=device))


def test_eager_attention_stays(device):
    model = build("sam", 32, attn_implementation="eager").to(device)
    swapped = {entry.was for entry in accelerate(model).swapped}
    assert "SamVisionLayer" not in swapped
    assert "SamMLPBlock" in swapped


def test_attention_weights_come_from_transformers(device):
    model = build("sam", 32).to(device)
    attn, x = layers(model)[0].attn, torch.randn(1, 3, 3, 32, device=device)
    with torch.no_grad():
        expected, forward = attn(x, output_attentions=True)[0], type(attn).forward
        accelerate(model)
        with no_call_of(inspect.unwrap(forward)):
            torch.testing.assert_close(attn(x)[0], expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(attn(x, output_attentions=True)[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", EAGER)
@pytest.mark.usefixtures("computed_by_pytorch")
class TestEagerAlone:
    """Layers whose attention has one implementation, which returns its weights."""

    def test_who_calls_the_attention_gets_its_weights(self, family, device):
        model = build(family, 32).to(device)
        attn, x = layers(model)[0].attn, torch.randn(1, 3, 3, 32, device=device)
        expected = attn(x, output_attentions=True)
        accelerate(model)
        torch.testing.assert_close(attn(x, output_attentions=True), expected, rtol=0, atol=0)

    def test_attention_weights_of_the_encoder(self, family, device):
        plain, images = build(family, 32).to(device), torch.randn(1, 3, 32, 32, device=device)
        model = copy.deepcopy(plain)
        accelerate(model)
        with torch.no_grad():
            weights, expected = (each.inner(images, output_attentions=True).attentions for each in (model, plain))
        assert len(expected) == 2
        torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-4)

    def test_its_scale_and_dropout_count(self, family, device):
        """All weights dropped leave the bias of the projection and the MLP; a scale of 0 leaves the positions."""
        plain = layers(build(family, 32, attention_dropout=1.0))[0].to(device).train()
        layer, x = copy.deepcopy(plain), torch.randn(2, 4, 4, 32, device=device)
        accelerate(layer)
        with no_call_of(inspect.unwrap(type(plain).forward)):
            dropped = layer(x)
        torch.testing.assert_close(dropped, plain(x), rtol=1e-4, atol=1e-4)
        for each in (layer.eval(), plain.eval()):
            each.attn.scale = 0.0
        torch.testing.assert_close(layer(x), plain(x), rtol=1e-4, atol=1e-4)
