"""A driver for Triton under which launches run in the emulator, on CPU tensors.

Triton's JIT binds, specialises, compiles and caches a launch as ever; it asks the active driver for the target, the
device, the loader of a binary and the launcher, and these are the emulator's. Nothing is assembled: the kernel is the
PTX. Who emulates, and how, is each thread's own: a launch of another thread reaches the GPU.
"""

from __future__ import annotations

import contextlib
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

from vitkernels.emulator.devices import DEVICES, Device
from vitkernels.emulator.execute import Kind, Run, execute

# By the letter of PTX this is undefined. ptxas sees it in the registers' dataflow, and waits behind each product (its
# message C7515), which costs the overlap. (What the note `unfenced_operand` tells of, it mends by a warpgroup.arrive of
# its own: C7519. So it does where the accumulator is copied behind the fence.)
LEFT_TO_PTXAS = frozenset({Kind.accumulator_in_flight})


class EmulationError(RuntimeError):
    """A kernel did what a GPU does not forgive: each finding names where."""


@dataclasses.dataclass
class Emulation:
    """How this thread's launches are emulated.

    Attributes:
        device: The GPU that is emulated.
        programs: How many programs of a launch run, the first and the last among them; the others leave their outputs
            as they were. None for all.
        seed: Of the order of programs and of warps; None runs them in turn.
        runs: Takes what each launch found and counted, where it is a list.
        raises: Whether findings raise an :class:`EmulationError`.
        strict: Whether those do, too, that ptxas mends, at the cost of speed.
        memory: Fills the memory that an argument without any, a fake tensor, gets for one launch: takes each as a flat
            tensor of zeros in its dtype. None for zeros.
        edit: Gives the PTX that runs for a kernel: one with a defect put in.
    """

    device: Device
    programs: int | None = None
    seed: int | None = None
    runs: list[Run] | None = None
    raises: bool = True
    strict: bool = False
    memory: Callable[[torch.Tensor], object] | None = None
    edit: Callable[[Kernel], str] | None = None

    def launch(self, kernel: Kernel, arguments: list[Any], grid: tuple[int, int, int], **options) -> None:
        """Run ``kernel`` over ``grid``; ``options`` as :func:`execute` takes them.

        Raises:
            EmulationError: A finding.
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
        errors = [f for f in run.errors if self.strict or f.kind not in LEFT_TO_PTXAS]
        if self.raises and errors:
            found = "\n".join(f"  {finding}" for finding in errors)
            raise EmulationError(f"{run.kernel} on an emulated {self.device.name}, grid {grid}:\n{found}")

    def _with_memory(self, arguments: list[Any]) -> list[Any]:
        """``arguments``, fake tensors with memory: one storage for all that share one, laid out as they are."""
        if not any(isinstance(a, FakeTensor) for a in arguments):
            return arguments
        storages: dict[int, torch.Tensor] = {}
        with unset_fake_temporarily():
            for t in filter(lambda a: isinstance(a, FakeTensor), arguments):
                storage = t.untyped_storage()
                if storage._cdata not in storages:
                    flat = torch.zeros(storage.nbytes() // t.element_size(), dtype=t.dtype)
                    if self.memory is not None:
                        self.memory(flat)
                    storages[storage._cdata] = flat.view(torch.uint8)

            def real(t: Any) -> Any:
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
    """A loaded binary."""

    name: str
    ptx: str
    shared: int


def chosen_programs(grid: tuple[int, int, int], most: int | None, seed: int | None) -> list[int] | None:
    """Return the programs of ``grid`` to run, in order; None for all in turn."""
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
        kind: Another class of emulation than that of the block around, or :class:`Emulation`.
        **changes: Attributes of :class:`Emulation`; those not given are as in the block around, if there is one.
    """
    _install()
    before = _thread.emulation
    if before is None or kind is not None:
        emulation = (kind or Emulation)(DEVICES[arch], **changes)
    else:
        emulation = dataclasses.replace(before, device=DEVICES[arch], **changes)
        if "seed" not in changes and before.seed is not None:
            emulation._seeds = before._seeds  # go on, or every launch would have the same order
    _thread.emulation = emulation
    try:
        yield emulation
    finally:
        _thread.emulation = before


class _Launcher:
    """What the JIT calls with a launch of one compiled kernel."""

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
    """Those of ``arguments`` that the kernel takes: no constants, and a tuple's one by one."""
    for argument, kind in zip(arguments, kinds, strict=True):
        if isinstance(kind, tuple):
            parts = [argument] * len(kind) if isinstance(argument, str) else argument  # a name, of all of them
            yield from _taken(parts, kind)
        elif kind != "constexpr":
            yield argument


class _Utils:
    """What the JIT asks of a driver's library."""

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
    """The emulator, as Triton knows its drivers."""

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
    """The emulator in threads that emulate, and in others the driver that was there."""

    def __init__(self, given):
        self._given = given

    def __getattr__(self, name: str):
        return getattr(_Driver if _thread.emulation is not None else self._given(), name)


_installed = threading.Lock()


def _install() -> None:
    """Put the emulator before Triton's driver and behind its compiler; once, as other threads may be under way."""
    config = triton.runtime.driver
    with _installed:
        if isinstance(config._active, _ByThread):
            return
        given = config._active
        config.set_active(_ByThread(lambda: config.default if given is None else given))
        knobs.runtime.add_stages_inspection_hook = _Stages(knobs.runtime.add_stages_inspection_hook)


class _Stages:
    """Tells Triton's compiler, where a thread emulates, to stop at PTX: it takes that for the binary."""

    def __init__(self, given):
        self._given = given
        # Behind another version of this a kernel must not be taken from the cache on disk.
        self._hash = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()

    def __call__(self, *arguments):
        found = self._given(*arguments) if self._given is not None else ("", None)
        if _thread.emulation is None:
            return found
        if not arguments:  # asked for what tells apart what comes of it
            key = f"{found[0]} emulated {self._hash}"
            return key, hashlib.sha256(key.encode()).hexdigest()
        _, stages, *_ = arguments
        stages["cubin"] = lambda ptx, metadata: ptx.encode()
        return found
