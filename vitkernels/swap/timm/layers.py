"""timm's layers: norms, attention, the MLPs, and the patch embedding.

Pickle needs the subclasses at module level.
"""

from __future__ import annotations

from timm.layers import (
    Attention,
    DropPath,
    GluMlp,
    LayerNorm,
    LayerNorm2d,
    Mlp,
    PatchEmbed,
    RmsNorm,
    SwiGLU,
)
from timm.layers.activations import GELU, GELUTanh, QuickGELU
from timm.layers.format import Format, nchw_to
from torch import Tensor, nn

from vitkernels.layers import fused, records, sharded
from vitkernels.swap._limits import head_dim_limit, ignored_adapter, one_dim, patches_limit
from vitkernels.swap._rules import Rule, add, runs_fused


class FusedLayerNorm(LayerNorm):
    """timm's LayerNorm on :func:`vitkernels.ops.layer_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        if runs_fused(LAYER_NORM, self, x):
            return fused.norm(records.norm(self), x)
        return super().forward(x)


class FusedLayerNorm2d(LayerNorm2d):
    """timm's LayerNorm2d, over the channels of (B, C, Y, X), on :func:`vitkernels.ops.layer_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        if runs_fused(LAYER_NORM_2D, self, x) and x.ndim == 4:
            return fused.norm(records.norm(self), x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return super().forward(x)


class FusedRmsNorm(RmsNorm):
    """timm's RmsNorm on :func:`vitkernels.ops.rms_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        if runs_fused(RMS_NORM, self, x):
            return fused.norm(records.norm(self), x)
        return super().forward(x)


class FusedAttention(Attention):
    """timm's Attention on the kernels: qkv, attention on the packed qkv, proj; supports masks and QK-norm."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if runs_fused(ATTENTION, self, x) and fused.takes_masks(attn_mask, is_causal):
            return fused.attention(records.attention(self), x, attn_mask=attn_mask, is_causal=is_causal)
        return super().forward(x, **given(attn_mask, is_causal))


class FusedMlp(Mlp):
    """timm's Mlp on :func:`vitkernels.ops.mlp`."""

    def forward(self, x: Tensor) -> Tensor:
        if runs_fused(MLP, self, x):
            return fused.mlp(records.mlp(self), x)
        return super().forward(x)


class FusedGluMlp(GluMlp):
    """timm's GluMlp, with packed gate and value, on :func:`vitkernels.ops.swiglu_mlp`."""

    def forward(self, x: Tensor) -> Tensor:
        if runs_fused(GLU_MLP, self, x):
            return fused.mlp(records.mlp(self), x)
        return super().forward(x)


class FusedSwiGLU(SwiGLU):
    """timm's SwiGLU, with separate gate and value, on :func:`vitkernels.ops.swiglu_mlp`."""

    def forward(self, x: Tensor) -> Tensor:
        if runs_fused(SWIGLU, self, x):
            return fused.mlp(records.mlp(self), x)
        return super().forward(x)


class FusedPatchEmbed(PatchEmbed):
    """timm's PatchEmbed on :func:`vitkernels.ops.patch_embed`."""

    def forward(self, x: Tensor) -> Tensor:
        # For images of a wrong size the original raises.
        if not (runs_fused(PATCH_EMBED, self, x) and self._fits(x)):
            return super().forward(x)
        grid = (x.shape[2] // self.patch_size[0], x.shape[3] // self.patch_size[1])
        # The convolution drops pixels at the right and the bottom that fill no patch (384 pixels, patches of 14).
        tokens = fused.patch_embed(self.proj, x[:, :, : grid[0] * self.patch_size[0], : grid[1] * self.patch_size[1]])
        if not self.flatten:
            tokens = tokens.transpose(1, 2).unflatten(2, grid)
            # NHWC and NLC are views. NCHW is copied, because its users may rely on a contiguous result.
            tokens = tokens.contiguous() if self.output_fmt == Format.NCHW else nchw_to(tokens, self.output_fmt)
        return self.norm(tokens)

    def _fits(self, x: Tensor) -> bool:
        if x.ndim != 4:
            return False
        height, width = x.shape[2:]
        if self.img_size is None:
            return height >= self.patch_size[0] and width >= self.patch_size[1]
        if self.strict_img_size:
            return (height, width) == tuple(self.img_size)
        return height % self.patch_size[0] == 0 and width % self.patch_size[1] == 0


def given(attn_mask: Tensor | None, is_causal: bool) -> dict:
    """Return the masks that are set, as keyword arguments: older releases of timm have no ``is_causal``."""
    masks = {} if attn_mask is None else {"attn_mask": attn_mask}
    return masks | ({"is_causal": True} if is_causal else {})


def _norm_limit(norm: LayerNorm | LayerNorm2d | RmsNorm) -> str | None:
    if norm._fast_norm:
        return "timm's fast norm is on, which rounds differently under autocast"
    return one_dim(norm)


def head_dim(attn: nn.Module) -> int:
    """Return the channels per head; EVA's attention of older releases has no such attribute."""
    return getattr(attn, "head_dim", None) or attn.proj.in_features // attn.num_heads


def attention_limit(attn: nn.Module) -> str | None:
    """Return why no attention kernel supports ``attn``, or None if one does."""
    return head_dim_limit(head_dim(attn)) or ignored_adapter(attn)


def _glu_limit(mlp: GluMlp) -> str | None:
    return None if mlp.chunk_dim == -1 else f"it splits dim {mlp.chunk_dim}; the kernel the last one"


def _patch_embed_limit(embed: PatchEmbed) -> str | None:
    if embed.dynamic_img_pad:
        return "it pads images (dynamic_img_pad)"
    return patches_limit(embed.proj, tuple(embed.patch_size))


ACTIVATIONS = (nn.GELU, nn.SiLU, GELU, GELUTanh, QuickGELU)
NORMS = (LayerNorm, nn.LayerNorm, RmsNorm)
ABSENT = type(None)
NORM_ATTRIBUTES = frozenset({"normalized_shape", "eps", "elementwise_affine"})
DROP_PATHS = (nn.Identity, DropPath)
# What attention_limit reads; see head_dim.
ATTENTION_LIMITED_BY = ("head_dim", "num_heads", "proj.in_features", "qkv_bias_separate")
# The children of every attention in this folder, except those that make queries, keys and values.
ATTENTION_CHILDREN = {
    "q_norm": (nn.Identity, *NORMS),
    "k_norm": (nn.Identity, *NORMS),
    "attn_drop": (nn.Dropout,),
    "norm": (nn.Identity, *NORMS),
    "proj": (nn.Linear,),
    "proj_drop": (nn.Dropout,),
}
# The children of every MLP in this file, except its first layers.
MLP_CHILDREN = {
    "act": ACTIVATIONS,
    "drop1": (nn.Dropout,),
    "norm": (nn.Identity, *NORMS),
    "fc2": (nn.Linear,),
    "drop2": (nn.Dropout,),
}

LAYER_NORM = Rule(
    LayerNorm,
    FusedLayerNorm,
    parameters=frozenset({"weight", "bias"}),
    attributes=NORM_ATTRIBUTES,
    limit=_norm_limit,
    limited_by=("_fast_norm", "normalized_shape"),
)
LAYER_NORM_2D = Rule(
    LayerNorm2d,
    FusedLayerNorm2d,
    parameters=frozenset({"weight", "bias"}),
    attributes=NORM_ATTRIBUTES,
    limit=_norm_limit,
    limited_by=("_fast_norm", "normalized_shape"),
)
RMS_NORM = Rule(
    RmsNorm,
    FusedRmsNorm,
    parameters=frozenset({"weight"}),
    attributes=NORM_ATTRIBUTES,
    limit=_norm_limit,
    limited_by=("_fast_norm", "normalized_shape"),
)
ATTENTION = Rule(
    Attention,
    FusedAttention,
    bypassed={"qkv": (nn.Linear,), **ATTENTION_CHILDREN},
    called=frozenset({"gate"}),
    attributes=frozenset({"num_heads", "head_dim", "attn_dim", "scale", "fused_attn"}),
    shards=sharded.ATTENTION,
    limit=attention_limit,
    limited_by=ATTENTION_LIMITED_BY,
)
MLP = Rule(Mlp, FusedMlp, bypassed={"fc1": (nn.Linear,), **MLP_CHILDREN}, shards=sharded.MLP)
GLU_MLP = Rule(
    GluMlp,
    FusedGluMlp,
    bypassed={"fc1": (nn.Linear,), **MLP_CHILDREN},
    attributes=frozenset({"chunk_dim", "gate_last"}),
    limit=_glu_limit,
    limited_by=("chunk_dim",),
    shards=sharded.PACKED_GATED_MLP,
)
SWIGLU = Rule(
    SwiGLU,
    FusedSwiGLU,
    bypassed={"fc1_g": (nn.Linear,), "fc1_x": (nn.Linear,), **MLP_CHILDREN},
    shards=sharded.GATED_MLP,
)
PATCH_EMBED = Rule(
    PatchEmbed,
    FusedPatchEmbed,
    bypassed={"proj": (nn.Conv2d,)},
    called=frozenset({"norm"}),
    attributes=frozenset(
        {
            "patch_size",
            "img_size",
            "grid_size",
            "num_patches",
            "flatten",
            "output_fmt",
            "strict_img_size",
            "dynamic_img_pad",
        }
    ),
    limit=_patch_embed_limit,
)
add(LAYER_NORM, LAYER_NORM_2D, RMS_NORM, ATTENTION, MLP, GLU_MLP, SWIGLU, PATCH_EMBED)
