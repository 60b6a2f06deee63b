"""The contract: rules that every kernel keeps on every architecture, and figures that no change may make worse.

Each architecture has a JSON file ``contract/<target>.json``. It holds the Triton version of its figures, the figures by
kernel and case, and exceptions from the rules, each with its reason. The figures depend on the compiler: under another
version of Triton only the rules are checked. A case has the compiler's figures and optionally counts from an emulated
GPU; counts are checked and updated only in runs that count.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import triton

from vitkernels.tools import _interrupt
from vitkernels.tools.aot.build import TARGETS
from vitkernels.tools.aot.counts import Counts
from vitkernels.tools.aot.read import Report

FOLDER = Path(__file__).parent / "contract"

# What each rule forbids; {} is the figure that breaks it.
RULES = {
    "spilled_bytes": "spills {} bytes",
    "narrow_in_loop": "has {} loads or stores of global memory of 8 or 16 bits in a loop",
    "slow_products": "has {} 16-bit products in 64 rows or more off the chip's best matrix unit",
    "shared_bytes": "takes {} bytes of shared memory, more than the chip has",
    "atomics": "has {} atomics",
    "tf32": "has {} products in TF32, which torch does not allow",
    "address_bits": "computes addresses in {} bits",
    "blocks": "does not fit on a multiprocessor",
}
# The compiler's figures in a file, and whether a higher figure is worse.
HIGHER_IS_WORSE = {"registers": True, "blocks": False, "narrow": True}
# The figures of :class:`Counts` in a file, over all launches of the kernel; higher is worse. Sectors per request is not
# among them: wider accesses have more, and are better.
COUNTED = (
    "tensor", "fma", "alu", "mufu", "lsu", "excess_sectors", "conflicts", "l2_bytes", "dram_bytes", "barriers",
)  # fmt: skip

Key = tuple[str, str]  # kernel; case, op and dtype
Figures = dict[str, int]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a check found, one line each: breaches, used exceptions, and figures that got better."""

    broken: list[str]
    excepted: list[str]
    better: list[str]


def broken_rules(report: Report) -> dict[str, int]:
    """Return the rules that ``report`` breaks, each with the figure that breaks it."""
    available = TARGETS[report.target].facts.shared_memory
    found = {rule: getattr(report, rule) for rule in ("spilled_bytes", "narrow_in_loop", "slow_products", "atomics")}
    found |= {
        "shared_bytes": report.shared_bytes if report.shared_bytes > available else 0,
        "tf32": report.tf32,
        "address_bits": 32 if report.address_bits == 32 and not report.reach_checked else 0,
        "blocks": int(report.blocks < 1),
    }
    return {rule: figure for rule, figure in found.items() if figure}


def unfit(report: Report) -> list[str]:
    """Return why ``report``'s kernel cannot run at all, one line per reason."""
    return [
        RULES[rule].format(figure)
        for rule, figure in broken_rules(report).items()
        if rule in ("shared_bytes", "blocks")
    ]


def figures_of(reports: Iterable[Report]) -> Figures:
    """Return the worst value over ``reports`` of each figure that a file keeps."""
    reports = list(reports)
    return {
        name: (max if higher else min)(getattr(r, name) for r in reports) for name, higher in HIGHER_IS_WORSE.items()
    }


def counted_figures(counts: Sequence[Counts]) -> Figures:
    """Return the kept figures of one kernel's launches: sums over the launches, but for barriers the maximum."""
    totals = {name: sum(getattr(c, name) for c in counts) for name in COUNTED}
    return totals | {"barriers": max(c.barriers for c in counts)}


def load(target: str, folder: Path = FOLDER) -> dict:
    """Return the contract of ``target``, an empty one if there is no file yet.

    Raises:
        ValueError: The file does not have the form that :func:`save` writes.
    """
    path = folder / f"{target}.json"
    if not path.exists():
        return {"triton": triton.__version__, "exceptions": [], "figures": {}}
    contract = json.loads(path.read_text())
    if not isinstance(contract, dict) or contract.keys() != {"triton", "exceptions", "figures"}:
        raise ValueError(f"{path} must hold triton, exceptions and figures, and nothing else")
    for exception in contract["exceptions"]:
        fields = {"rule": str, "kernel": str, "case": str, "limit": int, "reason": str}
        given, kinds = {"triton": "", **exception}, fields | {"triton": str}
        if given.keys() != kinds.keys() or any(not isinstance(given[f], t) for f, t in kinds.items()):
            raise ValueError(
                f"{path}: an exception has the fields {', '.join(fields)}, and triton if it is for one version alone; "
                f"got {exception}"
            )
        if exception["rule"] not in RULES or not exception["reason"].strip():
            raise ValueError(f"{path}: an exception names a rule of {', '.join(RULES)} and its reason; got {exception}")
    for cases in contract["figures"].values():
        for case, figures in cases.items():
            known = figures.keys() in (HIGHER_IS_WORSE.keys(), {*HIGHER_IS_WORSE, *COUNTED})
            if not known or any(type(v) is not int for v in figures.values()):
                raise ValueError(
                    f"{path}: {case} must hold the numbers {', '.join(HIGHER_IS_WORSE)}, and all or none of "
                    f"{', '.join(COUNTED)}; got {figures}"
                )
    return contract


def save(target: str, contract: dict, folder: Path = FOLDER) -> None:
    """Write the contract of ``target``, one case per line, so that a diff shows what changed."""

    def block(items: Iterable[str], brackets: str, indent: int) -> str:
        items = list(items)
        pad = " " * indent
        inside = ",\n".join(f"{pad}  {item}" for item in items)
        return f"{brackets[0]}\n{inside}\n{pad}{brackets[1]}" if items else brackets

    kernels = []
    for kernel, cases in sorted(contract["figures"].items()):
        lines = (f"{json.dumps(case)}: {json.dumps(figures)}" for case, figures in sorted(cases.items()))
        kernels.append(f"{json.dumps(kernel)}: {block(lines, '{}', 4)}")
    text = block(
        [
            f'"triton": {json.dumps(contract["triton"])}',
            f'"exceptions": {block(map(json.dumps, contract["exceptions"]), "[]", 2)}',
            f'"figures": {block(kernels, "{}", 2)}',
        ],
        "{}",
        0,
    )
    folder.mkdir(exist_ok=True)
    with _interrupt.writing():
        (folder / f"{target}.json").write_text(text + "\n")


def check(
    contract: dict,
    measured: Mapping[Key, list[Report]],
    counted: Mapping[Key, list[Counts]] | None = None,
    *,
    complete: bool,
) -> Verdict:
    """Check ``measured`` and ``counted`` against ``contract``.

    Args:
        contract: From :func:`load`.
        measured: The reports of one architecture.
        counted: Its counts, if any were taken.
        complete: Whether ``measured`` has all kernels and cases; then a figure without a report is out of date.
    """
    broken, excepted, better = [], [], []
    same_compiler = contract["triton"] == triton.__version__
    for key, reports in sorted(measured.items()):
        name = " ".join(key)
        for rule, figure in _worst_breaches(reports).items():
            exception = _exception(contract, rule, key, figure)
            says = f"{name} {RULES[rule].format(figure)}"
            if exception is None:
                broken.append(says)
            else:
                excepted.append(f"{says}: {exception['reason']}")
        before, after = _figures(contract, key), _measured(key, reports, counted)
        if not same_compiler or (before is None and broken and broken[-1].startswith(f"{name} ")):
            continue
        if before is None:
            broken.append(f"{name} is not in the contract: `vitkernels inspect --update` takes it in")
            continue
        if not after.keys() <= before.keys():
            broken.append(f"{name} has no counts in the contract: `vitkernels inspect --run --update` takes them in")
        for figure in (f for f in after if f in before):
            if after[figure] != before[figure]:
                worse = (after[figure] > before[figure]) == HIGHER_IS_WORSE.get(figure, True)
                (broken if worse else better).append(f"{name}: {figure} {before[figure]} → {after[figure]}")
    if complete and same_compiler:
        known = {(kernel, case) for kernel, cases in contract["figures"].items() for case in cases}
        broken += [f"{' '.join(key)} is in the contract, and is not launched" for key in sorted(known - set(measured))]
    return Verdict(broken, excepted, better)


def update(
    contract: dict,
    measured: Mapping[Key, list[Report]],
    counted: Mapping[Key, list[Counts]] | None = None,
    *,
    complete: bool,
    accept_worse: bool,
) -> dict:
    """Return ``contract`` with new and better figures, and worse ones if ``accept_worse``; arguments as :func:`check`.

    A case that breaks a rule without an exception keeps its old figures, and counts that were not taken again stay. If
    ``complete``, cases that are no longer launched are dropped, and so are unused exceptions, except those for another
    version of Triton.
    """
    figures = {} if complete else {kernel: dict(cases) for kernel, cases in contract["figures"].items()}
    needed = []
    for key, reports in measured.items():
        before, after = _figures(contract, key), _measured(key, reports, counted)
        exceptions = [_exception(contract, rule, key, figure) for rule, figure in _worst_breaches(reports).items()]
        if None in exceptions:
            after = before
        elif before is not None:
            if not accept_worse:
                for name in after:
                    best = min if HIGHER_IS_WORSE.get(name, True) else max
                    after[name] = best(before.get(name, after[name]), after[name])
            after = before | after
        needed += exceptions
        if after is not None:
            figures.setdefault(key[0], {})[key[1]] = after
    exceptions = [e for e in contract["exceptions"] if not complete or e in needed or not _of_this_triton(e)]
    return {"triton": triton.__version__, "exceptions": exceptions, "figures": figures}


def _worst_breaches(reports: Iterable[Report]) -> dict[str, int]:
    worst: dict[str, int] = {}
    for report in reports:
        for rule, figure in broken_rules(report).items():
            worst[rule] = max(worst.get(rule, 0), figure)
    return worst


def _measured(key: Key, reports: list[Report], counted: Mapping[Key, list[Counts]] | None) -> Figures:
    counts = (counted or {}).get(key)
    return figures_of(reports) | (counted_figures(counts) if counts else {})


def _figures(contract: dict, key: Key) -> Figures | None:
    return contract["figures"].get(key[0], {}).get(key[1])


def _exception(contract: dict, rule: str, key: Key, figure: int) -> dict | None:
    for exception in filter(_of_this_triton, contract["exceptions"]):
        matches = exception["rule"] == rule and exception["kernel"] == key[0]
        if matches and fnmatch.fnmatchcase(key[1], exception["case"]) and figure <= exception["limit"]:
            return exception
    return None


def _of_this_triton(exception: dict) -> bool:
    return exception.get("triton", triton.__version__) == triton.__version__
