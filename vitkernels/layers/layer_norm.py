"""LayerNorm over the last dim."""

from __future__ import annotations

from torch import Tensor, nn

from vitkernels import ops


class LayerNorm(nn.LayerNorm):
    """LayerNorm (arXiv 1607.06450) on :func:`vitkernels.ops.layer_norm`, with timm's arguments and defaults.

    Args:
        num_channels: Size of the last dim.
        eps: Added to the variance; the default is 1e-6, PyTorch's is 1e-5.
        affine: Whether there are ``weight`` and ``bias``.
        **kwargs: ``bias``, ``device`` and ``dtype``, as for ``nn.LayerNorm``.
    """

    def __init__(self, num_channels: int, eps: float = 1e-6, affine: bool = True, **kwargs) -> None:
        super().__init__(num_channels, eps=eps, elementwise_affine=affine, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, self.eps)
