"""What the constructors and methods of the models here share: checks of timm's arguments."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral

from torch import nn

from vitkernels.layers import LayerNorm


def refuse(cls: type[nn.Module], others: Mapping[str, object], unsupported: Mapping[str, object]) -> None:
    """Raise an error for arguments of timm that ``cls`` lacks, unless they have the value that has no effect."""
    for argument, value in others.items():
        if argument not in unsupported:
            raise TypeError(f"{cls.__name__} has no argument {argument!r}")
        if value != unsupported[argument]:
            raise NotImplementedError(f"{argument}={value!r} is not supported; expected {unsupported[argument]!r}")


def check_weight_init(weight_init: str) -> None:
    if weight_init not in ("", "skip"):
        raise NotImplementedError(f"weight_init is {weight_init!r}; expected '' (timm's default) or 'skip'")


def norm_factory(norm_layer: Callable[..., nn.Module] | str | None) -> Callable[..., LayerNorm]:
    """Return a factory of the LayerNorms that ``norm_layer`` would make, but of this package's class."""
    if norm_layer is None or norm_layer == "layernorm":
        return LayerNorm
    made = norm_layer(1, device="meta") if callable(norm_layer) else norm_layer
    if not isinstance(made, nn.LayerNorm) or type(made).__name__ != "LayerNorm":
        raise NotImplementedError(f"norm_layer is {norm_layer!r}; expected nn.LayerNorm or one with another eps")
    return functools.partial(
        LayerNorm, eps=made.eps, affine=made.weight is not None, bias=made.weight is None or made.bias is not None
    )


def taken_indices(what: str, count: int, indices: int | Sequence[int] | None) -> set[int]:
    """Return which of ``count`` blocks or stages ``indices`` means: the last n, a list, or None for all.

    Raises:
        ValueError: There is none of an index.
    """
    if indices is None:
        indices = count
    if isinstance(indices, Integral):
        if not 0 < indices <= count:
            raise ValueError(f"the last {indices} {what}s are asked for; expected 1 to {count}")
        return set(range(count - indices, count))
    for i in indices:
        if not -count <= i < count:
            raise ValueError(f"{what} {i} is asked for; expected {-count} to {count - 1}")
    return {i % count for i in indices}
