"""transformers' Swin Transformers, accelerated: whole layers, which pad an image before they roll it."""

import copy
import inspect

import pytest
import torch
from parity import assert_parity, no_call_of, shake
from torch import Tensor, nn

from vitkernels import accelerate, explain, restore

transformers = pytest.importorskip("transformers", minversion="4.50")
from transformers.models.maskformer.modeling_maskformer_swin import MaskFormerSwinModel  # noqa: E402

FAMILIES = {
    "swin": (transformers.SwinModel, transformers.SwinConfig),
    "swinv2": (transformers.Swinv2Model, transformers.Swinv2Config),
    "donut": (transformers.DonutSwinModel, transformers.DonutSwinConfig),
    "maskformer": (MaskFormerSwinModel, transformers.MaskFormerSwinConfig),
}


class Tokens(nn.Module):
    """A model that returns its tokens alone."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor, **options) -> Tensor:
        return self.inner(images, **options)[0]


def build(family: str, **more) -> nn.Module:
    cut = {"embed_dim": 32, "depths": [2], "num_heads": [2], "window_size": 4, "image_size": 32, "patch_size": 4}
    model, config = FAMILIES[family]
    return shake(Tokens(model(config(**cut | more)))).eval()


def layers(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if type(m).__name__.endswith(("SwinLayer", "Swinv2Layer"))]


def images(device: torch.device, *size: int) -> Tensor:
    return torch.randn(2, 3, *size, device=device)


def close(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(32, 32), (40, 28)], ids=["whole", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_fp32(family, size, device):
    model, x = build(family).to(device), images(device, *size)
    original = type(layers(model)[0])
    report = assert_parity(model, x, inputs=4 if family == "swinv2" else 1)
    assert not [k for k in report.kept if k.known]
    swapped = {entry.was for entry in report.swapped}
    assert {type(layer).__name__ for layer in layers(model)} < swapped
    with no_call_of(inspect.unwrap(original.forward)):
        model(x)


@pytest.mark.usefixtures("computed_by_pytorch")
class TestBehaviours:
    """What is around the kernels, computed by PyTorch where there is no GPU."""

    def test_shifted_windows_of_version_2_add_their_mask_twice(self, device):
        """Where keys are the reverse of queries, scores lie 200 below those of the other region: −100 shows."""
        plain = layers(build("swinv2").to(device, torch.double))[1]
        attn = plain.attention.self
        with torch.no_grad():
            attn.logit_scale.fill_(5.0)  # a factor of 100, the largest
            attn.query.bias.zero_()
            attn.key.weight.copy_(-attn.query.weight)
        layer = copy.deepcopy(plain)
        assert accelerate(layer).swapped
        sign = torch.tensor([1.0] * 16 + [-1.0] * 48, device=device, dtype=torch.double)  # of two rows, and of six
        x = torch.randn(2, 1, 32, device=device, dtype=torch.double) * sign[:, None]
        close(layer(x, (8, 8))[0], plain(x, (8, 8))[0])

    @pytest.mark.parametrize("family", FAMILIES)
    def test_drops_what_transformers_drops(self, family, device):
        """Paths and, behind the MLP, features; dropout behind attention is drawn for windows there, for tokens here."""
        plain = build(family, depths=[2, 2], num_heads=[2, 4], drop_path_rate=0.6).to(device).train()
        model, x, found = copy.deepcopy(plain), images(device, 40, 28), []
        accelerate(model)
        for each in (model, plain):
            torch.manual_seed(3)
            out = each(x)
            out.square().sum().backward()
            found.append([out, *(p.grad for p in each.parameters() if p.grad is not None)])
        torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("option", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_dropout_has_the_right_share(self, family, option, device):
        """The mean over many draws, of one product with its dropout, is what nothing dropped gives."""
        layer = layers(build(family, **{option: 0.3}).to(device))[0]
        accelerate(layer)
        with torch.no_grad():
            for part in ("intermediate", "mlp"):
                for parameter in getattr(layer, part, nn.Identity()).parameters():
                    parameter.zero_()
            x = torch.randn(1, 49, 32, device=device)
            expected, outputs = layer(x, (7, 7))[0][0], layer.train()(x.expand(256, -1, -1), (7, 7))[0]
        if family == "swinv2":
            return  # a norm stands behind the dropout
        deviation = outputs.std(0) / 256**0.5
        assert deviation.min() > 0
        assert ((outputs.mean(0) - expected) / deviation).square().mean() < 2.0

    @pytest.mark.parametrize("family", ["swin", "donut"])
    def test_windows_larger_than_the_image(self, family, device):
        """transformers then makes its windows smaller for good, and refuses the image: the biases do not fit."""
        model = build(family, depths=[2, 2], num_heads=[2, 4], image_size=24).to(device)
        accelerate(model)
        with pytest.raises(RuntimeError):
            model(images(device, 24, 24))
        assert layers(model)[2].window_size == 3

    def test_always_partition(self, device):
        plain = build("swin", depths=[2, 2], num_heads=[2, 4], image_size=24).to(device)
        model, x = copy.deepcopy(plain), torch.randn(2, 9, 64, device=device)
        accelerate(model)
        for mine, theirs in zip(layers(model)[2:], layers(plain)[2:], strict=True):
            close(mine(x, (3, 3), always_partition=True)[0], theirs(x, (3, 3), always_partition=True)[0])
            assert mine.window_size == 4

    @pytest.mark.parametrize("family", FAMILIES)
    def test_attention_weights_are_transformers(self, family, device):
        plain = build(family)
        if hasattr(plain.inner, "set_attn_implementation") and family == "swin":
            plain.inner.set_attn_implementation("eager")
        model = copy.deepcopy(plain).to(device)
        accelerate(model)
        x = torch.randn(2, 64, 32, device=device)
        for mine, theirs in zip(layers(model), layers(plain.to(device)), strict=True):
            actual, expected = (layer(x, (8, 8), output_attentions=True) for layer in (mine, theirs))
            assert expected[1] is not None
            close(actual, expected)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_a_hook_sees_its_module_called(self, family, device):
        plain = build(family, depths=[1]).to(device)
        model, called, x = copy.deepcopy(plain), [], images(device, 32, 32)
        accelerate(model)
        attention = layers(model)[0].attention
        projection = getattr(attention, "o_proj", None) or attention.output.dense
        projection.register_forward_hook(lambda *_: called.append(1))
        close(model(x), plain(x))
        assert called == [1]

    @pytest.mark.parametrize("family", FAMILIES)
    def test_a_hook_on_any_module_within_keeps_the_layer(self, family):
        """Except on what is called: the path's dropout, and the layers of the MLP that makes biases."""
        layer = layers(build(family, drop_path_rate=0.5))[0]
        for path, child in layer.named_modules():
            handle = child.register_forward_hook(lambda *_: None)
            called = path in ("", "drop_path") or "continuous_position_bias_mlp." in path
            assert ("" in {k.module for k in explain(layer).kept}) is not called, path
            handle.remove()

    @pytest.mark.parametrize("family", FAMILIES)
    def test_checkpointed_restored_and_saved(self, family, device):
        plain = build(family, drop_path_rate=0.0).to(device)
        model, x = copy.deepcopy(plain), images(device, 32, 32)
        accelerate(model)
        if family != "maskformer":
            model.inner.gradient_checkpointing_enable()
        grads = []
        for each in (model, plain):
            each.train()(x).square().sum().backward()
            grads.append([p.grad for p in each.parameters() if p.grad is not None])
        torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3)
        assert model.state_dict().keys() == plain.state_dict().keys()
        restore(model)
        assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]

    @pytest.mark.parametrize("family", ["swin", "donut", "maskformer"])
    def test_mlps_in_fp8(self, family, device):
        plain = build(family).to(device)
        model, x = copy.deepcopy(plain), images(device, 40, 28)
        report = accelerate(model, precision="fp8")
        assert {e.precision for e in report.swapped if e.was.endswith("SwinLayer")} == {"fp8"}
        with torch.no_grad():
            expected, actual = plain(x), model(x)
        assert 0 < (actual - expected).norm() / expected.norm() < 0.1

    def test_inside_a_larger_model(self):
        config = transformers.MaskFormerConfig(
            backbone_config=transformers.SwinConfig(
                embed_dim=32, depths=[1, 1, 1, 1], num_heads=[2, 4, 8, 16], window_size=4
            )
        )
        report = explain(transformers.MaskFormerModel(config))
        assert sum(entry.was in ("SwinLayer", "MaskFormerSwinLayer") for entry in report.swapped) == 4
