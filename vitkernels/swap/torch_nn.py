"""Rules for torch.nn itself: LayerNorm, in any model."""

from __future__ import annotations

from torch import Tensor, nn

from vitkernels.layers import fused
from vitkernels.swap._rules import Rule, add, runs_fused


class _ShownInTorch(type):
    """Metaclass: the class itself reports this module, where pickle finds it; its instances report torch.nn.

    torch.fx keeps a module of torch.nn as one node, and traces through any other.
    """

    @property
    def __module__(cls) -> str:
        module = vars(cls)["__module__"]
        return __name__ if module == nn.__name__ else module


class FusedLayerNorm(nn.LayerNorm, metaclass=_ShownInTorch):
    """``torch.nn.LayerNorm`` over the last dim on :func:`vitkernels.ops.layer_norm`."""

    __module__ = nn.__name__

    def forward(self, input: Tensor) -> Tensor:
        if runs_fused(LAYER_NORM, self, input):
            return fused.layer_norm(self, input)
        return super().forward(input)


def one_dim(norm: nn.LayerNorm) -> str | None:
    """Return why ``norm`` has no kernel (it normalises over more than the last dim), or None if it has one."""
    dims = len(norm.normalized_shape)
    return None if dims == 1 else f"it normalises over the last {dims} dims; the kernel over the last one"


LAYER_NORM = Rule(
    nn.LayerNorm,
    FusedLayerNorm,
    parameters=frozenset({"weight", "bias"}),
    attributes=frozenset({"normalized_shape", "eps", "elementwise_affine"}),
    limit=one_dim,
)
add(LAYER_NORM)
