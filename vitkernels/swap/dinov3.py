"""Rules for DINOv3's own code (``torch.hub`` and the repository): blocks, attention, MLPs, patch embedding.

Imported only if the package ``dinov3`` is imported. Pickle needs the subclasses at module level. ``LinearKMaskedBias``
multiplies its bias by a mask from the checkpoint (NaN until one is loaded). On a list of tensors, and in training with
``sample_drop_ratio``, a block runs its original forward with swapped modules inside.
"""

from __future__ import annotations

from dinov3.layers.attention import LinearKMaskedBias, SelfAttention
from dinov3.layers.block import SelfAttentionBlock
from dinov3.layers.ffn_layers import Mlp, SwiGLUFFN
from dinov3.layers.layer_scale import LayerScale
from dinov3.layers.patch_embed import PatchEmbed
from torch import Tensor, nn

from vitkernels import ops
from vitkernels.layers import fused, records
from vitkernels.swap import _dino
from vitkernels.swap._limits import layer_scales_limit, packed_heads_limit
from vitkernels.swap._rules import PARAMETERS, Rule, add, runs_fused


class FusedSelfAttention(SelfAttention):
    """DINOv3's SelfAttention with RoPE and attention in the kernels; the projections stay PyTorch's."""

    def compute_attention(self, qkv: Tensor, attn_bias=None, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
        if attn_bias is None and runs_fused(ATTENTION, self, qkv):
            B, N, C = qkv.shape
            packed = qkv.view(B, N, 3, self.num_heads, C // (3 * self.num_heads))
            tables, prefix = _rope(rope, N)
            return ops.attention_qkvpacked(packed, scale=self.scale, rope=tables, num_prefix_tokens=prefix).flatten(2)
        return super().compute_attention(qkv, attn_bias=attn_bias, rope=rope)


class FusedMlp(Mlp):
    """DINOv3's Mlp on :func:`vitkernels.ops.mlp`."""

    def forward(self, x: Tensor) -> Tensor:
        if runs_fused(MLP, self, x):
            return fused.mlp(_dino.mlp(self), x)
        return super().forward(x)


class FusedSwiGLUFFN(SwiGLUFFN):
    """DINOv3's SwiGLUFFN on :func:`vitkernels.ops.swiglu_mlp`."""

    def forward(self, x: Tensor) -> Tensor:
        if runs_fused(SWIGLU, self, x):
            return fused.mlp(_dino.mlp(self), x)
        return super().forward(x)


class FusedPatchEmbed(PatchEmbed):
    """DINOv3's PatchEmbed on :func:`vitkernels.ops.patch_embed`."""

    def forward(self, x: Tensor) -> Tensor:
        if runs_fused(PATCH_EMBED, self, x) and _dino.fills_patches(self, x):
            return _dino.patch_embed(self, x)
        return super().forward(x)


class FusedSelfAttentionBlock(SelfAttentionBlock):
    """DINOv3's pre-norm block on one tensor, with both residual sums and LayerScale inside the kernels."""

    def forward(self, x_or_x_list, rope_or_rope_list=None):
        x = x_or_x_list
        if (self.training and self.sample_drop_ratio > 0.0) or not runs_fused(BLOCK, self, x):
            return super().forward(x_or_x_list, rope_or_rope_list)
        tables, prefix = _rope(rope_or_rope_list, x.shape[1])
        return fused.block(_dino.block(self, _attention(self.attn, prefix)), x, rope=tables)


def _rope(rope: tuple[Tensor, Tensor] | None, tokens: int) -> tuple[ops.Rope | None, int]:
    """Return DINOv3's ``(sin, cos)`` of the patches as :class:`ops.Rope`, and the number of prefix tokens."""
    if rope is None:
        return None, 0
    sin, cos = rope
    return ops.Rope(cos, sin), tokens - sin.shape[-2]


def _attention(attn: SelfAttention, prefix: int) -> records.Attention:
    children = attn._modules
    qkv = children["qkv"]
    read, base = records.linear(qkv), qkv._modules.get("base_layer", qkv)
    if read.bias is not None and isinstance(base, LinearKMaskedBias):
        read = read._replace(bias=read.bias * base.bias_mask.to(read.bias.dtype))
    return records.Attention(
        read,
        records.linear(children["proj"]),
        attn.num_heads,
        qkv.in_features // attn.num_heads,
        attn.scale,
        proj_drop=records.dropout(children["proj_drop"]),
        num_prefix_tokens=prefix,
    )


PARAMETERS[LayerScale] = frozenset({"gamma"})
PARAMETERS[LinearKMaskedBias] = PARAMETERS[nn.Linear]

ATTENTION = Rule(
    SelfAttention,
    FusedSelfAttention,
    bypassed={"qkv": (nn.Linear, LinearKMaskedBias), "proj": (nn.Linear,), "proj_drop": (nn.Dropout,)},
    called=frozenset({"attn_drop"}),  # nothing calls it, in the original either
    attributes=frozenset({"num_heads", "scale"}),
    limit=packed_heads_limit,
)
MLP = Rule(
    Mlp,
    FusedMlp,
    bypassed={"fc1": (nn.Linear,), "act": (nn.GELU, nn.SiLU), "fc2": (nn.Linear,), "drop": (nn.Dropout,)},
)
SWIGLU = Rule(SwiGLUFFN, FusedSwiGLUFFN, bypassed={"w1": (nn.Linear,), "w2": (nn.Linear,), "w3": (nn.Linear,)})
PATCH_EMBED = Rule(
    PatchEmbed,
    FusedPatchEmbed,
    bypassed={"proj": (nn.Conv2d,)},
    called=frozenset({"norm"}),
    attributes=_dino.PATCH_EMBED_ATTRIBUTES,
    limit=_dino.patch_embed_limit,
)
BLOCK = Rule(
    SelfAttentionBlock,
    FusedSelfAttentionBlock,
    bypassed={
        "norm1": (nn.LayerNorm,),
        "attn": (SelfAttention,),
        "ls1": (nn.Identity, LayerScale),
        "norm2": (nn.LayerNorm,),
        "mlp": (Mlp, SwiGLUFFN),
        "ls2": (nn.Identity, LayerScale),
    },
    attributes=frozenset({"sample_drop_ratio"}),
    limit=layer_scales_limit,
    products=lambda block: _dino.block(block, _attention(block.attn, 0)),
)
add(ATTENTION, MLP, SWIGLU, PATCH_EMBED, BLOCK)
