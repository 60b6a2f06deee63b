"""Trace launches on fake tensors, and compile them for a target without a GPU.

A launch goes through Triton's JIT with a driver that does nothing but name its target. The JIT binds the arguments and
specialises on them (divisible by 16, equal to 1). Its own hook then reports what it would compile.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import unittest.mock
from collections.abc import Callable, Iterator

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from triton import knobs
from triton.backends.compiler import GPUTarget

from vitkernels import runtime
from vitkernels.emulator.devices import GPUS
from vitkernels.runtime import DeviceFacts


@dataclasses.dataclass(frozen=True)
class Target:
    """An architecture: Triton's name for it, the facts that launch configurations depend on, and its limits.

    Attributes:
        triton: Backend, architecture, lanes per warp.
        facts: What :func:`vitkernels.runtime.device_facts` would return.
        shared_memory: Bytes of shared memory (LDS) of a multiprocessor (compute unit), for all its programs.
        max_warps: Most warps (waves) on a multiprocessor.
        max_blocks: Most programs on a multiprocessor.
    """

    triton: GPUTarget
    facts: DeviceFacts
    shared_memory: int
    max_warps: int
    max_blocks: int


def _cuda(arch: str, max_warps: int, max_blocks: int) -> Target:
    gpu = GPUS[arch]
    facts = DeviceFacts(arch, arch, gpu.num_sms, gpu.shared_memory)
    # The system takes 1 KiB of shared memory for each program.
    return Target(GPUTarget("cuda", gpu.capability, 32), facts, gpu.shared_memory + (1 << 10), max_warps, max_blocks)


# Most warps and programs on a multiprocessor: CUDA C++ Programming Guide, "Technical Specifications per Compute
# Capability"; for the MI300X LLVM's AMDGPUBaseInfo.cpp.
TARGETS = {
    "sm_80": _cuda("sm_80", 64, 32),
    "sm_90": _cuda("sm_90", 64, 32),
    "sm_100": _cuda("sm_100", 64, 32),
    "sm_120": _cuda("sm_120", 48, 24),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), DeviceFacts("gfx942", "gfx942", 304, 64 << 10), 64 << 10, 32, 16),
}


@dataclasses.dataclass(frozen=True)
class Launch:
    """What the JIT would compile for a launch; hashable and picklable.

    Attributes:
        target: Name in :data:`TARGETS`.
        kernel: ``module.function``.
        specialization: Types, constants, attributes and options, in the JIT's own JSON.
    """

    target: str
    kernel: str
    specialization: str

    @property
    def name(self) -> str:
        """The kernel's name without its module."""
        return self.kernel.rpartition(".")[2]


def trace(launcher: Callable[[], object], target: str) -> list[Launch]:
    """Call ``launcher()`` on fake CUDA tensors and return its launches in order; no kernel is compiled or run.

    Args:
        launcher: Creates tensors on device ``cuda`` and calls a launcher of an op file.
        target: Name in :data:`TARGETS`.
    """
    found = []

    def record(*, fn, compile, **_):
        found.append(Launch(target, f"{fn.module}.{fn.name}", compile["specialization_data"]))
        return True  # the JIT then neither compiles nor launches

    with _named_driver(target, "trace"), knobs.runtime.scope(), on_fake_tensors(TARGETS[target]):
        knobs.runtime.jit_cache_hook = record
        launcher()
    return found


@contextlib.contextmanager
def on_fake_tensors(target: Target) -> Iterator[None]:
    """Within a ``with`` block, make launchers configure for ``target`` and tensors on ``cuda`` fake."""
    cuda = target.triton.backend == "cuda"
    with (
        unittest.mock.patch.object(runtime, "device_facts", return_value=target.facts),
        # Whether PyTorch or a kernel computes something may depend on PyTorch's build.
        unittest.mock.patch.object(torch.version, "cuda", "12.8" if cuda else None),
        unittest.mock.patch.object(torch.version, "hip", None if cuda else "6.4"),
        # The JIT and some launchers ask whether an address is divisible by 16: true for storages, not for all views.
        unittest.mock.patch.object(FakeTensor, "data_ptr", lambda t: t.storage_offset() * t.element_size()),
        FakeTensorMode(),
    ):
        yield


def compile_launch(launch: Launch):
    """Compile ``launch`` and return Triton's ``CompiledKernel``; Triton may load it from its disk cache."""
    module, _, name = launch.kernel.rpartition(".")
    kernel = getattr(importlib.import_module(module), name)
    with _named_driver(launch.target, "compile"):
        return kernel.preload(launch.specialization)


@contextlib.contextmanager
def _named_driver(target: str, purpose: str) -> Iterator[None]:
    """Make Triton take ``target`` for the current device. Nothing may be launched meanwhile."""

    class Named:
        def get_current_target(self):
            return TARGETS[target].triton

        def get_current_device(self):
            # The key of the JIT's cache. With one key for both, trace's hook would not see what compile has cached.
            return f"{target}, {purpose}"

        def get_current_stream(self, device):
            return 0

    config = triton.runtime.driver
    before = config._active
    config.set_active(Named())
    try:
        yield
    finally:
        config._active = before
