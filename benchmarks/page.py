"""Generate the results in docs/benchmarks.md from the newest run of each device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from benchmarks.environment import ROOT
from benchmarks.formats import bytes_text, time_text, workload_name
from benchmarks.goals import GOALS
from benchmarks.report import duels, score
from benchmarks.schema import Results, load
from vitkernels.tools import _interrupt
from vitkernels.tools.console import UserError
from vitkernels.tools.tables import Table, markdown_table

PAGE = ROOT / "docs" / "benchmarks.md"
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"


def update(page: Path = PAGE, kept: Path = RESULTS, *, write: bool = True) -> bool:
    """Update the results in ``page`` from the runs in ``kept``, and return whether they were out of date.

    Args:
        page: The file in Markdown.
        kept: Folder of the runs, one folder per device.
        write: False only checks.

    Raises:
        UserError: The page lacks the marker lines around the results.
    """
    text = page.read_text(encoding="utf-8")
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{page} has no lines {BEGIN} and {END}: put them where the results belong")
    new = f"{head}{BEGIN}\n{section(kept)}\n{END}{tail}"
    if write and new != text:
        with _interrupt.writing():
            page.write_text(new, encoding="utf-8")
    return new != text


def section(kept: Path) -> str:
    """Return the results in Markdown, one part per device, from its newest run."""
    runs = [load(max(folder.glob("*.json"), key=lambda file: load(file).date)) for folder in _folders(kept)]
    runs.sort(key=lambda results: results.device["kind"] == "cpu")  # GPUs first
    return "\n\n".join(part for results in runs for part in _parts(results)) or "No run is kept yet."


def _folders(kept: Path) -> list[Path]:
    return sorted({file.parent for file in kept.glob("*/*.json")})


def _parts(results: Results) -> Iterator[str]:
    versions, said = results.versions, score(results.rows)
    yield (
        f"**{results.device['name']}**, {results.date[:10]}, commit {results.commit or 'unknown'}, torch "
        f"{versions.get('torch')}, Triton {versions.get('triton', 'absent')}, suite {results.suite}. {said}"
    )
    goals = [(goal.text, *goal.verdict(results)) for goal in GOALS if goal.device in ("any", results.device["kind"])]
    yield markdown_table(Table(("goal", "measured", ""), goals, words=1))
    lines = [
        (
            workload_name(ours),
            f"{ours.provider} {time_text(ours.time.median)}",
            f"{rival.provider} {time_text(rival.time.median)}",
            f"{ours.over_best_rival:.2f}",
            "" if ours.peak_bytes is None else bytes_text(ours.peak_bytes),
        )
        for ours, rival in duels(results.rows)
        if ours.kind == "model"
    ]
    if lines:
        yield markdown_table(Table(("model", "ours", "best rival", "×", "our peak memory"), lines, words=3))
