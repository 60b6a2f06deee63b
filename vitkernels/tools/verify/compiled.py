"""Check the compiled kernels: run ``vitkernels inspect`` in a separate process."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from collections.abc import Iterator, Sequence

from vitkernels.tools.verify.results import Result

COMMAND = "import sys; from vitkernels.tools.cli import main; sys.exit(main(sys.argv[1:]))"


def check_compiled(id: str, target: str, cases: Sequence[str] = ()) -> Iterator[Result]:
    """Compile every kernel for ``target``, at ``cases`` (none for all), and check it against the contract."""
    arguments = ["inspect", "--target", target, *(word for case in cases for word in ("--case", case))]
    # A worker has a core to itself: more processes than that would only import PyTorch once more each.
    jobs = ["--jobs", "1"] if multiprocessing.parent_process() is not None else []
    run = subprocess.run(
        [sys.executable, "-c", COMMAND, *arguments, *jobs],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    broken = [line.removeprefix("Broken: ") for line in run.stdout.splitlines() if line.startswith("Broken: ")]
    name = f"{target}: no spills, no atomics, registers and shared memory as contracted"
    if run.returncode == 0:
        yield Result(id, name, "passed", f"vitkernels {' '.join(arguments)}")
    elif broken:
        yield Result(id, name, "failed", "; ".join(broken))
    else:
        said = (run.stderr.strip() or run.stdout.strip()).splitlines()
        yield Result(id, name, "broken", said[-1] if said else f"the compiler's process ended with {run.returncode}")
