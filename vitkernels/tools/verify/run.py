"""Select the checks of a verification, order them, and run them."""

from __future__ import annotations

import concurrent.futures.process
import dataclasses
import functools
import gc
import os
import shlex
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence

import torch

from vitkernels.ops._fp8.rows import arch_limit
from vitkernels.testing import fp8
from vitkernels.testing.cases import CASES, DTYPES, Case
from vitkernels.tools import _interrupt
from vitkernels.tools.console import UserError, one_line, track
from vitkernels.tools.demo.measure import why_no_kernels
from vitkernels.tools.verify import accuracy, environment, mutants, properties
from vitkernels.tools.verify.compiled import check_compiled
from vitkernels.tools.verify.integration import integration_checks
from vitkernels.tools.verify.problems import (
    BLOCKS,
    GATED,
    GATED_APART,
    LARGE,
    MANY,
    QUICK,
    ROW,
    WINDOW,
    Problem,
    fp8_problems,
    problems,
)
from vitkernels.tools.verify.results import Check, Result, Verification

TARGETS = ("sm_90", "sm_80", "sm_100", "sm_120", "gfx942")
# No NaN checks for these. With a mask it depends on the kernel whether a NaN under the mask spreads, and PyTorch's own
# kernels differ. A block is a chain of ops that are checked one by one.
NOT_POISONED = {("attention", variant) for variant in ("key mask", "pair mask", "causal")} | {("block", "")}


@dataclasses.dataclass(frozen=True)
class Plan:
    """The options of a verification.

    Attributes:
        full: Run all checks, not only those that fit into a few minutes.
        device: Where the kernels run: a GPU, or a CPU that emulates one.
        dtypes: Names in :data:`vitkernels.testing.cases.DTYPES`; empty for the default of the level.
        seed: Seed of all random draws.
        model: A model to verify as well, in the form that :func:`vitkernels.tools.verify.model.load` accepts.
        only: Patterns for :meth:`Check.matches`; empty for all checks.
    """

    full: bool = False
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))
    dtypes: tuple[str, ...] = ()
    seed: int = 0
    model: str | None = None
    only: tuple[str, ...] = ()


def verify(plan: Plan, command: str) -> Verification:
    """Run every check of ``plan`` and return their results.

    Raises:
        UserError: The kernels cannot run here, the model cannot be loaded, or no check matches ``only``.
    """
    start = time.perf_counter()
    _require_kernels(plan.device)
    made = list(checks(plan))
    chosen = [c for c in made if c.matches(plan.only)] if plan.only else made
    if not chosen:
        raise UserError(f"no check is of that name; there are {', '.join(sorted({c.id.split('/')[0] for c in made}))}")
    if plan.only:
        command = shlex.join([*shlex.split(command), *(word for p in plan.only for word in ("--only", p))])
    verification = Verification(environment.describe(plan.device), command)
    results = run_all(chosen, plan.device)
    if any(r.group == "mutants" for r in results):
        results.append(mutants.total(results))
    verification.results = results
    verification.seconds = time.perf_counter() - start
    return verification


def checks(plan: Plan) -> Iterator[Check]:
    """Yield every check of ``plan``, about the longest first, so that parallel workers finish together."""
    device, seed = plan.device, plan.seed
    if device.type == "cpu":
        for target in TARGETS if plan.full else TARGETS[:1]:
            cases = () if plan.full else ("vit_small_patch16_224",)
            yield Check(f"compiled/{target}", functools.partial(check_compiled, f"compiled/{target}", target, cases))
    if plan.model is not None:
        from vitkernels.tools.verify.model import model_checks

        yield from model_checks(plan.model, device, seed, full=plan.full, dtypes=plan.dtypes)
    yield from integration_checks(device, seed, quick=not plan.full)
    yield from mutants.mutant_checks(seed)
    for problem, names in compared(plan):
        for name in plan.dtypes or names:
            yield _check("accuracy", problem, name, accuracy.check_accuracy, device, seed)
    yield from _property_checks(plan)


def compared(plan: Plan) -> Iterator[tuple[Problem, tuple[str, ...]]]:
    """Yield the problems whose outputs and gradients are compared, with the default dtypes of the level."""
    every, on_gpu = tuple(DTYPES), plan.device.type != "cpu"
    for case in (*QUICK, *SWEEP) if plan.full else QUICK:
        for problem in problems(case):
            if plan.full:
                yield problem, every
            elif on_gpu:
                yield problem, every if case is WINDOW else ("fp32", "bf16")
            elif names := _quick_dtypes(problem):
                yield problem, names
    for case in (WINDOW, BLOCKS, LARGE) if on_gpu else (WINDOW, BLOCKS):
        yield from ((problem, every if plan.full else ("bf16",)) for problem in fp8_problems(case))
    if on_gpu:
        yield from ((problem, every if plan.full else ("bf16",)) for problem in problems(LARGE))
    if plan.full:
        for case in CASES.values():
            if on_gpu:
                yield from ((problem, every) for problem in problems(dataclasses.replace(case, batch=2)))
            else:
                yield from ((problem, ("fp32",)) for problem in _small_enough(case))


def _quick_dtypes(problem: Problem) -> tuple[str, ...]:
    """Return the dtypes of ``problem`` for which a minute on an emulated GPU is enough.

    Each dtype costs the compilation of its kernels, so it is used only if its kernels differ: attention and gates have
    separate kernels for half precision, and for sizes beyond the first case they and the products use other kernels.
    """
    if problem.case is WINDOW:
        # LayerScale folded into a weight may give fp16's smallest numbers, so this problem also runs in fp16.
        return ("fp32", "bf16", "fp16") if (problem.op, problem.variant) == ("linear", "residual") else ("fp32", "bf16")
    if problem.case is MANY:
        return ("bf16",) if (problem.op, problem.variant) == ("attention", "") else ()
    if problem.op in ("attention", "window_attention", "relative_attention", "decomposed_attention"):
        return ("bf16",) if problem.case in (ROW, BLOCKS) else ()
    if problem.op == "swiglu_mlp":
        return ("fp32", "bf16")
    return ("fp32",) if problem.op in ("layer_norm", "rms_norm", "add_rms_norm", "linear", "mlp") else ()


def _small_enough(case: Case) -> Iterator[Problem]:
    """Yield the problems of ``case`` for an emulated GPU: attention with one head, the row-wise ops with few rows."""
    one_head = dataclasses.replace(case, batch=1, heads=1, channels=case.head_dim)
    few_tokens = dataclasses.replace(case, batch=1, image=5 * case.patch)
    yield from (p for p in problems(one_head) if "attention" in p.op)
    yield from (p for p in problems(few_tokens) if "attention" not in p.op and p.op != "block")


def _property_checks(plan: Plan) -> Iterator[Check]:
    device, seed, full = plan.device, plan.seed, plan.full
    times = (3 if full else 2) if device.type == "cpu" else 250 if full else 20

    def every_property(problem: Problem, name: str, *, layouts: bool) -> Iterator[Check]:
        if layouts:
            yield _check("layouts", problem, name, properties.check_layouts, device, seed, every=full)
        yield _check("memory", problem, name, properties.check_memory, device, seed)
        yield _check("reruns", problem, name, properties.check_reruns, device, seed, times=times)
        if (problem.op, problem.variant) not in NOT_POISONED:
            yield _check("nonfinite", problem, name, properties.check_nonfinite, device, seed, every=full)

    for case in QUICK if full else (WINDOW, GATED, GATED_APART):
        laid_out = set()
        for problem in problems(case):
            if not full and (problem.op == "block" or (case is not WINDOW and problem.op != "swiglu_mlp")):
                continue
            for name in plan.dtypes or _property_dtypes(plan, problem):
                # No layouts for a block: one of them makes all samples equal, and then its gradients vanish.
                fresh = full or device.type != "cpu" or problem.op not in laid_out
                yield from every_property(problem, name, layouts=problem.op != "block" and fresh)
            if (problem.op, problem.variant) != ("linear", ""):  # that product is PyTorch's own
                laid_out.add(problem.op)
    for problem in fp8_problems(WINDOW):
        for name in plan.dtypes or ("bf16",):
            yield from every_property(problem, name, layouts=True)
    if device.type != "cpu":
        for problem in problems(LARGE):
            yield _check("reruns", problem, "bf16", properties.check_reruns, device, seed, times=times)
    if device.type == "cpu":  # only there does untouched memory take no pages
        for problem in problems(WINDOW):
            if problem.op in ("layer_norm", "attention", "patch_embed") and not problem.variant:
                yield _check("reach", problem, "bf16", properties.check_reach, device, seed)
    if not full:
        for case in (ROW, BLOCKS):
            for problem in problems(case):
                if problem.op == "attention":
                    yield _check("memory", problem, "bf16", properties.check_memory, device, seed)


def _property_dtypes(plan: Plan, problem: Problem) -> tuple[str, ...]:
    if plan.full:
        return ("fp32", "bf16") if plan.device.type == "cpu" else tuple(DTYPES)
    # Attention and gates have separate kernels for half precision.
    return ("bf16",) if "attention" in problem.op or problem.op == "swiglu_mlp" else ("fp32",)


def _check(group: str, problem: Problem, dtype: str, function, device: torch.device, seed: int, **options) -> Check:
    id = f"{group}/{problem.id}/{dtype}"

    def run() -> Iterable[Result]:
        reason = arch_limit(device) if problem.op in fp8.NAMES else None
        if reason is not None:
            yield Result(id, "ran", "skipped", reason)
            return
        for result in function(id, problem, DTYPES[dtype], device, seed, **options):
            yield dataclasses.replace(result, dtype=dtype)

    return Check(id, run)


def run_all(chosen: Sequence[Check], device: torch.device) -> list[Result]:
    """Run ``chosen``, on a CPU in one process per core, and return their results in order."""
    workers = min(len(os.sched_getaffinity(0)), len(chosen)) if device.type == "cpu" else 1
    text = f"Verifying, {len(chosen)} checks"
    if workers < 2:
        return [result for check in track(chosen, text) for result in _run(check)]
    found: dict[int, list[Result]] = {}
    # Checks are closures, which cannot be pickled; forked workers inherit them.
    _CHOSEN[:] = chosen
    gc.freeze()  # or each worker's collector would scan all older objects
    try:
        with _interrupt.pool(workers, "fork") as pool:
            jobs = {pool.submit(_run_in_worker, i): i for i in range(len(chosen))}
            for job in track(concurrent.futures.as_completed(jobs), text, len(jobs)):
                found[jobs[job]] = _result_of(job, chosen[jobs[job]])
    finally:
        _CHOSEN.clear()
        gc.unfreeze()
    return [result for i in range(len(chosen)) for result in found[i]]


_CHOSEN: list[Check] = []


def _run_in_worker(i: int) -> list[Result]:
    torch.set_num_threads(1)
    gc.disable()  # automatic collection would take a tenth of the time
    if i % 50 == 0:
        gc.collect()
    return _run(_CHOSEN[i])


def _result_of(job: concurrent.futures.Future, check: Check) -> list[Result]:
    try:
        return job.result()
    except concurrent.futures.process.BrokenProcessPool as error:  # a worker ran out of memory, or a kernel crashed it
        return [Result(check.id, "ran", "broken", f"a process died, of this check or one beside it: {one_line(error)}")]


def _run(check: Check) -> list[Result]:
    """Run a check and return its results; an exception becomes a result."""
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            # Checks put in NaN and infinities on purpose.
            warnings.simplefilter("ignore", RuntimeWarning)
            results = list(check.run())
    except (UserError, ImportError, MemoryError, torch.OutOfMemoryError) as error:  # the machine's fault
        results = [Result(check.id, "ran", "broken", f"{type(error).__name__}: {error}")]
    except Exception as error:  # any other exception is the kernel's fault
        results = [Result(check.id, "ran", "failed", f"{type(error).__name__}: {error}")]
    if not results:
        results = [Result(check.id, "ran", "broken", "the check looked at nothing")]
    each = (time.perf_counter() - start) / len(results)
    return [dataclasses.replace(r, seconds=round(each, 4)) for r in results]


def _require_kernels(device: torch.device) -> None:
    reason = why_no_kernels(device)
    if reason is not None:
        raise UserError(f"nothing to verify: {reason}")


def _sweep() -> Iterator[Case]:
    """Yield cases of one image and one head with the token counts, head dims and hidden sizes that ViTs have."""
    patches_and_prefix = ((1, 0), (7, 0), (7, 1), (14, 1), (16, 1), (24, 1), (27, 0), (32, 1), (37, 5))
    dims = (16, 24, 32, 36, 48, 60, 64, 72, 80, 88, 96, 104, 112, 128)
    for side, prefix in patches_and_prefix:
        yield Case(f"{side * side + prefix} tokens", 1, side * 4, 4, prefix, 64, 1, 96)
    for D in dims:
        yield Case(f"head dim {D}", 1, 36, 4, 0, D, 1, 96, "quick_gelu")
    yield Case("2730 hidden features", 1, 16, 4, 1, 48, 1, 2730, "silu", mlp="separate", mlp_norm=True)
    yield Case("4304 hidden features", 1, 16, 4, 1, 48, 1, 4304, "gelu_tanh")


SWEEP = tuple(_sweep())
