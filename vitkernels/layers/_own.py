"""Detect hooks and monkey-patched methods: a fused forward may replace only what the library itself defined.

``timm.layers.Mlp.forward = mine`` changes every Mlp, including those already swapped. So this module records the
methods of each class whose forward may be replaced, and compares them by identity at every call. It does not check
functions that a method calls, such as those of ``torch.nn.functional``.
"""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable, Iterable

from torch import nn
from torch._subclasses import FakeTensor

# torch.export replaces parameters with fake tensors.
PLAIN = (nn.Parameter, FakeTensor)

# Forwards that compute what those do in whose place they are bound: of the hub's layers (tools/hub).
alike: list[Callable] = []

_entries: dict[type[nn.Module], set[str]] = {}
_called: dict[type[nn.Module], set[str]] = {}
# The methods of a class by name; None for a method that is not the library's own.
_noted: dict[type[nn.Module], tuple[tuple[str, object], ...]] = {}


def has_hooks(module: nn.Module) -> bool:
    """Tell whether ``module`` has hooks, which run only when it is called."""
    state = module.__dict__
    return bool(
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
    )


def hides_forward(module: nn.Module) -> bool:
    """Tell whether a forward bound to ``module`` hides its class's, and computes something else.

    transformers 4.56 and 4.57 bind the class's own.
    """
    forward = module.__dict__.get("forward")
    if forward is None:
        return False
    known = getattr(forward, "__self__", None) is module and forward.__func__ in (type(module).forward, *alike)
    return not known


def note(
    cls: type[nn.Module],
    entries: Iterable[str] = ("__call__", "forward"),
    instead: Iterable[Callable] = (),
) -> None:
    """Record the methods ``entries`` of ``cls``, and the methods of ``cls`` that they call.

    Methods that the replacement functions ``instead`` also call are not recorded.
    """
    _entries.setdefault(cls, set()).update(entries)
    called = _called.setdefault(cls, set())
    called.update(name for function in instead for name in _names_in(function.__code__))
    names, noted = sorted(_entries[cls]), {}
    for name in names:  # grows during the loop
        if name in noted:
            continue
        method = inspect.getattr_static(cls, name)
        owner = next(base for base in cls.__mro__ if name in vars(base))
        if owner is nn.Module:
            noted[name] = getattr(cls, name)
            continue
        noted[name] = getattr(cls, name) if _is_own(owner, name, method) else None
        code = getattr(inspect.unwrap(_function(method)), "__code__", None)
        names += [n for n in _names_in(code) if n not in called and _is_method(cls, n)]
    _noted[cls] = tuple(noted.items())


def note_again() -> None:
    """Record again every class with a replaced method, since the method may have been restored."""
    for cls in _noted:
        if replaced(cls):
            note(cls, ())


def replaced(cls: type[nn.Module]) -> str | None:
    """Return an error text that names a recorded method of ``cls`` that is not the library's own, or None."""
    for name, own in _noted.get(cls, ()):
        method = getattr(cls, name)
        # Accept any method of torch.nn.Module itself: torch.fx temporarily replaces its __call__.
        if method is not own and method is not getattr(nn.Module, name, None):
            return f"{cls.__module__}.{cls.__name__}.{name} is not the library's own, and fusion would not call it"
    return None


def noted(cls: type[nn.Module]) -> tuple[tuple[str, object], ...]:
    """Return the recorded methods of ``cls`` by name; None for one that is not the library's own."""
    return _noted.get(cls, ())


def sees_all_calls() -> bool:
    """Tell whether someone, such as a profiler, has replaced ``__call__`` of torch.nn.Module."""
    return nn.Module.__call__ is not _CALL and not _is_of(nn.Module.__call__, "torch")


def _is_own(owner: type, name: str, method: object) -> bool:
    """Tell whether ``method`` was defined in the module and class that it belongs to.

    It may be wrapped by decorators of the same library, as in transformers, but not by a user's.
    """
    function, library = _function(method), owner.__module__.partition(".")[0]
    while hasattr(function, "__wrapped__"):
        # torch.compiler.disable, a wrapper of torch._dynamo on methods of timm's NaFlexVit, does not change results.
        if not _is_of(function, library) and function.__globals__.get("__name__") != "torch._dynamo.eval_frame":
            return False
        function = function.__wrapped__
    module = sys.modules.get(owner.__module__)
    if not isinstance(function, types.FunctionType) or function.__globals__ is not getattr(module, "__dict__", None):
        return False
    return function.__qualname__ == f"{owner.__qualname__}.{name}"


def _is_of(function: object, library: str) -> bool:
    home = function.__globals__.get("__name__", "") if isinstance(function, types.FunctionType) else ""
    return home.partition(".")[0] == library


def _function(method: object) -> object:
    if isinstance(method, property):
        return method.fget
    return method.__func__ if isinstance(method, staticmethod) else method


def _is_method(cls: type[nn.Module], name: str) -> bool:
    """Tell whether ``name`` is a method or a property of ``cls`` that torch.nn.Module does not have."""
    method = inspect.getattr_static(cls, name, None)
    return isinstance(method, (types.FunctionType, property, staticmethod)) and not hasattr(nn.Module, name)


def _names_in(code: types.CodeType | None) -> list[str]:
    if code is None:
        return []
    inner = [name for part in code.co_consts if isinstance(part, types.CodeType) for name in _names_in(part)]
    return [*code.co_names, *inner]


_CALL = nn.Module.__call__ if _is_of(nn.Module.__call__, "torch") else None
