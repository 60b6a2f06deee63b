"""The contents that all forms of the report share: counts, worst errors, failures, skips."""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable

from vitkernels.tools.tables import Table
from vitkernels.tools.verify.results import Result, Verification

COUNTS = ("passed", "failed", "skipped", "broken")
VERSIONS = ("vitkernels", "torch", "triton", "python")


def facts(verification: Verification) -> list[str]:
    """Return two lines: versions; device, system, date and duration."""
    known = verification.environment
    versions = ", ".join(f"{name} {known[name]}" for name in VERSIONS if name in known)
    others = [known[name] for name in ("device", "system", "date") if name in known]
    return [versions, ", ".join([*others, f"{verification.seconds:.0f} s"])]


def verdict(verification: Verification) -> str:
    """Return the verdict as a sentence."""
    return f"{verification.verdict[0].upper()}{verification.verdict[1:]}."


def by_op(verification: Verification) -> Table:
    """Return the worst error divided by PyTorch's, and the counts of results, by op and dtype."""
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
    """Return the counts of results and the seconds of each group of checks."""
    rows: dict[str, list[Result]] = collections.defaultdict(list)
    for result in verification.results:
        rows[result.group].append(result)
    return Table(
        ("group", "results", *COUNTS, "seconds"),
        [(group, *_counts(found, COUNTS), f"{sum(r.seconds for r in found):.1f}") for group, found in rows.items()],
    )


def faults(verification: Verification, status: str) -> dict[str, list[Result]]:
    """Return the results of ``status`` (``failed`` or ``broken``) by check id; one command repeats each check."""
    found: dict[str, list[Result]] = collections.defaultdict(list)
    for result in verification.results:
        if result.status == status:
            found[result.check].append(result)
    return found


def skips(verification: Verification) -> list[tuple[str, str]]:
    """Return each reason for skipping with what was skipped: group and subject, and the number of results."""
    reasons: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for result in kernels(verification):
        if result.status == "skipped":
            reasons[result.detail]["/".join(result.check.split("/")[:2])] += 1
    return [
        (reason, ", ".join(f"{what} ({count})" for what, count in whats.items())) for reason, whats in reasons.items()
    ]


def mutants(verification: Verification) -> tuple[str, list[Result]]:
    """Return a sentence on the number of seeded defects caught ("" without any), and the results of the others."""
    made = [r for r in verification.results if r.check.startswith("mutants/")]
    survivors = [r for r in made if r.status != "passed"]
    score = f"Seeded defects: {len(made) - len(survivors)} of {len(made)} caught." if made else ""
    return score, survivors


def kernels(verification: Verification) -> Iterable[Result]:
    """Return the results about the kernels, not about the checks themselves."""
    return (r for r in verification.results if r.group != "mutants")


def ratio_text(ratio: float | None) -> str:
    """Return the ratio with about three digits, or "" for None."""
    if ratio is None:
        return ""
    return f"{ratio:.2f}" if ratio < 100 else f"{ratio:.3g}" if math.isfinite(ratio) else "∞"


def _worst_ratio(results: list[Result]) -> float | None:
    # max() would mishandle NaN, which is worse than any number.
    ratios = [math.inf if math.isnan(r.ratio) else r.ratio for r in results if r.ratio is not None]
    return max(ratios, default=None)


def _counts(results: list[Result], statuses: Iterable[str]) -> list[str]:
    return [str(len(results)), *(str(sum(r.status == status for r in results)) for status in statuses)]
