"""What Microsoft's own code of Swin Transformer and of Swin Transformer V2 share.

The code is no package: its repository holds it as ``models.swin_transformer``, and projects hold copies that they
changed. So a class is taken for Microsoft's by its structure: its forward takes the same arguments and uses no other
names. A rule then asks for the children, parameters and attributes of each module, as for every library.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Mapping
from typing import ClassVar

from timm.layers import DropPath
from torch import Tensor, nn

from vitkernels.layers import fused, records
from vitkernels.swap import _dino, _patch_merging
from vitkernels.swap._limits import block_heads_limit, packed_heads_limit
from vitkernels.swap._rules import Rule, runs_fused
from vitkernels.swap._windows import is_shift

Pair = tuple[int, int]

# The arguments of each class's forward, and all names that it uses.
_FORWARDS = {
    "Mlp": (("x",), {"fc1", "act", "drop", "fc2"}),
    "WindowAttention": (
        ("x", "mask"),
        {
            "F", "attn_drop", "cat", "clamp", "contiguous", "cpb_mlp", "device", "exp", "linear", "log", "logit_scale",
            "normalize", "num_heads", "permute", "proj", "proj_drop", "q_bias", "qkv", "relative_coords_table",
            "relative_position_bias_table", "relative_position_index", "reshape", "scale", "shape", "sigmoid",
            "softmax", "tensor", "to", "torch", "transpose", "unsqueeze", "v_bias", "view", "weight", "window_size",
            "zeros_like",
        },
    ),
    "SwinTransformerBlock": (
        ("x",),
        {
            "WindowProcess", "WindowProcessReverse", "apply", "attn", "attn_mask", "drop_path", "fused_window_process",
            "input_resolution", "mlp", "norm1", "norm2", "roll", "shape", "shift_size", "torch", "view",
            "window_partition", "window_reverse", "window_size",
        },
    ),
    "PatchMerging": (("x",), {"cat", "input_resolution", "norm", "reduction", "shape", "torch", "view"}),
    "PatchEmbed": (("x",), {"flatten", "img_size", "norm", "proj", "shape", "transpose"}),
}  # fmt: skip


def require_microsofts_forward(cls: type[nn.Module]) -> None:
    """Raise ImportError unless ``cls`` has Microsoft's forward, by its structure."""
    arguments, names = _FORWARDS[cls.__name__]
    code = getattr(cls.forward, "__code__", None)
    if code is None or code.co_varnames[1 : code.co_argcount] != arguments or not names.issuperset(code.co_names):
        raise ImportError(f"the forward of {cls.__module__}.{cls.__name__} is not Microsoft's")


class _Kind:
    """A mixin in front of one of Microsoft's classes.

    Attributes:
        _rule: The rule of the fused class.
        _attention: Reads an attention of its version, for windows of an image with a shift.
    """

    _rule: ClassVar[Rule]
    _attention: ClassVar[Callable[[nn.Module, Pair, Pair], records.Attention]]


class Mlp(_Kind):
    """An MLP of two layers, which applies its one dropout twice."""

    def forward(self, x: Tensor) -> Tensor:
        return fused.mlp(_dino.mlp(self), x) if runs_fused(self._rule, self, x) else super().forward(x)


class WindowAttention(_Kind):
    """The attention of windows; with a mask, which only a shifted block passes, it runs Microsoft's forward."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        size = tuple(self.window_size)
        if mask is None and runs_fused(self._rule, self, x) and x.ndim == 3 and x.shape[1] == math.prod(size):
            return fused.attention(self._attention(self, size, (0, 0)), x)
        return super().forward(x, mask)


class SwinTransformerBlock(_Kind):
    """A block on (B, Y · X, C), in which no window is rolled, cut or masked in memory.

    Attributes:
        _run: Runs a block of its version.
    """

    _run: ClassVar[Callable[[records.Block, Tensor], Tensor]]

    def forward(self, x: Tensor) -> Tensor:
        if runs_fused(self._rule, self, x) and _fits(self, x):
            attn = self._attention(self.attn, tuple(self.input_resolution), (self.shift_size,) * 2)
            return self._run(block_of(self, attn), x)
        return super().forward(x)


class PatchMerging(_Kind):
    """Patch merging on (B, Y · X, C)."""

    _norm_last: ClassVar = False

    def forward(self, x: Tensor) -> Tensor:
        Y, X = self.input_resolution
        # For an image of another size, or with odd sides, the original raises.
        if runs_fused(self._rule, self, x) and x.ndim == 3 and x.shape[1] == Y * X and Y % 2 == X % 2 == 0:
            image = x.unflatten(1, (Y, X))
            if _patch_merging.has_patches(self, image):
                return _patch_merging.merge(self, image, norm_last=self._norm_last).flatten(1, 2)
        return super().forward(x)


class PatchEmbed(_Kind):
    """The patch embedding of images of one size."""

    def forward(self, x: Tensor) -> Tensor:
        # For an image of another size the original raises.
        if not (runs_fused(self._rule, self, x) and _dino.fills_patches(self, x)):
            return super().forward(x)
        if tuple(x.shape[1:]) != (self.proj.in_channels, *self.img_size):
            return super().forward(x)
        tokens = fused.patch_embed(self.proj, x)
        return tokens if self.norm is None else self.norm(tokens)


def _fits(block: nn.Module, x: Tensor) -> bool:
    """Tell whether the block's windows are its attention's, fill images like x, and have the mask that it adds."""
    Y, X = block.input_resolution
    size, shift = (block.window_size,) * 2, (block.shift_size,) * 2
    if x.ndim != 3 or x.shape[1] != Y * X or Y % size[0] or X % size[1] or not is_shift(shift, size):
        return False
    mask = block.attn_mask
    windows = None if block.shift_size == 0 else Y * X // math.prod(size)
    return size == tuple(block.attn.window_size) and (None if mask is None else mask.shape[0]) == windows


def block_of(block: nn.Module, attn: records.Attention) -> records.Block:
    """Read a block, with its attention as ``attn``."""
    children = block._modules
    path = records.drop_path(children["drop_path"])
    return records.Block(
        records.norm(children["norm1"]),
        attn,
        records.norm(children["norm2"]),
        _dino.mlp(children["mlp"]),
        drop_path1=path,
        drop_path2=path,
        fp8=records.runs_fp8(block),
    )


def rules(
    fused_classes: dict[type[nn.Module], type[nn.Module]],
    attention: dict[str, object],
    *,
    children: Mapping[str, tuple[type[nn.Module], ...]] = types.MappingProxyType({}),
    products: Callable[[nn.Module], records.Block] | None = None,
) -> list[Rule]:
    """Return the rules of Microsoft's classes, and give each fused class its own.

    Args:
        fused_classes: The fused class of each original.
        attention: What the rule of WindowAttention has besides what both versions have.
        children: The further children of WindowAttention.
        products: Reads a block whose products can run in FP8.

    Raises:
        ImportError: The forward of a class is not Microsoft's.
    """
    for cls in fused_classes:
        require_microsofts_forward(cls)
    own = {cls.__name__: cls for cls in fused_classes}
    options = {
        "Mlp": {
            "bypassed": {"fc1": (nn.Linear,), "act": (nn.GELU, nn.SiLU), "fc2": (nn.Linear,), "drop": (nn.Dropout,)}
        },
        "WindowAttention": {
            "bypassed": {
                "qkv": (nn.Linear,),
                "attn_drop": (nn.Dropout,),
                "proj": (nn.Linear,),
                "proj_drop": (nn.Dropout,),
                "softmax": (nn.Softmax,),
                **children,
            },
            "attributes": frozenset({"dim", "window_size", "pretrained_window_size", "num_heads", "scale"}),
            "limit": packed_heads_limit,
            "limited_by": ("num_heads", "qkv.in_features"),
            **attention,
        },
        "SwinTransformerBlock": {
            "bypassed": {
                "norm1": (nn.LayerNorm,),
                "attn": (own["WindowAttention"],),
                "drop_path": (nn.Identity, DropPath),
                "norm2": (nn.LayerNorm,),
                "mlp": (own["Mlp"],),
            },
            "attributes": frozenset(
                {
                    "dim", "input_resolution", "num_heads", "window_size", "shift_size", "mlp_ratio",
                    "fused_window_process",
                }
            ),
            "limit": block_heads_limit,
            "limited_by": ("attn.num_heads", "attn.qkv.in_features"),
            "products": products,
        },
        "PatchMerging": {
            "bypassed": _patch_merging.CHILDREN,
            "adapts": False,
            "attributes": frozenset({"input_resolution", "dim"}),
        },
        "PatchEmbed": {
            "bypassed": {"proj": (nn.Conv2d,)},
            "called": frozenset({"norm"}),
            "attributes": _dino.PATCH_EMBED_ATTRIBUTES,
            "limit": _dino.patch_embed_limit,
        },
    }  # fmt: skip
    for original, swapped in fused_classes.items():
        swapped._rule = Rule(original, swapped, **options[original.__name__])
    return [cls._rule for cls in fused_classes.values()]
