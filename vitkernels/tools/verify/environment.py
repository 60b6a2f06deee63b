"""The environment that a verification holds for: versions, device, date."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform

import torch

from vitkernels import __version__, runtime

PACKAGES = ("triton", "timm", "transformers", "numpy")


def describe(device: torch.device) -> dict[str, str]:
    """Return versions, system, date and device by name."""
    facts = {
        "vitkernels": __version__,
        "torch": torch.__version__,
        **{name: version for name in PACKAGES if (version := _version(name))},
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    if device.type == "cpu":
        return facts | {"device": f"CPU, {runtime.device_facts(device).name}"}
    gpu = runtime.device_facts(device)
    return facts | {"device": f"{gpu.name} ({gpu.arch})", "CUDA": torch.version.cuda or torch.version.hip or "none"}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
