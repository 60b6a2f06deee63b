"""The JSON of a run: the dataclasses below are its schema, which decoding checks.

Times are in microseconds, sizes in bytes. A row without a result has a reason; only a right result has a time.
"""

from __future__ import annotations

import dataclasses
import json
import os
import types
import typing
from pathlib import Path
from typing import Any

from vitkernels.tools import _interrupt

SCHEMA = 1
KINDS = ("op", "model", "cost", "counted", "check")
STATUSES = ("measured", "counted", "passed", "wrong", "skipped", "failed")
OURS = "vitkernels"


@dataclasses.dataclass(frozen=True)
class Times:
    """Microseconds per call: the median, the 20th and 80th percentiles, and the number of samples."""

    median: float
    p20: float
    p80: float
    samples: int


@dataclasses.dataclass
class Row:
    """One provider at one workload, or one count.

    Attributes:
        kind: One of :data:`KINDS`: a timed op or model, a cost on the host, a count, or a check without a time.
        name: Name of the op or the model, or what is counted.
        case: Name of the shape in ``vitkernels/testing/cases.py``, or another text that distinguishes rows of one name.
        provider: The implementation that computed the row.
        mode: ``forward``, ``backward``, ``both``, ``inference``, ``training`` and the like.
        dtype: ``bf16``, ``fp16``, ``fp32``, or ``amp`` for fp32 weights under bf16 autocast.
        batch: Number of images.
        status: One of :data:`STATUSES`.
        reason: Why there is no result; empty if there is one.
        time: Device time on a GPU, wall-clock time on a CPU.
        host: Time until the call returned on a GPU; None on a CPU, where it equals ``time``.
        flops, bytes: The minimum that the workload needs, by formula.
        error: RMS(result − fp64) / RMS(fp64), the largest over outputs and gradients.
        error_ratio: The error over plain PyTorch's in the same dtype, the largest over outputs and gradients.
        peak_bytes: Peak memory on the device, parameters and optimizer state included.
        of_roofline: The time that this run's ceilings allow over the measured time.
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
        """The fields that rivals of one workload share."""
        return self.kind, self.name, self.case, self.batch, self.mode, self.dtype

    @property
    def key(self) -> tuple:
        """The fields that identify a row in a run."""
        return *self.workload, self.provider

    @property
    def ours(self) -> bool:
        return self.provider.startswith(OURS)


@dataclasses.dataclass
class Results:
    """One run.

    Attributes:
        suite: The suite that was run.
        budget_s, elapsed_s: Seconds given and taken.
        complete: False if the run was interrupted or is still running.
        date: UTC, ISO 8601.
        commit: Short hash, with ``-dirty`` if the tree had changes; empty outside a checkout.
        device: Name, kind (``cuda`` or ``cpu``), architecture, driver, memory, threads.
        clocks: MHz and watts that the driver reported, at the start and the end.
        versions: Versions by package.
        ceilings: Rates measured in this run: ``tflops bf16`` and the like, and ``gb_per_s``.
        providers: By provider, why it never ran.
        left_out: By title, why a planned job was not done.
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
    """Write ``results`` atomically: ``path`` holds valid JSON even if the process is killed."""
    text = _text(results)
    check(json.loads(text), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with _interrupt.writing():  # or Ctrl-C could leave the temporary file behind
        temporary.write_text(text + "\n", encoding="utf-8")
        os.replace(temporary, path)


def _text(results: Results) -> str:
    """Return JSON with one row per line, so that a diff of two runs is readable."""
    document = dataclasses.asdict(results)
    rows = ",\n".join("  " + json.dumps(row, allow_nan=False) for row in document.pop("rows"))
    head = json.dumps(document, indent=1, allow_nan=False).removesuffix("\n}")
    return f'{head},\n "rows": [\n{rows}\n ]\n}}'


def load(path: Path) -> Results:
    """Read what :func:`save` wrote.

    Raises:
        ValueError: The file is not JSON, or breaks the schema; the message names the place.
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
