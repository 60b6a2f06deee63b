"""What an op's call costs the host above its launch, on any machine: ``python -m benchmarks.calls SECONDS``.

The public function, called with a bench's arguments, runs as it does on a GPU, through its checks, autograd and the
dispatcher, but in place of the launcher stands the op's shape function, which allocates the outputs and launches
nothing. What that takes when called by itself, on the same tensors as they are below autograd, is taken off. So the
figure is of the way to the launcher and back: it leaves out the launch, the allocations, and the switch to the tensor's
device, which only a GPU has.

A call without gradients that is like one before takes a shorter way (``vitkernels/ops/_known.py``): "no grad" is of
such calls, as a model's are from its third layer or batch on, "no grad at a new shape" of calls unlike any before.

Timed are undisturbed samples alone, as :mod:`benchmarks.run` tells them. An interpreter that was compiled without
profile-guided optimization, as pyenv's is by default, takes about 30 % longer than a distribution's.

Beside the ops stands the least that the way costs on this machine: an op of one tensor, without checks, through
PyTorch's dispatcher.

Runs in a process of its own, as it replaces the ops' implementations. A GPU is emulated there, which is what makes a
CPU take this way; no kernel runs.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import inspect
import json
import os
import statistics
import sys
from collections.abc import Callable, Mapping

os.environ["VITKERNELS_BACKEND"] = "emulated"

import torch

from benchmarks.ops import OpBench, all_ops
from benchmarks.ops.measure import leaves_of
from benchmarks.run import sample_undisturbed, summary
from benchmarks.schema import OURS, Times
from vitkernels import ops
from vitkernels.ops import _known
from vitkernels.ops._registry import OPS
from vitkernels.testing.cases import Case

# So small that what PyTorch itself computes outside the launchers, such as the sum of a bias's gradient, hardly counts.
SMALL = (
    Case("small", 1, 32, 16, 1, 32, 2, 64),
    Case("small, RMSNorm and packed gate", 1, 32, 16, 1, 32, 2, 64, "silu", norm="rms_norm", mlp="packed"),
)
MODES = {"no grad": 0.5, "no grad at a new shape": 0.25, "forward and backward": 0.25}  # with their share of the time


def main(seconds: float) -> None:
    """Print, by provider, op and mode, the microseconds of a call above its launch, as JSON."""
    torch.set_num_threads(1)
    library = torch.library.Library("vitkernels", "IMPL")
    recorder = Recorder()
    for name, implementations in OPS.items():
        stand_in = implementations.kernels["cpu"] = recorder.stand_in(implementations.fake)
        library.impl(name, stand_in, "CPU", allow_override=True)
    for name in ops.__all__:
        if inspect.isfunction(getattr(ops, name)):
            setattr(ops, name, recorder.noting(getattr(ops, name)))
    benches = all_ops()
    if not ops.uses_kernels(torch.empty(1)):
        raise RuntimeError("the ops do not take the way to their kernels: is Triton installed?")
    gc.disable()
    own = torch.library.Library("vitkernels_benchmarks", "DEF")
    costs = {}
    for mode, share in MODES.items():
        with torch.set_grad_enabled(mode == "forward and backward"):
            pieces = {"torch, an op without checks": an_op_without_checks(own)} if mode == "no grad" else {}
            pieces |= {f"{OURS}, {name}": piece(bench, mode, recorder) for name, bench in benches.items()}
            costs |= {f"{name}, {mode}": times for name, times in beyond(pieces, share * seconds).items()}
    print(json.dumps({name: dataclasses.asdict(times) for name, times in costs.items()}))


class Recorder:
    """Notes a bench's call of the op, and, while it is told to, the calls that reach the launchers."""

    def __init__(self):
        self.op: Callable[[], object] | None = None
        self.calls: list[Callable[[], object]] | None = None

    def noting(self, op: Callable) -> Callable:
        def run(*args, **kwargs):
            self.op = functools.partial(op, *args, **kwargs)
            return self.op()

        return run

    def stand_in(self, fake: Callable) -> Callable:
        def run(*args):
            if self.calls is not None:
                detached = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
                self.calls.append(lambda: fake(*detached))
            return fake(*args)

        return run


def an_op_without_checks(library: torch.library.Library) -> tuple[Callable, Callable]:
    """Return the call of an op of one tensor, which allocates its output and checks nothing, and that allocation."""
    library.impl(library.define("empty(Tensor x) -> Tensor"), torch.empty_like, "CPU")
    op = torch.ops.vitkernels_benchmarks.empty.default
    x = torch.empty(1)
    return lambda: op(x), lambda: torch.empty_like(x)


def piece(bench: OpBench, mode: str, recorder: Recorder) -> tuple[Callable, Callable]:
    """Return ``bench``'s call, and what runs the shape functions that it reaches."""
    case = next(case for case in SMALL if bench.applies(case))
    tensors = bench.inputs(case, torch.float32, torch.device("cpu"))
    outputs = bench.ours(case, **tensors)
    op = call = recorder.op
    if mode == "forward and backward":
        upstreams = [torch.ones_like(o) for o in (outputs if isinstance(outputs, tuple) else (outputs,))]
        leaves = list(leaves_of(tensors).values())

        def call():
            return torch.autograd.grad(op(), leaves, upstreams)

    for _ in range(3):
        call()
    recorder.calls = reached = []
    call()
    recorder.calls = None

    def launch():
        for function in reached:
            function()

    if mode == "no grad at a new shape":
        return forgetting(call), forgetting(launch)
    return call, launch


def forgetting(function: Callable) -> Callable:
    """Return ``function`` with all known calls forgotten before it."""

    def run():
        _known.forget()
        return function()

    return run


def beyond(pieces: Mapping[str, tuple[Callable, Callable]], seconds: float) -> dict[str, Times]:
    """Time all ``pieces`` in turns for about ``seconds``: of each the microseconds of a call beyond its launch."""
    variants = {(name, part): both[part] for name, both in pieces.items() for part in (0, 1)}
    samples = sample_undisturbed(variants, seconds)
    launch_us = {name: statistics.median(samples[name, 1]) for name in pieces}
    return {name: summary([taken - launch_us[name] for taken in samples[name, 0]]) for name in pieces}


if __name__ == "__main__":
    main(float(sys.argv[1]))
