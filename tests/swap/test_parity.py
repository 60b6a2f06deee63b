"""Accelerated timm models against the originals: logits and every parameter's gradient, by the error rule."""

import copy
from collections.abc import Callable

import pytest
import torch
from parity import judge, no_call_of

from vitkernels import accelerate
from vitkernels.testing.sums import summed_alike

timm = pytest.importorskip("timm")

# Every model is built by timm under its own name, for images of 2 × 2 patches, two heads of 16, and MLPs of the usual
# four times the width where it has no gate: sizes that all of these tests share, so that each kernel is compiled once.
SIZE = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "num_heads": 2, "depth": 1}
WITHIN = {"qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True}
DROPS = {"drop_path_rate": 0.6, "init_values": 0.5}
MODELS = {
    "vit": ("vit_tiny_patch16_224", {"depth": 2}),
    "deit3": ("deit3_small_patch16_224", {}),
    "dinov2": ("vit_small_patch14_reg4_dinov2", {"reg_tokens": 2}),
    "dinov2 giant": ("vit_giant_patch14_reg4_dinov2", {"reg_tokens": 2}),
    "dinov3": ("vit_base_patch16_dinov3", {"num_reg_tokens": 2}),
    "dinov3 huge": ("vit_huge_plus_patch16_dinov3", {"num_reg_tokens": 2}),
    "siglip": ("vit_so400m_patch14_siglip_384", {"mlp_ratio": 4}),
    "clip": ("vit_base_patch32_clip_quickgelu_224", {}),
    "eva": ("eva_giant_patch14_224", {"mlp_ratio": 4}),
    "eva02": ("eva02_large_patch14_448", {}),
    "eva02 enormous": ("eva02_enormous_patch14_clip_224", {"mlp_ratio": 4}),
    "perception encoder": ("vit_pe_core_tiny_patch16_384", {}),
    "rope mixed": ("vit_small_patch16_rope_mixed_224", {}),
    "sapiens2": ("vit_5b_patch16_sapiens2", {"num_kv_heads": 1, "num_reg_tokens": 2}),  # grouped queries
    "resnet stem": ("vit_tiny_r_s16_p8_224", {"patch_size": 4}),
    "aimv2": ("aimv2_large_patch14_224", {}),
    "norms within": ("vit_tiny_patch16_224", WITHIN),
    "rms norms within": ("aimv2_large_patch14_224", WITHIN),  # 4 tokens: each program has more threads than elements
    "norms behind": ("vit_base_patch16_rpn_224", {}),
    "drop path": ("vit_tiny_patch16_224", DROPS | {"depth": 2}),
    "dropout": ("vit_tiny_patch16_224", {"proj_drop_rate": 0.3}),
    "dropout, gated": ("eva02_large_patch14_448", {"proj_drop_rate": 0.3}),
}
BLOCKS = {"Block", "EvaBlock", "EvaBlockPostNorm", "ResPostBlock"}


def build(name: str, **more) -> torch.nn.Module:
    architecture, cut = MODELS[name]
    model = timm.create_model(architecture, num_classes=10, **SIZE | cut | more).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases of zero and a LayerScale of 1e-5 would hide what they do
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def images_for(model: torch.nn.Module, device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, 3, *model.patch_embed.img_size, device=device, dtype=dtype)


def run(
    model: torch.nn.Module,
    images: torch.Tensor,
    upstream: torch.Tensor,
    mask: torch.Tensor | None,
    seed: int,
    compile: bool = False,
) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    model.zero_grad()
    masks = {} if mask is None else {"attn_mask": mask.detach().requires_grad_(mask.is_floating_point())}
    logits = (torch.compile(model, backend="aot_eager") if compile else model)(images, **masks)
    logits.backward(upstream.to(logits.dtype))
    found = {"logits": logits.detach(), **{f"d{n}": p.grad.clone() for n, p in model.named_parameters()}}
    if mask is not None and mask.is_floating_point():
        found["dmask"] = masks["attn_mask"].grad
    return found


def three_ways(
    model: torch.nn.Module, dtype: torch.dtype, device: torch.device, mask: torch.Tensor | None = None, **options
) -> Callable[[int], tuple[dict, dict, dict]]:
    """Return a draw: what the accelerated model gives, what PyTorch gives in the same dtype, and the truth in fp64."""
    model.to(device, dtype)
    plain, wide = copy.deepcopy(model), copy.deepcopy(model).double()
    upstream = torch.randn(2, 10, device=device, dtype=dtype)
    wide_mask = mask.double() if mask is not None and mask.is_floating_point() else mask
    report = accelerate(model)
    assert sum(entry.was in BLOCKS for entry in report.swapped) == len(model.blocks)
    assert not [entry for entry in report.kept if entry.known], report

    def draw(seed: int) -> tuple[dict, dict, dict]:
        images = images_for(model, device, dtype)
        with summed_alike(images):
            yardstick = run(plain, images, upstream, mask, seed)
        truth = run(wide, images.double(), upstream, wide_mask, seed)
        return run(model, images, upstream, mask, seed, **options), yardstick, truth

    return draw


def tokens_of(model: torch.nn.Module, device: torch.device) -> int:
    with torch.no_grad():
        return model.forward_features(images_for(model.to(device), device)).shape[1]


@pytest.mark.parametrize("name", MODELS)
def test_fp32(name, device):
    model = build(name).train(name.startswith("drop"))
    judge(three_ways(model, torch.float32, device))


# Of each chain of kernels that a block may run as, and each kind of mask, one or two.
MASKED = {"vit": "bool", "dinov3": "bool", "dinov2 giant": "learned", "eva02 enormous": "learned", "aimv2": "bool"}


@pytest.mark.parametrize("name", MASKED)
def test_masked_in_training(name, device):
    model = build(name)
    for block in model.blocks:
        block.drop_path1, block.drop_path2 = (timm.layers.DropPath(0.3) for _ in range(2))
    N = tokens_of(model, device)
    if MASKED[name] == "bool":
        mask = mask_of(N, device)
    else:
        mask = torch.randn(1, model.blocks[0].attn.num_heads, N, N, device=device)
    judge(three_ways(model.train(), torch.float32, device, mask))


def mask_of(N: int, device: torch.device) -> torch.Tensor:
    mask = torch.rand(2, 1, N, N, device=device) > 0.4
    return mask | torch.eye(N, dtype=torch.bool, device=device)


@pytest.mark.parametrize(("name", "masked"), [("vit", False), ("eva02", True)])
def test_compiled(name, masked, device):
    torch._dynamo.reset()
    model = build(name, depth=1)
    mask = mask_of(tokens_of(model, device), device) if masked else None
    judge(three_ways(model, torch.float32, device, mask, compile=True))


def test_causal(device):
    for name in ("vit", "eva02"):
        model = build(name).to(device)
        images = images_for(model, device)
        with torch.no_grad():
            expected = model(images, is_causal=True)
            assert not torch.allclose(model(images), expected, atol=1e-3)
            accelerate(model)
            torch.testing.assert_close(model(images, is_causal=True), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["vit", "eva02"])
def test_attention_dropout_drops_that_share(name, device):
    """Masks are drawn by another generator than timm's, so that the mean over many of them is what must agree."""
    model = build(name, attn_drop_rate=0.3).to(device)
    attn, x = model.blocks[0].attn, torch.randn(1, 5, model.embed_dim, device=device)
    x = x.expand(16, -1, -1)
    with torch.no_grad():
        undropped = attn(x)[:1]
        accelerate(model)
        assert type(attn).__qualname__.startswith("Fused")
        attn.train()
        torch.manual_seed(1)
        dropped = attn(x)
        torch.manual_seed(1)
        assert torch.equal(attn(x), dropped)
    deviation = dropped.std(0) / len(x) ** 0.5
    assert deviation.min() > 0
    assert ((dropped.mean(0) - undropped) / deviation).square().mean() < 2.0


@pytest.mark.parametrize("name", ["vit", "dinov3"])
def test_bf16(name, device):
    """As in fp32, but with the gain judged over several models: through a network that of one is a matter of luck."""
    draws = [three_ways(build(name, depth=1), torch.bfloat16, device)(seed) for seed in range(3)]
    judge(lambda seed: draws[seed // 1000], gain_counts=False)
    gains, torch_gains = (
        [gain(found[key], truth[key]) for *of_draw, truth in draws for found in of_draw[i : i + 1] for key in truth]
        for i in (0, 1)
    )
    assert rms(gains) <= 1.5 * rms(torch_gains)


def gain(actual: torch.Tensor, truth: torch.Tensor) -> float:
    return (((actual - truth) * truth).sum() / truth.square().sum()).item()


def rms(figures: list[float]) -> float:
    return torch.tensor(figures).square().mean().sqrt().item()


def test_drop_path_drops_the_samples_that_timm_drops(device):
    model = build("drop path").to(device).train()
    images = torch.randn(3, 3, 32, 32, device=device)
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


@pytest.mark.parametrize("output_fmt", [None, "NCHW", "NHWC", "NCL"])
def test_patch_embed_formats(output_fmt, device):
    embed = timm.layers.PatchEmbed(
        img_size=32, patch_size=16, embed_dim=32, output_fmt=output_fmt, norm_layer=torch.nn.LayerNorm
    ).to(device)
    if output_fmt in ("NCHW", "NCL"):
        embed.norm = torch.nn.Identity()
    images = torch.randn(2, 3, 32, 32, device=device)
    expected = embed(images)
    accelerate(embed)
    actual = embed(images)
    torch.testing.assert_close(actual, expected)
    if output_fmt == "NCHW":
        assert actual.is_contiguous()


def test_patch_embed_size_rules_are_timms(device):
    strict = timm.layers.PatchEmbed(img_size=32, patch_size=16, embed_dim=32).to(device)
    free = timm.layers.PatchEmbed(img_size=None, patch_size=16, embed_dim=32).to(device)
    odd = torch.randn(2, 3, 35, 32, device=device)
    expected = free(odd)  # no size to hold to: timm crops the three rows that fill no patch
    accelerate(strict)
    accelerate(free)
    with pytest.raises(AssertionError, match=r"Input height \(35\) doesn't match model \(32\)"):
        strict(odd)
    torch.testing.assert_close(free(odd), expected)


def test_patch_embed_drops_what_fills_no_patch(device):
    embed = timm.layers.PatchEmbed(img_size=35, patch_size=16, embed_dim=32).to(device)  # as 384 by patches of 14
    images = torch.randn(2, 3, 35, 35, device=device, requires_grad=True)
    expected = embed(images)
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), images)
    accelerate(embed)
    with no_call_of(timm.layers.PatchEmbed.forward):
        tokens = embed(images)
    torch.testing.assert_close(tokens, expected)
    (grad,) = torch.autograd.grad(tokens.square().sum(), images)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-4)
    assert not grad[:, :, 32:].any()


def test_dynamic_image_size(device):
    model = build("vit", dynamic_img_size=True).to(device).eval()
    images = torch.randn(2, 3, 32, 16, device=device)
    with torch.no_grad():
        expected = model(images)
        accelerate(model)
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)
