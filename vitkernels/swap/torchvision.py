"""Rules for torchvision's ViTs: the encoder's blocks, their MLPs, and the model's patch embedding.

Imported only if torchvision is imported. Pickle needs the subclasses at module level. Its Swin Transformers are in
``torchvision_swin``, its MaxViT in ``torchvision_maxvit``.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torchvision.models.vision_transformer import EncoderBlock, MLPBlock, VisionTransformer
from torchvision.ops import StochasticDepth

from vitkernels.layers import fused, records
from vitkernels.swap._limits import patches_limit
from vitkernels.swap._multihead import multihead, multihead_limit
from vitkernels.swap._rules import Rule, add, runs_fused


class FusedMLPBlock(MLPBlock):
    """torchvision's MLPBlock, a Sequential, on :func:`vitkernels.ops.mlp`."""

    def forward(self, input: Tensor) -> Tensor:
        if runs_fused(MLP, self, input):
            return fused.mlp(mlp(self), input)
        return super().forward(input)


class FusedEncoderBlock(EncoderBlock):
    """torchvision's pre-norm EncoderBlock, with both residual sums inside the kernels."""

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() == 3 and runs_fused(BLOCK, self, input):
            return fused.block(_block(self), input)
        return super().forward(input)


class FusedVisionTransformer(VisionTransformer):
    """torchvision's VisionTransformer with its patches embedded by :func:`vitkernels.ops.patch_embed`."""

    def _process_input(self, x: Tensor) -> Tensor:
        # For images of a wrong size the original raises.
        if runs_fused(MODEL, self, x) and x.ndim == 4 and tuple(x.shape[2:]) == (self.image_size, self.image_size):
            return fused.patch_embed(self.conv_proj, x)
        return super()._process_input(x)


def _block(block: EncoderBlock) -> records.Block:
    children = block._modules
    attn = multihead(children["self_attention"], records.dropout(children["dropout"]))
    norm1, norm2 = records.norm(children["ln_1"]), records.norm(children["ln_2"])
    return records.Block(norm1, attn, norm2, mlp(children["mlp"]), fp8=records.runs_fp8(block))


def mlp(module: nn.Sequential) -> records.Mlp:
    """Read an MLP of two layers."""
    fc1, act, drop1, fc2, drop2 = module._modules.values()
    return records.Mlp(
        records.linear(fc1),
        records.linear(fc2),
        records.activation_name(act),
        drop1=records.dropout(drop1),
        drop2=records.dropout(drop2),
    )


def _block_limit(block: EncoderBlock) -> str | None:
    reason = multihead_limit(block.self_attention)
    return reason and f"self_attention: {reason}"


def drop_path(depth: StochasticDepth) -> records.DropPath | None:
    """Read a StochasticDepth in its present mode."""
    return records.DropPath(depth.p) if depth.training and depth.p > 0.0 else None


def drop_path_limit(depth: StochasticDepth) -> str | None:
    """``depth`` drops a whole batch."""
    return None if depth.mode == "row" else f"its StochasticDepth has the mode {depth.mode!r}, not 'row'"


def _model_limit(model: VisionTransformer) -> str | None:
    return patches_limit(model.conv_proj, (model.patch_size, model.patch_size))


MLP_CHILDREN = {"0": (nn.Linear,), "1": (nn.GELU,), "2": (nn.Dropout,), "3": (nn.Linear,), "4": (nn.Dropout,)}
MLP = Rule(MLPBlock, FusedMLPBlock, bypassed=MLP_CHILDREN)
BLOCK = Rule(
    EncoderBlock,
    FusedEncoderBlock,
    bypassed={
        "ln_1": (nn.LayerNorm,),
        "self_attention": (nn.MultiheadAttention,),
        "self_attention.out_proj": (NonDynamicallyQuantizableLinear,),
        "dropout": (nn.Dropout,),
        "ln_2": (nn.LayerNorm,),
        "mlp": (MLPBlock,),
    },
    attributes=frozenset({"num_heads"}),
    limit=_block_limit,
    products=_block,
)
MODEL = Rule(
    VisionTransformer,
    FusedVisionTransformer,
    bypassed={"conv_proj": (nn.Conv2d,)},
    called=frozenset({"encoder", "heads"}),
    parameters=frozenset({"class_token"}),
    attributes=frozenset(
        {
            "image_size",
            "patch_size",
            "hidden_dim",
            "mlp_dim",
            "attention_dropout",
            "dropout",
            "num_classes",
            "representation_size",
            "norm_layer",
            "seq_length",
        }
    ),
    limit=_model_limit,
)
add(MLP, BLOCK, MODEL)
