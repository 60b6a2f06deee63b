"""Launch configurations as data: one JSON file a device, written by a search on that device.

No table means no measurement: the ops then take the heuristic in their ``choose_config``. A table is
``{"schema": 1, "device": name, "entries": {op: {key: {field: value}}}}``.
"""

from __future__ import annotations

import functools
import json
from importlib import resources
from typing import Any

SCHEMA = 1


def table_name(device_name: str) -> str:
    """Return the file name of a device's table: its name in lower case, with ``-`` for what is no letter or digit."""
    return "".join(c if c.isalnum() else "-" for c in device_name.lower()) + ".json"


def lookup(op: str, device_name: str, key: str) -> dict[str, Any] | None:
    """Return the tuned fields of ``op``'s configuration for ``key``, or None where nothing was measured.

    Raises:
        ValueError: The device's table breaks the schema.
    """
    return _table(device_name).get(op, {}).get(key)


@functools.cache
def _table(device_name: str) -> dict[str, dict[str, dict[str, Any]]]:
    file = resources.files(__package__) / "tables" / table_name(device_name)
    if not file.is_file():
        return {}
    return check_table(json.loads(file.read_text(encoding="utf-8")), table_name(device_name))


def check_table(table: Any, source: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the entries of a decoded table.

    Raises:
        ValueError: The table is not of the schema; the message names ``source`` and the place.
    """
    if not isinstance(table, dict) or table.get("schema") != SCHEMA:
        raise ValueError(f"tuning table {source}: expected an object with schema {SCHEMA}")
    entries = table.get("entries")
    if not isinstance(entries, dict):
        raise ValueError(f"tuning table {source}: entries is a {type(entries).__name__}; expected an object")
    for op, by_key in entries.items():
        if not isinstance(by_key, dict) or not all(isinstance(fields, dict) for fields in by_key.values()):
            raise ValueError(f"tuning table {source}: entries.{op} must map each key to an object of fields")
        for key, fields in by_key.items():
            for field, value in fields.items():
                if not isinstance(value, int | str | bool):
                    raise ValueError(
                        f"tuning table {source}: entries.{op}.{key}.{field} is a {type(value).__name__}; "
                        "expected an integer, a string or a boolean"
                    )
    return entries
