"""``vitkernels inspect``: compile every kernel at every named case, print figures, and check the contract."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
import triton

from vitkernels.emulator.build import NoCompiler, library
from vitkernels.emulator.devices import DEVICES
from vitkernels.ops._attention.config import choose_config, useful_share
from vitkernels.testing.cases import CASES
from vitkernels.tools import _interrupt
from vitkernels.tools.aot import contract
from vitkernels.tools.aot.build import TARGETS, Launch, compile_launch, trace
from vitkernels.tools.aot.counts import BOUNDS, ESTIMATES, Counts, count_op
from vitkernels.tools.aot.launches import launches
from vitkernels.tools.aot.read import Report, read_kernel
from vitkernels.tools.console import UserError, check_can_fill, one_line, print_table, track, write_file
from vitkernels.tools.tables import Table, markdown_table

# fp16 compiles like bf16. fp32 takes other paths (TF32, or no tensor cores at all): one case is enough. fp64 exists for
# gradient checks: each op only has to compile and to fit on a multiprocessor.
COMPILED = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
FP32_CASE = "vit_base_patch16_224"
FP64_OPS = {
    "vit_base_patch16_224": {
        "layer_norm", "add_layer_norm", "linear_activation", "mlp", "lora_mlp", "attention_biased",
        "attention_key_mask", "attention_pair_mask", "attention_dropout", "attention_swin_cosine", "attention_relative",
        "attention_decomposed_windows", "patch_embed", "patch_embed_uint8", "patch_embed_masked",
        "patch_embed_visible",
    },
    "vit_so400m_patch14_siglip_378": {"attention_varlen"},
    "eva02_large_patch14_448": {"swiglu_mlp", "attention_rope_interleaved"},
    "aimv2_large_patch14_224": {"rms_norm"},
}  # fmt: skip

COUNTED = ("bf16", "fp32")  # the dtypes that --run runs on an emulated GPU

Use = tuple[str, str, str]  # case, op, dtype


def inspect(
    targets: Sequence[str],
    *,
    kernel: str | None = None,
    cases: Sequence[str] | None = None,
    every: bool = False,
    markdown: bool = False,
    json_file: Path | None = None,
    dump: Path | None = None,
    jobs: int | None = None,
    run: bool = False,
    update: bool = False,
    accept_worse: bool = False,
    folder: Path = contract.FOLDER,
) -> bool:
    """Compile the kernels for ``targets``, print a table for each, and return whether all keep the contract.

    Args:
        targets: Names in :data:`vitkernels.tools.aot.TARGETS`.
        kernel: Only kernels whose name contains this.
        cases: Only these of :data:`vitkernels.testing.cases.CASES`.
        every: Show one row per launch instead of one per kernel.
        markdown: Print the tables in Markdown, as docs/compiler-report.md shows them.
        json_file: File for all reports.
        dump: Folder for the text of every stage, by target, kernel and case.
        jobs: How many kernels to compile, or ops to run, at a time; by default one per core.
        run: Also run some programs of each launch on an emulated GPU and count what they execute.
        update: Add new and better figures to the contract.
        accept_worse: Add worse figures, too.
        folder: Folder of the contracts.

    Raises:
        UserError: A name is unknown, ``jobs`` is less than 1, a file cannot be written, ``run`` is asked for a target
            that cannot be emulated, or no C++ compiler is found for it.
    """
    unknown = set(cases or ()) - set(CASES)
    if unknown:
        raise UserError(f"no case {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    if jobs is not None and jobs < 1:
        raise UserError(f"--jobs is {jobs}; expected 1 or more")
    if run:
        _check_can_run(targets)
    for place in filter(None, (dump, folder if update else None)):
        check_can_fill(place)
    uses = find_launches(targets, cases or CASES, kernel)
    if not uses:
        raise UserError(f"no kernel's name holds {kernel!r}")
    complete = kernel is None and cases is None
    results = compile_all(uses, dump, jobs)
    counts = count_all(uses, kernel, jobs) if run else {}
    if json_file is not None:
        _write_json(json_file, uses, results, counts)

    holds = True
    for target in targets:
        mine = {launch: result for launch, result in results.items() if launch.target == target}
        reports = {launch: result for launch, result in mine.items() if isinstance(result, Report)}
        failed = [launch for launch in mine if launch not in reports]
        broken = [f"{launch.name} {_named(uses[launch])} does not compile: {mine[launch]}" for launch in failed]
        measured = collections.defaultdict(list)
        for launch, report in reports.items():
            for case, op, dtype in uses[launch]:
                if dtype != "fp64":
                    measured[launch.name, f"{case} {op} {dtype}"].append(report)
            if uses[launch][0][2] == "fp64":
                broken += [f"{launch.name} {_named(uses[launch])} {what}" for what in contract.unfit(report)]
        counted = collections.defaultdict(list)
        for (where, case, op, dtype), found in counts.items():
            if where != target:
                continue
            if isinstance(found, str):
                broken.append(f"{case} {op} {dtype} cannot be run: {found}")
                continue
            for count in found:
                broken += [f"{case} {op} {dtype}: {error}" for error in count.errors]
                counted[count.kernel, f"{case} {op} {dtype}"].append(count)
        try:
            before = contract.load(target, folder)
            if update:
                complete_now = complete and not broken
                after = contract.update(before, measured, counted, complete=complete_now, accept_worse=accept_worse)
                contract.save(target, after, folder)
                before = contract.load(target, folder)
        except (OSError, ValueError) as error:
            raise UserError(f"the contract of {target}: {one_line(error)}") from error
        verdict = contract.check(before, measured, counted, complete=complete)
        _show(target, reports, uses, every, markdown)
        if counted:
            _show_counts(target, counted, every, markdown)
        _show_useful_work(target, reports, uses)
        if before["triton"] != triton.__version__:
            print(
                f"The figures are of Triton {before['triton']}, this is {triton.__version__}: only rules are checked."
            )
        for title, lines in (
            ("Excepted", verdict.excepted),
            ("Better (`vitkernels inspect --update` takes it over)", verdict.better),
            ("Broken", broken + verdict.broken),
        ):
            for line in lines:
                print(f"{title}: {target} {line}")
        holds = holds and not broken and not verdict.broken
    return holds


def find_launches(targets: Iterable[str], cases: Iterable[str], kernel: str | None = None) -> dict[Launch, list[Use]]:
    """Return each distinct launch of the library at ``cases``, with the (case, op, dtype) that make it."""
    found: dict[Launch, list[Use]] = {}
    plan = [
        (target, case, op, dtype, launcher)
        for target in targets
        for case in cases
        for dtype in COMPILED
        for op, launcher in launches(CASES[case], COMPILED[dtype]).items()
        if dtype == "bf16" or (case == FP32_CASE if dtype == "fp32" else op in FP64_OPS.get(case, ()))
    ]
    for target, case, op, dtype, launcher in track(plan, "Looking for launches"):
        for launch in trace(launcher, target):
            if kernel is None or kernel in launch.name:
                uses = found.setdefault(launch, [])
                if (case, op, dtype) not in uses:
                    uses.append((case, op, dtype))
    return found


def compile_all(
    uses: Mapping[Launch, list[Use]], dump: Path | None = None, jobs: int | None = None
) -> dict[Launch, Report | str]:
    """Compile and read each launch, ``jobs`` at a time; for one that fails to compile, return the compiler's error."""
    places = {launch: dump and _place(dump, launch, of) for launch, of in uses.items()}
    found = _each(_compile_and_read, places.items(), f"Compiling {len(uses)} kernels", jobs)
    return dict(zip(uses, found, strict=True))


def count_all(
    uses: Mapping[Launch, list[Use]], kernel: str | None = None, jobs: int | None = None
) -> dict[tuple[str, str, str, str], list[Counts] | str]:
    """Count what ``uses`` execute, by target, case, op and dtype; for one that cannot run, return the reason."""
    wanted = {(launch.target, *use): None for launch, of in uses.items() for use in of if use[2] in COUNTED}
    found = _each(_count, [(*use, kernel) for use in wanted], f"Running {len(wanted)} ops", jobs)
    return dict(zip(wanted, found, strict=True))


def _each(function: Callable, items: Iterable[tuple], text: str, jobs: int | None) -> list:
    """Return ``function(*item)`` for each of ``items``, in order; ``jobs`` run at a time."""
    items = list(items)
    workers = min(jobs or len(os.sched_getaffinity(0)), len(items) // 4)  # a worker's start costs as much as 4 kernels
    if workers < 2:
        return [function(*item) for item in track(items, text)]
    with _interrupt.pool(workers, "spawn") as pool:
        submitted = [pool.submit(function, *item) for item in items]
        for _ in track(concurrent.futures.as_completed(submitted), text, len(items)):
            pass
    return [job.result() for job in submitted]


def _compile_and_read(launch: Launch, place: Path | None) -> Report | str:
    try:
        report, stages = read_kernel(launch, compile_launch(launch))
    except Exception as error:  # whatever the compiler raises is a finding about the kernel
        return f"{type(error).__name__}: {one_line(error)}"
    if place is not None:
        place.mkdir(parents=True, exist_ok=True)
        for stage, text in stages.items():
            part = place / f".{launch.name}.{stage}"
            part.write_bytes(text.encode() if isinstance(text, str) else text)
            part.replace(place / part.name[1:])  # atomic: if this process is killed, no file is cut short
    return report


def _count(target: str, case: str, op: str, dtype: str, kernel: str | None) -> list[Counts] | str:
    try:
        return count_op(CASES[case], op, dtype, target, kernel)
    except Exception as error:  # unknown PTX, or whatever a launcher raises
        return f"{type(error).__name__}: {one_line(error)}"


def _check_can_run(targets: Iterable[str]) -> None:
    """Raise UserError if a target cannot be emulated, or if the engine cannot be compiled here."""
    others = [target for target in targets if target not in DEVICES]
    if others:
        raise UserError(f"--run cannot run {', '.join(others)}: the GPUs that are emulated are {', '.join(DEVICES)}")
    try:
        library()
    except NoCompiler as error:
        raise UserError(one_line(error)) from error


def _place(dump: Path, launch: Launch, uses: list[Use]) -> Path:
    # Launches of one op and case may differ only in constants: without the hash they would share a folder.
    number = hashlib.sha256(launch.specialization.encode()).hexdigest()[:8]
    return dump / launch.target / launch.name / "-".join([*uses[0], number])


def _write_json(
    path: Path,
    uses: Mapping[Launch, list[Use]],
    results: Mapping[Launch, Report | str],
    counts: Mapping[tuple[str, str, str, str], list[Counts] | str],
) -> None:
    rows = []
    for launch, result in results.items():
        row = {"target": launch.target, "kernel": launch.name, "uses": [" ".join(use) for use in uses[launch]]}
        rows.append(row | (dataclasses.asdict(result) if isinstance(result, Report) else {"error": result}))
    for (target, *use), found in counts.items():
        row = {"target": target, "uses": [" ".join(use)]}
        each = [{"error": found}] if isinstance(found, str) else [{"run": count.to_dict()} for count in found]
        rows += [row | {"kernel": count["run"]["kernel"]} | count if "run" in count else row | count for count in each]
    write_file(path, json.dumps(rows, indent=1) + "\n")


HEADER = (
    "kernel", "launches", "registers", "spilled B", "shared KiB", "blocks an SM", "matrix instructions", "TMA",
    "cp.async", "8/16-bit in loops", "8/16-bit else", "atomics", "TF32", "addresses",
)  # fmt: skip


def _show(
    target: str, reports: Mapping[Launch, Report], uses: Mapping[Launch, list[Use]], every: bool, markdown: bool
) -> None:
    groups: dict[str, list[Report]] = collections.defaultdict(list)
    hidden = 0
    for launch, report in reports.items():
        if every:
            groups[f"{launch.name} {_named(uses[launch])}"].append(report)
        elif uses[launch][0][2] == "bf16":
            groups[launch.name].append(report)
        else:
            hidden += 1
    rows = [(name, str(len(group)), *_cells(group)) for name, group in sorted(groups.items())]
    print(f"\n{target}, Triton {triton.__version__}" + ("" if every else ", bf16; a range goes over the cases") + "\n")
    _print(HEADER, rows, markdown)
    print(f"\nNot shown, but checked: {hidden} launches in fp32 and fp64.\n" if hidden else "", flush=True)


COUNTS_HEADER = (
    "kernel", "launches", "tensor GFLOP", "tensor", "FMA", "ALU", "MUFU", "LSU", "sectors a request", "needless %",
    "conflicts %", "barriers", "L2 MB", "DRAM MB",
)  # fmt: skip
TIMES_HEADER = ("kernel", "tensor", "MUFU", "LSU", "L2", "DRAM", "at least", "by", "roofline %", "FMA", "ALU", "issue")


def _show_counts(target: str, counted: Mapping[contract.Key, list[Counts]], every: bool, markdown: bool) -> None:
    """Print what launches execute, and lower bounds of their times."""
    groups: dict[str, list[Counts]] = collections.defaultdict(list)
    for (name, use), counts in counted.items():
        if every or use.endswith(" bf16"):
            groups[f"{name} {use}" if every else name] += counts
    groups = dict(sorted(groups.items()))
    if not groups:  # all counts are fp32's
        return

    def cells(group: list[Counts]) -> list[str]:
        return [
            _span(sum(c.flops.values()) / 1e9 for c in group),
            *(_span(getattr(c, pipe) / 1e6 for c in group) for pipe in ("tensor", "fma", "alu", "mufu", "lsu")),
            _span(c.sectors_per_request for c in group),
            _span(100 * c.excess_sectors / c.sectors if c.sectors else 0 for c in group),
            _span(100 * c.conflicts / c.wavefronts if c.wavefronts else 0 for c in group),
            _span(c.barriers for c in group),
            _span(c.l2_bytes / 1e6 for c in group),
            _span(c.dram_bytes / 1e6 for c in group),
        ]

    ran = _span(c.programs for group in groups.values() for c in group)
    print(f"What a launch executes on {target}: counts of {ran} of its programs times the grid.")
    print(
        "Tensor to LSU: millions of PTX's warp instructions. Needless: sectors beyond those that the bytes asked for "
        "fill.\nConflicts: of the clocks of shared memory and L1, those that bank conflicts cost.\n"
    )
    _print(COUNTS_HEADER, [(name, str(len(group)), *cells(group)) for name, group in groups.items()], markdown)

    def times(group: list[Counts]) -> list[str]:
        each = [c.times_us for c in group]
        return [
            *(_span(t[pipe] for t in each) for pipe in BOUNDS),
            _span(c.bound_us for c in group),
            ", ".join(_PIPES[pipe] for pipe in BOUNDS if any(c.bound_by == pipe for c in group)),
            _span(100 * c.roofline_share for c in group),
            *(_span(t[pipe] for t in each) for pipe in ESTIMATES),
        ]

    print(
        f"\nMicroseconds on one {DEVICES[target].name} at the least; FMA, ALU and issue slots are PTX's, estimates:\n"
    )
    _print(TIMES_HEADER, [(name, *times(group)) for name, group in groups.items()], markdown)
    print(flush=True)


_PIPES = {"tensor": "tensor", "mufu": "MUFU", "lsu": "LSU", "l2": "L2", "dram": "DRAM"}


def _span(values: Iterable[float]) -> str:
    """Format the smallest and the largest of ``values``, or one number if they look the same."""
    values = list(values)
    low, high = (f"{v:.3g}" if v < 1000 else f"{v:.0f}" for v in (min(values), max(values)))
    return low if low == high else f"{low}–{high}"


def _print(header: Sequence[str], rows: Sequence[Sequence[str]], markdown: bool) -> None:
    if markdown:
        print(markdown_table(Table(header, rows)))
    else:
        print_table(header, rows)


def _show_useful_work(target: str, reports: Iterable[Launch], uses: Mapping[Launch, list[Use]]) -> None:
    """Print for each case which share of the scores in attention's forward is not padding."""
    attended = {case for launch in reports for case, op, _ in uses[launch] if op == "attention"}
    shares = collections.defaultdict(list)
    for name in (name for name in CASES if name in attended):
        case = CASES[name]
        config = choose_config(
            case.tokens, case.tokens, case.head_dim, torch.bfloat16, TARGETS[target].facts,
            heads=case.batch * case.heads,
        )  # fmt: skip
        share = useful_share(case.tokens, case.tokens, config.forward)
        shares[f"{share:.0%} at {case.tokens} tokens, head dim {case.head_dim}"].append(name)
    if shares:
        print("Useful work in the padded score matrix of attention's forward:")
        for text, names in shares.items():
            print(f"  {text}: {', '.join(names)}")


def _cells(reports: Sequence[Report]) -> list[str]:
    def span(name: str, unit: int = 1) -> str:
        return _span(getattr(r, name) / unit for r in reports)

    matrix = {"wgmma": "wgmma", "mma_sync": "mma.sync", "tcgen05": "tcgen05", "mfma": "mfma"}
    widths = {"64" if r.address_bits == 64 else "32, reach checked" if r.reach_checked else "32" for r in reports}
    return [
        span("registers"),
        span("spilled_bytes"),
        span("shared_bytes", 1024),
        span("blocks"),
        ", ".join(f"{said} {span(kind)}" for kind, said in matrix.items() if any(getattr(r, kind) for r in reports)),
        *map(span, ("tma", "cp_async", "narrow_in_loop", "narrow", "atomics", "tf32")),
        " / ".join(sorted(widths)),
    ]


def _named(uses: list[Use]) -> str:
    more = f" +{len(uses) - 1}" if len(uses) > 1 else ""
    return " ".join(uses[0]) + more
