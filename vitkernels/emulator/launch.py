"""A driver for Triton that runs launches in the emulator, on CPU tensors.

Triton's JIT binds, specialises, compiles and caches a launch as usual. It asks the active driver for the target, the
device, the binary loader and the launcher; here these belong to the emulator. ptxas does not run: the PTX is the
binary. Emulation is set for each thread: a launch of a thread that does not emulate reaches the GPU.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import hashlib
import itertools
import random
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.cache import FileCacheManager

from vitkernels.emulator.descriptors import is_descriptor
from vitkernels.emulator.devices import DEVICES, Device
from vitkernels.emulator.execute import Run, execute


class EmulationError(RuntimeError):
    """A kernel has defects that may fail on a GPU; each finding names its place."""


@dataclasses.dataclass
class Emulation:
    """How this thread's launches are emulated.

    Attributes:
        device: The emulated GPU.
        programs: How many programs of a launch run, the first and the last among them; the outputs of the others stay
            unchanged. None for all.
        seed: Seed of the order of programs and warps; None runs them in turn.
        runs: A list to which each launch's findings and counts are appended, or None.
        raises: Whether findings raise an :class:`EmulationError`.
        memory: Fills the memory that a fake tensor gets for one launch: called with each storage as a flat tensor of
            zeros in the argument's dtype. None leaves the zeros.
        edit: Returns the PTX to run instead of a kernel's own, for instance with a seeded defect.
    """

    device: Device
    programs: int | None = None
    seed: int | None = None
    runs: list[Run] | None = None
    raises: bool = True
    memory: Callable[[torch.Tensor], object] | None = None
    edit: Callable[[Kernel], str] | None = None

    def launch(self, kernel: Kernel, arguments: list[Any], grid: tuple[int, int, int], **options) -> None:
        """Run ``kernel`` over ``grid``; ``options`` are passed to :func:`execute`.

        Raises:
            EmulationError: The emulator found a defect.
        """
        seed = None if self.seed is None else next(self._seeds)
        run = execute(
            kernel.ptx if self.edit is None else self.edit(kernel),
            self._with_memory(arguments),
            grid,
            shared=kernel.shared,
            arch=self.device.capability,
            ctas=chosen_programs(grid, self.programs, seed),
            order_seed=seed or 0,
            counted=self.runs is not None,
            **options,
        )
        if self.runs is not None:
            self.runs.append(run)
        if self.raises and run.errors:
            found = "\n".join(f"  {finding}" for finding in run.errors)
            raise EmulationError(f"{run.kernel} on an emulated {self.device.name}, grid {grid}:\n{found}")

    def _with_memory(self, arguments: list[Any]) -> list[Any]:
        """Return ``arguments``, fake tensors replaced by real ones with the same layouts and shared storages."""
        tensors = [a.base if is_descriptor(a) else a for a in arguments]
        if not any(isinstance(t, FakeTensor) for t in tensors):
            return arguments
        storages: dict[int, torch.Tensor] = {}
        with unset_fake_temporarily():
            for t in filter(lambda t: isinstance(t, FakeTensor), tensors):
                storage = t.untyped_storage()
                if storage._cdata not in storages:
                    flat = torch.zeros(storage.nbytes() // t.element_size(), dtype=t.dtype)
                    if self.memory is not None:
                        self.memory(flat)
                    storages[storage._cdata] = flat.view(torch.uint8)

            def real(t: Any) -> Any:
                if is_descriptor(t):
                    described = copy.copy(t)
                    described.base = real(t.base)
                    return described
                if not isinstance(t, FakeTensor):
                    return t
                flat = storages[t.untyped_storage()._cdata]
                return flat.view(t.dtype).as_strided(t.shape, t.stride(), t.storage_offset())

            return [real(a) for a in arguments]

    @functools.cached_property
    def _seeds(self) -> Iterator[int]:
        return itertools.count(1 + (self.seed or 0) * 1_000_003)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What the driver loads as a kernel's binary: its PTX, and its bytes of shared memory."""

    name: str
    ptx: str
    shared: int


def chosen_programs(grid: tuple[int, int, int], most: int | None, seed: int | None) -> list[int] | None:
    """Return the programs of ``grid`` to run, in order; None means all in turn."""
    total = grid[0] * grid[1] * grid[2]
    some = most is not None and most < total
    if not some and seed is None:
        return None
    rng = random.Random(seed)
    chosen = list(range(total))
    if some:
        ends = {0, total - 1}
        between = rng.sample(range(1, total - 1), max(0, min(most, total) - len(ends)))
        chosen = sorted({*ends, *between})
    if seed is not None:
        rng.shuffle(chosen)
    return chosen


class _Thread(threading.local):
    emulation: Emulation | None = None


_thread = _Thread()


@contextlib.contextmanager
def emulating(arch: str = "sm_90", kind: type[Emulation] | None = None, **changes) -> Iterator[Emulation]:
    """Emulate ``arch`` for this thread's launches within a ``with`` block.

    Args:
        arch: Name in :data:`vitkernels.emulator.devices.DEVICES`.
        kind: Class of emulation to create; None keeps the enclosing block's, or :class:`Emulation`.
        **changes: Attributes of the emulation. Without ``kind``, the others come from the enclosing block, if any.
    """
    _install()
    before = _thread.emulation
    if before is None or kind is not None:
        emulation = (kind or Emulation)(DEVICES[arch], **changes)
    else:
        emulation = dataclasses.replace(before, device=DEVICES[arch], **changes)
        if "seed" not in changes and before.seed is not None:
            # A fresh iterator would start over: every block's launches would run in the same order.
            emulation._seeds = before._seeds
    _thread.emulation = emulation
    try:
        yield emulation
    finally:
        _thread.emulation = before


class _Launcher:
    """The launcher of one compiled kernel, which the JIT calls for each launch."""

    def __init__(self, src, metadata):
        self.kinds = list(src.signature.values())
        self.names = [*_taken(src.signature, self.kinds)]
        self.options = {
            "scratch": metadata.global_scratch_size,
            "descriptors": getattr(metadata, "tensordesc_meta", None),
        }

    def __call__(self, grid_0, grid_1, grid_2, stream, kernel, packed, launch_metadata, enter, leave, *arguments):
        if enter is not None:
            enter(launch_metadata)
        if grid_0 * grid_1 * grid_2 > 0:
            taken = [*_taken(arguments, self.kinds)]
            _thread.emulation.launch(kernel, taken, (grid_0, grid_1, grid_2), names=self.names, **self.options)
        if leave is not None:
            leave(launch_metadata)


def _taken(arguments: Iterable, kinds: Iterable) -> Iterator[Any]:
    """Yield the ``arguments`` that the kernel takes: constants are left out, tuples are flattened."""
    for argument, kind in zip(arguments, kinds, strict=True):
        if isinstance(kind, tuple):
            parts = [argument] * len(kind) if isinstance(argument, str) else argument  # one name for all its parts
            yield from _taken(parts, kind)
        elif kind != "constexpr":
            yield argument


class _Utils:
    """The functions that the JIT calls in a driver's library."""

    @staticmethod
    def load_binary(name, binary, shared, device):
        kernel = Kernel(name, binary.decode(), shared)
        registers, spills, most_threads = 0, 0, 1024
        return kernel, kernel, registers, spills, most_threads

    @staticmethod
    def get_device_properties(device):
        emulated = _thread.emulation.device
        return {
            "max_shared_mem": emulated.shared_memory,
            "multiprocessor_count": emulated.num_sms,
            "warpSize": 32,
            "max_num_regs": 65536,
        }


class _Driver:
    """The emulator, with the interface of a Triton driver."""

    utils = _Utils
    launcher_cls = _Launcher

    @staticmethod
    def get_current_target():
        return GPUTarget("cuda", _thread.emulation.device.capability, 32)

    @staticmethod
    def get_current_device():
        return f"emulated {_thread.emulation.device.arch}"

    @staticmethod
    def get_current_stream(device):
        return 0


class _ByThread:
    """A driver that forwards to the emulator in threads that emulate, and else to the previous driver."""

    def __init__(self, given):
        self._given = given

    def __getattr__(self, name: str):
        return getattr(_Driver if _thread.emulation is not None else self._given(), name)


_installed = threading.Lock()


def _install() -> None:
    """Install the emulator's driver and compiler hook, once for all threads: another thread may be launching now."""
    config = triton.runtime.driver
    with _installed:
        if isinstance(config._active, _ByThread):
            return
        given = config._active
        config.set_active(_ByThread(lambda: config.default if given is None else given))
        knobs.runtime.add_stages_inspection_hook = _Stages(knobs.runtime.add_stages_inspection_hook)
        knobs.cache.manager_class = _CacheManagers(knobs.cache.manager_class or FileCacheManager)


class _Stages:
    """A compiler hook: in a thread that emulates, Triton stops at PTX and takes it as the binary."""

    def __init__(self, given):
        self._given = given

    def __call__(self, *arguments):
        # Without arguments, Triton from 3.7 on asks for the hook's part of the cache key.
        found = self._given(*arguments) if self._given is not None else ("", None)
        if _thread.emulation is not None and arguments:
            _, stages, *_ = arguments
            stages["cubin"] = lambda ptx, metadata: ptx.encode()
        return found


class _CacheManagers:
    """What makes the managers of entries of Triton's disk cache: a thread that emulates has entries of its own.

    Otherwise a GPU would be given the emulator's PTX as a binary, and the emulator a GPU's. The hook's part of the key
    does not keep them apart: Triton 3.6 does not ask for it.
    """

    def __init__(self, given: Callable):
        self._given = given
        # Without this hash, Triton would load kernels that another version of this file made.
        self._suffix = "-emulated-" + hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]

    def __call__(self, key: str, **options):
        return self._given(key if _thread.emulation is None else key + self._suffix, **options)
