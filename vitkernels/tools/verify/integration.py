"""Run every public op in PyTorch's other ways: compiled, exported, checkpointed, under autocast, in a CUDA graph, etc.

Each way must give the results of a plain call: bit by bit if the same kernels run in the same order; by the error rule
if the dtype, the device or the code around the kernels differs. A way that this machine does not support is skipped
with the reason. An exception is a failure.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
import torch._dynamo  # imported once here, not again in each forked worker
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from vitkernels import ops
from vitkernels._intercept import Intercept
from vitkernels.ops._registry import OPS
from vitkernels.testing.compare import Verdict, check, widened
from vitkernels.tools.console import one_line
from vitkernels.tools.verify.accuracy import judge, seeded, settled
from vitkernels.tools.verify.memory import differing, outputs_and_gradients
from vitkernels.tools.verify.problems import GATED, GATED_APART, WINDOW, Problem, problems
from vitkernels.tools.verify.results import Check, Result

# Sizes do not matter here, and on an emulated GPU the time grows with them.
SMALL = {"name": "small", "batch": 2, "image": 16, "channels": 16, "heads": 1, "hidden": 24}
CASES = tuple(dataclasses.replace(case, **SMALL) for case in (WINDOW, GATED, GATED_APART))
DRAWS = 20
CALLS_PER_THREAD = 8
SLEEP_CYCLES = 50_000_000  # GPU clock cycles, about 30 ms: longer than the launches of an op and its backward take


class _Impossible(Exception):
    """This machine or this variant does not support the way; the text says why."""


# For each thing checked: its name, what is wrong ("" if nothing), and our error divided by PyTorch's, if known.
_Findings = Iterator[tuple[str, str, float | None]]
_Way = Callable[[Problem, torch.device, int], _Findings]


def integration_checks(device: torch.device, seed: int, *, quick: bool) -> Iterator[Check]:
    """Yield a check ``integration/<what>/<op>`` for each way of running each public op.

    Args:
        device: Where the kernels run: a GPU, or a CPU that emulates one.
        seed: Seed of the inputs.
        quick: Use one problem per op, and leave out Inductor, autocast to fp16, and ``opcheck`` with dynamic shapes.
    """
    posed = _by_op()
    calls = functools.cache(functools.partial(_calls, posed, device, seed))
    for name in OPS:
        if name.endswith("_fp8"):  # opcheck multiplies what it is given, which PyTorch cannot in e4m3
            continue
        id = f"integration/opcheck/{name}"
        yield Check(id, functools.partial(_opcheck, id, name, calls, quick))
    for what, way in (_QUICK_WAYS if quick else _WAYS).items():
        for op, mine in posed.items():
            id = f"integration/{what}/{op}"
            yield Check(id, functools.partial(_look, id, way, mine[: 1 if quick else None], device, seed))


def _by_op() -> dict[str, list[Problem]]:
    """Return each op's problems, the plainest first, each variant once."""
    found: dict[str, dict[str, Problem]] = {}
    for case in CASES:
        for problem in problems(case):
            found.setdefault(problem.op, {}).setdefault(problem.variant, problem)
    return {op: list(variants.values()) for op, variants in found.items()}


def _look(id: str, way: _Way, mine: list[Problem], device: torch.device, seed: int) -> Iterator[Result]:
    for problem in mine:
        variant = problem.variant or "plain"
        try:
            for name, wrong, ratio in way(problem, device, seed):
                yield Result(
                    id, ", ".join(filter(None, (variant, name))), "failed" if wrong else "passed", wrong, ratio
                )
        except _Impossible as reason:
            yield Result(id, variant, "skipped", str(reason))
        except Exception as error:  # a plain call raises none, so any exception is a failure
            yield Result(id, variant, "failed", f"{type(error).__name__}: {one_line(error)}")


def _drawn(problem: Problem, device: torch.device, seed: int) -> dict[str, Tensor]:
    with seeded(seed, device):
        return problem.draw(torch.float32, device)


def _results(function: Callable, tensors: dict[str, Tensor], device: torch.device, seed: int) -> dict[str, Tensor]:
    """Return the outputs and gradients of ``function`` by name; ``seed`` determines its random draws."""
    leaves = {name: t.detach().requires_grad_(t.requires_grad) for name, t in tensors.items()}
    with seeded(seed, device):
        outputs = _by_name(function(**leaves))
        # Reentrant checkpointing does not support autograd.grad.
        torch.autograd.backward(list(outputs.values()), [torch.ones_like(o) for o in outputs.values()])
    return outputs | {f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf.requires_grad}


def _traceable(problem: Problem) -> Callable:
    """Return the op of ``problem``; with dropout, one that draws from the current generator, as in a model."""
    return functools.partial(ops.attention, dropout_p=0.3) if problem.variant == "dropout" else problem.function


def _unlike_eager(change: Callable[[Callable], Callable], problem: Problem, device: torch.device, seed: int) -> str:
    """Return which results of ``change(op)`` are not bit-identical to the op's."""
    function, tensors = _traceable(problem), _drawn(problem, device, seed)
    plain = _results(function, tensors, device, seed)
    return "; ".join(differing(plain, _results(change(function), tensors, device, seed)))


def _worst(verdicts: list[Verdict]) -> tuple[str, float]:
    return "; ".join(f"{v.name}: {v.detail}" for v in verdicts if not v.passed), max(v.ratio for v in verdicts)


def _compiled(problem: Problem, device: torch.device, seed: int) -> _Findings:
    torch._dynamo.reset()  # the problems share functions, and torch.compile limits recompilations
    compiled = functools.partial(torch.compile, fullgraph=True, backend="aot_eager")
    yield "aot_eager", _unlike_eager(compiled, problem, device, seed), None


def _compiled_by_either(problem: Problem, device: torch.device, seed: int) -> _Findings:
    yield from _compiled(problem, device, seed)
    if problem.variant == "dropout":
        raise _Impossible("Inductor draws other random numbers than eager PyTorch")
    if device.type == "cpu" and not _has_cpp_compiler():
        raise _Impossible("Inductor needs a C++ compiler on a CPU, and finds none")
    torch._dynamo.reset()
    compiled = dataclasses.replace(problem, function=torch.compile(problem.function, fullgraph=True))
    yield "inductor", *_worst(judge(compiled, torch.float32, device, seed))


def _has_cpp_compiler() -> bool:
    import torch._inductor.config as config

    names = config.cpp.cxx if isinstance(config.cpp.cxx, (tuple, list)) else (config.cpp.cxx,)
    return any(name and shutil.which(name) for name in names)


class _Call(torch.nn.Module):
    """A function as a module: torch.export accepts only modules."""

    def __init__(self, function: Callable):
        super().__init__()
        self._function = function

    def forward(self, **tensors: Tensor):
        return self._function(**tensors)


def _exported(problem: Problem, device: torch.device, seed: int) -> _Findings:
    function, tensors = _traceable(problem), _drawn(problem, device, seed)
    with torch.no_grad():
        program = torch.export.export(_Call(function), (), tensors)
        kept = any(str(node.target).startswith("vitkernels.") for node in program.graph.nodes)
        yield "ops in the graph", "" if kept else "none of vitkernels' ops is in the exported graph", None
        results = []
        for call in (function, program.module()):
            with seeded(seed, device):
                results.append(_by_name(call(**tensors)))
    yield "", "; ".join(differing(*results)), None


def _by_name(outputs: Tensor | tuple[Tensor, ...]) -> dict[str, Tensor]:
    return {f"output {i}": o for i, o in enumerate(outputs if isinstance(outputs, tuple) else (outputs,))}


def _checkpointed(problem: Problem, device: torch.device, seed: int) -> _Findings:
    for reentrant in (False, True):

        def change(function: Callable, reentrant=reentrant) -> Callable:
            # Reentrant checkpointing takes only positional arguments.
            def run(**tensors: Tensor):
                return checkpoint(
                    lambda *values: function(**dict(zip(tensors, values, strict=True))),
                    *tensors.values(),
                    use_reentrant=reentrant,
                )

            return run

        yield "reentrant" if reentrant else "non-reentrant", _unlike_eager(change, problem, device, seed), None


def _autocast(dtypes: Sequence[torch.dtype], problem: Problem, device: torch.device, seed: int) -> _Findings:
    for dtype in dtypes:
        # With few elements the RMS error depends on luck, for PyTorch too.
        verdicts = settled(functools.partial(_under_autocast, problem, dtype, device), seed, DRAWS)
        yield str(dtype).removeprefix("torch."), *_worst(verdicts)


def _under_autocast(problem: Problem, dtype: torch.dtype, device: torch.device, seed: int) -> list[Verdict]:
    """Judge one draw by the rule for ``dtype``, even for results in fp32: they are only as exact as ``dtype``."""
    tensors = _drawn(problem, device, seed)
    with torch.autocast(device.type, dtype=dtype):
        ours, theirs = (
            outputs_and_gradients(f, tensors, torch.ones_like) for f in (problem.function, problem.reference)
        )
    wide = widened(tensors)
    truth = outputs_and_gradients(problem.reference, wide, torch.ones_like)
    verdicts = []
    for name, got in ours.items():
        expected = theirs[name]
        if got.dtype != expected.dtype:
            verdicts.append(Verdict(name, False, float("inf"), f"dtype {got.dtype}, PyTorch gives {expected.dtype}"))
        else:
            verdicts.append(check(name, got.to(dtype), expected.to(dtype), truth[name], gain_counts=False))
    return verdicts


def _inference_mode(problem: Problem, device: torch.device, seed: int) -> _Findings:
    tensors = _drawn(problem, device, seed)
    plain = _by_name(problem.function(**tensors))
    with torch.inference_mode():
        inferred = _by_name(problem.function(**tensors))
        graded = [name for name, t in inferred.items() if not t.is_inference()]
        wrong = [f"{name} is no inference tensor" for name in graded]
        wrong += differing({name: t.detach() for name, t in plain.items()}, inferred)
    yield "", "; ".join(wrong), None


def _needs_cuda(device: torch.device) -> None:
    if device.type != "cuda":
        raise _Impossible("no GPU" if device.type == "cpu" else f"not for {device.type}")


def _cuda_graph(problem: Problem, device: torch.device, seed: int) -> _Findings:
    _needs_cuda(device)
    if problem.variant == "dropout":
        raise _Impossible("each replay draws new random numbers")
    static, fresh = _drawn(problem, device, seed), _drawn(problem, device, seed + 1)
    expected = outputs_and_gradients(problem.function, fresh, torch.ones_like)  # also compiles the kernels
    stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
    with torch.cuda.device(device):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries must set up a stream before a capture
            outputs_and_gradients(problem.function, static, torch.ones_like)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph, stream=stream):
            captured = outputs_and_gradients(problem.function, static, torch.ones_like)
        for name, t in static.items():
            t.detach().copy_(fresh[name].detach())
        graph.replay()
        torch.cuda.synchronize()
    yield "replayed on other values", "; ".join(differing(expected, captured)), None


def _side_stream(problem: Problem, device: torch.device, seed: int) -> _Findings:
    """Run on a stream that has yet to write the inputs: a launch on another stream would read zeros."""
    _needs_cuda(device)
    tensors = _drawn(problem, device, seed)
    expected = outputs_and_gradients(problem.function, tensors, torch.ones_like)
    late = {name: torch.zeros_like(t).requires_grad_(t.requires_grad) for name, t in tensors.items()}
    stream = torch.cuda.Stream(device)
    torch.cuda.synchronize(device)
    with torch.cuda.device(device), torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP_CYCLES)
        for name, t in late.items():
            t.detach().copy_(tensors[name].detach())
        got = outputs_and_gradients(problem.function, late, torch.ones_like)
    torch.cuda.synchronize(device)
    yield "", "; ".join(differing(expected, got)), None


def _second_device(problem: Problem, device: torch.device, seed: int) -> _Findings:
    _needs_cuda(device)
    count = torch.cuda.device_count()
    if count < 2:
        raise _Impossible("one GPU only")
    with torch.cuda.device(device):
        current = torch.cuda.current_device()
        other = torch.device("cuda", (current + 1) % count)
        yield f"{other} while {current} is current", *_worst(judge(problem, torch.float32, other, seed))


def _two_threads(problem: Problem, device: torch.device, seed: int) -> _Findings:
    if problem.variant == "dropout":
        raise _Impossible("threads share the generator, so who draws what is open")
    given = [_drawn(problem, device, seed + i) for i in range(2)]
    expected = [outputs_and_gradients(problem.function, tensors, torch.ones_like) for tensors in given]
    together = threading.Barrier(len(given))
    workers = torch.get_num_threads()

    def run(i: int) -> str:
        torch.set_num_threads(workers)  # a new thread has its own; the order of PyTorch's sums depends on it
        together.wait()
        for _ in range(CALLS_PER_THREAD):
            got = outputs_and_gradients(problem.function, given[i], torch.ones_like)
            if unlike := list(differing(expected[i], got)):
                return f"thread {i}: {'; '.join(unlike)}"
        return ""

    with ThreadPoolExecutor(len(given)) as pool:
        yield "", "; ".join(filter(None, pool.map(run, range(len(given))))), None


_QUICK_WAYS: dict[str, _Way] = {
    "compile": _compiled,
    "export": _exported,
    "checkpointing": _checkpointed,
    "autocast": functools.partial(_autocast, (torch.bfloat16,)),
    "inference-mode": _inference_mode,
    "cuda-graph": _cuda_graph,
    "side-stream": _side_stream,
    "second-device": _second_device,
    "threads": _two_threads,
}
_WAYS = _QUICK_WAYS | {
    "compile": _compiled_by_either,
    "autocast": functools.partial(_autocast, (torch.bfloat16, torch.float16)),
}


def _recorded(calls: dict[str, list[tuple]]) -> Intercept:
    """Record in ``calls`` the arguments of each call of a registered op, and return random numbers as its results."""

    def record(op, args, kwargs):
        if op.namespace != "vitkernels":
            return NotImplemented
        name = op.overloadpacket.__name__
        held = tree_map(lambda a: a.detach().clone() if isinstance(a, Tensor) else a, args)
        calls.setdefault(name, []).append(held)
        # Later ops need only results of the right shapes, and emulating the kernel would take long.
        return tree_map(lambda t: t.normal_() if t.is_floating_point() else t.zero_(), OPS[name].fake(*args))

    return Intercept(record)


def _calls(posed: dict[str, list[Problem]], device: torch.device, seed: int) -> dict[str, list[tuple]]:
    """Return the arguments of all problems' calls of each registered op, in forward and backward.

    For an op that is called only without gradients, or only under autocast, return those calls.
    """
    all_posed = [problem for mine in posed.values() for problem in mine]
    training, inference, autocast = {}, {}, {}
    with seeded(seed, device), _recorded(training):
        for problem in all_posed:
            outputs_and_gradients(problem.function, problem.draw(torch.float32, device), torch.ones_like)
    with seeded(seed, device), torch.no_grad(), _recorded(inference):
        for problem in all_posed:
            problem.function(**problem.draw(torch.float32, device))
    with seeded(seed, device), torch.no_grad(), torch.autocast(device.type, torch.bfloat16), _recorded(autocast):
        for problem in all_posed:
            problem.function(**problem.draw(torch.float32, device))
    return autocast | inference | training


def _opcheck(id: str, name: str, calls: Callable[[], dict[str, list[tuple]]], quick: bool) -> Iterator[Result]:
    """Run ``torch.library.opcheck`` on a registered op: schema, aliases, fake tensors, dynamic shapes."""
    found = calls().get(name, [])
    if not found:
        yield Result(id, "called", "broken", "no problem calls it")
        return
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    op = getattr(torch.ops.vitkernels, name).default
    for i, args in enumerate(found[:1] if quick else found):
        results = torch.library.opcheck(op, args, test_utils=tests[:3] if quick else tests, raise_exception=False)
        wrong = [f"{test}: {type(e).__name__}: {one_line(e)}" for test, e in results.items() if e != "SUCCESS"]
        yield Result(id, f"call {i + 1} of {len(found)}", "failed" if wrong else "passed", "; ".join(wrong))
