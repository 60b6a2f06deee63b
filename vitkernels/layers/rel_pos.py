"""Tables of biases by relative position, resampled for another window."""

from __future__ import annotations

import torch
from torch import Tensor


def resize_rel_pos_bias_table(table: Tensor, new_size: tuple[int, int], old_size: tuple[int, int]) -> Tensor:
    """Resample a table of biases by relative position to another window, as BEiT does and timm after it.

    The old positions are spread so that the ends of both tables meet: dense around 0, ever wider apart outwards. The
    new ones are read from them bilinearly. The result equals that of timm's function of this name.

    Args:
        table: (entries, H): (2 · rows − 1) · (2 · columns − 1) entries of ``old_size``, then any that belong to no
            position, such as three of a class token, which stay.
        new_size: Rows and columns of the new window.
        old_size: Rows and columns of the old window.

    Returns:
        The new table, in the dtype of the old one; the old one itself if the sizes are equal.

    Raises:
        ValueError: The table is no matrix, or has fewer entries than ``old_size`` needs.

    Reference: arXiv 2106.08254 (BEiT), ``run_class_finetuning.py`` of its published code.
    """
    old, new = (tuple(2 * n - 1 for n in size) for size in (old_size, new_size))
    entries = old[0] * old[1]
    if table.ndim != 2 or table.shape[0] < entries:
        raise ValueError(
            f"table has shape {tuple(table.shape)}; expected {entries} entries for {tuple(old_size)}, or more"
        )
    if old == new:
        return table
    rows, columns = (_weights(*sizes).to(table.device) for sizes in zip(old, new, strict=True))
    of_positions = table[:entries].float().t().unflatten(1, old)  # (H, old rows, old columns)
    resized = (rows @ of_positions @ columns.t()).flatten(1).t()
    return torch.cat((resized.to(table.dtype), table[entries:]))


def _weights(old: int, new: int) -> Tensor:
    """Return the weights (new, old) that interpolate linearly between the spread positions of an old axis."""
    points = torch.tensor(_spread(old, new))
    wanted = torch.arange(new, dtype=torch.float32) - new // 2
    right = torch.bucketize(wanted, points).clamp_max(old - 1)
    left = (right - 1).clamp_min(0)
    # Beyond the ends, the end counts alone.
    below, above = (wanted - points[left]).clamp_min(0.0), (points[right] - wanted).clamp_min(0.0)
    alone = (below == 0) & (above == 0)
    below, above = below.masked_fill(alone, 1.0), above.masked_fill(alone, 1.0)
    weights = torch.zeros(new, old)
    at = torch.arange(new)
    weights[at, left] += above / (below + above)
    weights[at, right] += below / (below + above)
    return weights


def _spread(old: int, new: int) -> list[float]:
    """Return old positions whose distances grow in a geometric progression that ends where the new ones end."""
    lower, upper = 1.01, 1.5
    while upper - lower > 1e-6:
        ratio = (lower + upper) / 2.0
        if (1.0 - ratio ** (old // 2)) / (1.0 - ratio) > new // 2:
            upper = ratio
        else:
            lower = ratio
    outwards, position = [], 1.0
    for i in range(old // 2):
        outwards.append(position)
        position += ratio ** (i + 1)
    return [-p for p in reversed(outwards)] + [0.0] + outwards
