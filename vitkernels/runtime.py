"""Backend choice, device facts and tensor layouts.

Importing this module neither imports Triton nor touches a device.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any

import torch
from torch.compiler import is_compiling

from vitkernels.emulator.devices import DEVICES

BACKENDS = ("auto", "triton", "emulated", *(f"emulated:{arch}" for arch in DEVICES), "torch")
_VARIABLE = "VITKERNELS_BACKEND"
_ENCODED = os.fsencode(_VARIABLE) if os.name == "posix" else _VARIABLE  # its key inside os.environ

_override = threading.local()  # a ContextVar would break fullgraph compilation
_override.backend = None  # for the importing thread: getattr is slower if the attribute is missing


def backend() -> str:
    """Return the chosen backend: ``"auto"``, ``"triton"``, ``"emulated"`` or ``"torch"``.

    ``auto`` runs the kernels on GPUs and PyTorch elsewhere. ``triton`` requires the kernels. ``emulated`` also runs
    them on CPU tensors, compiled for an emulated GPU: an H100, or another with ``emulated:sm_80`` or
    ``emulated:sm_120``. ``torch`` runs PyTorch everywhere.
    The choice comes from :func:`use_backend`, else from the environment variable ``VITKERNELS_BACKEND``. When
    activation checkpointing recomputes a forward, the backend is that of the original forward.

    Raises:
        ValueError: ``VITKERNELS_BACKEND`` is none of these.
        RuntimeError: :func:`use_backend` is active, and the backend of a checkpoint's forward cannot be determined.
    """
    chosen = _chosen_backend()
    if chosen not in BACKENDS:
        raise ValueError(f"VITKERNELS_BACKEND is {chosen!r}; expected one of {', '.join(BACKENDS)}")
    return chosen


def _chosen_backend() -> str:
    chosen = getattr(_override, "backend", None)
    if chosen is not None and not is_compiling() and not _keep_for_recomputation(chosen):
        chosen = None
    return _environment_backend() if chosen is None else chosen


def _environment_backend() -> str:
    # For an unset variable os.environ raises and catches an exception, which costs 0.5 µs of an op's call. Looking into
    # its internal dict is faster.
    try:
        if _ENCODED not in os.environ._data:
            return "auto"
    except AttributeError:  # another interpreter's os.environ, or a stand-in for it
        pass
    return os.environ.get(_VARIABLE, "auto")


def emulated_arch() -> str | None:
    """Return the GPU architecture that this thread emulates for CPU tensors, or None."""
    name, _, arch = _chosen_backend().partition(":")
    return (arch or "sm_90") if name == "emulated" else None


def emulated_again(arch: str | None) -> contextlib.AbstractContextManager:
    """Emulate ``arch``, an earlier result of :func:`emulated_arch`, within a ``with`` block; None changes nothing."""
    if arch is None or arch == emulated_arch():
        return _NO_SWITCH
    return use_backend(f"emulated:{arch}")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Choose the backend for this thread within a ``with`` block.

    A forward inside the block under ``torch.utils.checkpoint`` is recomputed on the same backend, wherever its backward
    runs: after the block, in a block with another backend, or in autograd's own thread. One exception: a compiled
    function inside an uncompiled checkpoint chooses its backend again. Then compile the function that contains the
    checkpoint, or set ``VITKERNELS_BACKEND``.

    Args:
        name: ``"auto"``, ``"triton"``, ``"emulated"`` (or ``"emulated:sm_80"``) or ``"torch"``, as for :func:`backend`.

    Raises:
        ValueError: ``name`` is none of these.
    """
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; expected one of {', '.join(BACKENDS)}")
    before = [getattr(_override, key, None) for key in ("backend", "entered", "frame")]
    if not is_compiling():
        _override.entered = _checkpoints(None)
        _override.frame = sys._getframe(2)  # frame of the `with`; checkpoints outside it began before this choice
    _override.backend = name
    try:
        yield
    finally:
        _override.backend, _override.entered, _override.frame = before


def _keep_for_recomputation(name: str) -> bool:
    """Make the current checkpoints that began under the choice ``name`` repeat it when they recompute.

    Returns whether the choice applies here. It does not if this thread is in a recomputation that began under it: the
    recomputation uses the backend of its own forward.
    """
    forwards, again = _checkpoints(getattr(_override, "frame", None))
    if not forwards and not again:
        return True
    forwards_before, again_before = getattr(_override, "entered", None) or ((), ())
    if any(not _holds(again_before, checkpoint) for checkpoint, _ in again):
        return False
    for checkpoint, attribute in forwards:
        if not _holds(forwards_before, checkpoint):
            function = getattr(checkpoint, attribute)
            if not isinstance(function, _Repeated):
                setattr(checkpoint, attribute, _Repeated(function, name))
            elif function.backend != name:
                raise RuntimeError(
                    f"use_backend({name!r}) was entered outside of an activation checkpoint whose forward had "
                    f"{function.backend!r} before; expected one choice throughout, or `with` blocks within it"
                )
    return True


def _holds(checkpoints: Iterable[tuple[Any, str]], checkpoint: Any) -> bool:
    return any(checkpoint is other for other, _ in checkpoints)


class _Repeated:
    """Wrapper of a checkpoint's recompute function that restores the backend of the forward."""

    def __init__(self, function: Callable, backend: str):
        self.function, self.backend = function, backend

    def __call__(self, *args, **kwargs):
        with use_backend(self.backend):
            return self.function(*args, **kwargs)


def _checkpoints(end: FrameType | None) -> tuple[list[tuple[Any, str]], list[tuple[Any, str]]]:
    """Return the activation checkpoints whose forward this thread is in, and those whose recomputation it is in.

    Each comes with the name of its attribute that is called to recompute. PyTorch keeps no such list. A non-reentrant
    checkpoint is found by its saved-tensor hooks. A reentrant one (also of DeepSpeed and Megatron) is found in a
    Python frame inside ``end``, by the context of its autograd.Function.

    Raises:
        RuntimeError: The checkpoint is of a PyTorch version with unknown internals.
    """
    forwards, again, hooks = [], [], []
    autograd = torch._C._autograd
    while pair := autograd._top_saved_tensors_default_hooks(True):
        hooks.append(pair)
        autograd._pop_saved_tensors_default_hooks()
    for pair in reversed(hooks):
        autograd._push_saved_tensors_default_hooks(*pair)
    for pack, _ in hooks:
        if getattr(pack, "__module__", None) != "torch.utils.checkpoint":
            continue
        pack = inspect.unwrap(pack)
        cells = dict(zip(pack.__code__.co_freevars, pack.__closure__ or (), strict=True))
        if "frame" in cells:
            forwards.append((cells["frame"].cell_contents, "recompute_fn"))
        elif "target_frame_ref" in cells:
            again.append((cells["target_frame_ref"].cell_contents(), "recompute_fn"))
        else:
            raise RuntimeError(
                f"use_backend within an activation checkpoint of PyTorch {torch.__version__}, which is not known; "
                "expected PyTorch 2.11 to 2.13, use_reentrant=True, or VITKERNELS_BACKEND instead"
            )
    # A reentrant checkpoint runs its forward without gradients, and recomputes within a backward.
    if torch.is_inference_mode_enabled() or (torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1):
        return forwards, again
    frame = sys._getframe(1)
    while frame is not None and frame is not end:
        code = frame.f_code
        if (code.co_name == "forward" or code.co_name == "backward") and "run_function" in code.co_names:
            context = frame.f_locals.get("ctx")
            if hasattr(context, "run_function"):
                (forwards if code.co_name == "forward" else again).append((context, "run_function"))
        frame = frame.f_back
    return forwards, again


_NO_SWITCH = contextlib.nullcontext()


@dataclasses.dataclass(frozen=True)
class DeviceFacts:
    """Device properties that launch configurations depend on.

    Attributes:
        name: Name of the device and of its tuning table.
        arch: ``sm_90``, ``gfx942`` or ``xpu``.
        num_sms: Streaming multiprocessors (compute units).
        shared_memory: Bytes of shared memory that one program may use.
    """

    name: str
    arch: str
    num_sms: int
    shared_memory: int


_EMULATED = {
    arch: DeviceFacts(f"emulated {device.name}", arch, device.num_sms, device.shared_memory)
    for arch, device in DEVICES.items()
}


def device_facts(device: torch.device) -> DeviceFacts:
    """Return the facts of ``device``; for the CPU, those of the emulated GPU.

    The first call for a GPU queries the driver; later calls read a cache.

    Raises:
        ValueError: No kernel runs on ``device``.
    """
    if device.type == "cuda":
        index = device.index if device.index is not None else torch.cuda.current_device()
        return _cuda_facts(index)
    if device.type == "xpu":
        return _xpu_facts(device.index if device.index is not None else torch.xpu.current_device())
    if device.type == "cpu" and (arch := emulated_arch()) is not None:
        return _EMULATED[arch]
    raise ValueError(f"no kernel runs on {device}; expected a GPU, or the backend emulated and the CPU")


@functools.cache
def _cuda_facts(index: int) -> DeviceFacts:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        arch = properties.gcnArchName.split(":")[0]
        shared = properties.shared_memory_per_block
    else:
        arch = f"sm_{properties.major}{properties.minor}"
        shared = properties.shared_memory_per_block_optin
    return DeviceFacts(properties.name, arch, properties.multi_processor_count, shared)


@functools.cache
def _xpu_facts(index: int) -> DeviceFacts:
    properties = torch.xpu.get_device_properties(index)
    shared = getattr(properties, "local_mem_size", 64 << 10)  # only newer PyTorch has it
    return DeviceFacts(properties.name, "xpu", properties.gpu_subslice_count, shared)


def device_guard(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Make ``x``'s device current for a launch: Triton launches on the current device, not on the tensor's."""
    if x.is_cuda:
        # Usually the device is already current, and testing is cheaper than switching.
        return _NO_SWITCH if x.get_device() == torch.cuda.current_device() else torch.cuda.device(x.device)
    return torch.xpu.device(x.device) if x.is_xpu else _NO_SWITCH


def device_type(x: torch.Tensor) -> str:
    """Return ``x.device.type``, without the 0.2 µs in which PyTorch makes a new string."""
    return "cuda" if x.is_cuda else "cpu" if x.is_cpu else x.device.type


def dot_precision(device: torch.device) -> str:
    """Return the precision of fp32 products on ``device``: ``"tf32"`` if PyTorch allows it and the chip has it."""
    arch = device_facts(device).arch
    has_tf32 = not arch.startswith("gfx") or arch == "gfx942"
    return "tf32" if allowed_precision() == "tf32" and has_tf32 else "ieee"


def allowed_precision() -> str:
    """Return PyTorch's setting for the precision of fp32 products: ``"tf32"``, or another name."""
    allowed = torch.backends.cuda.matmul.fp32_precision  # includes the older switches
    return torch.backends.fp32_precision if allowed == "none" else allowed


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """Return autocast's dtype for products of ``x``; None outside autocast, and for fp64, which it does not cast."""
    if not is_compiling() and not torch._C._is_any_autocast_enabled():  # the usual case, and a cheap test
        return None
    kind = device_type(x)
    if kind == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """View ``x`` (..., C) as (M, C) with unit stride along C; copy only if no such view exists."""
    return unit_stride(x.reshape(-1, x.shape[-1]))


def unit_stride(x: torch.Tensor) -> torch.Tensor:
    """Return ``x`` with unit stride along the last dim; copy it only if the stride differs."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def dense_or(parameter: torch.Tensor | None, placeholder: torch.Tensor) -> torch.Tensor:
    """Return ``parameter``, contiguous; or, for None, ``placeholder``, a kernel argument that is never read."""
    return placeholder if parameter is None else parameter.contiguous()


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype for sums over values of ``dtype``: fp32, or fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def promoted_dtype(x: torch.Tensor, *others: torch.Tensor | None) -> torch.dtype:
    """Return the dtype of a sum of ``x`` and ``others``, as PyTorch promotes: the widest."""
    dtype = x.dtype
    for t in others:
        if t is not None and t.dtype is not dtype:
            dtype = torch.promote_types(dtype, t.dtype)
    return dtype


def cdiv(a: int, b: int) -> int:
    """Return ``a / b`` rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Return the smallest power of two that is at least ``n`` (and at least 1)."""
    return 1 << max(n - 1, 0).bit_length()
