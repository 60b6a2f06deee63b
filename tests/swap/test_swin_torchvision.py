"""torchvision's Swin Transformers, accelerated: whole blocks, which pad an image before they roll it."""

import copy

import pytest
import torch
from parity import assert_parity, no_call_of, shake
from torch import nn

from vitkernels import accelerate, explain, restore

swin = pytest.importorskip("torchvision.models.swin_transformer")
from torchvision.models import get_model  # noqa: E402

VERSIONS = {
    1: (swin.SwinTransformerBlock, swin.PatchMerging),
    2: (swin.SwinTransformerBlockV2, swin.PatchMergingV2),
}


def build(version: int, window: list[int], depths=(2,), **more) -> nn.Module:
    block, merge = VERSIONS[version]
    heads = [2 << stage for stage in range(len(depths))]
    model = swin.SwinTransformer(
        [4, 4], 32, list(depths), heads, window, num_classes=5, block=block, downsample_layer=merge, **more
    )
    return shake(model).eval()


# 8 · 8 tokens that fill windows of 4; 10 · 7 that are padded, with rows that a window covers in the second case.
SIZES = {"whole": ((32, 32), [4, 4]), "padded twice": ((40, 28), [4, 4]), "covered": ((40, 28), [4, 8])}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("version", VERSIONS)
def test_fp32(version, size, device):
    image, window = SIZES[size]
    model, block = build(version, window).to(device), VERSIONS[version][0]
    x = torch.randn(2, 3, *image, device=device)
    report = assert_parity(model, x, inputs=1 if version == 1 else 4)
    assert sum(entry.was == block.__name__ for entry in report.swapped) == 2
    assert not [k for k in report.kept if k.known]
    with no_call_of(block.forward):
        model(x)


@pytest.mark.usefixtures("computed_by_pytorch")
class TestBehaviours:
    """What is around the kernels, computed by PyTorch where there is no GPU."""

    @pytest.mark.parametrize("version", VERSIONS)
    def test_stochastic_depth_drops_what_torchvision_drops(self, version, device):
        plain = build(version, [4, 4], (2, 2), stochastic_depth_prob=0.6).to(device).train()
        model, x, found = copy.deepcopy(plain), torch.randn(4, 3, 40, 28, device=device), []
        accelerate(model)
        for each in (model, plain):
            torch.manual_seed(3)
            out = each(x)
            out.square().sum().backward()
            found.append([out, *(p.grad for p in each.parameters())])
        torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("version", VERSIONS)
    def test_attention_alone(self, version, device):
        plain = build(version, [7, 7]).to(device)
        model = copy.deepcopy(plain)
        for each in (model, plain):
            for block in (each.features[1][0], each.features[1][1]):
                block.stochastic_depth.mode = "batch"
        kept = {k.module: k.reason for k in accelerate(model).kept}
        assert kept["features.1.0"] == "its StochasticDepth has the mode 'batch', not 'row'"
        x = torch.randn(2, 3, 40, 28, device=device)
        with torch.no_grad(), no_call_of(type(plain.features[1][0].attn).forward):
            actual = model(x)
        torch.testing.assert_close(actual, plain(x), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("version", VERSIONS)
    def test_dropped_elements_have_the_right_share(self, version, device):
        """The mean over many draws is what nothing dropped gives."""
        attn = build(version, [4, 4], attention_dropout=0.3, dropout=0.3).features[1][1].attn.to(device)
        accelerate(attn)
        x = torch.randn(1, 6, 6, 32, device=device)
        with torch.no_grad():
            expected, outputs = attn(x)[0], attn.train()(x.expand(256, -1, -1, -1))
        deviation = outputs.std(0) / 256**0.5
        assert deviation.min() > 0
        assert ((outputs.mean(0) - expected) / deviation).square().mean() < 2.0

    def test_keys_have_no_bias_in_version_2(self, device):
        """Whatever the parameter holds, and its gradient is 0."""
        block = build(2, [4, 4]).features[1][0].to(device)
        accelerate(block)
        block(torch.randn(1, 8, 8, 32, device=device)).square().sum().backward()
        assert not block.attn.qkv.bias.grad[32:64].any()
        assert block.attn.qkv.bias.grad[:32].any()

    def test_a_hook_sees_its_module_called(self, device):
        model, called = build(1, [4, 4]).to(device), []
        accelerate(model)
        model.features[1][0].attn.proj.register_forward_hook(lambda *_: called.append(1))
        assert "a hook on proj" in {k.module: k.reason for k in explain(model).kept}["features.1.0.attn"]
        handle = model.features[1][0].norm1.register_forward_hook(lambda *_: called.append(2))
        model(torch.randn(1, 3, 32, 32, device=device))
        assert called == [2], "torchvision itself never calls proj"
        handle.remove()

    def test_restored_and_saved(self, device):
        plain = build(2, [4, 4])
        model = copy.deepcopy(plain)
        accelerate(model)
        assert model.state_dict().keys() == plain.state_dict().keys()
        restore(model)
        assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]

    def test_fp8(self, device):
        plain = build(1, [4, 4]).to(device)
        model, x = copy.deepcopy(plain), torch.randn(2, 3, 40, 28, device=device)
        report = accelerate(model, precision="fp8")
        assert {e.precision for e in report.swapped if e.was == "SwinTransformerBlock"} == {"fp8"}
        with torch.no_grad():
            expected, actual = plain(x), model(x)
        assert 0 < (actual - expected).norm() / expected.norm() < 0.1


@pytest.mark.parametrize("name", ["swin_t", "swin_v2_b"])
def test_nothing_is_left_but_the_first_convolution(name):
    with torch.device("meta"):
        report = explain(get_model(name, weights=None))
    assert not [k for k in report.kept if k.known]
    assert {k.module for k in report.kept if k.part is not None} == {"features.0.0"}
