"""The lists that the C++ engine and Python share, read from ``engine/lists.h``, their only definition."""

from __future__ import annotations

import enum
import re
from pathlib import Path

ENGINE = Path(__file__).parent / "engine"


def _entries(name: str) -> list[tuple[str, ...]]:
    """Return the arguments of each ``X(...)`` of a list."""
    text = (ENGINE / "lists.h").read_text()
    body = re.search(rf"#define {name}\(X\)((?:.*\\\n)*.*\n)", text).group(1)
    found = re.findall(r'X\((\w+)(?:, (\d+))?(?:, "([^"]*)", (\w+))?\)', body)
    return [tuple(filter(None, entry)) for entry in found]


BITS = {name: int(bits) for name, bits in _entries("PTX_TYPES")}
TYPES = {name: i for i, name in enumerate(BITS)}
FLAGS = {name: 1 << i for i, (name,) in enumerate(_entries("PTX_FLAGS"))}
SPECIALS = {name: i for i, (name,) in enumerate(_entries("PTX_SPECIALS"))}
COMPARISONS = {name: i for i, (name,) in enumerate(_entries("PTX_COMPARISONS"))}
COMPARISONS |= {"lo": COMPARISONS["lt"], "ls": COMPARISONS["le"], "hi": COMPARISONS["gt"], "hs": COMPARISONS["ge"]}
ATOMICS = [name for (name,) in _entries("PTX_ATOMICS")]
MAP_FIELDS = [name for (name,) in _entries("PTX_MAP_FIELDS")]
NUMBERS = {name: int(value) for name, value in _entries("PTX_NUMBERS")}
OPS = {name: i for i, (name,) in enumerate(_entries("PTX_OPS"))}

Kind = enum.Enum("Kind", [(name, i) for i, (name, _, _) in enumerate(_entries("PTX_FINDINGS"))], module=__name__)
Kind.__doc__ = "What the engine reports; DESCRIPTIONS has it in words."
DESCRIPTIONS = {Kind[name]: text for name, text, _ in _entries("PTX_FINDINGS")}
# Findings that are reported but are no errors.
NOTES = frozenset(Kind[name] for name, _, severity in _entries("PTX_FINDINGS") if severity == "note")
