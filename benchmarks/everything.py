"""One command for ten minutes on a rented GPU: check every op, tune, then measure."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.compete import Session
from benchmarks.judge import judge_op
from benchmarks.ops import OpBench, all_ops
from benchmarks.ops.measure import results_of, truth_of, upstreams_of, with_batch
from benchmarks.run import Budget
from benchmarks.schema import OURS, Results, Row
from benchmarks.suites import Job, plan, run_suite
from benchmarks.tune import tune
from vitkernels.testing.cases import CASES, DTYPES, Case
from vitkernels.tools.console import one_line

CHECK_SHARE, TUNE_SHARE = 0.25, 0.4  # of the time that is left when they start
# Covers head dims 64, 72 and 128, LayerScale, packed and separate gates, 2730 features, and partial tiles of tokens.
CHECKED = (
    "vit_base_patch16_224", "vit_so400m_patch14_siglip_378", "vit_giant_patch14_reg4_dinov2_518",
    "aimv2_large_patch14_224", "eva02_large_patch14_448", "deit3_base_patch16_224",
)  # fmt: skip


def run_everything(device: torch.device, budget: Budget, path: Path) -> Results:
    """Check every op on ``device``, tune, and measure the quick suite; wrong results are not timed."""
    jobs = [
        Job("checks", lambda session: 0.0, check_rows, CHECK_SHARE),
        Job("tuning", lambda session: 0.0, tuning_rows, TUNE_SHARE),
        *plan("quick", device),
    ]
    return run_suite("everything", device, budget, path, jobs=jobs)


def check_rows(session: Session) -> Iterator[Row]:
    """Judge every op at a few cases with batch 2, until the checks' share of the time is spent."""
    for name in CHECKED:
        for dtype in ("bf16", "fp32"):
            for bench in all_ops().values():
                case = with_batch(CASES[name], 2)
                if not bench.applies(case):
                    continue
                row = Row("check", bench.name, case.name, OURS, "outputs and gradients", dtype, case.batch, "passed")
                if session.left() <= 0:
                    row.status, row.reason = "skipped", "no time left in the share of checks"
                else:
                    check(row, bench, case, session.device)
                yield row


def check(row: Row, bench: OpBench, case: Case, device: torch.device) -> None:
    """Judge an op's outputs in inference, and its outputs and gradients in training; write the verdict into ``row``."""
    reasons = []
    tensors = bench.inputs(case, DTYPES[row.dtype], device)
    for upstreams in (None, upstreams_of(bench.reference, case, tensors)):
        yardstick = results_of(bench.reference, case, tensors, upstreams)
        truth = truth_of(bench.reference, case, tensors, upstreams)
        try:
            verdict = judge_op(results_of(bench.ours, case, tensors, upstreams), yardstick, truth)
        except Exception as error:  # a kernel that cannot run counts as wrong
            reasons.append(f"{type(error).__name__}: {one_line(error)}")
            continue
        row.error, row.error_ratio = verdict.error, verdict.ratio
        if not verdict.right:
            reasons.append(verdict.reason)
    if reasons:
        row.status, row.reason = "wrong", "; ".join(reasons)


def tuning_rows(session: Session) -> Iterator[Row]:
    """Tune until the tuning's share of the time is spent, and count the rows written to the table."""
    lines: list[str] = []
    path = tune(session.device, Budget(session.left()), say=lines.append)
    gained = sum(" × the heuristic" in line for line in lines)
    yield Row(
        "counted", "tuning", path.name, OURS, "search", status="counted",
        figures={"places": float(len(lines)), "rows written": float(gained)},
    )  # fmt: skip
