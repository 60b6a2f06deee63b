"""Count what a launch executes on an emulated GPU, and bound its time on a GPU from below.

A few programs of each launch run, with the configuration, code and addresses of the whole launch. Their counts are
scaled to the grid: the counts of N programs times grid / N. If the programs differ (edge tiles that read less, causal
rows that attend to fewer keys), this is an estimate, from programs spread evenly over the grid.

The instructions are PTX. ptxas changes them: it drops moves, folds address arithmetic and fuses. So the times of FMA,
ALU and issue slots are estimates, and may be longer than a GPU's. The bound uses only what ptxas can neither drop nor
speed up: tensor core products, special functions, wavefronts of shared memory, and bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator

import torch

from vitkernels.emulator.devices import DEVICES, RATES, WARPS_ISSUED, Rates
from vitkernels.emulator.execute import Run, View, execute
from vitkernels.emulator.launch import Emulation
from vitkernels.runtime import cdiv
from vitkernels.testing.cases import DTYPES, Case
from vitkernels.tools.aot.emulate import emulate
from vitkernels.tools.aot.launches import launches

SECTOR = 32  # bytes
PROGRAMS = 8  # most programs of a launch that run
# After so many warp instructions, no further program of the launch starts: long programs differ the least.
ENOUGH = 150_000

# The pipes whose times are lower bounds, and those whose times are estimates.
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
        tensor, fma, alu, mufu, lsu: Warp instructions by pipe (:mod:`vitkernels.emulator.pipes`).
        issue: All warp instructions but moves.
        flops: FLOPs of the tensor cores, padding included, by instruction and type.
        requests: Loads and stores of global memory, one per warp; cp.async, atomics and bulk copies too.
        sectors: 32-byte sectors that each request touches, summed over the requests.
        excess_sectors: Sectors beyond those that the requested bytes fill.
        wavefronts: Clocks of a multiprocessor's shared memory and L1: one for each wavefront of an access to shared
            memory, each shuffle, and each 128 bytes of global memory.
        conflicts: Wavefronts caused by bank conflicts.
        l2_bytes: Bytes of the sectors: the traffic of L2 if L1 never hits.
        l2_least: Bytes that bypass L1 in any case: stores, atomics and cp.async of 16 bytes.
        dram_bytes: Distinct bytes of the tensors read plus those of the tensors written: the traffic of DRAM if L2 is
            cold and every byte passes once.
        barriers: Barriers that a warp of a program waits at.
        operands: Wavefronts of wgmma's operands in shared memory, 128 bytes each; not among ``wavefronts``.
        errors: The emulator's findings.
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
    operands: int = 0
    errors: tuple[str, ...] = ()

    @property
    def sectors_per_request(self) -> float:
        """4 if 32 lanes access 4 contiguous bytes each, 16 if 16 bytes each, 32 if every lane hits another sector."""
        return self.sectors / self.requests if self.requests else 0.0

    @property
    def times_us(self) -> dict[str, float]:
        """Microseconds that each of :data:`BOUNDS` and :data:`ESTIMATES` takes at its full rate.

        For the pipes of a multiprocessor, this is the time of the busiest one, which gets ceil(grid / multiprocessors)
        programs. All multiprocessors share L2 and DRAM.
        """
        return self.times_on(RATES[self.target], DEVICES[self.target].num_sms)

    def times_on(self, rates: Rates, sms: int) -> dict[str, float]:
        """Return :attr:`times_us` of a GPU with these rates and as many multiprocessors."""
        share = cdiv(self.grid, sms) / self.grid  # the busiest multiprocessor's part of the launch
        clock = rates.clock * 1e3  # clocks per microsecond

        def clocks(count: float, a_clock: float) -> float:
            return count * share / a_clock / clock

        times = {
            "tensor": sum(n * share * sms / _tensor_rate(kind, rates) for kind, n in self.flops.items()),
            "mufu": clocks(self.mufu, rates.mufu / 32),
            "lsu": clocks(self.wavefronts, rates.shared / 128),
            "l2": self.l2_least / (rates.l2 * clock) if rates.l2 else 0.0,
            "dram": self.dram_bytes / (rates.dram * 1e6),
            "fma": clocks(self.fma, rates.fma / 32),
            "alu": clocks(self.alu, rates.alu / 32),
            "issue": clocks(self.issue, WARPS_ISSUED),
        }
        return {name: times[name] for name in (*BOUNDS, *ESTIMATES)}

    @property
    def bound_us(self) -> float:
        """Lower bound of the time on this GPU: the longest of :data:`BOUNDS`."""
        return max(self.times_us[name] for name in BOUNDS)

    @property
    def bound_by(self) -> str:
        return max(BOUNDS, key=self.times_us.__getitem__)

    @property
    def roofline_us(self) -> float:
        """Time of the products at the tensor cores' peak or of the bytes at DRAM's peak, whichever is longer."""
        products = sum(n / (RATES[self.target].tensor[kind.split()[1]] * 1e6) for kind, n in self.flops.items())
        return max(products, self.times_us["dram"])

    @property
    def roofline_share(self) -> float:
        """Roofline time over the bound; below 1 if another pipe or a partial last wave of programs takes longer."""
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


def _tensor_rate(kind: str, rates: Rates) -> float:
    """Return the FLOPs per microsecond of all multiprocessors together."""
    instruction, operands = kind.split()
    return rates.tensor[operands] * 1e6 * (rates.mma_sync if instruction == "mma" else 1)


def count_op(case: Case, op: str, dtype: str, target: str, kernel: str | None = None) -> list[Counts]:
    """Return what each launch of an op, forward and backward at ``case``, executes on ``target``.

    Args:
        case: The shapes.
        op: Key of :func:`vitkernels.tools.aot.launches.launches`.
        dtype: Name in :data:`vitkernels.testing.cases.DTYPES`.
        target: Name in :data:`vitkernels.emulator.devices.DEVICES`.
        kernel: Only kernels whose name contains this.
    """

    def fill(t: torch.Tensor) -> None:
        if t.dtype == torch.int32 and op == "attention_varlen":  # where packed images start; other indices are 0
            t.copy_(torch.arange(t.numel()) * case.tokens)
        elif t.dtype == torch.bool:  # masks: all True hides nothing
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
        launcher: Creates tensors on device ``cuda`` and calls a launcher of an op file.
        target: Name in :data:`vitkernels.emulator.devices.DEVICES`.
        kernel: Only kernels whose name contains this.
        fill: Fills a flat integer or bool tensor, whose values are 0 otherwise.
    """
    sampled = emulate(launcher, target, fill=fill, kind=_Sampling, kernel=kernel)
    return [_times_the_grid(runs, target) for runs in sampled]


@dataclasses.dataclass
class _Sampling(Emulation):
    """Runs single programs of each launch, and appends one list of runs per launch.

    Attributes:
        kernel: Only launches of kernels whose name contains this.
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
    """Yield up to ``most`` distinct programs of ``grid``, evenly spread however few the caller takes.

    They follow multiples of the golden ratio: in equal steps, all could be the same tile of their image or row.
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
        operands=total(lambda r: r.counts.get("wgmma.bytes", 0) / 128),
        errors=tuple(str(e) for r in runs for e in r.errors),
    )


GLOBAL = ("ldg", "stg", "cpasync", "atom", "bulk")
SHARED = ("lds", "sts", "ldmatrix", "stmatrix", "cpasync")


def _bytes(views: Iterable[View]) -> int:
    """Return the distinct bytes of ``views``, per storage at most its size, as views may overlap."""
    of: dict[int, list[View]] = {}
    for view in views:
        of.setdefault(view.storage, []).append(view)
    return sum(min(sum(v.bytes for v in mine), mine[0].capacity) for mine in of.values())
