"""Blocks of timm that attend within windows without shifts, or from other queries, against themselves as they were."""

import pytest
import torch
from parity import assert_parity, no_call_of, shake
from torch import nn

from vitkernels import accelerate, restore

timm = pytest.importorskip("timm")
from timm.models import cait, davit, gcvit, hieradet_sam2, nest, twins, volo  # noqa: E402


class Given(nn.Module):
    """A block with what it takes beside x: an image's size, or queries, whose gradient is then judged too."""

    def __init__(self, block: nn.Module, size: tuple[int, int] | None = None, queries: torch.Tensor | None = None):
        super().__init__()
        self.block, self.size = block, size
        self.queries = None if queries is None else nn.Parameter(queries)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        more = self.size if self.queries is None else self.queries
        return self.block(x) if more is None else self.block(x, more)


def global_context(use_global: bool) -> nn.Module:
    block = gcvit.GlobalContextVitBlock(32, (8, 8), 2, 4, use_global=use_global, layer_scale=0.5)
    return Given(block, queries=torch.randn(2, 4, 4, 32) if use_global else None)


def multi_scale(window: int, dim_out: int = 32, **more) -> nn.Module:
    return Given(hieradet_sam2.MultiScaleBlock(32, dim_out, 2, window_size=window, **more))


# By name: what makes a block, and the shapes of its inputs. 6 rows and 10 columns are no whole windows of 4.
BLOCKS = {
    "nest": (lambda: Given(nest.TransformerLayer(32, 2, qkv_bias=True)), [(2, 4, 9, 32), (2, 1, 16, 32)]),
    "volo": (lambda: Given(volo.Transformer(32, 2)), [(2, 4, 4, 32), (2, 3, 5, 32)]),
    "davit": (lambda: Given(davit.SpatialBlock(32, 2, window_size=4)), [(2, 32, 8, 8), (2, 32, 6, 10)]),
    "gcvit": (lambda: global_context(False), [(2, 8, 8, 32), (2, 4, 8, 32)]),
    "gcvit, global": (lambda: global_context(True), [(2, 8, 8, 32), (2, 4, 8, 32)]),
    "twins": (lambda: Given(twins.Block(32, 2, ws=4), (6, 10)), [(2, 60, 32)]),
    "twins, global": (lambda: Given(twins.Block(32, 2, sr_ratio=2, ws=1), (6, 10)), [(2, 60, 32)]),
    "cait": (
        lambda: Given(cait.LayerScaleBlockClassAttn(32, 2, init_values=0.5), queries=torch.randn(3, 1, 32)),
        [(3, 9, 32), (3, 16, 32)],
    ),
    "cait, attention": (lambda: Given(cait.ClassAttn(32, 2, qkv_bias=True)), [(2, 9, 32)]),
    "volo, class": (lambda: Given(volo.ClassBlock(32, 2, head_dim=24)), [(2, 10, 32), (2, 17, 32)]),
    "volo, class attention": (lambda: Given(volo.ClassAttention(32, 2, qkv_bias=True)), [(2, 9, 32)]),
    "sam2": (lambda: multi_scale(4, init_values=0.5), [(2, 8, 8, 32), (2, 6, 10, 32)]),
    "sam2, whole": (lambda: multi_scale(0), [(2, 4, 6, 32)]),
    "sam2, pooled": (lambda: multi_scale(4, 64, q_stride=(2, 2)), [(2, 8, 8, 32), (2, 6, 10, 32)]),
    "sam2, wider": (lambda: multi_scale(4, 64), [(2, 6, 10, 32)]),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_fp32(name, device):
    if name == "nest" and not hasattr(BLOCKS[name][0]().block, "drop_path1"):
        pytest.skip("this release of timm drops both paths of NesT's layer by one module")
    make, shapes = BLOCKS[name]
    for shape in shapes:
        model = shake(make().eval()).to(device)
        cls, keys, x = type(model.block), list(model.state_dict()), torch.randn(shape, device=device)
        report = assert_parity(model, x)
        for entry in report.kept:
            if "this release of timm" in entry.reason:
                pytest.skip(entry.reason)
        assert type(model.block).__qualname__ == f"Fused{cls.__name__}", report
        assert list(model.state_dict()) == keys
        with torch.no_grad(), no_call_of(cls.forward):
            model(x)
        restore(model)
        assert type(model.block) is cls


@pytest.mark.parametrize("name", ["nest", "davit", "twins", "cait", "volo, class", "sam2, pooled"])
def test_in_training(name, device):
    """Paths are dropped as timm drops them under the same seed."""
    make, shapes = BLOCKS[name]
    model = shake(make()).to(device).train()
    for path in ("drop_path", "drop_path1", "drop_path2"):
        if hasattr(model.block, path):
            setattr(model.block, path, timm.layers.DropPath(0.5))
    shape = (3, *shapes[-1][1:])
    assert_parity(model, torch.randn(shape, device=device))


@pytest.mark.parametrize("name", ["nest", "davit", "gcvit", "twins", "cait", "volo, class", "sam2"])
def test_a_hook_on_a_child_is_called(name, device):
    make, shapes = BLOCKS[name]
    model, x, called = shake(make().eval()).to(device), torch.randn(shapes[0], device=device), []
    accelerate(model)
    with torch.no_grad():
        expected = model(x)
        model.block.attn.proj.register_forward_hook(lambda *_: called.append(True))
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    assert called


def test_windows_that_do_not_fit_are_timms_to_refuse(device):
    model = global_context(False).to(device)
    accelerate(model)
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        model(torch.randn(2, 6, 10, 32, device=device))
