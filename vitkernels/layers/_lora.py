"""PEFT's LoRA around a Linear: when a fused forward, which reads it by ``records.linear``, computes what it computes.

PEFT may be imported after the swap, and an adapter added to a module that runs fused. So nothing here imports it.
"""

from __future__ import annotations

import sys

import torch
from torch import nn

from vitkernels.layers import _own, records, sharded

# The attributes of PEFT's Linear that are known: another one may change what it computes.
_ATTRIBUTES = frozenset({
    "training", "r", "lora_alpha", "scaling", "merged_adapters", "use_dora", "use_rslora", "lora_bias",
    "ephemeral_gpu_offload", "cast_input_dtype_enabled", "lora_variant", "kwargs", "in_features", "out_features",
    "fan_in_fan_out", "is_target_conv_1d_layer",
})  # fmt: skip
_CHILDREN = frozenset({
    "base_layer", "lora_dropout", "lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector",
})  # fmt: skip


def is_lora(module: nn.Module) -> bool:
    """Tell whether ``module`` is exactly PEFT's ``lora.Linear``, and record the methods of that class."""
    layer, cls = sys.modules.get("peft.tuners.lora.layer"), type(module)
    if layer is None or cls is not layer.Linear:
        return False
    if not _own.noted(cls):
        _own.note(cls)
    return True


def why_not(module: nn.Module) -> str | None:
    """Return why a fused forward cannot compute what PEFT's Linear ``module`` computes; None if it can.

    The base layer is the caller's to check, as it would be without an adapter.
    """
    own, children = module.__dict__, module._modules
    if module.fan_in_fan_out:
        return "its adapter is for a transposed weight"
    if module.disable_adapters and module.merged:
        return "its adapters are disabled and still merged, which PEFT undoes when it is called"
    if sharded.MARK in children["base_layer"].__dict__:
        return "its base layer is sharded over processes"
    names, weight = records.active_adapters(module), getattr(children["base_layer"], "weight", None)
    if not isinstance(weight, torch.Tensor):
        return f"its base layer is a {type(children['base_layer']).__name__}, which has no weight"
    for name in names:
        reason = _why_not_adapter(module, name, weight, alone=len(names) == 1)
        if reason is not None:
            return f"adapter {name!r}: {reason}"
    hidden = [name for name in own if callable(getattr(type(module), name, None))]
    if hidden:
        return f"its method {hidden[0]!r} is hidden by an attribute of that name"
    strange = [name for name in own if name[0] != "_" and name not in _ATTRIBUTES]
    strange += [name for name in children if name not in _CHILDREN]
    return f"PEFT's layer has {strange[0]!r}, which is unknown here" if strange else None


def _why_not_adapter(module: nn.Module, name: str, weight: torch.Tensor, *, alone: bool) -> str | None:
    own, children = module.__dict__, module._modules
    variant = own.get("lora_variant", {}).get(name)  # before PEFT 0.16 there was DoRA alone
    if variant is not None or module.use_dora.get(name):
        return f"it is no plain LoRA but {'DoRA' if variant is None else type(variant).__name__}"
    for part in ("lora_A", "lora_B", "lora_dropout"):
        child = children[part]._modules[name]
        if type(child) not in ((nn.Dropout, nn.Identity) if part == "lora_dropout" else (nn.Linear,)):
            return f"{part} is a {type(child).__name__}"
        if _own.has_hooks(child) or "forward" in child.__dict__:
            return f"a hook or a forward of its own on {part}, which fusion would not call"
        reason = _own.replaced(type(child))
        if reason is not None:
            return reason
        if part == "lora_dropout":
            if not alone and type(child) is nn.Dropout and records.dropout(child):
                return "several adapters are active, and it drops something"
            continue
        if child._parameters.get("bias") is not None:
            return f"{part} has a bias"
        factor = child._parameters.get("weight")
        if type(factor) not in _own.PLAIN:
            return f"{part}'s weight is a {type(factor).__name__}, not a plain Parameter"
        # The fused products run in the layer's dtype, PEFT's in the adapter's. In fp16 the gradient of A would vanish
        # while B is small; bf16 has fp32's range.
        fits = factor.dtype == weight.dtype or (factor.dtype, weight.dtype) == (torch.float32, torch.bfloat16)
        if not fits or factor.device != weight.device:
            return (
                f"{part}'s weight is {factor.dtype} on {factor.device}, the layer's {weight.dtype} on {weight.device}"
            )
        if factor.dtype != weight.dtype and not module.cast_input_dtype_enabled:
            return f"{part}'s weight is {factor.dtype}, and PEFT is not to cast what it multiplies"
    return None
