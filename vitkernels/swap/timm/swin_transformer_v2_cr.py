"""The patch merging of timm's swin_transformer_v2_cr.py, whose class has the name of Swin V2's."""

from __future__ import annotations

from timm.models.swin_transformer_v2_cr import PatchMerging
from torch import Tensor

from vitkernels.swap import _patch_merging
from vitkernels.swap._rules import Rule, add, runs_fused
from vitkernels.swap.timm.swin_transformer import MERGING_CHILDREN


class FusedPatchMerging(PatchMerging):
    """timm's PatchMerging of Swin V2 Cr, which is Swin's, on :func:`vitkernels.ops.patch_merging`."""

    def forward(self, x: Tensor) -> Tensor:
        if runs_fused(MERGING, self, x) and _patch_merging.has_patches(self, x):
            return _patch_merging.merge(self, x)
        return super().forward(x)


MERGING = Rule(PatchMerging, FusedPatchMerging, bypassed=MERGING_CHILDREN, adapts=False)
add(MERGING)
