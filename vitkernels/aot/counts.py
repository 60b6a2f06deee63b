"""What a launch executes, counted on an emulated GPU, and how long a GPU needs for that at the least.

A few programs of each launch run with the configuration, code and addresses of the whole one, and what they did is
multiplied up to the grid: counts of N programs times the grid over N. Of a grid whose programs differ (tiles at an edge
that read less, causal rows that look at fewer keys) that is an estimate, from programs spread evenly over it.

The instructions are PTX's. ptxas makes others of them: it drops moves, folds address arithmetic and fuses. So what FMA,
ALU and issue slots take is an estimate, and may lie above what a GPU needs. The bound is of what ptxas can neither drop
nor hasten: products on tensor cores, special functions, wavefronts of shared memory, and bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator

import torch

from vitkernels.aot.emulate import emulate
from vitkernels.aot.launches import launches
from vitkernels.emulator.devices import DEVICES, RATES, WARPS_ISSUED
from vitkernels.emulator.execute import Run, View, execute
from vitkernels.emulator.launch import LEFT_TO_PTXAS, Emulation
from vitkernels.runtime import cdiv
from vitkernels.testing.cases import DTYPES, Case

SECTOR = 32  # bytes
PROGRAMS = 8  # of a launch, at most
# Warp instructions of a launch after which no further program is begun: those of long programs differ the least.
ENOUGH = 150_000

# How long each pipe needs at the least, and what is an estimate.
BOUNDS = ("tensor", "mufu", "lsu", "l2", "dram")
ESTIMATES = ("fma", "alu", "issue")


@dataclasses.dataclass(frozen=True)
class Counts:
    """What one launch executes.

    Attributes:
        kernel: The kernel's name.
        target: Name in :data:`vitkernels.emulator.devices.DEVICES`.
        grid: Programs of the launch.
        programs: How many of them ran.
        tensor, fma, alu, mufu, lsu, issue: Warp instructions by pipe (:mod:`vitkernels.emulator.pipes`), and all but
            moves.
        flops: Operations of tensor cores, padding included, by instruction and type.
        requests: A warp's loads and stores of global memory; cp.async too.
        sectors: The sectors of 32 bytes that these touch, request by request.
        excess_sectors: Those beyond what the bytes asked for fill.
        wavefronts: Clocks of a multiprocessor's shared memory and L1: accesses to shared memory, shuffles, and 128
            bytes of global memory each.
        conflicts: Wavefronts beyond those without a bank conflict.
        l2_bytes: The sectors' bytes, as if L1 kept none.
        l2_least: Those that pass L1 in any case: stores, atomics and cp.async of 16 bytes.
        dram_bytes: Different bytes of the tensors that are read, and of those that are written: what passes DRAM once
            where L2 holds nothing of them at the start.
        barriers: Barriers that a warp of a program waits at.
        errors: What the emulator found that a GPU does not forgive.
    """

    kernel: str
    target: str
    grid: int
    programs: int
    tensor: int
    fma: int
    alu: int
    mufu: int
    lsu: int
    issue: int
    flops: dict[str, int]
    requests: int
    sectors: int
    excess_sectors: int
    wavefronts: int
    conflicts: int
    l2_bytes: int
    l2_least: int
    dram_bytes: int
    barriers: int
    errors: tuple[str, ...] = ()

    @property
    def sectors_per_request(self) -> float:
        """4 where 32 lanes take 4 bytes each that lie in a row, 16 where they take 16, 32 where all lie apart."""
        return self.sectors / self.requests if self.requests else 0.0

    @property
    def times_us(self) -> dict[str, float]:
        """Microseconds that each of :data:`BOUNDS` and :data:`ESTIMATES` takes at its full rate.

        A multiprocessor's own pipes are taken to be as busy as those of the busiest one, which gets
        ceil(grid / multiprocessors) programs; L2 and DRAM are one for all.
        """
        rates, sms = RATES[self.target], DEVICES[self.target].num_sms
        share = cdiv(self.grid, sms) / self.grid  # of the launch, on the busiest multiprocessor
        clock = rates.clock * 1e3  # a microsecond

        def clocks(count: float, a_clock: float) -> float:
            return count * share / a_clock / clock

        times = {
            "tensor": sum(n * share * sms / self._tensor_rate(kind) for kind, n in self.flops.items()),
            "mufu": clocks(self.mufu, rates.mufu / 32),
            "lsu": clocks(self.wavefronts, rates.shared / 128),
            "l2": self.l2_least / (rates.l2 * clock) if rates.l2 else 0.0,
            "dram": self.dram_bytes / (rates.dram * 1e6),
            "fma": clocks(self.fma, rates.fma / 32),
            "alu": clocks(self.alu, rates.alu / 32),
            "issue": clocks(self.issue, WARPS_ISSUED),
        }
        return {name: times[name] for name in (*BOUNDS, *ESTIMATES)}

    def _tensor_rate(self, kind: str) -> float:
        """Operations a microsecond on all multiprocessors."""
        instruction, operands = kind.split()
        rates = RATES[self.target]
        return rates.tensor[operands] * 1e6 * (rates.mma_sync if instruction == "mma" else 1)

    @property
    def bound_us(self) -> float:
        """No GPU of this kind is faster: the longest of :data:`BOUNDS`."""
        return max(self.times_us[name] for name in BOUNDS)

    @property
    def bound_by(self) -> str:
        return max(BOUNDS, key=self.times_us.__getitem__)

    @property
    def roofline_us(self) -> float:
        """What its products at the tensor cores' peak, or its bytes at DRAM's, take: the longer of the two."""
        products = sum(n / (RATES[self.target].tensor[kind.split()[1]] * 1e6) for kind, n in self.flops.items())
        return max(products, self.times_us["dram"])

    @property
    def roofline_share(self) -> float:
        """The roofline over the bound: less than 1 where another pipe, or the last wave of programs, takes longer."""
        return self.roofline_us / self.bound_us if self.bound_us else 1.0

    def to_dict(self) -> dict[str, object]:
        """All figures, for JSON."""
        return dataclasses.asdict(self) | {
            "sectors_per_request": round(self.sectors_per_request, 2),
            "times_us": {name: round(us, 3) for name, us in self.times_us.items()},
            "bound_us": round(self.bound_us, 3),
            "bound_by": self.bound_by,
            "roofline_share": round(self.roofline_share, 4),
        }


def count_op(case: Case, op: str, dtype: str, target: str, kernel: str | None = None) -> list[Counts]:
    """Return what each launch of an op, forward and backward at ``case``, executes on ``target``.

    Args:
        case: Its shapes.
        op: Of those that :func:`vitkernels.aot.launches.launches` names.
        dtype: Name in :data:`vitkernels.testing.cases.DTYPES`.
        target: Name in :data:`vitkernels.emulator.devices.DEVICES`.
        kernel: Only kernels whose name holds this.
    """

    def fill(t: torch.Tensor) -> None:
        if t.dtype == torch.int32:  # where packed images start
            t.copy_(torch.arange(t.numel()) * case.tokens)
        elif t.dtype == torch.bool:  # masks that hide nothing
            t.fill_(True)

    return count(launches(case, DTYPES[dtype])[op], target, kernel=kernel, fill=fill)


def count(
    launcher: Callable[[], object],
    target: str,
    *,
    kernel: str | None = None,
    fill: Callable[[torch.Tensor], object] | None = None,
) -> list[Counts]:
    """Return what each launch of ``launcher`` executes on ``target``.

    Args:
        launcher: Makes its tensors on device ``cuda`` and calls a launcher of an op file.
        target: Name in :data:`vitkernels.emulator.devices.DEVICES`.
        kernel: Only kernels whose name holds this.
        fill: Gives a flat integer tensor its values, which are 0 otherwise.
    """
    sampled = emulate(launcher, target, fill=fill, kind=_Sampling, kernel=kernel)
    return [_times_the_grid(runs, target) for runs in sampled]


@dataclasses.dataclass
class _Sampling(Emulation):
    """Runs single programs of each launch, and keeps a list of runs a launch.

    Attributes:
        kernel: Only launches of kernels whose name holds this.
    """

    kernel: str | None = None

    def launch(self, kernel, arguments, grid, **options) -> None:
        if self.kernel is not None and self.kernel not in kernel.name:
            return
        arguments = self._with_memory(arguments)
        runs: list[Run] = []
        for program in spread(grid[0] * grid[1] * grid[2]):
            runs.append(
                execute(
                    kernel.ptx, arguments, grid, shared=kernel.shared, arch=self.device.capability, ctas=[program],
                    views=True, **options,
                )
            )  # fmt: skip
            if sum(run.instructions for run in runs) > ENOUGH:
                break
        self.runs.append(runs)


def spread(grid: int, most: int = PROGRAMS) -> Iterator[int]:
    """Yield up to ``most`` different programs of ``grid``, all of a small one, any first few of them evenly spread.

    By multiples of the golden ratio: programs in equal steps would all be the same tile of their image or row.
    """
    if grid <= most:
        yield from range(grid)
        return
    seen: set[int] = set()
    i = 0
    while len(seen) < most:
        program = int((0.5 + i * 0.6180339887498949) % 1 * grid)
        i += 1
        if program not in seen:
            seen.add(program)
            yield program


def _times_the_grid(runs: list[Run], target: str) -> Counts:
    grid = runs[0].grid[0] * runs[0].grid[1] * runs[0].grid[2]

    def total(figure: Callable[[Run], float]) -> int:
        return round(sum(map(figure, runs)) * grid / len(runs))

    def of_lines(run: Run, classes: Iterable[str], figure: Callable[[dict], float]) -> float:
        return sum(figure(line) for line in run.lines if line["class"] in classes)

    def wavefronts(run: Run) -> float:
        accesses = of_lines(run, SHARED, lambda x: x["waves"])
        lines = of_lines(run, ("ldg", "stg", "atom"), lambda x: max(x["requests"], x["sectors"] * SECTOR / 128))
        return accesses + lines + run.counts.get("shfl", 0)

    def passes_l1(line: dict) -> int:
        kept = line["class"] == "ldg" or (line["class"] == "cpasync" and ".ca." in line["text"])
        return 0 if kept else line["sectors"] * SECTOR

    sectors = total(lambda r: of_lines(r, GLOBAL, lambda x: x["sectors"]))
    kinds = {kind for run in runs for kind in run.flops}
    return Counts(
        kernel=runs[0].kernel,
        target=target,
        grid=grid,
        programs=len(runs),
        **{pipe: total(lambda r, pipe=pipe: r.pipes.get(pipe, 0)) for pipe in ("tensor", "fma", "alu", "mufu", "lsu")},
        issue=total(lambda r: sum(r.pipes.values()) - r.pipes.get("move", 0)),
        flops={kind: total(lambda r, kind=kind: r.flops.get(kind, 0)) for kind in sorted(kinds)},
        requests=total(lambda r: of_lines(r, GLOBAL, lambda x: x["requests"])),
        sectors=sectors,
        excess_sectors=total(lambda r: of_lines(r, GLOBAL, lambda x: x["sectors"] - x["ideal"])),
        wavefronts=total(wavefronts),
        conflicts=total(lambda r: of_lines(r, SHARED, lambda x: x["waves"] - x["phases"])),
        l2_bytes=sectors * SECTOR,
        l2_least=total(lambda r: of_lines(r, GLOBAL, passes_l1)),
        dram_bytes=_bytes({v for r in runs for v in r.reads}) + _bytes({v for r in runs for v in r.writes}),
        barriers=round(max(r.pipes.get("barrier", 0) / r.warps for r in runs)),
        errors=tuple(str(e) for r in runs for e in r.errors if e.kind not in LEFT_TO_PTXAS),
    )


GLOBAL = ("ldg", "stg", "cpasync", "atom", "bulk")
SHARED = ("lds", "sts", "ldmatrix", "stmatrix", "cpasync")


def _bytes(views: Iterable[View]) -> int:
    """Different bytes of ``views``; those of one storage that overlap in part hold no more than it does."""
    of: dict[int, list[View]] = {}
    for view in views:
        of.setdefault(view.storage, []).append(view)
    return sum(min(sum(v.bytes for v in mine), mine[0].capacity) for mine in of.values())
