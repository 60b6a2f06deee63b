"""The block, window attention and patch merging of timm's swin_transformer.py, and what its later versions share."""

from __future__ import annotations

import math
from collections.abc import Callable

from timm.layers import LayerNorm, Mlp
from timm.models.swin_transformer import PatchMerging, SwinTransformerBlock, WindowAttention
from torch import Tensor, nn

from vitkernels.layers import fused, records, windows
from vitkernels.swap import _patch_merging
from vitkernels.swap._rules import Rule, add, runs_fused
from vitkernels.swap._windows import is_shift
from vitkernels.swap.timm.layers import ATTENTION_LIMITED_BY, DROP_PATHS, NORMS, attention_limit

Pair = tuple[int, int]


class FusedWindowAttention(WindowAttention):
    """timm's WindowAttention of Swin; with a mask, which only a shifted block passes, it runs timm's forward."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if runs_fused(ATTENTION, self, x) and is_unmasked(self, x, mask):
            return attend_in_windows(self, x, windows.swin_windows)
        return super().forward(x, mask)


class FusedSwinTransformerBlock(SwinTransformerBlock):
    """timm's pre-norm SwinTransformerBlock, in which no window is rolled, padded, cut or masked in memory."""

    def forward(self, x: Tensor) -> Tensor:
        if runs_fused(BLOCK, self, x) and fits(self, x, self.input_resolution):
            return windows.swin_block(self, x)
        return super().forward(x)


class FusedPatchMerging(PatchMerging):
    """timm's PatchMerging on :func:`vitkernels.ops.patch_merging`."""

    def forward(self, x: Tensor) -> Tensor:
        if runs_fused(MERGING, self, x) and _patch_merging.has_patches(self, x):
            return _patch_merging.merge(self, x)
        return super().forward(x)


def fits(block: nn.Module, x: Tensor, resolution: Pair) -> bool:
    """Tell whether the block's windows are its attention's, and its mask was made for images like x (B, Y, X, C).

    With an image of another size timm's forward raises an error or applies the mask that it has.
    """
    size, shift = tuple(block.window_size), tuple(block.shift_size)
    if x.ndim != 4 or size != tuple(block.attn.window_size) or not is_shift(shift, size):
        return False
    if getattr(block, "dynamic_mask", False):
        return True
    mask = block.attn_mask
    if mask is None or not any(shift):
        return mask is None and not any(shift)
    wanted = _counts(x.shape[1:3], size)
    return _counts(resolution, size) == wanted and mask.shape[0] == math.prod(wanted)


def _counts(image: Pair, size: Pair) -> Pair:
    """Return the rows and columns of windows in an image."""
    return -(-image[0] // size[0]), -(-image[1] // size[1])


def is_unmasked(attn: nn.Module, x: Tensor, mask: Tensor | None) -> bool:
    """Tell whether there is no mask, and x (B · windows, tokens, C) holds windows of the attention's size."""
    return mask is None and x.ndim == 3 and x.shape[1] == math.prod(attn.window_size)


def attend_in_windows(attn: nn.Module, x: Tensor, read: Callable[..., records.Windows]) -> Tensor:
    """Attend on x (B · windows, tokens, C), each of whose windows is an image of one window."""
    positions = read(attn, tuple(attn.window_size))
    return fused.attention(records.attention(attn)._replace(positions=positions), x)


WINDOW_ATTENTION_CHILDREN = {
    "qkv": (nn.Linear,),
    "attn_drop": (nn.Dropout,),
    "proj": (nn.Linear,),
    "proj_drop": (nn.Dropout,),
}
SWIN_BRANCHES = {
    "norm1": NORMS,
    "drop_path1": DROP_PATHS,
    "norm2": NORMS,
    "mlp": (Mlp,),
    "drop_path2": DROP_PATHS,
}
MERGING_CHILDREN = _patch_merging.CHILDREN | {"norm": (LayerNorm, nn.LayerNorm)}
SWIN_ATTRIBUTES = frozenset(
    {"dim", "target_shift_size", "always_partition", "dynamic_mask", "window_size", "shift_size", "window_area"}
)

ATTENTION = Rule(
    WindowAttention,
    FusedWindowAttention,
    bypassed=WINDOW_ATTENTION_CHILDREN | {"softmax": (nn.Softmax,)},
    parameters=frozenset({"relative_position_bias_table"}),
    attributes=frozenset({"dim", "window_size", "window_area", "num_heads", "scale", "fused_attn"}),
    limit=attention_limit,
    limited_by=ATTENTION_LIMITED_BY,
)
BLOCK = Rule(
    SwinTransformerBlock,
    FusedSwinTransformerBlock,
    bypassed=SWIN_BRANCHES | {"attn": (WindowAttention,)},
    attributes=SWIN_ATTRIBUTES | {"input_resolution", "mlp_ratio"},
    products=records.block,
)
MERGING = Rule(
    PatchMerging,
    FusedPatchMerging,
    bypassed=MERGING_CHILDREN,
    adapts=False,
    attributes=frozenset({"dim", "out_dim"}),
)
add(ATTENTION, BLOCK, MERGING)
