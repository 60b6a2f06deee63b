"""The MobileViT block of timm's mobilevit.py: the first version, whose Transformer attends between patches.

Nothing is unfolded. The convolutions stay.
"""

from __future__ import annotations

import torch
from timm.models.mobilevit import MobileVitBlock
from torch import Tensor, nn

from vitkernels.layers import _own, records
from vitkernels.swap._mobilevit import between_patches
from vitkernels.swap._rules import RULES, Rule, add, runs_fused
from vitkernels.swap.timm.vision_transformer import FusedBlock


class FusedMobileVitBlock(MobileVitBlock):
    """timm's MobileVitBlock, whose Transformer reads the image as it lies, neither unfolded nor folded.

    It runs timm's forward if a block of the Transformer was not swapped, and if one drops paths: timm then drops one
    for a place in all patches, not for an image.
    """

    def forward(self, x: Tensor) -> Tensor:
        blocks = self._blocks(x) if runs_fused(BLOCK, self, x) and x.ndim == 4 else None
        if blocks is None:
            return super().forward(x)
        shortcut, x = x, self.conv_1x1(self.conv_kxk(x))
        x = self.conv_proj(between_patches(blocks, self.norm, x, tuple(self.patch_size)))
        return x if self.conv_fusion is None else self.conv_fusion(torch.cat((shortcut, x), dim=1))

    def _blocks(self, x: Tensor) -> list[records.Block] | None:
        """Read the Transformer's blocks; return None if one of them cannot run in windows, or must be called."""
        if type(self.transformer) is not nn.Sequential or any(map(_own.has_hooks, self.transformer.modules())):
            return None
        found = []
        for block in self.transformer:
            if type(block) is not FusedBlock or not runs_fused(RULES[FusedBlock], block, x):
                return None
            read = records.block(block)
            normed = read.attn.q_norm is not None or read.attn.k_norm is not None
            if normed or read.fp8 or read.drop_path1 is not None or read.drop_path2 is not None:
                return None
            found.append(read)
        return found


def _limit(block: MobileVitBlock) -> str | None:
    others = (type(each).__name__ for each in block.transformer if RULES.get(type(each)) is not RULES[FusedBlock])
    return next((f"its Transformer holds a {name}, not timm's Block" for name in others), None)


BLOCK = Rule(
    MobileVitBlock,
    FusedMobileVitBlock,
    called=frozenset({"conv_kxk", "conv_1x1", "transformer", "norm", "conv_proj", "conv_fusion"}),
    attributes=frozenset({"patch_size", "patch_area"}),
    limit=_limit,
)
add(BLOCK)
