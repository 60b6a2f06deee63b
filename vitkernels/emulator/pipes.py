"""Which of a multiprocessor's pipes executes a PTX instruction.

The pipes are those of Nsight Compute's documentation ("Metrics Decoder", pipelines). FMA multiplies and adds, integers
too. ALU does integer and bit operations, comparisons, minima and conversions. MUFU (there: XU) computes special
functions. LSU does loads, stores and shuffles. ptxas does not map PTX to machine instructions one to one: it drops
moves, folds address arithmetic, and expands divisions and 64-bit integers. It cannot drop tensor, MUFU and LSU
instructions.
"""

from __future__ import annotations

from collections.abc import Sequence

from vitkernels.emulator.lists import OPS, TYPES

PIPES = ("tensor", "fma", "alu", "mufu", "lsu", "barrier", "move", "other")

_OP = {number: name for name, number in OPS.items()}
_TYPE = {number: name for name, number in TYPES.items()}
_BY_CLASS = {
    **dict.fromkeys(("mma", "wgmma"), "tensor"),
    **dict.fromkeys(("ldg", "stg", "lds", "sts", "ldmatrix", "stmatrix", "cpasync", "atom", "shfl"), "lsu"),
    "mufu": "mufu",
    "cvt": "alu",
    "intdiv": "alu",
}
_MULTIPLIES = ("mul", "mulhi", "mulwide", "mad", "madwide", "madhi")
_ADDS = ("add", "sub", "fma")
_MOVES = ("mov", "movp", "pack", "unpack", "special", "nop")


def pipe_of(code: Sequence[int], cls: str) -> str:
    """Return an encoded instruction's pipe, one of :data:`PIPES`.

    Three of them are not hardware pipes: ``barrier`` (warps wait for each other), ``move`` (ptxas drops most of them)
    and ``other``.

    Args:
        code: The instruction's row in :class:`vitkernels.emulator.ptx.Program`.
        cls: The instruction's class.
    """
    op, ty = _OP[int(code[0])], _TYPE[int(code[1])]
    if cls in _BY_CLASS:
        return _BY_CLASS[cls]
    if op in _MOVES or cls == "param":
        return "move"
    if op == "barsync":
        return "barrier"
    if ty == "f64":
        return "other"
    if cls == "div":
        return "mufu"  # a reciprocal and its refinement
    if cls in ("fp32", "half"):
        return "fma" if op in (*_ADDS, *_MULTIPLIES) else "alu"
    if cls == "alu":
        return "fma" if op in _MULTIPLIES else "alu"
    return "other"


def flops_of(code: Sequence[int]) -> tuple[str, int]:
    """Return the kind of an encoded mma or wgmma, and the FLOPs of one warp's part of it.

    The FLOPs are 2 · rows · columns · depth. Four warps share a wgmma: each has 16 of its 64 rows.
    """
    op, ty, imm = _OP[int(code[0])], _TYPE[int(code[1])], int(code[7])
    if op == "wgmma":
        return f"wgmma {ty}", 2 * 16 * (imm & 0xFFF) * (imm >> 12 & 0xFF)
    return f"mma {ty}", 2 * (imm >> 8 & 0xFF) * (imm >> 16) * (imm & 0xFF)


def operand_bytes_of(code: Sequence[int]) -> int:
    """Return the bytes of shared memory that one warp's part of an encoded wgmma reads: its quarter of b, and of a.

    A may lie in registers instead. That both are read once a wgmma agrees with arXiv 2402.13499, where 64 columns are
    the fewest that reach the peak with both in shared memory: 4 KiB in 32 clocks, all that shared memory gives.
    """
    ty, imm = _TYPE[int(code[1])], int(code[7])
    rows = (0 if imm >> 24 & 1 else 64) + (imm & 0xFFF)
    return rows * (imm >> 12 & 0xFF) * (4 if ty == "tf32" else 2) // 4
