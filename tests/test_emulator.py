"""The tests of tests/emulator, in processes of their own: this one's kernels are interpreted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="nothing compiles without Triton")
FOLDER = Path(__file__).with_name("emulator")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("file", sorted(FOLDER.glob("test_*.py")), ids=lambda file: file.stem)
def test_in_a_process_of_its_own(file):
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "VITKERNELS_BACKEND")}
    environment |= {"PYTHONPATH": str(FOLDER.parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", f"--confcutdir={FOLDER}", str(file)]
    done = subprocess.run(command, cwd=FOLDER.parents[1], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2_000:]
    print(done.stdout[-2_000:])
