"""Build the rivals at one workload, judge their results, and time the right ones in turns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from benchmarks.judge import Judgement
from benchmarks.run import Budget, CpuTimer, GpuTimer, measure
from benchmarks.schema import OURS, Results, Row
from vitkernels.tools.console import UserError, one_line

CPU_CACHE_BYTES = 128 << 20  # more than any CPU's cache holds
Judge = Callable[[Mapping[str, Tensor], Mapping[str, Tensor], Mapping[str, Tensor]], Judgement]


@dataclasses.dataclass(frozen=True)
class Entry:
    """A built rival: the function to time, its results, and its peak memory."""

    function: Callable[[], object]
    results: Mapping[str, Tensor]
    peak_bytes: int | None = None


@dataclasses.dataclass(frozen=True)
class Contender:
    """A rival to build: ``build`` runs it once or raises, and takes about ``seconds``."""

    build: Callable[[], Entry]
    seconds: float = 0.0


@dataclasses.dataclass
class Session:
    """The state that all parts of a run share."""

    device: torch.device
    timer: CpuTimer | GpuTimer
    budget: Budget
    results: Results
    cap: float = float("inf")  # the seconds spent at which the current job must end, so that others get their share

    def left(self) -> float:
        """Return the seconds that the current job may still take."""
        return min(self.budget.left(), self.cap - self.budget.spent())


def compete(
    session: Session,
    workload: Row,
    contenders: Mapping[str, Contender],
    *,
    truth: Mapping[str, Tensor],
    yardstick: Mapping[str, Tensor],
    judge: Judge,
    seconds: float,
    capture: bool = False,
) -> list[Row]:
    """Build, judge and time ``contenders``; return one row for each that can take part.

    Args:
        session: The run.
        workload: The workload; its provider is ignored.
        contenders: By provider, the most important first.
        truth: Results in fp64, by name.
        yardstick: Results of plain PyTorch in the workload's dtype.
        judge: Compares a contender's results with the yardstick and the truth.
        seconds: Time to measure each contender.
        capture: See the timers' ``sampler``.
    """
    rows: dict[str, Row] = {}
    ready: dict[str, Callable[[], object]] = {}
    for provider, contender in contenders.items():
        row = rows[provider] = dataclasses.replace(workload, provider=provider, figures={})
        if contender.seconds > 0 and contender.seconds + seconds * (len(ready) + 1) > session.left():
            row.status, row.reason = "skipped", "the budget has no time left to build it"
            continue
        try:
            entry = contender.build()
            verdict = judge(entry.results, yardstick, truth)
        except UserError as why:
            if provider == OURS:
                row.status, row.reason = "skipped", str(why)
            else:
                session.results.providers.setdefault(provider, str(why))
                del rows[provider]
        except torch.OutOfMemoryError:
            row.status, row.reason = "skipped", "out of memory on the device"
        except Exception as error:  # a rival's failure is a result, and must not end the run
            row.status, row.reason = "failed", f"{type(error).__name__}: {one_line(error)}"
        else:
            row.error, row.error_ratio, row.peak_bytes = verdict.error, verdict.ratio, entry.peak_bytes
            if verdict.right:
                ready[provider] = entry.function
            else:
                row.status, row.reason, row.peak_bytes = "wrong", verdict.reason, None
    seconds = max(0.0, min(seconds * len(ready), session.left()))
    for provider, (times, host) in measure(ready, session.timer, seconds, capture=capture).items():
        rows[provider].time, rows[provider].host = times, host
    for provider in ready:
        session.results.providers.pop(provider, None)
    # Data in a CPU's caches would beat the ceiling, which is measured from memory: give no roofline.
    in_cache = session.device.type == "cpu" and (workload.bytes or 0) < CPU_CACHE_BYTES
    compare(list(rows.values()), {} if in_cache else session.results.ceilings)
    return list(rows.values())


def compare(rows: list[Row], ceilings: Mapping[str, float]) -> None:
    """Fill in ``of_roofline`` and ``over_best_rival`` of the rows of one workload."""
    rivals = [row.time.median for row in rows if row.time is not None and not row.ours]
    for row in rows:
        if row.time is None:
            continue
        floor = floor_us(row, ceilings)
        row.of_roofline = floor / row.time.median if floor else None
        row.over_best_rival = min(rivals) / row.time.median if row.ours and rivals else None


def floor_us(row: Row, ceilings: Mapping[str, float]) -> float | None:
    """Return the lower bound in µs that the ceilings set for the row's FLOPs and bytes; None if unknown."""
    dtype = "bf16" if row.dtype == "amp" else row.dtype
    tflops, rate = ceilings.get(f"tflops {dtype}"), ceilings.get("gb_per_s")
    if row.flops is None or row.bytes is None or tflops is None or rate is None:
        return None
    return max(row.flops / tflops / 1e6, row.bytes / rate / 1e3)
