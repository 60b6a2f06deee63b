"""How much is fuzzed: a fixed budget, or minutes."""

from pathlib import Path

import hypothesis
import pytest
from hypothesis.configuration import set_hypothesis_home_dir


def pytest_addoption(parser):
    parser.addoption(
        "--fuzz-minutes",
        type=float,
        default=0.0,
        metavar="M",
        help="fuzz each op for M minutes on fresh random calls, instead of a few calls that are always the same",
    )


def pytest_configure(config):
    # What Hypothesis keeps lies beside pytest's own cache, not in the checkout.
    home = Path(config.cache.mkdir("hypothesis")) if hasattr(config, "cache") else None
    set_hypothesis_home_dir(home)
    common = {
        "deadline": None,  # a kernel may have to be compiled
        "database": None,
        "suppress_health_check": list(hypothesis.HealthCheck),
        "phases": (hypothesis.Phase.generate, hypothesis.Phase.shrink),
    }
    hypothesis.settings.register_profile("ci", derandomize=True, max_examples=15, **common)
    hypothesis.settings.register_profile("endless", max_examples=200, print_blob=True, **common)
    hypothesis.settings.load_profile("endless" if config.getoption("--fuzz-minutes", 0.0) else "ci")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--fuzz-minutes", 0.0):
        for item in items:
            item.add_marker(pytest.mark.timeout(0))
