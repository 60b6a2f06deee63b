"""Intercept PyTorch's ops: replace them, watch them, and tell what each reads and writes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
# Ops that do not read their inputs: they overwrite them or use only their shape.
FILLS = {
    "zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "new_zeros", "new_ones",
    "new_full", "zero_", "fill_", "bernoulli_", "uniform_", "normal_",
}  # fmt: skip


class Intercept(TorchDispatchMode):
    """Intercepts every op that runs in its block, below autograd.

    Ops that ``replace`` and ``saw`` call themselves are not intercepted, unless they enter the mode again.

    Args:
        replace: Called with (op, args, kwargs); returns the op's result, or NotImplemented to let the op run.
        saw: Called with (op, args, kwargs, result) after each op that ran.
        in_parts: Whether to run an op as the ops that it is composed of, if it is. Above autograd PyTorch does so; in
            inference mode and inside of other ops such an op arrives whole.
    """

    def __init__(self, replace=lambda *_: NotImplemented, saw=lambda *_: None, in_parts=lambda op: False):
        super().__init__()
        self._replace, self._saw, self._in_parts = replace, saw, in_parts

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = self._replace(func, args, kwargs)
        if result is NotImplemented and self._in_parts(func):
            with self:
                result = func.decompose(*args, **kwargs)
        if result is NotImplemented:
            result = func(*args, **kwargs)
            self._saw(func, args, kwargs, result)
        return result


@dataclasses.dataclass
class Access:
    """One tensor that an op reads or writes, in elements of ``itemsize`` bytes.

    Traffic sets ``least``, the elements that no fusion would save.
    """

    storage: torch.UntypedStorage
    elements: int
    written: bool
    least: int = 0
    itemsize: int = 2


def op_accesses(op, args: tuple, kwargs: dict[str, object], result: object) -> list[Access]:
    """Return what a call of ``op`` reads and writes; nothing for an allocation, a view or a no-op."""
    name = op.overloadpacket.__name__
    if name in ALLOCATIONS:
        return []
    given = dict(zip((a.name for a in op._schema.arguments), args, strict=False)) | kwargs
    read, written = [], []
    for argument in op._schema.arguments:
        operands = tensors(given.get(argument.name))
        mutated = argument.alias_info is not None and argument.alias_info.is_write
        if mutated:
            written += operands
        overwritten = name in FILLS or (mutated and (argument.kwarg_only or name == "copy_"))
        if not overwritten:
            read += operands
    inputs = {t.untyped_storage()._cdata for t in tensors((args, kwargs))}
    written += [t for t in tensors(result) if t.untyped_storage()._cdata not in inputs]
    return accesses(read, written) if written else []


def accesses(read: Sequence[Tensor], written: Sequence[Tensor]) -> list[Access]:
    """Return one access per storage read or written: the elements of its distinct views, at most what it holds."""
    views: dict[tuple, dict] = {}
    for t, writes in (*((t, False) for t in read), *((t, True) for t in written)):
        views.setdefault((writes, t.untyped_storage()._cdata), {})[t.storage_offset(), t.shape, t.stride()] = t
    found = []
    for (writes, _), distinct in views.items():
        some = next(iter(distinct.values()))
        # A dim of stride 0 repeats one element.
        elements = sum(math.prod(n for n, s in zip(*v[1:], strict=True) if s or not n) for v in distinct)
        held = some.untyped_storage().nbytes() // some.element_size()
        found.append(Access(some.untyped_storage(), min(elements, held), writes, itemsize=some.element_size()))
    return found


def tensors(tree: object) -> list[Tensor]:
    """Return the tensors in ``tree``, such as an op's arguments or results."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
