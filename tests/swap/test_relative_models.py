"""timm's models with a bias by relative position over the whole image, accelerated, against themselves as they were."""

import pytest
import torch
from parity import assert_parity, no_call_of, shake

from vitkernels import accelerate, restore

timm = pytest.importorskip("timm")
from timm.models import beit, vision_transformer_relpos  # noqa: E402

SIZE = {"patch_size": 16, "embed_dim": 32, "num_heads": 2, "depth": 2, "num_classes": 10}
BIAS = {"rel_pos_type": "bias"}
SHARED = {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}
# By name: timm's name of the model, its options, and the class of its blocks.
MODELS = {
    "beit": ("beit_base_patch16_224", {}, beit.Block),
    "beit, shared": ("beit_base_patch16_224", SHARED, beit.Block),
    "beit, gated": ("beit_base_patch16_224", {"swiglu_mlp": True, "scale_mlp": True, "depth": 1}, beit.Block),
    "bias": ("vit_relpos_medium_patch16_224", BIAS, vision_transformer_relpos.RelPosBlock),
    "bias, class token": ("vit_relpos_medium_patch16_cls_224", BIAS, vision_transformer_relpos.RelPosBlock),
    "mlp, class token": ("vit_relpos_medium_patch16_cls_224", {"depth": 1}, vision_transformer_relpos.RelPosBlock),
    "mlp, shared": (
        "vit_relpos_base_patch32_plus_rpn_256",
        {"shared_rel_pos": True},
        vision_transformer_relpos.ResPostRelPosBlock,
    ),
    "mlp": ("vit_relpos_base_patch32_plus_rpn_256", {"depth": 1}, vision_transformer_relpos.ResPostRelPosBlock),
    "mlp, swin": (
        "vit_relpos_medium_patch16_224",
        {"rel_pos_type": "mlp_swin", "depth": 1, "qk_norm": True},
        vision_transformer_relpos.RelPosBlock,
    ),
}


def build(name: str, image: tuple[int, int], **more) -> torch.nn.Module:
    architecture, options, _ = MODELS[name]
    return shake(timm.create_model(architecture, **SIZE | options | {"img_size": image} | more).eval())


@pytest.mark.parametrize("image", [(32, 32), (48, 64)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_fp32(name, image, device):
    model = build(name, image).to(device)
    keys = list(model.state_dict())
    images = torch.randn(2, 3, *image, device=device)
    report = assert_parity(model, images)
    assert list(model.state_dict()) == keys
    assert all(type(block).__qualname__.startswith("Fused") for block in model.blocks), report
    with torch.no_grad(), no_call_of(MODELS[name][2].forward):
        model(images)
    restore(model)
    assert {type(block).__module__.partition(".")[0] for block in model.blocks} == {"timm"}


@pytest.mark.parametrize("name", ["beit", "mlp"])
def test_in_training(name, device):
    """Paths are dropped, and units of the MLP that makes the bias, as timm drops them under the same seed."""
    model = build(name, (32, 32), drop_path_rate=0.5).to(device).train()
    assert_parity(model, torch.randn(3, 3, 32, 32, device=device))


def test_another_size_after_the_swap(device):
    model = build("beit", (32, 32)).to(device)
    accelerate(model)
    if not hasattr(model, "set_input_size"):
        pytest.skip("this release of timm cannot change BEiT's size")
    model.set_input_size((48, 32))
    images = torch.randn(1, 3, 48, 32, device=device)
    with torch.no_grad():
        with no_call_of(beit.Block.forward), no_call_of(beit.Attention.forward):
            actual = model(images)
        restore(model)
        torch.testing.assert_close(actual, model(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["beit", "bias"])
def test_a_hook_on_a_child_is_called(name, device):
    model = build(name, (32, 32)).to(device)
    accelerate(model)
    images, called = torch.randn(1, 3, 32, 32, device=device), []
    with torch.no_grad():
        expected = model(images)
        model.blocks[0].attn.proj.register_forward_hook(lambda *_: called.append(True))
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)
    assert called


def test_two_biases_run_in_timms_forward(device):
    model = build("beit", (32, 32)).to(device)
    block, x = model.blocks[0], torch.randn(1, 5, 32, device=device)
    shared = torch.randn(1, 2, 5, 5, device=device)
    with torch.no_grad():
        expected = block(x, shared_rel_pos_bias=shared)
        accelerate(block)
        torch.testing.assert_close(block(x, shared_rel_pos_bias=shared), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["beit", "bias, class token", "mlp, swin"])
def test_attention_alone(name, device):
    attn, tokens = build(name, (32, 32)).blocks[0].attn.to(device), 5 if "swin" not in name else 4
    x = torch.randn(2, tokens, 32, device=device)
    assert_parity(attn, x)
    with torch.no_grad(), no_call_of(type(attn).__mro__[1].forward):
        attn(x)
