"""The report as JUnit XML, for the test views of GitHub, GitLab and Jenkins."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from vitkernels.tools.verify.report import summary
from vitkernels.tools.verify.results import Result, Verification

# Characters that XML 1.0 forbids even escaped: most control characters, such as those of a coloured error message.
_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def to_junit(verification: Verification) -> str:
    """Return a ``testsuite`` for each group of checks and a ``testcase`` for each result.

    A failed result is a ``failure``, and a check that could not run is an ``error``; both hold the command that repeats
    it. Each suite's ``properties`` are the environment. A suite's time is the sum over its results, in parallel or not.
    """
    root = ElementTree.Element("testsuites", _attributes("vitkernels verify", verification.results))
    for group in dict.fromkeys(r.group for r in verification.results):
        results = [r for r in verification.results if r.group == group]
        attributes = _attributes(group, results) | {"skipped": str(sum(r.status == "skipped" for r in results))}
        if "date" in verification.environment:
            attributes["timestamp"] = verification.environment["date"][:19]  # JUnit's schemas allow no time zone
        suite = ElementTree.SubElement(root, "testsuite", attributes)
        properties = ElementTree.SubElement(suite, "properties")
        for name, value in (verification.environment | {"command": verification.command}).items():
            ElementTree.SubElement(properties, "property", name=_clean(name), value=_clean(value))
        for result in results:
            _add_case(suite, result, verification)
    ElementTree.indent(root)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{ElementTree.tostring(root, encoding="unicode")}\n'


def _attributes(name: str, results: list[Result]) -> dict[str, str]:
    return {
        "name": name,
        "tests": str(len(results)),
        "failures": str(sum(r.status == "failed" for r in results)),
        "errors": str(sum(r.status == "broken" for r in results)),
        "time": f"{sum(r.seconds for r in results):.3f}",
    }


def _add_case(suite: ElementTree.Element, result: Result, verification: Verification) -> None:
    case = ElementTree.SubElement(
        suite,
        "testcase",
        classname=_clean(f"vitkernels.{result.group}"),
        name=_clean(f"{result.check}: {result.name}"),
        time=f"{result.seconds:.3f}",
    )
    if result.status == "skipped":
        ElementTree.SubElement(case, "skipped", message=_clean(result.detail))
    elif result.status != "passed":
        kind = "failure" if result.status == "failed" else "error"
        fault = ElementTree.SubElement(case, kind, message=_clean(f"{result.name}: {result.detail}"), type=result.group)
        ratio = f"error ÷ PyTorch's: {summary.ratio_text(result.ratio)}\n" if result.ratio is not None else ""
        fault.text = _clean(f"{result.detail}\n{ratio}{verification.reproduce(result)}")


def _clean(text: str) -> str:
    return _NO_XML.sub("�", text)
