"""Checks that a fused forward, which reads its children's parameters, is equivalent to calling the children."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from vitkernels.layers import _lora, _own, sharded


def has_plain_children(module: nn.Module, classes: Mapping[str, tuple[type[nn.Module], ...]]) -> bool:
    """Tell whether a fused forward may read the children named in ``classes``; see :func:`_are_plain`.

    Raises:
        RuntimeError: It may not, and the module's layers are sharded: then there is no other forward.
    """
    plain = _are_plain(module, classes)
    if not plain and sharded.MARK in module.__dict__:
        reason = "a hook, an adapter or another class of a child forbids that"
        raise sharded.no_other_forward(type(module).__name__, reason)
    return plain


def _are_plain(module: nn.Module, classes: Mapping[str, tuple[type[nn.Module], ...]]) -> bool:
    """Tell whether each child named in ``classes`` is exactly of a listed class, without hooks or a replaced forward.

    The forward must not be replaced on the child or on its class. Adapters, parametrizations and quantized layers
    change the class. Fusing such a child would silently skip its changes. PEFT's LoRA alone may be around a Linear: the
    fused forward computes it.
    """
    children = module._modules  # this runs at every call, and attribute look-ups would double its time
    for name, allowed in classes.items():
        child = children[name]
        if nn.Linear in allowed and _lora.is_lora(child):
            if _own.has_hooks(child) or _own.hides_forward(child) or _lora.why_not(child) is not None:
                return False
            child = child._modules["base_layer"]
        if type(child) not in allowed:
            return False
        if _own.has_hooks(child) or _own.replaced(type(child)) is not None:
            return False
        if "forward" in child.__dict__ and _own.hides_forward(child):
            return False
    return True
