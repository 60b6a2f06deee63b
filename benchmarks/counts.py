"""Exact figures that need no GPU: FLOPs, bytes, passes over the activations, and the compiler's report."""

from __future__ import annotations

import collections
import contextlib
import io
from collections.abc import Iterator, Sequence

import torch

from benchmarks.environment import Missing
from benchmarks.ops import MODES, OpBench
from benchmarks.schema import OURS, Row
from vitkernels.ops import _triton
from vitkernels.testing.cases import Case
from vitkernels.tools.console import one_line

# The figures of the compiler's report that go into a run.
REPORTED = ("registers", "spilled_bytes", "shared_bytes", "blocks", "narrow_in_loop", "atomics")


def work_rows(benches: Sequence[OpBench], cases: Sequence[Case]) -> Iterator[Row]:
    """Count the FLOPs and the minimum bytes of every op at every case, in bf16."""
    for bench in benches:
        for case in filter(bench.applies, cases):
            for mode in MODES:
                flops, size = bench.flops(case, mode), bench.bytes(case, mode, 2)
                yield Row(
                    "counted", bench.name, case.name, "formula", mode, "bf16", case.batch, "counted",
                    flops=flops, bytes=size, figures={"flops_per_byte": flops / size},
                )  # fmt: skip


def traffic_rows(model: str) -> Iterator[Row]:
    """Count the passes of one of ``model``'s blocks over its activations: timm's plain, compiled and accelerated.

    Raises:
        UserError: Triton or timm cannot be imported.
    """
    require_compiler()
    from vitkernels.tools.aot.traffic import run_traffic

    with contextlib.redirect_stdout(io.StringIO()):
        counted = run_traffic(model)
    for mode, by_provider in counted.items():
        for provider, figures in by_provider.items():
            yield Row(
                "counted", "passes over the activations", model, provider, mode, "bf16", 32, "counted",
                figures={name: float(figures[name]) for name in ("reads", "writes", "least", "extra")},
            )  # fmt: skip


def compiler_rows(target: str, case: Case) -> Iterator[Row]:
    """Compile for ``target`` each kernel that a training step of ``case`` launches, and yield the compiler's figures.

    Raises:
        Missing: Triton cannot be imported.
    """
    require_compiler()
    from vitkernels.tools.aot import compile_launch, launches, read_kernel, trace

    for op, launcher in launches(case, torch.bfloat16).items():
        seen = collections.Counter()
        for launch in dict.fromkeys(trace(launcher, target)):
            seen[launch.name] += 1
            mode = op if seen[launch.name] == 1 else f"{op}, {seen[launch.name]}"
            row = Row("counted", launch.name, f"{case.name}, {target}", OURS, mode, "bf16", case.batch, "counted")
            try:
                report, _ = read_kernel(launch, compile_launch(launch))
                row.figures = {name: float(getattr(report, name)) for name in REPORTED}
            except Exception as error:  # any error of the compiler is a result about the kernel
                row.status, row.reason = "failed", f"{type(error).__name__}: {one_line(error)}"
            yield row


def require_compiler() -> None:
    """Raise unless Triton can be imported.

    Raises:
        Missing: Triton cannot be imported.
    """
    if not _triton.HAS_TRITON:
        raise Missing(f"Triton cannot be imported ({_triton.MISSING})")
