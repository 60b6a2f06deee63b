"""Which parts of a transformer are left out, where their classes are not known: what ``strict=True`` raises for.

Told by the class's name, or by what the module itself holds; a module whose work lies in its children alone, such as a
block, is none, its children are looked at by themselves.
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

# The queries' weights, alone or packed, as a child or a parameter.
_QUERY = re.compile(
    r"(to_|w)?(q|qk|qkv|query|query_key_value|in_proj|c_attn)(_?(proj|lin|linear|weight))?$", re.IGNORECASE
)
# The two layers of an MLP whose activation is no module.
_PAIRS = (("fc1", "fc2"), ("linear1", "linear2"), ("w1", "w2"), ("up_proj", "down_proj"), ("c_fc", "c_proj"))


def part_of(module: nn.Module) -> str | None:
    """Return what part of a transformer ``module`` is: attention, a norm, an MLP, a patch embedding; else None."""
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
    """Tell whether ``module`` holds a weight that is multiplied with, outside of what is known."""
    if type(module) in _rules.RULES:
        return False
    weight = next((p for key, p in module.named_parameters(recurse=False) if key == "weight"), None)
    return (weight is not None and weight.ndim > 1) or any(map(_multiplies, module.children()))


def _is_mlp(module: nn.Module, works: dict[str, nn.Module]) -> bool:
    linears = {key for key, child in works.items() if isinstance(child, nn.Linear)}
    activated = any(_ACTIVATION.search(type(child).__name__) for child in module.children())
    return len(linears) > 1 and (activated or any(linears.issuperset(pair) for pair in _PAIRS))
