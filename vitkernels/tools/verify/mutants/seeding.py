"""Seed a defect into the code of this process, and remove it again.

A mutant is one edit of one function's source. A kernel is replaced by one from the edited source, a plain function
gets the code of the edited function, and both are restored afterwards.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import inspect
import linecache
import sys
import textwrap
from collections.abc import Iterable, Iterator
from types import FunctionType, ModuleType

from vitkernels.ops import _plan
from vitkernels.testing.cases import Case


class MutantError(Exception):
    """Raised if a mutant cannot be made, because the source has changed."""


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One defect in the source.

    Attributes:
        name: What is wrong, for a person; unique.
        where: Module and function, as ``ops.layer_norm.forward:_layer_norm_fwd_kernel`` or ``ops.block:A.method``.
        old, new: The edit; ``old`` occurs once in the function.
        op: The public op whose problems show the defect.
        variant: The variant of the problems that show it, or None for any.
        case: The sizes that show it, or None for any.
        by: The group of checks that shows it.
        dtype: The dtype of the inputs.
    """

    name: str
    where: str
    old: str
    new: str
    op: str
    variant: str | None = None
    case: Case | None = None
    by: str = "accuracy"
    dtype: str = "fp32"


@contextlib.contextmanager
def seeded_defect(mutant: Mutant) -> Iterator[None]:
    """Seed ``mutant``'s defect for a ``with`` block.

    Raises:
        MutantError: The function or the text to edit does not exist.
    """
    module_name, _, path = mutant.where.partition(":")
    module = importlib.import_module(f"vitkernels.{module_name}")
    try:
        target = functools.reduce(getattr, path.split("."), module)
    except AttributeError:
        raise MutantError(f"{mutant.name}: {mutant.where} does not exist") from None
    edited = _edited_function if isinstance(target, FunctionType) else _edited_kernel
    with edited(module, target, mutant):
        _plan.forget()  # otherwise cached plans would still launch the unedited kernel
        try:
            yield
        finally:
            _plan.forget()


@contextlib.contextmanager
def _edited_function(module: ModuleType, function: FunctionType, mutant: Mutant) -> Iterator[None]:
    function = inspect.unwrap(function)
    edited = _execute(module, function, _edit(function, mutant), mutant.name)
    # torch's registry holds this function object, so only its code is replaced.
    before = function.__code__
    function.__code__ = edited.__code__
    try:
        yield
    finally:
        function.__code__ = before


@contextlib.contextmanager
def _edited_kernel(module: ModuleType, kernel, mutant: Mutant) -> Iterator[None]:
    new = {id(kernel): _execute(module, kernel.fn, _edit(kernel.fn, mutant), mutant.name)}
    places = list(places_of_kernels())
    # Triton reuses a compiled kernel even if a function that it calls has changed, so callers are defined again too.
    for other in _callers(kernel, [value for _, _, value in places]):
        home = sys.modules[other.fn.__module__]
        new[id(other)] = _execute(home, other.fn, inspect.getsource(other.fn), mutant.name)
    try:
        for owner, name, value in places:
            if id(value) in new:
                setattr(owner, name, new[id(value)])
        yield
    finally:
        for owner, name, value in places:
            setattr(owner, name, value)


def places_of_kernels() -> Iterator[tuple[ModuleType, str, object]]:
    """Yield the module, name and kernel of each global in ``vitkernels.ops`` that holds a kernel."""
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("vitkernels.ops"):
            for name, value in list(vars(module).items()):
                if _is_kernel(value):
                    yield module, name, value


def _callers(kernel, kernels: Iterable) -> list:
    """Return those of ``kernels`` that call ``kernel``, directly or indirectly."""
    found = {id(kernel): kernel}
    callees = {id(k): (k, {id(c) for c in _callees(k.fn)}) for k in kernels}
    while more := {i: k for i, (k, called) in callees.items() if i not in found and not called.isdisjoint(found)}:
        found |= more
    return [k for i, k in found.items() if i != id(kernel)]


def _callees(function: FunctionType) -> Iterator[object]:
    """Yield the kernels that ``function`` names directly or as attributes of a module."""
    names = function.__code__.co_names
    named = [function.__globals__[name] for name in names if name in function.__globals__]
    for value in named:
        if isinstance(value, ModuleType):
            yield from (v for name in names if _is_kernel(v := getattr(value, name, None)))
        elif _is_kernel(value):
            yield value


def _is_kernel(value: object) -> bool:
    return hasattr(value, "fn") and hasattr(value, "arg_names")


def _edit(function: FunctionType, mutant: Mutant) -> str:
    source = inspect.getsource(function)
    if source.count(mutant.old) != 1:
        raise MutantError(f"{mutant.name}: {mutant.old!r} occurs {source.count(mutant.old)} times in {mutant.where}")
    return source.replace(mutant.old, mutant.new)


def _execute(module: ModuleType, function: FunctionType, source: str, label: str):
    """Define ``function`` from ``source``, with its decorators, in its module's namespace."""
    source = textwrap.dedent(source)  # a method's source is indented
    file = f"<{label}: {module.__name__}.{function.__name__}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)  # Triton reads it
    names: dict[str, object] = {}
    exec(compile(source, file, "exec", flags=_flags(module)), vars(module), names)
    made = names[function.__name__]
    made = made.__func__ if isinstance(made, staticmethod) else made
    return inspect.unwrap(made) if isinstance(made, FunctionType) else made


def _flags(module: ModuleType) -> int:
    annotations = getattr(module, "annotations", None)
    return annotations.compiler_flag if annotations is not None else 0
