"""Run an op's launches at the sizes of a real model, in part, on an emulated GPU.

The tensors are fake: they have no memory, and PyTorch's ops between the kernels compute nothing. Each launch gets
memory of its own in the layout of its arguments, and runs a few programs of its grid, with the configuration, code and
addresses of the whole launch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from vitkernels.emulator.execute import Run
from vitkernels.emulator.launch import Emulation, emulating
from vitkernels.tools.aot.build import TARGETS, on_fake_tensors

LARGEST_FILL = 1 << 22  # bytes; filling a larger tensor takes too long, so it stays zero


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
    """Call ``launcher()`` on fake CUDA tensors, and return each launch's run on ``target``.

    Args:
        launcher: Creates tensors on device ``cuda`` and calls a launcher of an op file.
        target: Name in :data:`vitkernels.emulator.devices.DEVICES`.
        programs: How many programs of each launch run, the first and the last among them.
        seed: Seed of the order of programs and warps; None runs them in turn.
        fill: Fills a flat integer or bool tensor, whose values are 0 otherwise. Floating-point tensors of up to
            :data:`LARGEST_FILL` bytes are random.
        kind: Class of emulation, if not the default.
        **changes: Attributes of ``kind``.
    """
    generator = torch.Generator().manual_seed(0)

    def memory(t: torch.Tensor) -> None:
        if t.is_floating_point() and t.nbytes <= LARGEST_FILL:
            if t.itemsize > 1:
                t.normal_(generator=generator)
            else:  # PyTorch draws nothing in e4m3
                t.copy_(torch.randn(t.shape, generator=generator))
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
