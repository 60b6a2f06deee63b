"""The report at a terminal, with the verdict in the last line."""

from __future__ import annotations

import textwrap

from vitkernels.tools.console import print_table
from vitkernels.tools.verify.report import summary
from vitkernels.tools.verify.results import Verification

WIDTH = 100


def print_report(verification: Verification) -> None:
    """Print the tables, all failures with the commands that repeat them, and the verdict."""
    for line in summary.facts(verification):
        print(line)
    for table in (summary.by_op(verification), summary.by_group(verification)):
        if table.rows:
            print()
            print_table(table.header, table.rows)
    for status, title in (("failed", "Failed"), ("broken", "Could not run, or proves nothing")):
        found = summary.faults(verification, status)
        if found:
            print(f"\n{title}, {sum(map(len, found.values()))}:")
        for check, results in found.items():
            print(f"\n  {check}")
            for result in results:
                _print_wrapped(f"{result.name}: {result.detail}")
            print(f"    {verification.reproduce(results[0])}")
    skips = summary.skips(verification)
    if skips:
        print("\nSkipped:")
        for reason, what in skips:
            _print_wrapped(f"{reason}: {what}")
    score, survivors = summary.mutants(verification)
    if score:
        print(f"\n{score}")
        for result in survivors:
            _print_wrapped(f"{result.check.removeprefix('mutants/')}: {result.detail}")
    print(f"\n{summary.verdict(verification)}")


def _print_wrapped(text: str) -> None:
    for line in text.splitlines():
        print(textwrap.fill(line, WIDTH, initial_indent="    ", subsequent_indent="      ", break_on_hyphens=False))
