"""Compile a model's kernels before its first request."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral

import torch
from torch import Tensor, nn

from vitkernels.ops import uses_kernels
from vitkernels.ops._triton import compilations

Shape = Sequence[int]

_ONE_AT_A_TIME = threading.RLock()  # Triton has a single compilation listener


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A kernel that was compiled or loaded: name, duration, and whether it came from Triton's cache on disk."""

    name: str
    seconds: float
    from_disk: bool


@dataclasses.dataclass(frozen=True)
class WarmupReport:
    """Result of :func:`warmup`.

    Attributes:
        kernels: Kernels that the call compiled or read from disk, including those of torch.compile; kernels that this
            process had loaded before are not included.
        seconds: Duration of the whole call.
    """

    kernels: tuple[Compiled, ...]
    seconds: float

    def __str__(self) -> str:
        lines = [f"{len(self.kernels)} kernels made ready in {self.seconds:.1f} s"]
        lines += [f"  {k.name}: {k.seconds:.2f} s{', from disk' if k.from_disk else ''}" for k in self.kernels]
        return "\n".join(lines)


def warmup(
    model: nn.Module,
    input_shape: Shape | Sequence[Shape | Tensor] | Mapping[str, Shape | Tensor],
    dtype: torch.dtype | None = None,
    *,
    training: bool = False,
    autocast: torch.dtype | None = None,
) -> WarmupReport:
    """Compile every kernel that ``model`` runs on inputs of this shape: run it once on zeros, on its own device.

    Parameters, gradients, buffers, train and eval modes and the states of PyTorch's random generators are restored.
    Other state of the model or its hooks, such as Python attributes, is not: call this before setting hooks that
    record, and before wrapping in FSDP, whose own handling of gradients it would start.

    Triton specializes a kernel on dtypes, and on sizes and strides that are 1 or divisible by 16. So call this once
    for each image size and each kind of batch size (1, a multiple of 16, any other) that will occur. Where no kernel
    runs (on a CPU, on meta, with ``VITKERNELS_BACKEND=torch``) there is nothing to compile, and the model is not run.

    Args:
        model: Any module, accelerated or made of :mod:`vitkernels.layers`; DistributedDataParallel is unwrapped.
        input_shape: Shape of the input, as ``(1, 3, 224, 224)``; for several inputs, a sequence or a mapping by
            argument name. A tensor in place of a shape is passed unchanged, for inputs that cannot be zeros.
        dtype: Dtype of the inputs; None for that of the model's first floating-point parameter or buffer.
        training: Compile a training step, forward and backward in train mode; else eval mode without gradients.
        autocast: Run under autocast in this dtype.

    Returns:
        The compiled kernels; empty if all were loaded before.

    Raises:
        TypeError: ``model`` is not a module, or ``dtype`` or ``autocast`` is not a dtype.
        ValueError: ``input_shape`` contains anything but positive integers.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"warmup: model is a {type(model).__name__}; expected a torch.nn.Module")
    for name, given in (("dtype", dtype), ("autocast", autocast)):
        if given is not None and not isinstance(given, torch.dtype):
            raise TypeError(f"warmup: {name} is {given!r}; expected a torch.dtype")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module  # the wrapper's forward would wait for the other ranks
    start = time.perf_counter()
    tensors = list(itertools.chain(model.parameters(), model.buffers()))
    device = tensors[0].device if tensors else torch.device("cpu")
    if dtype is None:
        dtype = next((t.dtype for t in tensors if t.is_floating_point()), torch.get_default_dtype())
    arguments, keywords = _inputs(input_shape, dtype, device)
    if device.type == "meta" or not uses_kernels(torch.empty(0, device=device)):
        return WarmupReport((), time.perf_counter() - start)

    context = torch.autocast(device.type, dtype=autocast) if autocast else contextlib.nullcontext()
    with _ONE_AT_A_TIME, _left_as_it_is(model, tensors), compilations() as found:
        model.train(training)
        with torch.set_grad_enabled(training):
            with context:
                outputs = model(*arguments, **keywords)
            if training:
                _differentiate(outputs, model)
        getattr(torch, device.type).synchronize(device)
    return WarmupReport(tuple(itertools.starmap(Compiled, found)), time.perf_counter() - start)


def _inputs(shapes, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], dict[str, Tensor]]:
    def make(shape) -> Tensor:
        if isinstance(shape, Tensor):
            return shape.to(device)
        sizes = tuple(shape) if isinstance(shape, Sequence) else ()
        if not sizes or not all(isinstance(n, Integral) and n > 0 for n in sizes):
            raise ValueError(f"warmup: an input's shape is {shape!r}; expected positive integers, as (1, 3, 224, 224)")
        return torch.zeros(sizes, dtype=dtype, device=device)

    if isinstance(shapes, Mapping):
        return [], {name: make(shape) for name, shape in shapes.items()}
    several = isinstance(shapes, Sequence) and shapes and all(isinstance(s, (Sequence, Tensor)) for s in shapes)
    return [make(shape) for shape in (shapes if several else (shapes,))], {}


@contextlib.contextmanager
def _left_as_it_is(model: nn.Module, tensors: Sequence[Tensor]) -> Iterator[None]:
    """Restore what a forward may change: modes, buffers, and random generators (CPU and devices of ``tensors``)."""
    modules = list(model.modules())
    modes = [m.training for m in modules]
    buffers = [(m, name, b, b.clone()) for m in modules for name, b in m.named_buffers(recurse=False)]
    kinds = {t.device for t in tensors if t.device.type != "cpu"}
    kind = next((d.type for d in kinds), "cuda")
    with torch.random.fork_rng(devices=[d.index for d in kinds], device_type=kind):
        try:
            yield
        finally:
            for module, mode in zip(modules, modes, strict=True):
                module.training = mode
            for module, name, buffer, before in buffers:
                setattr(module, name, buffer)
                if not torch.equal(buffer, before):
                    buffer.copy_(before)


def _differentiate(outputs, model: nn.Module) -> None:
    """Run the backward for every parameter, without changing any ``grad``."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    outputs = [t for t in _tensors(outputs) if t.requires_grad]
    if wanted and outputs:
        torch.autograd.grad(outputs, wanted, [torch.ones_like(t) for t in outputs], allow_unused=True)


def _tensors(outputs) -> Iterator[Tensor]:
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, (Mapping, list, tuple)):
        for part in outputs.values() if isinstance(outputs, Mapping) else outputs:
            yield from _tensors(part)
