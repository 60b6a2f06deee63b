"""timm's relative positions as tables for :mod:`vitkernels.ops`: ``RelPosBias``, ``RelPosBiasTf`` and ``RelPosMlp``."""

from __future__ import annotations

import torch.nn.functional as F
from timm.layers import RelPosBias, RelPosBiasTf, RelPosMlp
from torch import Tensor, nn

from vitkernels.layers import fused, records
from vitkernels.layers.records import Attention, Relative
from vitkernels.swap._rules import PARAMETERS
from vitkernels.swap.timm.layers import ABSENT

REL_POS = (RelPosBias, RelPosBiasTf, RelPosMlp, ABSENT)
PARAMETERS |= {cls: frozenset({"relative_position_bias_table"}) for cls in (RelPosBias, RelPosBiasTf)}


def bias_table(rel_pos: nn.Module | None) -> Tensor | None:
    """Return the bias (entries, H) by relative position; the MLP of a ``RelPosMlp`` is called."""
    if rel_pos is None:
        return None
    if isinstance(rel_pos, RelPosMlp):
        table = rel_pos.bias_act(rel_pos.mlp(rel_pos.rel_coords_log).flatten(0, 1))
        table = table if rel_pos.bias_gain is None else rel_pos.bias_gain * table
        return F.pad(table, (0, 0, 0, 3)) if rel_pos.prefix_tokens else table
    table = records.parameter(rel_pos, "relative_position_bias_table")
    # (H, 2Y - 1, 2X - 1), by the key's position less the query's: the reverse of all others.
    return table.flip(1, 2).flatten(1).t() if isinstance(rel_pos, RelPosBiasTf) else table


def relative(attn: Attention, rel_pos: nn.Module | None, shared: Tensor | None) -> tuple[Attention, Tensor | None]:
    """Give ``attn`` over a whole image its relative positions; return it with the mask to pass beside it.

    As in timm, ``shared``, the bias (1, H, N, N) of all blocks, counts only without ``rel_pos``.
    """
    if rel_pos is None:
        return attn, shared
    if attn.q_norm is not None or attn.k_norm is not None:
        return attn, rel_pos.get_bias()
    positions = Relative(tuple(rel_pos.window_size), bias_table(rel_pos), _prefix_tokens(rel_pos))
    return attn._replace(positions=positions), None


def takes_tokens(rel_pos: nn.Module | None, shared: Tensor | None, tokens: int) -> bool:
    """Tell whether the bias is for so many tokens; for others the original raises."""
    if rel_pos is None:
        return fused.takes_masks(shared, False)
    return tokens == rel_pos.window_area + _prefix_tokens(rel_pos)


def _prefix_tokens(rel_pos: nn.Module) -> int:
    if isinstance(rel_pos, RelPosBias):  # in older releases it keeps their number in the shape alone
        return rel_pos.bias_shape[0] - rel_pos.window_area
    return getattr(rel_pos, "prefix_tokens", 0)  # RelPosBiasTf has none
