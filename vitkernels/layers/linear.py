"""Linear."""

from __future__ import annotations

from torch import Tensor, nn

from vitkernels import ops


class Linear(nn.Linear):
    """``nn.Linear`` on :func:`vitkernels.ops.linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)
