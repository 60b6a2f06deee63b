"""Run a launcher on fake tensors, and let Triton's JIT compile what it launches, for an architecture by name.

The launch goes through the JIT itself, with a driver that only names its target: what is compiled is what a launch
with these shapes and strides would compile. Needs Triton's compiler, hence a process without the interpreter.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import subprocess
import tempfile
import unittest.mock
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from triton.backends.compiler import GPUTarget

from vitkernels import runtime
from vitkernels.ops._triton import INTERPRETED
from vitkernels.runtime import DeviceFacts


@dataclasses.dataclass(frozen=True)
class Target:
    """An architecture: Triton's name for it, and the facts that launch configurations depend on."""

    triton: GPUTarget
    facts: DeviceFacts


def _cuda(capability: int, num_sms: int, shared_kib: int) -> Target:
    arch = f"sm_{capability}"
    return Target(GPUTarget("cuda", capability, 32), DeviceFacts(arch, arch, num_sms, shared_kib << 10))


# Multiprocessors of the A100, H100, B200, RTX 5090 and MI300X.
TARGETS = {
    "sm_80": _cuda(80, 108, 163),
    "sm_90": _cuda(90, 132, 227),
    "sm_100": _cuda(100, 148, 227),
    "sm_120": _cuda(120, 170, 99),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), DeviceFacts("gfx942", "gfx942", 304, 64 << 10)),
}


@dataclasses.dataclass(frozen=True)
class Report:
    """What the compiler made of one launch.

    Attributes:
        kernel: The kernel's name.
        shared_bytes: Shared memory (LDS) a program uses.
        num_warps: Warps a program.
        registers: Registers a thread; None for AMD targets.
        spilled: Spill loads and stores in the machine code; None for AMD targets.
        wgmma: Warpgroup matrix instructions (sm_90).
        mma: Other tensor-core instructions.
        atomics: Atomic instructions.
        tf32: Whether a product rounds its operands to TF32.
    """

    kernel: str
    shared_bytes: int
    num_warps: int
    registers: int | None
    spilled: int | None
    wgmma: int
    mma: int
    atomics: int
    tf32: bool


def compile_launches(launcher: Callable, target: Target) -> list[Report]:
    """Call ``launcher()`` with fake CUDA tensors allowed, and compile each kernel that it launches.

    Args:
        launcher: Makes its tensors on device ``cuda`` and calls a launcher of an op file; nothing runs.
        target: One of :data:`TARGETS`.

    Raises:
        RuntimeError: Triton's interpreter is on, so that nothing can be compiled.
    """
    if INTERPRETED:
        raise RuntimeError("kernels are interpreted in this process; unset TRITON_INTERPRET to compile them")
    reports = []

    def compile_only(kernel, *args, grid, warmup, **kwargs):
        compiled = run(kernel, *args, grid=grid, warmup=True, **{k: _pointer(v) for k, v in kwargs.items()})
        reports.append(_read(kernel.fn.__name__, compiled))

    run = triton.JITFunction.run
    with (
        _named_driver(target.triton),
        unittest.mock.patch.object(triton.JITFunction, "run", compile_only),
        unittest.mock.patch.object(runtime, "device_facts", return_value=target.facts),
        FakeTensorMode(),
        warnings.catch_warnings(),
    ):
        # A launcher may look at an address to see what it divides by; a fake's is 0.
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        launcher()
    return reports


@contextlib.contextmanager
def _named_driver(target: GPUTarget) -> Iterator[None]:
    """Make Triton believe that the current device is ``target``; launch nothing meanwhile."""

    class Named:
        def get_current_target(self):
            return target

        def get_current_device(self):
            return str(target)  # the key of the JIT's cache: one for each target

        def get_current_stream(self, device):
            return 0

    config = triton.runtime.driver
    before = config._active
    config.set_active(Named())
    try:
        yield
    finally:
        config._active = before


class _FakePointer:
    """Stands for a tensor in the JIT's specialisation: its dtype, and whether its address divides by 16."""

    def __init__(self, tensor: FakeTensor):
        self.dtype = tensor.dtype
        self._offset = tensor.storage_offset() * tensor.dtype.itemsize

    def data_ptr(self) -> int:
        return self._offset  # storages are aligned; a view may not be

    def ptr_range(self) -> int:
        return 1 << 40


def _pointer(value):
    return _FakePointer(value) if isinstance(value, torch.Tensor) else value


def _read(name: str, compiled) -> Report:
    metadata = compiled.metadata
    if "cubin" in compiled.asm:
        sass, registers = _disassemble(compiled.asm["cubin"])
        ptx = compiled.asm["ptx"]
        return Report(
            kernel=name,
            shared_bytes=metadata.shared,
            num_warps=metadata.num_warps,
            registers=registers,
            spilled=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
            wgmma=len(re.findall(r"\bHGMMA\b", sass)),
            mma=len(re.findall(r"\b(?:HMMA|DMMA|UTC\w*MMA)\b", sass)),
            atomics=len(re.findall(r"\b(?:ATOM|ATOMG|ATOMS|RED)\b", sass)),
            tf32=".tf32" in ptx,
        )
    assembly = compiled.asm["amdgcn"]
    spills = re.search(r"vgpr_spill_count:\s*(\d+)", assembly)
    registers = re.search(r"\.vgpr_count:\s*(\d+)", assembly)
    return Report(
        kernel=name,
        shared_bytes=metadata.shared,
        num_warps=metadata.num_warps,
        registers=int(registers.group(1)) if registers else None,
        spilled=int(spills.group(1)) if spills else None,
        wgmma=0,
        mma=len(re.findall(r"\bv_mfma", assembly)),
        atomics=len(re.findall(r"\b(?:global|buffer|flat|ds)_\w*(?:atomic|add_f)\w*", assembly)),
        tf32="xf32" in assembly,
    )


def _disassemble(cubin: bytes) -> tuple[str, int]:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
        sass = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
    return sass, int(re.search(r"REG:(\d+)", usage).group(1))
