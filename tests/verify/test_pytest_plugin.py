"""The pytest plugin, in test runs of its own: it passes, fails and skips as it should, and costs nothing unused."""

import importlib
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

pytest.importorskip("timm")

# A test run in this process forgets what it is the first to import, and an op can be registered once.
for module in (
    *("emulator.launch", "swap.timm", "swap.torch_nn"),
    *("tools.demo.measure", "tools.verify.model", "tools.verify.mutants"),
):
    importlib.import_module(f"vitkernels.{module}")

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parents[2]
# As pytest looks for them: of several distributions of one name metadata.entry_points() takes the first alone.
INSTALLED = any(
    point.value == "vitkernels.tools.verify.pytest_plugin"
    for dist in metadata.distributions()
    for point in dist.entry_points
)
PLUGIN = () if INSTALLED else ("-p", "vitkernels.tools.verify.pytest_plugin")
HEAD = """
    import pytest
    import timm
    import torch

    def vit():
        return timm.models.VisionTransformer(
            img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=5
        )
"""
AGREES = """
    def test_kernels_agree(vitkernels_verify):
        report = vitkernels_verify(vit(), torch.randn(1, 3, 16, 16), steps=2)
        assert any(s.was == "Block" for s in report.swapped)
"""
NOTHING_SWAPPED = """
    def test_nothing_swapped(vitkernels_verify):
        vitkernels_verify(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 4)), torch.randn(1, 3, 16, 16))
"""
LEFT_OUT = """
    def test_one_is_left_out(vitkernels_verify):
        model = vit()
        model.norm.register_forward_hook(lambda *_: None)
        model.blocks[0].mlp.fc1.register_forward_hook(lambda *_: None)
        vitkernels_verify(model, torch.randn(1, 3, 16, 16), steps=0)
"""


def run(pytester, body, *options):
    pytester.makepyfile(HEAD + body)
    return pytester.runpytest_inprocess(*PLUGIN, "-p", "no:cacheprovider", "-p", "no:xdist", "-rs", *options)


def test_a_good_model_passes(pytester):
    run(pytester, AGREES, "--vitkernels-strict").assert_outcomes(passed=1)


def test_a_defect_fails_by_name_with_its_error_and_how_to_repeat_it(pytester):
    from vitkernels.tools.verify.mutants import Mutant, seeded_defect

    scale = "attention_qkvpacked_fwd(qkv, scale"
    with seeded_defect(Mutant("scale", "ops._block:_forward", f"{scale})", f"{scale} * 1.001)", "block")):
        result = run(pytester, AGREES)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "*vitkernels_verify: VisionTransformer on the kernels does not agree with PyTorch (*float32, seed 0)",
            "*gradient of blocks.0.attn.*: * times PyTorch's error; max error * at (*), limit *",
            "*Reproduce: python -m pytest 'test_*.py::test_kernels_agree'",
        ]
    )


def test_nothing_swapped_skips_and_strictly_fails(pytester):
    result = run(pytester, NOTHING_SWAPPED)
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["*no module of Sequential runs on the kernels*a plain Linear*"])
    run(pytester, NOTHING_SWAPPED, "--vitkernels-strict").assert_outcomes(failed=1)


def test_what_is_left_out_passes_and_strictly_fails(pytester):
    run(pytester, LEFT_OUT).assert_outcomes(passed=1)
    result = run(pytester, LEFT_OUT, "--vitkernels-strict")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*modules were left out:", "*blocks.0*a hook on fc1*"])


def fresh(tmp_path, *options):
    """Run a test of what is imported, and one of the fixture."""
    (tmp_path / "test_env.py").write_text(
        "import os, sys\n"
        "def test_env(request):\n"
        "    heavy = [n for n in ('torch', 'triton') if n in sys.modules]\n"
        "    print('backend', os.environ.get('VITKERNELS_BACKEND'), 'imported', heavy)\n"
        "def test_kernels(vitkernels_verify):\n"
        "    import torch\n"
        "    vitkernels_verify(torch.nn.LayerNorm(8), torch.randn(2, 3, 8), steps=0)\n"
    )
    return pytest_of_its_own(tmp_path, "-s", "-rs", *options)


def pytest_of_its_own(folder, *options):
    """Run pytest in a process whose environment chooses no backend, on a machine that shows no GPU."""
    environment = {k: v for k, v in os.environ.items() if k not in ("VITKERNELS_BACKEND", "PYTEST_ADDOPTS")}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", *PLUGIN, *options]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_unused_it_imports_nothing_and_used_it_emulates(tmp_path):
    done = fresh(tmp_path, "--vitkernels-strict")
    assert "backend None imported []" in done.stdout, done.stdout + done.stderr
    assert "2 passed" in done.stdout


def test_without_kernels_it_strictly_fails(pytester, monkeypatch):
    monkeypatch.setenv("VITKERNELS_BACKEND", "torch")
    result = run(pytester, AGREES, "--vitkernels-strict")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*VITKERNELS_BACKEND=torch asks for PyTorch alone.*"])


def readme_example() -> str:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (example,) = (block for block in blocks if "vitkernels_verify" in block)
    return example


def test_the_readmes_example_runs_as_it_stands_and_says_what_it_is_at(tmp_path):
    """In a process of its own."""
    (tmp_path / "test_example.py").write_text(readme_example())
    # Less time than a user's, which the plugin fills with more steps and more blocks on kernels.
    (tmp_path / "conftest.py").write_text(
        "import vitkernels.tools.verify.pytest_plugin as plugin\n"
        "from vitkernels.tools.console import prepare_torchvision\n"
        "plugin.SECONDS = 2.0\n"
        "prepare_torchvision()\n"  # timm is imported beside whatever torchvision is here
    )
    done = pytest_of_its_own(tmp_path, "--vitkernels-strict", "test_example.py")
    assert "1 passed" in done.stdout, done.stdout + done.stderr
    begun = [line for line in done.stdout.splitlines() if line.endswith("…")]
    assert [line.strip(" …") for line in begun] == ["outputs", "gradients", "loss curve"]
    assert "VisionTransformer on an emulated GPU, about 2 s" in done.stdout
    assert re.search(r"loss curve: passed, \d+ s; .* in 3 steps", done.stdout)
    assert "kernels in the first 1 of 6 modules alike" in done.stdout


def test_the_fixture_leaves_pytorchs_threads_as_they_were(pytester):
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        run(pytester, AGREES).assert_outcomes(passed=1)
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)
