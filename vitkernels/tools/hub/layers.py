"""Layers for ``kernels.kernelize``: each replaces the forward of another library's module, whose state it reads.

kernels takes only classes without a constructor and members of their own. Gradients are computed by kernels too.
"""

from __future__ import annotations

from torch import Tensor, nn

from vitkernels import ops
from vitkernels.layers import mlp


class LayerNorm(nn.Module):
    """LayerNorm (arXiv 1607.06450) in place of ``nn.LayerNorm`` over the last dim."""

    has_backward = True
    can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:
        return ops.layer_norm(input, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """RMSNorm (arXiv 1910.07467) in place of the norms that transformers calls ``RMSNorm`` on the hub."""

    has_backward = True
    can_torch_compile = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        return ops.rms_norm(hidden_states, self.weight, self.variance_epsilon)


class Mlp(nn.Module):
    """``fc2(act(fc1(x)))`` in one op, in place of an MLP with the attributes of ``timm.layers.Mlp``.

    As there, dropout and a norm of the hidden features may stand between. What holds a child that a fused forward would
    bypass, such as an adapter or a hook, calls its children.
    """

    has_backward = True
    can_torch_compile = True

    def forward(self, x: Tensor) -> Tensor:
        return mlp.Mlp.forward(self, x)
