"""What timm's models do beside classifying: the same on an accelerated model."""

import copy

import pytest
import torch
from torch import nn

from vitkernels import accelerate, restore
from vitkernels.layers import fused
from vitkernels.swap.timm import FusedAttention, FusedBlock, FusedPatchEmbed

timm = pytest.importorskip("timm")

pytestmark = pytest.mark.usefixtures("computed_by_pytorch")  # the ops are other tests'

SIZES = {"img_size": 32, "embed_dim": 32, "num_heads": 2, "depth": 3, "num_classes": 5}
MORE = {"eva": {"num_reg_tokens": 2}}
NAMES = {"vit": "vit_tiny_patch16_224", "eva": "vit_base_patch16_dinov3", "mixed": "vit_small_patch16_rope_mixed_224"}


def build(kind: str, **more) -> nn.Module:
    model = timm.create_model(NAMES[kind], **SIZES | MORE.get(kind, {}) | more).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.fixture(params=["vit", "eva"])
def kind(request):
    return request.param


@pytest.fixture
def pair(kind, device):
    """The plain model, and an accelerated copy."""
    plain = build(kind).to(device)
    fast = copy.deepcopy(plain)
    accelerate(fast)
    return plain, fast


@pytest.fixture
def images(device):
    return torch.randn(2, 3, 32, 32, device=device)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def fused_blocks(monkeypatch):
    """How often a whole block has run fused."""
    calls = []
    original = fused.block

    def spy(*args, **kwargs):
        calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(fused, "block", spy)
    return calls


def close(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_forward_features(pair, images, fused_blocks):
    plain, fast = pair
    close(fast.forward_features(images), plain.forward_features(images))
    assert len(fused_blocks) == 3


def test_forward_intermediates(pair, images):
    plain, fast = pair
    whole = {"indices": [0, 2], "return_prefix_tokens": True}
    for options in (whole, {"indices": 2, "norm": True, "stop_early": True}):
        close(fast.forward_intermediates(images, **options), plain.forward_intermediates(images, **options))


def test_get_intermediate_layers(device, images):
    plain = build("vit").to(device)  # Eva has no such method
    expected = plain.get_intermediate_layers(images, n=2, reshape=True, return_prefix_tokens=True, norm=True)
    accelerate(plain)
    close(plain.get_intermediate_layers(images, n=2, reshape=True, return_prefix_tokens=True, norm=True), expected)


def test_features_only(kind, device, images, fused_blocks):
    options = {k: v for k, v in SIZES.items() if k != "num_classes"} | MORE.get(kind, {})
    model = timm.create_model(NAMES[kind], features_only=True, out_indices=(0, 2), **options).eval().to(device)
    expected = model(images)
    report = accelerate(model)
    assert "model.blocks.0" in {entry.module for entry in report.swapped}
    close(model(images), expected)
    assert len(fused_blocks) == 3


def test_set_input_size_to_a_larger_image(pair, device, fused_blocks):
    plain, fast = pair
    larger = torch.randn(1, 3, 64, 48, device=device)
    for model in pair:
        model.set_input_size(img_size=(64, 48))
    close(fast(larger), plain(larger))
    assert len(fused_blocks) == 3


def test_reset_classifier(pair, images):
    plain, fast = pair
    for model in pair:
        model.reset_classifier(7, "avg")
    fast.head.load_state_dict(plain.head.state_dict())
    assert fast(images).shape == (2, 7)
    close(fast(images), plain(images))


def test_set_grad_checkpointing(pair, images, fused_blocks):
    gradients = []
    for model in pair:
        model.set_grad_checkpointing()
        model.train()
        with torch.enable_grad():
            model(images).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    close(gradients[1], gradients[0])
    assert len(fused_blocks) == 6, "each block runs again in backward"


def test_prune_intermediate_layers(pair, images):
    plain, fast = pair
    assert fast.prune_intermediate_layers(indices=[1], prune_norm=True) == plain.prune_intermediate_layers(
        indices=[1], prune_norm=True
    )
    assert len(fast.blocks) == 2
    close(fast.forward_features(images), plain.forward_features(images))


@pytest.mark.parametrize("kind", NAMES)
def test_patch_dropout(kind, device, fused_blocks):
    """With RoPE the tables are then each image's own, and with learned ones each head's and image's."""
    plain = build(kind, img_size=64, patch_drop_rate=0.5)
    plain = plain.to(device).train()
    images = torch.randn(2, 3, 64, 64, device=device)
    torch.manual_seed(3)
    expected = plain(images)
    torch.manual_seed(4)
    assert not torch.allclose(plain(images), expected, atol=1e-3)
    accelerate(plain)
    torch.manual_seed(3)
    close(plain(images), expected)
    assert len(fused_blocks) == 3


def test_no_weight_decay_and_group_matcher(pair):
    plain, fast = pair
    assert fast.no_weight_decay() == plain.no_weight_decay()
    assert fast.group_matcher() == plain.group_matcher()
    group = timm.models.group_parameters
    assert group(fast, fast.group_matcher(coarse=True)) == group(plain, plain.group_matcher(coarse=True))


def test_built_of_fused_classes(device, images, fused_blocks):
    """As timm's constructor arguments, for who would rather build than accelerate."""
    torch.manual_seed(0)
    plain = build("vit").to(device)
    torch.manual_seed(0)
    built = build("vit", block_fn=FusedBlock, embed_layer=FusedPatchEmbed).to(device)
    close(built(images), plain(images))
    assert len(fused_blocks) == 3
    torch.manual_seed(0)
    attends = build("vit", attn_layer=FusedAttention).to(device)
    assert type(attends.blocks[0].attn) is FusedAttention
    close(attends(images), plain(images))
    report = accelerate(built)
    assert "blocks.0" in {entry.module for entry in report.swapped}
    restore(built)
    assert [type(m) for m in built.modules()] == [type(m) for m in plain.modules()]


def naflex(device, **more) -> nn.Module:
    options = {"embed_dim": 32, "num_heads": 2, "depth": 2, "num_classes": 5} | more
    model = timm.create_model("naflexvit_base_patch16_gap", **options).to(device).eval()
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def naflex_batch(device) -> dict[str, torch.Tensor]:
    """Two images of 2×3 and 3×1 patches, padded to 7."""
    coords = torch.zeros(2, 7, 2, dtype=torch.long)
    valid = torch.zeros(2, 7, dtype=torch.bool)
    for i, (Y, X) in enumerate([(2, 3), (3, 1)]):
        coords[i, : Y * X] = torch.cartesian_prod(torch.arange(Y), torch.arange(X))
        valid[i, : Y * X] = True
    batch = {"patches": torch.randn(2, 7, 16 * 16 * 3), "patch_coord": coords, "patch_valid": valid}
    return {key: tensor.to(device) for key, tensor in batch.items()}


NAFLEX = {
    "plain": {},
    "axial": {"rope_type": "axial"},
    "half": {"rope_type": "dinov3", "rope_rotate_half": True},
    "key only": {"use_key_only_attn_mask": True},
    "mixed": {"rope_type": "mixed"},
    "attention pooling": {"global_pool": "map"},
}


@pytest.mark.parametrize("form", NAFLEX)
def test_naflex_packs_images_of_different_size(form, device, monkeypatch):
    model = naflex(device, **NAFLEX[form])
    batch = naflex_batch(device)

    def run():
        model.zero_grad()
        with torch.enable_grad():
            logits = model(batch)
            logits.square().sum().backward()
        return logits.detach(), [p.grad.clone() for p in model.parameters()]

    expected = run()
    accelerate(model)
    seen = []
    original = fused.block
    monkeypatch.setattr(fused, "block", lambda *a, **k: seen.append((a[1].shape, k["attn_mask"])) or original(*a, **k))
    close(run(), expected)
    packed = form != "mixed"
    prefix = model.num_prefix_tokens
    assert [shape for shape, _ in seen] == [(1, 9 + 2 * prefix, 32) if packed else (2, 7 + prefix, 32)] * 2
    assert all(isinstance(mask, fused.Packed) == packed for _, mask in seen)


def test_naflex_drops_the_images_that_timm_drops(device):
    model = naflex(device, drop_path_rate=0.6, init_values=0.5).train()
    batch = naflex_batch(device)
    draws = []
    for seed in range(3):
        torch.manual_seed(seed)
        draws.append(model(batch))
    accelerate(model)
    for seed, expected in enumerate(draws):
        torch.manual_seed(seed)
        close(model(batch), expected)


def test_naflex_shows_padded_tokens_to_hooks(device):
    model = naflex(device)
    batch = naflex_batch(device)
    logits = model(batch)
    accelerate(model)
    shapes = []
    model.blocks[0].register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    close(model(batch), logits)
    assert shapes == [(2, 7 + model.num_prefix_tokens, 32)]


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("form", ["plain", "axial", "mixed"])
def test_naflex_intermediates_are_those_of_timm_and_agree_with_the_features(form, norm, device):
    """With images packed, padding is 0 in both; else it is in both what timm leaves there."""
    model = naflex(device, **NAFLEX[form])
    batch = naflex_batch(device)
    R, valid = model.num_prefix_tokens, batch["patch_valid"]
    options = {"output_fmt": "NLC", "return_prefix_tokens": True, "norm": norm}
    expected = model.forward_intermediates(batch, output_dict=True, **options)
    accelerate(model)
    found = model.forward_intermediates(batch, output_dict=True, **options)
    features = model.forward_features(**batch)
    assert found.keys() == expected.keys()
    assert torch.allclose(found["image_features"], features["patches"])
    assert torch.equal(found["patch_valid"], features["patch_valid"])
    close(found["image_features"][:, :R], expected["image_features"][:, :R])
    close(found["image_features"][:, R:][valid], expected["image_features"][:, R:][valid])
    for i in range(2):
        close(found["image_intermediates_prefix"][i], expected["image_intermediates_prefix"][i])
        close(found["image_intermediates"][i][valid], expected["image_intermediates"][i][valid])
        assert found["image_intermediates"][i][~valid].any() == (form == "mixed")

    final, intermediates = model.forward_intermediates(batch, **options)
    assert torch.equal(final, found["image_features"])
    for i, (patches, prefix) in enumerate(intermediates):
        assert torch.equal(patches, found["image_intermediates"][i])
        assert torch.equal(prefix, found["image_intermediates_prefix"][i])
    first = model.forward_intermediates(
        batch, [0], stop_early=True, intermediates_only=True, output_fmt="NLC", norm=norm
    )
    assert torch.equal(first[0], found["image_intermediates"][0])


def test_naflex_intermediates_are_refused_as_by_timm(device):
    model = naflex(device, patch_drop_rate=0.3)
    batch = naflex_batch(device)
    accelerate(model)
    with pytest.raises(ValueError, match="NCHW"):
        model.forward_intermediates(batch)
    model.train()
    with pytest.raises(ValueError, match="patch dropout"):
        model.forward_intermediates(batch, output_fmt="NLC")
    found = model.forward_intermediates(batch, output_fmt="NLC", output_dict=True)
    assert found["image_intermediates"][0].shape[:2] == found["patch_valid"].shape


def test_naflex_intermediates_pass_gradients_on(device):
    model = naflex(device)
    batch = naflex_batch(device)
    valid = batch["patch_valid"][..., None]
    gradients = []
    for step in range(2):
        model.zero_grad()
        with torch.enable_grad():
            found = model.forward_intermediates(batch, output_fmt="NLC", intermediates_only=True)
            sum((x * valid).square().sum() for x in found).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        if step == 0:
            accelerate(model)
            model.set_grad_checkpointing()
    close(gradients[1], gradients[0])


def test_naflex_goes_by_a_mask_of_the_users_own(device):
    model = naflex(device)
    batch = naflex_batch(device)
    N = 7 + model.num_prefix_tokens
    mask = torch.rand(2, 1, N, N, device=device) > 0.3
    mask |= torch.eye(N, dtype=torch.bool, device=device)
    expected = model(batch | {"attn_mask": mask})
    accelerate(model)
    close(model(batch | {"attn_mask": mask}), expected)


def test_naflex_with_checkpointing_and_patch_dropout(device):
    model = naflex(device, patch_drop_rate=0.3).train()
    batch = naflex_batch(device)
    gradients = []
    for step in range(2):
        torch.manual_seed(0)
        model.zero_grad()
        with torch.enable_grad():
            model(batch).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        if step == 0:
            accelerate(model)
            model.set_grad_checkpointing()
    close(gradients[1], gradients[0])
