"""The command line: what it prints and writes, and what it says when something is wrong."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vitkernels.ops import _triton
from vitkernels.tools import console
from vitkernels.tools.cli import main
from vitkernels.tools.demo import measure

for package in ("sklearn", "matplotlib"):
    pytest.importorskip(package, reason="of the extra vitkernels[demo]")
Image = pytest.importorskip("PIL.Image", reason="classify reads images with Pillow")
save_file = pytest.importorskip("safetensors.torch", reason="weights are safetensors").save_file

ROOT = Path(__file__).parents[1]
MODEL = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def timm():
    return pytest.importorskip("timm", reason="classify runs timm's models")


@pytest.fixture(scope="module")
def weights(timm, tmp_path_factory):
    torch.manual_seed(0)
    model = timm.create_model(MODEL)
    torch.nn.init.normal_(model.head.weight)  # timm's is so small that all classes are alike
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_file(model.state_dict(), path)
    return path


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "noise.png"
    Image.fromarray(torch.randint(256, (200, 300, 3), dtype=torch.uint8).numpy()).save(path)
    return path


def is_png(path) -> bool:
    with Image.open(path, formats=["PNG"]) as image:
        return image.size[0] > 600 and len(image.convert("L").getcolors(256)) > 20


def failure(capsys, *argv) -> str:
    """Run a command that must fail, and return its one line."""
    assert main([str(a) for a in argv]) == 2
    error = capsys.readouterr().err
    line = error.strip().splitlines()[-1]
    assert line.startswith("vitkernels: ")
    assert "Traceback" not in error
    return line


def test_demo(tmp_path):
    """In a process of its own, where the command itself chooses the backend."""
    out = tmp_path / "demo.png"
    code = f"import sys; from vitkernels.tools.cli import main; sys.exit(main(['demo', '--out', {str(out)!r}]))"
    env = {k: v for k, v in os.environ.items() if k != "VITKERNELS_BACKEND"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    assert is_png(out)
    for word in ("plain", "PyTorch", "450", "accuracy", "images/s", "Δ fp64", f"Wrote {out}"):
        assert word in done.stdout
    if not _triton.HAS_TRITON:
        assert "kernels did not run" in done.stdout
    elif measure.pick_device().type == "cpu":
        assert "emulated H100" in done.stdout
        assert "no performance figure" in done.stdout
    else:
        assert "Triton kernels" in done.stdout


def test_demo_on_torch_alone_and_without_rich(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("VITKERNELS_BACKEND", "torch")
    monkeypatch.setattr(console, "rich", None)
    assert main(["demo", "--out", str(tmp_path / "demo.png")]) == 0
    said = capsys.readouterr().out
    assert "plain  PyTorch" in said
    assert "accelerated" not in said
    assert "VITKERNELS_BACKEND=torch" in said


def test_demo_errors(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("VITKERNELS_BACKEND", "torch")
    assert "cannot write" in failure(capsys, "demo", "--out", tmp_path / "missing" / "demo.png")
    monkeypatch.setenv("VITKERNELS_BACKEND", "cuda")
    assert "'cuda'; expected one of auto, triton, emulated," in failure(capsys, "demo", "--out", tmp_path / "demo.png")
    monkeypatch.setenv("VITKERNELS_BACKEND", "triton")
    monkeypatch.setattr(_triton, "HAS_TRITON", False)
    monkeypatch.setattr(_triton, "MISSING", ModuleNotFoundError("No module named 'triton'", name="triton"))
    assert "Triton cannot be imported" in failure(capsys, "demo", "--out", tmp_path / "demo.png")
    assert not (tmp_path / "demo.png").exists()


@pytest.mark.parametrize("backend", [None, "emulated"])
def test_classify(backend, timm, image, tmp_path, capsys, monkeypatch):
    """The classes and their shares are those of timm's own model, one of 100 tokens."""
    if backend is None:
        monkeypatch.delenv("VITKERNELS_BACKEND", raising=False)
    else:
        monkeypatch.setenv("VITKERNELS_BACKEND", backend)
    name, weights, out = "test_vit", tmp_path / "weights.safetensors", tmp_path / "out.png"
    model = timm.create_model(name)
    torch.nn.init.normal_(model.head.weight)  # timm's is so small that all classes are alike
    save_file(model.state_dict(), weights)
    assert main(["classify", str(image), "--model", name, "--weights", str(weights), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert is_png(out)
    from safetensors.torch import load_file

    model = timm.create_model(name).eval()
    model.load_state_dict(load_file(weights))
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    with torch.no_grad():
        shares, classes = model(transform(Image.open(image).convert("RGB"))[None])[0].softmax(-1).topk(5)
    names = timm.data.ImageNetInfo()
    found = [line for line in said.splitlines() if " %  " in line]
    best = zip(shares.tolist(), classes.tolist(), strict=True)
    wanted = [f"  {100 * p:5.1f} %  {names.index_to_description(i)}" for p, i in best]
    assert found == wanted
    assert "blocks.*" in said  # the swap's report
    if measure.pick_device().type == "cpu":
        assert ("kernels did not run: There is no GPU" in said) == (backend is None)
        assert ("head dim 32, ×6: sdpa" in said) == (backend is None), "what runs"


def test_classify_another_head_and_no_class_token(timm, image, tmp_path, capsys, monkeypatch):
    """Classes of unknown names go by their index; there is no attention map of a token that is not there."""
    monkeypatch.setenv("VITKERNELS_BACKEND", "torch")  # 256 tokens in 14 blocks take an emulator a minute
    model = timm.create_model("vit_wee_patch16_reg1_gap_256", num_classes=7)
    assert not model.has_class_token
    path, out = tmp_path / "weights.pt", tmp_path / "out.png"
    torch.save({"state_dict": model.state_dict()}, path)
    argv = ["classify", image, "--model", "vit_wee_patch16_reg1_gap_256", "--weights", path, "--out", out]
    assert main([str(a) for a in argv]) == 0
    assert sum(" %  class " in line for line in capsys.readouterr().out.splitlines()) == 5
    assert is_png(out)


def test_classify_bad_images(timm, weights, image, tmp_path, capsys, monkeypatch):
    rest = ("--model", MODEL, "--weights", weights, "--out", tmp_path / "out.png")
    assert "No such file" in failure(capsys, "classify", tmp_path / "missing.png", *rest)
    assert "cannot read" in failure(capsys, "classify", tmp_path, *rest)
    text = tmp_path / "text.png"
    text.write_text("no image")
    assert "is no image of a known format; expected PNG, JPEG, WEBP" in failure(capsys, "classify", text, *rest)
    gif = tmp_path / "image.gif"
    Image.new("L", (8, 8)).save(gif)
    assert "is no image of a known format" in failure(capsys, "classify", gif, *rest)
    cut = tmp_path / "cut.png"
    cut.write_bytes(image.read_bytes()[:5000])
    assert "cut.png" in failure(capsys, "classify", cut, *rest)
    for limit in (20_000, 40_000):  # of 60,000 pixels: Pillow's error, and its warning
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert "too many pixels" in failure(capsys, "classify", image, *rest)
    assert not (tmp_path / "out.png").exists()


def test_classify_bad_weights(timm, weights, image, tmp_path, capsys):
    def complaint(path, name=MODEL):
        return failure(capsys, "classify", image, "--model", name, "--weights", path, "--out", tmp_path / "out.png")

    assert "No such file" in complaint(tmp_path / "missing.safetensors")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(weights.read_bytes()[:-100])
    assert "broken.safetensors is no whole safetensors file" in complaint(broken)
    pickled = tmp_path / "code.pt"
    torch.save({"head.weight": print}, pickled)
    assert "code.pt holds builtins.print, which is not loaded" in complaint(pickled)
    numbers = tmp_path / "numbers.pt"
    torch.save([1, 2], numbers)
    assert "numbers.pt holds a list; expected tensors by name" in complaint(numbers)
    state = timm.create_model(MODEL).state_dict()
    state["cls_token"] = state["cls_token"][..., :10]
    state["extra"] = state.pop("norm.bias").clone()
    unfit = tmp_path / "unfit.safetensors"
    save_file({name: t.contiguous() for name, t in state.items()}, unfit)
    line = complaint(unfit)
    for part in ("cls_token has shape (1, 1, 10), expected (1, 1, 192)", "norm.bias is missing", "extra is unexpected"):
        assert part in line
    assert "and 1" in complaint(weights, "vit_small_patch16_224")  # "and 1xx more"
    assert not (tmp_path / "out.png").exists()


def test_classify_bad_models(timm, weights, image, capsys, monkeypatch):
    assert (
        f"'vit_tiny_patch61_224' is neither a model of timm nor a folder with a config.json; did you mean {MODEL}"
        in failure(capsys, "classify", image, "--model", "vit_tiny_patch61_224")
    )

    def offline(*args, **kwargs):
        raise ConnectionError("Name or service not known\nmore of it")

    with monkeypatch.context() as patch:
        patch.setattr(timm, "create_model", offline)
        line = failure(capsys, "classify", image, "--model", MODEL)
    assert f"no pretrained weights for {MODEL} (ConnectionError: Name or service not known)" in line
    assert "--weights FILE" in line
    monkeypatch.setitem(sys.modules, "timm", None)
    line = failure(capsys, "classify", image, "--model", MODEL, "--weights", weights)
    assert "timm cannot be imported" in line
    assert "pip install timm, or install vitkernels with its extra [timm]" in line


def test_usage(capsys):
    for argv in ([], ["classify"], ["classify", "image.png"], ["nothing"]):
        with pytest.raises(SystemExit) as stopped:
            main(argv)
        assert stopped.value.code == 2
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert "demo" in said
    assert "classify" in said


def test_traffic_without_timm_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert main(["inspect", "--traffic", "vit_tiny_patch16_224"]) == 2
    assert "pip install timm, or install vitkernels with its extra [timm]" in capsys.readouterr().err


BAD_CONFIGS = {
    "no JSON": (b"{", ": no JSON: "),
    "a list": (b"[1]", " holds a list; expected an object"),
    "not UTF-8": (b'{"a": "\xff"}', ": no JSON: "),
    "nothing said": (b"{}", " names neither a model_type of transformers nor an architecture of timm"),
    "an architecture of another type": (b'{"architecture": 3}', " names neither"),
    "an unknown architecture": (b'{"architecture": "vit_tiny"}', " names 'vit_tiny', which is no model of timm"),
    "an unknown model_type": (b'{"model_type": "nope"}', " describes no model: ValueError: "),
    "a width of another type": (b'{"model_type": "vit", "hidden_size": "wide"}', " describes no model: "),
    "a width that heads do not divide": (b'{"model_type": "vit", "hidden_size": 7}', " describes no model: "),
}


@pytest.mark.parametrize("kind", BAD_CONFIGS)
def test_explain_names_a_malformed_config(kind, timm, tmp_path, capsys):
    pytest.importorskip("transformers")
    data, said = BAD_CONFIGS[kind]
    (tmp_path / "config.json").write_bytes(data)
    assert f"{tmp_path / 'config.json'}{said}" in failure(capsys, "explain", tmp_path)


def test_verify_names_a_malformed_config(tmp_path, capsys):
    from vitkernels.tools.verify.model import load

    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(console.UserError, match=r"config\.json holds a list; expected an object"):
        load(f"hf/{tmp_path}")
