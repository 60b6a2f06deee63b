"""Inference by CUDA graphs: a model captured once per shape of its images, and replayed by one launch.

At small batches the host, which launches some hundred kernels a forward, takes longer than the GPU. A graph repeats the
same kernels on the same memory, so the images are copied into a buffer that it reads, and the results out of those that
it writes. What no graph repeats, the Python code of the forward, is checked for changes before each replay.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import operator
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vitkernels import runtime
from vitkernels.layers import PatchEmbed, fp8
from vitkernels.ops._checks import check_integer

WARM_UPS = 3  # forwards before a capture: the first compiles kernels, the third runs on plans (ops/_plan.py)
# Ops whose result's shape or value the host must read from the GPU.
_WAITS = (
    "aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::masked_select", "aten::_unique",
    "aten::unique_", "aten::equal", "aten::is_nonzero",
)  # fmt: skip


def compile_inference(
    model: nn.Module,
    *,
    batch_sizes: Sequence[int] | None = None,
    max_graphs: int = 8,
    normalize: tuple[Sequence[float], Sequence[float]] | None = None,
    clone_outputs: bool = True,
    check_model: bool = True,
) -> GraphedModel:
    """Return ``model`` as a function of images that replays CUDA graphs, one for each shape and dtype of images.

    The first call with a shape runs the model a few times and captures it; each later call copies the images into the
    graph's buffer, launches the graph and copies the results. The results have no gradients and are those of the model
    itself, bit for bit. Autocast and :func:`vitkernels.use_backend` around a call count as around a call of the model,
    each choice with graphs of its own; autocast then casts the weights in each replay, so better convert the model.

    Args:
        model: In eval mode, on one CUDA device; accelerated or not. It takes images (batch, …), and returns a tensor,
            or tuples, lists and mappings of tensors.
        batch_sizes: Sizes of batches to capture; a batch runs in the smallest that holds it, padded with zeros, and
            the results are cut to its size. No image may change another's result, as in any ViT. None: no padding.
        max_graphs: Most graphs to keep, at least 1. One more drops the one whose last use is the longest ago, after
            waiting for the device. All graphs share one pool of memory, beside their buffers of images and results.
        normalize: ``(mean, std)``, one number per channel, for images of 0..255 in uint8 or 0..1 in floating point,
            which the graph normalizes and casts to the model's dtype. Not for a model that normalizes them itself.
        clone_outputs: Return copies. Otherwise the graph's own tensors, which the next call, of any shape, overwrites.
        check_model: Before each replay, look for parameters, buffers, submodules or hooks that were replaced, added or
            moved since the capture, for weights in FP8 that were written in place, and for PEFT's adapters that were
            switched, merged or scaled, and capture anew. Other values written in place count without a new capture,
            whatever this is. Without the look, call :meth:`GraphedModel.reset` after such a change.

    Returns:
        A callable of one tensor, on the model's device or on the CPU. Threads may share it: their calls run one after
        another.

    Raises:
        TypeError, ValueError: An argument does not fit, or both ``normalize`` and the model's own are given.

    The first call raises a RuntimeError if the model cannot be captured: it is in training mode or not on one CUDA
    device, or its forward waits for the GPU (``.item()``, a shape that depends on data, a copy from or to the CPU).
    Without CUDA there are no graphs: on a CPU the model is called anew each time on the backends ``emulated`` and
    ``torch``, for tests of what is around it, and on others a call raises a RuntimeError.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"compile_inference: model is a {type(model).__name__}; expected a torch.nn.Module")
    if batch_sizes is not None:
        batch_sizes = tuple(sorted({check_integer("compile_inference", "batch_sizes", n) for n in batch_sizes}))
        if not batch_sizes or batch_sizes[0] < 1:
            raise ValueError(f"compile_inference: batch_sizes is {batch_sizes}; expected positive sizes, or None")
    max_graphs = check_integer("compile_inference", "max_graphs", max_graphs)
    if max_graphs < 1:
        raise ValueError(f"compile_inference: max_graphs is {max_graphs}; expected 1 at least")
    if normalize is not None and (len(normalize) != 2 or len(normalize[0]) != len(normalize[1])):
        raise ValueError("compile_inference: normalize is not (mean, std) with one number each per channel")
    if normalize is not None and not all(
        math.isfinite(m) and 0 < s < math.inf for m, s in zip(*normalize, strict=True)
    ):
        raise ValueError(f"compile_inference: normalize is {normalize}; expected finite numbers, std positive")
    for name, module in model.named_modules() if normalize is not None else ():
        if isinstance(module, PatchEmbed) and module.normalize is not None:
            raise ValueError(
                f"compile_inference: normalize is given, and {f'{name!r} of ' if name else ''}{type(model).__name__} "
                "normalizes its images itself; expected one of the two"
            )
    return GraphedModel(model, batch_sizes, max_graphs, normalize, bool(clone_outputs), bool(check_model))


class GraphedModel:
    """What :func:`compile_inference` returns.

    Attributes:
        model: The model itself.
        captures: How many graphs were captured so far.
    """

    def __init__(self, model, batch_sizes, max_graphs, normalize, clone_outputs, check_model):
        self.model = model
        self.captures = 0
        self._batch_sizes, self._max_graphs, self._normalize = batch_sizes, max_graphs, normalize
        self._clone_outputs, self._check_model = clone_outputs, check_model
        self._lock = threading.RLock()
        self._graphs: collections.OrderedDict[tuple, _Graph] = collections.OrderedDict()
        self._snapshot: _Snapshot | None = None
        self._mechanism: CudaGraphs | Calls | None = None

    def __call__(self, images: Tensor) -> Any:
        """Return the model's results for ``images``, (batch, …), of any dtype that the model takes.

        Raises:
            TypeError: ``images`` is not a tensor.
            ValueError: It is on another device, has no batch, or is larger than every one of ``batch_sizes``.
            RuntimeError: It requires a gradient, the model cannot be captured, or the call is within a transform of
                torch.func or traced by torch.export or by torch.compile; without ``fullgraph``, torch.compile makes the
                call between two graphs of its own.
        """
        _check_nothing_traces()
        size = self._check_images(images)
        # Buffers made in inference mode could not be written outside of it.
        with self._lock, torch.inference_mode(False), torch.no_grad():
            graph = self._graph_for(images, size)
            count = images.shape[0]
            self._mechanism.enter()
            graph.images[:count].copy_(images)
            if count < size:
                graph.images[count:].zero_()
            graph.replay()
            results = graph.results if count == size else _map(lambda t: t[:count], graph.results)
            return _map(Tensor.clone, results) if self._clone_outputs else results

    def capture(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        """Capture the graph for images of this shape and dtype ahead of their first call.

        Raises:
            As a call.
        """
        device = _device_of(self.model)
        self(torch.zeros(tuple(shape), dtype=dtype, device=device))

    def reset(self) -> None:
        """Drop every graph; each shape is captured anew at its next call."""
        with self._lock:
            if self._mechanism is not None:
                self._mechanism.finish()
            self._graphs.clear()
            self._snapshot = self._mechanism = None

    @property
    def captured(self) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
        """Shapes and dtypes of images that have a graph, the next one to be dropped first."""
        with self._lock:
            return tuple((tuple(graph.images.shape), graph.images.dtype) for graph in self._graphs.values())

    def _check_images(self, images: Tensor) -> int:
        """Return the size of the batch that the graph for ``images`` computes."""
        if not isinstance(images, Tensor):
            raise TypeError(f"compile_inference: images are a {type(images).__name__}; expected a torch.Tensor")
        if images.ndim == 0 or images.shape[0] == 0:
            raise ValueError(f"compile_inference: images have shape {tuple(images.shape)}; expected one image at least")
        if images.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "compile_inference: images require a gradient, and a graph of inference has none; "
                "expected torch.no_grad(), images.detach(), or the model itself"
            )
        if self._batch_sizes is None:
            return images.shape[0]
        for size in self._batch_sizes:
            if size >= images.shape[0]:
                return size
        raise ValueError(
            f"compile_inference: {images.shape[0]} images; expected {self._batch_sizes[-1]} at most, the largest of "
            "batch_sizes"
        )

    def _graph_for(self, images: Tensor, size: int) -> _Graph:
        if self._snapshot is not None and self._check_model and self._snapshot.is_outdated():
            self.reset()
        device = _device_of(self.model) if self._mechanism is None else self._mechanism.device
        if images.device != device and not images.is_cpu:
            raise ValueError(
                f"compile_inference: images are on {images.device}; expected {device}, as the model, or the CPU"
            )
        shape = (size, *images.shape[1:])
        autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        key = (shape, images.dtype, autocast, runtime.backend())
        graph = self._graphs.get(key)
        if graph is not None:
            self._graphs.move_to_end(key)
            return graph
        if self._mechanism is None:
            self._mechanism = _mechanism(device)
        while len(self._graphs) >= self._max_graphs:
            self._mechanism.finish()  # it may still run
            self._graphs.popitem(last=False)
        graph = self._capture(torch.zeros(shape, dtype=images.dtype, device=device), autocast)
        self._graphs[key] = graph
        return graph

    def _capture(self, images: Tensor, autocast: torch.dtype | None) -> _Graph:
        name = type(self.model).__name__
        training = next((n for n, m in self.model.named_modules() if m.training), None)
        if training is not None:
            raise RuntimeError(
                f"compile_inference: {f'{training!r} of ' if training else ''}{name} is in training mode; "
                "expected model.eval()"
            )
        normalize = _Normalize(self._normalize, self.model, images) if self._normalize is not None else None

        def forward():
            # Autocast's cache of cast weights would be freed when the caller leaves autocast, and the graph reads on.
            with torch.autocast(images.device.type, dtype=autocast, enabled=autocast is not None, cache_enabled=False):
                return self.model(images if normalize is None else normalize(images))

        with _Waits() as waits:
            results = forward()
        if waits.found is not None:
            raise RuntimeError(_cannot(name, f"it calls {waits.found}"))
        _check_results(results, images.shape[0], name, self._batch_sizes is not None)
        self._mechanism.warm_up(forward)
        snapshot = _Snapshot(self.model)
        try:
            replay, results = self._mechanism.capture(forward)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RuntimeError(_cannot(name, str(error).strip().partition("\n")[0])) from error
        if snapshot.is_outdated():
            raise RuntimeError(_cannot(name, "it replaces parameters, buffers or submodules"))
        self._snapshot = snapshot
        self.captures += 1
        return _Graph(images, results, replay)


@dataclasses.dataclass(frozen=True)
class _Graph:
    """A captured forward: the buffer it reads, the results it writes, and the function that runs it."""

    images: Tensor
    results: Any
    replay: Callable[[], None]


class CudaGraphs:
    """PyTorch's CUDA graphs on one device, with one pool of memory and one stream to capture on."""

    def __init__(self, device: torch.device):
        self.device = device
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
        with torch.cuda.device(device):
            self._pool, self._side = None, torch.cuda.Stream(device)
            self._last = torch.cuda.current_stream(device)

    def enter(self) -> None:
        """Make this thread's current stream wait for the last replay, whose memory the next one shares."""
        stream = torch.cuda.current_stream(self.device)
        if stream != self._last:
            stream.wait_stream(self._last)
            self._last = stream

    def warm_up(self, forward: Callable[[], Any]) -> None:
        """Run ``forward`` on a stream of its own, as PyTorch requires before a capture."""
        with torch.cuda.device(self.device):
            current = torch.cuda.current_stream()
            self._side.wait_stream(current)
            with torch.cuda.stream(self._side):
                for _ in range(WARM_UPS):
                    forward()
            current.wait_stream(self._side)

    def capture(self, forward: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Return the function that replays ``forward``, and the results that it writes."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device):
            # PyTorch gives a pool up with its last graph, and fails an assertion at a capture into it after that.
            if not self._graphs:
                self._pool = torch.cuda.graph_pool_handle()
            self.enter()
            # A capture that fails leaves its stream current, so the outer context restores the caller's. Other threads
            # may use the GPU meanwhile.
            with (
                torch.cuda.stream(torch.cuda.current_stream()),
                torch.cuda.graph(graph, pool=self._pool, stream=self._side, capture_error_mode="thread_local"),
            ):
                results = forward()
        self._graphs.add(graph)
        return graph.replay, results

    def finish(self) -> None:
        """Wait until nothing runs any more."""
        torch.cuda.synchronize(self.device)


class Calls:
    """What stands in for graphs on a CPU: calls the forward again, and writes into the same results."""

    def __init__(self, device: torch.device):
        self.device = device

    def enter(self) -> None:
        pass

    def warm_up(self, forward: Callable[[], Any]) -> None:
        pass

    def capture(self, forward: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        results = _map(Tensor.clone, forward())

        def replay():
            for old, new in zip(_tensors(results), _tensors(forward()), strict=True):
                old.copy_(new)

        return replay, results

    def finish(self) -> None:
        pass


def _check_nothing_traces() -> None:
    """Raise where what is recorded of a call would leave out the graph's replay, or could not pass through it."""
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "compile_inference: called in what torch.compile or torch.export traces, where a graph cannot be replayed; "
            "expected the model itself there, or the call outside"
        )
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "compile_inference: called within a transform of torch.func, which cannot pass through a CUDA graph; "
            "expected the model itself"
        )


def _mechanism(device: torch.device) -> CudaGraphs | Calls:
    if device.type == "cuda":
        return CudaGraphs(device)
    if device.type == "cpu" and runtime.backend().startswith(("emulated", "torch")):
        return Calls(device)
    raise RuntimeError(
        f"compile_inference: the model is on {device}, which has no CUDA graphs; expected a CUDA device, or the model "
        'itself (on a CPU, vitkernels.use_backend("torch") or "emulated" calls it without graphs)'
    )


def _device_of(model: nn.Module) -> torch.device:
    devices = {t.device for t in (*model.parameters(), *model.buffers())}
    if len(devices) != 1:
        found = ", ".join(sorted(map(str, devices))) or "no device, as it has no parameters"
        raise RuntimeError(f"compile_inference: {type(model).__name__} is on {found}; expected one device")
    return devices.pop()


class _Normalize:
    """``(x − mean) / std`` per channel of uint8 or floating-point images, in the model's dtype."""

    def __init__(self, normalize, model: nn.Module, images: Tensor):
        mean, std = (torch.tensor(v, dtype=torch.float64, device=images.device).view(-1, 1, 1) for v in normalize)
        if images.ndim != 4 or images.shape[1] != len(mean):
            raise ValueError(
                f"compile_inference: normalize is for {len(mean)} channels; got images of {tuple(images.shape)}"
            )
        self._dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        wide = torch.promote_types(self._dtype, torch.float32)
        largest = 1.0 if images.is_floating_point() else 255.0
        self._wide, self._scale, self._shift = wide, (1 / (largest * std)).to(wide), (-mean / std).to(wide)

    def __call__(self, images: Tensor) -> Tensor:
        return torch.addcmul(self._shift, images.to(self._wide), self._scale).to(self._dtype)


class _Snapshot:
    """What a graph took from a model and would not see change: addresses, submodules, classes, hooks, adapters."""

    def __init__(self, model: nn.Module):
        self._modules = list(model.modules())
        self._classes = [*map(type, self._modules)]
        self._containers, places = [], []
        for module in self._modules:
            own = module.__dict__
            places.append((own, "training", module.training))
            helds = [module._modules, module._parameters, module._buffers]
            if hasattr(module, "_disable_adapters"):  # PEFT switches, merges and scales by attributes of its layers
                places += [(own, name, own.get(name)) for name in ("_disable_adapters", "_active_adapter")]
                lists = (own.get("_active_adapter"), own.get("merged_adapters"))
                self._containers += [names for names in lists if isinstance(names, list)]
                helds.append(own.get("scaling", {}))
            for held in helds:
                places += [(held, name, value) for name, value in held.items()]
                self._containers.append(held)
            self._containers += [module._forward_hooks, module._forward_pre_hooks]
        self._sizes = [*map(len, self._containers)]
        self._holders, self._names, self._values = zip(*places, strict=True)
        # A graph reads a weight's values in FP8, which are made anew when the weight is written. Held here, they stay
        # in memory.
        self._in_fp8 = [(p, values) for p in model.parameters() if (values := fp8.kept(p)) is not None]
        self._tensors = [*model.parameters(), *model.buffers()]
        self._addresses = [*map(Tensor.data_ptr, self._tensors)]

    def is_outdated(self) -> bool:
        """Tell whether any of it has changed since."""
        # Loops in C: for ViT-B 62 µs on one core of a busy CPU, where loops in Python took 83.
        return not (
            [*map(len, self._containers)] == self._sizes
            and all(map(operator.is_, map(dict.get, self._holders, self._names), self._values))
            and [*map(Tensor.data_ptr, self._tensors)] == self._addresses
            and [*map(type, self._modules)] == self._classes
            and all(fp8.kept(p) is values for p, values in self._in_fp8)
        )


class _Waits(TorchDispatchMode):
    """Finds the first op of a forward for which the host waits for the GPU; none may be in a graph."""

    def __init__(self):
        super().__init__()
        self.found: str | None = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if self.found is None and self._waits(func, args, kwargs or {}, result):
            self.found = str(func)
        return result

    def _waits(self, func, args, kwargs, result) -> bool:
        name = func.name()
        if name.startswith(_WAITS):
            return True
        if name == "aten::repeat_interleave.Tensor":
            return kwargs.get("output_size") is None
        if name.startswith(("aten::index.", "aten::index_put", "aten::_index_put_impl")):
            return any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
        if name.startswith(("aten::_to_copy", "aten::copy_")) and isinstance(result, Tensor):
            source = args[1] if name.startswith("aten::copy_") else args[0]
            return source.device != result.device
        return False


def _cannot(name: str, why: str) -> str:
    return (
        f"compile_inference: the forward of {name} cannot be captured in a CUDA graph: {why}. A graph repeats kernels, "
        "and the host reads no value of theirs; expected a forward without .item(), .tolist(), shapes or branches that "
        "depend on data, and copies from or to the CPU, or the model itself"
    )


def _check_results(results: Any, size: int, name: str, padded: bool) -> None:
    found = 0
    for tensor in _tensors(results):
        found += 1
        if padded and (tensor.ndim == 0 or tensor.shape[0] != size):
            raise RuntimeError(
                f"compile_inference: {name} returns a tensor of shape {tuple(tensor.shape)} for {size} images; with "
                "batch_sizes every result must begin with the batch"
            )
    if not found:
        raise RuntimeError(f"compile_inference: {name} returns no tensor")


def _tensors(results: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _map(found.append, results)
    return found


def _map(function: Callable[[Tensor], Any], results: Any) -> Any:
    """Apply ``function`` to every tensor of tuples, lists and mappings, into new ones of their classes."""
    if isinstance(results, Tensor):
        return function(results)
    if results is None or isinstance(results, (bool, int, float, str)):
        return results
    if isinstance(results, Mapping):
        return type(results)(**{name: _map(function, value) for name, value in results.items()})
    if isinstance(results, tuple) and hasattr(results, "_fields"):
        return type(results)(*(_map(function, value) for value in results))
    if isinstance(results, (list, tuple)):
        return type(results)(_map(function, value) for value in results)
    raise RuntimeError(
        f"compile_inference: the model returns a {type(results).__name__}; expected tensors, or tuples, lists and "
        "mappings of tensors"
    )
