"""Set-up that must come before the first import of torchvision."""

import os
import tempfile

from vitkernels.tools.console import give_blas_one_thread, prepare_torchvision

give_blas_one_thread()  # else it takes every core in every worker of pytest-xdist

if capability := os.environ.get("ATEN_CPU_CAPABILITY"):
    # Inductor's cache on disk gives out code that was vectorised for another instruction set, which does not compile.
    cache = os.path.join(tempfile.gettempdir(), f"torchinductor_vitkernels_{os.getuid()}_{capability}")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", cache)

import torch  # noqa: E402

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["VITKERNELS_BACKEND"] = "emulated"
    torch.set_num_threads(1)

import pytest  # noqa: E402

prepare_torchvision()  # tests import timm themselves, on a CPU build of PyTorch too


def pytest_addoption(parser):
    parser.addoption("--mutant", help="run with this defect of vitkernels.tools.verify.mutants inside")


@pytest.fixture(scope="session", autouse=True)
def _seeded_defect(request):
    name = request.config.getoption("--mutant")
    if name is None:
        yield
        return
    from vitkernels.tools.verify.mutants import MUTANTS, MutantError, seeded_defect

    try:
        defect = next(m for m in MUTANTS if m.name == name)
        with seeded_defect(defect):
            yield
    except (StopIteration, MutantError) as error:
        pytest.exit(f"the mutant {name!r} cannot be made: {error}", returncode=3)


@pytest.fixture
def device() -> torch.device:
    """The device that kernels run on: the GPU, or the CPU that emulates one."""
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture(autouse=True)
def _fresh_randomness_and_poisoned_memory(request):
    """Seed by the test's name, and let ``torch.empty`` hand out NaN, so that an unwritten element shows."""
    import zlib

    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def lone_process_group(tmp_path):
    """torch.distributed over gloo, of this process alone.

    DistributedDataParallel must be gone before the group is: the last to hold it tears it down, and DDP's reducer does
    so with Python's lock held, which gloo's threads may be waiting for.
    """
    import gc

    dist = torch.distributed
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this build of PyTorch has no gloo")
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    gc.collect()
    dist.destroy_process_group()


@pytest.fixture
def computed_by_pytorch(monkeypatch):
    """Without a GPU, let the ops go their whole way, through autograd and dispatcher, to their references, not kernels.

    For what is around the kernels: nothing has to be compiled.
    """
    from vitkernels import runtime

    monkeypatch.setattr(runtime, "emulated_arch", lambda: None)


@pytest.fixture(autouse=True)
def _nothing_remembered():
    """A test that replaces what chooses a configuration must not meet the launches of the test before."""
    from vitkernels.ops import _plan

    _plan.forget()


@pytest.fixture
def without_plans(monkeypatch):
    """Let every call go through its launcher, which a test watches or replaces kernels of."""
    from vitkernels.ops._plan import Plans

    monkeypatch.setattr(Plans, "__call__", lambda self, device, *args: self._launcher(*args))


@pytest.fixture
def no_launch(monkeypatch):
    """Fail the test if a kernel is launched."""
    import triton

    def refuse(self, grid):
        raise AssertionError("a kernel was launched")

    monkeypatch.setattr(triton.JITFunction, "__getitem__", refuse)
