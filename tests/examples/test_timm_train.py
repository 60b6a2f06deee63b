"""examples/timm_train.py: scripts that make their models with timm's create_model run on accelerated ones."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

np = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")
timm = pytest.importorskip("timm")

import vitkernels  # noqa: E402

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "timm_train.py"
TRAIN = os.environ.get("VITKERNELS_TIMM_TRAIN")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

LOOP = """
import sys

import torch
import torch.nn.functional as F
from helper import RATE
from timm.models import create_model

if __name__ == "__main__":
    out, device = sys.argv[1:]
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 3}
    model = create_model("vit_tiny_patch16_224", **options).to(device).train()
    images, labels = torch.randn(3, 4, 3, 32, 32, device=device), torch.arange(4, device=device) % 3
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for x in images:
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
    torch.save(model.cpu().state_dict(), out)
"""


@pytest.fixture
def example(monkeypatch):
    """The example as a module; what it replaces in timm and in this process is put back."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    for module in (timm, timm.models):
        monkeypatch.setattr(module, "create_model", module.create_model)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", [*sys.path])
    import timm_train

    return timm_train


def test_script_trains_an_accelerated_model(example, tmp_path, capsys):
    """A script with a neighbour that it imports, and arguments of its own: its weights are plain training's.

    On the backend torch an accelerated model runs its own forward, so that is so bit for bit.
    """
    script = tmp_path / "loop.py"
    script.write_text(LOOP)
    (tmp_path / "helper.py").write_text("RATE = 0.1\n")
    plain, swapped = tmp_path / "plain.pt", tmp_path / "swapped.pt"
    with vitkernels.use_backend("torch"):
        sys.path.insert(0, str(tmp_path))
        sys.argv = [str(script), str(plain), DEVICE]
        runpy.run_path(str(script), run_name="__main__")
        sys.path.remove(str(tmp_path))
        assert not capsys.readouterr().out
        example.main([str(script), str(swapped), DEVICE])
    said = capsys.readouterr().out
    assert "7 swapped" in said and "FusedBlock" in said
    trained, expected = torch.load(swapped), torch.load(plain)
    assert trained.keys() == expected.keys()
    assert all(torch.equal(trained[key], value) for key, value in expected.items())


@pytest.mark.skipif(TRAIN is None, reason="VITKERNELS_TIMM_TRAIN does not name timm's train.py, which is in no package")
def test_timms_own_train_py(tmp_path):
    """The weights are those of plain training, bit for bit: an accelerated model runs its own forward on ``torch``."""
    draw = np.random.default_rng(0)
    for part in ("train", "validation"):
        for label in ("a", "b"):
            (tmp_path / part / label).mkdir(parents=True)
            for i in range(4):
                pixels = draw.integers(0, 256, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / label / f"{i}.png")
    options = (
        f"--data-dir {tmp_path} --model test_vit --img-size 160 --num-classes 2 --epochs 1 --batch-size 2 --workers 1"
    )
    options += f" --opt sgd --lr 0.1 --sched cosine --warmup-epochs 0 --device {DEVICE}"
    options += f" --output {tmp_path} --log-interval 1 --experiment"
    weights = {}
    prepare = "from vitkernels.tools.console import import_timm; import_timm(); import runpy, sys; del sys.argv[0]; "
    plain = [sys.executable, "-c", f"{prepare} runpy.run_path(sys.argv[0], run_name='__main__')"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "VITKERNELS_BACKEND": "torch"}
    for name, command in (("swapped", [sys.executable, str(SCRIPT)]), ("plain", plain)):
        command = [*command, TRAIN, *options.split(), name]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert ("FusedBlock" in done.stdout) == (name == "swapped")
        assert "Train: 0" in done.stdout + done.stderr
        weights[name] = torch.load(tmp_path / name / "last.pth.tar", weights_only=False)["state_dict"]
    assert weights["plain"].keys() == weights["swapped"].keys()
    assert all(torch.equal(weights["plain"][key], value) for key, value in weights["swapped"].items())
    fresh = timm.create_model("test_vit", num_classes=2)
    assert not torch.equal(fresh.head.weight, weights["plain"]["head.weight"])


def test_models_are_timms_and_the_rest_of_the_call_too(example):
    create = example.accelerating(timm.models.create_model)
    model = create("test_vit", num_classes=5)
    assert isinstance(model, timm.models.VisionTransformer) and model.head.out_features == 5
    assert vitkernels.restore(model)


def test_bad_input(example, tmp_path):
    for argv in ([], ["--model", "test_vit"]):
        with pytest.raises(SystemExit, match=r"Run timm's own train.py"):
            example.main(argv)
    with pytest.raises(SystemExit, match=r"timm_train: there is no script .*none\.py"):
        example.main([str(tmp_path / "none.py")])
