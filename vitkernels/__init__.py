"""Hand-written Triton kernels for Vision Transformers, forward and backward.

Names are imported when they are first used, so that ``import vitkernels`` costs nothing
beyond PyTorch, imports no Triton and touches no device.
"""

from __future__ import annotations

import importlib

__version__ = "0.2.0"

_HOME = {
    "Report": "swap",
    "accelerate": "swap",
    "attention_maps": "maps",
    "checkpoint_context": "_checkpointing",
    "checkpoint_policy": "_checkpointing",
    "compare_precision": "swap.accuracy",
    "compile_inference": "_inference",
    "explain": "swap",
    "full_state_dict": "swap.parallelize",
    "parallelize": "swap.parallelize",
    "restore": "swap",
    "backend": "runtime",
    "use_backend": "runtime",
    "warmup": "_warmup",  # a module of this name would hide the function
}
_SUBMODULES = ("layers", "models", "ops", "reference", "runtime", "swap", "testing", "tuning")

_OPTIONAL = ("hf", "lightning")  # need packages of these names, so a star import leaves them out

__all__ = [*_HOME, *_SUBMODULES, "__version__"]


def __getattr__(name: str):
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    if name in (*_SUBMODULES, *_OPTIONAL):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
