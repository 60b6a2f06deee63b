"""What more than one module of hostile inputs needs of pytest."""

import pytest
import triton
from op_calls import HAS_GPU


@pytest.fixture
def instead_of_launches(monkeypatch):
    """A function: from its call on, ``note(kernel's name, grid, args, kwargs)`` is called in the place of launches."""

    def put(note):
        def getitem(self, grid):
            return lambda *args, **kwargs: note(self.fn.__name__, grid, args, kwargs)

        kind = triton.JITFunction
        if not HAS_GPU:
            from triton.runtime.interpreter import InterpretedFunction as kind
        monkeypatch.setattr(kind, "__getitem__", getitem)

    return put


@pytest.fixture
def record_launches(instead_of_launches):
    """Launch nothing, and list ``(kernel's name, grid)`` instead."""
    launches = []
    instead_of_launches(lambda name, grid, args, kwargs: launches.append((name, grid)))
    return launches
