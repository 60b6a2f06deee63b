"""All timing: of calls on a CPU and on a GPU, of rivals in turns, and the budget of a run.

Rivals are timed in turns, one sample each per round, in a rotating order, so that a machine that slows down slows all
of them. On a CPU, a sample is as many calls as fit in a millisecond. On a GPU, a sample of a call of 50 µs or more is
one call between two events, with a cold L2 cache. Of shorter calls the gaps between launches would be measured: there a
sample is a millisecond of calls, replayed from one CUDA graph, over copies of the inputs that do not fit in L2
together. The time until a call returns (host time) is measured as well.

Another process on the same core makes Python's own few microseconds half longer, for a millisecond or a second. To
detect this, a fixed loop is timed between short samples: only samples next to undisturbed loops count.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from benchmarks.schema import Times

SHORT_US = 50.0  # for shorter calls the gaps between launches would count
SAMPLE_S = 1e-3
SHORT_SAMPLE_S = 2e-4  # other processes leave a core alone for a few tenths of a millisecond
BURST = 16  # samples of one variant in a row: after another variant, caches do not hold its code and data
PACE_STEPS = 500  # about 15 µs
UNDISTURBED = 1.1  # × the fastest fixed loop: undisturbed loops take up to 1.05 ×, disturbed ones more than 1.3 ×
MIN_ROUNDS = 5
MAX_ROUNDS = 200


@dataclasses.dataclass(frozen=True)
class Sample:
    """Microseconds per call: on the device (on a CPU: wall clock), and until the call returned (None on a CPU)."""

    device: float
    host: float | None


class CpuTimer:
    """Times calls with ``clock`` (in seconds); a sample takes ``sample_s`` seconds, or one call if that is longer."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter, sample_s: float = SAMPLE_S):
        self.clock, self.sample_s = clock, sample_s

    def scope(self) -> contextlib.AbstractContextManager:
        """Return the context in which everything to be timed must run."""
        return contextlib.nullcontext()

    def sampler(self, function: Callable[[], object], *, capture: bool = False) -> Callable[[], Sample]:
        """Return a function that takes one sample of ``function``, which must have run before."""
        once = self._seconds(function, 1)
        if once < self.sample_s:  # the first call may take ten times as long as later ones
            once = min(once, self._seconds(function, 1), self._seconds(function, 1))
        calls = max(1, min(10_000, math.ceil(self.sample_s / max(once, 1e-9))))
        return lambda: Sample(self._seconds(function, calls) / calls * 1e6, None)

    def _seconds(self, function: Callable[[], object], calls: int) -> float:
        start = self.clock()
        for _ in range(calls):
            function()
        return self.clock() - start


class GpuTimer:
    """Times calls on the current CUDA (or ROCm) device with the device's events."""

    clock = staticmethod(time.perf_counter)

    def __init__(self):
        self.flush = torch.empty(2 * l2_bytes(), dtype=torch.int8, device="cuda")
        self.stream = torch.cuda.Stream()

    def scope(self) -> contextlib.AbstractContextManager:
        """Return the context, one stream, for all timed work: a backward is captured on its forward's stream only."""
        self.stream.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self.stream)

    def sampler(self, function: Callable[[], object], *, capture: bool = False) -> Callable[[], Sample]:
        """Return a function that takes one sample of ``function``, which must have run before.

        Args:
            function: Launches work on the current stream.
            capture: Whether a short ``function`` may be timed from a CUDA graph.
        """
        once = min(self._events(function).device for _ in range(3))
        if not capture or once >= SHORT_US:
            return lambda: self._events(function)
        calls = math.ceil(SAMPLE_S * 1e6 / max(once, 1.0))
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=self.stream):
            for _ in range(calls):
                function()

        def sample() -> Sample:
            host = self._events(function).host
            return Sample(self._events(graph.replay).device / calls, host)

        return sample

    def _events(self, function: Callable[[], object]) -> Sample:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        self.flush.zero_()
        start.record()
        before = self.clock()
        function()
        host = self.clock() - before
        end.record()
        torch.cuda.synchronize()
        return Sample(start.elapsed_time(end) * 1e3, host * 1e6)


def l2_bytes() -> int:
    """Return the bytes of the first GPU's L2 cache, or 128 MiB if unknown."""
    return getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0) or 128 << 20


def rotated(functions: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """Return a function whose every call calls the next of ``functions``, each of which has its own inputs."""
    following = itertools.cycle(functions)
    return lambda: next(following)()


def summary(samples: Sequence[float]) -> Times:
    """Return the median and the spread of ``samples``."""
    ordered = sorted(samples)

    def at(fraction: float) -> float:
        place = fraction * (len(ordered) - 1)
        low = math.floor(place)
        high = math.ceil(place)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    return Times(statistics.median(ordered), at(0.2), at(0.8), len(ordered))


def sample_in_turns(
    variants: Mapping[str, Callable[[], object]], timer: CpuTimer | GpuTimer, seconds: float, *, capture: bool = False
) -> dict[str, list[Sample]]:
    """Time ``variants`` in turns for about ``seconds``, and at least :data:`MIN_ROUNDS` rounds.

    Returns:
        The samples by variant; samples of the same round have the same index.
    """
    try:
        samplers = {name: timer.sampler(function, capture=capture) for name, function in variants.items()}
    except RuntimeError:
        if not capture:
            raise
        # One variant cannot be captured: capture none, so that all are timed in the same way.
        samplers = {name: timer.sampler(function) for name, function in variants.items()}
    samples: dict[str, list[Sample]] = {name: [] for name in variants}
    names = list(variants)
    end = timer.clock() + seconds
    for turn in range(MAX_ROUNDS):
        if turn >= MIN_ROUNDS and timer.clock() >= end:
            break
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(samplers[name]())
    return samples


def _additions() -> int:
    total = 0
    for i in range(PACE_STEPS):
        total += i
    return total


def sample_undisturbed(
    variants: Mapping[str, Callable[[], object]],
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
    pace: Callable[[], object] = _additions,
) -> dict[str, list[float]]:
    """Time short pieces of Python in turns for about ``seconds``, and at least :data:`MIN_ROUNDS` rounds.

    Args:
        variants: Functions to time, by name.
        seconds: Time for all of them together.
        clock: Returns seconds.
        pace: The fixed loop that is timed between samples, by default :data:`PACE_STEPS` additions.

    Returns:
        The microseconds per call of each variant's undisturbed samples: ``pace``, timed before and after them, took at
        most :data:`UNDISTURBED` times its fastest (2nd percentile) of the run. If there are fewer than
        :data:`MIN_ROUNDS`, the least disturbed samples.
    """
    timer = CpuTimer(clock, SHORT_SAMPLE_S)
    samplers = {name: timer.sampler(function) for name, function in variants.items()}
    beside = CpuTimer(clock, 0.0).sampler(pace)
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    before = beside().device
    paces = [before]
    end = clock() + seconds
    for turn in itertools.count():
        if turn >= MIN_ROUNDS and clock() >= end:
            break
        for name, sampler in samplers.items():
            for _ in range(BURST):
                taken = sampler().device
                after = beside().device
                samples[name].append((max(before, after), taken))
                paces.append(after)
                before = after
    paces.sort()
    limit = UNDISTURBED * paces[len(paces) // 50]  # not the minimum: it may come from a clock adjustment
    kept = {}
    for name, pairs in samples.items():
        pairs.sort()
        quiet = sum(slowest <= limit for slowest, _ in pairs)
        kept[name] = [taken for _, taken in pairs[: max(quiet, MIN_ROUNDS)]]
    return kept


def measure(
    variants: Mapping[str, Callable[[], object]], timer: CpuTimer | GpuTimer, seconds: float, *, capture: bool = False
) -> dict[str, tuple[Times, Times | None]]:
    """Time ``variants`` in turns; return the times on the device and, on a GPU, until the call returned."""
    if not variants:
        return {}
    measured = {}
    for name, samples in sample_in_turns(variants, timer, seconds, capture=capture).items():
        host = None if samples[0].host is None else summary([s.host for s in samples])
        measured[name] = summary([s.device for s in samples]), host
    return measured


@dataclasses.dataclass
class Budget:
    """A time budget in seconds that starts when it is created; ``reserve`` seconds are kept for the final work."""

    seconds: float
    reserve: float = 0.0
    clock: Callable[[], float] = time.perf_counter

    def __post_init__(self):
        self.start = self.clock()

    def spent(self) -> float:
        return self.clock() - self.start

    def left(self) -> float:
        return self.seconds - self.reserve - self.spent()
