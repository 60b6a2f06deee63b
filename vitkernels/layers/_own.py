"""Whether a class's methods are its library's own: a fused forward stands for these, and for no other.

``timm.layers.Mlp.forward = mine`` changes every Mlp there is, those that are swapped already among them. So the methods
of each class that may be read instead of called are noted beforehand, and compared by identity at every call. Functions
that a method calls (``torch.nn.functional``'s, say) are not looked at.
"""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable, Iterable

from torch import nn

_entries: dict[type[nn.Module], set[str]] = {}
_called: dict[type[nn.Module], set[str]] = {}
# The methods of a class by name; None in the place of one that is not the library's own.
_noted: dict[type[nn.Module], tuple[tuple[str, object], ...]] = {}


def note(
    cls: type[nn.Module],
    entries: Iterable[str] = ("__call__", "forward"),
    instead: Iterable[Callable] = (),
) -> None:
    """Note the methods ``entries`` of ``cls``, and those of its methods that these call.

    Left out are those that the functions ``instead`` of them call as well.
    """
    _entries.setdefault(cls, set()).update(entries)
    called = _called.setdefault(cls, set())
    called.update(name for function in instead for name in _names_in(function.__code__))
    names, noted = sorted(_entries[cls]), {}
    for name in names:  # which grow
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
    """Note every class anew of which a method was replaced: it may have been set back."""
    for cls in _noted:
        if replaced(cls):
            note(cls, ())


def replaced(cls: type[nn.Module]) -> str | None:
    """Return which of the methods noted of ``cls`` is not its library's own, and what follows; None where all are."""
    for name, own in _noted.get(cls, ()):
        method = getattr(cls, name)
        # torch.nn.Module's own are whatever they are: torch.fx replaces its __call__ for a while.
        if method is not own and method is not getattr(nn.Module, name, None):
            return f"{cls.__module__}.{cls.__name__}.{name} is not the library's own, and fusion would not call it"
    return None


def sees_all_calls() -> bool:
    """Tell whether somebody's own function stands in for torch.nn.Module's ``__call__``: a profiler's, say."""
    return nn.Module.__call__ is not _CALL and not _is_of(nn.Module.__call__, "torch")


def _is_own(owner: type, name: str, method: object) -> bool:
    """Tell whether ``method`` is a function of the module and the class that it belongs to.

    Or such a function in others of the library around it, as transformers has them; a user's around it is not known.
    """
    function, library = _function(method), owner.__module__.partition(".")[0]
    while hasattr(function, "__wrapped__"):
        # torch._dynamo's is torch.compiler.disable, which timm has on methods of NaFlexVit: it computes the same.
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
    """Tell whether ``name`` is a method or a property of ``cls`` that torch.nn.Module has not."""
    method = inspect.getattr_static(cls, name, None)
    return isinstance(method, (types.FunctionType, property, staticmethod)) and not hasattr(nn.Module, name)


def _names_in(code: types.CodeType | None) -> list[str]:
    if code is None:
        return []
    inner = [name for part in code.co_consts if isinstance(part, types.CodeType) for name in _names_in(part)]
    return [*code.co_names, *inner]


_CALL = nn.Module.__call__ if _is_of(nn.Module.__call__, "torch") else None
