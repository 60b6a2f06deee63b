"""What the window attentions of several libraries share."""

from __future__ import annotations

from torch import nn

# Swin V2's MLP that makes the table of biases. It is called, but for the report it belongs to the attention.
TABLE_MLP = {"cpb_mlp": (nn.Sequential,)}


def is_shift(shift: tuple[int, int], size: tuple[int, int]) -> bool:
    """Tell whether windows of ``size`` can be shifted so."""
    return all(0 <= s < w for s, w in zip(shift, size, strict=True))
