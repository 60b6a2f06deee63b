"""Read a kernel's PTX (statements, parameters, attributes) and encode it as a program for the engine."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator

import numpy as np

from vitkernels.emulator.encode import Encoder, Unsupported
from vitkernels.emulator.lists import BITS

__all__ = ["Parameter", "Program", "Unsupported", "parse", "program", "statements"]


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A kernel's parameter: its offset from the first one and its size, in bytes."""

    offset: int
    size: int


@dataclasses.dataclass
class Program:
    """A kernel, encoded for the engine.

    Attributes:
        name: The kernel's.
        threads: Threads of a program (CTA).
        parameters: In order.
        code: (n, 9) int64, one row per instruction: ``Instruction`` of ``engine/machine.h``.
        order: int32, the place of each instruction in the control flow (:mod:`vitkernels.emulator.flow`).
        operands: int32; rows index into it.
        constants: (rows, 32) uint32, one value for all lanes; 64-bit ones take two rows.
        slots: Registers of 32 x 32 bits; 64-bit registers take two.
        predicates: Predicate registers.
        granule: log2 of the bytes of shared memory that the engine's checks treat as one unit.
        lines, texts, places: PTX line, its text and the source line (from ``.loc``) of each instruction.
        classes: The class under which each instruction is counted.
    """

    name: str
    threads: int
    parameters: list[Parameter]
    code: np.ndarray
    order: np.ndarray
    operands: np.ndarray
    constants: np.ndarray
    slots: int
    predicates: int
    granule: int
    lines: list[int]
    texts: list[str]
    places: list[str]
    classes: list[str]

    @property
    def parameter_bytes(self) -> int:
        return max((p.offset + p.size for p in self.parameters), default=0)


def statements(text: str) -> Iterator[tuple[int, str, str]]:
    """Yield (line number, statement, source line). Labels come as ``name:``, scopes as ``{`` and ``}``."""
    place, buffer, start = "", "", 0
    for number, line in enumerate(text.splitlines(), 1):
        code, _, comment = line.partition("//")
        if code.strip().startswith(".loc"):
            place = comment.strip()
            continue
        if code.strip().startswith((".file", ".section")):
            continue
        for i, ch in enumerate(code):
            if not buffer.strip() and ch in "{}":
                yield number, ch, place
                buffer = ""
            elif ch == ";":
                if buffer.strip():
                    yield start or number, " ".join(buffer.split()), place
                buffer, start = "", 0
            elif ch == ":" and re.fullmatch(r"\s*[$\w.]+", buffer) and code[i + 1 : i + 2] != ":":
                yield number, buffer.strip() + ":", place
                buffer, start = "", 0
            else:
                if ch.strip() and not buffer.strip():
                    start = number
                buffer += ch
        buffer += " "


def _parameters(text: str) -> dict[str, Parameter]:
    """Parse declarations such as ``.param .u64 .ptr .global .align 1 name`` and ``.param .align 64 .b8 name[128]``."""
    found, offset = {}, 0
    for declaration in filter(str.strip, text.split(",")):
        words = declaration.split()
        kind = next(w[1:] for w in words if w[1:] in BITS)
        name, _, count = words[-1].rstrip("]").partition("[")
        size = BITS[kind] // 8 * int(count or 1)
        alignment = int(words[2]) if words[1] == ".align" else BITS[kind] // 8
        offset = -(-offset // alignment) * alignment
        found[name] = Parameter(offset, size)
        offset += size
    return found


def parse(text: str) -> Program:
    """Encode the one kernel of ``text``.

    Raises:
        Unsupported: An instruction that the engine does not know; the message names its line.
    """
    head = re.search(r"\.visible\s+\.entry\s+([\w$]+)\s*\((.*?)\)\s*(.*?)\{", text, re.S)
    threads = head and re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", head.group(3))
    if not threads:
        raise Unsupported("the text has no kernel (.visible .entry with .reqntid)")
    name = head.group(1)
    parameters = _parameters(re.sub(r"//.*", "", head.group(2)))
    body = text[head.end() - 1 :]
    before = text[: head.end() - 1].count("\n")
    encoder = Encoder(parameters)
    depth = 0
    for number, statement, place in statements(body):
        depth += (statement == "{") - (statement == "}")
        if depth == 0:
            break
        try:
            encoder.statement(statement, number + before, place)
        except (Unsupported, KeyError, IndexError, ValueError) as error:
            reason = error if isinstance(error, Unsupported) else f"not understood ({type(error).__name__}: {error})"
            raise Unsupported(f"{name}, PTX line {number + before}: {statement}: {reason}") from None
    encoder.finish()
    return Program(
        name=name,
        threads=int(threads.group(1)),
        parameters=list(parameters.values()),
        code=np.array(encoder.rows, np.int64),
        order=np.array(encoder.order, np.int32),
        operands=np.array([*encoder.operands, 0], np.int32),
        constants=encoder.constants.table(),
        slots=encoder.slots + 2,
        predicates=len(encoder.predicates) + 1,
        granule=encoder.granule(),
        lines=encoder.lines,
        texts=encoder.texts,
        places=encoder.places,
        classes=encoder.classes,
    )


@functools.lru_cache(maxsize=256)
def _parsed(text: str) -> Program:
    return parse(text)


def program(text: str) -> Program:
    """Return :func:`parse`'s result, from a cache of recent texts."""
    return _parsed(text)
