"""timm's MViTv2 blocks, accelerated, against themselves as they were."""

import copy

import pytest
import torch
from parity import assert_parity, no_call_of, shake
from torch import Tensor, nn

from vitkernels import accelerate, restore

timm = pytest.importorskip("timm")
from timm.models.mvitv2 import MultiScaleAttention, MultiScaleBlock  # noqa: E402

FORWARDS = (MultiScaleBlock.forward, MultiScaleAttention.forward)


class Tokens(nn.Module):
    """A block on images of one size, that returns its tokens alone."""

    def __init__(self, block: nn.Module, size: tuple[int, int]) -> None:
        super().__init__()
        self.block, self.size = block, size

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x, self.size)[0]


def build(size: tuple[int, int] = (8, 8), dim_out: int = 48, **more) -> nn.Module:
    options = {
        "kernel_q": (3, 3), "kernel_kv": (3, 3), "stride_q": (2, 2), "stride_kv": (4, 4), "num_heads": 2,
        "has_cls_token": False, "expand_attn": True,
    }  # fmt: skip
    return Tokens(shake(MultiScaleBlock(32, dim_out, feat_size=(8, 8), **options | more)).eval(), size)


VARIANTS = {
    "fewer queries": {},
    "more keys than queries": {"stride_kv": (1, 1)},
    "fewer keys": {"stride_q": (1, 1), "stride_kv": (2, 2), "dim_out": 32},
    "class token": {"has_cls_token": True},
    "widened behind the attention": {"expand_attn": False},
    "oblong": {"size": (8, 6)},
    "no positions": {"rel_pos_type": ""},
    "no residual": {"residual_pooling": False},
    "maxima": {"mode": "max"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_fp32(variant, device):
    model = build(**VARIANTS[variant]).to(device)
    tokens = model.size[0] * model.size[1] + model.block.has_cls_token
    x = torch.randn(2, tokens, 32, device=device)
    report = assert_parity(model, x)
    assert {entry.was for entry in report.swapped} >= {"MultiScaleBlock", "MultiScaleAttention", "Mlp"}
    for forward in FORWARDS:
        with torch.no_grad(), no_call_of(forward):
            model(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, device):
    model = build(has_cls_token=True).to(device, dtype)
    assert_parity(model, torch.randn(2, 65, 32, device=device, dtype=dtype))


@pytest.mark.usefixtures("computed_by_pytorch")
class TestBehaviours:
    """What is around the kernels, computed by PyTorch where there is no GPU."""

    def test_dropped_paths_are_timms(self, device):
        plain, found = build(drop_path=0.5).to(device).train(), []
        model, x = copy.deepcopy(plain), torch.randn(4, 64, 32, device=device)
        accelerate(model)
        for each in (model, plain):
            torch.manual_seed(3)
            found.append(each(x))
        torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)

    def test_keys_beyond_the_kernels_width_are_timms(self, device):
        """240 rows of keys beside the 24 channels of a head are more than the kernel takes."""
        plain = build((240, 2), stride_kv=(1, 1)).to(device)
        plain.block.attn.rel_pos_h = nn.Parameter(torch.randn(479, 24, device=device))
        model, x = copy.deepcopy(plain), torch.randn(1, 480, 32, device=device)
        accelerate(model)
        with torch.no_grad():
            torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)
            with pytest.raises(AssertionError, match=r"MultiScaleAttention\.forward runs"), no_call_of(FORWARDS[1]):
                model(x)

    def test_a_hook_is_called(self, device):
        plain, x = build().to(device), torch.randn(2, 64, 32, device=device)
        for path in ("attn", "attn.pool_k", "attn.norm_q", "shortcut_pool_attn", "shortcut_proj_attn", "mlp.fc1"):
            model, called = copy.deepcopy(plain), []
            accelerate(model)
            module = model.get_submodule(f"block.{path}")
            module.register_forward_hook(lambda *_, called=called: called.append(1))
            with torch.no_grad():
                torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)
            assert called == [1], path

    def test_a_whole_model(self, device):
        plain = shake(timm.create_model("mvitv2_tiny", num_classes=5, img_size=64), 0.02).eval().to(device)
        model, x = copy.deepcopy(plain), torch.randn(1, 3, 64, 64, device=device)
        report = accelerate(model)
        assert sum(entry.was == "MultiScaleBlock" for entry in report.swapped) == 10
        with torch.no_grad():
            torch.testing.assert_close(model(x), plain(x), rtol=1e-3, atol=1e-3)
        assert model.state_dict().keys() == plain.state_dict().keys()
        restore(model)
        assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
