"""The report as one HTML page."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from html import escape

from vitkernels.tools.tables import TONES, Table, html_page, html_table
from vitkernels.tools.verify.report import summary
from vitkernels.tools.verify.results import NUMERICS, PASSED, Result, Verification


def to_html(verification: Verification) -> str:
    """Return the page: verdict, failures, tables, and every result in folded sections."""
    parts = itertools.chain(
        _head(verification), _faults(verification), _tables(verification), _skips(verification),
        _mutants(verification), _environment(verification), _everything(verification),
    )  # fmt: skip
    return html_page(f"vitkernels verify: {verification.verdict}", parts)


def _head(verification: Verification) -> Iterator[str]:
    tone = {PASSED: "good", NUMERICS: "bad"}.get(verification.exit_code, "warn")
    yield "<h1>vitkernels verify</h1>"
    yield from (f'<p class="soft">{escape(line)}</p>' for line in summary.facts(verification))
    yield f'<p class="verdict {tone}">{escape(summary.verdict(verification))}</p>'
    counts = ", ".join(f"{len(verification.by_status(s))} {s}" for s in summary.COUNTS if verification.by_status(s))
    score, _ = summary.mutants(verification)
    yield f"<p>{escape(f'Results: {counts or 0}. {score}')}</p>"


def _faults(verification: Verification) -> Iterator[str]:
    for status, title in (("failed", "Failed"), ("broken", "Could not run, or proves nothing")):
        found = summary.faults(verification, status)
        if found:
            yield f"<h2>{title}</h2>"
        for check, results in found.items():
            yield f'<div class="fault"><h3>{escape(check)}</h3>'
            for r in results:
                yield f'<p><b class="{TONES[status]}">{escape(r.name)}</b> {escape(r.detail)}</p>'
            yield f"<code>{escape(verification.reproduce(results[0]))}</code></div>"


def _tables(verification: Verification) -> Iterator[str]:
    for title, table in (
        ("By op and dtype", summary.by_op(verification)),
        ("By group of checks", summary.by_group(verification)),
    ):
        if table.rows:
            yield f"<h2>{title}</h2>"
            yield html_table(table)


def _skips(verification: Verification) -> Iterator[str]:
    rows = summary.skips(verification)
    if rows:
        yield "<h2>Skipped, and why</h2>"
        yield html_table(Table(("why", "what"), rows, words=2))


def _mutants(verification: Verification) -> Iterator[str]:
    score, survivors = summary.mutants(verification)
    if score:
        yield "<h2>Can these checks fail?</h2>"
        yield f"<p>{escape(score)} Each is one wrong edit of a kernel, made for this run alone.</p>"
    if survivors:
        rows = [(r.check.removeprefix("mutants/"), r.detail) for r in survivors]
        yield html_table(Table(("not caught", "why"), rows, words=2))


def _environment(verification: Verification) -> Iterator[str]:
    yield "<h2>Environment</h2>"
    rows = list((verification.environment | {"command": verification.command}).items())
    yield html_table(Table(("run with", ""), rows, words=2))


def _everything(verification: Verification) -> Iterator[str]:
    yield "<h2>Every result</h2>"
    header = ("check", "what", "", "÷ PyTorch's", "figures or reason")
    for group in dict.fromkeys(r.group for r in verification.results):
        results = [r for r in verification.results if r.group == group]
        rows = [_line(r) for r in results]
        yield html_table(Table(header, rows, words=5, folded=f"{group}, {len(rows)}", wide=True))


def _line(r: Result) -> tuple[str, ...]:
    return r.check.partition("/")[2] or r.check, r.name, r.status, summary.ratio_text(r.ratio), r.detail
