"""Run images through PyTorch and through the kernels: errors against fp64, and images per second."""

from __future__ import annotations

import copy
import dataclasses
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from vitkernels import runtime
from vitkernels.emulator.build import NoCompiler, library
from vitkernels.ops import _triton
from vitkernels.tools.console import UserError, busy, not_imported, one_line, print_table

REPEATS = 20
MAX_SECONDS = 3.0  # for all repeats together


@dataclasses.dataclass(frozen=True)
class Run:
    """One model's run over images.

    Attributes:
        backend: Name of the backend.
        device: Name of the device.
        logits: (n, K), on the CPU.
        error: Largest absolute difference of a logit from the fp64 model's on PyTorch.
        images_per_second: From the median of several repeats; on an emulated GPU from a single pass.
    """

    backend: str
    device: str
    logits: Tensor
    error: float
    images_per_second: float


def pick_device() -> torch.device:
    """Return the GPU (``cuda`` or ``xpu``) if there is one, else the CPU."""
    for kind in ("cuda", "xpu"):
        if hasattr(torch, kind) and getattr(torch, kind).is_available():
            return torch.device(kind)
    return torch.device("cpu")


def device_name(device: torch.device) -> str:
    """Return the device's name for display."""
    return "CPU" if device.type == "cpu" else runtime.device_facts(device).name


def why_no_kernels(device: torch.device) -> str | None:
    """Return why the kernels do not run on ``device`` in this process, or None if they do.

    Raises:
        UserError: ``VITKERNELS_BACKEND`` is invalid, or it is ``triton`` and the kernels cannot run.
    """
    try:
        asked = runtime.backend()
    except ValueError as error:
        raise UserError(one_line(error)) from error
    if asked == "torch":
        return "VITKERNELS_BACKEND=torch asks for PyTorch alone."
    if not _triton.HAS_TRITON:
        why = f"Triton {not_imported(_triton.MISSING, 'triton')}"
    elif device.type == "cpu" and runtime.emulated_arch() is None:
        why = "there is no GPU (VITKERNELS_BACKEND=emulated emulates one)."
    elif device.type == "cpu" and (missing := _why_not_emulated()):
        why = f"there is no GPU, and {missing}."
    else:
        return None
    if asked == "triton":
        raise UserError(f"VITKERNELS_BACKEND=triton, but {why}")
    return why[0].upper() + why[1:]


def _why_not_emulated() -> str | None:
    import vitkernels.emulator.execute  # noqa: F401  a missing numpy fails here, not at a launch

    try:
        library()
    except NoCompiler as error:
        return str(error)
    return None


def fp64_logits(model: nn.Module, images: Tensor) -> Tensor:
    """Return the logits (n, K) of ``model`` in fp64 by PyTorch; they lie on the CPU."""
    with runtime.use_backend("torch"), torch.inference_mode():
        return copy.deepcopy(model).double()(images.double()).cpu()


def run_torch(model: nn.Module, images: Tensor, truth: Tensor) -> Run:
    """Run ``model`` on PyTorch on all ``images`` at once; ``truth`` is their fp64 logits."""
    with runtime.use_backend("torch"):
        return _run(model, images, truth, "PyTorch")


def run_kernels(model: nn.Module, images: Tensor, truth: Tensor) -> Run:
    """Run ``model`` through the kernels: repeatedly on a GPU, once on an emulated GPU."""
    if images.device.type != "cpu":
        return _run(model, images, truth, "Triton kernels")
    start = time.perf_counter()
    with torch.inference_mode(), busy(f"{len(images)} images through the kernels on an emulated GPU"):
        logits = model(images)
    rate = len(images) / (time.perf_counter() - start)
    name = runtime.device_facts(images.device).name
    return Run("Triton kernels", name, logits, _largest_error(logits, truth), rate)


def print_runs(runs: dict[str, Run], labels: Tensor | None = None) -> None:
    """Print a table of ``runs`` by name, with the accuracy if ``labels`` are given, and explain its columns."""
    header = ["model", "backend", "device", "images", "accuracy", "Δ fp64", "images/s"]
    rows = []
    for name, run in runs.items():
        n = len(run.logits)
        right = "" if labels is None else f"{100 * (run.logits.argmax(-1) == labels[:n]).double().mean():.2f} %"
        rate = f"{run.images_per_second:,.{0 if run.images_per_second >= 100 else 1}f}"
        rows.append([name, run.backend, run.device, str(n), right, f"{run.error:.1e}", rate])
    if labels is None:
        header, rows = header[:4] + header[5:], [row[:4] + row[5:] for row in rows]
    print_table(header, rows)
    print("Δ fp64: the largest error of a logit; the truth is the same model in fp64 on PyTorch.")


def _run(model: nn.Module, images: Tensor, truth: Tensor, backend: str) -> Run:
    with torch.inference_mode():
        logits = model(images)
        seconds = _median_seconds(lambda: model(images), images.device)
    logits = logits.cpu()
    return Run(backend, device_name(images.device), logits, _largest_error(logits, truth), len(images) / seconds)


def _largest_error(logits: Tensor, truth: Tensor) -> float:
    return (logits.double() - truth[: len(logits)]).abs().max().item()


def _median_seconds(step: Callable[[], object], device: torch.device) -> float:
    synchronize = getattr(torch, device.type).synchronize
    for _ in range(3):  # compilation, caches, clocks
        step()
    times = []
    while len(times) < REPEATS and sum(times) < MAX_SECONDS:
        synchronize()
        start = time.perf_counter()
        step()
        synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
