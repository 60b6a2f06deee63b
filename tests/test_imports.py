"""What the commands import of other packages: beside a torchvision of another build, and where something is missing."""

import os
import re
import runpy
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
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
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
    code = (
        f"import os; os.chdir({str(tmp_path)!r}); from vitkernels.tools.cli import main; "
        f"sys.exit(main({list(arguments)}))"
    )
    done = in_a_process_of_its_own(UNFIT + code)
    assert done.returncode == 0, done.stderr
    assert "FusedBlock" in done.stdout or "Passed." in done.stdout


def test_transformers_works_beside_it_too(tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.ViTConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    code = f"from vitkernels.tools.cli import main; sys.exit(main(['explain', {str(tmp_path)!r}]))"
    done = in_a_process_of_its_own(UNFIT + code)
    assert done.returncode == 0, done.stderr
    assert "LayerNorm" in done.stdout


def test_the_library_itself_neither_imports_torchvision_nor_defines_its_ops():
    pytest.importorskip("torchvision")
    parts = "swap, models, ops, layers, maps, _warmup, tools.console, tools.cli, tools.names, tools.verify.model"
    parts += ", tools.verify.pytest_plugin"
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
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); "
    code += "from vitkernels.tools.cli import main; main(['explain', 'vit'])"
    (said,) = in_a_process_of_its_own(code).stderr.splitlines()
    assert "built for another Python" in said and "--force-reinstall" in said


# Of what the extras bring, nothing can be imported but what is in KEPT.
BARE = """
import importlib.util, sys
EXTRAS = {"numpy", "triton", "timm", "torchvision", "transformers", "safetensors", "matplotlib", "PIL", "sklearn"}
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in EXTRAS - set(KEPT):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name in EXTRAS - set(KEPT) else find_spec(name, *more)
def run(main, *argv):
    print(main(argv), file=sys.stderr)
from vitkernels.tools.cli import main
"""


def told(kept, *commands) -> list[str]:
    """Run commands where of what the extras bring there is ``kept`` alone, and return each one's last line."""
    code = f"KEPT = {kept!r}\n" + BARE + "\n".join(commands)
    done = in_a_process_of_its_own(code)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    lines = done.stderr.splitlines()
    ends = [i for i, line in enumerate(lines) if line == "2"]
    assert len(ends) == len([command for command in commands if command.startswith("run(")]), done.stderr
    return [lines[i - 1] for i in ends]


def test_each_command_names_what_is_not_installed_and_the_extra_that_brings_it(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    lines = told(
        (),
        "run(main, 'demo')",
        "run(main, 'classify', 'image.png', '--model', 'test_vit')",
        "run(main, 'explain', 'test_vit')",
        f"run(main, 'explain', {str(tmp_path)!r})",
        "run(main, 'verify', '--cpu')",
        "run(main, 'inspect')",
        "from benchmarks.__main__ import main as benchmarks",
        f"run(benchmarks, '--out', {str(tmp_path)!r})",
    )
    missing = [
        ("vitkernels: demo needs matplotlib", "matplotlib", "demo"),
        ("vitkernels: classify needs matplotlib", "matplotlib", "demo,timm"),
        ("vitkernels: timm", "timm", "timm"),
        ("vitkernels: transformers", "transformers", "hf"),
        ("vitkernels: nothing to verify: Triton", "triton", "triton"),
        ("vitkernels: inspect compiles with Triton", "triton", "triton"),
        ("benchmarks: a benchmark needs matplotlib", "matplotlib", "bench"),
    ]
    for line, (start, package, extra) in zip(lines, missing, strict=True):
        assert line.startswith(start)
        assert line.endswith(f"pip install {package}, or install vitkernels with its extra [{extra}]")


def test_numpy_is_named_where_it_alone_is_missing():
    everything = ("triton", "timm", "torchvision", "transformers", "safetensors", "matplotlib", "PIL", "sklearn")
    for line in told(everything, "run(main, 'verify', '--cpu')", "run(main, 'demo')"):
        assert "No module named 'numpy'" in line and "pip install numpy" in line


@pytest.mark.parametrize(
    ("extra", "needed"),
    [
        ("triton", "triton numpy"),
        ("timm", "timm torchvision"),
        ("hf", "transformers safetensors"),
        ("demo", "triton numpy matplotlib pillow safetensors scikit-learn"),
        ("bench", "triton numpy timm torchvision matplotlib"),
    ],
)
def test_each_extra_brings_what_its_commands_import(extra, needed, monkeypatch):
    setuptools = pytest.importorskip("setuptools")
    given = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    runpy.run_path(str(ROOT / "setup.py"))
    brought = {re.match(r"[\w.-]+", requirement)[0] for requirement in given["extras_require"][extra]}
    assert set(needed.split()) <= brought
