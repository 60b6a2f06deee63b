"""Rules for torch.nn itself: LayerNorm, in any model."""

from __future__ import annotations

from torch import Tensor, nn

from vitkernels.layers import fused, records
from vitkernels.swap._limits import one_dim
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
            return fused.norm(records.norm(self), input)
        return super().forward(input)


LAYER_NORM = Rule(
    nn.LayerNorm,
    FusedLayerNorm,
    parameters=frozenset({"weight", "bias"}),
    attributes=frozenset({"normalized_shape", "eps", "elementwise_affine"}),
    limit=one_dim,
)
add(LAYER_NORM)
