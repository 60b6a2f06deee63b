"""Run one kernel's PTX over a grid of programs on CPU tensors, and return findings and counts."""

from __future__ import annotations

import collections
import ctypes
import dataclasses
import math
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
from vitkernels.emulator.pipes import flops_of, operand_bytes_of, pipe_of

__all__ = ["Finding", "Kind", "Run", "View", "execute"]

SHARED_LIMITS = {device.capability: device.shared_memory for device in GPUS.values()}


@dataclasses.dataclass
class Finding:
    """A defect or a note that a GPU would not report, at its first occurrence.

    Attributes:
        kernel: The kernel's name.
        kind: What happened.
        line, text: PTX line and instruction.
        place: Source line, from ``.loc``: ``file.py:12:34``.
        program: Linear number of the program (CTA).
        warp, lane: -1 if it concerns no single one.
        other: Number of the warp, program, barrier or register that it conflicts with, depending on the kind.
        address: The kernel's; for shared memory in bytes from its start.
        argument: Number of the tensor argument that contains a global address, or is nearest to it.
        offset: Bytes from that tensor's first element.
        count: How often the instruction caused it.
        tensor: That argument's name, if known.
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


@dataclasses.dataclass(frozen=True)
class View:
    """The part of its storage that a tensor argument covers. Views of the same part are equal.

    Attributes:
        storage: The storage's number in the launch.
        capacity: Bytes of the storage.
        offset: Bytes from the storage's start to the first element.
        itemsize: Bytes of an element.
        axes: (size, stride in bytes) of each axis of size 2 or more, the largest stride first. Axes of stride 0 (of an
            expanded tensor) are left out.
    """

    storage: int
    capacity: int
    offset: int
    itemsize: int
    axes: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, t: torch.Tensor, storage: int) -> View:
        size = t.element_size()
        axes = ((n, step * size) for n, step in zip(t.shape, t.stride(), strict=True) if n > 1 and step)
        nested = tuple(sorted(axes, key=lambda axis: -axis[1]))
        return cls(storage, t.untyped_storage().nbytes(), t.storage_offset() * size, size, nested)

    @property
    def bytes(self) -> int:
        """Number of distinct bytes covered, if no two elements overlap."""
        return math.prod(n for n, _ in self.axes) * self.itemsize

    def covers(self, at: np.ndarray) -> bool:
        """Return whether any of the byte offsets ``at`` in the storage lies in an element of the view."""
        rest = at - self.offset
        for n, step in self.axes:
            rest = rest - np.clip(rest // step, 0, n - 1) * step
        return bool(((rest >= 0) & (rest < self.itemsize)).any())


@dataclasses.dataclass
class Run:
    """The result of one launch.

    Attributes:
        programs: How many of the grid's programs ran.
        counts: Warp instructions by class; sectors, wavefronts and phases of the memory classes; bytes read and written
            (distinct 32-byte sectors of global memory).
        lines: Figures of each memory instruction.
        shared: Bytes of dynamic shared memory.
        pipes: Warp instructions by the pipe that executes them (:mod:`vitkernels.emulator.pipes`).
        flops: Multiplications and additions of the tensor cores, by instruction and type of the operands.
        reads, writes: The arguments' views of which some byte was read, or written; empty unless asked for.
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
    pipes: dict[str, int] = dataclasses.field(default_factory=dict)
    flops: dict[str, int] = dataclasses.field(default_factory=dict)
    reads: frozenset[View] = frozenset()
    writes: frozenset[View] = frozenset()

    @property
    def errors(self) -> list[Finding]:
        return [f for f in self.findings if f.kind not in NOTES]


def extent(t: torch.Tensor) -> tuple[int, int]:
    """Return the offsets in its storage of a view's first byte and of its end."""
    start = t.storage_offset() * t.element_size()
    if t.numel() == 0:
        return start, start
    return start, start + (sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1) * t.element_size()


@dataclasses.dataclass
class _Storage:
    """Memory that one or more tensor arguments view."""

    address: int
    size: int
    element: int
    first: int
    end: int
    views: list[tuple[int, int, int]]  # argument, first byte, end

    @property
    def granule(self) -> int:
        """log2 of the bytes that the engine's checks treat as one unit."""
        return min(self.element.bit_length() - 1, 2)


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
    """Context manager for the engine's machine of one run."""

    def __init__(self, prog: ptx.Program, shared: int, arch: int):
        self.lib = library()
        self.prog = prog
        self.handle = self.lib.emu_new(
            prog.code.ctypes.data, len(prog.code), prog.order.ctypes.data, prog.operands.ctypes.data,
            prog.constants.ctypes.data, prog.slots, prog.predicates, prog.threads, shared, prog.granule, arch,
        )  # fmt: skip
        if not self.handle:
            raise MemoryError("no memory for the emulator")
        self.tensors: list = []  # the arguments, descriptors replaced by their base tensors
        self.storages: list[_Storage] = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.lib.emu_free(self.handle)

    def give(self, arguments: Sequence, scratch: torch.Tensor | None, descriptors: Sequence[dict] | None) -> None:
        """Pass the tensors to the engine and pack the parameters."""
        self.tensors = [a.base if is_descriptor(a) else a for a in arguments]
        self.storages = list(_storages([*self.tensors, scratch]).values())
        tma = any(p.size == TENSOR_MAP_BYTES for p in self.prog.parameters)
        arguments = expanded(arguments, descriptors, tma, self.address)
        if scratch is not None:
            arguments.append(scratch)
        for s in self.storages:
            self.lib.emu_buffer(self.handle, s.address, s.size, s.granule, s.first, s.end)
        data = bytearray(self.prog.parameter_bytes + 16)
        extra = len(self.prog.parameters) - len(arguments)
        if extra < 0:
            raise ValueError(f"{self.prog.name} takes {len(self.prog.parameters)} parameters, got {len(arguments)}")
        for value, parameter in zip([*arguments, *[0] * extra], self.prog.parameters, strict=True):
            data[parameter.offset : parameter.offset + parameter.size] = self._packed(value, parameter.size)
        self.params = np.frombuffer(bytes(data), np.uint8).copy()
        self.lib.emu_params(self.handle, self.params.ctypes.data, len(self.params))

    def address(self, tensor: torch.Tensor) -> int:
        """Return a tensor's address in the kernel."""
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
            # The view that contains the byte, or else the nearest one.
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

    def counts(self) -> tuple[dict[str, float], dict[str, int], dict[str, int], list[dict]]:
        table = np.zeros((len(self.prog.code), 8), np.uint64)
        self.lib.emu_counts(self.handle, table.ctypes.data)
        counts: dict[str, float] = {}
        pipes: dict[str, int] = collections.defaultdict(int)
        flops: dict[str, int] = collections.defaultdict(int)
        lines = []
        for pc, row in enumerate(table.astype(np.int64).tolist()):
            executed, _, requests, sectors, ideal, waves, _, phases = row
            if not executed:
                continue
            cls, code = self.prog.classes[pc], self.prog.code[pc]
            counts[cls] = counts.get(cls, 0) + executed
            pipes[pipe_of(code, cls)] += executed
            if cls in ("mma", "wgmma"):
                kind, each = flops_of(code)
                flops[kind] += each * executed
            if cls == "wgmma":
                counts["wgmma.bytes"] = counts.get("wgmma.bytes", 0) + operand_bytes_of(code) * executed
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
        return counts, dict(pipes), dict(flops), lines

    def touched(self) -> tuple[int, int]:
        """Return the bytes read and the bytes written, in whole distinct sectors of 32 bytes."""
        sectors = np.zeros((len(self.storages), 2), np.uint64)
        for i in range(len(self.storages)):
            self.lib.emu_touched(self.handle, i, sectors[i].ctypes.data)
        read, written = sectors.sum(0).tolist()
        return int(read) * 32, int(written) * 32

    def views(self) -> list[frozenset[View]]:
        """Return the views that were read and the views that were written."""
        views = [set(), set()]
        for i, s in enumerate(self.storages):
            sectors = self._marks(self.lib.emu_sectors(self.handle, i), np.uint8, (s.size >> 5) + 1)
            passed = {View.of(self.tensors[argument], i) for argument, _, _ in s.views if argument < len(self.tensors)}
            for written in (0, 1):
                marked = np.flatnonzero(sectors & 1 << written)
                if len(passed) > 1:  # elements of several views may interleave, even within a sector
                    granule = s.granule
                    marks = self._marks(
                        self.lib.emu_granules(self.handle, i, written), np.uint64, (s.size >> granule) + 1
                    )
                    at = ((marked << 5 - granule)[:, None] + np.arange(32 >> granule)).ravel()
                    at = at[at < len(marks)]
                    at = at[marks[at] != 0] << granule
                    views[written] |= {view for view in passed if view.covers(at)}
                elif len(marked):
                    views[written] |= passed
        return [frozenset(v) for v in views]

    @staticmethod
    def _marks(address: int, dtype, n: int) -> np.ndarray:
        bytes_ = (ctypes.c_uint8 * (n * np.dtype(dtype).itemsize)).from_address(address)
        return np.frombuffer(bytes_, dtype)


def execute(
    text: str, arguments: list, grid: tuple[int, int, int], *, shared: int, arch: int, ctas: list[int] | None = None,
    order_seed: int = 0, check_warp: bool = False, limit: int = 1 << 62, constants: dict | None = None,
    scratch: int = 0, descriptors: Sequence[dict] | None = None, names: Sequence[str] | None = None,
    counted: bool = True, views: bool = False,
) -> Run:  # fmt: skip
    """Run the kernel in ``text``.

    Args:
        text: PTX of one kernel, from Triton.
        arguments: The kernel's arguments: tensors, tensor descriptors, ints and floats, without Triton's two scratch
            pointers.
        grid: Programs in x, y, z.
        shared: Bytes of dynamic shared memory.
        arch: Compute capability, 80 for 8.0.
        ctas: Linear numbers of the programs to run, in this order; all by default.
        order_seed: Shuffles the order of warps between barriers.
        check_warp: Report data that lanes of a warp exchange through shared memory without a bar.warp.sync.
        limit: Warp instructions after which the run is aborted.
        constants: Stored in the result.
        scratch: Bytes of global memory for each program (``kernel.metadata.global_scratch_size``).
        descriptors: ``kernel.metadata.tensordesc_meta``; without it, tensor descriptors are tiled by their own layout.
        names: Names of the arguments, for findings.
        counted: Count what was executed; if False, ``counts``, ``pipes``, ``flops`` and ``lines`` stay empty.
        views: Also return which views were read and written; this scans all memory that they cover.

    Raises:
        Unsupported: An instruction that the engine does not know; the message names its line.
        MemoryError: The engine has too little memory.
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
        counts, pipes, flops, lines = machine.counts() if counted else ({}, {}, {}, [])
        if counted:
            counts["bytes read"], counts["bytes written"] = machine.touched()
        reads, writes = machine.views() if views else (frozenset(), frozenset())
        instructions = machine.lib.emu_total(machine.handle)
    seconds = time.perf_counter() - started
    return Run(
        prog.name, arch, tuple(grid), len(programs), prog.threads // 32, findings, counts, lines, seconds, instructions,
        shared, constants or {}, pipes=pipes, flops=flops, reads=reads, writes=writes,
    )  # fmt: skip
