"""Calls like one that was checked before: with these a public op goes straight to its launcher.

An op's checks, autograd and PyTorch's dispatcher look at what tensors are, at the op's options and at the modes that
are on, but for one check of values, which is made each time. Where all is as it was in a call that passed and needed
no gradient, so is the outcome. One comparison in C++ tells, on which Dynamo's cache of compiled code stands, too: for
each tensor its Python type, its dispatch keys under this thread's modes, dtype, device, sizes, strides and whether it
requires a gradient. The dispatch keys tell a plain call on dense tensors from one on lazily negated, nested, sparse or
fake tensors, and from one under autocast, a torch.func transform, tracing or a ``__torch_dispatch__`` mode: all of
these go through the checks and the dispatcher. So does every call while ``torch.profiler`` runs, which is to show it.

A call's cost falls by half and more: ``python -m benchmarks.calls`` has both ways.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable
from typing import Any

import torch
import torch.autograd.profiler as profiler
from torch import Tensor
from torch.autograd import _profiler_enabled, forward_ad
from torch.compiler import is_compiling

from vitkernels import runtime
from vitkernels.ops._checks import PLAIN
from vitkernels.ops._registry import OPS

try:
    from torch._C import _is_torch_function_mode_enabled
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # there is no public one: without it every call is checked
    TensorGuards = None

MAX_KINDS = 1024  # of an op's calls; who has as many shapes has them once
MAX_CALLS = 8  # of one kind
_LASTING = (type(None), bool, int, float, str)  # whose values nobody changes in place
_all: list[KnownCalls] = []


def forget() -> None:
    """Know no call any more, of no op."""
    for calls in _all:
        calls.forget()


class Call:
    """A call that was checked.

    Attributes:
        is_like: Compares other tensors with its own, as they were.
        launchers: Of the registered ops, on the first tensor's device.
        launch: The first of them.
        plan: What the op noted.
    """

    __slots__ = ("is_like", "launch", "launchers", "plan")

    def __init__(self, is_like: Callable[..., bool], launchers: list[Callable], plan: Any):
        self.is_like, self.launchers, self.plan = is_like, launchers, plan
        self.launch = launchers[0]


class Kind:
    """Calls alike in the first tensor's shape, in options and in which tensors are given: those are picked."""

    __slots__ = ("calls", "given")

    def __init__(self, tensors: tuple[Tensor | None, ...]):
        indices = [i for i, t in enumerate(tensors) if t is not None]
        self.given = operator.itemgetter(*indices) if len(indices) > 1 else operator.itemgetter(slice(1))
        self.calls: list[Call] = []


class KnownCalls:
    """Those of one public op.

    Args:
        *ops: The registered ops that a call without gradients runs.
    """

    def __init__(self, *ops: torch._ops.OpOverload):
        self._ops = [OPS[op.name().removeprefix("vitkernels::")] for op in ops]
        self._kinds: dict[Hashable, Kind] = {}
        self._seen: set[int] = set()  # hashes, which keep nothing alive
        _all.append(self)

    def forget(self) -> None:
        """Know no call any more."""
        self._kinds.clear()
        self._seen.clear()

    def find(self, tensors: tuple[Tensor | None, ...], options: tuple) -> Call | None:
        """Return the known call that this one is like, or None: then it is to be checked.

        Args:
            tensors: All that the op was given, as it was given; first one that is never None.
            options: All else that its checks look at.
        """
        if is_compiling() or forward_ad._current_level >= 0 or profiler._is_profiler_enabled or _profiler_enabled():
            return None
        try:
            kind = self._kinds.get(_key(tensors, options))
            if kind is None or _is_torch_function_mode_enabled():
                return None
            given = kind.given(tensors)
            _refuse_without_strides(given)
        except (TypeError, AttributeError, RuntimeError):  # no tensor, not a plain one, or what has no hash
            return None
        for call in kind.calls:
            if call.is_like(*given):
                return call
        return None

    def add(self, tensors: tuple[Tensor | None, ...], options: tuple, plan: Any = None) -> None:
        """Note a call that went well, on the kernels and without gradients.

        Args:
            tensors, options: As for :meth:`find`.
            plan: What the op worked out, and would have to again.
        """
        if is_compiling():
            return
        try:
            key = _key(tensors, options)
            seen = hash(key)
        except TypeError:
            return
        if seen not in self._seen:  # its shape may not come again, and the rest takes as long as the checks
            if len(self._seen) >= MAX_KINDS:
                self.forget()
            self._seen.add(seen)
            return
        if TensorGuards is None or torch._C._is_any_autocast_enabled() or torch._C._get_tracing_state() is not None:
            return
        if not _lasting(options) or any(t is not None and type(t) not in PLAIN for t in tensors):
            return
        kind = self._kinds.setdefault(key, Kind(tensors))
        given = kind.given(tensors)
        if len(kind.calls) >= MAX_CALLS or len({*map(id, given)}) < len(given):  # never like one tensor twice
            return
        try:
            _refuse_without_strides(given)
            if any(call.is_like(*given) for call in kind.calls):  # but for a profiler or such
                return
            is_like = TensorGuards(*given, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
        except (TypeError, RuntimeError):  # one that cannot be compared, or another PyTorch's comparison
            return
        launchers = [op.kernels.get(runtime.device_type(given[0])) for op in self._ops]
        if None not in launchers and _plain(given) and is_like(*given):
            kind.calls.append(Call(is_like, launchers, plan))


def _key(tensors: tuple[Tensor | None, ...], options: tuple) -> tuple:
    types = (*map(type, tensors), *map(type, options))  # True is no 1.0, though equal
    return tensors[0].shape, options, types, torch.is_grad_enabled(), runtime.backend()


def _lasting(value: Any) -> bool:
    return type(value) in _LASTING or (type(value) is tuple and all(map(_lasting, value)))


def _plain(tensors: tuple[Tensor, ...]) -> bool:
    """Tell whether ``tensors`` and this thread have those dispatch keys alone that a plain call on dense ones has."""
    names, modes = torch._C._dispatch_keyset_to_string, torch._C._dispatch_tls_local_include_set()
    if not _split(names(modes)) <= {"BackendSelect", "ADInplaceOrView"}:
        return False
    backend = runtime.device_type(tensors[0]).upper()
    allowed = {backend, f"Autograd{backend}", f"Autocast{backend}", "ADInplaceOrView"}
    return all(_split(names(torch._C._dispatch_keys(t))) <= allowed for t in tensors)


def _split(keyset: str) -> set[str]:
    return set(keyset.removeprefix("DispatchKeySet(").removesuffix(")").split(", "))


def _refuse_without_strides(tensors: tuple[Tensor, ...]) -> None:
    """Raise a RuntimeError for a tensor, as a nested one, whose comparison would end the process by the same error."""
    (*map(Tensor.stride, tensors),)
