"""Host-side tensor descriptors, encoded as the 128-byte tensor maps that the engine reads."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

import torch

# Element types of a tensor map (PTX ISA, "tensormap.replace").
ELEMENTS = {
    torch.uint8: 0, torch.int8: 0, torch.bool: 0, torch.int16: 1, torch.int32: 3, torch.int64: 5,
    torch.float16: 6, torch.float32: 7, torch.float64: 9, torch.bfloat16: 10,
    torch.float8_e4m3fn: 0, torch.float8_e5m2: 0,
}  # fmt: skip
TF32 = 11
# struct TensorMap of engine/bulk.h: address, strides, dims, box, element strides, rank - 1, element, interleave,
# swizzle, fill
LAYOUT = "<Q4Q5I5I5I5I8x"
SIZE = struct.calcsize(LAYOUT)


def is_descriptor(value) -> bool:
    """Return whether a launch's argument is a ``TensorDescriptor`` of Triton or Gluon."""
    return all(hasattr(value, name) for name in ("base", "shape", "strides", "block_shape"))


def _tiling(descriptor, meta: dict | None) -> tuple[list[int], int]:
    """Return the box and the swizzle (0: none, 1 to 3: 32 to 128 bytes): the compiler's, or what it would choose."""
    if meta:
        return list(meta["block_size"]), meta["swizzle"]
    size = descriptor.base.element_size()
    layout = getattr(descriptor, "layout", None)
    width = layout.swizzle_byte_width if layout is not None else min(descriptor.block_shape[-1] * size, 128)
    box = list(descriptor.block_shape)
    if width >= 32:
        box[-1] = min(box[-1], width // size)
    return [min(b, 256) for b in box], {128: 3, 64: 2, 32: 1}.get(width, 0)


def tensor_map(descriptor, address: int, meta: dict | None = None) -> bytes:
    """Encode a descriptor.

    Args:
        descriptor: Triton's or Gluon's.
        address: Address of ``descriptor.base`` in the kernel.
        meta: The descriptor's entry of ``kernel.metadata.tensordesc_meta``.
    """
    base = descriptor.base
    size, rank = base.element_size(), len(descriptor.shape)
    box, swizzle = _tiling(descriptor, meta)

    def innermost_first(values: Sequence[int], filler: int) -> list[int]:
        values = [int(v) for v in reversed(values)]
        return values + [filler] * (5 - len(values))

    strides = [s * size for s in innermost_first(descriptor.strides, 0)[1:]]
    element = TF32 if getattr(descriptor, "round_f32_to_tf32", False) else ELEMENTS[base.dtype]
    fill = int(descriptor.padding == "nan")
    return struct.pack(
        LAYOUT, address, *strides, *innermost_first(descriptor.shape, 0), *innermost_first(box, 0), *[1] * 5,
        rank - 1, element, 0, swizzle, fill,
    )  # fmt: skip


def expanded(arguments: Sequence, meta: Sequence[dict] | None, tma: bool, address: Callable) -> list:
    """Return the arguments that the compiled kernel takes: each descriptor is followed by its shape and strides.

    Args:
        arguments: The launch's.
        meta: ``kernel.metadata.tensordesc_meta``, one entry per descriptor.
        tma: Whether the kernel takes tensor maps (Hopper and later) or pointers.
        address: Returns a tensor's address in the kernel.
    """
    out, number = [], 0
    for value in arguments:
        if not is_descriptor(value):
            out.append(value)
            continue
        sizes = [*map(int, value.shape), *map(int, value.strides)]
        if tma:
            out.append(tensor_map(value, address(value.base), meta[number] if meta else None))
            out += sizes
        else:
            rounds = bool(getattr(value, "round_f32_to_tf32", False))
            out += [value.base, *sizes, value.padding == "nan", rounds, *sizes]
        number += 1
    return out
