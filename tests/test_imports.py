"""What the commands import of other packages: beside a torchvision of another build, and where something is missing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# torchvision's binary cannot be loaded, as PyPI's where PyTorch is a CPU build. In a process of its own: here
# tests/conftest.py has seen to it.
UNFIT = """
import sys, torch
load = torch.ops.load_library
def load_library(path):
    if "torchvision" in str(path):
        raise OSError("libcudart.so: cannot open shared object file")
    return load(path)
torch.ops.load_library = load_library
"""


def in_a_process_of_its_own(code: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "arguments",
    [
        ("explain", "test_vit"),
        ("verify", "--cpu", "--only", "model/*/swapped", "--model", "mine:model"),
    ],
    ids=" ".join,
)
def test_commands_work_beside_a_torchvision_of_another_build(arguments, tmp_path):
    pytest.importorskip("timm")
    (tmp_path / "mine.py").write_text("import timm\ndef model(): return timm.create_model('test_vit')\n")
    code = f"import os; os.chdir({str(tmp_path)!r}); from vitkernels.cli import main; sys.exit(main({list(arguments)}))"
    done = in_a_process_of_its_own(UNFIT + code)
    assert done.returncode == 0, done.stderr
    assert "FusedBlock" in done.stdout or "Passed." in done.stdout


def test_transformers_works_beside_it_too(tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.ViTConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    code = f"from vitkernels.cli import main; sys.exit(main(['explain', {str(tmp_path)!r}]))"
    done = in_a_process_of_its_own(UNFIT + code)
    assert done.returncode == 0, done.stderr
    assert "LayerNorm" in done.stdout


def test_the_library_itself_neither_imports_torchvision_nor_defines_its_ops():
    pytest.importorskip("torchvision")
    parts = "swap, models, ops, layers, maps, precompile, console, cli, names, verify.model, verify.pytest_plugin"
    code = f"""
for part in {parts!r}.split(", "):
    __import__("vitkernels." + part)
import vitkernels
vitkernels.accelerate(torch.nn.LayerNorm(8))
assert "torchvision" not in sys.modules
assert not hasattr(torch.ops.torchvision, "nms")
"""
    done = in_a_process_of_its_own(UNFIT + code)
    assert done.returncode == 0, done.stderr


def test_advice_for_a_torchvision_that_cannot_be_imported_is_no_no_op(tmp_path):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('built for another Python')")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from vitkernels.cli import main; main(['explain', 'vit'])"
    )
    (said,) = in_a_process_of_its_own(code).stderr.splitlines()
    assert "built for another Python" in said and "--force-reinstall" in said
