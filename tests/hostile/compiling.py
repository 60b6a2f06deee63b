"""What a process without the interpreter does when it compiles: run by test_hostile_running.py, a scenario a process.

    python compiling.py SCENARIO

The driver is a stand-in for a GPU that is not there: it takes binaries as a real one does, and refuses broken ones, but
runs nothing. Prints JSON.
"""

import json
import sys
import threading
import unittest.mock
import warnings
from pathlib import Path

import torch
import triton
from triton import knobs

from vitkernels.aot.build import TARGETS
from vitkernels.ops._registry import OPS
from vitkernels.ops.linear import activation_backward
from vitkernels.runtime import DeviceFacts


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
        activation_backward(dy, z, None, "silu", needs_dbias=False, needs_dgamma=False)


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

    from vitkernels.ops import _registry

    launch = _registry._on_its_device(launcher)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        launch(torch.zeros(1))
    return {"error": None, "warnings": [str(w.message) for w in caught], "caches": calls}


if __name__ == "__main__":
    assert OPS, "the ops are registered"
    stand_in = Driver("sm_90")
    triton.runtime.driver.set_active(stand_in)
    found = globals()[sys.argv[1]](stand_in)
    print(json.dumps({**found, "loaded": stand_in.loaded, "launched": stand_in.launched}))
