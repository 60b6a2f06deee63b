"""Render a run as Markdown, HTML and pictures, and compare two runs."""

from __future__ import annotations

import base64
import collections
import dataclasses
import html
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.formats import bytes_text, spread_text, time_text, workload_name
from benchmarks.goals import GOALS
from benchmarks.schema import Results, Row
from vitkernels.tools import _interrupt
from vitkernels.tools.tables import Table, html_page, html_table, markdown_table

DPI = 150
LISTED = 12  # most names in a cell
METHOD = """\
Rivals take turns, one sample each a round, in an order that rotates; given are the median and the 20th and 80th
percentile. Inputs are random. On a GPU, device time is taken between two events on a cold L2 cache; of ops below 50 µs
from a CUDA graph over copies of the inputs that L2 cannot hold together. Host time is until the call returned. What a
call costs but for its launches is told by those samples, of 0.2 ms, before and after which a fixed loop of Python ran
within a tenth of its fastest: the others are a neighbour's on the core. It depends on how Python was compiled. "Of the
roofline" is the time that this run's own ceilings (a square product, a copy) allow for the FLOPs and bytes that the
workload needs at the least, over the time taken. Errors are against fp64, the largest over outputs and gradients, and
"÷ PyTorch's" is over that of plain PyTorch in the same dtype. A result that breaks the rule of
vitkernels/testing/compare.py (of a whole network: an RMS error above 1.5 × PyTorch's, over the first 8 images) gets no
time."""


@dataclasses.dataclass(frozen=True)
class Heading:
    text: str


@dataclasses.dataclass(frozen=True)
class Text:
    text: str


@dataclasses.dataclass(frozen=True)
class Picture:
    name: str
    caption: str
    png: bytes


Block = Heading | Text | Table | Picture


def write_report(results: Results, out: Path, *, before: Results | None = None) -> list[Path]:
    """Write ``report.md``, ``report.html`` and the pictures of ``results`` to ``out``; return the files.

    Args:
        results: The run.
        out: A folder, created if it is missing.
        before: An earlier run to compare with.
    """
    out.mkdir(parents=True, exist_ok=True)
    title = f"vitkernels on {results.device['name']}"
    blocks = list(_blocks(results, before))
    files = []
    for block in blocks:
        if isinstance(block, Picture):
            files.append(out / f"{block.name}.png")
            with _interrupt.writing():
                files[-1].write_bytes(block.png)
    for name, text in (("report.md", to_markdown(title, blocks)), ("report.html", to_html(title, blocks))):
        files.append(out / name)
        with _interrupt.writing():
            files[-1].write_text(text, encoding="utf-8")
    return files


def _blocks(results: Results, before: Results | None) -> Iterator[Block]:
    yield Text(_facts(results))
    if before is not None:
        yield from comparison(before, results)
    yield Heading("In short")
    yield Text(score(results.rows))
    yield Table(("goal", "measured", ""), [(goal.text, *goal.verdict(results)) for goal in GOALS], words=3)
    pictures = {picture.name: picture for picture in _pictures(results)}
    yield from _losses(results.rows)
    yield from _models(results.rows, pictures)
    yield from _ops(results, pictures)
    yield from _costs(results.rows, pictures)
    yield from _counts(results.rows, pictures)
    yield from _checks(results.rows)
    yield from _absent(results)
    yield Heading("Method")
    yield Text(METHOD)
    yield Table(("ceiling", "highest rate seen in this run"), [(n, f"{v:.4g}") for n, v in results.ceilings.items()])
    facts = results.device | results.versions | results.clocks
    yield Table(("device and versions", ""), [(name, str(value)) for name, value in facts.items()], words=2)


def _facts(results: Results) -> str:
    state = "" if results.complete else " It was interrupted: what follows is what it had by then."
    return (
        f"Suite {results.suite}, {results.date}, commit {results.commit or 'unknown'}, torch "
        f"{results.versions.get('torch')}, Triton {results.versions.get('triton', 'absent')}. The run took "
        f"{results.elapsed_s:.0f} s of the {results.budget_s:.0f} s given.{state}"
    )


def _pictures(results: Results) -> Iterator[Picture]:
    try:
        from benchmarks.plots import draw_all
    except ImportError:
        return
    for name, (caption, figure) in draw_all(results).items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=DPI)
        yield Picture(name, caption, buffer.getvalue())


def standing(row: Row, rival: Row) -> str:
    """Return whether ``row`` is ``faster`` or ``slower`` than ``rival`` beyond both spreads, or ``level``."""
    if row.time.p80 < rival.time.p20:
        return "faster"
    return "slower" if row.time.p20 > rival.time.p80 else "level"


def duels(rows: list[Row]) -> Iterator[tuple[Row, Row]]:
    """Yield our best row and the best rival's row of each workload that has both."""
    by_workload: dict[tuple, list[Row]] = collections.defaultdict(list)
    for row in rows:
        if row.kind in ("op", "model") and row.time is not None:
            by_workload[row.workload].append(row)
    for group in by_workload.values():
        ours, rivals = ([row for row in group if row.ours == mine] for mine in (True, False))
        if ours and rivals:
            yield tuple(min(side, key=lambda row: row.time.median) for side in (ours, rivals))


def score(rows: list[Row]) -> str:
    """Return a summary of how our rows compare with the best rivals."""
    counts = collections.Counter(standing(*duel) for duel in duels(rows))
    wrong = sum(row.status == "wrong" for row in rows)
    total = sum(counts.values())
    if not total:
        return "No workload was timed with a rival."
    return (
        f"Of {total} workloads timed against rivals, ours is faster than the best of them beyond the spread in "
        f"{counts['faster']}, level in {counts['level']}, slower in {counts['slower']}. Wrong results: {wrong}."
    )


def _losses(rows: list[Row]) -> Iterator[Block]:
    lost = [(ours, rival) for ours, rival in duels(rows) if standing(ours, rival) == "slower"]
    if not lost:
        return
    yield Heading("Where we lose")
    lines = [
        (workload_name(ours), rival.provider, _culprit(ours, rows), f"{ours.over_best_rival:.2f}")
        for ours, rival in lost
    ]
    yield Table(("workload", "best rival", "the op that loses it", "× its speed"), lines, words=3)


def _culprit(model: Row, rows: list[Row]) -> str:
    """Return the op of a slower model that is worst against its rivals, if the run has ops of that shape."""
    if model.kind != "model":
        return model.name
    mode = "forward" if model.mode == "inference" else "both"
    ops = [row for row, _ in duels(rows) if row.kind == "op" and (row.case, row.mode) == (model.name, mode)]
    if not ops:
        return "not measured at this shape"
    worst = min(ops, key=lambda row: row.over_best_rival)
    return f"{worst.name} ({worst.over_best_rival:.2f} ×)"


def _models(rows: list[Row], pictures: dict[str, Picture]) -> Iterator[Block]:
    found = [row for row in rows if row.kind == "model" and row.time is not None]
    if not found:
        return
    yield Heading("Models")
    yield from (pictures[name] for name in ("throughput", "memory") if name in pictures)
    yield _timed_table(
        found,
        ("images/s", "peak memory"),
        lambda row: (
            f"{row.batch / row.time.median * 1e6:.4g}",
            "" if row.peak_bytes is None else bytes_text(row.peak_bytes),
        ),
    )


def _ops(results: Results, pictures: dict[str, Picture]) -> Iterator[Block]:
    found = [row for row in results.rows if row.kind == "op" and row.time is not None]
    if not found:
        return
    yield Heading("Ops")
    if results.device["kind"] == "cpu":
        yield Text("On a CPU our ops check their input and then run PyTorch's: what they lose here is those checks.")
    yield from (pictures[name] for name in ("speed", "roofline") if name in pictures)
    yield _timed_table(
        found,
        ("TFLOP/s", "GB/s"),
        lambda row: (f"{row.flops / row.time.median / 1e6:.3g}", f"{row.bytes / row.time.median / 1e3:.3g}"),
    )


def _timed_table(rows: list[Row], header: tuple[str, ...], more) -> Table:
    columns = ("workload", "provider", "time", "20 % – 80 %", "host", *header)
    columns += ("of the roofline", "× best rival", "error", "÷ PyTorch's")
    lines, before = [], None
    for row in rows:
        name = workload_name(row)
        lines.append(
            (
                name if name != before else "",
                row.provider,
                time_text(row.time.median),
                spread_text(row.time),
                "" if row.host is None else time_text(row.host.median),
                *more(row),
                "" if row.of_roofline is None else f"{100 * row.of_roofline:.0f} %",
                "" if row.over_best_rival is None else f"{row.over_best_rival:.2f}",
                "" if row.error is None else f"{row.error:.2g}",
                "" if row.error_ratio is None else f"{row.error_ratio:.2f}",
            )
        )
        before = name
    filled = [i for i in range(len(columns)) if any(line[i] for line in lines)]
    columns, *lines = ([line[i] for i in filled] for line in (columns, *lines))
    return Table(columns, lines, words=2, marked=frozenset(i for i, row in enumerate(rows) if row.ours))


def _costs(rows: list[Row], pictures: dict[str, Picture]) -> Iterator[Block]:
    found = [row for row in rows if row.kind == "cost" and row.time is not None]
    if not found:
        return
    yield Heading("Costs on the host")
    if "calls" in pictures:
        yield pictures["calls"]
    lines = [
        (
            row.name, row.case, row.provider, row.mode, time_text(row.time.median), spread_text(row.time),
            str(row.time.samples),
        )
        for row in found
    ]  # fmt: skip
    yield Table(("what", "of", "by", "how", "time", "20 % – 80 %", "samples"), lines, words=4)


def _counts(rows: list[Row], pictures: dict[str, Picture]) -> Iterator[Block]:
    found = [row for row in rows if row.status == "counted"]
    if not found:
        return
    yield Heading("Counted, not timed")
    if "traffic" in pictures:
        yield pictures["traffic"]
    kinds: dict[tuple, list[Row]] = collections.defaultdict(list)
    for row in found:
        kinds[tuple(row.figures)].append(row)
    for names, group in kinds.items():
        formula = group[0].provider == "formula"
        header = ["what", "case", "of", "by", *(["GFLOP", "bytes"] if formula else []), *map(_said, names)]
        lines = [
            [
                row.name, row.case, row.mode, row.provider,
                *([f"{row.flops / 1e9:.3g}", bytes_text(row.bytes)] if formula else []),
                *(f"{value:.4g}" for value in row.figures.values()),
            ]
            for row in group
        ]  # fmt: skip
        yield Table(header, lines, words=4, folded=f"{len(group)} rows" if len(group) > 40 else "")


def _checks(rows: list[Row]) -> Iterator[Block]:
    found = [row for row in rows if row.kind == "check" and row.status in ("passed", "wrong")]
    if not found:
        return
    passed = sum(row.status == "passed" for row in found)
    yield Heading("Checked on this device, before any timing")
    yield Text(f"{passed} of {len(found)} checks of outputs and gradients passed.")
    lines = [
        (
            workload_name(row), row.status, *("" if x is None else f"{x:.2g}" for x in (row.error, row.error_ratio)),
        )
        for row in found
    ]  # fmt: skip
    yield Table(("op", "", "error", "÷ PyTorch's"), lines, words=2, folded=f"{len(lines)} checks")


def _said(name: str) -> str:
    return name.replace("_", " ")


def _absent(results: Results) -> Iterator[Block]:
    found: dict[tuple[str, str], list[str]] = collections.defaultdict(list)
    for row in results.rows:
        if row.reason:
            found[row.status, row.reason].append(f"{workload_name(row)}: {row.provider}")
    for status, whys in (("skipped", results.providers), ("left out", results.left_out)):
        for what, reason in whys.items():
            found[status, reason].append(what)
    if found:
        yield Heading("Not measured, and why")
        lines = [(_listed(whats), status, reason) for (status, reason), whats in found.items()]
        yield Table(("what", "", "why"), lines, words=3)


def _listed(names: list[str]) -> str:
    more = len(names) - LISTED
    return "; ".join(names[:LISTED]) + (f"; and {more} more, named in the JSON" if more > 0 else "")


def comparison(before: Results, after: Results) -> Iterator[Block]:
    """Yield the report's part on what changed from ``before`` to ``after``."""
    yield Heading(f"Against {before.commit or 'the earlier run'}, {before.date}")
    if before.device != after.device:
        yield Text(
            f"The devices differ ({before.device['name']} and {after.device['name']}): times say little about the code."
        )
    changes = changed(before, after)
    worse = sum(change.worse for change in changes)
    compared = len({row.key for row in before.rows} & {row.key for row in after.rows})
    yield Text(f"{compared} rows in common; {worse} worse, {len(changes) - worse} better, the rest within the spread.")
    if changes:
        lines = [(c.name, c.what, c.before, c.after, "worse" if c.worse else "better") for c in changes]
        yield Table(("row", "figure", "before", "after", ""), lines, words=2)


@dataclasses.dataclass(frozen=True)
class Change:
    """A row's figure that changed: a time beyond the spread, a result's correctness, or a count by any amount."""

    name: str
    what: str
    before: str
    after: str
    worse: bool


# For each compared count, whether a higher one is worse.
WORSE_IF_MORE = {"registers": True, "spilled_bytes": True, "shared_bytes": True, "blocks": False, "extra": True,
                 "narrow_in_loop": True, "atomics": True}  # fmt: skip


def changed(before: Results, after: Results) -> list[Change]:
    """Return changes of times beyond both spreads, of correctness and of counts; changes for the worse come first."""
    old = {row.key: row for row in before.rows}
    changes = []
    for row in after.rows:
        was = old.get(row.key)
        if was is None:
            continue
        name = f"{workload_name(row)}: {row.provider}"
        if was.time is not None and row.time is not None and (verdict := standing(row, was)) != "level":
            figures = [f"{time_text(t.median)} ({spread_text(t)})" for t in (was.time, row.time)]
            changes.append(Change(name, "time", *figures, worse=verdict == "slower"))
        elif (was.status == "wrong") != (row.status == "wrong"):
            changes.append(Change(name, "result", was.status, row.status, worse=row.status == "wrong"))
        for what in WORSE_IF_MORE.keys() & row.figures.keys() & was.figures.keys():
            a, b = was.figures[what], row.figures[what]
            if a != b:
                changes.append(Change(name, _said(what), f"{a:.4g}", f"{b:.4g}", (b > a) == WORSE_IF_MORE[what]))
    return sorted(changes, key=lambda change: not change.worse)


def to_markdown(title: str, blocks: Sequence[Block]) -> str:
    """Return the report in Markdown, which refers to pictures in the same folder."""
    parts = [f"# {title}"]
    for block in blocks:
        match block:
            case Heading(text):
                parts.append(f"## {text}")
            case Text(text):
                parts.append(text)
            case Picture(name, caption, _):
                parts.append(f"![{caption}]({name}.png)")
            case Table():
                parts.append(markdown_table(block))
    return "\n\n".join(parts) + "\n"


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """Return the report as one self-contained HTML page."""
    parts = [f"<h1>{html.escape(title)}</h1>"]
    for block in blocks:
        match block:
            case Heading(text):
                parts.append(f"<h2>{html.escape(text)}</h2>")
            case Text(text):
                parts.append(f"<p>{html.escape(text)}</p>")
            case Picture(_, caption, png):
                source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
                width = int.from_bytes(png[16:20], "big") * 96 // DPI  # so that its fonts match the text's
                caption = html.escape(caption)
                image = f'<img src="{source}" alt="{caption}" width="{width}">'
                parts.append(f"<figure>{image}<figcaption>{caption}</figcaption></figure>")
            case Table():
                parts.append(html_table(block))
    return html_page(title, parts)
