"""Launches of Triton kernels on CPU tensors, recorded so that they can be run again."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

from vitkernels.emulator.execute import Run, execute
from vitkernels.emulator.launch import Emulation, emulating


@dataclasses.dataclass
class Launch:
    """One launch as the emulator takes it."""

    text: str
    arguments: list
    grid: tuple[int, int, int]
    shared: int
    arch: int
    options: dict

    def run(self, text: str | None = None, **options) -> Run:
        """Run it again, with other PTX if given."""
        return execute(
            text or self.text, self.arguments, self.grid, shared=self.shared, arch=self.arch, **self.options, **options
        )


@dataclasses.dataclass
class Recorder(Emulation):
    """Runs launches, and keeps them and what they found.

    Attributes:
        launches: Every launch.
    """

    launches: list[Launch] = dataclasses.field(default_factory=list)

    def launch(self, kernel, arguments, grid, **options) -> None:
        arch = self.device.capability
        self.launches.append(Launch(kernel.ptx, arguments, grid, kernel.shared, arch, options))
        super().launch(kernel, arguments, grid, **options)

    def clean(self) -> None:
        """Assert that no run has errors."""
        for run in self.runs:
            assert not run.errors, "\n".join(map(str, run.errors))


@contextlib.contextmanager
def executing(arch: int) -> Iterator[Recorder]:
    """Within, launches run in the emulator for ``arch``, programs and warps in a random order."""
    with emulating(f"sm_{arch}", Recorder, seed=1, runs=[], raises=False) as recorder:
        yield recorder


def recorded(kernel, arch: int, grid, *args, **kwargs) -> Launch:
    """A kernel's launch, which ran without a finding."""
    with executing(arch) as recorder:
        kernel[grid](*args, **kwargs)
    recorder.clean()
    return recorder.launches[0]


def kinds(launch: Launch, text: str, **options) -> set:
    """What the launch finds with changed PTX."""
    assert text != launch.text, "nothing was changed"
    return {f.kind for f in launch.run(text, **options).findings}
