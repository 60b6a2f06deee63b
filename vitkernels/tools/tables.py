"""Tables of words and figures as Markdown and HTML, and the page around them, which downloads nothing."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from html import escape

CSS = """
:root { color-scheme: light dark; --text: #1d2429; --page: #fff; --line: #e4e7e9; --soft: #56616a; --card: #f6f7f8;
        --mark: #eef7f3; --good: #0b7a55; --bad: #b3321f; --warn: #8a5a00; --link: #35506e; }
@media (prefers-color-scheme: dark) {
  :root { --text: #dfe4e8; --page: #14181b; --line: #2c343a; --soft: #98a4ad; --card: #1d2429;
          --mark: #17302a; --good: #4cc38a; --bad: #ff8a75; --warn: #e0b04c; --link: #9dbbe0; }
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
th.figure, td.figure { text-align: right; } td.figure { white-space: nowrap; }
td.good, td.bad, td.warn { font-weight: 600; }
.wide td:last-child { min-width: 20rem; overflow-wrap: anywhere; } .wide th { white-space: nowrap; }
.marks td:first-child, .marks th:first-child { padding-left: .4rem; }
tr.marked td { background: var(--mark); } tr.marked td:not(:first-child) { font-weight: 600; }
.fault { background: var(--card); padding: .6rem .9rem; margin: .7rem 0; overflow-wrap: anywhere; }
.fault h3 { font-size: .95rem; margin: 0; } .fault p { max-width: none; white-space: pre-wrap; }
code { font: .8rem/1.5 ui-monospace, "DejaVu Sans Mono", monospace; }
.fault code { display: block; color: var(--soft); user-select: all; }
figure { margin: 1rem 0 1.4rem; } img { max-width: 100%; height: auto; background: #fff; }
figcaption { font-size: .84rem; color: var(--soft); } summary { cursor: pointer; color: var(--link); }
@media (max-width: 600px) { body { margin: 1.2rem auto; padding: 0 .9rem; } h1 { font-size: 1.35rem; }
  th, td { padding-right: .55rem; } .wide th { white-space: normal; } .wide td:last-child { min-width: 14rem; } }
"""
# The colour of a cell that holds this word, and of a count above 0 under it.
TONES = {"met": "good", "better": "good", "not met": "bad", "worse": "bad", "failed": "bad", "broken": "warn"}


@dataclasses.dataclass(frozen=True)
class Table:
    """A table whose first ``words`` columns hold text and whose others hold figures.

    Rows in ``marked`` are highlighted. With a text in ``folded``, the table is collapsed under that title. The last
    column of a ``wide`` table holds long text.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1
    marked: frozenset[int] = frozenset()
    folded: str = ""
    wide: bool = False


def markdown_table(table: Table) -> str:
    """Return ``table`` in Markdown."""
    rule = ["---" if i < table.words else "---:" for i in range(len(table.header))]
    lines = [table.header, rule, *table.rows]
    text = "\n".join(f"| {' | '.join(cell.replace('|', '¦') for cell in line)} |" for line in lines)
    return f"<details><summary>{table.folded}</summary>\n\n{text}\n\n</details>" if table.folded else text


def html_table(table: Table) -> str:
    """Return ``table`` in HTML."""

    def cell(tag: str, column: int, text: str, heading: str) -> str:
        tone = TONES.get(text, TONES.get(heading) if text != "0" else None)
        classes = ["figure"] * (column >= table.words) + [tone] * (tone is not None and tag == "td")
        attribute = f' class="{" ".join(classes)}"' if classes else ""
        return f"<{tag}{attribute}>{escape(text)}</{tag}>"

    def line(tag: str, cells: Iterable[str], attribute: str = "") -> str:
        inside = "".join(cell(tag, *args) for args in zip(itertools.count(), cells, table.header))
        return f"<tr{attribute}>{inside}</tr>"

    rows = "\n".join(line("td", row, ' class="marked"' * (i in table.marked)) for i, row in enumerate(table.rows))
    kind = "table" + " wide" * table.wide + " marks" * bool(table.marked)
    head = line("th", table.header)
    text = f'<div class="{kind}"><table>\n<thead>{head}</thead>\n<tbody>\n{rows}\n</tbody></table></div>'
    return f"<details><summary>{escape(table.folded)}</summary>{text}</details>" if table.folded else text


def html_page(title: str, parts: Iterable[str]) -> str:
    """Return a page without scripts or downloads, light or dark by the reader's setting, with ``parts`` as its body."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n" + "\n".join(parts) + "\n</body>\n"
        "</html>\n"
    )
