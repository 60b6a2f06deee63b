"""What a process does when it compiles: run by test_hostile_running.py, a scenario a process.

Reads ``[SCENARIO, CACHE]`` by the line, and forks, as the imports take longer than a scenario. The driver is a stand-in
for a GPU that is not there: it takes binaries as a real one does, and refuses broken ones, but runs nothing. Prints
JSON.
"""

import json
import os
import sys
import threading
import traceback
import unittest.mock
import warnings
from pathlib import Path

import torch
import triton
from triton import knobs

from vitkernels.ops._linear import _activation_bwd_kernel, activation_backward
from vitkernels.ops._registry import OPS
from vitkernels.runtime import DeviceFacts
from vitkernels.tools.aot.build import TARGETS


class Driver:
    """As much of Triton's driver as a launch asks of one."""

    def __init__(self, target: str):
        self.target = TARGETS[target].triton
        self.loaded, self.launched = [], []
        self.utils = self

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_device_properties(self, device):
        return {"max_shared_mem": 1 << 18}

    def load_binary(self, name, binary, shared, device):
        if binary[:4] != b"\x7fELF":
            raise RuntimeError("Triton Error [CUDA]: device kernel image is invalid")
        self.loaded.append(name)
        return 0, 0, 32, 0, 1024

    def unload_module(self, module):
        pass

    def launcher_cls(self, src, metadata):
        return lambda *args: self.launched.append(metadata.name)


def launch():
    """Launch one small kernel: what its tensors hold does not matter, as nothing runs."""
    dy, z = torch.zeros(4, 32), torch.zeros(4, 32)
    with unittest.mock.patch("vitkernels.runtime.device_facts", return_value=DeviceFacts("a", "sm_90", 4, 1 << 17)):
        activation_backward(dy, z, None, "silu", needed=(False, False), dtypes=(dy.dtype, dy.dtype))


def attempt() -> dict:
    """Launch, and tell what came of it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            launch()
            error = None
        except Exception as e:
            error = f"{type(e).__name__}: {e}"
    return {"error": error, "warnings": [str(w.message) for w in caught]}


def capture(driver) -> dict:
    def capturing():
        return unittest.mock.patch.multiple(
            torch.cuda, is_initialized=lambda: True, is_current_stream_capturing=lambda: True
        )

    with capturing():
        cold = attempt()
    eager = attempt()
    with capturing():
        warm = attempt()
    return {"cold": cold, "eager": eager, "warm": warm}


def threads(driver) -> dict:
    start, results = threading.Barrier(8), []

    def work():
        start.wait()
        results.append(attempt()["error"])

    workers = [threading.Thread(target=work) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    entries = [p for p in Path(knobs.cache.dir).iterdir() if any(p.glob("*.cubin"))]
    return {"errors": results, "entries": len(entries)}


def once(driver) -> dict:
    """Whatever the cache is."""
    return attempt()


def no_driver(driver) -> dict:
    """The first launch of a process: Triton's driver cannot be written into the cache either."""
    calls = []

    def launcher(x):
        calls.append(knobs.cache.dir)
        if len(calls) == 1:
            raise PermissionError(13, "Permission denied", knobs.cache.dir)
        return x.clone()

    from vitkernels.ops import _plan, _registry

    launch = _registry._on_its_device(_plan.Plans(launcher))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        launch(torch.zeros(1))
    return {"error": None, "warnings": [str(w.message) for w in caught], "caches": calls}


def failing(driver) -> dict:
    """Errors that are not the cache's, each at another place of a first launch: how often the kernel was compiled."""
    from triton.compiler import ASTSource
    from triton.runtime.cache import FileCacheManager

    compile_ir, put, found = ASTSource.make_ir, FileCacheManager.put, []

    def raising(error):
        def instead(*args, **kwargs):
            raise error

        return instead

    def once_compiled(*args, **kwargs):
        found[-1]["compiled"] += 1
        return compile_ir(*args, **kwargs)

    def refused(self, data, filename, *args, **kwargs):
        if filename.endswith(".cubin"):
            raise FileNotFoundError(2, "No such file or directory", "ptxas")
        return put(self, data, filename, *args, **kwargs)

    places = {
        "RuntimeError": (driver, "load_binary", raising(RuntimeError("Triton Error [CUDA]: no kernel image"))),
        "FileNotFoundError": (FileCacheManager, "put", refused),
        "KeyError": (driver, "launcher_cls", raising(KeyError("launcher"))),
    }
    for name, (owner, attribute, instead) in places.items():
        found.append({"wanted": name, "compiled": 0})
        _activation_bwd_kernel.device_caches.clear()
        with (
            unittest.mock.patch.object(ASTSource, "make_ir", once_compiled),
            unittest.mock.patch.object(owner, attribute, instead),
            unittest.mock.patch("triton.knobs.compilation.always_compile", True),
        ):
            found[-1] |= attempt()
    for error in (RuntimeError("PassManager::run failed"), ValueError("a"), KeyError("b"), OSError("c")):
        found.append({"wanted": type(error).__name__, "compiled": 0})
        _activation_bwd_kernel.device_caches.clear()

        def broken(*args, error=error, **kwargs):
            found[-1]["compiled"] += 1
            raise error

        with (
            unittest.mock.patch.object(ASTSource, "make_ir", broken),
            unittest.mock.patch("triton.knobs.compilation.always_compile", True),
        ):
            found[-1] |= attempt()
    return {"attempts": found}


def run(scenario: str, cache: str) -> dict:
    os.environ["TRITON_CACHE_DIR"] = cache
    stand_in = Driver("sm_90")
    triton.runtime.driver.set_active(stand_in)
    try:
        found = globals()[scenario](stand_in)
    except Exception:
        return {"raised": traceback.format_exc()}
    return {**found, "loaded": stand_in.loaded, "launched": stand_in.launched}


if __name__ == "__main__":
    assert OPS, "the ops are registered"
    for line in sys.stdin:
        if os.fork() == 0:
            print(json.dumps(run(*json.loads(line))), flush=True)
            os._exit(0)
        os.wait()
