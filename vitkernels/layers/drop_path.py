"""Stochastic depth."""

from __future__ import annotations

from torch import Tensor, nn

from vitkernels.layers import fused, records


class DropPath(nn.Module):
    """In training, zero a sample's whole branch with probability ``drop_prob`` (arXiv 1603.09382).

    Args:
        drop_prob: Probability of dropping, in [0, 1].
        scale_by_keep: Divide kept branches by the probability of keeping, so that the mean is unchanged.
    """

    def __init__(self, drop_prob: float = 0.0, scale_by_keep: bool = True) -> None:
        super().__init__()
        if not 0.0 <= drop_prob <= 1.0:
            raise ValueError(f"drop_prob is {drop_prob}; expected a probability in [0, 1]")
        self.drop_prob = drop_prob
        self.scale_by_keep = scale_by_keep

    def forward(self, x: Tensor) -> Tensor:
        scale = fused.drop_path_scale(records.drop_path(self), x)
        return x if scale is None else x * scale.reshape(-1, *[1] * (x.ndim - 1))

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.3f}"
