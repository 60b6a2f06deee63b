"""Write docs/mutants.md: what catches each seeded defect, ``verify`` and the project's own tests.

    python docs/make_mutants.py [--minutes N] [--new]

For each defect of ``vitkernels.tools.verify.mutants``, the script runs the check that should catch it. Then it runs
pytest with ``--mutant NAME`` until a test fails: first the test that failed last, as the page has it, then that test's
file, then all of the ops, then the whole suite. The page says which defects were not run because the minutes ran out.
With ``--new`` a defect whose place has not changed keeps its row, and the page says how many do.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import re
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

os.environ["VITKERNELS_BACKEND"] = "emulated"

import hypothesis  # noqa: F401  imported here, like _dynamo, or every forked pytest would import them again
import pytest
import torch
import torch._dynamo
import triton

import vitkernels
from vitkernels.tools.console import track
from vitkernels.tools.verify.mutants import MUTANTS, CompiledMutant, Mutant, catch
from vitkernels.tools.verify.results import Result

PAGE = Path(__file__).with_name("mutants.md")
ROOT = PAGE.parents[1]
HEAD = """\
# Seeded defects

A test suite that cannot fail proves nothing. Each line is a slip that a person makes in a kernel or in what launches
it, one edit of the source, as `vitkernels/tools/verify/mutants/defects.py` has it, or one edit of the PTX that comes of
it, as `compiled.py` beside it has: a barrier, a wait or a fence dropped, say. Each run of `vitkernels verify` puts them
in one by one, and is invalid unless its own checks catch 95 % of them; `pytest --mutant NAME` runs the project's tests
with one inside. Written by `docs/make_mutants.py` on {date} with vitkernels {version}, torch {torch}, triton {triton},
Python {python}, on an emulated H100, seed 0.

**{caught} of {all} are caught by `verify`'s checks. {killed} of the {tried} that the tests were run with make a test
fail.**{rest}

| defect | where | caught by | first test that fails |
|---|---|---|---|
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no tests after so many")
    parser.add_argument("--new", action="store_true", help="only those that the page lacks, has elsewhere, or not run")
    args = parser.parse_args()
    end = time.monotonic() + 60 * args.minutes
    os.chdir(ROOT)
    torch.set_num_threads(1)
    before, kept, rows = failed_last(), rows_of_the_page() if args.new else {}, []
    for mutant in track(MUTANTS, "Seeding defects"):
        row = kept.get((mutant.name, mutant.where))
        if row is None:
            caught = catch(mutant, torch.device("cpu"), 0)
            row = row_of(mutant, caught, first_failure(mutant, before.get(mutant.name, "ops"), end))
        rows.append(row)
    write(rows)


class Row(NamedTuple):
    """A line of the page.

    Attributes:
        line: Its text.
        caught: Whether a check of ``verify`` fails.
        test: The test that fails; "" if none does, None if there was no time.
        kept: Whether it is of an earlier run.
    """

    line: str
    caught: bool
    test: str | None
    kept: bool = False


def row_of(mutant: Mutant | CompiledMutant, caught: Result, test: str | None) -> Row:
    by = caught.detail
    if caught.status == "passed":  # the check and what of it failed, without the figures
        by = ": ".join(by.removeprefix("by ").split(": ")[:2])
    shown = "not run" if test is None else f"`{test}`" if test else "survives"
    return Row(f"| {mutant.name} | `{mutant.where}` | {by} | {shown} |\n", caught.status == "passed", test)


def rows_of_the_page() -> dict[tuple[str, str], Row]:
    """Return the page's rows that were run, caught and made a test fail, by the defect's name and place."""
    text = PAGE.read_text(encoding="utf-8")
    found = re.finditer(r"^\| (.+?) \| `(.+?)` \| (?!survived|cannot).+ \| `(.+)` \|\n", text, re.M)
    return {(row[1], row[2]): Row(row[0], True, row[3], kept=True) for row in found}


def failed_last() -> dict[str, str]:
    """Return, by defect, the test that the page names, without its parameters."""
    return dict(re.findall(r"^\| (.+?) \|.*\| `([\w/]+\.py::\w+)[^|]*` \|$", PAGE.read_text(encoding="utf-8"), re.M))


def first_failure(mutant: Mutant | CompiledMutant, failed: str, end: float) -> str | None:
    """Return the first of the project's tests that fails with ``mutant``; "" if none fails, None if time ran out.

    ``failed`` is the test that failed last, which may not exist any more.
    """
    for tests in dict.fromkeys((f"tests/{failed}", f"tests/{failed.partition('::')[0]}", "tests/ops", "tests")):
        if time.monotonic() > end:
            return None
        with tempfile.TemporaryFile() as output:
            # A fork does not import PyTorch and Triton again.
            process = get_context("fork").Process(target=_pytest, args=(mutant.name, tests, output.fileno()))
            process.start()
            process.join(max(0.0, min(end - time.monotonic(), 3600)))
            if process.is_alive():
                process.kill()
                process.join()
                return None
            output.seek(0)
            text = output.read().decode()
        if process.exitcode == 1:
            return re.search(r"^(?:FAILED|ERROR) (?:tests/)?(.+?)(?: - .*)?$", text, re.MULTILINE).group(1)
        # A usage error: there is no such test.
        if process.exitcode not in (pytest.ExitCode.OK, pytest.ExitCode.USAGE_ERROR):
            sys.exit(f"pytest {tests} with {mutant.name!r} ended with {process.exitcode}:\n{text[-4000:]}")
    return ""


def _pytest(name: str, tests: str, output: int) -> None:
    os.dup2(output, 1)
    os.dup2(output, 2)
    code = pytest.main(["-o", "addopts=", "-p", "no:cacheprovider", "-q", "-x", "--mutant", name, tests])
    sys.stdout.flush()
    os._exit(code)


def write(rows: list[Row]) -> None:
    tried = [row for row in rows if row.test is not None]
    missing, kept = len(rows) - len(tried), sum(row.kept for row in rows)
    rest = f" For want of time they were not run with the other {missing}." if missing else ""
    head = HEAD.format(
        date=datetime.date.today(),
        version=vitkernels.__version__,
        torch=torch.__version__,
        triton=triton.__version__,
        python=platform.python_version(),
        caught=sum(row.caught for row in rows),
        all=len(rows),
        killed=sum(bool(row.test) for row in tried),
        tried=len(tried),
        rest=rest + (f" The rows of {kept} are of earlier runs." if kept else ""),
    )
    PAGE.write_text(head + "".join(row.line for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
