"""The blocks and attentions of timm's twins.py (Twins-SVT, Twins-PCPVT)."""

from __future__ import annotations

from timm.layers import Mlp
from timm.models.twins import Block, GlobalSubSampleAttn, LocallyGroupedAttn
from torch import Tensor, nn

from vitkernels.layers import fused, records
from vitkernels.swap._images import channels_first, tokens_of_channels_first
from vitkernels.swap._limits import head_dim_limit
from vitkernels.swap._rules import Rule, add, runs_fused
from vitkernels.swap.timm.vision_transformer import BRANCHES


class FusedLocallyGroupedAttn(LocallyGroupedAttn):
    """timm's LocallyGroupedAttn: attention in windows."""

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        if runs_fused(LOCAL, self, x) and _fits(x, size):
            windows = records.Windows(tuple(size), (self.ws, self.ws))
            return fused.attention(records.attention(self)._replace(positions=windows), x)
        return super().forward(x, size)


class FusedGlobalSubSampleAttn(GlobalSubSampleAttn):
    """timm's GlobalSubSampleAttn, whose keys and values come from an image that a convolution makes smaller."""

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        if not runs_fused(GLOBAL, self, x) or not _fits(x, size):
            return super().forward(x, size)
        small = x
        if self.sr is not None:
            small = self.norm(tokens_of_channels_first(self.sr(channels_first(x, size))))
        return fused.cross_attention(records.attention(self), x, small)


class FusedBlock(Block):
    """timm's Twins Block, a pre-norm block that calls its attention."""

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        if runs_fused(BLOCK, self, x):
            branch = self.attn(fused.norm(records.norm(self.norm1), x), size)
            return fused.behind_attention(records.behind_attention(self, records.mlp(self.mlp)), branch, x)
        return super().forward(x, size)


def _fits(x: Tensor, size: tuple[int, int]) -> bool:
    return x.ndim == 3 and x.shape[1] == size[0] * size[1]


def _attention_limit(attn: nn.Module) -> str | None:
    return head_dim_limit(attn.dim // attn.num_heads)


_ATTRIBUTES = frozenset({"dim", "num_heads", "scale", "fused_attn"})
_CHILDREN = {"attn_drop": (nn.Dropout,), "proj": (nn.Linear,), "proj_drop": (nn.Dropout,)}

LOCAL = Rule(
    LocallyGroupedAttn,
    FusedLocallyGroupedAttn,
    bypassed={"qkv": (nn.Linear,), **_CHILDREN},
    attributes=_ATTRIBUTES | {"ws"},
    limit=_attention_limit,
    limited_by=("dim", "num_heads"),
)
GLOBAL = Rule(
    GlobalSubSampleAttn,
    FusedGlobalSubSampleAttn,
    bypassed={"q": (nn.Linear,), "kv": (nn.Linear,), **_CHILDREN},
    called=frozenset({"sr", "norm"}),
    attributes=_ATTRIBUTES | {"sr_ratio"},
    limit=_attention_limit,
    limited_by=("dim", "num_heads"),
)
BLOCK = Rule(
    Block,
    FusedBlock,
    bypassed={name: classes for name, classes in BRANCHES.items() if name != "attn"} | {"mlp": (Mlp,)},
    called=frozenset({"attn"}),
)
add(LOCAL, GLOBAL, BLOCK)
