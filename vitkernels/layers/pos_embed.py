"""Position embeddings: fixed sine and cosine tables, and resampling to another grid."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkernels import ops


def sincos1d(length: int, dim: int, *, device=None, dtype=None) -> Tensor:
    """Return the table (1, length, dim) of sines (even channels) and cosines (odd channels) of positions.

    ``table[p, 2i] = sin(p / 10000^(2i/dim))``, ``table[p, 2i + 1] = cos(p / 10000^(2i/dim))`` (arXiv 1706.03762 §3.5).

    Raises:
        ValueError: ``dim`` is odd.
    """
    if dim % 2:
        raise ValueError(f"sincos1d needs an even number of channels, got {dim}")
    angles = _angles(torch.arange(length, device=device), dim // 2)
    table = torch.stack([angles.sin(), angles.cos()], dim=-1).reshape(1, length, dim)
    return table.to(dtype or torch.get_default_dtype())


def sincos2d(grid_size: tuple[int, int], dim: int, *, num_prefix_tokens: int = 0, device=None, dtype=None) -> Tensor:
    """Return the table (1, prefix + rows · columns, dim) of MAE (arXiv 2111.06377): zeros for the prefix tokens.

    A patch at column x and row y has ``[sin(x·ω), cos(x·ω), sin(y·ω), cos(y·ω)]``, ``ω_i = 10000^(−i/(dim/4))``.
    MoCo v3 (arXiv 2104.02057) swaps the two halves, which is a permutation of channels.

    Raises:
        ValueError: ``dim`` is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"sincos2d needs a number of channels that 4 divides, got {dim}")
    rows, columns = grid_size
    y = _angles(torch.arange(rows, device=device), dim // 4)[:, None].expand(-1, columns, -1)
    x = _angles(torch.arange(columns, device=device), dim // 4)[None, :].expand(rows, -1, -1)
    table = torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=-1).reshape(1, rows * columns, dim)
    return F.pad(table, (0, 0, num_prefix_tokens, 0)).to(dtype or torch.get_default_dtype())


def rope2d(
    grid_size: tuple[int, int],
    dim: int,
    *,
    temperature: float = 10000.0,
    reference: tuple[int, int] | None = None,
    device=None,
    dtype=None,
) -> ops.Rope:
    """Return the rotary positions of EVA-02 (arXiv 2303.11331): cosines and sines (rows · columns, dim).

    Channels 2j and 2j + 1 are rotated together, by the row times ``ω_j`` in the first half of the channels, and by the
    column in the second, ``ω_j = temperature^(−j/(dim/4))``.

    Args:
        grid_size: Rows and columns of patches.
        dim: Channels D of a head.
        temperature: As above.
        reference: Rows and columns that the grid is scaled to; None leaves positions whole numbers.

    Raises:
        ValueError: ``dim`` is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"rope2d needs a number of channels that 4 divides, got {dim}")
    frequencies = 1.0 / temperature ** (torch.arange(dim // 4, device=device).float() / (dim // 4))
    axes = [torch.arange(n, device=device).float() for n in grid_size]
    if reference is not None:
        axes = [axis / n * wanted for axis, n, wanted in zip(axes, grid_size, reference, strict=True)]
    angles = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)[..., None] * frequencies  # (rows, columns, 2, ·)
    angles = angles.flatten(2).flatten(0, 1).repeat_interleave(2, dim=-1)
    dtype = dtype or torch.get_default_dtype()
    return ops.Rope(angles.cos().to(dtype), angles.sin().to(dtype), interleaved=True)


def _angles(positions: Tensor, frequencies: int) -> Tensor:
    exponents = torch.arange(frequencies, device=positions.device, dtype=torch.float64) / frequencies
    return positions.double()[:, None] * 10000.0**-exponents


def resample_pos_embed(
    pos_embed: Tensor, new_size: tuple[int, int], old_size: tuple[int, int], num_prefix_tokens: int = 1
) -> Tensor:
    """Resample a position embedding (1, prefix + old patches, C) to another grid, bicubic with antialiasing.

    The result equals that of timm's ``resample_abs_pos_embed``, except that fp64 stays fp64. The prefix is unchanged.

    Args:
        pos_embed: The embedding; differentiable.
        new_size: Rows and columns of the new grid.
        old_size: Rows and columns of the old grid.
        num_prefix_tokens: Number of leading tokens that are not patches.
    """
    # An export would keep only one side of this branch, so it always resamples; to the same grid this changes no bit.
    if not torch.compiler.is_exporting() and tuple(new_size) == tuple(old_size):
        return pos_embed
    prefix, patches = pos_embed[:, :num_prefix_tokens], pos_embed[:, num_prefix_tokens:]
    grid = patches.reshape(1, *old_size, -1).permute(0, 3, 1, 2)
    # Some devices cannot interpolate half precision with antialiasing.
    grid = grid if grid.dtype == torch.float64 else grid.float()
    grid = F.interpolate(grid, size=tuple(new_size), mode="bicubic", antialias=True)
    patches = grid.permute(0, 2, 3, 1).reshape(1, -1, pos_embed.shape[-1]).to(pos_embed.dtype)
    return torch.cat([prefix, patches], dim=1)
