"""Measure an op at a case: ours, plain PyTorch, torch.compile, and other libraries that have it."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.compete import Contender, Entry, Session, compete
from benchmarks.environment import Missing
from benchmarks.judge import judge_op
from benchmarks.ops import MODES, OpBench, Tensors
from benchmarks.run import l2_bytes, rotated
from benchmarks.schema import Row
from vitkernels.testing.cases import DTYPES, Case

COMPILED = {"compile": None, "compile max-autotune": "max-autotune-no-cudagraphs"}
COMPILE_S = {"compile": 5.0, "compile max-autotune": 20.0}


def measure_op(
    session: Session, bench: OpBench, case: Case, dtype: str, modes: tuple[str, ...] = MODES, *, seconds: float = 0.5
) -> Iterator[list[Row]]:
    """Measure ``bench`` at ``case``, one mode after another, for ``seconds`` per provider; yield each mode's rows."""
    torch.compiler.reset()  # after eight shapes of one function, torch.compile would fall back to eager
    tensors = bench.inputs(case, DTYPES[dtype], session.device)
    functions = {provider: functools.cache(make) for provider, make in _makers(bench, session.device).items()}
    build_s = COMPILE_S if session.device.type == "cuda" else {}
    for mode in modes:
        workload = Row(
            "op", bench.name, case.name, "", mode, dtype, case.batch,
            flops=bench.flops(case, mode), bytes=bench.bytes(case, mode, DTYPES[dtype].itemsize),
        )  # fmt: skip
        upstreams = None if mode == "forward" else upstreams_of(bench.reference, case, tensors)
        yield compete(
            session,
            workload,
            {
                provider: Contender(
                    functools.partial(_build, make, case, tensors, mode, upstreams), build_s.get(provider, 0.0)
                )
                for provider, make in functions.items()
            },
            truth=truth_of(bench.reference, case, tensors, upstreams),
            yardstick=results_of(bench.reference, case, tensors, upstreams),
            judge=judge_op,
            seconds=seconds,
            capture=True,
        )


def results_of(function: Callable, case: Case, tensors: Tensors, upstreams: list[Tensor] | None) -> dict[str, Tensor]:
    """Return the outputs by name and, if ``upstreams`` are given, the gradients of inputs that require grad."""
    with torch.set_grad_enabled(upstreams is not None):
        outputs = _as_tuple(function(case, **tensors))
    results = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    if upstreams is not None:
        leaves = leaves_of(tensors)
        grads = torch.autograd.grad(outputs, list(leaves.values()), upstreams)
        results |= {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return results


def truth_of(reference: Callable, case: Case, tensors: Tensors, upstreams: list[Tensor] | None) -> dict[str, Tensor]:
    """Return :func:`results_of` of ``reference`` on the same values in fp64."""
    wide = {
        name: t.detach().double().requires_grad_(t.requires_grad) if t is not None and t.is_floating_point() else t
        for name, t in tensors.items()
    }
    return results_of(reference, case, wide, upstreams and [u.double() for u in upstreams])


def _makers(bench: OpBench, device: torch.device) -> dict[str, Callable[[], Callable]]:
    def compiled(mode):
        if device.type != "cuda":
            raise Missing("a CPU run compares with plain PyTorch alone")
        # fullgraph: with graph breaks the rival would be weaker than it can be.
        return torch.compile(bench.reference, dynamic=False, fullgraph=True, mode=mode)

    return {
        "vitkernels": lambda: bench.ours,
        "torch": lambda: bench.reference,
        "compile": functools.partial(compiled, COMPILED["compile"]),
        **{provider: functools.partial(make, device) for provider, make in bench.rivals.items()},
        "compile max-autotune": functools.partial(compiled, COMPILED["compile max-autotune"]),
    }


def _build(make: Callable[[], Callable], case: Case, tensors: Tensors, mode: str, upstreams) -> Entry:
    function = make()
    # A compiled backward may reuse the memory of saved tensors, and mode "backward" runs it again: forbid that there.
    with torch._functorch.config.patch(donated_buffer=mode != "backward"):
        results = results_of(function, case, tensors, upstreams)
        calls = []
        for copy in _copies(tensors):
            call = call_of(function, case, copy, mode, upstreams)
            call()
            calls.append(call)
    return Entry(rotated(calls) if len(calls) > 1 else calls[0], results)


def _copies(tensors: Tensors) -> Iterator[Tensors]:
    """Yield ``tensors``, and on a GPU enough copies (31 at most) that L2 cannot hold them all."""
    yield tensors
    some = next(iter(tensors.values()))
    if some.device.type != "cuda":
        return
    size = sum(t.nbytes for t in tensors.values() if t is not None)
    for _ in range(min(31, math.ceil(2 * l2_bytes() / size))):
        yield {
            name: None if t is None else t.detach().clone().requires_grad_(t.requires_grad)
            for name, t in tensors.items()
        }


def call_of(function: Callable, case: Case, tensors: Tensors, mode: str, upstreams) -> Callable[[], object]:
    """Return a call that runs ``function`` once in ``mode``, for timing."""
    if mode == "forward":

        def forward():
            with torch.no_grad():
                return function(case, **tensors)

        return forward
    leaves = list(leaves_of(tensors).values())
    if mode == "both":
        return lambda: torch.autograd.grad(_as_tuple(function(case, **tensors)), leaves, upstreams)
    outputs = _as_tuple(function(case, **tensors))
    return lambda: torch.autograd.grad(outputs, leaves, upstreams, retain_graph=True)


def upstreams_of(reference: Callable, case: Case, tensors: Tensors) -> list[Tensor]:
    """Return a random upstream gradient for each output."""
    with torch.no_grad():
        return [torch.randn_like(o) for o in _as_tuple(reference(case, **tensors))]


def leaves_of(tensors: Tensors) -> dict[str, Tensor]:
    """Return the tensors that require grad, by name."""
    return {name: t for name, t in tensors.items() if t is not None and t.requires_grad}


def _as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def with_batch(case: Case, batch: int) -> Case:
    """Return ``case`` with another batch size."""
    return dataclasses.replace(case, batch=batch)
