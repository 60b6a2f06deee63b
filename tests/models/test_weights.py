"""One function reads every file of weights: whose it takes of a training run's, and under which names."""

import argparse
import json
import re

import pytest
import torch
from torch import nn

from vitkernels import use_backend
from vitkernels.models import VisionTransformer
from vitkernels.models.convert import read_weights
from vitkernels.tools.console import UserError


@pytest.fixture(autouse=True)
def _plain_pytorch():
    """Which weights are read is under test, and no kernel."""
    with use_backend("torch"):
        yield


NESTS = ("state_dict_ema", "model_ema", "state_dict", "model")
CUT = {"img_size": 28, "patch_size": 14, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}


def named(value: float) -> dict:
    return {"weight": torch.full((2,), value), "bias": torch.full((1,), value)}


CHECKPOINTS = {
    "bare": (named(1), 1),
    "all": (dict(zip(NESTS, map(named, (1, 2, 3, 4)), strict=True)), 1),
    "timm's": ({"epoch": 3, "arch": "vit", "state_dict": named(3), "state_dict_ema": named(1), "metric": 0.5}, 1),
    "timm's, with its command line": ({"args": argparse.Namespace(lr=0.1), "state_dict": named(1), "version": 2}, 1),
    "DeiT's and torchvision's": ({"model": named(4), "optimizer": {"state": {}}, "model_ema": named(2), "epoch": 1}, 2),
    "without averages": ({"model": named(4), "model_ema": None, "optimizer": {}}, 4),
    "both names, as timm takes them": ({"model": named(4), "state_dict": named(3)}, 3),
    "one in the other": ({"state_dict": {"model": named(4)}, "epoch": 1}, 4),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_the_averaged_weights_come_first(kind, tmp_path):
    """As of timm's own reader."""
    checkpoint, value = CHECKPOINTS[kind]
    torch.save(checkpoint, tmp_path / "weights.pth")
    state = read_weights(tmp_path / "weights.pth")
    assert state.keys() == named(0).keys()
    assert all(bool((tensor == value).all()) for tensor in state.values())
    if kind != "one in the other":
        timm = pytest.importorskip("timm")
        wanted = timm.models.load_state_dict(str(tmp_path / "weights.pth"))
        assert all(torch.equal(state[name], tensor) for name, tensor in wanted.items())


PREFIXES = ("module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod.", "module.module.", "_forward_module.")
PREFIXES += ("_forward_module.module._orig_mod.", "_fsdp_wrapped_module.", "module._fsdp_wrapped_module.")


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_wrappers_of_the_model_are_taken_off(prefix, suffix, tmp_path):
    state = {f"{prefix}{name}": tensor for name, tensor in named(1).items()}
    path = tmp_path / f"weights.{suffix}"
    if suffix == "pth":
        torch.save({"state_dict": state}, path)
    else:
        pytest.importorskip("safetensors.torch").save_file(state, path)
    assert read_weights(path).keys() == named(1).keys()


def test_wrappers_of_pytorch_itself(tmp_path):
    """What torch.compile, averaging and activation checkpointing make of the names, around all or a part."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    def model() -> nn.Sequential:
        return nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))

    keys = model().state_dict().keys()
    average = torch.optim.swa_utils.AveragedModel(nn.DataParallel(model()))
    parts = model()
    parts[0], parts[1][0] = torch.compile(parts[0]), checkpoint_wrapper(parts[1][0])
    for wrapped in (torch.compile(model()), average, torch.optim.swa_utils.AveragedModel(torch.compile(parts))):
        state = wrapped.state_dict()
        assert state.keys() != keys
        torch.save({"model_ema": state}, tmp_path / "wrapped.pth")
        assert read_weights(tmp_path / "wrapped.pth").keys() == keys


def test_names_that_only_look_like_wrappers_stay(tmp_path):
    state = {"blocks.0.module.weight": torch.zeros(1), "modules.weight": torch.zeros(1), "model": torch.zeros(1)}
    torch.save(state, tmp_path / "weights.pth")
    assert read_weights(tmp_path / "weights.pth").keys() == state.keys()


def test_two_weights_of_one_name_are_an_error(tmp_path):
    torch.save({"module.weight": torch.zeros(1), "weight": torch.ones(1)}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"weights\.pth holds two weights of the name weight"):
        read_weights(tmp_path / "weights.pth")


def loops() -> dict:
    loop: dict = {}
    loop["model"] = loop
    return loop


@pytest.mark.parametrize(
    ("checkpoint", "said"),
    [
        ({"model": named(1), "model_ema": [1, 2]}, "holds a list under model_ema; expected tensors by name"),
        ({"state_dict": {"lr": 0.1}}, "holds something else than tensors under state_dict: lr"),
        (loops(), "holds something else than tensors under model: model"),
        ([1, 2], "holds a list; expected tensors by name"),
    ],
)
def test_checkpoints_without_weights(checkpoint, said, tmp_path):
    """Averages that cannot be read are an error, not the raw weights."""
    torch.save(checkpoint, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=rf"weights\.pth {said}"):
        read_weights(tmp_path / "weights.pth")


@pytest.fixture
def timm():
    return pytest.importorskip("timm")


@pytest.fixture
def run(timm, tmp_path):
    """The checkpoint of a run under DistributedDataParallel and torch.compile, and the averaged model."""
    raw, average = (timm.create_model("vit_tiny_patch16_224", **CUT).eval() for _ in range(2))
    state, ema = ({f"module._orig_mod.{k}": v for k, v in m.state_dict().items()} for m in (raw, average))
    torch.save({"epoch": 1, "args": argparse.Namespace(), "state_dict": state, "state_dict_ema": ema}, tmp_path / "run")
    return tmp_path / "run", average


def test_from_timm_takes_the_average(run):
    path, average = run
    images = torch.randn(2, 3, 28, 28)
    for read in (path, str(path)):
        ours = VisionTransformer.from_timm(read, architecture="vit_tiny_patch16_224", **CUT).eval()
        torch.testing.assert_close(ours(images), average(images))


def test_classify_takes_the_average(run, monkeypatch, timm):
    pytest.importorskip("matplotlib", reason="classify draws with matplotlib")
    from vitkernels.tools.demo import classify

    path, average = run
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **options: create(name, **{**CUT, **options}))
    model = classify.load_model("vit_tiny_patch16_224", path)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in average.state_dict().items())


def test_from_torchvision_takes_the_average(tmp_path):
    vision = pytest.importorskip("torchvision.models")
    make = {"image_size": 28, "patch_size": 14, "num_layers": 1, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 48}
    raw, average = (vision.VisionTransformer(**make, num_classes=5).eval() for _ in range(2))
    for model in (raw, average):
        nn.init.normal_(model.heads.head.weight)  # torchvision's is 0
    averaged = torch.optim.swa_utils.AveragedModel(average).state_dict()  # torchvision's own, with its counter
    torch.save({"model": raw.state_dict(), "model_ema": averaged, "epoch": 1}, tmp_path / "run.pth")
    images = torch.randn(2, 3, 28, 28)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vision, "get_model", lambda *_, weights: vision.VisionTransformer(**make, num_classes=5))
        ours = VisionTransformer.from_torchvision(tmp_path / "run.pth", architecture="vit_b_16").eval()
    torch.testing.assert_close(ours(images), average(images), rtol=1e-5, atol=1e-5)


def test_from_hf_takes_wrappers_off(tmp_path):
    transformers = pytest.importorskip("transformers")
    save_file = pytest.importorskip("safetensors.torch").save_file
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    config = transformers.ViTConfig(**sizes, image_size=28, patch_size=14)
    model = transformers.ViTForImageClassification(config).eval()
    config.save_pretrained(tmp_path)
    save_file({f"_orig_mod.{k}": v.clone() for k, v in model.state_dict().items()}, tmp_path / "model.safetensors")
    images = torch.randn(2, 3, 28, 28)
    ours = VisionTransformer.from_hf(tmp_path).eval()
    torch.testing.assert_close(ours(images), model(images).logits, rtol=1e-5, atol=1e-5)


class Widget(nn.Module):
    """A model of the user's own, saved whole."""


UNREADABLE = {
    "a pickled model": lambda path: torch.save(Widget(), path),
    "a pickled model, old format": lambda path: torch.save(Widget(), path, _use_new_zipfile_serialization=False),
    "a JPEG": lambda path: path.write_bytes(b"\xff\xd8\xff\xe0\x00\x10JFIF\x00\x01" + bytes(300)),
    "text": lambda path: path.write_text("no weights at all\n"),
    "empty": lambda path: path.write_bytes(b""),
    "a zip cut short": lambda path: path.write_bytes(b"PK\x03\x04" + bytes(40)),
}


@pytest.mark.parametrize("suffix", ["pth", "bin", "safetensors"])
@pytest.mark.parametrize("kind", UNREADABLE)
def test_errors_are_one_line_that_names_the_file(kind, suffix, tmp_path):
    """PyTorch's own text has escape codes, and advises to run what is in the file."""
    from vitkernels.tools.demo.classify import read_weights as read_for_classify

    path = tmp_path / f"mine.{suffix}"
    UNREADABLE[kind](path)
    for read, error in ((read_weights, ValueError), (read_for_classify, UserError)):
        with pytest.raises(error) as caught:
            read(path)
        text = str(caught.value)
        assert text.startswith(f"{path} ")
        assert len(text) < len(str(path)) + 250
        assert not re.search(r"[\x00-\x1f\x7f]|weights_only|Please|WeightsUnpickler", text)
        if kind == "a pickled model" and suffix != "safetensors":
            assert "test_weights.Widget, which is not loaded" in text


CONFIGS = {
    "no JSON": b"{",
    "a list": b"[1, 2]",
    "not UTF-8": b'{"model_type": "\xff\xfe"}',
    "nothing": b"",
    "too little": b'{"model_type": "vit"}',
    "other types": b'{"model_type": "vit", "hidden_size": "wide", "vision_config": 3}',
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_malformed_configs_are_named(kind, tmp_path, timm):
    (tmp_path / "config.json").write_bytes(CONFIGS[kind])
    torch.save({}, tmp_path / "pytorch_model.bin")
    for read in (VisionTransformer.from_hf, VisionTransformer.from_timm):
        with pytest.raises(ValueError, match=re.escape(str(tmp_path / "config.json"))):
            read(tmp_path)


def test_malformed_configs_of_timm(tmp_path, timm):
    torch.save({}, tmp_path / "pytorch_model.bin")
    for config in ({"architecture": 3}, {"architecture": "vit_tiny_patch16_224", "model_args": [1]}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"config\.json names no architecture of timm, or its model_args"):
            VisionTransformer.from_timm(tmp_path)
