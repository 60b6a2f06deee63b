"""What a check of ``vitkernels verify`` found, and what a run of them found together."""

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
        status: ``passed``; ``failed``, the numbers or the behaviour are wrong; ``skipped``, with its reason in
            ``detail``; ``broken``, the check itself could not run or proved nothing.
        detail: Figures with their limits, the worst index, or the reason.
        ratio: The error over PyTorch's own in the same dtype, where one was measured.
        dtype: Of the operands, where there is one.
        seconds: How long it took.
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
    """Something to look at: an id to choose and to repeat it by, and what looks."""

    id: str
    run: Callable[[], Iterable[Result]]

    def matches(self, patterns: Iterable[str]) -> bool:
        """Tell whether one of the shell patterns ``patterns`` fits the id, or a part of it from its start."""
        return any(
            self.id == p or self.id.startswith(p.rstrip("/") + "/") or fnmatch.fnmatchcase(self.id, p) for p in patterns
        )


@dataclasses.dataclass
class Verification:
    """A whole run.

    Attributes:
        environment: Versions, device, date: what the results hold for.
        command: The command that repeats it.
        results: Every line, in the order of the checks.
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
        """0 all passed, 1 numbers are wrong, 2 the machine or the self-test fails, 3 nothing was verified."""
        if self.by_status("failed"):
            return NUMERICS
        if self.by_status("broken"):
            return INVALID
        # That a defect would be seen says nothing of the kernels by itself.
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
        """Return all of it as plain data, for JSON."""
        return {
            "verdict": self.verdict,
            "exit_code": self.exit_code,
            "command": self.command,
            "seconds": round(self.seconds, 3),
            "environment": self.environment,
            "results": [dataclasses.asdict(r) for r in self.results],
        }

    def reproduce(self, result: Result) -> str:
        """Return the command that runs ``result``'s check alone."""
        words = shlex.split(self.command)
        if "--only" in words:
            words = words[: words.index("--only")]
        return shlex.join([*words, "--only", result.check])
