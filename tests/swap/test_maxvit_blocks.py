"""The transformer blocks of timm's MaxViT and CoAtNet, accelerated, against themselves as they were."""

from functools import partial

import pytest
import torch
from parity import assert_parity, no_call_of, shake

from vitkernels import accelerate, restore

timm = pytest.importorskip("timm")
from timm.layers import RelPosBias, RelPosBiasTf, RelPosMlp  # noqa: E402
from timm.models import maxxvit  # noqa: E402


def config(**more) -> maxxvit.MaxxVitTransformerCfg:
    return maxxvit.MaxxVitTransformerCfg(dim_head=16, window_size=(4, 4), rel_pos_dim=24, **more)


def partition(cls, **more):
    kind = {"partition_type": more.pop("partition_type")} if "partition_type" in more else {}
    drop_path = more.pop("drop_path", 0.0)
    return cls(32, cfg=config(**more), drop_path=drop_path, **kind)


def transformer(rel_pos, dim_out=32, stride=1, feat_size=(4, 6), **more):
    cls = partial(rel_pos, window_size=feat_size)
    return maxxvit.TransformerBlock2d(32, dim_out, stride=stride, rel_pos_cls=cls, cfg=config(**more))


# By name: a block, and the shapes of its images.
CL, CF = [(2, 8, 8, 32), (2, 4, 8, 32)], [(2, 32, 8, 8), (2, 32, 4, 8)]
BLOCKS = {
    "windows": (lambda: partition(maxxvit.PartitionAttentionCl), CL),
    "grid, tf": (
        lambda: partition(
            maxxvit.PartitionAttentionCl, partition_type="grid", rel_pos_type="bias_tf", head_first=False
        ),
        CL,
    ),
    "windows, mlp": (lambda: partition(maxxvit.PartitionAttentionCl, rel_pos_type="mlp", init_values=0.5), CL),
    "parallel": (lambda: partition(maxxvit.ParallelPartitionAttention), CL),
    "grid, channels first": (lambda: partition(maxxvit.PartitionAttention2d, partition_type="grid"), CF),
    "whole": (lambda: transformer(RelPosBias, init_values=0.5), [(2, 32, 4, 6)]),
    "whole, tf": (lambda: transformer(RelPosBiasTf), [(2, 32, 4, 6)]),
    "whole, mlp": (lambda: transformer(RelPosMlp, 48, 2), [(2, 32, 8, 12)]),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_fp32(name, device):
    make, shapes = BLOCKS[name]
    for shape in shapes:
        block = shake(make().eval()).to(device)
        for parameter, tensor in block.named_parameters():
            # It shifts all biases of a head alike, which no softmax sees: its gradient is rounding alone.
            tensor.requires_grad_(not parameter.endswith("rel_pos.mlp.fc2.bias"))
        cls, keys = type(block), list(block.state_dict())
        x = torch.randn(shape, device=device)
        report = assert_parity(block, x)
        assert type(block).__qualname__ == f"Fused{cls.__name__}", report
        with torch.no_grad(), no_call_of(cls.forward):
            block(x)
        assert list(block.state_dict()) == keys
        restore(block)
        assert type(block) is cls


def test_in_training(device):
    """Paths are dropped as timm drops them under the same seed."""
    block = shake(partition(maxxvit.PartitionAttentionCl, drop_path=0.5)).to(device).train()
    assert_parity(block, torch.randn(4, 4, 8, 32, device=device))


@pytest.mark.parametrize("name", ["windows", "whole"])
def test_a_hook_on_a_child_is_called(name, device):
    make, shapes = BLOCKS[name]
    block, x, called = shake(make().eval()).to(device), torch.randn(shapes[0], device=device), []
    accelerate(block)
    with torch.no_grad():
        expected = block(x)
        block.attn.qkv.register_forward_hook(lambda *_: called.append(True))
        torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-4)
    assert called


def test_whole_model(device):
    """From contiguous and channels_last images."""
    size = {"embed_dim": (32, 32), "depths": (1, 1), "block_type": ("M", "T"), "num_classes": 10, "img_size": 64}
    model = shake(timm.create_model("maxvit_pico_rw_256", **size).eval(), 0.02).to(device)
    images = torch.randn(1, 3, 64, 64, device=device)
    with torch.no_grad():
        expected = model(images)
        swapped = {entry.was for entry in accelerate(model).swapped}
        assert swapped >= {"PartitionAttentionCl", "TransformerBlock2d"}
        torch.testing.assert_close(model(images), expected, rtol=1e-3, atol=1e-3)
        images = images.contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(model(images), expected, rtol=1e-3, atol=1e-3)


def test_attention_alone(device):
    attn = shake(partition(maxxvit.PartitionAttentionCl).attn).to(device)
    x = torch.randn(2, 4, 4, 32, device=device)
    assert_parity(attn, x)
    with torch.no_grad(), no_call_of(maxxvit.AttentionCl.forward):
        attn(x)
