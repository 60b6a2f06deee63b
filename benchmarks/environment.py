"""The machine, versions and commit of a run, and the machine's ceilings."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

from benchmarks.run import CpuTimer, GpuTimer, measure
from benchmarks.schema import Results
from vitkernels import runtime, tuning
from vitkernels.testing.cases import DTYPES
from vitkernels.tools.console import UserError

ROOT = Path(__file__).parents[1]
PACKAGES = (
    "torch", "triton", "timm", "vitkernels", "numpy", "liger-kernel", "flash-attn", "flash-attn-3", "nvidia-cudnn-cu12",
    "nvidia-cudnn-cu13",
)  # fmt: skip


class Missing(UserError):
    """A provider or a job cannot take part; the text says why."""


def new_results(suite: str, budget_s: float, device: torch.device) -> Results:
    """Return results without rows for a run that starts now on this machine."""
    return Results(
        suite=suite,
        budget_s=budget_s,
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        commit=commit(),
        device=describe(device),
        versions=versions(),
        clocks={f"start {name}": value for name, value in clocks(device).items()},
    )


def find_device() -> torch.device:
    """Return the GPU if PyTorch's CUDA interface has one, else the CPU; limit PyTorch to one thread there.

    Raises:
        UserError: The CPU would emulate a GPU, so that times would be meaningless.
    """
    if torch.cuda.is_available():
        return torch.device("cuda")
    if runtime.emulated_arch() is not None:
        raise UserError("an emulated GPU's times are no GPU's: unset VITKERNELS_BACKEND, and PyTorch's are taken")
    # On a CPU we compare overheads. More threads would not change those, but would add noise from other processes.
    torch.set_num_threads(1)
    return torch.device("cpu")


def make_timer(device: torch.device) -> CpuTimer | GpuTimer:
    return GpuTimer() if device.type == "cuda" else CpuTimer()


def describe(device: torch.device) -> dict[str, str | int | float]:
    """Return the device's facts."""
    if device.type == "cuda":
        facts, properties = runtime.device_facts(device), torch.cuda.get_device_properties(device)
        return {
            "name": facts.name,
            "kind": "cuda",
            "arch": facts.arch,
            "multiprocessors": facts.num_sms,
            "memory_bytes": properties.total_memory,
            "driver": _nvidia_smi("driver_version") or "unknown",
        }
    return {
        "name": _cpu_name(),
        "kind": "cpu",
        "arch": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
    }


def folder_name(results: Results) -> str:
    """Return the name of the folder in ``benchmarks/results`` for the run's device."""
    if results.device["kind"] == "cpu":
        return "cpu"
    return tuning.table_name(str(results.device["name"])).removesuffix(".json")


def clocks(device: torch.device) -> dict[str, float]:
    """Return clocks in MHz and the power limit in W, as far as the driver reports them."""
    if device.type != "cuda":
        return {}
    names = {"SM MHz": "clocks.sm", "memory MHz": "clocks.mem", "SM max MHz": "clocks.max.sm", "limit W": "power.limit"}
    found = {}
    for name, field in names.items():
        try:
            found[name] = float(_nvidia_smi(field))
        except ValueError:
            continue
    return found


def _nvidia_smi(field: str) -> str:
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def versions() -> dict[str, str]:
    found = {
        "python": platform.python_version(),
        "python's build": f"{platform.python_build()[1]}, {platform.python_compiler()}",  # changes the cost of calls
        "cuda": torch.version.cuda or "",
        "hip": torch.version.hip or "",
    }
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {name: version for name, version in found.items() if version}


def commit() -> str:
    """Return the checkout's short hash, with ``-dirty`` if files have changed, or an empty string."""
    try:
        run = lambda *args: subprocess.run(  # noqa: E731
            ["git", *args], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True
        ).stdout.strip()
        head = run("rev-parse", "--short", "HEAD")
        return head + ("-dirty" if run("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def measure_ceilings(device: torch.device, timer: CpuTimer | GpuTimer, dtypes: list[str]) -> dict[str, float]:
    """Measure the ceilings: TFLOP/s of a square product by dtype, and GB/s of a copy (bytes read plus written)."""
    on_gpu = device.type == "cuda"
    n, copied = (8192, 1 << 30) if on_gpu else (1024, 1 << 28)
    source = torch.randn(copied // 4, device=device)
    target = torch.empty_like(source)
    work = {"copy": lambda: target.copy_(source)}
    for dtype in dtypes:
        a, b = (torch.randn(n, n, device=device, dtype=DTYPES[dtype]) for _ in range(2))
        work[dtype] = lambda a=a, b=b: a @ b
    for function in work.values():
        function()
    # A ceiling is a best case: take the 20th percentile of the times, not the median.
    fastest = {name: times.p20 for name, (times, _) in measure(work, timer, 2.0).items()}
    rates = {f"tflops {dtype}": 2 * n**3 / fastest[dtype] / 1e6 for dtype in dtypes}
    return rates | {"gb_per_s": 2 * copied / fastest["copy"] / 1e3}
