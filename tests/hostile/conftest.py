"""What more than one module of hostile inputs needs of pytest."""

import pytest
import triton


@pytest.fixture
def instead_of_launches(monkeypatch, without_plans):
    """A function: from its call on, ``note(kernel's name, grid, args, kwargs)`` is called in the place of launches."""

    def put(note):
        def getitem(self, grid):
            return lambda *args, **kwargs: note(self.fn.__name__, grid, args, kwargs)

        monkeypatch.setattr(triton.JITFunction, "__getitem__", getitem)

    return put


@pytest.fixture
def record_launches(instead_of_launches):
    """Launch nothing, and list ``(kernel's name, grid)`` instead."""
    launches = []
    instead_of_launches(lambda name, grid, args, kwargs: launches.append((name, grid)))
    return launches
