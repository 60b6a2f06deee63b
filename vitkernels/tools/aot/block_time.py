"""Estimate how long a GPU takes for one block of a Vision Transformer: plain, by torch.compile, accelerated.

Nothing here is measured. The time of a launch is its longest term, and a share of the others, and the launch itself:

    time = longest + (sum − longest) / pieces + launch

A multiprocessor takes its work in pieces: the programs that the busiest one runs, or, if a program loops over tiles, at
least as often as what it moves through L2 fills its shared memory. The pieces pass through its pipes, L2 and DRAM as
through a pipeline: the longest stage never waits, and the others show for the first piece and the last. A block's time
is the sum over its launches. The terms of

- a kernel of ours: products, special functions, instructions (the longest of issue slots, FMA and ALU, of PTX), shared
  memory and L1 with wgmma's operands, L2 if L1 never hits, and DRAM if every byte passes once: counts executed on an
  emulated GPU, for a few programs, times the grid;
- a product of PyTorch: its FLOPs at the share of the peak that a large product reaches, or its bytes;
- an attention of PyTorch: its FLOPs in blocks of 128 queries and keys at FlashAttention 2's rate, or its bytes;
- any other op of PyTorch, and any kernel of Inductor: its bytes.

For PyTorch's and Inductor's only the longest term counts, as nothing is known of their programs. Latency and barriers
are left out: our kernels are estimated too short by what their warps wait, where PyTorch's rates are measured.
Tensors that fit into L2 still pay for DRAM, so that small batches are estimated too long.

The host launches ahead of the GPU. Where it takes longer than the GPU, it decides.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import textwrap
from collections.abc import Sequence

from vitkernels.emulator.build import NoCompiler, library
from vitkernels.emulator.devices import GPUS
from vitkernels.emulator.encode import Unsupported
from vitkernels.tools.aot.block import PHASES, PROVIDERS, Setting, counted_blocks
from vitkernels.tools.aot.chips import BENCHES, CHIPS, Chip
from vitkernels.tools.aot.counts import Counts, count
from vitkernels.tools.aot.recorder import Event
from vitkernels.tools.console import UserError, one_line, print_table, track

TERMS = ("tensor", "special", "issue", "shared", "L2", "DRAM")

BATCH = 256

# Microseconds of a kernel that does next to nothing, in a CUDA graph and in a stream: gpu-small-kernels, 64 KiB, H200.
LAUNCH_US = 1.28
LAUNCH_ON_HOST_US = 2.4
# Microseconds of Python and PyTorch in inference and in a training step, but for CUDA's launches: docs/design.md.
HOST_US = {"timm": (155, 555), "vitkernels": (138, 507)}

# FlashAttention 2 on an H100 with head dim 64, not causal: TFLOP/s by tokens, forward and backward (arXiv 2407.08608).
FLASH = ({512: 282, 1024: 306, 2048: 318, 16384: 324}, {512: 198, 16384: 291})
FLASH_BLOCK = 128  # queries and keys

SOURCES = {
    "launch": f"{LAUNCH_US} µs on the GPU, a small kernel in a CUDA graph on an H200: gpu-small-kernels of {BENCHES}",
    "special, issue, shared": "counts of PTX, at the lanes a clock of the CUDA C++ Programming Guide; issue is the "
    "longest of issue slots, FMA and ALU; shared is shared memory and L1, 128 bytes a clock, wgmma's operands too",
    "kernels of ours": "on an emulated A100 and H100. The H200 and the B200 get the H100's code, launches and counts: "
    "code for sm_100 cannot be emulated, so that a B200 gets tiles that are too small for it",
    "attention of PyTorch": "FlashAttention 2 on an H100 at head dim 64 (arXiv 2407.08608), as a share of the peak of "
    "mma.sync; on a B200 as a share of the peak",
    "host": "Python and PyTorch as timed for docs/design.md on two busy cores, without a GPU, and "
    f"{LAUNCH_ON_HOST_US} µs a launch, measured on an H200's host: gpu-small-kernels; torch.compile's is not known",
}


BIAS = """
× is torch.compile's estimate over this one. What waits for latency and barriers is left out, which favours our kernels:
PyTorch's products and attention are taken at rates that were reached. Compare alike with alike: one block before and
after a change, one GPU, one batch.
"""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The estimated time of one launch in µs, its terms, and what they are from."""

    op: str
    us: float
    terms: dict[str, float]
    source: str

    @property
    def by(self) -> str:
        """The longest term."""
        return max(self.terms, key=self.terms.__getitem__)


def estimate(event: Event, chip: Chip, counts: Counts | None) -> Estimate:
    """Estimate the time of ``event`` on ``chip``; a Triton kernel of ours comes with its ``counts``."""
    if counts is not None:
        terms, source = _terms(counts, chip), f"emulated {counts.target}"
        moved = counts.l2_bytes / chip.num_sms / GPUS[chip.arch].shared_memory
        pieces = max(math.ceil(counts.grid / chip.num_sms), moved)
    else:
        size = sum(access.elements * access.itemsize for access in event.accesses)
        terms, source, pieces = {"DRAM": _us(size, chip.rates.dram * chip.reach["dram"])}, "bytes", math.inf
        if event.attended is not None:
            terms["tensor"], source = _flash_us(event, chip), "FlashAttention 2"
        elif event.flops:
            terms["tensor"] = _us(event.flops, chip.rates.tensor["bf16"] * chip.reach["tensor"])
            source = "FLOPs, bytes"
    longest = max(terms.values())
    us = longest + (sum(terms.values()) - longest) / pieces + LAUNCH_US
    return Estimate(event.op, us, {name: terms.get(name, 0.0) for name in TERMS} | {"launch": LAUNCH_US}, source)


def _terms(counts: Counts, chip: Chip) -> dict[str, float]:
    full = counts.times_on(chip.rates, chip.num_sms)
    return {
        "tensor": full["tensor"] / chip.reach["tensor"],
        "special": full["mufu"],
        "issue": max(full[pipe] for pipe in ("issue", "fma", "alu")),
        "shared": full["lsu"] * (1 + counts.operands / counts.wavefronts if counts.wavefronts else 1),
        "L2": counts.l2_bytes / (chip.rates.l2 * chip.rates.clock * 1e3 * chip.reach.get("l2", 1.0)),
        "DRAM": full["dram"] / chip.reach["dram"],
    }


def _us(amount: float, tera_a_second: float) -> float:
    return amount / (tera_a_second * 1e6)


def _flash_us(event: Event, chip: Chip) -> float:
    """Return the time of an attention of PyTorch: FLOPs of whole blocks at FlashAttention 2's rate."""
    padded = [math.ceil(n / FLASH_BLOCK) * FLASH_BLOCK for n in event.attended]
    flops = event.flops * math.prod(padded) / math.prod(event.attended)
    rates = FLASH[event.phase == "backward"]
    h100 = CHIPS["H100"].rates
    # It multiplies by mma.sync. How much of that a B200 has is not known, and PyTorch would take cuDNN there.
    new = chip.rates.tensor["bf16"] > h100.tensor["bf16"]
    share = chip.rates.tensor["bf16"] * (1 if new else chip.rates.mma_sync / h100.mma_sync) / h100.tensor["bf16"]
    return _us(flops, _interpolated(rates, padded[1]) * share)


def _interpolated(points: dict[int, float], n: int) -> float:
    """Interpolate ``points`` at ``n`` by its logarithm; beyond them the nearest holds."""
    known = sorted(points)
    n = min(max(n, known[0]), known[-1])
    above = next(i for i, k in enumerate(known) if k >= n)
    low, high = known[max(above - 1, 0)], known[above]
    part = math.log(n / low) / math.log(high / low) if high > low else 0.0
    return points[low] + part * (points[high] - points[low])


def estimate_blocks(
    model_name: str, batch: int, gpus: Sequence[str] = tuple(CHIPS)
) -> dict[str, dict[str, dict[str, list[Estimate]]]]:
    """Return the estimates of each launch, by GPU, by who computes the block, and by phase.

    Args:
        model_name: As for :func:`vitkernels.tools.names.resolve`.
        batch: Number of images.
        gpus: Names in :data:`vitkernels.tools.aot.chips.CHIPS`.

    Raises:
        UserError: timm is missing or does not know the name, or the emulated GPU cannot be compiled or run a kernel.
        ValueError: The model is no Vision Transformer.
    """
    try:
        library()
    except NoCompiler as error:
        raise UserError(one_line(error)) from error
    setting = Setting(batch)
    plain = counted_blocks(model_name, setting, ("timm", "torch.compile"))
    _flops_of_attention(plain)
    ours = {
        arch: counted_blocks(model_name, setting, ("vitkernels",), arch)["vitkernels"]
        for arch in dict.fromkeys(CHIPS[gpu].arch for gpu in gpus)
    }
    calls = {
        (arch, event.call.key): event.call
        for arch, phases in ours.items()
        for events in phases.values()
        for event in events
        if event.call is not None
    }
    counted = {}
    for (arch, key), call in track(calls.items(), "Running some programs of each kernel"):
        try:
            counted[arch, key] = count(call, arch)[0]
        except Unsupported as error:
            raise UserError(f"a kernel of the block cannot be run on an emulated {arch}: {one_line(error)}") from error

    def estimated(events: list[Event], chip: Chip) -> list[Estimate]:
        return [estimate(e, chip, counted[chip.arch, e.call.key] if e.call else None) for e in events]

    return {
        gpu: {
            provider: {phase: estimated(events, CHIPS[gpu]) for phase, events in phases.items()}
            for provider, phases in (plain | {"vitkernels": ours[CHIPS[gpu].arch]}).items()
        }
        for gpu in gpus
    }


def _flops_of_attention(plain: dict[str, dict[str, list[Event]]]) -> None:
    """Give each attention that Inductor calls the FLOPs of timm's own; Inductor does not know them."""
    for phase, events in plain.get("torch.compile", {}).items():
        of_timm = iter([e for e in plain["timm"][phase] if e.attended is not None])
        for event in events:
            if "attention" in event.name and (same := next(of_timm, None)) is not None:
                event.flops, event.attended = same.flops, same.attended


def host_us(provider: str, phases: dict[str, list[Estimate]]) -> tuple[float, float] | None:
    """Return the host's time for inference and for a training step; None if it is not known."""
    if provider not in HOST_US:
        return None
    inference, forward, backward = (len(phases[phase]) for phase in PHASES)
    python = HOST_US[provider]
    return python[0] + inference * LAUNCH_ON_HOST_US, python[1] + (forward + backward) * LAUNCH_ON_HOST_US


def run_time(model_name: str, *, batch: int = BATCH, shown: Sequence[str] = ("H100",)) -> dict[str, object]:
    """Print how long one block of ``model_name`` takes in bf16, estimated for each of :data:`CHIPS`.

    Args:
        model_name: As for :func:`vitkernels.tools.names.resolve`; it is estimated at its default image size.
        batch: Number of images.
        shown: The GPUs whose launches are printed one by one.

    Returns:
        All terms as JSON types.

    Raises:
        UserError: As for :func:`estimate_blocks`.
        ValueError: The model is no Vision Transformer, or ``batch`` is below 1.
    """
    if batch < 1:
        raise ValueError(f"batch is {batch}; expected 1 or more")
    estimates = estimate_blocks(model_name, batch)
    for gpu in shown:
        _print_launches(model_name, batch, gpu, estimates[gpu])
    print(f"Estimate, not measured: µs of one block of {model_name}, batch {batch}, bf16.\n")
    print_table(*summary(estimates))
    print(BIAS)
    print("Estimate of the host's µs, and of the batch below which the host takes longer than the GPU:\n")
    print_table(*host_summary(estimates, batch))
    _print_sources()
    return {
        "estimate": True,
        "model": model_name,
        "batch": batch,
        "dtype": "bf16",
        "rule": "longest term + the other terms / pieces of a multiprocessor's work + launch",
        "sources": SOURCES | {gpu: CHIPS[gpu].sources for gpu in estimates},
        "blocks": {
            gpu: {
                provider: {
                    "host_us": host_us(provider, phases),
                    **{phase: [_to_dict(e) for e in found] for phase, found in phases.items()},
                }
                for provider, phases in blocks.items()
            }
            for gpu, blocks in estimates.items()
        },
    }


def _to_dict(e: Estimate) -> dict[str, object]:
    terms = {name: round(us, 3) for name, us in e.terms.items()}
    return {"op": e.op, "estimate_us": round(e.us, 3), "by": e.by, "terms_us": terms, "from": e.source}


def _total(estimates: Sequence[Estimate]) -> float:
    return sum(e.us for e in estimates)


def summary(
    estimates: dict[str, dict[str, dict[str, list[Estimate]]]],
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return header and rows: the estimated µs of each block on each GPU."""
    rows = []
    for gpu, blocks in estimates.items():
        times = {name: [_total(phases[phase]) for phase in PHASES] for name, phases in blocks.items()}
        rival = times.get("torch.compile")
        for name, (inference, forward, backward) in times.items():
            training = forward + backward
            ratios = [f"{rival[0] / inference:.2f}", f"{sum(rival[1:]) / training:.2f}"] if rival else ["", ""]
            rows.append(
                (gpu, PROVIDERS[name], f"{inference:.0f}", ratios[0], f"{forward:.0f}", f"{backward:.0f}",
                 f"{training:.0f}", ratios[1])
            )  # fmt: skip
    header = ("GPU", "block", "inference", "×", "training, forward", "training, backward", "training", "×")
    return header, rows


def host_summary(
    estimates: dict[str, dict[str, dict[str, list[Estimate]]]], batch: int
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return header and rows: the host's estimated µs, and for each GPU the batch below which the host decides."""
    rows = []
    for name in next(iter(estimates.values())):
        host = host_us(name, next(iter(estimates.values()))[name])
        if host is None:
            continue
        for i, kind in enumerate(("inference", "training")):
            below = []
            for blocks in estimates.values():
                device = sum(_total(blocks[name][phase]) for phase in (PHASES[1:] if i else PHASES[:1]))
                below.append(f"{batch * host[i] / device:.0f}")
            rows.append((PROVIDERS[name], kind, f"{host[i]:.0f}", *below))
    return ("block", "", "host µs", *(f"batch on {gpu}" for gpu in estimates)), rows


def _print_launches(model_name: str, batch: int, gpu: str, blocks: dict[str, dict[str, list[Estimate]]]) -> None:
    for name, phases in blocks.items():
        title = f"{model_name}, one block, {PROVIDERS[name]}, batch {batch}, bf16, {gpu}"
        print(f"Estimate, not measured: µs of each launch; {title}\n")
        equal = collections.Counter((phase, *_cells(e)) for phase, found in phases.items() for e in found)
        print_table(
            ("", "launch", "times", "estimate", "by", *TERMS, "launch", "from"),
            [(phase, op, str(number), *cells) for (phase, op, *cells), number in equal.items()],
        )
        print()


def _cells(e: Estimate) -> tuple[str, ...]:
    terms = (f"{e.terms[term]:.1f}" if e.terms[term] else "" for term in (*TERMS, "launch"))
    return e.op if len(e.op) <= 56 else f"{e.op[:55]}…", f"{e.us:.1f}", e.by, *terms, e.source


def _print_sources() -> None:
    print("\nA launch takes its longest term, a share of its others (over a multiprocessor's pieces of work: programs,")
    print("or fillings of its shared memory; ours alone), and the launch itself. Where the terms are from:\n")
    lines = [f"{name}: {text}" for name, text in SOURCES.items()]
    lines += [f"{gpu}, {term}: {text}" for gpu, chip in CHIPS.items() for term, text in chip.sources.items()]
    for line in lines:
        print(textwrap.fill(line, 118, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False))
    print()
