"""Triton, or a stand-in for it that lets the op files be imported without Triton."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator

import torch

from vitkernels import runtime

try:
    import triton as _triton
    import triton.language as tl

    if _triton.knobs.runtime.interpret:  # in this mode Triton cannot compile its own functions
        raise ImportError("TRITON_INTERPRET is set, and these kernels are compiled: unset it")
except ImportError as error:
    MISSING: ImportError | None = error.with_traceback(None)
else:
    MISSING = None

try:  # Triton calls this experimental: a later release may move it, and only the kernels for Hopper need it
    from triton.experimental import gluon as _gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia import hopper
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
except ImportError as error:
    GLUON_MISSING: ImportError | None = error.with_traceback(None)
else:
    GLUON_MISSING = None


class _Missing:
    """Stand-in for Triton's decorators and types; a launch, which ``uses_kernels`` should prevent, raises an error."""

    def jit(self, fn=None, **options):
        return fn or self.jit

    def constexpr(self, value):
        return value

    def __getattr__(self, name: str):
        raise RuntimeError(f"a vitkernels kernel was launched, but Triton cannot be used: {MISSING}")


_COMPILE_LOCK = threading.RLock()
_watchers = threading.local()


@contextlib.contextmanager
def watching(seen: Callable) -> Iterator[None]:
    """Within a ``with`` block, call ``seen(kernel, compiled, grid, arguments)`` after each launch by this thread.

    ``compiled`` is Triton's ``CompiledKernel``, or None if nothing was launched; ``arguments`` is a dict by name.
    """
    before = getattr(_watchers, "seen", None)
    _watchers.seen = seen
    try:
        yield
    finally:
        _watchers.seen = before


def launches_are_hooked() -> bool:
    """Tell whether Triton has launch hooks, as its profiler sets them."""
    hooks = _triton.knobs.runtime
    return bool(hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls)


def current_stream(device: int | str) -> int:
    """Return the handle of the stream that the JIT would launch on; ``device`` is a GPU's index."""
    return _triton.runtime.driver.active.get_current_stream(device)


if MISSING is None:

    class _Source:
        """A kernel's source; ``compiled`` tells whether Triton compiled it (True) or found it in the cache (False)."""

        compiled = False

        def make_ir(self, *args, **kwargs):
            self.compiled = True
            return super().make_ir(*args, **kwargs)

    @functools.cache
    def _with(checks: type, kind: type) -> type:
        """Return ``kind``, Triton's or Gluon's class of a kernel or a source, with ``checks`` before it."""
        return kind if issubclass(kind, checks) else type(checks.__name__, (checks, kind), {})

    class _Kernel:
        """A kernel with checks around compilation and disk cache; launches of loaded kernels are unchanged."""

        def run(self, *args, grid, warmup, **kwargs):
            compiled = super().run(*args, grid=grid, warmup=warmup, **kwargs)
            if (seen := getattr(_watchers, "seen", None)) is not None:
                seen(self, None if warmup else compiled, grid, kwargs)
            return compiled

        def _do_compile(self, key, signature, device, *args, **kwargs):
            # Without the lock, two threads would compile the same kernel, and Python's parser sometimes fails when two
            # threads use it at once (SystemError: AST constructor recursion depth mismatch).
            with _COMPILE_LOCK:
                return self.device_caches[device][0].get(key) or self._compile_alone(
                    key, signature, device, *args, **kwargs
                )

        def _compile_alone(self, *args, **kwargs):
            # Loading a kernel would break the capture, on ROCm silently.
            if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    f"{self.fn.__name__} is launched for the first time, with these dtypes and sizes, while a CUDA "
                    "graph is captured; expected it to be compiled before: run the same once, or call "
                    "vitkernels.warmup(model, input_shape), and then capture"
                )
            self.ASTSource = _with(_Source, self.ASTSource)
            kernel = None
            compile_ = super()._do_compile
            try:
                kernel = compile_(*args, **kwargs)
                if kernel is not None and not kwargs.get("warmup", args[-1]):
                    _ = kernel.run  # loads the binary early, to catch a broken one here
            except Exception as error:
                broken = kernel is not None and isinstance(error, RuntimeError) and not kernel.src.compiled
                if not broken and not is_of_the_cache(error):
                    raise
                with another_cache(error):
                    return compile_(*args, **kwargs)
            return kernel

    class _Decorators:
        """The object that op files import as ``triton``, or as ``gluon``."""

        def __init__(self, language):
            self._language = language

        def jit(self, fn=None, *, do_not_specialize=()):
            if fn is None:
                return functools.partial(self.jit, do_not_specialize=do_not_specialize)
            kernel = self._language.jit(fn, do_not_specialize=do_not_specialize)
            kernel.__class__ = _with(_Kernel, type(kernel))
            return kernel

    triton = _Decorators(_triton)
else:
    triton = tl = _Missing()

HAS_TRITON = MISSING is None
# Some tiles that 3.7 and later keep in registers spill there: configurations ask for it.
BEFORE_3_7 = HAS_TRITON and tuple(map(int, _triton.__version__.split(".")[:2])) < (3, 7)
HAS_GLUON = HAS_TRITON and GLUON_MISSING is None

if HAS_GLUON:
    gluon = _Decorators(_gluon)
else:
    gluon = gl = hopper = _Missing()

    class TensorDescriptor:
        """Stand-in for Gluon's."""


def warn_without_gluon(device: torch.device) -> None:
    """Warn once if kernels in Gluon would run on ``device``, and Gluon cannot be imported."""
    if GLUON_MISSING is not None and runtime.device_facts(device).arch == "sm_90":
        _warn_without_gluon()


@functools.cache
def _warn_without_gluon() -> None:
    warnings.warn(
        f"Gluon of triton {_triton.__version__} cannot be imported ({GLUON_MISSING}): on this GPU, sm_90, large "
        "products and attention over long rows in 16 bits run the kernels for other GPUs instead of Hopper's. Install "
        "a version of Triton that has triton.experimental.gluon, as 3.6 and 3.7 do",
        RuntimeWarning,
        stacklevel=2,
    )


def at_another(descriptor: TensorDescriptor) -> Callable[[torch.Tensor], TensorDescriptor]:
    """Return a function that makes a copy of ``descriptor`` for another tensor of the same layout.

    It takes a quarter of the time of the constructor, which checks what the caller knows.
    """
    kind, fields = type(descriptor), vars(descriptor) | {"base": None}

    def made(base: torch.Tensor) -> TensorDescriptor:
        copy = kind.__new__(kind)
        copy.__dict__.update(fields, base=base)
        return copy

    return made


_CACHE_LOCK = threading.RLock()  # all threads share the setting of the cache directory


@functools.cache
def _own_cache() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="vitkernels-triton-")


def is_of_the_cache(error: Exception) -> bool:
    """Tell whether reading or writing Triton's cache raised ``error``, rather than compiling a program."""
    if isinstance(error, OSError):
        if error.filename is None:  # e.g. a full disk
            return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO)
        return os.fsdecode(error.filename).startswith(os.fspath(_triton.knobs.cache.dir))
    # Only these two places parse cache files; Triton 3.6 itself does not handle a broken index.
    entry = _triton.compiler.CompiledKernel.__init__.__code__
    index = "triton.runtime.cache"
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(frame.f_code is entry or frame.f_globals.get("__name__") == index for frame in frames)


@contextlib.contextmanager
def another_cache(error: Exception) -> Iterator[None]:
    """Within a ``with`` block, give Triton a temporary cache; then warn that ``error`` made its own cache unusable."""
    knobs = _triton.knobs.cache
    given = knobs.dir
    with _CACHE_LOCK, knobs.scope():
        knobs.dir = _own_cache().name
        yield
    warnings.warn(
        f"Triton's cache at {given} cannot be read or written ({type(error).__name__}: {error}); this process compiles "
        "its kernels anew. Make the directory writable, empty it, or name another one in TRITON_CACHE_DIR",
        RuntimeWarning,
        stacklevel=2,
    )


@contextlib.contextmanager
def compilations() -> Iterator[list[tuple[str, float, bool]]]:
    """List the kernels that any thread compiles or loads within a ``with`` block.

    Each is a tuple of name, seconds, and whether Triton found it in the cache on disk.
    """
    found: list[tuple[str, float, bool]] = []
    if not HAS_TRITON:
        yield found
        return
    knobs = _triton.knobs.compilation
    before = knobs.listener

    def listen(*, metadata, times, cache_hit, **others):
        found.append((metadata["name"], times.total / 1e6, cache_hit))
        if before is not None:
            before(metadata=metadata, times=times, cache_hit=cache_hit, **others)

    knobs.listener = listen
    try:
        yield found
    finally:
        knobs.listener = before
