"""A clock that tests move by hand, and sessions that run by it."""

from pathlib import Path

import pytest
import torch

from benchmarks.compete import Session
from benchmarks.environment import new_results
from benchmarks.run import Budget, CpuTimer


class Clock:
    """A clock that work moves; the machine gets ``drift`` times slower every second."""

    def __init__(self, drift: float = 0.0):
        self.now, self.drift = 0.0, drift

    def __call__(self) -> float:
        return self.now

    def work(self, seconds: float):
        def run():
            self.now += seconds * (1 + self.drift * self.now)

        return run


@pytest.fixture
def make_clock():
    return Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def session(clock) -> Session:
    """A session of 100 s by ``clock``."""
    cpu = torch.device("cpu")
    return Session(cpu, CpuTimer(clock), Budget(100.0, clock=clock), new_results("quick", 100.0, cpu))


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "results.json"
