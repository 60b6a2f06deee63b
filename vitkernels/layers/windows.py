"""Attention within windows as Swin has it: what its modules hold, as records, and its two blocks.

The layers here and the modules that :func:`vitkernels.accelerate` swaps in share this; modules have timm's attributes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vitkernels.layers import fused, records


def cosine_scale(logit_scale: Tensor) -> Tensor:
    """Return the factor (H,) of Swin V2's cosine attention from its parameter, a logarithm."""
    return torch.clamp(logit_scale, max=math.log(100.0)).exp().view(-1)


def continuous_bias(cpb_mlp: nn.Module, coordinates: Tensor, num_heads: int) -> Tensor:
    """Return Swin V2's bias as a table (entries, H): its MLP on the ``coordinates`` of all relative positions."""
    return 16 * torch.sigmoid(cpb_mlp(coordinates).view(-1, num_heads))


def swin_windows(attn: nn.Module, image: tuple[int, int], shift: tuple[int, int] = (0, 0)) -> records.Windows:
    """Read the window attention of Swin, with a table of biases."""
    table = records.parameter(attn, "relative_position_bias_table")
    return records.Windows(image, tuple(attn.window_size), shift, table)


def swin_v2_windows(attn: nn.Module, image: tuple[int, int], shift: tuple[int, int] = (0, 0)) -> records.Windows:
    """Read the window attention of Swin V2, with cosine attention and a table that an MLP makes."""
    table = continuous_bias(attn.cpb_mlp, attn.relative_coords_table, attn.num_heads)
    return records.Windows(image, tuple(attn.window_size), shift, table, cosine_scale(attn.logit_scale))


def within(block: records.Block, positions: records.Windows | records.Decomposed | None) -> records.Block:
    """Return ``block`` with its attention at ``positions``."""
    return block._replace(attn=block.attn._replace(positions=positions))


def swin_block(block: nn.Module, x: Tensor) -> Tensor:
    """Run a pre-norm block of Swin on x (B, Y, X, C)."""
    windows = swin_windows(block.attn, tuple(x.shape[1:3]), tuple(block.shift_size))
    return fused.block(within(records.block(block), windows), x.flatten(1, 2)).view(x.shape)


def swin_v2_block(block: nn.Module, x: Tensor) -> Tensor:
    """Run a block of Swin V2, with norms after the branches, on x (B, Y, X, C)."""
    windows = swin_v2_windows(block.attn, tuple(x.shape[1:3]), tuple(block.shift_size))
    return fused.post_norm_block(within(records.block(block), windows), x.flatten(1, 2)).view(x.shape)
