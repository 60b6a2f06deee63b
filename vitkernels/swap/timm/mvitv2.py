"""The blocks and attention of timm's mvitv2.py. Their pooling, a convolution, is called."""

from __future__ import annotations

from timm.models.mvitv2 import MultiScaleAttention, MultiScaleBlock, reshape_post_pool, reshape_pre_pool
from torch import Tensor, nn

from vitkernels import ops
from vitkernels.layers import fused, records
from vitkernels.layers.pooled import pooled_attention
from vitkernels.swap._limits import head_dim_limit
from vitkernels.swap._rules import Rule, add, runs_fused
from vitkernels.swap.timm.vision_transformer import BRANCHES

_OPTIONAL_NORM = (*BRANCHES["norm1"], type(None))
_OPTIONAL_LINEAR = (nn.Linear, type(None))


class FusedMultiScaleAttention(MultiScaleAttention):
    """timm's MultiScaleAttention on (B, N, C), of which no tensor of all pairs is stored.

    Rows and columns of the pooled keys stand beside the channels of a head. If the sum is beyond what the attention
    kernel takes, as in images of more than a thousand pixels, timm's forward runs.
    """

    def forward(self, x: Tensor, feat_size: list[int]):
        if not runs_fused(ATTENTION, self, x) or x.ndim != 3 or not _fits(self, feat_size):
            return super().forward(x, feat_size)
        attn = records.attention(self)
        qkv = fused.linear(attn.qkv, x).unflatten(-1, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4)
        (q, q_size), (k, k_size), (v, _) = (
            self._pool(t, name, feat_size) for t, name in zip(qkv.unbind(), "qkv", strict=True)
        )
        if self.rel_pos_type == "spatial":
            tables = records.parameter(self, "rel_pos_h"), records.parameter(self, "rel_pos_w")
            out = pooled_attention(q, k, v, *tables, tuple(q_size), tuple(k_size), attn.scale)
        else:
            out = ops.attention(q, k, v, scale=attn.scale)
        if self.residual_pooling:
            out = out + q
        return fused.linear(attn.proj, out.transpose(1, 2).flatten(2)), q_size

    def _pool(self, x: Tensor, name: str, size: list[int]) -> tuple[Tensor, list[int]]:
        """Pool one of queries, keys and values (B, H, N, D), and normalise what comes of it."""
        pool = self._modules.get(f"pool_{name}")
        if pool is not None:
            image, cls = reshape_pre_pool(x, size, self.has_cls_token)
            x, size = reshape_post_pool(pool(image), self.num_heads, cls)
        return fused.norm(records.norm(self._modules.get(f"norm_{name}")), x), size


class FusedMultiScaleBlock(MultiScaleBlock):
    """timm's MultiScaleBlock, a pre-norm block on (B, N, C) that pools its shortcut as its queries."""

    def forward(self, x: Tensor, feat_size: list[int]):
        if not runs_fused(BLOCK, self, x) or x.ndim != 3:
            return super().forward(x, feat_size)
        block = records.behind_attention(self, records.mlp(self.mlp))
        normed = fused.norm(records.norm(self.norm1), x)
        shortcut = self._shortcut_pool(_projected(self.shortcut_proj_attn, normed, x), feat_size)
        branch, size = self.attn(normed, feat_size)
        scale = fused.drop_path_scale(block.drop_path1, branch)
        normed, x = fused.add_norm(block.norm2, branch, shortcut, drop_path_scale=scale)
        return fused.add_mlp(block, normed, _projected(self.shortcut_proj_mlp, normed, x)), size


def _projected(layer: nn.Module | None, normed: Tensor, x: Tensor) -> Tensor:
    return x if layer is None else fused.linear(records.linear(layer), normed)


def _fits(attn: MultiScaleAttention, size: list[int]) -> bool:
    if attn.rel_pos_type != "spatial":
        return True
    stride = (1, 1) if attn.pool_k is None else attn.pool_k.stride
    pooled = (-(-n // s) for n, s in zip(size, stride, strict=True))
    return head_dim_limit(attn.head_dim + sum(pooled)) is None


ATTENTION = Rule(
    MultiScaleAttention,
    FusedMultiScaleAttention,
    bypassed={
        "qkv": (nn.Linear,),
        "proj": (nn.Linear,),
        **dict.fromkeys(("norm_q", "norm_k", "norm_v"), _OPTIONAL_NORM),
    },
    called=frozenset({"pool_q", "pool_k", "pool_v"}),
    optional_parameters=frozenset({"rel_pos_h", "rel_pos_w"}),
    attributes=frozenset(
        {"num_heads", "dim_out", "head_dim", "scale", "has_cls_token", "mode", "unshared", "rel_pos_type",
         "residual_pooling"}
    ),
    limit=lambda attn: head_dim_limit(attn.head_dim),
    limited_by=("head_dim",),
)  # fmt: skip
BLOCK = Rule(
    MultiScaleBlock,
    FusedMultiScaleBlock,
    bypassed={
        **{name: BRANCHES[name] for name in ("norm1", "drop_path1", "norm2", "mlp", "drop_path2")},
        "shortcut_proj_attn": _OPTIONAL_LINEAR,
        "shortcut_proj_mlp": _OPTIONAL_LINEAR,
    },
    called=frozenset({"attn", "shortcut_pool_attn"}),
    attributes=frozenset({"dim", "dim_out", "has_cls_token"}),
)
add(ATTENTION, BLOCK)
