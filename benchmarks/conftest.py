"""Settings for ``pytest benchmarks``: run in a single process, so that times are valid."""


def pytest_configure(config):
    # pytest-benchmark disables itself if xdist distributes the tests.
    config.option.dist = "no"


def pytest_xdist_auto_num_workers(config):
    return 0
