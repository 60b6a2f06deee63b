"""When a fused forward, which reads its children's parameters and never calls them, does what calling them would."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from vitkernels.layers import _own


def has_plain_children(module: nn.Module, classes: Mapping[str, tuple[type[nn.Module], ...]]) -> bool:
    """Tell whether each child named in ``classes`` is exactly of such a class, with no hook and no forward of its own.

    Nor may the class have another forward than its library gave it. A LoRA adapter, a parametrization and a quantized
    layer change the class. Fusing over any of these would leave
    them out without a word.
    """
    children = module._modules  # runs at every call: the ordinary attribute look-ups would double its time
    for name, allowed in classes.items():
        child = children[name]
        if type(child) not in allowed:
            return False
        if has_hooks(child) or "forward" in child.__dict__ or _own.replaced(type(child)) is not None:
            return False
    return True


def has_hooks(module: nn.Module) -> bool:
    """Tell whether a hook is registered on ``module``, which only calling it would run."""
    state = module.__dict__
    return bool(
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
    )
