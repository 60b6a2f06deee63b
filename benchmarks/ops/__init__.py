"""One file per op: its rivals and the minimum work; inputs, op and reference are :mod:`vitkernels.testing.workloads`'.

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
from vitkernels.testing.workloads import WORKLOADS, find

MODES = ("forward", "backward", "both")


def _stage(model: str, number: int, image: int, channels: int) -> Case:
    channels *= 2 ** (number - 1)
    side = 4 * 2 ** (number - 1)
    return Case(f"{model} stage {number}", 64, image, side, 0, channels, channels // 32, 4 * channels)


# What attends with relative positions, at timm's sizes. In a stage a token is a patch; a fourth stage has one window.
STAGES = {
    case.name: case
    for case in (
        *(
            _stage(model, number, image, channels)
            for model, image, channels in (
                ("swin_tiny_patch4_window7_224", 224, 96),
                ("swin_base_patch4_window7_224", 224, 128),
                ("swinv2_base_window8_256", 256, 128),
            )
            for number in (1, 2, 3)
        ),
        Case("beit_base_patch16_224", 64, 224, 16, 1, 768, 12, 3072),
    )
}
Tensors = dict[str, Tensor]


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
    rivals: Mapping[str, Callable[[torch.device], Callable]]
    applies: Callable[[Case], bool]


def bench_of(
    name: str,
    flops: Callable[[Case, str], int],
    bytes: Callable[[Case, str, int], int],
    rivals: Mapping[str, Callable[[torch.device], Callable]] | None = None,
    *,
    workload: str = "",
    reference: Callable[..., Tensor] | None = None,
    change: Callable[[Tensors], Tensors] = lambda tensors: tensors,
    stages: str = "",
) -> OpBench:
    """Return the bench ``name`` of a workload.

    Args:
        name, flops, bytes, rivals: As of :class:`OpBench`.
        workload: Its name in the table, if another than ``name``.
        reference: In place of the workload's, if that is a weaker rival.
        change: Makes the bench's tensors of the workload's.
        stages: How the names of the cases of :data:`STAGES` begin that alone have it; none has what names none.
    """
    workload = workload or name
    rows = [row for row in WORKLOADS if row.name == workload]  # their inputs alone differ

    def inputs(case: Case, dtype: torch.dtype, device: torch.device) -> Tensors:
        return change(find(workload, case).draw(case, dtype, device, on=device))

    def applies(case: Case) -> bool:
        if stages:
            return case.name in STAGES and case.name.startswith(stages)
        return case.name not in STAGES and any(row.of(case) for row in rows)

    return OpBench(name, inputs, rows[0].function, reference or rows[0].reference, flops, bytes, rivals or {}, applies)


def by_mode(mode: str, forward: int, backward: int) -> int:
    """Return the count for ``mode`` from those of forward and backward."""
    return {"forward": forward, "backward": backward, "both": forward + backward}[mode]


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
    files = ("attention", "window_attention", "mlp", "linear", "layer_norm", "patch_embed", "patch_merging", "swiglu")
    modules = [importlib.import_module(f"{__name__}.bench_{file}") for file in files]
    return {bench.name: bench for module in modules for bench in module.BENCHES}
