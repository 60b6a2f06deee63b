"""The report as one HTML page without scripts or downloads, light or dark by the reader's setting."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from html import escape

from vitkernels.verify.report import summary
from vitkernels.verify.report.summary import Table
from vitkernels.verify.results import NUMERICS, PASSED, Result, Verification

CSS = """
:root { color-scheme: light dark; --text: #1d2429; --page: #fff; --line: #e4e7e9; --soft: #56616a; --card: #f6f7f8;
        --good: #0b7a55; --bad: #b3321f; --warn: #8a5a00; --link: #35506e; }
@media (prefers-color-scheme: dark) {
  :root { --text: #dfe4e8; --page: #14181b; --line: #2c343a; --soft: #98a4ad; --card: #1d2429;
          --good: #4cc38a; --bad: #ff8a75; --warn: #e0b04c; --link: #9dbbe0; }
}
body { font: 15px/1.55 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; color: var(--text); background: var(--page);
       max-width: 1120px; margin: 2.5rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.7rem; margin: 0 0 .4rem; } h2 { font-size: 1.2rem; margin: 2.4rem 0 .7rem; }
p { max-width: 78ch; margin: .4rem 0; } .soft { color: var(--soft); font-size: .84rem; }
.verdict { font-size: 1.05rem; font-weight: 600; margin: .9rem 0; padding: .6rem .9rem; background: var(--card);
           border-left: .35rem solid; max-width: none; }
.good { color: var(--good); } .bad { color: var(--bad); } .warn { color: var(--warn); }
.table { overflow-x: auto; margin: .8rem 0 1.2rem; }
table { border-collapse: collapse; font-size: .84rem; font-variant-numeric: tabular-nums; }
th { text-align: left; border-bottom: 2px solid var(--text); padding: .3rem .8rem .3rem 0; vertical-align: bottom; }
td { border-bottom: 1px solid var(--line); padding: .28rem .8rem .28rem 0; vertical-align: top; }
th.figure, td.figure { text-align: right; } th, td.figure { white-space: nowrap; }
td.bad, td.warn { font-weight: 600; } .wide td:last-child { min-width: 20rem; overflow-wrap: anywhere; }
.fault { background: var(--card); padding: .6rem .9rem; margin: .7rem 0; overflow-wrap: anywhere; }
.fault h3 { font-size: .95rem; margin: 0; } .fault p { max-width: none; white-space: pre-wrap; }
code { font: .8rem/1.5 ui-monospace, "DejaVu Sans Mono", monospace; }
.fault code { display: block; color: var(--soft); user-select: all; }
summary { cursor: pointer; color: var(--link); }
@media (max-width: 600px) { body { margin: 1.2rem auto; padding: 0 .9rem; } h1 { font-size: 1.35rem; }
  th, td { padding-right: .55rem; } th { white-space: normal; } .wide td:last-child { min-width: 14rem; } }
"""
TONES = {"failed": "bad", "broken": "warn"}


def to_html(verification: Verification) -> str:
    """Return the page: verdict, failures, tables, and every result in folded sections."""
    parts = itertools.chain(
        _head(verification), _faults(verification), _tables(verification), _skips(verification),
        _mutants(verification), _environment(verification), _everything(verification),
    )  # fmt: skip
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>vitkernels verify: {escape(verification.verdict)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


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
            yield _table(table)


def _skips(verification: Verification) -> Iterator[str]:
    rows = summary.skips(verification)
    if rows:
        yield "<h2>Skipped, and why</h2>"
        yield _table(Table(("why", "what"), rows, words=2))


def _mutants(verification: Verification) -> Iterator[str]:
    score, survivors = summary.mutants(verification)
    if score:
        yield "<h2>Can these checks fail?</h2>"
        yield f"<p>{escape(score)} Each is one wrong edit of a kernel, made for this run alone.</p>"
    if survivors:
        rows = [(r.check.removeprefix("mutants/"), r.detail) for r in survivors]
        yield _table(Table(("not caught", "why"), rows, words=2))


def _environment(verification: Verification) -> Iterator[str]:
    yield "<h2>Environment</h2>"
    rows = list((verification.environment | {"command": verification.command}).items())
    yield _table(Table(("run with", ""), rows, words=2))


def _everything(verification: Verification) -> Iterator[str]:
    yield "<h2>Every result</h2>"
    header = ("check", "what", "", "÷ PyTorch's", "figures or reason")
    for group in dict.fromkeys(r.group for r in verification.results):
        results = [r for r in verification.results if r.group == group]
        table = _table(Table(header, [_line(r) for r in results], words=5), wide=True)
        yield f"<details><summary>{escape(group)}, {len(results)}</summary>{table}</details>"


def _line(r: Result) -> tuple[str, ...]:
    return r.check.partition("/")[2] or r.check, r.name, r.status, summary.ratio_text(r.ratio), r.detail


def _table(table: Table, *, wide: bool = False) -> str:
    def cell(tag: str, column: int, text: str, heading: str) -> str:
        wrong = TONES.get(text, TONES.get(heading) if text != "0" else None)
        classes = ["figure"] * (column >= table.words) + [wrong] * (wrong is not None and tag == "td")
        attribute = f' class="{" ".join(classes)}"' if classes else ""
        return f"<{tag}{attribute}>{escape(text)}</{tag}>"

    def line(tag: str, cells: Iterable[str]) -> str:
        inside = "".join(cell(tag, *args) for args in zip(itertools.count(), cells, table.header))
        return f"<tr>{inside}</tr>"

    rows = "\n".join(line("td", row) for row in table.rows)
    head = line("th", table.header)
    kind = "table wide" if wide else "table"
    return f'<div class="{kind}"><table>\n<thead>{head}</thead>\n<tbody>\n{rows}\n</tbody></table></div>'
