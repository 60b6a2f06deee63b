"""timm's Swin Transformers, accelerated: whole blocks, with windows, shifts and padding as timm has them."""

import copy

import pytest
import torch
from parity import assert_parity, no_call_of, shake
from torch import nn

from vitkernels import accelerate, explain, restore

timm = pytest.importorskip("timm")
from timm.models.swin_transformer import SwinTransformerBlock, WindowAttention  # noqa: E402
from timm.models.swin_transformer_v2 import SwinTransformerV2Block  # noqa: E402
from timm.models.swin_transformer_v2_cr import SwinTransformerV2CrBlock  # noqa: E402

FAMILIES = {
    "swin": ("swin_tiny_patch4_window7_224", SwinTransformerBlock),
    "swinv2": ("swinv2_tiny_window8_256", SwinTransformerV2Block),
    "swinv2 cr": ("swinv2_cr_tiny_ns_224", SwinTransformerV2CrBlock),
}
# 8 · 8 tokens that fill windows of 4; 10 · 7 that are padded.
SIZES = {"whole": ((32, 32), 4), "padded": ((40, 28), (4, 3))}


def build(family: str, img_size: tuple[int, int] = (32, 32), window_size=4, **more) -> nn.Module:
    cut = {"embed_dim": 32, "depths": (2, 2), "num_heads": (2, 4), "num_classes": 5} | more
    return shake(timm.create_model(FAMILIES[family][0], img_size=img_size, window_size=window_size, **cut)).eval()


def images(size: tuple[int, int], device: torch.device) -> torch.Tensor:
    return torch.randn(2, 3, *size, device=device)


def assert_same(model: nn.Module, plain: nn.Module, x: torch.Tensor, block: type[nn.Module] | None = None) -> None:
    """Fail unless ``model`` gives what ``plain`` gives, without the forward of ``block``."""
    with torch.no_grad():
        expected = plain(x)
        if block is None:
            actual = model(x)
        else:
            with no_call_of(block.forward):
                actual = model(x)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def accelerated(family: str, **options) -> tuple[nn.Module, nn.Module]:
    """Return an accelerated model and a plain copy of it."""
    plain = build(family, **options)
    model = copy.deepcopy(plain)
    accelerate(model)
    return model, plain


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", FAMILIES)
def test_fp32(family, size, device):
    image, window = SIZES[size]
    model = build(family, image, window, depths=(2,), num_heads=(2,)).to(device)
    report = assert_parity(model, images(image, device), inputs=1 if family == "swin" else 4)
    assert sum(entry.was == FAMILIES[family][1].__name__ for entry in report.swapped) == 2
    assert not [k for k in report.kept if k.known and not k.module.endswith("meta_mlp")]
    with no_call_of(FAMILIES[family][1].forward):
        model(images(image, device))


def test_windows_of_seven_in_bf16(device):
    model = build("swin", (40, 40), 7, depths=(2,), num_heads=(2,)).to(device, torch.bfloat16)
    assert_parity(model, images((40, 40), device).bfloat16(), gain_counts=False)


@pytest.mark.usefixtures("computed_by_pytorch")
class TestBehaviours:
    """What is around the kernels, computed by PyTorch where there is no GPU."""

    @pytest.mark.parametrize("family", FAMILIES)
    def test_another_size(self, family, device):
        model, plain = accelerated(family)
        for each in (model, plain):
            each.to(device).set_input_size((40, 28), window_size=(4, 3))
        assert_same(model, plain, images((40, 28), device), FAMILIES[family][1])
        for each in (model, plain):
            each.set_input_size((24, 24), window_size=4, always_partition=True)
        assert_same(model, plain, images((24, 24), device), FAMILIES[family][1])

    @pytest.mark.parametrize("family", FAMILIES)
    def test_any_size_with_masks_made_at_each_call(self, family, device):
        model, plain = accelerated(family, strict_img_size=False, always_partition=True)
        for size in ((32, 32), (36, 44)):
            assert_same(model.to(device), plain.to(device), images(size, device), FAMILIES[family][1])

    @pytest.mark.parametrize("family", FAMILIES)
    def test_an_image_that_the_mask_was_not_made_for_is_timms(self, family, device):
        """timm applies the mask of 4 windows to the 12 of two images, and raises an error for the 6 of one."""
        model, plain = accelerated(family)
        for each in (model, plain):
            each.to(device).patch_embed.strict_img_size = False
        x = images((48, 32), device)
        assert_same(model, plain, x)
        with pytest.raises(RuntimeError, match="invalid for input of size"):
            model(x[:1])

    @pytest.mark.parametrize("family", FAMILIES)
    def test_in_training(self, family, device):
        """DropPath drops what timm drops; the biases of Cr, whose pairs are dropped one by one, are timm's."""
        model, plain = accelerated(family, drop_path_rate=0.6)
        x, found = torch.randn(4, 3, 32, 32, device=device), []
        for each in (model, plain):
            torch.manual_seed(3)
            out = each.to(device).train()(x)
            out.square().sum().backward()
            found.append([out, *(p.grad for p in each.parameters())])
        torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)

    def test_checkpointing(self, device):
        model, plain = accelerated("swin", drop_path_rate=0.0)
        model.set_grad_checkpointing()
        x, grads = images((32, 32), device), []
        for each in (model, plain):
            each.to(device).train()(x).square().sum().backward()
            grads.append([p.grad for p in each.parameters()])
        torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_features(self, family, device):
        plain = build(family, features_only=True).to(device)
        model = copy.deepcopy(plain)
        accelerate(model)
        assert_same(model, plain, images((32, 32), device), FAMILIES[family][1])

    def test_restored_and_saved(self, device):
        model, plain = accelerated("swin")
        assert model.state_dict().keys() == plain.state_dict().keys()
        model.load_state_dict(plain.state_dict())
        restore(model)
        assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]

    @pytest.mark.parametrize("family", FAMILIES)
    def test_a_hook_sees_its_module_called(self, family, device):
        model, plain = accelerated(family)
        called = []
        block = next(m for m in model.modules() if isinstance(m, FAMILIES[family][1]))
        block.attn.proj.register_forward_hook(lambda *_: called.append(1))
        assert_same(model.to(device), plain.to(device), images((32, 32), device))
        assert called == [1]

    @pytest.mark.parametrize("family", FAMILIES)
    def test_a_hook_on_any_module_within_keeps_the_block(self, family):
        """Except on the layers of the MLP that makes biases, which is called."""
        block = next(m for m in build(family).modules() if isinstance(m, FAMILIES[family][1]))
        for path, child in block.named_modules():
            handle = child.register_forward_hook(lambda *_: None)
            called = path == "" or path.startswith(("attn.cpb_mlp.", "attn.meta_mlp"))
            assert ("" in {k.module for k in explain(block).kept}) is not called, path
            handle.remove()

    def test_dropped_elements_have_the_right_share(self, device):
        """The mean over many draws is what nothing dropped gives."""
        model = build("swin", attn_drop_rate=0.3, proj_drop_rate=0.3, depths=(2,), num_heads=(2,))
        block = model.layers[0].blocks[1].to(device)
        block.mlp.fc2.weight.data.zero_()
        block.drop_path1 = nn.Identity()
        block.drop_path2 = nn.Identity()
        accelerate(block)
        x = torch.randn(1, 8, 8, 32, device=device)
        with torch.no_grad():
            expected, outputs = block(x)[0], block.train()(x.expand(256, -1, -1, -1))
        deviation = outputs.std(0) / 256**0.5
        assert deviation.min() > 0
        assert ((outputs.mean(0) - expected) / deviation).square().mean() < 2.0

    def test_attention_alone(self, device):
        """In a block that is kept, attention without a mask runs fused, and with one as it did."""
        plain = build("swin", depths=(2,), num_heads=(2,)).to(device)
        for block in plain.layers[0].blocks:
            block.mlp.act = nn.ReLU()
        model = copy.deepcopy(plain)
        kept = {k.module: k.reason for k in accelerate(model).kept}
        assert "mlp: act is a ReLU" in kept["layers.0.blocks.0"]
        assert_same(model, plain, images((32, 32), device))
        attn, x = model.layers[0].blocks[0].attn, torch.randn(2, 16, 32, device=device)
        assert_same(attn, plain.layers[0].blocks[0].attn, x, WindowAttention)

    def test_windows_of_another_size_than_the_attentions(self, device):
        model, plain = accelerated("swin")
        for each in (model, plain):
            each.layers[0].blocks[1].attn.set_window_size((2, 8))
        assert_same(model.to(device), plain.to(device), images((32, 32), device))

    def test_sequential_attention_is_kept(self):
        report = explain(build("swinv2 cr", sequential_attn=True))
        kept = {k.module: k.reason for k in report.kept}
        assert kept["stages.0.blocks.0"] == "attn: it attends sequentially (sequential_attn)"

    def test_third_norm(self, device):
        model, plain = accelerated("swinv2 cr", extra_norm_period=1)
        assert any(isinstance(m.norm3, nn.LayerNorm) for m in plain.modules() if hasattr(m, "norm3"))
        assert_same(model.to(device), plain.to(device), images((32, 32), device), SwinTransformerV2CrBlock)

    def test_separate_biases(self, device):
        plain = build("swinv2")
        for block in plain.layers[0].blocks:
            block.attn.qkv_bias_separate = True
            block.attn.k_bias.normal_()
        model = copy.deepcopy(plain)
        accelerate(model)
        assert_same(model.to(device), plain.to(device), images((32, 32), device), SwinTransformerV2Block)

    def test_fp8(self, device):
        model, plain = accelerated("swin")
        report = accelerate(model, precision="fp8")
        assert {e.precision for e in report.swapped if e.was == "SwinTransformerBlock"} == {"fp8"}
        x = images((32, 32), device)
        with torch.no_grad():
            expected, actual = plain.to(device)(x), model.to(device)(x)
        assert 0 < (actual - expected).norm() / expected.norm() < 0.1

    def test_compiled(self, device):
        model, plain = accelerated("swin", depths=(2,), num_heads=(2,))
        torch._dynamo.reset()
        compiled = torch.compile(model.to(device), backend="aot_eager", fullgraph=True)
        assert_same(compiled, plain.to(device), images((32, 32), device))
