"""``vitkernels inspect``: compile every kernel at every named case, show what came out, and hold it to the contract."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
import triton

from vitkernels import _interrupt
from vitkernels.aot import contract
from vitkernels.aot.build import TARGETS, Launch, compile_launch, trace
from vitkernels.aot.launches import launches
from vitkernels.aot.read import Report, read_kernel
from vitkernels.console import UserError, check_can_fill, one_line, print_table, track, write_file
from vitkernels.ops._triton import INTERPRETED
from vitkernels.ops.attention.config import choose_config, useful_share
from vitkernels.testing.cases import CASES

# fp16 compiles as bf16 does; fp32 takes other paths (TF32, or no tensor cores at all), at one case. So does fp64, which
# is for gradients to be checked in: that each op compiles and fits is enough.
COMPILED = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
FP32_CASE = "vit_base_patch16_224"
FP64_OPS = {
    "vit_base_patch16_224": {
        "layer_norm", "add_layer_norm", "linear_activation", "mlp", "attention_biased", "attention_key_mask",
        "attention_pair_mask", "attention_dropout", "patch_embed", "patch_embed_uint8",
    },
    "vit_so400m_patch14_siglip_378": {"attention_varlen"},
    "eva02_large_patch14_448": {"swiglu_mlp", "attention_rope_interleaved"},
    "aimv2_large_patch14_224": {"rms_norm"},
}  # fmt: skip

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
    update: bool = False,
    accept_worse: bool = False,
    folder: Path = contract.FOLDER,
) -> bool:
    """Compile the kernels for ``targets``, print a table of each, and return whether all hold the contract.

    Args:
        targets: Names in :data:`vitkernels.aot.TARGETS`.
        kernel: Only kernels whose name holds this.
        cases: Only these of :data:`vitkernels.testing.cases.CASES`.
        every: Show each launch, not a row a kernel.
        markdown: Print the tables as README.md shows them.
        json_file: Where to write all reports.
        dump: Folder for the text of every stage, by target, kernel and case.
        jobs: How many kernels to compile at a time; one a core unless given.
        update: Take what is new or better into the contract.
        accept_worse: Take what is worse into it, too.
        folder: Where the contracts lie.

    Raises:
        UserError: The interpreter is on, a name is unknown, ``jobs`` is less than 1, or a file cannot be written.
    """
    if INTERPRETED:
        raise UserError("kernels are interpreted in this process; unset TRITON_INTERPRET to compile them")
    unknown = set(cases or ()) - set(CASES)
    if unknown:
        raise UserError(f"no case {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    if jobs is not None and jobs < 1:
        raise UserError(f"--jobs is {jobs}; expected 1 or more")
    for place in filter(None, (dump, folder if update else None)):
        check_can_fill(place)
    uses = find_launches(targets, cases or CASES, kernel)
    if not uses:
        raise UserError(f"no kernel's name holds {kernel!r}")
    complete = kernel is None and cases is None
    results = compile_all(uses, dump, jobs)
    if json_file is not None:
        _write_json(json_file, uses, results)

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
        try:
            before = contract.load(target, folder)
            if update:
                complete_now = complete and not broken
                after = contract.update(before, measured, complete=complete_now, accept_worse=accept_worse)
                contract.save(target, after, folder)
                before = contract.load(target, folder)
        except (OSError, ValueError) as error:
            raise UserError(f"the contract of {target}: {one_line(error)}") from error
        verdict = contract.check(before, measured, complete=complete)
        _show(target, reports, uses, every, markdown)
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
    """Return each distinct launch of the library at ``cases``, with where it comes from."""
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
    """Compile and read each launch, ``jobs`` at a time; of one that does not compile, what the compiler said."""
    places = {launch: dump and _place(dump, launch, of) for launch, of in uses.items()}
    text = f"Compiling {len(uses)} kernels"
    workers = min(jobs or len(os.sched_getaffinity(0)), len(uses) // 4)  # starting one takes as long as four kernels
    if workers < 2:
        return {launch: _compile_and_read(launch, place) for launch, place in track(places.items(), text, len(uses))}
    results: dict[Launch, Report | str] = {}
    with _interrupt.pool(workers, "spawn") as pool:
        jobs = {pool.submit(_compile_and_read, launch, place): launch for launch, place in places.items()}
        for job in track(concurrent.futures.as_completed(jobs), text, len(uses)):
            results[jobs[job]] = job.result()
    return {launch: results[launch] for launch in uses}


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
            part.replace(place / part.name[1:])  # at once: this process may be killed
    return report


def _place(dump: Path, launch: Launch, uses: list[Use]) -> Path:
    # Launches of one op and case may differ in their constants alone.
    number = hashlib.sha256(launch.specialization.encode()).hexdigest()[:8]
    return dump / launch.target / launch.name / "-".join([*uses[0], number])


def _write_json(path: Path, uses: Mapping[Launch, list[Use]], results: Mapping[Launch, Report | str]) -> None:
    rows = []
    for launch, result in results.items():
        row = {"target": launch.target, "kernel": launch.name, "uses": [" ".join(use) for use in uses[launch]]}
        rows.append(row | (dataclasses.asdict(result) if isinstance(result, Report) else {"error": result}))
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
    if markdown:
        for row in (HEADER, ["---", *["---:"] * (len(HEADER) - 1)], *rows):
            print(f"| {' | '.join(row)} |")
    else:
        print_table(HEADER, rows)
    print(f"\nNot shown, but checked: {hidden} launches in fp32 and fp64.\n" if hidden else "", flush=True)


def _show_useful_work(target: str, reports: Iterable[Launch], uses: Mapping[Launch, list[Use]]) -> None:
    """Print, by case, how much of the scores that attention's forward computes is no padding."""
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
        values = [getattr(r, name) for r in reports]
        low, high = (f"{v / unit:.3g}" for v in (min(values), max(values)))
        return low if low == high else f"{low}–{high}"

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
