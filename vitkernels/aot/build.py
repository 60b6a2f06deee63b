"""What a launch would compile, found on tensors that are not there, and compiled for a GPU that is not there.

A launch goes through Triton's JIT itself, with a driver that only names its target: the JIT binds the arguments and
specialises on them (divisible by 16, equal to 1), and hands over, through its own hook, what it would compile next.
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
        triton: Backend, architecture, lanes a warp.
        facts: As :func:`vitkernels.runtime.device_facts` would give them.
        shared_memory: Bytes of shared memory (LDS) a multiprocessor (compute unit) has for all its programs.
        max_warps: Warps (waves) that a multiprocessor holds.
        max_blocks: Programs that it holds.
    """

    triton: GPUTarget
    facts: DeviceFacts
    shared_memory: int
    max_warps: int
    max_blocks: int


def _cuda(arch: str, max_warps: int, max_blocks: int) -> Target:
    gpu = GPUS[arch]
    facts = DeviceFacts(arch, arch, gpu.num_sms, gpu.shared_memory)
    # One KiB of each program's shared memory is the system's.
    return Target(GPUTarget("cuda", gpu.capability, 32), facts, gpu.shared_memory + (1 << 10), max_warps, max_blocks)


# Warps and programs that a multiprocessor holds: CUDA C++ Programming Guide, "Technical Specifications per Compute
# Capability". The MI300X: LLVM's AMDGPUBaseInfo.cpp.
TARGETS = {
    "sm_80": _cuda("sm_80", 64, 32),
    "sm_90": _cuda("sm_90", 64, 32),
    "sm_100": _cuda("sm_100", 64, 32),
    "sm_120": _cuda("sm_120", 48, 24),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), DeviceFacts("gfx942", "gfx942", 304, 64 << 10), 64 << 10, 32, 16),
}


@dataclasses.dataclass(frozen=True)
class Launch:
    """What the JIT would compile: hashable, and fit to be sent to another process.

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
        """The kernel's, without its module."""
        return self.kernel.rpartition(".")[2]


def trace(launcher: Callable[[], object], target: str) -> list[Launch]:
    """Call ``launcher()`` with fake CUDA tensors allowed, and return its launches in order; nothing runs.

    Args:
        launcher: Makes its tensors on device ``cuda`` and calls a launcher of an op file.
        target: Name in :data:`TARGETS`.
    """
    found = []

    def record(*, fn, compile, **_):
        found.append(Launch(target, f"{fn.module}.{fn.name}", compile["specialization_data"]))
        return True  # neither compiled nor launched

    with _named_driver(target, "trace"), knobs.runtime.scope(), on_fake_tensors(TARGETS[target]):
        knobs.runtime.jit_cache_hook = record
        launcher()
    return found


@contextlib.contextmanager
def on_fake_tensors(target: Target) -> Iterator[None]:
    """Have launchers choose for ``target``, on CUDA tensors without memory, within a ``with`` block."""
    cuda = target.triton.backend == "cuda"
    with (
        unittest.mock.patch.object(runtime, "device_facts", return_value=target.facts),
        # What PyTorch computes and what a kernel may depend on PyTorch's build.
        unittest.mock.patch.object(torch.version, "cuda", "12.8" if cuda else None),
        unittest.mock.patch.object(torch.version, "hip", None if cuda else "6.4"),
        # The JIT and some launchers ask whether addresses divide by 16. Storages are aligned; a view may not be.
        unittest.mock.patch.object(FakeTensor, "data_ptr", lambda t: t.storage_offset() * t.element_size()),
        FakeTensorMode(),
    ):
        yield


def compile_launch(launch: Launch):
    """Compile ``launch``: Triton's ``CompiledKernel``, from its cache on disk where it lies there."""
    module, _, name = launch.kernel.rpartition(".")
    kernel = getattr(importlib.import_module(module), name)
    with _named_driver(launch.target, "compile"):
        return kernel.preload(launch.specialization)


@contextlib.contextmanager
def _named_driver(target: str, purpose: str) -> Iterator[None]:
    """Make Triton believe that the current device is ``target``; launch nothing meanwhile."""

    class Named:
        def get_current_target(self):
            return TARGETS[target].triton

        def get_current_device(self):
            # The key of the JIT's own cache: what one purpose compiled, the hook of the other would not see.
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
