"""What the processes run that the tests of the training examples start: forked from one that has imported it all."""

import contextlib
import os
import signal
import sys
from pathlib import Path

from vitkernels.tools.console import import_timm

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import common
import finetune
import hydra
import image_data  # noqa: F401  for tests
import mae
import naflex
import pretrain
import torch

import_timm()
with contextlib.suppress(ImportError):
    import peft  # noqa: F401  for --lora, once for all processes
torch.set_num_threads(1)  # how many threads share a sum changes its bits
PROGRAMS = {"pretrain": pretrain, "finetune": finetune, "naflex": naflex, "hydra": hydra, "mae": mae}


def run(program: str, arguments: list[str]) -> None:
    """Run an example as in a process of its own, on the backend that users have."""
    os.environ.pop("VITKERNELS_BACKEND", None)
    PROGRAMS[program].main(arguments)


def run_until_killed(program: str, arguments: list[str], where: str, count: int) -> None:
    """Run an example; as it comes to ``where`` for the ``count``-th time, the process kills itself.

    Args:
        program: The example.
        arguments: Its command line.
        where: ``"forward"``, or ``"save"``, when a checkpoint is written but not yet in its place.
        count: From 1.
    """
    module, name = {"forward": (common, "normalized"), "save": (common.dcp, "save")}[where]
    original, calls = getattr(module, name), []

    def killing(*args, **kwargs):
        result = original(*args, **kwargs)
        calls.append(1)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(module, name, killing)
    run(program, arguments)
