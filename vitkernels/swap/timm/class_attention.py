"""Class attention: the attentions and blocks of timm's cait.py and volo.py in which the class token alone asks.

XCiT's block calls CaiT's attention.
"""

from __future__ import annotations

import torch
from timm.layers import Mlp
from timm.models.cait import ClassAttn, LayerScaleBlockClassAttn
from timm.models.volo import ClassAttention, ClassBlock
from torch import Tensor, nn

from vitkernels.layers import fused, records
from vitkernels.swap._limits import head_dim_limit
from vitkernels.swap._rules import Rule, add, runs_fused
from vitkernels.swap.timm.layers import DROP_PATHS, NORMS


class FusedClassAttn(ClassAttn):
    """timm's ClassAttn of CaiT on :func:`vitkernels.ops.attention`."""

    def forward(self, x: Tensor) -> Tensor:
        return _attend(self, x) if runs_fused(CAIT_ATTENTION, self, x) and x.ndim == 3 else super().forward(x)


class FusedClassAttention(ClassAttention):
    """timm's ClassAttention of VOLO on :func:`vitkernels.ops.attention`."""

    def forward(self, x: Tensor) -> Tensor:
        return _attend(self, x) if runs_fused(VOLO_ATTENTION, self, x) and x.ndim == 3 else super().forward(x)


class FusedLayerScaleBlockClassAttn(LayerScaleBlockClassAttn):
    """timm's LayerScaleBlockClassAttn of CaiT, with both residual sums, LayerScale and DropPath inside the kernels."""

    def forward(self, x: Tensor, x_cls: Tensor) -> Tensor:
        if not runs_fused(CAIT_BLOCK, self, x) or x.ndim != 3:
            return super().forward(x, x_cls)
        tokens = fused.norm(records.norm(self.norm1), torch.cat((x_cls, x), dim=1))
        path = records.drop_path(self.drop_path)
        block = records.Block(
            None, None, records.norm(self.norm2), records.mlp(self.mlp), self.gamma_1, self.gamma_2, path, path
        )
        return fused.behind_attention(block, _attend(self.attn, tokens), x_cls)


class FusedClassBlock(ClassBlock):
    """timm's ClassBlock of VOLO, with both residual sums and DropPath inside the kernels."""

    def forward(self, x: Tensor) -> Tensor:
        if not runs_fused(VOLO_BLOCK, self, x) or x.ndim != 3:
            return super().forward(x)
        branch = _attend(self.attn, fused.norm(records.norm(self.norm1), x))
        block = records.behind_attention(self, records.mlp(self.mlp))
        return torch.cat((fused.behind_attention(block, branch, x[:, :1]), x[:, 1:]), dim=1)


def _attend(attn: ClassAttn | ClassAttention, x: Tensor) -> Tensor:
    return fused.cross_attention(records.attention(attn), x[:, :1], x)


def _attention_limit(attn: ClassAttn | ClassAttention) -> str | None:
    return head_dim_limit(attn.q.out_features // attn.num_heads)


_ATTENTION = {
    "attributes": frozenset({"num_heads", "head_dim", "scale", "fused_attn"}),
    "limit": _attention_limit,
    "limited_by": ("num_heads", "q.out_features"),
}
_CHILDREN = {"attn_drop": (nn.Dropout,), "proj": (nn.Linear,), "proj_drop": (nn.Dropout,)}
_BRANCHES = {"norm1": NORMS, "norm2": NORMS, "mlp": (Mlp,)}

CAIT_ATTENTION = Rule(
    ClassAttn, FusedClassAttn, bypassed=dict.fromkeys(("q", "k", "v"), (nn.Linear,)) | _CHILDREN, **_ATTENTION
)
VOLO_ATTENTION = Rule(
    ClassAttention, FusedClassAttention, bypassed=dict.fromkeys(("q", "kv"), (nn.Linear,)) | _CHILDREN, **_ATTENTION
)
CAIT_BLOCK = Rule(
    LayerScaleBlockClassAttn,
    FusedLayerScaleBlockClassAttn,
    bypassed=_BRANCHES | {"attn": (ClassAttn,), "drop_path": DROP_PATHS},
    parameters=frozenset({"gamma_1", "gamma_2"}),
)
VOLO_BLOCK = Rule(
    ClassBlock,
    FusedClassBlock,
    bypassed=_BRANCHES | {"attn": (ClassAttention,), "drop_path1": DROP_PATHS, "drop_path2": DROP_PATHS},
)
add(CAIT_ATTENTION, VOLO_ATTENTION, CAIT_BLOCK, VOLO_BLOCK)
