"""Checks that a fused forward, which reads its children's parameters, is equivalent to calling the children."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch._subclasses import FakeTensor

from vitkernels.layers import _own

# torch.export replaces parameters with fake tensors.
PLAIN = (nn.Parameter, FakeTensor)


def has_plain_children(module: nn.Module, classes: Mapping[str, tuple[type[nn.Module], ...]]) -> bool:
    """Tell whether each child named in ``classes`` is exactly of a listed class, without hooks or a replaced forward.

    The forward must not be replaced on the child or on its class. LoRA adapters, parametrizations and quantized layers
    change the class. Fusing such a child would silently skip its changes.
    """
    children = module._modules  # this runs at every call, and attribute look-ups would double its time
    for name, allowed in classes.items():
        child = children[name]
        if type(child) not in allowed:
            return False
        if has_hooks(child) or "forward" in child.__dict__ or _own.replaced(type(child)) is not None:
            return False
    return True


def has_hooks(module: nn.Module) -> bool:
    """Tell whether ``module`` has hooks, which run only when it is called."""
    state = module.__dict__
    return bool(
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
    )
