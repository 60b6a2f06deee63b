"""How the tests of the training examples run them: here, in a process that can be killed, or in two under torchrun."""

import contextlib
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
import training_workers as workers
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

# A model that is done in seconds.
TINY = ["--model-kwargs", "patch_size=4", "embed_dim=32", "depth=2", "num_heads=2", "mlp_ratio=2.0"]


def command(data, out: Path, *more: str) -> list[str]:
    """Return the options of a small run; of options given twice, the last counts."""
    given = ["--data", data, "--out", out, "--img-size", 8, "--batch-size", 16, "--micro-batch", 3, "--warm-up", 2]
    # Also on a GPU, where bf16 would be the default: its rounding depends on how the work is shared.
    return [*map(str, given), "--checkpoint-every", "3", "--workers", "0", "--no-flip", "--dtype", "fp32", *more]


def here(program: str, arguments: list[str]) -> None:
    """Run an example in this process, on the backend that users have."""
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("VITKERNELS_BACKEND", raising=False)
            workers.PROGRAMS[program].main(arguments)
    finally:
        if torch.distributed.is_initialized():  # an example that fails leaves it to the end of the process
            torch.distributed.destroy_process_group()


def complaint(program: str, arguments: list[str]) -> str:
    """Run an example that cannot go on, and return the one line that it exits with."""
    with pytest.raises(SystemExit) as stopped:
        here(program, arguments)
    said = stopped.value.code
    assert isinstance(said, str) and said.startswith(f"{program}: ") and "\n" not in said  # Python prints it, status 1
    return said


@contextlib.contextmanager
def preloaded():
    """Let processes be forked from one that has imported the examples, unless there is such a one already."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        multiprocessing.get_context("forkserver").set_forkserver_preload([workers.__name__])
        yield


def in_two_processes(program: str, arguments: list[str]) -> None:
    """Run an example as torchrun does."""
    if torch.cuda.device_count() == 1:
        pytest.skip("two processes need a GPU each")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        run_id="test",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        start_method="forkserver",
        max_restarts=0,
        monitor_interval=0.05,
    )
    with preloaded():
        elastic_launch(config, workers.run)(program, arguments)


def killed(program: str, arguments: list[str], where: str, count: int) -> None:
    """Run an example in a process that is killed, as :func:`training_workers.run_until_killed` says."""
    with preloaded():
        process = multiprocessing.get_context("forkserver").Process(
            target=workers.run_until_killed, args=(program, arguments, where, count)
        )
        process.start()
        process.join(120)
    assert process.exitcode == -signal.SIGKILL


def curve(out: Path) -> torch.Tensor:
    """Return what ``log.csv`` in ``out`` holds but the speed: a row of step, loss, rate and norm for each step."""
    rows = (out / "log.csv").read_text().splitlines()[1:]
    return torch.tensor([[float(value) for value in row.split(",")[:4]] for row in rows], dtype=torch.float64)


def weights(out: Path) -> bytes:
    """Return the trained weights as they lie on the disk."""
    return (out / "model.safetensors").read_bytes()


def same_curve(out: Path, reference: Path) -> None:
    """Check that two runs had the same losses and gradients to fp32's rounding, and not because nothing happened."""
    got, wanted = curve(out), curve(reference)
    torch.testing.assert_close(got.float(), wanted.float())
    assert (wanted[1:, 1] - wanted[:-1, 1]).abs().min() > 1e-4, "steps differ by more than rounding"


def resumes(program: str, arguments: list[str], out: Path, reference: Path, left: str, count: int) -> None:
    """Check that a run killed in its ``count``-th forward, with the checkpoint ``left``, goes on by the same command
    and ends as ``reference``, which nothing interrupted: with the same bytes and the same log."""
    killed(program, arguments, "forward", count)
    assert [path.name for path in out.glob("*step-*")] == [left]
    here(program, arguments)
    assert weights(out) == weights(reference)
    assert torch.equal(curve(out), curve(reference))
