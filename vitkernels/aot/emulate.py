"""Launches of an op at the sizes of a real model, executed in part on an emulated GPU.

The tensors need no memory until a kernel takes them; what PyTorch computes between the kernels is not computed. Each
launch gets memory of its own, laid out as its arguments are, and runs a few programs of its grid: with the very
configuration, code and addresses of the whole one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from vitkernels.aot.build import TARGETS, on_fake_tensors
from vitkernels.emulator.execute import Run
from vitkernels.emulator.launch import Emulation, emulating

LARGEST_FILL = 1 << 22  # bytes; more is left zero, for the time that it takes


def emulate(
    launcher: Callable[[], object],
    target: str,
    *,
    programs: int = 2,
    seed: int | None = None,
    fill: Callable[[torch.Tensor], object] | None = None,
    kind: type[Emulation] | None = None,
    **changes,
) -> list[Run]:
    """Call ``launcher()`` as :func:`vitkernels.aot.trace` does, and return what each launch did on ``target``.

    Args:
        launcher: Makes its tensors on device ``cuda`` and calls a launcher of an op file.
        target: Name in :data:`vitkernels.emulator.devices.DEVICES`.
        programs: How many programs of each launch run, the first and the last among them.
        seed: Of their order, and of that of their warps; None runs them in turn.
        fill: Gives a flat integer tensor its values, which are 0 otherwise; numbers are random where they are few.
        kind: How launches are emulated, if in a way of its own.
        **changes: Attributes of ``kind``.
    """
    generator = torch.Generator().manual_seed(0)

    def memory(t: torch.Tensor) -> None:
        if t.is_floating_point() and t.nbytes <= LARGEST_FILL:
            t.normal_(generator=generator)
        elif not t.is_floating_point() and fill is not None:
            fill(t)

    with (
        emulating(
            target, kind, programs=programs, seed=seed, runs=[], raises=False, memory=memory, **changes
        ) as emulation,
        on_fake_tensors(TARGETS[target]),
    ):
        launcher()
    return emulation.runs
