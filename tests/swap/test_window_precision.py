"""Blocks in windows, or with relative positions, by value: in bf16, under autocast, with dropped paths and weights."""

import copy

import pytest
import torch
from parity import assert_parity, judge, run, shake
from torch import Tensor, nn

from vitkernels import accelerate, reference
from vitkernels.testing.sums import summed_alike

timm = pytest.importorskip("timm")
from timm.models import beit, maxxvit, swin_transformer, swin_transformer_v2  # noqa: E402

SHIFTED = {"window_size": 4, "shift_size": 2}
MAXVIT = maxxvit.MaxxVitTransformerCfg(dim_head=16, window_size=(4, 4))
# By name: a block of 2 heads, with a path dropped as often as it is told, and the shape of its input.
BLOCKS = {
    "swin": (
        lambda p: swin_transformer.SwinTransformerBlock(32, (8, 8), 2, drop_path=p, **SHIFTED), (3, 8, 8, 32)
    ),
    "swinv2": (
        lambda p: swin_transformer_v2.SwinTransformerV2Block(32, (8, 8), 2, drop_path=p, **SHIFTED), (3, 8, 8, 32)
    ),
    "beit": (
        lambda p: beit.Block(32, 2, qkv_bias=True, window_size=(3, 4), init_values=0.5, drop_path=p), (3, 13, 32)
    ),
    "maxvit": (
        lambda p: maxxvit.PartitionAttentionCl(32, partition_type="grid", cfg=MAXVIT, drop_path=p), (3, 8, 8, 32)
    ),
}  # fmt: skip


def make(name: str, device: torch.device, drop_path: float = 0.0) -> tuple[nn.Module, Tensor]:
    block, shape = BLOCKS[name]
    return shake(block(drop_path).train()).to(device), torch.randn(shape, device=device)


class UnderAutocast(nn.Module):
    """A block under autocast to bf16, but for the truth."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.dtype != torch.float64):
            return self.block(x)


@pytest.mark.parametrize("name", BLOCKS)
def test_bf16_with_dropped_paths(name, device):
    block, x = make(name, device, drop_path=0.5)
    report = assert_parity(block.bfloat16(), x.bfloat16(), gain_counts=False, inputs=2)
    assert type(block).__qualname__.startswith("Fused"), report


@pytest.mark.parametrize("name", BLOCKS)
def test_autocast(name, device):
    block, x = make(name, device)
    report = assert_parity(UnderAutocast(block), x, gain_counts=False, inputs=2)
    assert type(block).__qualname__.startswith("Fused"), report


class Drawn(nn.Module):
    """Drops the weights that the kernels drop under the same seed, in place of nn.Dropout."""

    def forward(self, weights: Tensor) -> Tensor:
        seed = int(torch.randint(2**62, (1,), device=weights.device))
        return weights * reference.dropout_scale(seed, weights.shape, 0.3).to(weights)


@pytest.mark.parametrize("name", BLOCKS)
def test_dropped_weights(name, device):
    model, x = make(name, device)
    model.attn.attn_drop.p = 0.3
    plain = copy.deepcopy(model)
    plain.attn.attn_drop, plain.attn.fused_attn = Drawn(), False
    wide = copy.deepcopy(plain).double()
    accelerate(model)
    assert type(model).__qualname__.startswith("Fused")
    upstream = torch.randn_like(x)

    def draw(seed: int) -> tuple[dict, dict, dict]:
        given = torch.randn_like(x)
        with summed_alike(x):
            yardstick = run(plain, given, upstream, seed)
        return run(model, given, upstream, seed), yardstick, run(wide, given.double(), upstream, seed)

    judge(draw)
