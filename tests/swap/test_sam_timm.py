"""timm's SAM encoder, accelerated: blocks in windows and over the image, with decomposed relative positions."""

import pytest
import torch
from parity import assert_parity, no_call_of, shake

from vitkernels import accelerate, restore

timm = pytest.importorskip("timm")
from timm.models import vision_transformer_sam as sam  # noqa: E402

SIZE = {"patch_size": 8, "embed_dim": 32, "num_heads": 2, "depth": 2, "num_classes": 10, "neck_chans": 16}
SIZE |= {"global_attn_indexes": (1,), "window_size": 3}


def build(image: tuple[int, int], **more) -> torch.nn.Module:
    made = timm.create_model("samvit_base_patch16", **SIZE | {"img_size": image} | more).eval()
    return shake(made)


# Windows of 3: 6 rows are whole windows, 4 and 5 are padded.
@pytest.mark.parametrize("image", [(48, 48), (32, 40)], ids=["whole", "padded"])
@pytest.mark.parametrize("options", [{}, {"init_values": 0.1}, {"use_rel_pos": False}], ids=["", "scaled", "plain"])
def test_fp32(image, options, device):
    model = build(image, **options).to(device)
    keys = list(model.state_dict())
    images = torch.randn(2, 3, *image, device=device)
    report = assert_parity(model, images)
    assert list(model.state_dict()) == keys
    assert [type(block).__qualname__ for block in model.blocks] == ["FusedBlock"] * 2, report
    with torch.no_grad(), no_call_of(sam.Block.forward), no_call_of(sam.Attention.forward):
        model(images)
    restore(model)
    assert {type(block) for block in model.blocks} == {sam.Block}


def test_tables_are_resized(device):
    model = build((48, 48)).to(device)
    block = model.blocks[1]
    assert block.window_size == 0
    assert_parity(block, torch.randn(1, 4, 8, 32, device=device))


def test_in_training(device):
    """Paths of windows are dropped for each window apart: that block runs timm's forward."""
    model = build((32, 40), drop_path_rate=0.5).to(device).train()
    assert_parity(model, torch.randn(3, 3, 32, 40, device=device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, device):
    model = build((32, 40)).to(device, dtype)
    assert_parity(model, torch.randn(2, 3, 32, 40, device=device, dtype=dtype))


def test_attention_alone(device):
    attn = build((48, 48)).blocks[0].attn.to(device)
    x = torch.randn(2, 3, 3, 32, device=device)
    assert_parity(attn, x)
    with torch.no_grad(), no_call_of(sam.Attention.forward):
        attn(x)


def test_normalized_queries_stay(device):
    model = build((32, 32), qk_norm=True).to(device)
    x = torch.randn(1, 3, 32, 32, device=device)
    with torch.no_grad():
        expected = model(x)
        kept = {k.module: k.reason for k in accelerate(model).kept}
        assert "normalizes queries and keys" in kept["blocks.0"]
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
