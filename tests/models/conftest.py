"""What the tests of the models share."""

import pytest

import vitkernels


@pytest.fixture
def plain_pytorch():
    """What is under test is the model, not the kernels; the tests that want those say so."""
    with vitkernels.use_backend("torch"):
        yield
