"""torchvision's MaxViT layers, accelerated, against themselves as they were."""

import pytest
import torch
from parity import assert_parity, no_call_of, shake
from torch import nn

from vitkernels import accelerate, restore

maxvit = pytest.importorskip("torchvision.models.maxvit")


def build(kind: str, grid_size: tuple[int, int] = (8, 8), drop: float = 0.0) -> nn.Module:
    return shake(
        maxvit.PartitionAttentionLayer(32, 16, 4, kind, grid_size, 4, nn.GELU, nn.LayerNorm, 0.0, 0.0, drop).eval()
    )


@pytest.mark.parametrize(
    ("kind", "image"), [("window", (8, 8)), ("window", (8, 4)), ("grid", (8, 8)), ("grid", (4, 4))]
)
def test_fp32(kind, image, device):
    layer = build(kind, image).to(device)
    keys, x = list(layer.state_dict()), torch.randn(2, 32, *image, device=device)
    assert_parity(layer, x)
    assert list(layer.state_dict()) == keys
    with torch.no_grad(), no_call_of(maxvit.PartitionAttentionLayer.forward):
        layer(x)
    restore(layer)
    assert type(layer) is maxvit.PartitionAttentionLayer


def test_in_training(device):
    """Paths are dropped as torchvision drops them under the same seed."""
    assert_parity(build("grid", drop=0.5).to(device).train(), torch.randn(4, 32, 8, 8, device=device))


def test_attention_alone(device):
    attn = shake(maxvit.RelativePositionalMultiHeadAttention(32, 16, 16)).to(device)
    x = torch.randn(2, 3, 16, 32, device=device)
    assert_parity(attn, x)
    with torch.no_grad(), no_call_of(maxvit.RelativePositionalMultiHeadAttention.forward):
        attn(x)


def test_a_hook_on_a_child_is_called(device):
    layer, x, called = build("window").to(device), torch.randn(1, 32, 8, 8, device=device), []
    accelerate(layer)
    with torch.no_grad():
        expected = layer(x)
        layer.attn_layer[1].to_qkv.register_forward_hook(lambda *_: called.append(True))
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    assert called


def test_every_layer_of_the_model():
    with torch.device("meta"):
        model = maxvit.maxvit_t()
    accelerate(model)
    layers = [m for m in model.modules() if isinstance(m, maxvit.PartitionAttentionLayer)]
    assert {type(layer).__qualname__ for layer in layers} == {"FusedPartitionAttentionLayer"}
    with torch.no_grad(), no_call_of(maxvit.PartitionAttentionLayer.forward):
        assert model(torch.empty(1, 3, 224, 224, device="meta")).shape == (1, 1000)
