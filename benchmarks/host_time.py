"""Time an op's call on the host, without a GPU: ``python -m benchmarks.host_time SECONDS``.

The public function runs with a bench's arguments as it does on a GPU: checks, autograd, the dispatcher, the plan of its
launches (``vitkernels/ops/_plan.py``) and Triton. Only the launch does nothing: a stand-in replaces Triton's driver. So
the figure leaves out the time of CUDA's driver and the switch to the tensor's device, which only a GPU needs. PyTorch's
own ops run on the CPU, on tensors so small that their work hardly counts.

Only undisturbed samples count; :mod:`benchmarks.run` says how they are found. A Python compiled without profile-guided
optimization, such as pyenv's default, takes about 30 % longer than a distribution's.

For comparison, the minimum for a call through PyTorch's dispatcher is measured: an op of one tensor without checks.

This module runs in a process of its own, as it replaces Triton's driver and the ops' CPU implementations.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import inspect
import json
import os
import sys
from collections.abc import Callable

os.environ["VITKERNELS_BACKEND"] = "emulated"  # otherwise ops on CPU tensors would run PyTorch's reference

import torch
import triton
from triton.backends.compiler import GPUTarget

from benchmarks.ops import STAGES, Tensors, all_ops
from benchmarks.ops.measure import leaves_of
from benchmarks.run import sample_undisturbed, summary
from benchmarks.schema import OURS
from vitkernels import accelerate, ops
from vitkernels.ops._plan import Plans
from vitkernels.ops._registry import OPS, PLANNED
from vitkernels.testing.cases import Case
from vitkernels.testing.workloads import find
from vitkernels.tools.console import import_timm

SMALL = (
    Case("small", 1, 32, 16, 1, 32, 2, 64),
    Case("small, RMSNorm and packed gate", 1, 32, 16, 1, 32, 2, 64, "silu", norm="rms_norm", mlp="packed"),
    *(dataclasses.replace(stage, batch=1) for stage in STAGES.values()),
)
CPU = torch.device("cpu")
MODES = ("no grad", "forward and backward")
# In bf16 a CPU takes 30 µs for a product even of this size.
DTYPE = torch.float32


class Nothing:
    """A driver for Triton whose launches do nothing."""

    @staticmethod
    def get_current_target():
        return GPUTarget("cuda", 90, 32)

    @staticmethod
    def get_current_device():
        return "nothing"

    @staticmethod
    def get_current_stream(device):
        return 0

    class utils:
        @staticmethod
        def load_binary(name, binary, shared, device):
            registers, spills, most_threads = 0, 0, 1024
            return None, None, registers, spills, most_threads

        @staticmethod
        def get_device_properties(device):
            return {"max_shared_mem": 227 << 10, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}

    @staticmethod
    def launcher_cls(src, metadata):
        return lambda *arguments: None


def main(seconds: float) -> None:
    """Print the microseconds per call, by provider, op and mode, as JSON."""
    torch.set_num_threads(1)
    triton.runtime.driver.set_active(Nothing)
    library = torch.library.Library("vitkernels", "IMPL")
    for name, implementations in OPS.items():
        implement = functools.partial(Plans(implementations.launcher), "nothing")
        library.impl(name, implement, "CPU", allow_override=True)
    for planned_function in PLANNED:
        planned_function.kernels["cpu"] = functools.partial(Plans(planned_function.__wrapped__), "nothing")
    noted = note_calls()
    own = torch.library.Library("vitkernels_benchmarks", "DEF")
    calls = {}
    for mode in MODES:
        for name, bench in all_ops().items():
            case = next(case for case in SMALL if bench.applies(case))
            tensors = bench.inputs(case, DTYPE, CPU)
            calls[f"{OURS}, {name}, {mode}"] = call_of(bench.ours, case, tensors, mode, noted)
        block = find("block", SMALL[0])
        tensors = block.draw(SMALL[0], DTYPE, CPU)
        calls[f"{OURS}, block, {mode}"] = call_of(block.function, SMALL[0], tensors, mode, noted)
        calls[f"{OURS}, accelerated timm Block, {mode}"] = call_of_timm_block(mode, swap=True)
        calls[f"torch, timm Block with the CPU's work, {mode}"] = call_of_timm_block(mode, swap=False)
    calls["torch, an op without checks, no grad"] = an_op_without_checks(own)
    gc.disable()
    samples = sample_undisturbed(calls, seconds)
    print(json.dumps({name: dataclasses.asdict(summary(samples[name])) for name in calls}))


def note_calls() -> list[Callable[[], object]]:
    """Return a list to which every later call of a public op is appended, so that it can be repeated."""
    noted: list[Callable[[], object]] = []

    def noting(op: Callable) -> Callable:
        def run(*args, **kwargs):
            noted.append(functools.partial(op, *args, **kwargs))
            return noted[-1]()

        return run

    for name in ops.__all__:
        if inspect.isfunction(getattr(ops, name)):
            setattr(ops, name, noting(getattr(ops, name)))
    return noted


def call_of(
    run: Callable, case: Case, tensors: Tensors, mode: str, noted: list[Callable[[], object]]
) -> Callable[[], object]:
    """Return the call of a public op that ``run(case, **tensors)`` makes, warmed up so that its plans exist."""
    with torch.set_grad_enabled(mode == "forward and backward"):
        outputs = run(case, **tensors)
    op = noted[-1]
    if mode == "no grad":
        return planned(torch.no_grad()(op))
    upstreams = [torch.ones_like(o) for o in (outputs if isinstance(outputs, tuple) else (outputs,))]
    leaves = list(leaves_of(tensors).values())
    return planned(lambda: torch.autograd.grad(op(), leaves, upstreams))


def call_of_timm_block(mode: str, swap: bool) -> Callable[[], object]:
    """Return a call of timm's ``Block`` of the size of the other calls, accelerated or not."""
    case = SMALL[0]
    timm = import_timm()
    block = timm.models.vision_transformer.Block(case.channels, case.heads, case.hidden / case.channels, qkv_bias=True)
    if swap:
        accelerate(block)
    x = torch.randn(case.batch, case.tokens, case.channels)
    if mode == "no grad":
        return planned(torch.no_grad()(functools.partial(block.eval(), x)))
    leaves, upstream = [x.requires_grad_(), *block.parameters()], torch.ones_like(x)
    return planned(lambda: torch.autograd.grad(block(x), leaves, upstream))


def planned(call: Callable[[], object]) -> Callable[[], object]:
    for _ in range(3):
        call()
    return call


def an_op_without_checks(library: torch.library.Library) -> Callable[[], object]:
    """Return the call of an op of one tensor that allocates its output and checks nothing."""
    library.impl(library.define("empty(Tensor x) -> Tensor"), torch.empty_like, "CPU")
    op = torch.ops.vitkernels_benchmarks.empty.default
    x = torch.empty(1)
    return lambda: op(x)


if __name__ == "__main__":
    main(float(sys.argv[1]))
