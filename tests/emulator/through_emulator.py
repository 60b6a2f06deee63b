"""Launches of Triton kernels on CPU tensors, sent through the emulator."""

from __future__ import annotations

import contextlib
import dataclasses
import unittest.mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import jit
from triton.runtime.jit import JITFunction

from vitkernels.emulator.execute import Run, execute, random_programs


@dataclasses.dataclass
class Launch:
    """One launch as the emulator takes it."""

    text: str
    arguments: list
    grid: tuple[int, int, int]
    shared: int
    arch: int
    scratch: int = 0
    descriptors: list | None = None

    def run(self, text: str | None = None, **options) -> Run:
        """Run it again, with other PTX if given."""
        return execute(
            text or self.text,
            self.arguments,
            self.grid,
            shared=self.shared,
            arch=self.arch,
            scratch=self.scratch,
            descriptors=self.descriptors,
            **options,
        )


class Recorder:
    """Runs launches and keeps what they found.

    Args:
        arch: 80, 90 or 120.
        most: Programs of a launch that run; the others leave their outputs as they were.
        check_warp: As for ``execute``.
    """

    def __init__(self, arch: int, most: int | None = None, check_warp: bool = False, seed: int = 1):
        self.arch, self.most, self.check_warp, self.seed = arch, most, check_warp, seed
        self.runs: list[Run] = []
        self.launches: list[Launch] = []
        self._compiled: dict = {}

    def launch(self, fn: JITFunction, args, grid, kwargs) -> None:
        kwargs["debug"] = kwargs.get("debug", fn.debug) or triton.knobs.runtime.debug
        kwargs["instrumentation_mode"] = triton.knobs.compilation.instrumentation_mode
        device = triton.runtime.driver.active.get_current_device()
        _, key_cache, target, backend, binder = fn.device_caches[device]
        bound, specialization, options = binder(*args, **kwargs)
        key = (fn, jit.compute_cache_key(key_cache, specialization, options))
        if key not in self._compiled:
            opts, signature, constexprs, attrs = fn._pack_args(backend, kwargs, bound, specialization, options)
            source = fn.ASTSource(fn, signature, constexprs, attrs)
            kernel = fn.compile(source, target=target, options=opts.__dict__)
            self._compiled[key] = kernel.asm["ptx"], kernel.metadata, signature
        text, metadata, signature = self._compiled[key]
        if callable(grid):
            grid = grid(bound)
        grid = tuple(grid) + (1,) * (3 - len(grid))
        arguments = [bound[name] for name, ty in signature.items() if ty != "constexpr"]
        total = grid[0] * grid[1] * grid[2]
        launch = Launch(
            text, arguments, grid, metadata.shared, self.arch, metadata.global_scratch_size, metadata.tensordesc_meta
        )
        programs = random_programs(total, self.most or total, self.seed)
        self.seed += 1
        self.launches.append(launch)
        self.runs.append(launch.run(ctas=programs, order_seed=self.seed, check_warp=self.check_warp))

    def clean(self) -> None:
        """Assert that no run has errors."""
        for run in self.runs:
            assert not run.errors, "\n".join(map(str, run.errors))


@contextlib.contextmanager
def executing(arch: int, **options):
    """Within, launches of any Triton kernel run in the emulator for ``arch``; yields the :class:`Recorder`."""

    class Named:
        def get_current_target(self):
            return GPUTarget("cuda", arch, 32)

        def get_current_device(self):
            return f"emulator {arch}"

        def get_current_stream(self, device):
            return 0

    recorder = Recorder(arch, **options)
    config = triton.runtime.driver
    before = config._active
    config.set_active(Named())

    def run(self, *args, grid, warmup, **kwargs):
        recorder.launch(self, args, grid, kwargs)

    backend = type(triton.compiler.compiler.make_backend(GPUTarget("cuda", arch, 32)))
    try:
        with (
            unittest.mock.patch.object(JITFunction, "run", run),
            # ptxas is not needed, and slow
            unittest.mock.patch.object(backend, "make_cubin", return_value=b"none"),
        ):
            yield recorder
    finally:
        config._active = before


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
