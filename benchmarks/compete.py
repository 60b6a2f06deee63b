"""Rivals at one workload: built, judged, and, where right, timed in turns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from benchmarks.environment import Missing
from benchmarks.judge import Judgement
from benchmarks.run import Budget, CpuTimer, GpuTimer, measure
from benchmarks.schema import OURS, Results, Row
from vitkernels.console import one_line

CPU_CACHE_BYTES = 128 << 20  # more than this is surely not all in a cache
Judge = Callable[[Mapping[str, Tensor], Mapping[str, Tensor], Mapping[str, Tensor]], Judgement]


@dataclasses.dataclass(frozen=True)
class Entry:
    """A rival that is ready: what to time, what it computes, and the memory it peaked at."""

    function: Callable[[], object]
    results: Mapping[str, Tensor]
    peak_bytes: int | None = None


@dataclasses.dataclass(frozen=True)
class Contender:
    """A rival that may be built: ``build`` runs it once, or raises; ``seconds`` is what that takes, about."""

    build: Callable[[], Entry]
    seconds: float = 0.0


@dataclasses.dataclass
class Session:
    """What all parts of a run share."""

    device: torch.device
    timer: CpuTimer | GpuTimer
    budget: Budget
    results: Results
    cap: float = float("inf")  # where the work in hand must end, in seconds spent, so that others get their share

    def left(self) -> float:
        """Return the seconds that the work in hand may still take."""
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
    """Build, judge and time ``contenders``; return a row for each that is there.

    Args:
        session: The run.
        workload: What they compute; its provider is ignored.
        contenders: By provider, the worthiest first.
        truth: Results in fp64 by name.
        yardstick: Plain PyTorch's in the workload's dtype.
        judge: Compares results with both.
        seconds: For timing each of them.
        capture: As for the timer's ``sampler``.
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
        except Missing as why:
            if provider == OURS:
                row.status, row.reason = "skipped", str(why)
            else:
                session.results.providers.setdefault(provider, str(why))
                del rows[provider]
        except torch.OutOfMemoryError:
            row.status, row.reason = "skipped", "out of memory on the device"
        except Exception as error:  # a rival's failure is a finding, not the end of the run
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
    # What fits in a CPU's caches is faster than its memory, of which the ceiling is.
    in_cache = session.device.type == "cpu" and (workload.bytes or 0) < CPU_CACHE_BYTES
    compare(list(rows.values()), {} if in_cache else session.results.ceilings)
    return list(rows.values())


def compare(rows: list[Row], ceilings: Mapping[str, float]) -> None:
    """Fill in, for rows of one workload, each one's part of the roofline and how ours stand to the best rival."""
    rivals = [row.time.median for row in rows if row.time is not None and not row.ours]
    for row in rows:
        if row.time is None:
            continue
        floor = floor_us(row, ceilings)
        row.of_roofline = floor / row.time.median if floor else None
        row.over_best_rival = min(rivals) / row.time.median if row.ours and rivals else None


def floor_us(row: Row, ceilings: Mapping[str, float]) -> float | None:
    """Return the least time that the ceilings allow for the row's FLOPs and bytes, in µs."""
    dtype = "bf16" if row.dtype == "amp" else row.dtype
    tflops, rate = ceilings.get(f"tflops {dtype}"), ceilings.get("gb_per_s")
    if row.flops is None or row.bytes is None or tflops is None or rate is None:
        return None
    return max(row.flops / tflops / 1e6, row.bytes / rate / 1e3)
