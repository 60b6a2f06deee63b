"""PEFT's LoRA on an accelerated model: the layers stay fused, and what they compute and train is PEFT's."""

import copy

import pytest
import torch
from parity import shake
from torch import nn

from vitkernels import accelerate, ops, restore, use_backend
from vitkernels.testing import compare

timm = pytest.importorskip("timm")
peft = pytest.importorskip("peft")

ALL = ["qkv", "proj", "fc1", "fc2"]
TINY = {"img_size": 32, "embed_dim": 32, "num_heads": 2, "depth": 2, "num_classes": 5, "init_values": 0.5}


def build(**more) -> nn.Module:
    return shake(timm.create_model("vit_tiny_patch16_224", **{**TINY, **more}).eval())


def config(**more) -> "peft.LoraConfig":
    options = {"r": 4, "target_modules": ALL, "exclude_modules": "patch_embed.*", "init_lora_weights": False}
    return peft.LoraConfig(**{**options, **more})


def adapted(model: nn.Module, **more) -> nn.Module:
    torch.manual_seed(1)
    return peft.get_peft_model(model, config(**more))


@pytest.fixture
def model(device) -> nn.Module:
    return build().to(device)


@pytest.fixture
def images(device):
    return torch.randn(2, 3, 32, 32, device=device)


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The names of the ops in the order of their calls."""
    made = []
    for name in ("block", "linear", "lora_linear", "mlp", "lora_mlp", "add_layer_norm"):
        original = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, f=original, n=name, **k: (made.append(n), f(*a, **k))[1])
    return made


BLOCK = ["lora_linear", "lora_linear", "add_layer_norm", "lora_mlp"]


def close(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def gradients(model, images, seed=0) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(seed)
    model(images).float().square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def reasons(model) -> dict[str, str]:
    return {entry.module: entry.reason for entry in accelerate(model).kept}


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_block_runs_fused(when, model, images, calls):
    plain = adapted(copy.deepcopy(model), modules_to_save=["head"])
    if when == "after":
        accelerate(model)
    model = adapted(model, modules_to_save=["head"])
    if when == "before":
        report = accelerate(model)
        assert not [entry for entry in report.kept if "blocks" in entry.module], "an adapter's parts are the block's"
    keys = list(plain.state_dict())
    assert list(model.state_dict()) == keys
    with use_backend("torch"):
        expected, expected_grads = plain(images), gradients(plain, images)
    calls.clear()
    close(model(images), expected)
    assert calls == 2 * BLOCK
    actual = gradients(model, images)
    close(actual, expected_grads)
    assert sum("lora" in name for name in actual) == 2 * 4 * 2
    assert {name for name in actual if "lora" not in name} == {
        f"base_model.model.head.modules_to_save.default.{name}" for name in ("weight", "bias")
    }
    restore(model)
    with use_backend("torch"):
        assert torch.equal(model(images), expected)
