"""Attention with fewer keys, or queries, than patches, and decomposed relative positions: MViTv2's (arXiv 2112.01526).

    S = scale · q kᵀ + q · rel_pos_h[row of q, row of k] + q · rel_pos_w[column of q, column of k]

The two products with the tables are small, (queries, rows of keys) and (queries, columns of keys). Written behind the
channels of the queries, where the keys have a one at their row and their column, the product of both sums all three, so
that no tensor of all pairs is needed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkernels import ops

Pair = tuple[int, int]


def pooled_attention(
    q: Tensor, k: Tensor, v: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, q_size: Pair, k_size: Pair, scale: float
) -> Tensor:
    """Attend with decomposed relative positions between two grids of patches.

    Args:
        q: (B, H, R + rows · columns of ``q_size``, D), with R prefix tokens, which have no position.
        k, v: (B, H, R + rows · columns of ``k_size``, D).
        rel_pos_h: (2 · max(rows of both) − 1, D), the table along y; ``rel_pos_w`` that along x.
        q_size, k_size: Rows and columns of patches.
        scale: Factor of the products of queries and keys, but not of those with the tables.

    Returns:
        (B, H, R + rows · columns of ``q_size``, D).
    """
    rows, columns = k_size
    prefix = q.shape[2] - q_size[0] * q_size[1]
    grid = q[:, :, prefix:].unflatten(2, q_size)
    along_y = torch.einsum("bhyxc,ykc->bhyxk", grid, _rows_of(rel_pos_h, q_size[0], rows))
    along_x = torch.einsum("bhyxc,xkc->bhyxk", grid, _rows_of(rel_pos_w, q_size[1], columns))
    biases = F.pad(torch.cat((along_y, along_x), -1).flatten(2, 3), (0, 0, prefix, 0))
    places = torch.cat((_one_hot(rows, k).repeat_interleave(columns, 0), _one_hot(columns, k).repeat(rows, 1)), 1)
    places = F.pad(places, (0, 0, prefix, 0)).expand(*k.shape[:2], -1, -1)
    queries, keys = torch.cat((q * scale, biases), -1), torch.cat((k, places), -1)
    return ops.attention(queries, keys, F.pad(v, (0, rows + columns)), scale=1.0)[..., : q.shape[-1]]


def _rows_of(table: Tensor, queries: int, keys: int) -> Tensor:
    """Return a table's rows for each query and key along an axis, (queries, keys, D)."""
    by_query, by_key = max(keys / queries, 1.0), max(queries / keys, 1.0)
    places = [torch.arange(n, device=table.device) * step for n, step in ((queries, by_query), (keys, by_key))]
    return table[(places[0][:, None] - places[1] + (keys - 1) * by_key).long()]


def _one_hot(n: int, like: Tensor) -> Tensor:
    return torch.eye(n, dtype=like.dtype, device=like.device)
