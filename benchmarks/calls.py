"""What an op's call costs the host above its launch, on any machine: ``python -m benchmarks.calls SECONDS``.

The public function runs as it does on a GPU, through its checks, autograd and the dispatcher, but in place of the
launcher stands the op's shape function, which allocates the outputs and launches nothing. What that takes when called
by itself, with the same arguments, is taken off. So the figure is of the way to the launcher and back: it leaves out
the launch, the allocations, and the switch to the tensor's device, which only a GPU has.

Runs in a process of its own, as it replaces the ops' implementations. The interpreter is on there, which is what makes
a CPU take this way; no kernel runs.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import sys
from collections.abc import Callable

os.environ["TRITON_INTERPRET"] = "1"

import torch

from benchmarks.ops import OpBench, all_ops
from benchmarks.ops.measure import leaves_of
from benchmarks.run import CpuTimer, sample_in_turns, summary
from vitkernels import ops
from vitkernels.ops._registry import OPS
from vitkernels.testing.cases import Case

# So small that what PyTorch itself computes outside the launchers, such as the sum of a bias's gradient, hardly counts.
SMALL = (
    Case("small", 1, 32, 16, 1, 32, 2, 64),
    Case("small, RMSNorm and packed gate", 1, 32, 16, 1, 32, 2, 64, "silu", norm="rms_norm", mlp="packed"),
)
MODES = ("no grad", "forward and backward")


def main(seconds: float) -> None:
    """Print, by op and mode, the microseconds of a call above its launch, as JSON."""
    torch.set_num_threads(1)
    library = torch.library.Library("vitkernels", "IMPL")
    recorder = Recorder()
    for name, implementations in OPS.items():
        library.impl(name, recorder.stand_in(implementations.fake), "CPU", allow_override=True)
    benches = all_ops()
    if not ops.uses_kernels(torch.empty(1)):
        raise RuntimeError("the ops do not take the way to their kernels: is Triton installed?")
    gc.disable()
    costs = {
        f"{name}, {mode}": dataclasses.asdict(cost(bench, mode, recorder, seconds / len(benches) / len(MODES)))
        for name, bench in benches.items()
        for mode in MODES
    }
    print(json.dumps(costs))


class Recorder:
    """Notes the calls that reach the launchers, while it is told to."""

    def __init__(self):
        self.calls: list[Callable[[], object]] | None = None

    def stand_in(self, fake: Callable) -> Callable:
        def run(*args):
            if self.calls is not None:
                self.calls.append(lambda: fake(*args))
            return fake(*args)

        return run


def cost(bench: OpBench, mode: str, recorder: Recorder, seconds: float):
    """Time ``bench``'s call and the shape functions that it reaches, in turns, and return the difference."""
    case = next(case for case in SMALL if bench.applies(case))
    tensors = bench.inputs(case, torch.float32, torch.device("cpu"))
    if mode == "no grad":

        def call():
            return bench.ours(case, **tensors)
    else:
        outputs = bench.ours(case, **tensors)
        upstreams = [torch.ones_like(o) for o in (outputs if isinstance(outputs, tuple) else (outputs,))]
        leaves = list(leaves_of(tensors).values())

        def call():
            return torch.autograd.grad(bench.ours(case, **tensors), leaves, upstreams)

    with torch.set_grad_enabled(mode != "no grad"):
        call()
        recorder.calls = reached = []
        call()
        recorder.calls = None

        def launch():
            with torch.no_grad():
                for function in reached:
                    function()

        samples = sample_in_turns({"call": call, "launch": launch}, CpuTimer(), seconds)
    return summary([a.device - b.device for a, b in zip(samples["call"], samples["launch"], strict=True)])


if __name__ == "__main__":
    main(float(sys.argv[1]))
