"""What is swapped of timm: LayerNorm, Attention, Mlp, PatchEmbed, and the pre-norm Block made of them.

Imported only where timm itself has been. The subclasses lie at module level, so that pickle finds them.
"""

from __future__ import annotations

from timm.layers import Attention, DropPath, LayerNorm, LayerScale, Mlp, PatchEmbed
from timm.layers.activations import GELU, GELUTanh, QuickGELU
from timm.layers.format import Format, nchw_to
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vitkernels.layers import fused
from vitkernels.swap._rules import PARAMETERS, Rule, add, runs_fused
from vitkernels.swap.torch_nn import one_dim

MAX_HEAD_DIM = 128  # of ops.attention


class FusedLayerNorm(LayerNorm):
    """timm's LayerNorm on :func:`vitkernels.ops.layer_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        if runs_fused(LAYER_NORM, self, x):
            return fused.layer_norm(self, x)
        return super().forward(x)


class FusedAttention(Attention):
    """timm's Attention, unmasked, on the kernels: qkv, attention as qkv lies in memory, proj."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if attn_mask is None and not is_causal and runs_fused(ATTENTION, self, x):
            return fused.attention(self, x)
        return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)


class FusedMlp(Mlp):
    """timm's Mlp on :func:`vitkernels.ops.mlp`."""

    def forward(self, x: Tensor) -> Tensor:
        if runs_fused(MLP, self, x):
            return fused.mlp(self, x)
        return super().forward(x)


class FusedPatchEmbed(PatchEmbed):
    """timm's PatchEmbed on :func:`vitkernels.ops.patch_embed`."""

    def forward(self, x: Tensor) -> Tensor:
        # Images of a wrong size are the original's business: it raises.
        if not (runs_fused(PATCH_EMBED, self, x) and self._fits(x)):
            return super().forward(x)
        grid = (x.shape[2] // self.patch_size[0], x.shape[3] // self.patch_size[1])
        # The convolution drops what fills no patch at the right and the bottom: 384 by patches of 14, say.
        tokens = fused.patch_embed(self.proj, x[:, :, : grid[0] * self.patch_size[0], : grid[1] * self.patch_size[1]])
        if not self.flatten:
            tokens = tokens.transpose(1, 2).unflatten(2, grid)
            # A view in NHWC and NLC; a copy in NCHW, whose users may count on a contiguous result.
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


class FusedBlock(Block):
    """timm's pre-norm Block, unmasked, with both residual sums, LayerScale and DropPath inside the kernels."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if attn_mask is None and not is_causal and runs_fused(BLOCK, self, x):
            return fused.block(self, x)
        return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)


def _layer_norm_limit(norm: LayerNorm) -> str | None:
    if norm._fast_norm:
        return "timm's fast norm is on, which rounds differently under autocast"
    return one_dim(norm)


def _attention_limit(attn: Attention) -> str | None:
    if attn.attn_drop.p > 0:
        return f"it drops attention weights (p = {attn.attn_drop.p:g}), which the attention kernel does not"
    if attn.head_dim > MAX_HEAD_DIM:
        return f"its head dim is {attn.head_dim}; the attention kernel takes up to {MAX_HEAD_DIM}"
    return None


def _patch_embed_limit(embed: PatchEmbed) -> str | None:
    conv = embed.proj
    if embed.dynamic_img_pad:
        return "it pads images (dynamic_img_pad)"
    if conv.kernel_size != conv.stride or conv.kernel_size != tuple(embed.patch_size):
        return f"its kernel {conv.kernel_size}, stride {conv.stride} and patch {embed.patch_size} are not one size"
    if conv.padding not in ((0, 0), "valid") or conv.dilation != (1, 1) or conv.groups != 1:
        return f"its convolution has padding {conv.padding}, dilation {conv.dilation} and groups {conv.groups}"
    return None


def _block_limit(block: Block) -> str | None:
    if getattr(block.ls1, "inplace", False) or getattr(block.ls2, "inplace", False):
        return "its LayerScale works in place"
    return None


PARAMETERS[LayerScale] = frozenset({"gamma"})

LAYER_NORM = Rule(
    LayerNorm,
    FusedLayerNorm,
    parameters=frozenset({"weight", "bias"}),
    attributes=frozenset({"normalized_shape", "eps", "elementwise_affine"}),
    limit=_layer_norm_limit,
)
ATTENTION = Rule(
    Attention,
    FusedAttention,
    bypassed={
        "qkv": (nn.Linear,),
        "q_norm": (nn.Identity,),
        "k_norm": (nn.Identity,),
        "attn_drop": (nn.Dropout,),
        "norm": (nn.Identity,),
        "proj": (nn.Linear,),
        "proj_drop": (nn.Dropout,),
    },
    attributes=frozenset({"num_heads", "head_dim", "attn_dim", "scale", "fused_attn"}),
    limit=_attention_limit,
)
MLP = Rule(
    Mlp,
    FusedMlp,
    bypassed={
        "fc1": (nn.Linear,),
        "act": (nn.GELU, nn.SiLU, GELU, GELUTanh, QuickGELU),
        "drop1": (nn.Dropout,),
        "norm": (nn.Identity,),
        "fc2": (nn.Linear,),
        "drop2": (nn.Dropout,),
    },
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
BLOCK = Rule(
    Block,
    FusedBlock,
    bypassed={
        "norm1": (LayerNorm, nn.LayerNorm),
        "attn": (Attention,),
        "ls1": (nn.Identity, LayerScale),
        "drop_path1": (nn.Identity, DropPath),
        "norm2": (LayerNorm, nn.LayerNorm),
        "mlp": (Mlp,),
        "ls2": (nn.Identity, LayerScale),
        "drop_path2": (nn.Identity, DropPath),
    },
    limit=_block_limit,
)
add(LAYER_NORM, ATTENTION, MLP, PATCH_EMBED, BLOCK)
