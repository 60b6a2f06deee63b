"""Rules for DINOv2's own code (``torch.hub`` and the repository): blocks, attention, MLPs, patch embedding.

Imported only if the package ``dinov2`` is imported. Pickle needs the subclasses at module level. A block runs its
original forward, with swapped modules inside, in two cases: on a list of tensors, which it nests for xFormers; and in
training with ``sample_drop_ratio``, which removes samples from the branches rather than masking them.
"""

from __future__ import annotations

from dinov2.layers import attention as dinov2_attention
from dinov2.layers.attention import Attention, MemEffAttention
from dinov2.layers.block import Block, NestedTensorBlock
from dinov2.layers.layer_scale import LayerScale
from dinov2.layers.mlp import Mlp
from dinov2.layers.patch_embed import PatchEmbed
from dinov2.layers.swiglu_ffn import SwiGLUFFN, SwiGLUFFNFused
from torch import Tensor, nn

from vitkernels.layers import fused, records
from vitkernels.swap import _dino
from vitkernels.swap._limits import layer_scales_limit, packed_heads_limit
from vitkernels.swap._rules import PARAMETERS, Rule, add, runs_fused


class FusedAttention(Attention):
    """DINOv2's Attention on the kernels, unless the call has further arguments (``is_causal``)."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        if not args and not kwargs and runs_fused(ATTENTION, self, x):
            return fused.attention(_attention(self), x)
        return super().forward(x, *args, **kwargs)


class FusedMemEffAttention(MemEffAttention):
    """DINOv2's MemEffAttention on the kernels, unless the call has a bias."""

    def forward(self, x: Tensor, attn_bias=None) -> Tensor:
        if attn_bias is None and runs_fused(MEM_EFF_ATTENTION, self, x):
            return fused.attention(_attention(self), x)
        return super().forward(x, attn_bias=attn_bias)


class FusedMlp(Mlp):
    """DINOv2's Mlp on :func:`vitkernels.ops.mlp`."""

    def forward(self, x: Tensor) -> Tensor:
        if runs_fused(MLP, self, x):
            return fused.mlp(_dino.mlp(self), x)
        return super().forward(x)


class FusedSwiGLUFFN(SwiGLUFFN):
    """DINOv2's SwiGLUFFN on :func:`vitkernels.ops.swiglu_mlp`."""

    def forward(self, x: Tensor) -> Tensor:
        if runs_fused(SWIGLU, self, x):
            return fused.mlp(_dino.mlp(self), x)
        return super().forward(x)


class FusedSwiGLUFFNFused(SwiGLUFFNFused):
    """DINOv2's SwiGLUFFNFused on :func:`vitkernels.ops.swiglu_mlp`; not swapped if its base is xFormers' class."""

    def forward(self, x: Tensor) -> Tensor:
        if runs_fused(SWIGLU_FUSED, self, x):
            return fused.mlp(_dino.mlp(self), x)
        return super().forward(x)


class FusedPatchEmbed(PatchEmbed):
    """DINOv2's PatchEmbed on :func:`vitkernels.ops.patch_embed`."""

    def forward(self, x: Tensor) -> Tensor:
        # For images of a wrong size the original raises.
        if runs_fused(PATCH_EMBED, self, x) and _dino.fills_patches(self, x):
            return _dino.patch_embed(self, x)
        return super().forward(x)


class FusedBlock(Block):
    """DINOv2's pre-norm Block, with both residual sums and LayerScale inside the kernels."""

    def forward(self, x: Tensor) -> Tensor:
        if not _drops_samples(self) and runs_fused(BLOCK, self, x):
            return fused.block(_block(self), x)
        return super().forward(x)


class FusedNestedTensorBlock(NestedTensorBlock):
    """DINOv2's pre-norm NestedTensorBlock on one tensor, with residual sums and LayerScale inside the kernels."""

    def forward(self, x_or_x_list: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        if not _drops_samples(self) and runs_fused(NESTED_BLOCK, self, x_or_x_list):
            return fused.block(_block(self), x_or_x_list)
        return super().forward(x_or_x_list)


def _block(block: Block) -> records.Block:
    return _dino.block(block, _attention(block.attn))


def _attention(attn: Attention) -> records.Attention:
    children = attn._modules
    return records.Attention(
        records.linear(children["qkv"]),
        records.linear(children["proj"]),
        attn.num_heads,
        children["qkv"].in_features // attn.num_heads,
        attn.scale,
        attn_drop=_attention_drop(attn),
        proj_drop=records.dropout(children["proj_drop"]),
    )


def _attention_drop(attn: Attention) -> float:
    """Return the dropout of attention weights. The rate is a number, in the code of 2023 an nn.Dropout."""
    if isinstance(attn, MemEffAttention) and getattr(dinov2_attention, "XFORMERS_AVAILABLE", False):
        return 0.0  # DINOv2 does not pass the rate to xFormers' attention
    drop = attn.attn_drop
    if isinstance(drop, nn.Dropout):
        return records.dropout(drop)
    return drop if attn.training else 0.0


def _drops_samples(block: Block) -> bool:
    return block.training and block.sample_drop_ratio > 0.0


PARAMETERS[LayerScale] = frozenset({"gamma"})

_ATTENTION = {
    "bypassed": {
        "qkv": (nn.Linear,),
        "attn_drop": (nn.Dropout, type(None)),
        "proj": (nn.Linear,),
        "proj_drop": (nn.Dropout,),
    },
    "attributes": frozenset({"dim", "num_heads", "scale", "attn_drop"}),
    "limit": packed_heads_limit,
}
_SWIGLU = {"bypassed": {"w12": (nn.Linear,), "w3": (nn.Linear,)}}
_BLOCK = {
    "bypassed": {
        "norm1": (nn.LayerNorm,),
        "attn": (Attention, MemEffAttention),
        "ls1": (nn.Identity, LayerScale),
        "norm2": (nn.LayerNorm,),
        "mlp": (Mlp, SwiGLUFFN, SwiGLUFFNFused),
        "ls2": (nn.Identity, LayerScale),
    },
    "called": frozenset({"drop_path1", "drop_path2"}),  # by the original forward, which runs when they drop
    "attributes": frozenset({"sample_drop_ratio"}),
    "limit": layer_scales_limit,
    "products": _block,
}

ATTENTION = Rule(Attention, FusedAttention, **_ATTENTION)
MEM_EFF_ATTENTION = Rule(MemEffAttention, FusedMemEffAttention, **_ATTENTION)
MLP = Rule(
    Mlp,
    FusedMlp,
    bypassed={"fc1": (nn.Linear,), "act": (nn.GELU, nn.SiLU), "fc2": (nn.Linear,), "drop": (nn.Dropout,)},
)
SWIGLU = Rule(SwiGLUFFN, FusedSwiGLUFFN, **_SWIGLU)
SWIGLU_FUSED = Rule(SwiGLUFFNFused, FusedSwiGLUFFNFused, **_SWIGLU)
PATCH_EMBED = Rule(
    PatchEmbed,
    FusedPatchEmbed,
    bypassed={"proj": (nn.Conv2d,)},
    called=frozenset({"norm"}),
    attributes=_dino.PATCH_EMBED_ATTRIBUTES,
    limit=_dino.patch_embed_limit,
)
BLOCK = Rule(Block, FusedBlock, **_BLOCK)
NESTED_BLOCK = Rule(NestedTensorBlock, FusedNestedTensorBlock, **_BLOCK)
add(ATTENTION, MEM_EFF_ATTENTION, MLP, SWIGLU, PATCH_EMBED, BLOCK, NESTED_BLOCK)
if issubclass(SwiGLUFFNFused, SwiGLUFFN):
    add(SWIGLU_FUSED)
