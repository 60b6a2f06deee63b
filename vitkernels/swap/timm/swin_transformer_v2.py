"""The blocks and window attentions of timm's swin_transformer_v2.py and swin_transformer_v2_cr.py; the patch merging of
the first."""

from __future__ import annotations

import torch
from timm.layers import Mlp
from timm.models.swin_transformer_v2 import PatchMerging, SwinTransformerV2Block, WindowAttention
from timm.models.swin_transformer_v2_cr import SwinTransformerV2CrBlock, WindowMultiHeadAttention
from torch import Tensor, nn

from vitkernels.layers import fused, records, windows
from vitkernels.swap import _patch_merging
from vitkernels.swap._rules import Rule, add, runs_fused
from vitkernels.swap._windows import TABLE_MLP
from vitkernels.swap.timm.layers import ATTENTION_LIMITED_BY, NORMS, attention_limit
from vitkernels.swap.timm.swin_transformer import (
    MERGING_CHILDREN,
    SWIN_ATTRIBUTES,
    SWIN_BRANCHES,
    WINDOW_ATTENTION_CHILDREN,
    Pair,
    attend_in_windows,
    fits,
    is_unmasked,
)


class FusedWindowAttention(WindowAttention):
    """timm's WindowAttention of Swin V2; with a mask it runs timm's forward."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if runs_fused(ATTENTION, self, x) and is_unmasked(self, x, mask):
            return attend_in_windows(self, x, windows.swin_v2_windows)
        return super().forward(x, mask)


class FusedWindowMultiHeadAttention(WindowMultiHeadAttention):
    """timm's WindowMultiHeadAttention of Swin V2 Cr; with a mask it runs timm's forward."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if runs_fused(ATTENTION_CR, self, x) and is_unmasked(self, x, mask) and not _drops_biases(self):
            return attend_in_windows(self, x, _windows_cr)
        return super().forward(x, mask)


class FusedSwinTransformerV2Block(SwinTransformerV2Block):
    """timm's SwinTransformerV2Block, with norms after the branches, as a chain of kernels."""

    def forward(self, x: Tensor) -> Tensor:
        if runs_fused(BLOCK, self, x) and fits(self, x, self.input_resolution):
            return windows.swin_v2_block(self, x)
        return super().forward(x)


class FusedSwinTransformerV2CrBlock(SwinTransformerV2CrBlock):
    """timm's SwinTransformerV2CrBlock, which may have a third norm at its end, as a chain of kernels.

    In training its biases are dropped pair by pair of tokens, which a table cannot say: it then runs timm's forward.
    """

    def forward(self, x: Tensor) -> Tensor:
        if runs_fused(BLOCK_CR, self, x) and fits(self, x, self.feat_size) and not _drops_biases(self.attn):
            read = _windows_cr(self.attn, tuple(x.shape[1:3]), tuple(self.shift_size))
            out = fused.post_norm_block(windows.within(records.block(self), read), x.flatten(1, 2))
            return fused.norm(records.norm(self.norm3), out).view(x.shape)
        return super().forward(x)


class FusedPatchMerging(PatchMerging):
    """timm's PatchMerging of Swin V2, with its norm behind the product, on :func:`vitkernels.ops.patch_merging`."""

    def forward(self, x: Tensor) -> Tensor:
        if runs_fused(MERGING, self, x) and _patch_merging.has_patches(self, x):
            return _patch_merging.merge(self, x, norm_last=True)
        return super().forward(x)


def _windows_cr(attn: WindowMultiHeadAttention, image: Pair, shift: Pair = (0, 0)) -> records.Windows:
    rows, columns = size = tuple(attn.window_size)
    # A buffer has the coordinates of every pair of tokens; those of a row are the same for all columns.
    pairs = attn.relative_coordinates_log.view(rows, columns, rows, columns, 2)
    y = torch.cat((pairs[0, 0, 1:, 0, 0].flip(0), pairs[:, 0, 0, 0, 0]))
    x = torch.cat((pairs[0, 0, 0, 1:, 1].flip(0), pairs[0, :, 0, 0, 1]))
    table = attn.meta_mlp(torch.cartesian_prod(y, x))
    return records.Windows(image, size, shift, table, windows.cosine_scale(attn.logit_scale))


def _drops_biases(attn: WindowMultiHeadAttention) -> bool:
    return any(records.dropout(m) > 0.0 for m in attn.meta_mlp.modules() if isinstance(m, nn.Dropout))


def _cr_limit(attn: WindowMultiHeadAttention) -> str | None:
    if attn.sequential_attn:
        return "it attends sequentially (sequential_attn)"
    if not isinstance(attn.meta_mlp, Mlp):
        return f"meta_mlp is a {type(attn.meta_mlp).__name__}, which may mix positions"
    return attention_limit(attn)


ATTENTION = Rule(
    WindowAttention,
    FusedWindowAttention,
    bypassed=WINDOW_ATTENTION_CHILDREN | {"softmax": (nn.Softmax,)} | TABLE_MLP,
    parameters=frozenset({"logit_scale"}),
    optional_parameters=frozenset({"q_bias", "k_bias", "v_bias"}),
    attributes=frozenset({"dim", "window_size", "pretrained_window_size", "num_heads", "qkv_bias_separate"}),
    limit=attention_limit,
    limited_by=ATTENTION_LIMITED_BY,
)
ATTENTION_CR = Rule(
    WindowMultiHeadAttention,
    FusedWindowMultiHeadAttention,
    bypassed=WINDOW_ATTENTION_CHILDREN,
    called=frozenset({"meta_mlp"}),
    parameters=frozenset({"logit_scale"}),
    attributes=frozenset({"in_features", "window_size", "num_heads", "sequential_attn"}),
    limit=_cr_limit,
)
BLOCK = Rule(
    SwinTransformerV2Block,
    FusedSwinTransformerV2Block,
    bypassed=SWIN_BRANCHES | {"attn": (WindowAttention,)},
    attributes=SWIN_ATTRIBUTES | {"input_resolution", "mlp_ratio", "num_heads"},
)
BLOCK_CR = Rule(
    SwinTransformerV2CrBlock,
    FusedSwinTransformerV2CrBlock,
    bypassed=SWIN_BRANCHES | {"attn": (WindowMultiHeadAttention,), "norm3": (nn.Identity, *NORMS)},
    attributes=SWIN_ATTRIBUTES | {"feat_size", "init_values"},
)
MERGING = Rule(
    PatchMerging,
    FusedPatchMerging,
    bypassed=MERGING_CHILDREN,
    adapts=False,
    attributes=frozenset({"dim", "out_dim"}),
)
add(ATTENTION, ATTENTION_CR, BLOCK, BLOCK_CR, MERGING)
