"""LayerScale."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LayerScale(nn.Module):
    """Multiply by ``gamma``, one learned factor per channel (arXiv 2103.17239).

    Args:
        dim: Size of the last dim.
        init_values: Initial value of every factor.
    """

    def __init__(self, dim: int, init_values: float = 1e-5, *, device=None, dtype=None) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init_values, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma
