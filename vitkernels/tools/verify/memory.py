"""Detect stray reads and writes: outputs in poisoned memory between guard bands, inputs surrounded by NaN."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from vitkernels import runtime
from vitkernels._intercept import Intercept
from vitkernels.ops._registry import OPS

BAND = 512  # bytes on each side; a multiple of every element size
PATTERN = 0x7F  # bytes that no kernel would write: 3.4e38 in fp32, NaN in fp16


class GuardedMemory(Intercept):
    """While active, poison every tensor that a launcher allocates and put it between guard bands.

    A dispatch mode does not see the allocations inside a registered op, so this mode calls the op's launcher itself.
    """

    def __init__(self):
        super().__init__(self._run)
        self._buffers: list[tuple[Tensor, int]] = []
        self.launched = False  # whether an op was called

    def _run(self, op, args, kwargs):
        if op.namespace == "vitkernels":
            self.launched = True
            kernels = OPS[op.overloadpacket.__name__].kernels
            with self:
                return kernels[runtime.device_type(next(a for a in args if isinstance(a, Tensor)))](*args)
        if op not in _ALLOCATORS:
            return NotImplemented
        out = op(*args, **kwargs)
        if not out.numel() or out.device.type == "meta":
            return out
        guarded = self._guard(out)
        return guarded.zero_() if op in _ZEROED else guarded

    def _guard(self, like: Tensor) -> Tensor:
        """Return a poisoned tensor with the shape, strides and dtype of ``like``, between two guard bands."""
        size = like.untyped_storage().nbytes()
        padded = -(-size // BAND) * BAND
        buffer = torch.full((BAND + padded + BAND,), PATTERN, dtype=torch.uint8, device=like.device)
        self._buffers.append((buffer, size))
        inside = (
            buffer[BAND : BAND + padded].view(like.dtype).as_strided(like.shape, like.stride(), BAND // like.itemsize)
        )
        if like.is_floating_point():
            inside.fill_(float("nan"))
        return inside

    @property
    def allocations(self) -> int:
        """The number of guarded tensors."""
        return len(self._buffers)

    def trampled(self) -> int:
        """Return how many bytes of the guard bands have changed."""
        return sum(
            int((band != PATTERN).sum())
            for buffer, size in self._buffers
            for band in (buffer[:BAND], buffer[BAND + size :])
        )


_ZEROED = {
    torch.ops.aten.zeros.default,
    torch.ops.aten.zeros_like.default,
    torch.ops.aten.new_zeros.default,
}
_ALLOCATORS = _ZEROED | {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty_strided.default,
}


def amid_nan(x: Tensor) -> Tensor:
    """Copy ``x`` with its strides into a larger storage of NaN (bool: True, integers: their maximum)."""
    around = 64
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    fill = float("nan") if x.is_floating_point() else True if x.dtype == torch.bool else torch.iinfo(x.dtype).max
    storage = torch.full((span + 2 * around,), fill, dtype=x.dtype, device=x.device)
    inside = storage.as_strided(x.shape, x.stride(), around)
    return inside.copy_(x.detach()).requires_grad_(x.requires_grad)


def outputs_and_gradients(function: Callable, tensors: dict[str, Tensor], upstream: Callable) -> dict[str, Tensor]:
    """Return every output and every gradient of ``function`` by name; without gradients, the outputs alone."""
    leaves = {name: t.detach().requires_grad_(t.requires_grad) for name, t in tensors.items()}
    outputs = function(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    upstreams = [upstream(o.detach()) for o in outputs]
    grads = torch.autograd.grad(outputs, list(wanted.values()), upstreams) if wanted else ()
    named = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    return named | {f"d{name}": g for name, g in zip(wanted, grads, strict=True)}


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> Iterator[str]:
    """Describe each tensor whose values differ: its name, how many elements, and the first; NaN equals NaN."""
    for name, x in a.items():
        y = b[name]
        unlike = (x != y) & ~(x.isnan() & y.isnan())
        if unlike.any():
            at = tuple(unlike.nonzero()[0].tolist())
            count = f"{int(unlike.sum())} of {x.numel()} elements"
            yield f"{name}: {count} differ, first at {at}: {x[at]:.6g} and {y[at]:.6g}"
