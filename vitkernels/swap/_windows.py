"""What the window attentions of several libraries share."""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn

from vitkernels.layers import records

# Swin V2's MLP that makes the table of biases. It is called, but for the report it belongs to the attention.
TABLE_MLP = {"cpb_mlp": (nn.Sequential,)}


def is_shift(shift: tuple[int, int], size: tuple[int, int]) -> bool:
    """Tell whether windows of ``size`` can be shifted so."""
    return all(0 <= s < w for s, w in zip(shift, size, strict=True))


def sam_positions(
    attn: nn.Module, decomposed: bool, image: tuple[int, int], window_size: int = 0
) -> records.Decomposed | records.Windows | None:
    """Read the positions of SAM's and ViTDet's attention in windows, or over the ``image``.

    Tables of ``decomposed`` positions that have another size are resized by linear interpolation, as the original code
    does at each call.
    """
    window = (window_size,) * 2 if window_size else None
    if not decomposed:
        return None if window is None else records.Windows(image, window)
    tables = []
    for name, size in zip(("rel_pos_h", "rel_pos_w"), window or image, strict=True):
        table = records.parameter(attn, name)
        if table.shape[0] != 2 * size - 1:
            table = F.interpolate(table.t()[None], size=2 * size - 1, mode="linear")[0].t()
        tables.append(table)
    return records.Decomposed(image, *tables, window)
