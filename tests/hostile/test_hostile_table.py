"""docs/hostile-inputs.md is what the tests of this folder make of it, and leaves no number out."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
sys.path[:0] = ["docs"]
import make_hostile_inputs
sys.stdout.buffer.write(make_hostile_inputs.page().encode())
"""


def test_the_page_is_made_of_the_tests():
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    committed = (ROOT / "docs" / "hostile-inputs.md").read_text(encoding="utf-8")
    assert done.stdout.decode() == committed, "run python docs/make_hostile_inputs.py"


def test_every_number_is_there():
    committed = (ROOT / "docs" / "hostile-inputs.md").read_text(encoding="utf-8")
    assert [int(n) for n in re.findall(r"^\| (\d+) \|", committed, re.MULTILINE)] == [*range(1, 57)]
