"""The costs of vitkernels on the host: an op's call without its launches, imports, and accelerate."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import torch

import vitkernels
from benchmarks.compete import Session
from benchmarks.environment import ROOT, Missing
from benchmarks.run import summary
from benchmarks.schema import OURS, Row, Times
from vitkernels.tools import names

LARGEST = "vit_giant_patch14_dinov2"
# A user's first lines; each is timed after the ones above it.
IMPORTS = {
    "torch": "import torch",
    "vitkernels": "import vitkernels",
    "vitkernels.accelerate": "vitkernels.accelerate",
    "vitkernels.ops, with Triton": "import vitkernels.ops",
}


def run_script(arguments: list[str], seconds: float, **environment: str) -> str:
    """Run Python in a separate process and return what it printed.

    Raises:
        Missing: It failed, or took longer than ``seconds``.
    """
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))} | environment
    try:
        run = subprocess.run(
            [sys.executable, "-W", "ignore", *arguments],
            env=environment, capture_output=True, text=True, timeout=max(1.0, seconds), check=True,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise Missing(f"took longer than the {seconds:.0f} s left") from error
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or [f"exit status {error.returncode}"]
        raise Missing(lines[-1]) from error
    return run.stdout


def call_rows(session: Session, seconds: float = 12.0) -> Iterator[Row]:
    """Measure each op's call without its launches, and PyTorch's minimum; see ``benchmarks/host_time.py``."""
    printed = run_script(["-m", "benchmarks.host_time", str(seconds)], session.left())
    for name, times in json.loads(printed).items():
        provider, op, mode = name.split(", ")
        yield Row("cost", "call but for launches", op, provider, mode, time=Times(**times))


def import_rows(session: Session, runs: int = 3) -> Iterator[Row]:
    """Measure imports in fresh processes, after a first process that fills the file caches."""
    lines = ["import time", "stamps = [time.perf_counter()]"]
    for statement in IMPORTS.values():
        lines += [statement, "stamps.append(time.perf_counter())"]
    lines.append("print(*(b - a for a, b in zip(stamps, stamps[1:])))")
    samples: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for _ in range(runs + 1):
        printed = run_script(["-c", "\n".join(lines)], session.left())
        for name, seconds in zip(IMPORTS, printed.split(), strict=True):
            samples[name].append(float(seconds) * 1e6)
    for name, times in samples.items():
        yield Row("cost", "import", name, name.partition(".")[0], "fresh process", time=summary(times[1:]))


def accelerate_rows(runs: int = 50) -> Iterator[Row]:
    """Measure ``accelerate`` on a ViT-g on the meta device, as its weights do not matter."""
    with torch.device("meta"):
        model, _ = names.build(LARGEST)

    samples = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        vitkernels.accelerate(model)
        samples.append((time.perf_counter() - start) * 1e6)
        vitkernels.restore(model)
    yield Row("cost", "accelerate", LARGEST, OURS, "whole model", time=summary(samples[1:]))
