"""Tuning tables: launch configurations in one JSON file per device, written by a search on it (``benchmarks/tune.py``).

Without a table for the device, the ops use the heuristic in their ``choose_config``. A table is
``{"schema": 1, "device": name, "entries": {op: {key: row}}}``. A row holds the fastest configuration, the measured
times, the date and the versions:

    {"config": {field: value}, "median_us": 81.2, "p20_us": 80.9, "p80_us": 81.7, "heuristic_us": 94.0,
     "date": "2026-11-21", "versions": {"torch": "2.13.0", "triton": "3.7.1"}}
"""

from __future__ import annotations

import functools
import json
from importlib import resources
from typing import Any

SCHEMA = 1
TIMES = ("median_us", "p20_us", "p80_us", "heuristic_us")
ROW = {"config", *TIMES, "date", "versions"}


def table_name(device_name: str) -> str:
    """Return a device's table file name: its name in lower case, ``-`` in place of all but letters and digits."""
    return "".join(c if c.isalnum() else "-" for c in device_name.lower()) + ".json"


def lookup(op: str, device_name: str, key: str) -> dict[str, Any] | None:
    """Return the tuned fields of ``op``'s configuration for ``key``, or None if the table has no such entry.

    Raises:
        ValueError: The device's table is not JSON, or does not follow the schema.
    """
    return _table(device_name).get(op, {}).get(key)


@functools.cache
def _table(device_name: str) -> dict[str, dict[str, dict[str, Any]]]:
    file = resources.files(__package__) / "tables" / table_name(device_name)
    if not file.is_file():
        return {}
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"tuning table {file}: {error}") from error
    return check_table(table, table_name(device_name))


def check_table(table: Any, source: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Check a decoded table, and return its configurations by op and key.

    Raises:
        ValueError: The table does not follow the schema; the message names ``source`` and the place.
    """

    def refuse(place: str, value: Any, expected: str):
        raise ValueError(f"tuning table {source}: {place} is a {type(value).__name__}; expected {expected}")

    if not isinstance(table, dict) or table.get("schema") != SCHEMA or not isinstance(table.get("device"), str):
        raise ValueError(f"tuning table {source}: expected an object with schema {SCHEMA} and the device's name")
    entries = table.get("entries")
    if not isinstance(entries, dict):
        refuse("entries", entries, "an object")
    configs: dict[str, dict[str, dict[str, Any]]] = {}
    for op, by_key in entries.items():
        if not isinstance(by_key, dict):
            refuse(f"entries.{op}", by_key, "an object of keys")
        for key, row in by_key.items():
            place = f"entries.{op}.{key}"
            if not isinstance(row, dict) or row.keys() != ROW:
                raise ValueError(f"tuning table {source}: {place} must hold {', '.join(sorted(ROW))}, and nothing else")
            for names, kind, said in (
                (("config", "versions"), dict, "an object"),
                (("date",), str, "a string"),
                (TIMES, int | float, "a number"),
            ):
                for name in names:
                    if not isinstance(row[name], kind) or isinstance(row[name], bool):
                        refuse(f"{place}.{name}", row[name], said)
            for package, version in row["versions"].items():
                if not isinstance(version, str):
                    refuse(f"{place}.versions.{package}", version, "a string")
            for field, value in row["config"].items():
                if not isinstance(value, int | str | bool):
                    refuse(f"{place}.config.{field}", value, "an integer, a string or a boolean")
            configs.setdefault(op, {})[key] = row["config"]
    return configs
