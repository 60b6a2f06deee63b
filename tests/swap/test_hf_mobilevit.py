"""transformers' MobileViT, accelerated: its Transformers on the image as it lies."""

import copy
import inspect

import pytest
import torch
from parity import assert_parity, no_call_of, shake
from torch import Tensor, nn

from vitkernels import accelerate, restore

transformers = pytest.importorskip("transformers", minversion="4.50")
from transformers.models.mobilevit import modeling_mobilevit as modeling  # noqa: E402

SIZE = {"hidden_sizes": [24, 40, 48], "neck_hidden_sizes": [4, 8, 8, 8, 8, 8, 16], "num_attention_heads": 2}
NAMES = {"MobileViTTransformerLayer", "MobileViTIntermediate", "MobileViTLayer"}


class Block(nn.Module):
    """A block in front of which an image is what it is."""

    def __init__(self, **more) -> None:
        super().__init__()
        config = transformers.MobileViTConfig(hidden_dropout_prob=0.0, num_attention_heads=2, **more)
        self.block = modeling.MobileViTLayer(config, 4, 8, stride=2, hidden_size=40, num_stages=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


def block(**more) -> nn.Module:
    # Shaken by less, the convolutions give tokens that are nearly equal, and gradients of queries that cancel.
    return shake(Block(**more), 0.5).eval()


def plain_forwards() -> tuple:
    return tuple(inspect.unwrap(c.forward) for c in (modeling.MobileViTLayer, modeling.MobileViTTransformerLayer))


# Halved, 16 · 12 pixels are whole patches of 2; 14 · 10 are resized.
@pytest.mark.parametrize("size", [(16, 12), (14, 10)], ids=["whole", "resized"])
def test_fp32(size, device):
    model, x, originals = block().to(device), torch.randn(2, 4, *size, device=device), plain_forwards()
    report = assert_parity(model, x)
    assert {entry.was for entry in report.swapped} >= NAMES
    for original in originals:
        with torch.no_grad(), no_call_of(original):
            model(x)


def test_a_layer_alone(device):
    config = transformers.MobileViTConfig(hidden_dropout_prob=0.0, num_attention_heads=2)
    layer = shake(modeling.MobileViTTransformerLayer(config, 40, 80)).eval().to(device)
    assert_parity(layer, torch.randn(2, 12, 40, device=device))


@pytest.mark.usefixtures("computed_by_pytorch")
class TestBehaviours:
    """What is around the kernels, computed by PyTorch where there is no GPU."""

    def test_a_hook_is_called(self, device):
        plain, x = block().to(device), torch.randn(2, 4, 16, 12, device=device)
        paths = ("transformer", "transformer.layer.1", "transformer.layer.0.attention.attention.query", "layernorm")
        for path in paths:
            model, called = copy.deepcopy(plain), []
            accelerate(model)
            model.get_submodule(f"block.{path}").register_forward_hook(lambda *_, called=called: called.append(1))
            with torch.no_grad():
                torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)
            assert called == [1], path

    def test_another_layer_inside(self, device):
        plain, x = block().to(device), torch.randn(2, 4, 16, 12, device=device)
        plain.block.transformer.layer[1] = nn.Sequential(plain.block.transformer.layer[1])
        model = copy.deepcopy(plain)
        kept = {k.module: k.reason for k in accelerate(model).kept}
        assert "another layer" in kept["block"]
        with torch.no_grad():
            torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)

    def test_a_whole_model(self, device):
        plain = shake(transformers.MobileViTModel(transformers.MobileViTConfig(**SIZE))).eval().to(device)
        model = copy.deepcopy(plain)
        report = accelerate(model)
        assert sum(entry.was == "MobileViTLayer" for entry in report.swapped) == 3
        for size in (64, 96):
            x = torch.randn(1, 3, size, size, device=device)
            with torch.no_grad():
                torch.testing.assert_close(model(x).last_hidden_state, plain(x).last_hidden_state, rtol=1e-3, atol=1e-3)
        assert model.state_dict().keys() == plain.state_dict().keys()
        restore(model)
        assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
