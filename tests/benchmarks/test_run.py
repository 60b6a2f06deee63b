"""The timer: what is twice as slow reads twice, whatever the machine does meanwhile."""

import contextlib
import time
import types

import pytest

from benchmarks import run
from benchmarks.run import MIN_ROUNDS, Budget, CpuTimer, measure, rotated, sample_in_turns, sample_undisturbed, summary


def test_twice_as_slow_reads_twice(clock):
    measured = measure({"a": clock.work(3e-3), "b": clock.work(6e-3)}, CpuTimer(clock), 1.0)
    (a, host), (b, _) = measured["a"], measured["b"]
    assert (a.median, b.median) == (pytest.approx(3000), pytest.approx(6000))
    assert a.p20 == pytest.approx(a.p80)
    assert host is None


def test_a_machine_that_slows_down_slows_all_alike(make_clock):
    clock = make_clock(drift=0.5)
    measured = measure({"a": clock.work(1e-3), "b": clock.work(2e-3)}, CpuTimer(clock), 0.5)
    assert measured["a"][0].p80 > 1.1 * measured["a"][0].p20, "the machine did not slow down: this proves nothing"
    assert measured["b"][0].median / measured["a"][0].median == pytest.approx(2, rel=0.01)


def test_twice_as_slow_reads_twice_by_the_real_clock():
    def sleep(seconds):
        return lambda: time.sleep(seconds)

    measured = measure({"a": sleep(0.02), "b": sleep(0.04)}, CpuTimer(), 1.0)
    assert measured["b"][0].p20 / measured["a"][0].p20 == pytest.approx(2, rel=0.1)


def test_short_calls_are_timed_together(clock):
    calls = []
    work = clock.work(1e-6)
    sample = CpuTimer(clock).sampler(lambda: (calls.append(1), work()))
    calls.clear()
    assert sample().device == pytest.approx(1.0)
    assert len(calls) == pytest.approx(1000, rel=0.01)


def test_rivals_take_turns_in_an_order_that_rotates(clock):
    order = []

    def variant(name):
        work = clock.work(1e-2)
        return lambda: (order.append(name), work())

    sample_in_turns({name: variant(name) for name in "abc"}, CpuTimer(clock), 0.0)
    assert "".join(order[3:]) == "abcbcacababcbca"  # after one call each that tells how long a call is
    assert len(order) == 3 + 3 * MIN_ROUNDS


class Disturbed:
    """A clock of a machine on which all work takes half as long again in ``share`` of each 10 ms."""

    def __init__(self, share):
        self.now, self.share = 0.0, share

    def __call__(self):
        return self.now

    def work(self, seconds):
        def run():
            self.now += seconds * (1.5 if self.now % 10e-3 < self.share * 10e-3 else 1.0)

        return run


@pytest.mark.parametrize("share", [0.0, 0.6, 0.9])
def test_what_a_neighbour_disturbs_is_left_out(share):
    clock = Disturbed(share)
    pieces = {"a": clock.work(10e-6), "b": clock.work(20e-6)}
    times = {n: summary(s) for n, s in sample_undisturbed(pieces, 2.0, clock, clock.work(15e-6)).items()}
    for name, us in (("a", 10.0), ("b", 20.0)):
        assert (times[name].p20, times[name].p80) == (pytest.approx(us, rel=0.01), pytest.approx(us, rel=0.06))
        assert times[name].samples >= 50
    if share:
        sampler = CpuTimer(clock, 2e-4).sampler(pieces["a"])
        plain = summary([sampler().device for _ in range(5000)])
        assert plain.p80 == pytest.approx(15.0), "the neighbour disturbed nothing: this proves nothing"


def test_where_nothing_is_undisturbed_the_least_disturbed_is_kept(clock):
    paces = iter(range(10**6))

    def pace():
        clock.now += 1e-6 * 2.0 ** next(paces)  # each takes twice as long as the one before

    kept = sample_undisturbed({"a": clock.work(1e-3)}, 0.0, clock, pace)["a"]
    assert len(kept) == MIN_ROUNDS


@pytest.fixture
def gpu(monkeypatch, clock):
    """A stand-in for a GPU: what is launched takes its time once, in order; a launch takes the host 5 µs."""

    class Gpu:
        done, recording, flushed = 0.0, None, 0

        def launch(self, seconds):
            def run():
                if self.recording is not None:
                    self.recording.append(seconds)
                    return
                clock.now += 5e-6
                self.done = max(self.done, clock.now) + seconds

            return run

        def replay(self, graph):
            clock.now += 5e-6
            self.done = max(self.done, clock.now) + sum(graph.work)

    here = Gpu()

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = max(here.done, clock.now)

        def elapsed_time(self, other):
            return (other.at - self.at) * 1e3

    class Graph:
        def __init__(self):
            self.work = []

        def replay(self):
            here.replay(self)

    @contextlib.contextmanager
    def capture(graph, stream):
        assert stream == "the stream"
        here.recording = graph.work
        yield
        here.recording = None

    def synchronize():
        clock.now = max(clock.now, here.done)

    for name, fake in {"Event": Event, "CUDAGraph": Graph, "graph": capture, "synchronize": synchronize}.items():
        monkeypatch.setattr(run.torch.cuda, name, fake)
    timer = object.__new__(run.GpuTimer)
    timer.clock, timer.stream = clock, "the stream"
    timer.flush = types.SimpleNamespace(zero_=here.launch(200e-6))
    here.timer = timer
    return here


def test_a_gpu_is_timed_by_its_own_clock(gpu):
    measured = measure({"a": gpu.launch(1e-3), "b": gpu.launch(2e-3)}, gpu.timer, 0.5)
    (a, host), (b, _) = measured["a"], measured["b"]
    assert (a.median, b.median) == (pytest.approx(1000), pytest.approx(2000)), "neither the flush nor the host counts"
    assert host.median == pytest.approx(5.0)


@pytest.mark.parametrize("us", [2.0, 20.0])
def test_short_work_is_timed_from_a_graph(gpu, us):
    twice = (lambda call: lambda: (call(), call()))(gpu.launch(us / 2 * 1e-6))
    measured = measure({"a": twice, "b": gpu.launch(2 * us * 1e-6)}, gpu.timer, 0.5, capture=True)
    assert measured["a"][0].median == pytest.approx(us, rel=0.01)
    assert measured["b"][0].median == pytest.approx(2 * us, rel=0.01)
    assert measured["a"][1].median == pytest.approx(10.0), "two launches"


def test_where_one_cannot_be_captured_none_is(clock):
    asked = []

    class Timer(CpuTimer):
        def sampler(self, function, *, capture=False):
            asked.append(capture)
            if capture and len(asked) == 2:
                raise RuntimeError("operation not permitted when stream is capturing")
            return super().sampler(function)

    measured = measure({"a": clock.work(1.0), "b": clock.work(2.0)}, Timer(clock), 1.0, capture=True)
    assert asked == [True, True, False, False]
    assert measured["b"][0].median == pytest.approx(2e6)


def test_time_is_kept(clock):
    measure({"a": clock.work(1e-2), "b": clock.work(1e-2)}, CpuTimer(clock), 1.0)
    assert clock.now == pytest.approx(1.0, abs=0.05)


def test_summary():
    assert summary([5, 1, 4, 2, 3]) == summary([1, 2, 3, 4, 5])
    times = summary(range(11))
    assert (times.median, times.p20, times.p80, times.samples) == (5, 2, 8, 11)
    assert summary([7.0]).p80 == 7.0


def test_rotated_inputs():
    calls = []
    function = rotated([lambda: calls.append("a"), lambda: calls.append("b")])
    for _ in range(3):
        function()
    assert calls == ["a", "b", "a"]


def test_budget(clock):
    budget = Budget(10.0, reserve=1.0, clock=clock)
    clock.now = 4.0
    assert (budget.spent(), budget.left()) == (4.0, 5.0)
