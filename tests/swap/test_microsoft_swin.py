"""Microsoft's own code of Swin Transformer and Swin Transformer V2, accelerated: an imitation of it.

The code is no package. The modules in ``swin_stand_in/`` have the paths, classes, attributes and results of
microsoft/Swin-Transformer at f82860b, as far as these tests see them; the constructors take the options that they set.
"""

import copy
import pickle
import sys
from pathlib import Path

import pytest
import torch
from parity import assert_parity, no_call_of, shake
from torch import nn

from vitkernels import accelerate, explain, restore

pytest.importorskip("timm")
sys.path.append(str(Path(__file__).parent / "swin_stand_in"))
from models import swin_transformer, swin_transformer_v2

VERSIONS = {1: swin_transformer, 2: swin_transformer_v2}


def build(version: int, image=(32, 32), window=4, **options) -> nn.Module:
    """A stage of two blocks, the second shifted, between patch embedding and merging."""
    code, size = VERSIONS[version], tuple(n // 4 for n in image)
    blocks = [
        code.SwinTransformerBlock(32, size, 2, window_size=window, shift_size=shift, **options)
        for shift in (0, window // 2)
    ]
    embed = code.PatchEmbed(image, (4, 4), 3, 32, norm=version == 1)
    return shake(nn.Sequential(embed, *blocks, code.PatchMerging(size, 32))).eval()


def close(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("image", [(32, 32), (32, 48)], ids=str)
@pytest.mark.parametrize("version", VERSIONS)
def test_fp32(version, image, device):
    model, code = build(version, image).to(device), VERSIONS[version]
    x = torch.randn(2, 3, *image, device=device)
    report = assert_parity(model, x, inputs=1 if version == 1 else 4)
    assert not [k for k in report.kept if k.known]
    assert {e.was for e in report.swapped} == {
        "LayerNorm", "Mlp", "PatchEmbed", "PatchMerging", "SwinTransformerBlock", "WindowAttention"
    }  # fmt: skip
    for original in (code.SwinTransformerBlock, code.PatchMerging, code.PatchEmbed):
        with no_call_of(original.forward):
            model(x)


@pytest.mark.usefixtures("computed_by_pytorch")
@pytest.mark.parametrize("version", VERSIONS)
class TestBehaviours:
    """What is around the kernels, computed by PyTorch where there is no GPU."""

    def test_drops_what_microsoft_drops(self, version, device):
        plain = build(version, drop_path=0.5, drop=0.2).to(device).train()
        for block in plain[1:3]:
            block.attn.proj_drop.p = 0.0  # behind attention it is drawn for windows there, for tokens here
        model, x, found = copy.deepcopy(plain), torch.randn(4, 3, 32, 32, device=device), []
        accelerate(model)
        for each in (model, plain):
            torch.manual_seed(3)
            out = each(x)
            out.square().sum().backward()
            found.append([out, *(p.grad for p in each.parameters())])
        torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)

    def test_a_window_that_covers_the_image(self, version, device):
        plain = build(version, (32, 32), window=8).to(device)
        model, x = copy.deepcopy(plain), torch.randn(2, 3, 32, 32, device=device)
        accelerate(model)
        with no_call_of(VERSIONS[version].SwinTransformerBlock.forward):
            actual = model(x)
        close(actual, plain(x))

    def test_attention_alone(self, version, device):
        plain = build(version).to(device)
        model = copy.deepcopy(plain)
        for block in (*plain[1:3], *model[1:3]):
            block.norm1.register_forward_hook(lambda *_: None)
        accelerate(model)
        x = torch.randn(2, 3, 32, 32, device=device)
        close(model(x), plain(x))
        windows = torch.randn(6, 16, 32, device=device)
        with no_call_of(VERSIONS[version].WindowAttention.forward):
            actual = model[1].attn(windows)
        close(actual, plain[1].attn(windows))

    def test_images_of_another_size_are_microsofts(self, version, device):
        model = build(version).to(device)
        accelerate(model)
        with pytest.raises(AssertionError, match="size"):
            model(torch.randn(2, 3, 32, 48, device=device))
        with pytest.raises(AssertionError, match="wrong size"):
            model[1](torch.randn(2, 48, 32, device=device))

    def test_another_module_inside_keeps_the_block(self, version):
        model = build(version)
        model[1].attn.qkv = nn.Sequential(model[1].attn.qkv)
        kept = {k.module: k.reason for k in explain(model).kept}
        assert kept["1"] == "attn: qkv is a Sequential, not exactly Linear"

    def test_restored_and_saved(self, version):
        plain = build(version)
        model = copy.deepcopy(plain)
        accelerate(model)
        assert type(pickle.loads(pickle.dumps(model))[1]) is type(model[1])
        assert model.state_dict().keys() == plain.state_dict().keys()
        restore(model)
        assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]

    def test_without_bias(self, version, device):
        plain = build(version).to(device)
        for block in plain[1:3]:
            for name in ("q_bias", "v_bias") if version == 2 else ():
                setattr(block.attn, name, None)
            if version == 1:
                block.attn.qkv.bias = None
        model, x = copy.deepcopy(plain), torch.randn(2, 3, 32, 32, device=device)
        accelerate(model)
        close(model(x), plain(x))


def test_fp8(device, computed_by_pytorch):
    plain = build(1).to(device)
    model, x = copy.deepcopy(plain), torch.randn(2, 3, 32, 32, device=device)
    report = accelerate(model, precision="fp8")
    assert {e.precision for e in report.swapped if e.was == "SwinTransformerBlock"} == {"fp8"}
    with torch.no_grad():
        expected, actual = plain(x), model(x)
    assert 0 < (actual - expected).norm() / expected.norm() < 0.1


def test_changed_code_is_not_taken_for_microsofts():
    """A copy whose forward uses another name, or takes another argument, computes something else."""
    from vitkernels.swap._microsoft import require_microsofts_forward

    class Mlp(nn.Module):
        def forward(self, x):
            return self.fc2(self.gate(x) * self.fc1(x))

    class PatchMerging(nn.Module):
        def forward(self, x, image):
            return self.reduction(self.norm(x))

    for cls in (Mlp, PatchMerging):
        with pytest.raises(ImportError, match="is not Microsoft's"):
            require_microsofts_forward(cls)
