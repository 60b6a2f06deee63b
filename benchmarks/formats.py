"""Names of rows, times and sizes as texts, for reports and pictures."""

from __future__ import annotations

from benchmarks.schema import Row, Times

UNITS_US = ((1e6, "s"), (1e3, "ms"), (1.0, "µs"))
UNITS_BYTES = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))


def workload_name(row: Row, *, short: bool = False) -> str:
    """Return a row's name without the provider; ``short`` leaves out mode and batch."""
    words = [row.name, row.case, row.dtype] if short else [row.name, row.case, row.mode, row.dtype]
    name = ", ".join(word for word in words if word)
    return f"{name}, batch {row.batch}" if row.batch and not short else name


def time_text(us: float) -> str:
    """Format microseconds in a suitable unit."""
    size, unit = next((s, u) for s, u in UNITS_US if abs(us) >= s or u == "µs")
    return f"{us / size:.3g} {unit}" if us / size < 1000 else f"{us / size:.0f} {unit}"


def spread_text(times: Times) -> str:
    return f"{time_text(times.p20)} – {time_text(times.p80)}"


def bytes_text(size: float) -> str:
    unit, name = next((u, n) for u, n in UNITS_BYTES if size >= u or n == "B")
    return f"{size / unit:.3g} {name}"
