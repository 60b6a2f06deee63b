"""Write docs/hostile-inputs.md: the answer to every hostile input, from the marks of tests/hostile.

    python docs/make_hostile_inputs.py

No test runs: pytest only collects them, and the mark ``hostile(number, input, answer)`` of each says what it tests.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = Path(__file__).with_name("hostile-inputs.md")
GROUPS = {
    1: "Sizes", 10: "Layouts", 18: "Images, dtypes, devices, kinds of tensors", 32: "Values", 38: "Attention",
    43: "Autograd", 49: "Running", 53: "Files",
}  # fmt: skip
HEAD = """\
# Hostile inputs

What users may hand to this package by mistake or malice, and what it answers: an error of the right type that says what
came and what is wanted, before any kernel is launched, or the right result by
[the error rule](../vitkernels/testing/compare.py). Every line is a test; `docs/make_hostile_inputs.py` makes this page
from them. What needs no GPU runs the kernels on an emulated one, or compiles them for a GPU that is not there.
"""


@dataclasses.dataclass
class Test:
    """One test function, over all its parameters."""

    number: int
    input: str
    answer: str
    name: str
    file: str
    needs: str
    ops: list[str]


class _Collected:
    """A plugin for pytest that stores the collected tests."""

    def __init__(self):
        self.tests: dict[str, Test] = {}

    def pytest_collection_modifyitems(self, items):
        for item in items:
            mark = item.get_closest_marker("hostile")
            if mark is None:
                continue
            reasons = [m.kwargs["reason"] for m in item.iter_markers("skipif")]
            needs = next((r for r in reasons if r.startswith("needs")), "")
            name, file = item.originalname, item.path.relative_to(ROOT).as_posix()
            test = self.tests.setdefault(f"{file}::{name}", Test(*mark.args, name, file, needs, []))
            op = item.callspec.params.get("op") if hasattr(item, "callspec") else None
            if op and op not in test.ops:
                test.ops.append(op)


def collect() -> list[Test]:
    """Return the tests by number, in the order of their files.

    Raises:
        RuntimeError: pytest could not collect them.
    """
    found, said = _Collected(), io.StringIO()
    with contextlib.redirect_stdout(said):
        options = ["--collect-only", "-q", "-p", "no:xdist", "-o", "addopts=", f"--rootdir={ROOT}"]
        code = pytest.main([*options, str(ROOT / "tests" / "hostile")], plugins=[found])
    if code != pytest.ExitCode.OK:
        raise RuntimeError(said.getvalue())
    return sorted(found.tests.values(), key=lambda test: test.number)


def lines(tests: list[Test], all_ops: int) -> Iterator[str]:
    """Yield the parts of the page."""
    yield HEAD
    before = 0
    for test in tests:
        for first, title in GROUPS.items():
            if before < first <= test.number:
                yield f"\n## {title}\n\n| | input | answer | ops | where | test |\n|--:|---|---|---|---|---|\n"
        number = test.number if test.number != before else ""
        before = test.number
        ops = "all" if len(test.ops) == all_ops else ", ".join(f"`{op}`" for op in test.ops) or "—"
        yield (
            f"| {number} | {test.input} | {test.answer} | {ops} | {test.needs or 'anywhere'} "
            f"| [{test.name}](../{test.file}) |\n"
        )


def page() -> str:
    """Return the text of the page."""
    tests = collect()
    return "".join(lines(tests, max(len(test.ops) for test in tests)))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"Wrote {PAGE}")
