"""Encode PTX instructions for the engine: each becomes a row of integers; an operand is a slot of 32 lanes."""

from __future__ import annotations

import re
import struct

import numpy as np

from vitkernels.emulator import instructions
from vitkernels.emulator.flow import order_of
from vitkernels.emulator.lists import BITS, FLAGS, NUMBERS, OPS, SPECIALS, TYPES

NO_OPERAND = -1
FALSE, TRUE = -2, -3  # constants as predicates
NEGATED = 1 << NUMBERS["NEGATED_BIT"]
SHARED_BASE = NUMBERS["SHARED_BASE"]
PARAM_BASE = 1 << NUMBERS["PARAM_BASE_BITS"]
# The name of the flag for each modifier of PTX.
MODIFIERS = {name: name for name in FLAGS} | {
    "satfinite": "sat", "NaN": "nan", "rzi": "rz", "rmi": "rm", "rpi": "rp",
}  # fmt: skip


class Unsupported(Exception):
    """PTX that the engine does not know."""


class Constants:
    """Values that are the same in all lanes; each is stored once."""

    def __init__(self):
        self.rows = 0
        self.at: dict[tuple[int, int], int] = {}

    def operand(self, value: int, bits: int) -> int:
        """Return the operand for a constant of up to 32 bits, or of 64."""
        wide = bits == 64
        key = value & ((1 << (64 if wide else 32)) - 1), wide
        if key not in self.at:
            self.at[key] = self.rows
            self.rows += 1 + wide
        return -2 - self.at[key]

    def table(self) -> np.ndarray:
        table = np.zeros((self.rows + 2, 32), np.uint32)
        for (value, wide), row in self.at.items():
            if wide:
                table.reshape(-1)[row * 32 : row * 32 + 64].view(np.uint64)[:] = value
            else:
                table[row] = value
        return table


def split_operands(text: str) -> list[str]:
    """Split ``text`` at the commas outside brackets."""
    out, depth, now = [], 0, ""
    for ch in text:
        depth += (ch in "{[(") - (ch in "}])")
        if ch == "," and depth == 0:
            out.append(now.strip())
            now = ""
        else:
            now += ch
    if now.strip():
        out.append(now.strip())
    return out


class Encoder:
    """Encodes a kernel's statements, which it is given one by one."""

    def __init__(self, parameters):
        self.parameters = parameters
        self.rows: list[list[int]] = []
        self.operands: list[int] = []
        self.lines, self.texts, self.places, self.classes = [], [], [], []
        self.constants = Constants()
        self.slots = 0
        self.registers: dict[str, int] = {}
        self.predicates: dict[str, int] = {}
        self.labels: dict[str, int] = {}
        self.targets: dict[str, list[str]] = {}
        self.jumps: list[tuple[int, str]] = []
        self.tables: list[tuple[int, str]] = []  # operands that are labels
        self._last_label = ""
        self.accesses: list[int] = []  # bytes of each access to shared memory
        self._ranges: list[tuple[str, str, int]] = []  # %r<20>: prefix, type, count
        self._scopes: list[dict[str, tuple[str, str]]] = []
        self._scope_count = 0
        self._now = (0, "", "")
        self._guard = NO_OPERAND
        self._kinds: dict[str, str] = {}

    # -------------------------------------------------------------------------------------------- statements

    def statement(self, text: str, number: int, place: str) -> None:
        if text == "{":
            self._scope_count += 1
            self._scopes.append({})
        elif text == "}":
            self._scopes.pop()
        elif text.endswith(":"):
            self._last_label = text[:-1]
            self.labels[self._label(text[:-1])] = len(self.rows)
        elif text.startswith(".branchtargets"):
            self.targets[self._last_label] = split_operands(text.removeprefix(".branchtargets"))
        elif text.startswith("."):
            self._declare(text)
        else:
            self._instruction(text, number, place)

    def _label(self, name: str) -> str:
        """Return a label's unique name: labels without ``$`` may occur once in each scope."""
        return name if name.startswith("$") else f"{name}@{self._scope_count}"

    def _declare(self, text: str) -> None:
        found = re.match(r"\.reg\s+\.(\w+)\s+(.*)", text)
        if not found:
            if text.startswith(".pragma"):
                return
            raise Unsupported("declaration")
        kind, names = found.groups()
        for name in (n.strip() for n in names.split(",")):
            numbered = re.fullmatch(r"([%\w$]+)<(\d+)>", name)
            if numbered:
                self._ranges.append((numbered.group(1), kind, int(numbered.group(2))))
            elif len(self._scopes) > 1:
                self._scopes[-1][name] = f"{name}@{self._scope_count}", kind
            else:
                self._kinds[name] = kind

    def _instruction(self, text: str, number: int, place: str) -> None:
        self._now = number, text, place
        self._guard = NO_OPERAND
        guarded = re.match(r"@(!?)\s*([%\w]+)\s+(.*)", text)
        if guarded:
            self._guard = self.predicate(guarded.group(1) + guarded.group(2))
            text = guarded.group(3)
        mnemonic, _, rest = text.partition(" ")
        parts = mnemonic.split(".")
        encode = instructions.ENCODERS.get(parts[0])
        if encode is None:
            raise Unsupported("unknown instruction")
        encode(self, parts, split_operands(rest))

    def finish(self) -> None:
        """Resolve the labels and append a return."""
        for row, label in self.jumps:
            self.rows[row][7] = self.labels[label]
        for operand, label in self.tables:
            self.operands[operand] = self.labels[label]
        self._now, self._guard = (0, "ret", ""), NO_OPERAND
        self.emit("ret", cls="branch")
        targets, ends = {}, set()
        for i, (op, _, _, _, guard, count, first, imm, _) in enumerate(self.rows):
            follows = [i + 1] if guard != NO_OPERAND else []
            if op == OPS["bra"]:
                targets[i] = [imm, *follows]
            elif op == OPS["brx"]:
                targets[i] = [*self.operands[first + 1 : first + count], *follows]
            elif op in (OPS["ret"], OPS["trap"]) and not follows:
                ends.add(i)
        self.order = order_of(len(self.rows), targets, ends)

    def granule(self) -> int:
        smallest = min(self.accesses, default=4)
        return 0 if smallest == 1 else 1 if smallest == 2 else 2

    # -------------------------------------------------------------------------------------------- operands

    def lookup(self, name: str) -> tuple[str, str] | None:
        """Return a register's full name and type, or None."""
        for scope in reversed(self._scopes):
            if name in scope:
                return scope[name]
        if name in self._kinds:
            return name, self._kinds[name]
        numbered = re.fullmatch(r"(%[a-zA-Z_]+)(\d+)", name)
        if numbered:
            for prefix, kind, count in self._ranges:
                if prefix == numbered.group(1) and int(numbered.group(2)) < count:
                    return name, kind
        return None

    def _found(self, name: str) -> tuple[str, str]:
        found = self.lookup(name)
        if found is None:
            raise Unsupported(f"register {name}")
        return found

    def bits(self, name: str) -> int:
        return BITS[self._found(name)[1]]

    def register(self, name: str) -> int:
        """Return a register's slot, a new one at its first use; no operand for ``_``."""
        if name == "_":
            return NO_OPERAND
        full, kind = self._found(name)
        if kind == "pred":
            raise Unsupported(f"{name} is a predicate")
        if full not in self.registers:
            self.registers[full] = self.slots
            self.slots += 2 if BITS[kind] == 64 else 1
        return self.registers[full]

    def temporary(self, bits: int) -> int:
        """Return a new register for the encoder's own use."""
        name = f"%temporary@{len(self._kinds)}"
        self._kinds[name] = f"b{bits}"
        return self.register(name)

    def predicate(self, text: str) -> int:
        """Return the operand for a predicate (``!`` negates it) or a constant; no operand for ``_``."""
        negated, name = text.startswith("!"), text.lstrip("!")
        if name == "_":
            return NO_OPERAND
        if re.fullmatch(r"-?\d+", name):
            return TRUE if (int(name) != 0) != negated else FALSE
        full, kind = self._found(name)
        if kind != "pred":
            raise Unsupported(f"{name} is no predicate")
        return self.predicates.setdefault(full, len(self.predicates)) | (NEGATED if negated else 0)

    @staticmethod
    def number(text: str, ty: str) -> int:
        """Return the bits of a literal."""
        raw = re.fullmatch(r"0[fF]([0-9a-fA-F]{8})|0[dD]([0-9a-fA-F]{16})", text)
        if raw:
            return int(raw.group(1) or raw.group(2), 16)
        whole = re.fullmatch(r"(-?)(0[xX][0-9a-fA-F]+|\d+)U?", text)
        if whole:
            digits = whole.group(2)
            value = int(digits, 8) if re.fullmatch(r"0\d+", digits) else int(digits, 0)
            value = -value if whole.group(1) else value
        elif re.fullmatch(r"-?\d+\.\d*(e[-+]?\d+)?", text):
            value = float(text)
        else:
            raise Unsupported(f"operand {text}")
        if ty == "f32":
            return struct.unpack("<I", struct.pack("<f", value))[0]
        if ty == "f64":
            return struct.unpack("<Q", struct.pack("<d", value))[0]
        return int(value)

    def _symbol(self, text: str) -> int | None:
        """Return the address of ``global_smem`` or a parameter, plus its offset; None for other texts."""
        found = re.fullmatch(r"([\w$]+)\s*(?:\+\s*(\d+))?", text)
        if not found:
            return None
        offset = int(found.group(2) or 0)
        if found.group(1) == "global_smem":
            return SHARED_BASE + offset
        if found.group(1) in self.parameters:
            return PARAM_BASE + self.parameters[found.group(1)].offset + offset
        return None

    def source(self, text: str, ty: str) -> int:
        """Return the operand for a register or a constant that is read as type ``ty``."""
        if text == "_":
            return NO_OPERAND
        symbol = self._symbol(text)
        if symbol is not None:
            return self.constants.operand(symbol, BITS[ty])
        if self.lookup(text):
            return self.register(text)
        if text[1:].replace(".", "_") in SPECIALS:
            raise Unsupported(f"special register {text} as an operand")
        return self.constants.operand(self.number(text, ty), BITS[ty])

    def address(self, text: str, bits: int) -> tuple[int, int]:
        """Return ``[base + offset]`` as the base's operand (none for a constant address) and the offset in bytes."""
        expression = text.strip()[1:-1].strip()
        symbol = self._symbol(expression)
        if symbol is not None:
            return NO_OPERAND, symbol
        found = re.fullmatch(r"([%$\w]+)\s*(?:\+\s*(-?\w+))?", expression)
        if not found:
            raise Unsupported(f"address {text}")
        base, offset = found.group(1), int(found.group(2) or "0", 0)
        if re.fullmatch(r"\d+", base):
            return NO_OPERAND, int(base) + offset
        if self.bits(base) == 64 and bits == 32:  # a 64-bit register that holds a shared address
            low = self.temporary(32)
            self.emit("cvt", "u32", [low, self.register(base)], ty2="u64")
            return low, offset
        if self.bits(base) != bits:
            raise Unsupported(f"{self.bits(base)}-bit address {text}")
        return self.register(base), offset

    # -------------------------------------------------------------------------------------------- rows

    @staticmethod
    def flags(parts: list[str]) -> int:
        """Return the flags of a mnemonic's modifiers."""
        flags = 0
        for part in parts:
            if part in MODIFIERS:
                flags |= FLAGS[MODIFIERS[part]]
        return flags

    def emit(self, op, ty="b32", operands=(), *, ty2="b32", flags=0, imm=0, imm2=0, cls="alu") -> None:
        """Append an instruction: a row of ``Instruction`` in ``engine/machine.h``."""
        self.rows.append(
            [OPS[op], TYPES[ty], TYPES[ty2], flags, self._guard, len(operands), len(self.operands), imm, imm2]
        )
        self.operands.extend(operands)
        number, text, place = self._now
        self.lines.append(number)
        self.texts.append(text)
        self.places.append(place)
        self.classes.append(cls)

    def jump(self, label: str) -> None:
        """Make a label the target of the next row."""
        self.jumps.append((len(self.rows), self._label(label)))

    def table(self, labels: list[str]) -> None:
        """Make the last operands of the last row labels."""
        first = len(self.operands) - len(labels)
        self.tables += [(first + i, self._label(label)) for i, label in enumerate(labels)]

    def plus(self, base: int, offset: int, ty: str) -> int:
        """Return an operand for a register plus a constant."""
        if offset == 0:
            return base
        sum_ = self.temporary(BITS[ty])
        self.emit("add", ty, [sum_, base, self.constants.operand(offset, BITS[ty])])
        return sum_

    def unsupported(self, what: str) -> Unsupported:
        return Unsupported(what)
