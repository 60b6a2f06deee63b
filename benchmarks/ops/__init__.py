"""One file per op: its inputs at a named case, its rivals, and the minimum work.

``flops(case, mode)`` counts each multiplication and each addition. ``bytes(case, mode, itemsize)`` counts once each
tensor that must be read or written. Modes: ``forward`` (as in inference), ``backward``, and ``both`` (training).
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from types import ModuleType

import torch
from torch import Tensor

from benchmarks.environment import Missing
from vitkernels.testing.cases import Case

MODES = ("forward", "backward", "both")
Tensors = dict[str, Tensor | None]


@dataclasses.dataclass(frozen=True)
class OpBench:
    """An op to measure.

    Attributes:
        name: Name of the op and its variant.
        inputs: Returns random tensors by argument name for ``(case, dtype, device)``; trainable ones require grad.
        ours: Our op on these tensors: ``ours(case, **tensors)``.
        reference: The same in plain PyTorch: a rival, the yardstick for errors, and in fp64 the truth.
        flops, bytes: See the module's docstring.
        rivals: By name, a function that returns a further rival for ``device``, or raises :class:`Missing`.
        applies: Whether the network of a case has the op.
    """

    name: str
    inputs: Callable[[Case, torch.dtype, torch.device], Tensors]
    ours: Callable[..., Tensor | tuple[Tensor, ...]]
    reference: Callable[..., Tensor | tuple[Tensor, ...]]
    flops: Callable[[Case, str], int]
    bytes: Callable[[Case, str, int], int]
    rivals: Mapping[str, Callable[[torch.device], Callable]] = dataclasses.field(default_factory=dict)
    applies: Callable[[Case], bool] = lambda case: True


def by_mode(mode: str, forward: int, backward: int) -> int:
    """Return the count for ``mode`` from those of forward and backward."""
    return {"forward": forward, "backward": backward, "both": forward + backward}[mode]


def normal(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, scale: float = 1.0, shift: float = 0.0):
    """Return a random tensor that requires grad."""
    return (torch.randn(shape, device=device) * scale + shift).to(dtype).requires_grad_()


def weight_of(rows: int, columns: int, dtype: torch.dtype, device: torch.device):
    """Return a random (rows, columns) weight, scaled so that outputs are as large as inputs."""
    return normal((rows, columns), dtype, device, columns**-0.5)


def require(module: str, device: torch.device) -> ModuleType:
    """Return a rival's module.

    Raises:
        Missing: ``device`` is no GPU, or the module cannot be imported.
    """
    if device.type != "cuda":
        raise Missing("runs on a GPU only")
    try:
        return importlib.import_module(module)
    except Exception as error:  # a binary built for another torch may raise anything
        raise Missing(f"{module} cannot be imported ({type(error).__name__}: {error})") from error


def all_ops() -> dict[str, OpBench]:
    """Return every op's bench by name, the most important first."""
    files = ("attention", "mlp", "linear", "layer_norm", "patch_embed", "swiglu", "rms_norm")
    modules = [importlib.import_module(f"{__name__}.bench_{file}") for file in files]
    return {bench.name: bench for module in modules for bench in module.BENCHES}
