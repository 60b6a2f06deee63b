"""torchvision's own ViTs, accelerated."""

import copy
import io

import pytest
import torch
from parity import assert_parity, shake
from torch import nn

from vitkernels import accelerate, explain
from vitkernels.layers import fused

vision_transformer = pytest.importorskip("torchvision.models.vision_transformer")
from torchvision.models import get_model  # noqa: E402

TINY = {
    "image_size": 32,
    "patch_size": 16,
    "num_layers": 2,
    "num_heads": 2,
    "hidden_dim": 32,
    "mlp_dim": 128,
    "num_classes": 5,
}
NAMES = ["vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14"]


def build(**more) -> nn.Module:
    return shake(vision_transformer.VisionTransformer(**{**TINY, **more}))


@pytest.fixture
def images(device):
    return torch.randn(2, 3, 32, 32, device=device)


@pytest.mark.parametrize("training", [False, True])
def test_fp32(training, images, device):
    report = assert_parity(build().to(device).train(training), images)
    assert [(s.module, s.was) for s in report.swapped[:2]] == [
        ("", "VisionTransformer"),
        ("encoder.layers.encoder_layer_0", "EncoderBlock"),
    ]
    assert not [k for k in report.kept if k.known]


def test_bf16(images, device, computed_by_pytorch):
    assert_parity(build(num_layers=1).to(device, torch.bfloat16), images.bfloat16(), gain_counts=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a seed draws other masks where kernels and PyTorch differ")
def test_dropout_drops_what_torchvision_drops(images):
    # Of one image: PyTorch's attention leaves its output with tokens before batch, and masks are drawn in that order.
    assert_parity(build(dropout=0.3).train(), images[:1])


def test_attention_dropout_is_drawn_by_a_seed_and_off_in_eval(images, device):
    model = build(attention_dropout=0.5).to(device)
    expected = copy.deepcopy(model).eval()(images)
    accelerate(model, strict=True)
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(model.train()(images))
    assert torch.equal(draws[0], draws[1])
    assert (draws[0] - draws[2]).abs().max() > 1e-2
    assert (draws[0] - expected).abs().max() > 1e-2
    torch.testing.assert_close(model.eval()(images), expected, rtol=1e-4, atol=1e-4)


def test_blocks_run_fused(images, device, monkeypatch):
    calls = []
    for name in ("block", "patch_embed", "norm"):
        original = getattr(fused, name)
        monkeypatch.setattr(fused, name, lambda *a, f=original, n=name, **k: (calls.append(n), f(*a, **k))[1])
    model = build().to(device).eval()
    accelerate(model)
    model(images)
    assert calls == ["patch_embed", "block", "block", "norm"]


@pytest.mark.parametrize("name", NAMES)
def test_every_name(name):
    with torch.device("meta"):
        model = get_model(name, weights=None)
    accelerate(model, strict=True)
    blocks = [m for m in model.modules() if isinstance(m, vision_transformer.EncoderBlock)]
    assert {type(block).__qualname__ for block in blocks} == {"FusedEncoderBlock"}
    assert type(model).__qualname__ == "FusedVisionTransformer"


def test_state_dict_both_ways_and_old_key_names(images, device):
    model = build().to(device).eval()
    expected, state = model(images), model.state_dict()
    fresh = build().to(device).eval()
    accelerate(fresh)
    fresh.load_state_dict(state)
    torch.testing.assert_close(fresh(images), expected, rtol=1e-4, atol=1e-4)
    old = {k.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2"): v for k, v in state.items()}
    assert old.keys() != state.keys()
    fresh.load_state_dict(old)  # torchvision renames them where the file says nothing of a version
    torch.testing.assert_close(fresh(images), expected, rtol=1e-4, atol=1e-4)
    plain = build().to(device).eval()
    plain.load_state_dict(fresh.state_dict())
    torch.testing.assert_close(plain(images), expected, rtol=0, atol=0)


def test_copies_and_pickles(images, device):
    model = build().to(device).eval()
    accelerate(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for copied in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert type(copied) is type(model)
        assert torch.equal(copied(images), model(images))


def test_compiled_whole(images, device):
    model = build().to(device).eval()
    with torch.no_grad():
        expected = model(images)
        accelerate(model)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(images), expected, rtol=1e-4, atol=1e-4)


def spoil_multihead(**options):
    def spoil(model):
        block = model.encoder.layers[0]
        block.self_attention = nn.MultiheadAttention(32, 2, **{"batch_first": True, **options})

    return spoil


def spoil_hook(model):
    model.encoder.layers[0].self_attention.out_proj.register_forward_hook(lambda *_: None)


def spoil_linear(model):
    model.encoder.layers[0].mlp[0] = nn.Bilinear(4, 4, 4)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (spoil_multihead(batch_first=False), "batch_first=False"),
        (spoil_multihead(add_zero_attn=True), "adds keys of its own"),
        (spoil_multihead(add_bias_kv=True), "its parameters are"),
        (spoil_multihead(kdim=16, vdim=16), "other widths"),
        (spoil_hook, "a hook on self_attention.out_proj"),
        (spoil_linear, "0 is a Bilinear, not exactly Linear"),
    ],
)
def test_kept_with_a_reason(spoil, reason):
    model = build()
    spoil(model)
    kept = {k.module: k.reason for k in explain(model).kept}
    assert reason in kept["encoder.layers.encoder_layer_0"]
    assert "encoder.layers.encoder_layer_1" not in kept
    assert "self_attention" not in " ".join(k for k in kept if "layer_1" in k), "what a block reads is in neither list"


def test_convolutional_stem_is_kept_with_a_reason(device):
    stem = [vision_transformer.ConvStemConfig(8, 3, 16)]
    report = explain(build(conv_stem_configs=stem))
    assert {k.module: k.reason for k in report.kept}[""] == "conv_proj is a Sequential, not exactly Conv2d"


def test_wrong_size_is_torchvisions_to_refuse(device):
    model = build().to(device)
    accelerate(model)
    with pytest.raises(AssertionError, match="Wrong image height! Expected 32 but got 48!"):
        model(torch.randn(1, 3, 48, 48, device=device))
