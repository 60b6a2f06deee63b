"""The blocks of timm's vision_transformer.py, and ViTamin's MLP in them."""

from __future__ import annotations

from timm.layers import Attention, GluMlp, Mlp, SwiGLU
from timm.models.vision_transformer import Block, LayerScale, ResPostBlock
from timm.models.vitamin import GeGluMlp
from torch import Tensor, nn

from vitkernels.layers import fused, records
from vitkernels.swap._limits import layer_scales_limit
from vitkernels.swap._rules import PARAMETERS, Rule, add, runs_fused
from vitkernels.swap.timm.layers import ACTIVATIONS, DROP_PATHS, NORMS, given


class FusedGeGluMlp(GeGluMlp):
    """timm's GeGluMlp, with its norm in front, on :func:`vitkernels.ops.swiglu_mlp`."""

    def forward(self, x: Tensor) -> Tensor:
        if runs_fused(GE_GLU_MLP, self, x):
            return fused.mlp(records.mlp(self), x)
        return super().forward(x)


class FusedBlock(Block):
    """timm's pre-norm Block, with both residual sums, LayerScale and DropPath inside the kernels."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if isinstance(attn_mask, fused.Packed):  # only from FusedNaFlexVit, which has checked this block
            return fused.block(records.block(self), x, attn_mask=attn_mask)
        if runs_fused(BLOCK, self, x) and fused.takes_masks(attn_mask, is_causal):
            return fused.block(records.block(self), x, attn_mask=attn_mask, is_causal=is_causal)
        return super().forward(x, **given(attn_mask, is_causal))


class FusedResPostBlock(ResPostBlock):
    """timm's ResPostBlock, with norms after the branches, as a chain of kernels."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if runs_fused(RES_POST_BLOCK, self, x) and fused.takes_masks(attn_mask, is_causal):
            return fused.post_norm_block(records.block(self), x, attn_mask=attn_mask, is_causal=is_causal)
        return super().forward(x, **given(attn_mask, is_causal))


PARAMETERS[LayerScale] = frozenset({"gamma"})

GE_GLU_MLP = Rule(
    GeGluMlp,
    FusedGeGluMlp,
    bypassed={
        "norm": NORMS,
        "w0": (nn.Linear,),
        "act": ACTIVATIONS,
        "w1": (nn.Linear,),
        "drop1": (nn.Dropout,),
        "w2": (nn.Linear,),
        "drop2": (nn.Dropout,),
    },
)
BRANCHES = {
    "norm1": NORMS,
    "attn": (Attention,),
    "drop_path1": DROP_PATHS,
    "norm2": NORMS,
    "mlp": (Mlp, GluMlp, SwiGLU, GeGluMlp),
    "drop_path2": DROP_PATHS,
}
# The children of a block's attention that has no rule of its own.
PACKED_ATTENTION = {
    "attn.qkv": (nn.Linear,),
    "attn.attn_drop": (nn.Dropout,),
    "attn.proj": (nn.Linear,),
    "attn.proj_drop": (nn.Dropout,),
}
BLOCK = Rule(
    Block,
    FusedBlock,
    bypassed={**BRANCHES, "ls1": (nn.Identity, LayerScale), "ls2": (nn.Identity, LayerScale)},
    limit=layer_scales_limit,
    limited_by=("ls1.inplace", "ls2.inplace"),
    products=records.block,
)
RES_POST_BLOCK = Rule(ResPostBlock, FusedResPostBlock, bypassed=BRANCHES, attributes=frozenset({"init_values"}))
add(GE_GLU_MLP, BLOCK, RES_POST_BLOCK)
