"""One file an op: what it is given at a named case, who else computes it, and the least work it needs.

``flops(case, mode)`` counts a multiplication and an addition each; ``bytes(case, mode, itemsize)`` each tensor that
must be read or written, once. Modes: ``forward`` as in inference, ``backward``, and ``both``, which is training.
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
    """An op under measurement.

    Attributes:
        name: The op's, and what variant of it.
        inputs: Random tensors by argument name at ``(case, dtype, device)``; those with a gradient require it.
        ours: The op on those tensors, given the case too: ``ours(case, **tensors)``.
        reference: The same in plain PyTorch: a rival, the yardstick of errors, and on fp64 the truth.
        flops, bytes: As above.
        rivals: What makes a further rival on ``device``, or raises :class:`Missing` with the reason.
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
    """Return what ``mode`` takes where both directions are known."""
    return {"forward": forward, "backward": backward, "both": forward + backward}[mode]


def normal(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, scale: float = 1.0, shift: float = 0.0):
    """Return a random tensor that requires its gradient."""
    return (torch.randn(shape, device=device) * scale + shift).to(dtype).requires_grad_()


def weight_of(rows: int, columns: int, dtype: torch.dtype, device: torch.device):
    """Return a random (rows, columns) weight that keeps the size of what it multiplies."""
    return normal((rows, columns), dtype, device, columns**-0.5)


def require(module: str, device: torch.device) -> ModuleType:
    """Return a rival's module.

    Raises:
        Missing: There is no GPU for it, or it cannot be imported.
    """
    if device.type != "cuda":
        raise Missing("runs on a GPU only")
    try:
        return importlib.import_module(module)
    except Exception as error:  # a binary built for another torch raises whatever it likes
        raise Missing(f"{module} cannot be imported ({type(error).__name__}: {error})") from error


def all_ops() -> dict[str, OpBench]:
    """Return every op bench by name, the worthiest first."""
    files = ("attention", "mlp", "linear", "layer_norm", "patch_embed", "swiglu", "rms_norm")
    modules = [importlib.import_module(f"{__name__}.bench_{file}") for file in files]
    return {bench.name: bench for module in modules for bench in module.BENCHES}
