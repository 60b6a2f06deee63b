"""The results of one check of ``vitkernels verify``, and of a whole run."""

from __future__ import annotations

import dataclasses
import fnmatch
import shlex
from collections.abc import Callable, Iterable
from typing import Literal

Status = Literal["passed", "failed", "skipped", "broken"]

PASSED, NUMERICS, INVALID, NOTHING = 0, 1, 2, 3  # exit codes


@dataclasses.dataclass(frozen=True)
class Result:
    """One line of the report.

    Attributes:
        check: The check's id, ``group/subject/…``.
        name: What was looked at: an output, a gradient, a property.
        status: ``passed``; ``failed`` if the numbers or the behaviour are wrong; ``skipped``, with the reason in
            ``detail``; ``broken`` if the check itself could not run or proved nothing.
        detail: Figures with their limits, the worst index, or the reason.
        ratio: Our error divided by PyTorch's in the same dtype, or None if not measured.
        dtype: Dtype of the inputs, or "".
        seconds: Duration: the check's time divided by its number of results.
    """

    check: str
    name: str
    status: Status
    detail: str = ""
    ratio: float | None = None
    dtype: str = ""
    seconds: float = 0.0

    @property
    def group(self) -> str:
        """The first part of the check's id."""
        return self.check.partition("/")[0]


@dataclasses.dataclass(frozen=True)
class Check:
    """One check: the id that selects and repeats it, and the function that runs it."""

    id: str
    run: Callable[[], Iterable[Result]]

    def matches(self, patterns: Iterable[str]) -> bool:
        """Tell whether one of ``patterns`` is the id, its first parts (``group/subject``) or a shell pattern of it."""
        return any(
            self.id == p or self.id.startswith(p.rstrip("/") + "/") or fnmatch.fnmatchcase(self.id, p) for p in patterns
        )


@dataclasses.dataclass
class Verification:
    """A whole run.

    Attributes:
        environment: Versions, device and date, for which the results hold.
        command: The command that repeats the run.
        results: Every result, in the order of the checks.
        seconds: Wall time.
    """

    environment: dict[str, str]
    command: str
    results: list[Result] = dataclasses.field(default_factory=list)
    seconds: float = 0.0

    def by_status(self, status: Status) -> list[Result]:
        """Return the results of one status."""
        return [r for r in self.results if r.status == status]

    @property
    def exit_code(self) -> int:
        """0: passed, 1: wrong numbers, 2: a check could not run or the self-test failed, 3: nothing was verified."""
        if self.by_status("failed"):
            return NUMERICS
        if self.by_status("broken"):
            return INVALID
        # A passed self-test alone says nothing about the kernels.
        return PASSED if any(r.status == "passed" and r.group != "mutants" for r in self.results) else NOTHING

    @property
    def verdict(self) -> str:
        """The exit code in words."""
        return {
            PASSED: "passed",
            NUMERICS: "failed: numbers or behaviour are wrong",
            INVALID: "invalid: a check could not run, or the self-test let a seeded defect through",
            NOTHING: "nothing was verified",
        }[self.exit_code]

    def to_dict(self) -> dict:
        """Return the verification as plain data, for JSON."""
        return {
            "verdict": self.verdict,
            "exit_code": self.exit_code,
            "command": self.command,
            "seconds": round(self.seconds, 3),
            "environment": self.environment,
            "results": [dataclasses.asdict(r) for r in self.results],
        }

    def reproduce(self, result: Result) -> str:
        """Return the command that runs only ``result``'s check."""
        words = shlex.split(self.command)
        if "--only" in words:
            words = words[: words.index("--only")]
        return shlex.join([*words, "--only", result.check])
