"""What the code of DINOv2's and DINOv3's repositories shares."""

from __future__ import annotations

from torch import Tensor, nn

from vitkernels.layers import fused, records
from vitkernels.swap._limits import patches_limit

PATCH_EMBED_ATTRIBUTES = frozenset(
    {"img_size", "patch_size", "patches_resolution", "num_patches", "in_chans", "embed_dim", "flatten_embedding"}
)


def mlp(module: nn.Module) -> records.Mlp:
    """Read an Mlp, which applies its one dropout twice, or a SwiGLUFFN, packed or not."""
    children = module._modules
    if "w3" in children:
        packed = children.get("w12")
        first = tuple(records.linear(children[name]) for name in ("w1", "w2")) if packed is None else None
        return records.Mlp(first or records.linear(packed), records.linear(children["w3"]), "silu", gated=True)
    drop = records.dropout(children["drop"])
    fc1, fc2 = records.linear(children["fc1"]), records.linear(children["fc2"])
    return records.Mlp(fc1, fc2, records.activation_name(children["act"]), drop1=drop, drop2=drop)


def block(module: nn.Module, attn: records.Attention) -> records.Block:
    """Read a pre-norm block; its DropPaths are left out, since it drops samples in its own forward."""
    children = module._modules
    return records.Block(
        records.norm(children["norm1"]),
        attn,
        records.norm(children["norm2"]),
        mlp(children["mlp"]),
        records.layer_scale(children["ls1"]),
        records.layer_scale(children["ls2"]),
        fp8=records.runs_fp8(module),
    )


def patch_embed(embed: nn.Module, x: Tensor) -> Tensor:
    """Run a PatchEmbed on images (B, I, Y, X) whose sides are multiples of the patch's."""
    grid = (x.shape[2] // embed.patch_size[0], x.shape[3] // embed.patch_size[1])
    tokens = embed.norm(fused.patch_embed(embed.proj, x))
    return tokens if embed.flatten_embedding else tokens.unflatten(1, grid)


def fills_patches(embed: nn.Module, x: Tensor) -> bool:
    """Tell whether the sides of images ``x`` are multiples of the patch's."""
    if x.ndim != 4:
        return False
    (Y, X), (patch_y, patch_x) = x.shape[2:], embed.patch_size
    return patch_y <= Y and patch_x <= X and Y % patch_y == 0 and X % patch_x == 0


def patch_embed_limit(embed: nn.Module) -> str | None:
    """Return why the convolution of ``embed`` cannot run fused, or None if it can."""
    return patches_limit(embed.proj, tuple(embed.patch_size))
