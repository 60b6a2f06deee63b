"""Accelerated timm models against the originals: logits and every parameter's gradient, by the error rule."""

import copy

import pytest
import torch

from vitkernels import accelerate
from vitkernels.testing.compare import check

timm = pytest.importorskip("timm")

# Every model is built by timm under its own name, cut down in what the interpreter's time depends on alone.
MODELS = {
    "vit": ("vit_tiny_patch16_224", {"img_size": 48, "embed_dim": 48, "num_heads": 3, "depth": 2}),
    "deit3": ("deit3_small_patch16_224", {"img_size": 48, "embed_dim": 48, "num_heads": 3, "depth": 1}),
    "dinov2": ("vit_small_patch14_reg4_dinov2", {"img_size": 42, "embed_dim": 48, "num_heads": 2, "depth": 1}),
    "siglip": ("vit_so400m_patch14_siglip_384", {"img_size": 42, "embed_dim": 144, "num_heads": 2, "depth": 1}),
    "clip": ("vit_base_patch32_clip_quickgelu_224", {"img_size": 64, "embed_dim": 64, "num_heads": 2, "depth": 1}),
    "drop path": (
        "vit_tiny_patch16_224",
        {"img_size": 32, "embed_dim": 48, "num_heads": 3, "depth": 2, "drop_path_rate": 0.6, "init_values": 0.5},
    ),
    "dropout": (
        "vit_tiny_patch16_224",
        {"img_size": 32, "embed_dim": 48, "num_heads": 3, "depth": 1, "proj_drop_rate": 0.3},
    ),
}
PATCH = {"vit": 16, "dinov2": 14}
SWAPPED = {"PatchEmbed", "Block", "Attention", "Mlp", "LayerNorm"}


def build(name: str, **more) -> torch.nn.Module:
    architecture, cut = MODELS[name]
    model = timm.create_model(architecture, num_classes=10, **{**cut, **more})
    with torch.no_grad():
        for parameter in model.parameters():  # biases of zero and a LayerScale of 1e-5 would hide what they do
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def run(model: torch.nn.Module, images: torch.Tensor, upstream: torch.Tensor, seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    model.zero_grad()
    logits = model(images)
    logits.backward(upstream.to(logits.dtype))
    return {"logits": logits.detach(), **{f"d{n}": p.grad.clone() for n, p in model.named_parameters()}}


def three_ways(model: torch.nn.Module, dtype: torch.dtype, device: torch.device) -> tuple[dict, dict, dict]:
    """Return what the accelerated model gives, what PyTorch gives in the same dtype, and the truth in fp64."""
    model.to(device, dtype)
    images = torch.randn(3, 3, *model.patch_embed.img_size, device=device, dtype=dtype)
    upstream = torch.randn(3, 10, device=device, dtype=dtype)
    truth = run(copy.deepcopy(model).double(), images.double(), upstream.double())
    yardstick = run(model, images, upstream)
    report = accelerate(model)
    assert {entry.was for entry in report.swapped} == SWAPPED
    assert not [entry for entry in report.kept if entry.known], report
    return run(model, images, upstream), yardstick, truth


@pytest.mark.parametrize("name", MODELS)
def test_fp32(name, device):
    model = build(name).train(name in ("drop path", "dropout"))
    actual, yardstick, truth = three_ways(model, torch.float32, device)
    verdicts = [check(key, actual[key], yardstick[key], truth[key]) for key in truth]
    failed = [f"{v.name}: {v.detail}" for v in verdicts if not v.passed]
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_bf16(name, device):
    """As in fp32, but with the gain judged over several models: through a network that of one is a matter of luck."""
    gains, torch_gains, failed = [], [], []
    for _ in range(4):
        actual, yardstick, truth = three_ways(build(name, img_size=2 * PATCH[name], depth=1), torch.bfloat16, device)
        verdicts = [check(key, actual[key], yardstick[key], truth[key], gain_counts=False) for key in truth]
        failed += [f"{v.name}: {v.detail}" for v in verdicts if not v.passed]
        gains += [gain(actual[key], truth[key]) for key in truth]
        torch_gains += [gain(yardstick[key], truth[key]) for key in truth]
    assert not failed, "\n".join(failed)
    assert rms(gains) <= 1.5 * rms(torch_gains)


def gain(actual: torch.Tensor, truth: torch.Tensor) -> float:
    return (((actual - truth) * truth).sum() / truth.square().sum()).item()


def rms(figures: list[float]) -> float:
    return torch.tensor(figures).square().mean().sqrt().item()


def test_drop_path_drops_the_samples_that_timm_drops(device):
    model = build("drop path").to(device).train()
    images = torch.randn(8, 3, 32, 32, device=device)
    draws = []
    with torch.no_grad():
        for seed in range(3):
            torch.manual_seed(seed)
            draws.append(model(images))
        accelerate(model)
        for seed, expected in enumerate(draws):
            torch.manual_seed(seed)
            torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)
    assert (draws[0] - draws[1]).abs().max() > 0.1, "the seeds must differ by more than the tolerance"


@pytest.mark.parametrize("output_fmt", [None, "NCHW", "NHWC", "NLC", "NCL"])
def test_patch_embed_formats(output_fmt, device):
    embed = timm.layers.PatchEmbed(
        img_size=24, patch_size=8, embed_dim=12, output_fmt=output_fmt, norm_layer=torch.nn.LayerNorm
    ).to(device)
    if output_fmt in ("NCHW", "NCL"):
        embed.norm = torch.nn.Identity()
    images = torch.randn(2, 3, 24, 24, device=device)
    expected = embed(images)
    accelerate(embed)
    actual = embed(images)
    torch.testing.assert_close(actual, expected)
    if output_fmt == "NCHW":
        assert actual.is_contiguous()


def test_patch_embed_size_rules_are_timms(device):
    strict = timm.layers.PatchEmbed(img_size=24, patch_size=8, embed_dim=12).to(device)
    free = timm.layers.PatchEmbed(img_size=None, patch_size=8, embed_dim=12).to(device)
    odd = torch.randn(1, 3, 27, 24, device=device)
    expected = free(odd)  # no size to hold to: timm crops the three rows that fill no patch
    accelerate(strict)
    accelerate(free)
    with pytest.raises(AssertionError, match=r"Input height \(27\) doesn't match model \(24\)"):
        strict(odd)
    torch.testing.assert_close(free(odd), expected)


def test_patch_embed_drops_what_fills_no_patch(device, monkeypatch):
    embed = timm.layers.PatchEmbed(img_size=27, patch_size=8, embed_dim=12).to(device)  # as 384 by patches of 14
    images = torch.randn(2, 3, 27, 27, device=device, requires_grad=True)
    expected = embed(images)
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), images)
    accelerate(embed)
    monkeypatch.setattr(timm.layers.PatchEmbed, "forward", None)  # the fused forward is what runs
    tokens = embed(images)
    torch.testing.assert_close(tokens, expected)
    (grad,) = torch.autograd.grad(tokens.square().sum(), images)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-4)
    assert not grad[:, :, 24:].any()


def test_dynamic_image_size(device):
    model = build("vit", dynamic_img_size=True).to(device).eval()
    images = torch.randn(1, 3, 32, 64, device=device)
    with torch.no_grad():
        expected = model(images)
        accelerate(model)
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)
