"""Read what the compiler made of a kernel: registers, spills, memory accesses, products, addresses.

The machine code is the witness for what runs (SASS of NVIDIA's, assembly of AMD's), Triton's own stages for what was
meant: the products in TTGIR, the address arithmetic in TTIR.
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

import triton

from vitkernels.aot.build import TARGETS, Launch, Target
from vitkernels.runtime import cdiv


@dataclasses.dataclass(frozen=True)
class Report:
    """What the compiler made of one launch.

    Attributes:
        kernel: The kernel's name.
        target: The architecture's.
        num_warps: Warps (waves) a program.
        registers: Registers a thread; vector registers, accumulation ones included, on AMD's.
        spilled_bytes: Bytes a thread that spills store and load; of scratch memory on AMD's.
        shared_bytes: Shared memory (LDS) a program uses.
        blocks: Programs that a multiprocessor (compute unit) holds at once.
        wgmma, mma_sync, tcgen05, mfma: Matrix instructions, by kind.
        slow_products: 16-bit products in 64 rows or more that miss the chip's best matrix unit.
        tma: Copies by the tensor memory accelerator.
        cp_async: Asynchronous copies to shared memory.
        narrow: 8- and 16-bit loads and stores of global memory outside loops.
        narrow_in_loop: Those inside.
        atomics: Atomic instructions.
        tf32: Products that round fp32 operands to TF32.
        address_bits: 32 where a program's number is multiplied by a size in 32 bits, else 64.
        reach_checked: Whether the launcher chooses the width of offsets by how far a tensor reaches.
    """

    kernel: str
    target: str
    num_warps: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    blocks: int
    wgmma: int = 0
    mma_sync: int = 0
    tcgen05: int = 0
    mfma: int = 0
    slow_products: int = 0
    tma: int = 0
    cp_async: int = 0
    narrow: int = 0
    narrow_in_loop: int = 0
    atomics: int = 0
    tf32: int = 0
    address_bits: int = 64
    reach_checked: bool = False


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A machine instruction: its name, its operands, and whether it can run twice."""

    name: str
    operands: str
    in_loop: bool


def read_kernel(launch: Launch, compiled) -> tuple[Report, dict[str, str | bytes]]:
    """Read a kernel that :func:`vitkernels.aot.compile_launch` compiled: its report, and its text by stage."""
    target = TARGETS[launch.target]
    metadata = compiled.metadata
    stages = {name: compiled.asm[name] for name in ("ttir", "ttgir", "llir")}
    if target.triton.backend == "cuda":
        stages |= {"ptx": compiled.asm["ptx"], "cubin": compiled.asm["cubin"]}
        stages["sass"], registers = disassemble(compiled.asm["cubin"])
        counts = sass_counts(instructions(stages["sass"]))
        counts |= ptx_counts(stages["ptx"])
    else:
        stages["amdgcn"] = compiled.asm["amdgcn"]
        counts = amdgcn_counts(instructions(stages["amdgcn"]))
        registers = _yaml(stages["amdgcn"], ".vgpr_count")
        counts["spilled_bytes"] = _yaml(stages["amdgcn"], ".private_segment_fixed_size")
    matrix = counts["wgmma"] + counts["mma_sync"] + counts["tcgen05"] + counts["mfma"]
    return Report(
        kernel=launch.name,
        target=launch.target,
        num_warps=metadata.num_warps,
        registers=registers,
        shared_bytes=metadata.shared,
        blocks=blocks(target, metadata.num_warps, registers, metadata.shared, getattr(metadata, "tmem_size", 0) or 0),
        slow_products=slow_products(launch.target, stages["ttir"], stages["ttgir"], matrix),
        address_bits=address_bits(stages["ttir"]),
        reach_checked="INDEX" in json.loads(launch.specialization)["signature"],
        **counts,
    ), stages


def blocks(target: Target, num_warps: int, registers: int, shared_bytes: int, tmem_columns: int = 0) -> int:
    """Return how many programs a multiprocessor (compute unit) holds at once.

    NVIDIA's: 64 K registers, given to a warp in units of 256; 1 KiB of shared memory a program for the system (CUDA C++
    Programming Guide; the occupancy calculator of cuda_occupancy.h); 512 columns of tensor memory on sm_100.
    AMD's CDNA 3: four SIMDs, each with 512 vector registers a lane given in units of 8, and at most 8 waves; LDS in
    units of 512 bytes (LLVM's AMDGPUBaseInfo.cpp, getNumWavesPerEUWithNumVGPRs and getMaxWorkGroupsPerCU).
    """
    if target.triton.backend == "cuda":
        warps = (1 << 16) // (cdiv(32 * registers, 256) * 256)
        limits = [warps // num_warps, target.shared_memory // (shared_bytes + 1024)]
        if tmem_columns:
            limits.append(512 // tmem_columns)
    else:
        warps = 4 * (512 // (cdiv(max(registers, 1), 8) * 8))
        limits = [warps // num_warps, target.shared_memory // (cdiv(max(shared_bytes, 1), 512) * 512)]
    return min(*limits, target.max_warps // num_warps, target.max_blocks)


def disassemble(cubin: bytes) -> tuple[str, int]:
    """Return the SASS of ``cubin`` and its registers a thread, by the tools that Triton brings."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def said(*command) -> str:
            return subprocess.run([*command, file.name], capture_output=True, text=True, check=True).stdout

        usage = said(tools / "cuobjdump", "--dump-resource-usage")
        # Without the analysis of who jumps where through registers, a third of its time: nothing here does.
        return said(tools / "nvdisasm", "-c", "-ndf"), int(re.search(r"REG:(\d+)", usage).group(1))


# For Blackwell some releases print what the instruction waits for behind its operands: &req={1}, ?trans4.
_SASS = re.compile(
    r"^\s*/\*[0-9a-f]+\*/\s+(?P<when>@\S+\s+)?(?P<name>[A-Z][\w.]*)\s*(?P<operands>[^;]*?)(\s+[&?]\S+)*\s*;", re.M
)
_AMDGCN = re.compile(r"^\s+(?P<name>[a-z]\w*)[ \t]*(?P<operands>[^;\n]*)", re.M)
_LABEL = re.compile(r"^(?P<label>[.\w$]+):", re.M)


def instructions(listing: str) -> list[Instruction]:
    """Return the instructions of a listing in SASS or in AMD's assembly."""
    sass = _SASS.search(listing) is not None
    found: list[tuple[str, str, str | None]] = []  # name, operands, where it may jump
    ends: set[int] = set()  # what the next instruction does not follow
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if label := _LABEL.match(line):
            labels[label["label"]] = len(found)
        elif match := (_SASS if sass else _AMDGCN).match(line):
            name, operands = match["name"], match["operands"].strip()
            goes = re.search(r"`\((\S+)\)$" if sass else r"^(\S+)$", operands)
            jumps = re.match(r"BRA|BRX|JMP" if sass else r"s_c?branch", name) and goes
            always = not match["when"] and jumps.start() == 0 if sass and jumps else name == "s_branch"
            if always or (re.match(r"EXIT|RET", name) and not match["when"] if sass else name == "s_endpgm"):
                ends.add(len(found))
            found.append((name, operands, jumps[1] if jumps else None))
    loops = _loops([labels.get(target) for *_, target in found], ends, set(labels.values()))
    return [Instruction(name, operands, i in loops) for i, (name, operands, _) in enumerate(found)]


def _loops(jumps: list[int | None], ends: set[int], labelled: set[int]) -> set[int]:
    """Indices that can be reached from themselves: from i to i + 1 unless it ends, and to jumps[i]."""
    starts = sorted({0} | labelled | {i + 1 for i, j in enumerate(jumps) if j is not None or i in ends})
    starts = [s for s in starts if s < len(jumps)]
    last = dict(zip(starts, [*(s - 1 for s in starts[1:]), len(jumps) - 1], strict=True))
    follow = {}
    for start, end in last.items():
        next_ones = {jumps[end]} if jumps[end] is not None else set()
        if end not in ends:
            next_ones.add(end + 1)
        follow[start] = next_ones & last.keys()
    found: set[int] = set()
    for start, end in last.items():
        seen: set[int] = set()
        todo = list(follow[start])
        while todo:
            block = todo.pop()
            if block not in seen:
                seen.add(block)
                todo += follow[block]
        if start in seen:
            found |= set(range(start, end + 1))
    return found


def sass_counts(code: Iterable[Instruction]) -> dict[str, int]:
    """Count what a :class:`Report` tells of, in SASS."""
    return _count(
        code,
        wgmma=r"[HQIB]GMMA",
        mma_sync=r"[HDQIO]MMA",
        tcgen05=r"UTC\w*MMA",
        tma=r"UTMA(LDG|STG)|UBLKCP",
        cp_async=r"LDGSTS",
        narrow=r"(LD|LDG|ST|STG)\.(\S+\.)?[US](8|16)\b",
    ) | {"spilled_bytes": sum(_sass_width(i.name) for i in code if re.match(r"(LDL|STL)\b", i.name))}


def ptx_counts(ptx: str) -> dict[str, int]:
    """Count atomics and products in TF32, in PTX: SASS shows the tensor memory allocator's own atomics on sm_100."""
    return {
        "atomics": len(re.findall(r"^\s*(?:@\S+\s+)?(?:atom|red|multimem\.red|cp\.reduce)\.", ptx, re.M)),
        "tf32": len(re.findall(r"\b(?:wg)?mma\S*\.tf32|\.kind::tf32", ptx)),
    }


def _sass_width(name: str) -> int:
    width = re.search(r"\.[US]?(8|16|64|128)\b", name)
    return int(width[1]) // 8 if width else 4


def amdgcn_counts(code: Iterable[Instruction]) -> dict[str, int]:
    """Count what a :class:`Report` tells of, in AMD's assembly."""
    counts = _count(
        code,
        mfma=r"v_(s?mfmac?)_",
        narrow=r"(global|buffer|flat)_(load|store)_[us]?(byte|short)",
        atomics=r"(global|buffer|flat|ds)_(\w*atomic|add_|max_|min_|cmpst|pk_add)",
        tf32=r"v_s?mfmac?_\w*xf32",
    )
    to_lds = [i for i in code if re.match(r"(global|buffer)_load", i.name) and re.search(r"\blds\b", i.operands)]
    return counts | {"cp_async": len(to_lds) + counts["cp_async"]}


def _count(code: Iterable[Instruction], **patterns: str) -> dict[str, int]:
    kinds = ("wgmma", "mma_sync", "tcgen05", "mfma", "tma", "cp_async")
    counts = dict.fromkeys((*kinds, "narrow_in_loop"), 0)
    for kind, pattern in patterns.items():
        matches = [i for i in code if re.match(pattern, i.name)]
        if kind == "narrow":
            counts["narrow_in_loop"] = sum(i.in_loop for i in matches)
            counts["narrow"] = len(matches) - counts["narrow_in_loop"]
        else:
            counts[kind] = len(matches)
    return counts


def _yaml(assembly: str, key: str) -> int:
    return int(re.search(rf"^\s*{re.escape(key)}:\s*(\d+)", assembly, re.M).group(1))


def slow_products(target: str, ttir: str, ttgir: str, matrix: int) -> int:
    """Count 16-bit products in 64 rows or more that miss the best matrix unit of the chip.

    On sm_90 and sm_100 those are wgmma and tcgen05, which alone leave no ``tt.dot`` in TTGIR; elsewhere a kernel that
    multiplies must show some matrix instruction.
    """

    def rows(text: str) -> list[int]:
        products = re.findall(r"= tt\.dot .*: tensor<\S+x(?:bf16|f16)\b.* -> tensor<(\d+)x", text)
        return [m for m in map(int, products) if m >= 64]

    if target in ("sm_90", "sm_100"):
        return len(rows(ttgir))
    return 0 if matrix else len(rows(ttir))


def address_bits(ttir: str) -> int:
    """Return 32 where TTIR multiplies a program's number by a size in 32 bits, else 64.

    Such a product exceeds 32 bits once a tensor holds 2³¹ elements. The program's number times a constant, once, is a
    row or column (BLOCK_M · pid) and holds; times a size or a stride, or times a second constant, it is an address.
    """
    constants: set[str] = set()
    depth: dict[str, int] = {}  # 1: depends on the program's number; 2: on that, times a constant
    lines = [line.partition(" loc(")[0].strip() for line in ttir.splitlines()]
    for line in [*lines, *lines]:  # twice, as a loop hands values to its own beginning
        if line == "module {":
            regions: list[tuple[str, list[str]]] = []  # of each open one: what it results in, what it carries
        result, equals, rest = line.partition(" = ")
        if not equals or not result.startswith("%"):
            result, rest = "", line
        result = result.partition(":")[0]
        operation = rest.split(maxsplit=1)[0] if rest else ""
        operands = re.findall(r"%[\w$.]+", rest)
        level = max((depth.get(o, 0) for o in operands), default=0)
        carried = re.findall(r"(%[\w$.]+) = (%[\w$.]+)", rest) if operation == "scf.for" else []
        if line.startswith("}") and regions:
            closed = regions.pop()
        if line.endswith("{"):
            regions.append(closed if line.startswith("}") else (result, [name for name, _ in carried[1:]]))

        if operation == "arith.constant" or (operation in ("tt.splat", "tt.broadcast") and operands[0] in constants):
            constants.add(result)
        elif operation == "scf.for":  # the first that it carries is its counter
            for name, start in carried:
                depth[name] = max(depth.get(name, 0), depth.get(start, 0))
        elif operation == "scf.yield" and regions:
            whole, names = regions[-1]
            depth[whole] = max(depth.get(whole, 0), level)
            for name, operand in zip(names, operands, strict=False):
                depth[name] = max(depth.get(name, 0), depth.get(operand, 0))
        elif operation == "arith.muli" and level and re.search(r": (tensor<[\dx]+x)?i32>?$", line):
            if level == 2 or not constants & set(operands):
                return 32
            depth[result] = 2
        elif result:
            depth[result] = 1 if operation == "tt.get_program_id" else max(level, depth.get(result, 0))
    return 64
