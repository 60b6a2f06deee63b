"""RMSNorm over the last dim."""

from __future__ import annotations

from torch import Tensor, nn

from vitkernels import ops


class RmsNorm(nn.RMSNorm):
    """RMSNorm (arXiv 1910.07467) on :func:`vitkernels.ops.rms_norm`, with timm's arguments and defaults.

    Args:
        channels: Size of the last dim.
        eps: Added to the mean of squares; the default is 1e-6, PyTorch's is the machine epsilon.
        affine: Whether there is a ``weight``.
        **kwargs: ``device`` and ``dtype``, as for ``nn.RMSNorm``.
    """

    def __init__(self, channels: int, eps: float = 1e-6, affine: bool = True, **kwargs) -> None:
        super().__init__(channels, eps=eps, elementwise_affine=affine, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)
