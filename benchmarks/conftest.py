"""What ``pytest benchmarks`` needs: one process, for times, and the kernels' own way where there is no GPU."""


def pytest_configure(config):
    # pytest-benchmark times nothing while tests are spread over processes.
    config.option.dist = "no"


def pytest_xdist_auto_num_workers(config):
    return 0
