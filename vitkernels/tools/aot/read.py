"""Read figures from a compiled kernel: registers, spills, memory accesses, products, addresses.

What runs is read from the machine code (SASS for NVIDIA, assembly for AMD). What the source asks for is read from
Triton's own stages: products from TTGIR, address arithmetic from TTIR.
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

from vitkernels.runtime import cdiv
from vitkernels.tools.aot.build import TARGETS, Launch, Target


@dataclasses.dataclass(frozen=True)
class Report:
    """Figures of one compiled launch.

    Attributes:
        kernel: The kernel's name.
        target: The architecture's name.
        num_warps: Warps (waves) per program.
        registers: Registers per thread; on AMD vector registers, with the accumulation registers.
        spilled_bytes: Bytes per thread that spills store and load; on AMD bytes of scratch memory.
        shared_bytes: Bytes of shared memory (LDS) per program.
        blocks: Programs that fit on a multiprocessor (compute unit) at once.
        wgmma, mma_sync, tcgen05, mfma: Matrix instructions, by kind.
        slow_products: 16-bit products with 64 rows or more that miss the chip's best matrix unit.
        tma: Copies by the tensor memory accelerator.
        cp_async: Asynchronous copies to shared memory.
        narrow: 8- and 16-bit loads and stores of global memory outside loops.
        narrow_in_loop: The same inside loops.
        atomics: Atomic instructions.
        tf32: Products that round fp32 operands to TF32.
        address_bits: 32 if the program id is multiplied by a size in 32 bits, else 64.
        reach_checked: Whether the launcher chooses the width of offsets from the tensor's largest offset.
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
    """A machine instruction: its name, its operands, and whether it is in a loop."""

    name: str
    operands: str
    in_loop: bool


def read_kernel(launch: Launch, compiled) -> tuple[Report, dict[str, str | bytes]]:
    """Return the report and the text of each stage of a kernel from :func:`vitkernels.tools.aot.compile_launch`."""
    target = TARGETS[launch.target]
    metadata = compiled.metadata
    # Gluon's compiler begins at TTGIR, where what these figures need is written alike.
    stages = {"ttir": compiled.asm.get("ttir", compiled.asm["ttgir"])}
    stages |= {name: compiled.asm[name] for name in ("ttgir", "llir")}
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
    """Return how many programs fit on a multiprocessor (compute unit) at once.

    NVIDIA: 64 K registers, allocated to a warp in units of 256; the system takes 1 KiB of shared memory per program
    (CUDA C++ Programming Guide; the occupancy calculator of cuda_occupancy.h); 512 columns of tensor memory on sm_100.
    AMD CDNA 3: four SIMDs, each with 512 vector registers per lane, allocated in units of 8, and at most 8 waves; LDS
    in units of 512 bytes (LLVM's AMDGPUBaseInfo.cpp, getNumWavesPerEUWithNumVGPRs and getMaxWorkGroupsPerCU).
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
    """Return the SASS of ``cubin`` and its registers per thread, using the tools that Triton ships."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def said(*command) -> str:
            return subprocess.run([*command, file.name], capture_output=True, text=True, check=True).stdout

        usage = said(tools / "cuobjdump", "--dump-resource-usage")
        # -ndf skips the analysis of jumps through registers, a third of the time: our kernels have none.
        return said(tools / "nvdisasm", "-c", "-ndf"), int(re.search(r"REG:(\d+)", usage).group(1))


# For Blackwell some releases print after the operands what the instruction waits for: &req={1}, ?trans4.
_SASS = re.compile(
    r"^\s*/\*[0-9a-f]+\*/\s+(?P<when>@\S+\s+)?(?P<name>[A-Z][\w.]*)\s*(?P<operands>[^;]*?)(\s+[&?]\S+)*\s*;", re.M
)
_AMDGCN = re.compile(r"^\s+(?P<name>[a-z]\w*)[ \t]*(?P<operands>[^;\n]*)", re.M)
_LABEL = re.compile(r"^(?P<label>[.\w$]+):", re.M)


def instructions(listing: str) -> list[Instruction]:
    """Return the instructions of a listing in SASS or AMD assembly."""
    sass = _SASS.search(listing) is not None
    found: list[tuple[str, str, str | None]] = []  # name, operands, where it may jump
    ends: set[int] = set()  # instructions that never go on to the next one
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
    """Return the indices reachable from themselves; i leads to jumps[i], and to i + 1 unless it is in ``ends``."""
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
    """Count a :class:`Report`'s instructions in SASS."""
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
    """Count atomics and TF32 products in PTX; on sm_100 SASS also has atomics of the tensor memory allocator."""
    return {
        "atomics": len(re.findall(r"^\s*(?:@\S+\s+)?(?:atom|red|multimem\.red|cp\.reduce)\.", ptx, re.M)),
        "tf32": len(re.findall(r"\b(?:wg)?mma\S*\.tf32|\.kind::tf32", ptx)),
    }


def _sass_width(name: str) -> int:
    width = re.search(r"\.[US]?(8|16|64|128)\b", name)
    return int(width[1]) // 8 if width else 4


def amdgcn_counts(code: Iterable[Instruction]) -> dict[str, int]:
    """Count a :class:`Report`'s instructions in AMD assembly."""
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
    """Count 16-bit products with 64 rows or more that miss the chip's best matrix unit.

    On sm_90 that is wgmma, on sm_100 tcgen05: a product that uses it leaves no ``tt.dot`` in TTGIR. On other targets it
    is enough that a kernel with products has any matrix instruction.
    """

    def rows(text: str) -> list[int]:
        products = re.findall(r"= tt\.dot .*: tensor<\S+x(?:bf16|f16)\b.* -> tensor<(\d+)x", text)
        return [m for m in map(int, products) if m >= 64]

    if target in ("sm_90", "sm_100"):
        return len(rows(ttgir))
    return 0 if matrix else len(rows(ttir))


def address_bits(ttir: str) -> int:
    """Return 32 if TTIR multiplies the program id by a size in 32 bits, else 64.

    Such a product overflows once a tensor holds 2³¹ elements. The program id times one constant is a row or a column
    (pid · BLOCK_M) and fits. Times a size, a stride or a second constant, it is an address.
    """
    # What the warps of Gluon's partitions run are regions that name their values anew.
    return min(map(_address_bits, re.split(r"^ *partition\d+\(.*$", ttir, flags=re.M)))


def _address_bits(ttir: str) -> int:
    start = "start"
    constants: set[str] = set()
    depth: dict[str, int] = {}  # 1: depends on the program id; 2: on the program id times a constant
    lines = [line.partition(" loc(")[0].strip() for line in ttir.splitlines()]
    for line in [start, *lines, start, *lines]:  # twice: a loop passes values back to its own start
        if line == start:
            regions: list[tuple[str, list[str]]] = []  # the result and the carried values of each open region
        result, equals, rest = line.partition(" = ")
        if not equals or not result.startswith("%"):
            result, rest = "", line
        result = result.partition(":")[0]
        operation = rest.split(maxsplit=1)[0] if rest else ""
        operands = re.findall(r"%[\w$.]+", rest)
        level = max((depth.get(o, 0) for o in operands), default=0)
        carried = re.findall(r"(%[\w$.]+) = (%[\w$.]+)", rest) if operation == "scf.for" else []
        if line.startswith("}"):
            closed = regions.pop() if regions else ("", [])
        if line.endswith("{"):
            regions.append(closed if line.startswith("}") else (result, [name for name, _ in carried[1:]]))

        if operation == "arith.constant" or (operation in ("tt.splat", "tt.broadcast") and operands[0] in constants):
            constants.add(result)
        elif operation == "scf.for":  # the first of ``carried`` is its counter
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
