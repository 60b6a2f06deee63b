"""What every form of the report says in its own way: counts, the worst errors, what failed, what was skipped."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterable

from vitkernels.verify.results import Result, Verification

COUNTS = ("passed", "failed", "skipped", "broken")
VERSIONS = ("vitkernels", "torch", "triton", "python")


@dataclasses.dataclass(frozen=True)
class Table:
    """Columns after the first ``words`` hold figures."""

    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    words: int = 1


def facts(verification: Verification) -> list[str]:
    """Return the environment in two lines: versions, and where and when."""
    known = verification.environment
    versions = ", ".join(f"{name} {known[name]}" for name in VERSIONS if name in known)
    others = [known[name] for name in ("device", "system", "date") if name in known]
    return [versions, ", ".join([*others, f"{verification.seconds:.0f} s"])]


def verdict(verification: Verification) -> str:
    """Return the verdict as a sentence."""
    return f"{verification.verdict[0].upper()}{verification.verdict[1:]}."


def by_op(verification: Verification) -> Table:
    """Return how far the errors of each op and dtype are from PyTorch's, and what came of its checks."""
    rows: dict[tuple[str, str], list[Result]] = collections.defaultdict(list)
    for result in kernels(verification):
        if result.dtype:
            subject = "the model" if result.group == "model" else result.check.split("/")[1]
            rows[subject, result.dtype].append(result)
    header = ("op", "dtype", "worst error ÷ PyTorch's", "results", "passed", "failed", "skipped")
    return Table(
        header,
        [
            (*key, ratio_text(_worst_ratio(found)), *_counts(found, COUNTS[:3]))
            for key, found in sorted(rows.items(), key=lambda row: row[0])
        ],
        words=2,
    )


def by_group(verification: Verification) -> Table:
    """Return what came of each group of checks."""
    rows: dict[str, list[Result]] = collections.defaultdict(list)
    for result in verification.results:
        rows[result.group].append(result)
    return Table(
        ("group", "results", *COUNTS, "seconds"),
        [(group, *_counts(found, COUNTS), f"{sum(r.seconds for r in found):.1f}") for group, found in rows.items()],
    )


def faults(verification: Verification, status: str) -> dict[str, list[Result]]:
    """Return the results of ``status`` (``failed`` or ``broken``) by their check's id, which one command repeats."""
    found: dict[str, list[Result]] = collections.defaultdict(list)
    for result in verification.results:
        if result.status == status:
            found[result.check].append(result)
    return found


def skips(verification: Verification) -> list[tuple[str, str]]:
    """Return each reason for skipping, and what was skipped for it: parts of ids, with how many results."""
    reasons: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for result in kernels(verification):
        if result.status == "skipped":
            reasons[result.detail]["/".join(result.check.split("/")[:2])] += 1
    return [
        (reason, ", ".join(f"{what} ({count})" for what, count in whats.items())) for reason, whats in reasons.items()
    ]


def mutants(verification: Verification) -> tuple[str, list[Result]]:
    """Return how many of the seeded defects were caught, "" where none was made, and those that were not."""
    made = [r for r in verification.results if r.check.startswith("mutants/")]
    survivors = [r for r in made if r.status != "passed"]
    score = f"Seeded defects: {len(made) - len(survivors)} of {len(made)} caught." if made else ""
    return score, survivors


def kernels(verification: Verification) -> Iterable[Result]:
    """Return the results about the kernels, not about the checks themselves."""
    return (r for r in verification.results if r.group != "mutants")


def ratio_text(ratio: float | None) -> str:
    """Return a ratio in three digits, "" where there is none."""
    if ratio is None:
        return ""
    return f"{ratio:.2f}" if ratio < 100 else f"{ratio:.3g}" if math.isfinite(ratio) else "∞"


def _worst_ratio(results: list[Result]) -> float | None:
    # NaN is no number to be the largest, and worse than any.
    ratios = [math.inf if math.isnan(r.ratio) else r.ratio for r in results if r.ratio is not None]
    return max(ratios, default=None)


def _counts(results: list[Result], statuses: Iterable[str]) -> list[str]:
    return [str(len(results)), *(str(sum(r.status == status for r in results)) for status in statuses)]
