"""Swin's patch merging of timm, torchvision and transformers, accelerated."""

import copy

import pytest
import torch
from parity import assert_parity, no_call_of, shake
from torch import nn

from vitkernels import accelerate, explain, restore

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision.models.swin_transformer")
pytest.importorskip("transformers", minversion="4.50")
from timm.models import swin_transformer, swin_transformer_v2, swin_transformer_v2_cr  # noqa: E402
from transformers.models.donut.modeling_donut_swin import DonutSwinPatchMerging  # noqa: E402
from transformers.models.maskformer.modeling_maskformer_swin import MaskFormerSwinPatchMerging  # noqa: E402
from transformers.models.swin.modeling_swin import SwinPatchMerging  # noqa: E402
from transformers.models.swinv2.modeling_swinv2 import Swinv2PatchMerging  # noqa: E402

IMAGES = {
    "timm": swin_transformer.PatchMerging,
    "timm v2": swin_transformer_v2.PatchMerging,
    "timm v2 cr": swin_transformer_v2_cr.PatchMerging,
    "torchvision": torchvision.PatchMerging,
    "torchvision v2": torchvision.PatchMergingV2,
}
TOKENS = {
    "transformers": SwinPatchMerging,
    "transformers v2": Swinv2PatchMerging,
    "donut": DonutSwinPatchMerging,
    "maskformer": MaskFormerSwinPatchMerging,
}
CLASSES = IMAGES | TOKENS
SIZES = {"whole": (6, 4), "padded": (7, 5)}


class Merging(nn.Module):
    """A module that merges images (B, Y, X, C), whatever its library passes."""

    def __init__(self, name: str, dim: int = 16) -> None:
        super().__init__()
        self.tokens, cls = name in TOKENS, CLASSES[name]
        takes_resolution = "input_resolution" in cls.__init__.__code__.co_varnames
        self.merging = cls((8, 8), dim) if takes_resolution else cls(dim)

    def forward(self, x):
        return self.merging(x.flatten(1, 2), tuple(x.shape[1:3])) if self.tokens else self.merging(x)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CLASSES)
def test_fp32(name, size, device):
    model, x = shake(Merging(name)).to(device), torch.randn(2, *SIZES[size], 16, device=device)
    report = assert_parity(model, x)
    assert CLASSES[name].__name__ in {entry.was for entry in report.swapped}
    with no_call_of(CLASSES[name].forward):
        model(x)


@pytest.mark.usefixtures("computed_by_pytorch")
@pytest.mark.parametrize("name", CLASSES)
class TestBehaviours:
    """What is around the kernels, computed by PyTorch where there is no GPU."""

    def test_a_hook_sees_its_module_called(self, name, device):
        plain = Merging(name).to(device)
        for child in ("norm", "reduction"):
            model, called, x = copy.deepcopy(plain), [], torch.randn(2, 7, 5, 16, device=device)
            accelerate(model)
            getattr(model.merging, child).register_forward_hook(lambda *_, called=called: called.append(1))
            torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)
            assert called == [1]

    def test_another_module_inside_keeps_it(self, name):
        for child in ("norm", "reduction"):
            model = Merging(name)
            setattr(model.merging, child, nn.Sequential(getattr(model.merging, child)))
            assert f"{child} is a Sequential" in {k.module: k.reason for k in explain(model).kept}["merging"]

    def test_other_channels_are_the_librarys(self, name, device):
        model = Merging(name).to(device)
        accelerate(model)
        with pytest.raises((RuntimeError, ValueError)) as raised:  # of the product, or of the norm, which is swapped
            model(torch.randn(2, 4, 4, 12, device=device))
        assert "patch_merging" not in str(raised.value)

    def test_restored_and_saved(self, name, device):
        plain = Merging(name)
        model = copy.deepcopy(plain)
        accelerate(model)
        assert model.state_dict().keys() == plain.state_dict().keys()
        restore(model)
        assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
