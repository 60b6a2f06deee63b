"""Write docs/mutants.md: what catches each seeded defect, ``verify`` and the project's own tests.

    python docs/make_mutants.py [--minutes N]

For each defect of ``vitkernels.tools.verify.mutants``, the script runs the check that should catch it. Then it runs
pytest with ``--mutant NAME`` until a test fails: first the test that failed last, as the page has it, then that test's
file, then all of the ops, then the whole suite. The page says which defects were not run because the minutes ran out.
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

os.environ["VITKERNELS_BACKEND"] = "emulated"

import hypothesis  # noqa: F401  imported here, like _dynamo, or every forked pytest would import them again
import pytest
import torch
import torch._dynamo
import triton

import vitkernels
from vitkernels.tools.console import track
from vitkernels.tools.verify.mutants import MUTANTS, CompiledMutant, Mutant, catch

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
    end = time.monotonic() + 60 * parser.parse_args().minutes
    os.chdir(ROOT)
    torch.set_num_threads(1)
    before, rows = failed_last(), []
    for mutant in track(MUTANTS, "Seeding defects"):
        caught = catch(mutant, torch.device("cpu"), 0)
        rows.append((mutant, caught, first_failure(mutant, before.get(mutant.name, "ops"), end)))
        write(rows)


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


def write(rows: list[tuple]) -> None:
    tried = [row for row in rows if row[2] is not None]
    missing = len(MUTANTS) - len(tried)
    head = HEAD.format(
        date=datetime.date.today(),
        version=vitkernels.__version__,
        torch=torch.__version__,
        triton=triton.__version__,
        python=platform.python_version(),
        caught=sum(caught.status == "passed" for _, caught, _ in rows),
        all=len(MUTANTS),
        killed=sum(bool(test) for *_, test in tried),
        tried=len(tried),
        rest=f" For want of time they were not run with the other {missing}." if missing else "",
    )
    lines = []
    for mutant, caught, test in rows:
        by = caught.detail
        if caught.status == "passed":  # the check and what of it failed, without the figures
            by = ": ".join(by.removeprefix("by ").split(": ")[:2])
        test = "not run" if test is None else f"`{test}`" if test else "survives"
        lines.append(f"| {mutant.name} | `{mutant.where}` | {by} | {test} |\n")
    PAGE.write_text(head + "".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
