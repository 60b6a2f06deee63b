"""Argument checks of the public ops, made before any launch. Each error says what was given and what is expected."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor, strided

PLAIN = (Tensor, torch.nn.Parameter)
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensor(op: str, name: str, x: Tensor, *, dtypes: Sequence[torch.dtype] = FLOATING, hint: str = "") -> None:
    """Require a dense tensor of one of ``dtypes``.

    Raises:
        TypeError: ``x`` is not a tensor, is a DTensor, or has another dtype.
        NotImplementedError: ``x`` is nested, sparse or quantized.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} is a {type(x).__name__}; expected a torch.Tensor")
    if type(x).__name__ == "DTensor":
        raise TypeError(
            f"{op}: {name} is a DTensor; kernels work on local tensors: shard a model by vitkernels.parallelize, or "
            "call the op through torch.distributed.tensor.experimental.local_map"
        )
    if x.dtype not in dtypes:
        *most, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
        wanted = f"{', '.join(most)} or {last}" if most else last
        raise TypeError(f"{op}: {name} has dtype {x.dtype}; expected {wanted}{hint}")
    if x.layout is not strided or x.is_nested:  # quantized tensors have dtypes of their own
        kind = "nested" if x.is_nested else str(x.layout)
        raise NotImplementedError(f"{op}: {name} is {kind}; expected a dense (strided) tensor")


def check_integer(op: str, name: str, value: int) -> int:
    """Return ``value`` as an int; NumPy integers are accepted, bools are not.

    Raises:
        TypeError: ``value`` is not an integer.
    """
    if type(value) is int or isinstance(value, torch.SymInt):
        return value
    try:
        if not isinstance(value, bool) and getattr(value, "dtype", None) is not torch.bool:
            return operator.index(value)
    except TypeError:
        pass
    raise TypeError(f"{op}: {name} is a {type(value).__name__}; expected an integer")


def check_pair(op: str, name: str, value: int | tuple[int, int], least: int) -> tuple[int, int]:
    """Return two integers, of one number for both or a pair.

    Raises:
        TypeError: ``value`` is no integer or pair of them.
        ValueError: There are not two, or one is less than ``least``.
    """
    pair = tuple(value) if isinstance(value, tuple | list | torch.Size) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"{op}: {name} is {value!r}; expected an integer or a pair")
    pair = tuple(check_integer(op, name, n) for n in pair)
    if min(pair) < least:
        raise ValueError(f"{op}: {name} is {value!r}; expected {least} at least")
    return pair


def check_number(op: str, name: str, value: float, wanted: str = "a number") -> float:
    """Return ``value`` as a float; ints and NumPy numbers are accepted, bools are not.

    Raises:
        TypeError: ``value`` is not a real number.
    """
    if type(value) is not float and not isinstance(value, torch.SymFloat):  # the full check takes 0.4 µs
        if not isinstance(value, Real) or isinstance(value, bool):
            raise TypeError(f"{op}: {name} is a {type(value).__name__}; expected {wanted}")
        value = float(value)
    return value


def check_scale(op: str, scale: float | None, D: int) -> float:
    """Return the factor of attention scores; None means 1/√D.

    Raises:
        TypeError: ``scale`` is not a number.
        ValueError: It is not finite.
    """
    if scale is None:
        return D**-0.5
    scale = check_number(op, "scale", scale, "a number or None")
    if not -math.inf < scale < math.inf:  # torch.compile cannot trace math.isfinite on a SymFloat
        raise ValueError(f"{op}: scale is {scale}; expected a finite number")
    return scale


def dtypes_and_devices_match(x: Tensor, *others: Tensor | None) -> bool:
    """Tell whether all ``others`` (except None) are plain dense tensors of ``x``'s dtype on ``x``'s device.

    A call has up to a dozen tensors, so this tests the usual case with few attribute reads; ``x`` is checked already.
    False is not an error yet: some dtypes may differ, and a tensor may be of a subclass. :func:`check_like` decides.
    """
    dtype, device = x.dtype, x.device
    for t in others:
        if t is not None and not (
            type(t) in PLAIN and t.dtype is dtype and t.device == device and t.layout is strided and not t.is_nested
        ):
            return False
    return True


def check_like(op: str, name: str, x: Tensor, like_name: str, like: Tensor, *, dtype: bool = True) -> None:
    """Require ``x`` to be a dense tensor on the device (and, unless ``dtype=False``, of the dtype) of ``like``.

    Raises:
        ValueError: The devices differ.
        TypeError: The dtypes differ, or ``x`` is not a floating-point tensor.
        NotImplementedError: ``x`` is nested, sparse or quantized.
    """
    check_tensor(op, name, x)
    if x.device != like.device:
        raise ValueError(f"{op}: {name} is on {x.device}, {like_name} on {like.device}; expected one device")
    if dtype and x.dtype != like.dtype:
        raise TypeError(f"{op}: {name} has dtype {x.dtype}, {like_name} has {like.dtype}; expected the same dtype")


def check_shape(op: str, name: str, x: Tensor, expected: tuple[int, ...], why: str) -> None:
    """Require ``x.shape == expected``; ``why`` says in the error where the expectation comes from.

    Raises:
        ValueError: The shapes differ.
    """
    if x.shape != expected:
        raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}; expected {tuple(expected)}, {why}")


def check_drop_path_scale(op: str, name: str, scale: Tensor, x: Tensor) -> None:
    """Require DropPath's scales: one number without gradient for each sample of ``x`` (B, ..., C), on its device."""
    check_like(op, name, scale, "x", x, dtype=False)
    if x.ndim < 2:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}; {name} needs (batch, ..., channels)")
    check_shape(op, name, scale, x.shape[:1], "one scale a sample of x")
    if scale.requires_grad:
        raise NotImplementedError(f"{op}: {name} requires a gradient; it is a drawn constant: detach it")
