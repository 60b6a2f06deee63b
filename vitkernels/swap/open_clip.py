"""Rules for open_clip: the residual blocks, their LayerNorms, and the image tower's embedding.

Imported only if open_clip is imported. Pickle needs the subclasses at module level. Text towers consist of the same
blocks, with a mask.
"""

from __future__ import annotations

from open_clip.transformer import LayerNorm, LayerScale, QuickGELU, ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from vitkernels import runtime
from vitkernels.layers import fused, records
from vitkernels.swap._limits import layer_scales_limit, one_dim, patches_limit
from vitkernels.swap._multihead import multihead, multihead_limit
from vitkernels.swap._rules import PARAMETERS, Rule, add, runs_fused


class FusedLayerNorm(LayerNorm):
    """open_clip's LayerNorm, which returns its input's dtype, on :func:`vitkernels.ops.layer_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        if runs_fused(LAYER_NORM, self, x):
            return fused.norm(records.norm(self), x).to(x.dtype)
        return super().forward(x)


class FusedResidualAttentionBlock(ResidualAttentionBlock):
    """open_clip's pre-norm block as self-attention, with both residual sums inside the kernels."""

    def forward(
        self,
        q_x: Tensor,
        k_x: Tensor | None = None,
        v_x: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Tensor:
        one_mask = attn_mask is None or attn_mask.ndim == 2  # three dims would be images × heads first
        if k_x is None and v_x is None and one_mask and runs_fused(BLOCK, self, q_x):
            # open_clip converts masks, bool ones too, to numbers that are added to the scores.
            return fused.block(_block(self), q_x, attn_mask=None if attn_mask is None else attn_mask.to(q_x.dtype))
        return super().forward(q_x, k_x, v_x, attn_mask)


class FusedVisionTransformer(VisionTransformer):
    """open_clip's image tower with patches, class token and positions in :func:`vitkernels.ops.patch_embed`."""

    def _embeds(self, x: Tensor) -> Tensor:
        # For images of a wrong size the original raises. Under autocast the original returns tokens of half precision,
        # which the op, with parameters in fp32, does not.
        fits = x.ndim == 4 and tuple(x.shape[2:]) == tuple(self.image_size)
        if fits and runtime.autocast_dtype(x) is None and runs_fused(TOWER, self, x):
            tokens = fused.patch_embed(
                self.conv1,
                x,
                pos_embed=self.positional_embedding[None],
                prefix_tokens=self.class_embedding.view(1, 1, -1),
            )
            return self.ln_pre(self.patch_dropout(tokens))
        return super()._embeds(x)


def _block(block: ResidualAttentionBlock) -> records.Block:
    children = block._modules
    first, act, last = children["mlp"]._modules.values()
    return records.Block(
        records.norm(children["ln_1"]),
        multihead(children["attn"]),
        records.norm(children["ln_2"]),
        records.Mlp(records.linear(first), records.linear(last), records.activation_name(act)),
        records.layer_scale(children["ls_1"]),
        records.layer_scale(children["ls_2"]),
        fp8=records.runs_fp8(block),
    )


def _block_limit(block: ResidualAttentionBlock) -> str | None:
    if len(block.mlp) != 3:
        return f"its mlp has {len(block.mlp)} layers, not c_fc, gelu and c_proj alone"
    reason = multihead_limit(block.attn)
    return layer_scales_limit(block, ("ls_1", "ls_2")) or (reason and f"attn: {reason}")


def _tower_limit(tower: VisionTransformer) -> str | None:
    return patches_limit(tower.conv1, tuple(tower.patch_size))


PARAMETERS[LayerScale] = frozenset({"gamma"})

LAYER_NORM = Rule(
    LayerNorm,
    FusedLayerNorm,
    parameters=frozenset({"weight", "bias"}),
    attributes=frozenset({"normalized_shape", "eps", "elementwise_affine"}),
    limit=one_dim,
)
BLOCK = Rule(
    ResidualAttentionBlock,
    FusedResidualAttentionBlock,
    bypassed={
        "ln_1": (LayerNorm, nn.LayerNorm),
        "attn": (nn.MultiheadAttention,),
        "attn.out_proj": (NonDynamicallyQuantizableLinear,),
        "ls_1": (nn.Identity, LayerScale),
        "ln_2": (LayerNorm, nn.LayerNorm),
        "mlp": (nn.Sequential,),
        "mlp.c_fc": (nn.Linear,),
        "mlp.gelu": (nn.GELU, nn.SiLU, QuickGELU),
        "mlp.c_proj": (nn.Linear,),
        "ls_2": (nn.Identity, LayerScale),
    },
    limit=_block_limit,
    products=_block,
)
TOWER = Rule(
    VisionTransformer,
    FusedVisionTransformer,
    bypassed={"conv1": (nn.Conv2d,)},
    called=frozenset({"patch_dropout", "ln_pre", "transformer", "attn_pool", "attn_pool_contrastive", "ln_post"}),
    parameters=frozenset({"class_embedding", "positional_embedding", "proj"}),
    attributes=frozenset(
        {
            "output_tokens",
            "image_size",
            "patch_size",
            "grid_size",
            "final_ln_after_pool",
            "output_dim",
            "pool_type",
            "attn_pool_type",
        }
    ),
    limit=_tower_limit,
)
add(LAYER_NORM, BLOCK, TOWER)
