"""What a run leaves behind: the dataclasses below are the schema of the JSON, and decoding checks it.

Times are microseconds, sizes bytes. A row without a result says why; only a right result has a time.
"""

from __future__ import annotations

import dataclasses
import json
import os
import types
import typing
from pathlib import Path
from typing import Any

from vitkernels import _interrupt

SCHEMA = 1
KINDS = ("op", "model", "cost", "counted", "check")
STATUSES = ("measured", "counted", "passed", "wrong", "skipped", "failed")
OURS = "vitkernels"


@dataclasses.dataclass(frozen=True)
class Times:
    """Microseconds a call: the median, the 20th and 80th percentile, and how many samples they are of."""

    median: float
    p20: float
    p80: float
    samples: int


@dataclasses.dataclass
class Row:
    """One provider at one workload, or one count.

    Attributes:
        kind: One of :data:`KINDS`: a timed op or model, a cost on the host, a count, a check without a time.
        name: The op's, the model's, or what is counted.
        case: Its shape, by the name in ``vitkernels/testing/cases.py``, or what else tells rows of a name apart.
        provider: Who computed.
        mode: ``forward``, ``backward``, ``both``, ``inference``, ``training`` and the like.
        dtype: ``bf16``, ``fp16``, ``fp32``, or ``amp`` for fp32 weights under bf16 autocast.
        batch: Images.
        status: One of :data:`STATUSES`.
        reason: Why there is no result; empty where there is one.
        time: On a GPU the device's time, on a CPU the wall's.
        host: On a GPU the time until the call returned; None on a CPU, where it is the same.
        flops, bytes: By formula, the least that the workload needs.
        error: Largest over outputs and gradients of RMS(result − fp64) / RMS(fp64).
        error_ratio: The error over that of plain PyTorch in the same dtype, largest likewise.
        peak_bytes: Largest memory in use on the device, parameters and optimizer state included.
        of_roofline: The time that the ceilings of this run allow, over the time taken.
        over_best_rival: The best rival's time over ours; on our rows only.
        figures: Counts by name.
    """

    kind: str
    name: str
    case: str
    provider: str
    mode: str
    dtype: str = ""
    batch: int = 0
    status: str = "measured"
    reason: str = ""
    time: Times | None = None
    host: Times | None = None
    flops: int | None = None
    bytes: int | None = None
    error: float | None = None
    error_ratio: float | None = None
    peak_bytes: int | None = None
    of_roofline: float | None = None
    over_best_rival: float | None = None
    figures: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def workload(self) -> tuple:
        """What rivals have in common."""
        return self.kind, self.name, self.case, self.batch, self.mode, self.dtype

    @property
    def key(self) -> tuple:
        """What tells a row from all others of a run."""
        return *self.workload, self.provider

    @property
    def ours(self) -> bool:
        return self.provider.startswith(OURS)


@dataclasses.dataclass
class Results:
    """One run.

    Attributes:
        suite: What was asked for.
        budget_s, elapsed_s: Seconds given and taken.
        complete: False where the run was interrupted, or is still going on.
        date: UTC, ISO 8601.
        commit: Short hash, with ``-dirty`` where the tree had changes; empty outside a checkout.
        device: Its name, kind (``cuda`` or ``cpu``), architecture, driver, memory, threads.
        clocks: MHz and watts as the driver tells them, at the start and the end.
        versions: Of all that matters, by package.
        ceilings: Highest rates seen in this run: ``tflops bf16`` and the like, and ``gb_per_s``.
        providers: Why a provider never ran.
        left_out: Why work that was planned was not done, by its title.
        rows: In the order of the run.
        schema: :data:`SCHEMA`.
    """

    suite: str
    budget_s: float
    date: str
    commit: str
    device: dict[str, str | int | float]
    versions: dict[str, str]
    elapsed_s: float = 0.0
    complete: bool = False
    clocks: dict[str, float] = dataclasses.field(default_factory=dict)
    ceilings: dict[str, float] = dataclasses.field(default_factory=dict)
    providers: dict[str, str] = dataclasses.field(default_factory=dict)
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)
    rows: list[Row] = dataclasses.field(default_factory=list)
    schema: int = SCHEMA


def save(results: Results, path: Path) -> None:
    """Write ``results`` so that ``path`` holds valid JSON at every moment, whatever ends the process."""
    text = _text(results)
    check(json.loads(text), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with _interrupt.writing():  # nor is the other left behind
        temporary.write_text(text + "\n", encoding="utf-8")
        os.replace(temporary, path)


def _text(results: Results) -> str:
    """JSON with a row a line, so that a difference between two runs can be read."""
    document = dataclasses.asdict(results)
    rows = ",\n".join("  " + json.dumps(row, allow_nan=False) for row in document.pop("rows"))
    head = json.dumps(document, indent=1, allow_nan=False).removesuffix("\n}")
    return f'{head},\n "rows": [\n{rows}\n ]\n}}'


def load(path: Path) -> Results:
    """Read what :func:`save` wrote.

    Raises:
        ValueError: The file is no JSON, or breaks the schema; the message names the place.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return check(document, str(path))


def check(document: Any, source: str) -> Results:
    """Return the results that a decoded document holds.

    Raises:
        ValueError: It breaks the schema; the message names ``source`` and the place.
    """
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise ValueError(f"{source}: expected an object with schema {SCHEMA}")
    results = _decode(Results, document, source)
    seen = set()
    for i, row in enumerate(results.rows):
        place = f"{source}: rows[{i}]"
        for field, allowed in (("kind", KINDS), ("status", STATUSES)):
            if getattr(row, field) not in allowed:
                raise ValueError(f"{place}.{field} is {getattr(row, field)!r}; expected one of {', '.join(allowed)}")
        has_result = row.status in ("measured", "counted", "passed")
        if has_result == bool(row.reason):
            raise ValueError(f"{place}: a {row.status} row has {'a' if has_result else 'no'} reason")
        if (row.time is not None or bool(row.figures)) != (row.status in ("measured", "counted")):
            raise ValueError(f"{place}: only measured and counted rows have times or figures; this one is {row.status}")
        if row.key in seen:
            raise ValueError(f"{place}: a second row of {' '.join(map(str, row.key))}")
        seen.add(row.key)
    return results


def _decode(kind: Any, value: Any, place: str) -> Any:
    if dataclasses.is_dataclass(kind):
        fields = typing.get_type_hints(kind)
        if not isinstance(value, dict) or value.keys() != fields.keys():
            got = ", ".join(value) if isinstance(value, dict) else type(value).__name__
            raise ValueError(f"{place}: expected the fields {', '.join(fields)}; got {got}")
        return kind(**{name: _decode(hint, value[name], f"{place}.{name}") for name, hint in fields.items()})
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is list and isinstance(value, list):
        return [_decode(arguments[0], item, f"{place}[{i}]") for i, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {name: _decode(arguments[1], item, f"{place}.{name}") for name, item in value.items()}
    if origin is types.UnionType:
        if value is None and types.NoneType in arguments:
            return None
        for option in arguments:
            if dataclasses.is_dataclass(option) or _is_a(value, option):
                return _decode(option, value, place)
    elif _is_a(value, kind):
        return value
    raise ValueError(f"{place} is a {type(value).__name__}; expected {kind}")


def _is_a(value: Any, kind: Any) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if not isinstance(kind, type) or (isinstance(value, bool) and kind is not bool):
        return False
    return isinstance(value, kind)
