"""All timing: how a call is timed on a CPU and on a GPU, how rivals take turns, and when the time is up.

Rivals are timed in turns, one sample each a round, in an order that rotates, so that a machine that slows down slows
all of them. A sample on the CPU is as many calls as a millisecond holds. On a GPU it is one call between two events
on a cold L2 cache, where a call takes 50 µs or more; below that as many calls as a millisecond holds, replayed from
one CUDA graph, over copies of the inputs that L2 cannot hold together: else launches would be measured. The time
until a call returns is taken beside it.

What Python itself costs, a few microseconds, a neighbour on the same core makes longer by a half, for a millisecond or
a second. A fixed loop, timed between short samples, tells: kept are those samples beside which it ran undisturbed.
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

SHORT_US = 50.0  # below, the gaps between launches would count
SAMPLE_S = 1e-3
SHORT_SAMPLE_S = 2e-4  # neighbours leave a core alone for a few tenths of a millisecond
BURST = 16  # samples of one in a row: after another's, code and data come from farther away
PACE_STEPS = 500  # 15 µs or so
UNDISTURBED = 1.1  # times the fastest of the fixed loops: alone they lie within 1.05, disturbed beyond 1.3
MIN_ROUNDS = 5
MAX_ROUNDS = 200


@dataclasses.dataclass(frozen=True)
class Sample:
    """Microseconds a call: on the device (a CPU's wall clock), and until the call returned (None on a CPU)."""

    device: float
    host: float | None


class CpuTimer:
    """Times calls by ``clock``, in seconds; a sample takes ``sample_s`` of them, or one call."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter, sample_s: float = SAMPLE_S):
        self.clock, self.sample_s = clock, sample_s

    def scope(self) -> contextlib.AbstractContextManager:
        """Return where everything to be timed runs."""
        return contextlib.nullcontext()

    def sampler(self, function: Callable[[], object], *, capture: bool = False) -> Callable[[], Sample]:
        """Return what takes one sample of ``function``, which has run before."""
        once = self._seconds(function, 1)
        if once < self.sample_s:  # a first call may take ten times as long
            once = min(once, self._seconds(function, 1), self._seconds(function, 1))
        calls = max(1, min(10_000, math.ceil(self.sample_s / max(once, 1e-9))))
        return lambda: Sample(self._seconds(function, calls) / calls * 1e6, None)

    def _seconds(self, function: Callable[[], object], calls: int) -> float:
        start = self.clock()
        for _ in range(calls):
            function()
        return self.clock() - start


class GpuTimer:
    """Times calls on the current CUDA (or ROCm) device by its own events."""

    clock = staticmethod(time.perf_counter)

    def __init__(self):
        self.flush = torch.empty(2 * l2_bytes(), dtype=torch.int8, device="cuda")
        self.stream = torch.cuda.Stream()

    def scope(self) -> contextlib.AbstractContextManager:
        """Return where everything to be timed runs: one stream, for a backward is captured on its forward's alone."""
        self.stream.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self.stream)

    def sampler(self, function: Callable[[], object], *, capture: bool = False) -> Callable[[], Sample]:
        """Return what takes one sample of ``function``, which has run before.

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
    """Bytes of the current GPU's L2 cache; 128 MiB where the driver does not tell."""
    return getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0) or 128 << 20


def rotated(functions: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """Return a function that calls the next of ``functions`` each time: one a copy of the inputs."""
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
        The samples of each, those of one round at the same place.
    """
    try:
        samplers = {name: timer.sampler(function, capture=capture) for name, function in variants.items()}
    except RuntimeError:
        if not capture:
            raise
        # One of them does what cannot be captured: then none is, so that all are timed alike.
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
        variants: What is timed, by name.
        seconds: To spend on all together.
        clock: In seconds.
        pace: The fixed piece of Python that is timed between samples; a loop of :data:`PACE_STEPS` additions.

    Returns:
        Of each the microseconds a call, in the samples before and after which ``pace`` took at most
        :data:`UNDISTURBED` times its fastest of the run; where those are fewer than :data:`MIN_ROUNDS`, in the least
        disturbed.
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
    limit = UNDISTURBED * paces[len(paces) // 50]  # the fastest of all may be no loop, but a clock that was set
    kept = {}
    for name, pairs in samples.items():
        pairs.sort()
        quiet = sum(slowest <= limit for slowest, _ in pairs)
        kept[name] = [taken for _, taken in pairs[: max(quiet, MIN_ROUNDS)]]
    return kept


def measure(
    variants: Mapping[str, Callable[[], object]], timer: CpuTimer | GpuTimer, seconds: float, *, capture: bool = False
) -> dict[str, tuple[Times, Times | None]]:
    """Time ``variants`` in turns: of each the time on the device and, on a GPU, until the call returned."""
    if not variants:
        return {}
    measured = {}
    for name, samples in sample_in_turns(variants, timer, seconds, capture=capture).items():
        host = None if samples[0].host is None else summary([s.host for s in samples])
        measured[name] = summary([s.device for s in samples]), host
    return measured


@dataclasses.dataclass
class Budget:
    """Seconds to spend, by ``clock``, from the moment it is made; ``reserve`` of them are kept for what comes last."""

    seconds: float
    reserve: float = 0.0
    clock: Callable[[], float] = time.perf_counter

    def __post_init__(self):
        self.start = self.clock()

    def spent(self) -> float:
        return self.clock() - self.start

    def left(self) -> float:
        return self.seconds - self.reserve - self.spent()
