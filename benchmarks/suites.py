"""The suites: jobs in order of importance, and the run that stops when its budget is spent."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from benchmarks import counts, host_costs
from benchmarks.compete import Session
from benchmarks.environment import clocks, make_timer, measure_ceilings, new_results
from benchmarks.models.bench_vit import MODELS, Model, flops, measure_model
from benchmarks.ops import MODES, STAGES, OpBench, all_ops
from benchmarks.ops.measure import measure_op, with_batch
from benchmarks.run import Budget
from benchmarks.schema import Results, Row, save
from vitkernels.testing.cases import CASES, Case
from vitkernels.tools.console import UserError, one_line

SUITES = ("ops", "models", "quick", "all")
SAVE_S = 1.0  # least time between two saves: many counts come at once
SHARE = 0.4  # share of the time left that a job may take beyond its estimate
VIT_B = "vit_base_patch16_224"
# The largest batches come first, then the smallest for inference.
LOADS = (
    ("inference", 256), ("training", 256), ("inference", 1), ("training", 32), ("inference", 32), ("inference", 8),
    ("training", 8), ("training", 1),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Job:
    """A part of a run: its title, its estimated seconds, and its rows, which it yields one by one.

    It may take ``share`` of the time left beyond its estimate.
    """

    title: str
    seconds: Callable[[Session], float]
    rows: Callable[[Session], Iterable[Row]]
    share: float = SHARE


def plan(suite: str, device: torch.device) -> list[Job]:
    """Return the jobs of ``suite``, the most important first."""
    quick = _quick(device)
    parts = {"quick": quick, "ops": _ops(device), "models": _models(device)}
    parts["all"] = [*quick, *parts["ops"], *parts["models"], *_counts()]
    return list({job.title: job for job in parts[suite]}.values())


def _quick(device: torch.device) -> list[Job]:
    case = CASES[VIT_B]
    host = [
        Job("call of each op", lambda session: 20.0, host_costs.call_rows),
        Job("imports", lambda session: 12.0, host_costs.import_rows),
        Job("accelerate", lambda session: 4.0, lambda session: host_costs.accelerate_rows()),
    ]
    if device.type == "cuda":
        return [
            _model_job(MODELS[0], 256, "bf16", "inference"),
            *(_op_job(bench, case, "bf16", ("forward", "both")) for bench in all_ops().values() if bench.applies(case)),
            _model_job(MODELS[0], 1, "bf16", "inference"),
            _model_job(MODELS[0], 256, "bf16", "training"),
            *host,
        ]
    return [
        _model_job(MODELS[0], 1, "fp32", "inference", seconds=8.0),
        *host,
        *_counts(),
        *(
            _op_job(bench, with_batch(case, 1), "fp32", ("forward", "both"))
            for bench in all_ops().values()
            if bench.applies(case)
        ),
        _model_job(Model("vit_small_patch16_224"), 1, "fp32", "training", seconds=4.0),
        _model_job(Model("vit_tiny_patch16_224"), 8, "fp32", "inference", seconds=4.0),
    ]


def _counts() -> list[Job]:
    jobs = [
        Job(
            f"passes over the activations, {model}",
            lambda session: 8.0,
            lambda session, model=model: counts.traffic_rows(model),
        )
        for model in (VIT_B, "vit_base_patch14_dinov2", "deit3_base_patch16_224")
    ]
    compiler = functools.partial(counts.compiler_rows, "sm_90", CASES[VIT_B])
    jobs.append(Job("compiler's report for sm_90", lambda session: 15.0, lambda session: compiler()))
    work = functools.partial(counts.work_rows, list(all_ops().values()), [*CASES.values(), *STAGES.values()])
    return [*jobs, Job("work of each op", lambda session: 1.0, lambda session: work())]


def _ops(device: torch.device) -> list[Job]:
    on_gpu = device.type == "cuda"
    return [
        _op_job(bench, case if on_gpu else with_batch(case, 1), dtype, MODES)
        for dtype in (("bf16", "fp16", "fp32") if on_gpu else ("fp32", "bf16"))
        for case in sorted([*CASES.values(), *STAGES.values()], key=lambda case: case.name != VIT_B)
        for bench in all_ops().values()
        if bench.applies(case)
    ]


def _models(device: torch.device) -> list[Job]:
    if device.type != "cuda":
        return [_model_job(model, 1, "fp32", mode) for mode in ("inference", "training") for model in MODELS]
    return [
        _model_job(model, batch, dtype, mode)
        for dtype in ("bf16", "amp", "fp16", "fp32")
        for mode, batch in LOADS
        for model in MODELS
        if dtype != "amp" or mode == "training"
    ]


def _op_job(bench: OpBench, case: Case, dtype: str, modes: tuple[str, ...]) -> Job:
    def seconds(session: Session) -> float:
        work = sum(bench.flops(case, mode) for mode in modes)
        return 1.0 + 2 * len(modes) + _steps(session, work, dtype)

    def rows(session: Session) -> Iterator[Row]:
        for mode in measure_op(session, bench, case, dtype, modes):
            yield from mode

    return Job(f"{bench.name}, {case.name}, batch {case.batch}, {dtype}", seconds, rows)


def _model_job(model: Model, batch: int, dtype: str, mode: str, seconds: float = 2.0) -> Job:
    def needed(session: Session) -> float:
        return 5.0 + 2 * seconds + _steps(session, flops(model, mode, batch), dtype)

    name = " ".join(filter(None, (model.name, model.case)))
    return Job(
        f"{name}, {mode}, batch {batch}, {dtype}",
        needed,
        lambda session: measure_model(session, model, batch, dtype, mode, seconds=seconds),
    )


def _steps(session: Session, work: int, dtype: str) -> float:
    """Estimate the seconds for judging and warming up: about forty times the work, at half the ceiling."""
    ceiling = session.results.ceilings.get(f"tflops {'bf16' if dtype == 'amp' else dtype}", 1.0)
    return 40 * work / (0.5e12 * ceiling)


def run_suite(
    suite: str, device: torch.device, budget: Budget, path: Path, *, jobs: list[Job] | None = None
) -> Results:
    """Run the jobs of ``suite`` until ``budget`` is spent, and keep ``path`` up to date.

    Args:
        suite: One of :data:`SUITES`, or any name if ``jobs`` are given.
        device: From :func:`benchmarks.environment.find_device`.
        budget: The running budget.
        path: File for the JSON.
        jobs: Jobs to run instead of the suite's plan.

    Raises:
        KeyboardInterrupt: The run was interrupted; ``path`` holds what was measured until then.
    """
    results = new_results(suite, budget.seconds, device)
    session = Session(device, make_timer(device), budget, results)
    save(results, path)
    scope = session.timer.scope()
    with scope, progress() as show:
        show("ceilings", 0, 1, budget)
        dtypes = ["bf16", "fp16", "fp32"] if device.type == "cuda" else ["fp32", "bf16"]
        results.ceilings = measure_ceilings(device, session.timer, dtypes)
        save(results, path)
        run_jobs(plan(suite, device) if jobs is None else jobs, session, path, show)
    results.clocks |= {f"end {name}": value for name, value in clocks(device).items()}
    results.complete = True
    results.elapsed_s = round(budget.spent(), 1)
    save(results, path)
    return results


def run_jobs(jobs: list[Job], session: Session, path: Path, show: Callable) -> None:
    """Run ``jobs`` in order, skip those that do not fit in the time left, and save the results regularly."""
    results, budget = session.results, session.budget
    for number, job in enumerate(jobs):
        show(job.title, number, len(jobs), budget)
        left = budget.left()
        needed = job.seconds(session) if left > 0 else math.inf  # the estimate itself takes a while for a network
        session.cap = budget.spent() + job.share * left + needed
        if needed > left:
            results.left_out[job.title] = "no time left in the budget"
            continue
        torch.manual_seed(0)
        try:
            for row in job.rows(session):
                results.rows.append(row)
                if budget.spent() - results.elapsed_s > SAVE_S:
                    results.elapsed_s = round(budget.spent(), 1)
                    save(results, path)
        except UserError as why:
            results.left_out[job.title] = str(why)
        except torch.OutOfMemoryError:
            results.left_out[job.title] = "out of memory on the device"
        except Exception as error:  # a failed job must not lose the others' results
            results.left_out[job.title] = f"{type(error).__name__}: {one_line(error)}"
        results.elapsed_s = round(budget.spent(), 1)
        save(results, path)


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str, int, int, Budget], None]]:
    """Yield a function that shows a job's title, number and count, and the time left, as a bar if rich is installed."""
    try:
        import rich.console
        import rich.progress as rich_progress
    except ImportError:
        yield lambda title, number, count, budget: print(f"[{number + 1}/{count}] {title}, {budget.left():.0f} s left")
        return
    columns = (
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TextColumn("{task.fields[left]}", markup=False),
        rich_progress.TextColumn("{task.description}", markup=False),
    )
    console = rich.console.Console(stderr=True)
    with rich_progress.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", left="")

        def show(title: str, number: int, count: int, budget: Budget) -> None:
            left = f"at most {max(0, budget.left()):.0f} s left"
            bar.update(task, description=title, completed=number, total=count, left=left)
            if not console.is_terminal:
                console.print(f"[{number + 1}/{count}] {title}, {left}", markup=False, highlight=False, soft_wrap=True)

        yield show
