"""Recognise transformer parts of unknown classes: ``strict=True`` raises for those that are not swapped.

A part is recognised by its class's name or by the parameters and children that it holds. A module that only calls its
children, such as a block, is no part; its children are examined by themselves.
"""

from __future__ import annotations

import re

from torch import nn

from vitkernels.swap import _rules

_ATTENTION = re.compile(r"Att(entio)?n|MHSA")
_MLP = re.compile(r"(Mlp|MLP|FeedForward|FFN|SwiGLU)(Layer|Block|Fused)?$")
_NORM = re.compile(r"(Layer|RMS|Rms)_?Norm")
_PATCH_EMBED = re.compile(r"Patch(es)?_?Embed")
_ACTIVATION = re.compile(r"GELU|GEGLU|SiLU|ReLU|Swish|Mish|Tanh|Sigmoid|ELU|Activation", re.IGNORECASE)

# Names of a child or parameter that holds the weights of the queries, alone or packed with others.
_QUERY = re.compile(
    r"(to_|w)?(q|qk|qkv|query|query_key_value|in_proj|c_attn)(_?(proj|lin|linear|weight))?$", re.IGNORECASE
)
# Names of the two layers of an MLP whose activation is a function, not a module.
_PAIRS = (("fc1", "fc2"), ("linear1", "linear2"), ("w1", "w2"), ("up_proj", "down_proj"), ("c_fc", "c_proj"))


def part_of(module: nn.Module) -> str | None:
    """Return which part of a transformer ``module`` is (attention, norm, MLP or patch embedding), or None."""
    name = type(module).__name__
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) or _NORM.search(name):
        return "a norm"
    if isinstance(module, (nn.Conv2d, nn.Conv3d)):
        cuts = module.kernel_size == module.stride and max(module.stride) > 1 and module.groups == 1
        return "a patch embedding" if cuts else None
    works = {key: child for key, child in module.named_children() if _multiplies(child)}
    weights = [key for key, p in module.named_parameters(recurse=False) if p.ndim > 1]
    if any(_QUERY.fullmatch(key) for key in (*works, *weights)) or (works and _ATTENTION.search(name)):
        return "attention"
    if works and _PATCH_EMBED.search(name):
        return "a patch embedding"
    return "an MLP" if works and (_MLP.search(name) or _is_mlp(module, works)) else None


def _multiplies(module: nn.Module) -> bool:
    """Tell whether ``module`` or a child without a rule holds a matrix as its ``weight``."""
    if type(module) in _rules.RULES:
        return False
    weight = next((p for key, p in module.named_parameters(recurse=False) if key == "weight"), None)
    return (weight is not None and weight.ndim > 1) or any(map(_multiplies, module.children()))


def _is_mlp(module: nn.Module, works: dict[str, nn.Module]) -> bool:
    linears = {key for key, child in works.items() if isinstance(child, nn.Linear)}
    activated = any(_ACTIVATION.search(type(child).__name__) for child in module.children())
    return len(linears) > 1 and (activated or any(linears.issuperset(pair) for pair in _PAIRS))
