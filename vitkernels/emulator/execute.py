"""Run one kernel's PTX over a grid of programs on CPU tensors: what was found, and what was counted."""

from __future__ import annotations

import ctypes
import dataclasses
import struct
import time
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from vitkernels.emulator import ptx
from vitkernels.emulator.build import library
from vitkernels.emulator.descriptors import SIZE as TENSOR_MAP_BYTES
from vitkernels.emulator.descriptors import expanded, is_descriptor
from vitkernels.emulator.devices import GPUS
from vitkernels.emulator.encode import SHARED_BASE
from vitkernels.emulator.lists import DESCRIPTIONS, NOTES, Kind

__all__ = ["Finding", "Kind", "Run", "execute"]

SHARED_LIMITS = {device.capability: device.shared_memory for device in GPUS.values()}


@dataclasses.dataclass
class Finding:
    """Something a GPU would not report, at its first occurrence.

    Attributes:
        kernel: The kernel's name.
        line, text: PTX line and instruction.
        place: Source line, from ``.loc``: ``file.py:12:34``.
        program: Linear number of the program (CTA).
        warp, lane: -1 is no lane of its own.
        other: Warp, program, barrier or register that it clashed with; what it is depends on the kind.
        address: As the kernel saw it; in bytes from the start for shared memory.
        argument: Which tensor argument a global address belongs to, or is nearest to.
        offset: Bytes from that tensor's first element.
        count: How often the instruction did so.
        tensor: That argument's name, where it is known.
    """

    kernel: str
    kind: Kind
    line: int
    text: str
    place: str
    program: int
    warp: int
    lane: int
    other: int
    address: int
    argument: int | None
    offset: int | None
    count: int
    tensor: str | None = None

    @property
    def what(self) -> str:
        return DESCRIPTIONS[self.kind]

    def __str__(self) -> str:
        at = f"address {self.address:#x}"
        if self.argument is not None:
            at = f"{self.tensor or f'argument {self.argument}'}, byte {self.offset}"
        return (
            f"{self.kernel}: {self.what} ×{self.count} at {self.place or 'no source line'}, {at}, program "
            f"{self.program}, warp {self.warp}, lane {self.lane}, other {self.other}; PTX line {self.line}: "
            f"{self.text[:110]}"
        )


@dataclasses.dataclass
class Run:
    """One launch.

    Attributes:
        programs: How many of the grid's programs ran.
        counts: Warp instructions by class; sectors, wavefronts and phases of the memory classes; bytes read and written
            (different 32-byte sectors of global memory).
        lines: Figures of each memory instruction.
        shared: Bytes of dynamic shared memory.
    """

    kernel: str
    arch: int
    grid: tuple[int, int, int]
    programs: int
    warps: int
    findings: list[Finding]
    counts: dict[str, float]
    lines: list[dict]
    seconds: float
    instructions: int
    shared: int
    constants: dict
    label: str = ""

    @property
    def errors(self) -> list[Finding]:
        return [f for f in self.findings if f.kind not in NOTES]


def extent(t: torch.Tensor) -> tuple[int, int]:
    """First byte of a view, and the end, in its storage."""
    start = t.storage_offset() * t.element_size()
    if t.numel() == 0:
        return start, start
    return start, start + (sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1) * t.element_size()


@dataclasses.dataclass
class _Storage:
    """Memory that one or several tensor arguments view."""

    address: int
    size: int
    element: int
    first: int
    end: int
    views: list[tuple[int, int, int]]  # argument, first byte, end


def _storages(arguments: Iterable) -> dict[int, _Storage]:
    found: dict[int, _Storage] = {}
    for i, t in enumerate(arguments):
        if not isinstance(t, torch.Tensor):
            continue
        storage = t.untyped_storage()
        first, end = extent(t)
        s = found.setdefault(
            storage.data_ptr(), _Storage(storage.data_ptr(), storage.nbytes(), t.element_size(), first, end, [])
        )
        s.element, s.first, s.end = min(s.element, t.element_size()), min(s.first, first), max(s.end, end)
        s.views.append((i, first, end))
    return found


class _Machine:
    """The engine's machine for one run; releases it at the end."""

    def __init__(self, prog: ptx.Program, shared: int, arch: int):
        self.lib = library()
        self.prog = prog
        self.handle = self.lib.emu_new(
            prog.code.ctypes.data, len(prog.code), prog.order.ctypes.data, prog.operands.ctypes.data,
            prog.constants.ctypes.data, prog.slots, prog.predicates, prog.threads, shared, prog.granule, arch,
        )  # fmt: skip
        if not self.handle:
            raise MemoryError("no memory for the emulator")
        self.storages: list[_Storage] = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.lib.emu_free(self.handle)

    def give(self, arguments: Sequence, scratch: torch.Tensor | None, descriptors: Sequence[dict] | None) -> None:
        """Hand over the tensors, and pack the parameters."""
        tensors = [a.base if is_descriptor(a) else a for a in arguments]
        self.storages = list(_storages([*tensors, scratch]).values())
        tma = any(p.size == TENSOR_MAP_BYTES for p in self.prog.parameters)
        arguments = expanded(arguments, descriptors, tma, self.address)
        if scratch is not None:
            arguments.append(scratch)
        for s in self.storages:
            self.lib.emu_buffer(self.handle, s.address, s.size, min(s.element.bit_length() - 1, 2), s.first, s.end)
        data = bytearray(self.prog.parameter_bytes + 16)
        extra = len(self.prog.parameters) - len(arguments)
        if extra < 0:
            raise ValueError(f"{self.prog.name} takes {len(self.prog.parameters)} parameters, got {len(arguments)}")
        for value, parameter in zip([*arguments, *[0] * extra], self.prog.parameters, strict=True):
            data[parameter.offset : parameter.offset + parameter.size] = self._packed(value, parameter.size)
        self.params = np.frombuffer(bytes(data), np.uint8).copy()
        self.lib.emu_params(self.handle, self.params.ctypes.data, len(self.params))

    def address(self, tensor: torch.Tensor) -> int:
        """Where the kernel sees a tensor."""
        base = tensor.untyped_storage().data_ptr()
        number = next(i for i, s in enumerate(self.storages) if s.address == base)
        return self.lib.emu_address(number, tensor.data_ptr() - base)

    def _packed(self, value, size: int) -> bytes:
        if isinstance(value, bytes):
            return value
        if isinstance(value, torch.Tensor):
            if size != 8:
                raise ValueError(f"a tensor for a parameter of {size} bytes")
            return struct.pack("<Q", self.address(value))
        if isinstance(value, float):
            return struct.pack("<f" if size == 4 else "<d", value)
        return (int(value) & ((1 << 8 * size) - 1)).to_bytes(size, "little")

    def run(self, programs, grid, check_warp, limit, seed) -> int:
        chosen, dims = np.array(programs, np.int32), np.array(grid, np.int32)
        count = self.lib.emu_run(
            self.handle, chosen.ctypes.data, len(chosen), dims.ctypes.data, int(check_warp), limit, seed
        )
        if count < 0:
            what, pc = self.lib.emu_error(self.handle).decode(), self.lib.emu_error_pc(self.handle)
            if pc < 0:
                raise MemoryError(f"the emulator stopped: {what}")
            line, text = self.prog.lines[pc], self.prog.texts[pc]
            raise ptx.Unsupported(
                f"{self.prog.name}, PTX line {line}: {text}: {what} of this type or mode is not implemented"
            )
        return count

    def findings(self, count: int) -> list[Finding]:
        rows = np.zeros((count, 8), np.int64)
        if count:
            self.lib.emu_found(self.handle, rows.ctypes.data)
        return [self._finding(*map(int, row)) for row in rows]

    def _finding(self, kind, pc, program, warp, lane, other, address, count) -> Finding:
        argument = offset = None
        at = ctypes.c_int64()
        number = self.lib.emu_locate(address, ctypes.byref(at))
        if 0 <= number < len(self.storages):
            # the view that the byte is in, else the one it is nearest to
            views = self.storages[number].views
            argument, first, _ = min(views, key=lambda v: max(v[1] - at.value, at.value - v[2] + 1, 0))
            offset = at.value - first
        elif number < 0 and address >= SHARED_BASE:
            address -= SHARED_BASE
        prog = self.prog
        return Finding(
            prog.name, Kind(kind), prog.lines[pc], prog.texts[pc], prog.places[pc], program, warp, lane, other,
            address, argument, offset, count,
        )  # fmt: skip

    def counts(self) -> tuple[dict[str, float], list[dict]]:
        table = np.zeros((len(self.prog.code), 8), np.uint64)
        self.lib.emu_counts(self.handle, table.ctypes.data)
        counts: dict[str, float] = {}
        lines = []
        for pc, row in enumerate(table.astype(np.int64).tolist()):
            executed, _, requests, sectors, ideal, waves, _, phases = row
            if not executed:
                continue
            cls = self.prog.classes[pc]
            counts[cls] = counts.get(cls, 0) + executed
            if requests:
                lines.append({
                    "line": self.prog.lines[pc], "text": self.prog.texts[pc], "place": self.prog.places[pc],
                    "class": cls, "exec": executed, "requests": requests, "sectors": sectors, "ideal": ideal,
                    "waves": waves, "phases": phases,
                })  # fmt: skip
        for classes, figures in (
            (("ldg", "stg", "cpasync"), ("sectors", "ideal")),
            (("lds", "sts", "ldmatrix", "stmatrix", "cpasync"), ("waves", "phases")),
        ):
            for cls in classes:
                for figure in figures:
                    counts[f"{cls}.{figure}"] = sum(x[figure] for x in lines if x["class"] == cls)
        touched = np.zeros((len(self.storages), 2), np.uint64)
        for i in range(len(self.storages)):
            self.lib.emu_touched(self.handle, i, touched[i].ctypes.data)
        counts["bytes read"], counts["bytes written"] = (int(x) * 32 for x in touched.sum(0))
        return counts, lines


def execute(
    text: str, arguments: list, grid: tuple[int, int, int], *, shared: int, arch: int, ctas: list[int] | None = None,
    order_seed: int = 0, check_warp: bool = False, limit: int = 1 << 62, constants: dict | None = None,
    scratch: int = 0, descriptors: Sequence[dict] | None = None, names: Sequence[str] | None = None,
) -> Run:  # fmt: skip
    """Run the kernel of ``text``.

    Args:
        text: PTX with one kernel, as Triton compiles it.
        arguments: What the kernel takes: tensors, tensor descriptors, ints and floats, without Triton's two scratch
            pointers.
        grid: Programs in x, y, z.
        shared: Bytes of dynamic shared memory.
        arch: Compute capability, 80 for 8.0.
        ctas: Linear numbers of the programs to run, in this order; all by default.
        order_seed: Shuffles the order of warps between barriers.
        check_warp: Report an exchange through shared memory within a warp that no bar.warp.sync orders.
        limit: Warp instructions after which the run is given up.
        constants: Kept with the result.
        scratch: Bytes of global memory that each program wants (``kernel.metadata.global_scratch_size``).
        descriptors: ``kernel.metadata.tensordesc_meta``; without it, tensor descriptors are tiled by their own layout.

        names: Of the arguments, for what is found.

    Raises:
        Unsupported: An instruction that the engine does not know; the message names its line.
        NoCompiler: The engine could not be compiled.
        ValueError: More shared memory than a program may have, or arguments that do not fit the parameters.
    """
    if shared > SHARED_LIMITS.get(arch, shared):
        raise ValueError(f"{shared} bytes of shared memory: sm_{arch} has {SHARED_LIMITS[arch]} for a program")
    started = time.perf_counter()
    prog = ptx.program(text)
    programs = range(grid[0] * grid[1] * grid[2]) if ctas is None else ctas
    with _Machine(prog, shared, arch) as machine:
        memory = torch.zeros(scratch * grid[0] * grid[1] * grid[2] // 4, dtype=torch.int32) if scratch else None
        machine.give(arguments, memory, descriptors)
        found = machine.run(programs, grid, check_warp, limit, order_seed)
        findings = machine.findings(found)
        for finding in findings:
            if names is not None and finding.argument is not None:
                finding.tensor = names[finding.argument]
        counts, lines = machine.counts()
        instructions = machine.lib.emu_total(machine.handle)
    seconds = time.perf_counter() - started
    return Run(
        prog.name, arch, tuple(grid), len(programs), prog.threads // 32, findings, counts, lines, seconds, instructions,
        shared, constants or {},
    )  # fmt: skip
