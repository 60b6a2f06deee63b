"""The block of SAM 2's encoder (Hiera, arXiv 2306.00989; SAM 2, arXiv 2408.00714) on images (B, Y, X, C). No rules.

It attends within windows or over the whole image. The first block of a stage widens the channels, and may pool the
queries and the shortcut.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from vitkernels import ops
from vitkernels.layers import fused, records
from vitkernels.layers.windows import within
from vitkernels.swap._images import channels_first, tokens_of, tokens_of_channels_first


class Pooling(NamedTuple):
    """How a block pools; both callables take and return (B, C, Y, X).

    Attributes:
        stride: Rows and columns that become one.
        queries: Pools the queries of an image or of a window, whose channels are H · D.
        shortcut: Pools the shortcut.
    """

    stride: tuple[int, int]
    queries: Callable[[Tensor], Tensor]
    shortcut: Callable[[Tensor], Tensor]


def attention(attn: records.Attention, x: Tensor, pool: Callable[[Tensor], Tensor] | None) -> Tensor:
    """Attend over the image or window x (B, Y, X, C), with queries that ``pool`` reduces."""
    size, tokens = tuple(x.shape[1:3]), tokens_of(x)
    if pool is None:
        return fused.attention(attn, tokens).unflatten(1, size)
    q, k, v = fused.linear(attn.qkv, tokens).chunk(3, -1)
    q = pool(channels_first(q, size))
    size, q = tuple(q.shape[2:]), tokens_of_channels_first(q)
    q, k, v = (t.unflatten(-1, (attn.num_heads, attn.head_dim)).transpose(1, 2) for t in (q, k, v))
    out = ops.attention(q, k, v, scale=attn.scale).transpose(1, 2).flatten(2)
    return fused.linear(attn.proj, out).unflatten(1, size)


def block(
    block: records.Block,
    x: Tensor,
    window: tuple[int, int] | None,
    widening: records.Linear | None,
    pooling: Pooling | None,
) -> Tensor:
    """Run ``block`` on x (B, Y, X, C).

    Args:
        block: The block, its attention without positions.
        x: The image.
        window: Rows and columns of a window; None is the whole image.
        widening: The shortcut's projection from the first norm, if the block changes the number of channels.
        pooling: How queries and that shortcut are pooled, if they are.
    """
    size, tokens = tuple(x.shape[1:3]), tokens_of(x)
    windowed = within(block, None if window is None else records.Windows(size, window))
    if widening is None and pooling is None:
        return fused.block(windowed, tokens).view(x.shape)
    normed = fused.norm(block.norm1, tokens)
    image = normed.unflatten(1, size)
    if widening is not None:
        tokens = fused.linear(widening, normed)
        if pooling is not None:
            pooled = pooling.shortcut(channels_first(tokens, size))
            size, tokens = tuple(pooled.shape[2:]), tokens_of_channels_first(pooled)
    if pooling is None:
        branch = fused.attention(windowed.attn, normed)
    elif window is None:
        branch = attention(block.attn, image, pooling.queries).flatten(1, 2)
    else:
        branch = _pooled_within(block.attn, image, window, pooling, size)
    return fused.behind_attention(block, branch, tokens).unflatten(1, size)


def _pooled_within(
    attn: records.Attention, x: Tensor, window: tuple[int, int], pooling: Pooling, size: tuple[int, int]
) -> Tensor:
    """Attend within windows of x to ``size`` tokens, as the original does: windows of queries are smaller than x's."""
    (rows, columns), (Y, X) = window, x.shape[1:3]
    x = F.pad(x, (0, 0, 0, -X % columns, 0, -Y % rows))
    x = x.unflatten(2, (-1, columns)).unflatten(1, (-1, rows)).transpose(2, 3).flatten(0, 2)
    out = attention(attn, x, pooling.queries)
    counts = (-(-n // (w // s)) for n, w, s in zip(size, window, pooling.stride, strict=True))
    out = out.unflatten(0, (-1, *counts)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return out[:, : size[0], : size[1]].flatten(1, 2)
