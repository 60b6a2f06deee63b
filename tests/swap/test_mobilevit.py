"""timm's MobileViT blocks, accelerated, against themselves as they were."""

import copy

import pytest
import torch
from parity import assert_parity, no_call_of, shake
from torch import nn

from vitkernels import accelerate, explain, restore

timm = pytest.importorskip("timm")
from timm.models.byobnet import LayerFn  # noqa: E402
from timm.models.mobilevit import MobileVitBlock  # noqa: E402
from timm.models.vision_transformer import Block  # noqa: E402


def build(head_dim: int = 20, depth: int = 2, **more) -> nn.Module:
    layers = LayerFn(act=nn.SiLU)
    options = {
        "layers": layers,
        "transformer_dim": 2 * head_dim,
        "transformer_depth": depth,
        "patch_size": 2,
        "num_heads": 2,
    }
    return shake(MobileVitBlock(8, 8, **options | more)).eval()


# 8 · 6 pixels are whole patches of 2; 7 · 5 are resized by timm.
SIZES = {"whole": (8, 6), "resized": (7, 5)}


@pytest.mark.parametrize("size", SIZES)
def test_fp32(size, device):
    model, x = build().to(device), torch.randn(2, 8, *SIZES[size], device=device)
    report = assert_parity(model, x)
    assert "MobileVitBlock" in {entry.was for entry in report.swapped}
    for original in (MobileVitBlock, Block):
        with torch.no_grad(), no_call_of(original.forward):
            model(x)


@pytest.mark.parametrize("head_dim", [36, 48, 60])  # MobileViT-S's
def test_head_dims(head_dim, device):
    model = build(head_dim, depth=1).to(device)
    assert_parity(model, torch.randn(2, 8, 8, 4, device=device))


def test_other_patches(device):
    model = build(depth=1, no_fusion=True)
    model.patch_size, model.patch_area = (4, 2), 8
    assert_parity(model.to(device), torch.randn(2, 8, 8, 6, device=device))


@pytest.mark.usefixtures("computed_by_pytorch")
class TestBehaviours:
    """What is around the kernels, computed by PyTorch where there is no GPU."""

    def agree(self, model, plain, x):
        with torch.no_grad():
            torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)

    def test_a_hook_is_called(self, device):
        plain, x = build().to(device), torch.randn(2, 8, 8, 6, device=device)
        for path in ("transformer", "transformer.1", "transformer.0.attn.qkv", "norm", "conv_1x1"):
            model, called = copy.deepcopy(plain), []
            accelerate(model)
            model.get_submodule(path).register_forward_hook(lambda *_, called=called: called.append(1))
            self.agree(model, plain, x)
            assert called == [1], path

    def test_another_module_inside(self, device):
        plain, x = build().to(device), torch.randn(2, 8, 8, 6, device=device)
        plain.transformer[1].attn.qkv = nn.Sequential(plain.transformer[1].attn.qkv)
        model = copy.deepcopy(plain)
        accelerate(model)
        self.agree(model, plain, x)

    def test_another_transformer_keeps_the_block(self):
        model = build()
        model.transformer[1] = nn.Sequential(model.transformer[1])
        kept = {k.module: k.reason for k in explain(model).kept}
        assert kept[""] == "its Transformer holds a Sequential, not timm's Block"

    def test_dropped_paths_are_timms(self, device):
        plain, found = build(drop_path_rate=0.5).to(device).train(), []
        model, x = copy.deepcopy(plain), torch.randn(4, 8, 8, 6, device=device)
        accelerate(model)
        for each in (model, plain):
            torch.manual_seed(3)
            found.append(each(x))
        torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)

    def test_restored_and_saved(self):
        plain = build()
        model = copy.deepcopy(plain)
        accelerate(model)
        assert model.state_dict().keys() == plain.state_dict().keys()
        restore(model)
        assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]

    def test_a_whole_model(self, device):
        plain = timm.create_model("mobilevit_xxs", num_classes=5).eval().to(device)
        model = copy.deepcopy(plain)
        report = accelerate(model)
        assert sum(entry.was == "MobileVitBlock" for entry in report.swapped) == 3
        with torch.no_grad(), no_call_of(Block.forward):
            model(torch.randn(1, 3, 64, 64, device=device))
        for size in (64, 96):
            self.agree(model, plain, torch.randn(2, 3, size, size, device=device))
