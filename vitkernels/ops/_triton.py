"""Triton, or a stand-in with which the op files still import where Triton is missing.

``INTERPRETED`` tells whether the kernels of this process run in Triton's interpreter. It is read off a
kernel's type, because ``TRITON_INTERPRET`` is fixed when a kernel is decorated and says nothing later.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

try:
    import triton
    import triton.language as tl
except ImportError as error:
    triton = tl = None
    MISSING: str | None = str(error)
else:
    MISSING = None


class _Missing:
    """Decorates and annotates like Triton; a launch, which the backend choice rules out, says what is missing."""

    def jit(self, fn):
        return fn

    def constexpr(self, value):
        return value

    def __getattr__(self, name: str):
        raise RuntimeError(f"a vitkernels kernel was launched, but Triton cannot be imported: {MISSING}")


if MISSING is None:

    @triton.jit
    def _probe():
        pass

    INTERPRETED = not isinstance(_probe, triton.JITFunction)
else:
    triton = tl = _Missing()
    INTERPRETED = False

HAS_TRITON = MISSING is None


@contextlib.contextmanager
def compilations() -> Iterator[list[tuple[str, float, bool]]]:
    """List what Triton compiles meanwhile, in any thread: name, seconds, and whether it lay in the cache on disk."""
    found: list[tuple[str, float, bool]] = []
    if not HAS_TRITON:
        yield found
        return
    knobs = triton.knobs.compilation
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
