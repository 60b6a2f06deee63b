"""VisionTransformer against timm's: keys, logits, gradients, and what a user may do to a model."""

import copy
import functools
import math

import pytest
import torch
from agreement import (
    KERNELS,
    assert_agree,
    assert_follows_the_seed,
    assert_weights_start_alike,
    images_for,
    make_pair,
    outputs_and_gradients,
)
from torch import nn

import vitkernels
from vitkernels import layers
from vitkernels.models import VisionTransformer

timm = pytest.importorskip("timm")
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer  # noqa: E402

pytestmark = pytest.mark.usefixtures("plain_pytorch")

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
CASES = {
    "plain": {},
    "deit3": {"init_values": 0.1, "no_embed_class": True},
    "dinov2_reg": {"init_values": 0.1, "no_embed_class": True, "reg_tokens": 4},
    "reg_in_pos_embed": {"reg_tokens": 2, "qkv_bias": False},
    "siglip": {"class_token": False, "global_pool": "avg", "embed_dim": 72, "num_heads": 1, "fc_norm": False},
    "clip": {"pre_norm": True, "act_layer": "quick_gelu", "norm_layer": functools.partial(nn.LayerNorm, eps=1e-5)},
    "avg": {"global_pool": "avg"},
    "avg_with_prefix": {"global_pool": "avg", "pool_include_prefix": True, "reg_tokens": 1},
    "avgmax": {"global_pool": "avgmax"},
    "max": {"global_pool": "max", "class_token": False},
    "no_pool": {"global_pool": ""},
    "token_fc_norm": {"fc_norm": True},
    "no_final_norm": {"final_norm": False},
    "no_pos_embed": {"pos_embed": "none", "act_layer": "silu", "proj_bias": False},
    "oblong": {"img_size": (24, 40), "patch_size": (8, 4), "act_layer": "gelu_tanh", "mlp_ratio": 3.0},
    "qk_norm": {"qk_norm": True, "qkv_bias": False},
    "grey_no_head": {"in_chans": 1, "num_classes": 0},
}
# What the kernels run at: the size that the tests of swapped models share.
FEW = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "num_heads": 2}
FULL_SIZE = [
    "vit_tiny_patch16_224",
    "vit_small_patch16_224",
    "vit_base_patch16_224",
    "deit3_small_patch16_224",
    "vit_small_patch14_reg4_dinov2",
    "vit_base_patch32_clip_quickgelu_224",
]


def _pair(device="cpu", **kwargs):
    return make_pair(VisionTransformer, TimmVisionTransformer, device, **SMALL | kwargs)


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_agree_with_timm(name):
    ours, theirs = _pair(**CASES[name])
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert_agree(ours, theirs, images_for(theirs))


@pytest.mark.parametrize("name", ["dinov2_reg", "clip"])
def test_logits_and_gradients_agree_with_timm_through_the_kernels(name, device):
    pytest.importorskip("triton")
    more = {"dinov2_reg": {"reg_tokens": 2}, "clip": {}}
    ours, theirs = _pair(device, **CASES[name] | FEW | more[name], depth=1)
    with vitkernels.use_backend(KERNELS):
        assert_agree(ours, theirs, images_for(theirs))


@pytest.mark.parametrize("size", [(48, 48), (32, 40), (24, 24), (32, 32)])
@pytest.mark.parametrize("case", ["plain", "dinov2_reg", "siglip"])
def test_other_image_sizes_agree_with_timm(case, size):
    ours, theirs = _pair(dynamic_img_size=True, **CASES[case])
    assert_agree(ours, theirs, images_for(theirs, size=size))


@pytest.mark.parametrize("case", ["plain", "dinov2_reg"])
def test_set_input_size_agrees_with_timm_and_trains(case):
    ours, theirs = _pair(**CASES[case])
    for model in (ours, theirs):
        model.set_input_size(img_size=(48, 40))
    torch.testing.assert_close(ours.pos_embed, theirs.pos_embed, rtol=0, atol=0)
    assert_agree(ours, theirs, images_for(theirs))
    fresh = VisionTransformer(**SMALL | CASES[case] | {"img_size": (48, 40)})
    fresh.load_state_dict(ours.state_dict(), strict=True)

    images, labels = images_for(ours, batch=4), torch.arange(4)
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.05)
    losses = []
    for _ in range(4):
        loss = nn.functional.cross_entropy(ours(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert ours.pos_embed.grad.abs().min() > 0
    with pytest.raises(ValueError, match="does not divide"):
        ours.set_input_size(50)
    with pytest.raises(NotImplementedError, match="patch_size is 4"):
        ours.set_input_size(patch_size=4)


@pytest.mark.parametrize(
    "options", [{"drop_path_rate": 0.5}, {"patch_drop_rate": 0.5}, {"pos_drop_rate": 0.2, "drop_rate": 0.2}]
)
def test_random_parts_follow_the_seed_as_in_timm(options):
    ours, theirs = _pair(reg_tokens=1, init_values=0.5, **options)
    assert_follows_the_seed(ours, theirs, images_for(theirs, batch=6))


@pytest.mark.parametrize("rate", ["proj_drop_rate", "attn_drop_rate"])
def test_dropout_in_the_blocks_is_active_in_training_only(rate):
    model, _ = _pair(**{rate: 0.5})
    images = images_for(model)
    assert torch.equal(model(images), model(images))
    model.train()
    assert not torch.equal(model(images), model(images))


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_state_dicts_have_timm_keys_and_shapes(name):
    from timm.models import create_model

    theirs = create_model(name, device="meta")
    kwargs = {
        "img_size": theirs.patch_embed.img_size,
        "patch_size": theirs.patch_embed.patch_size,
        "embed_dim": theirs.embed_dim,
        "depth": len(theirs.blocks),
        "num_heads": theirs.blocks[0].attn.num_heads,
        "num_classes": theirs.num_classes,
    }
    if "deit3" in name:
        kwargs |= {"no_embed_class": True, "init_values": 1e-6}
    if "dinov2" in name:
        kwargs |= {"no_embed_class": True, "init_values": 1e-5, "reg_tokens": 4}
    if "clip" in name:
        kwargs |= {"pre_norm": True, "act_layer": "quick_gelu"}
    ours = VisionTransformer(**kwargs, device="meta")
    shapes = {key: tuple(value.shape) for key, value in ours.state_dict().items()}
    assert shapes == {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    assert list(shapes) == list(theirs.state_dict())


START = {"img_size": 32, "patch_size": 8, "depth": 1, "embed_dim": 192, "num_heads": 3, "reg_tokens": 64}
START["init_values"] = 0.01


def test_weights_start_as_in_timm():
    assert_weights_start_alike(VisionTransformer(**START), TimmVisionTransformer(**START), means=0.2)


@pytest.mark.parametrize("name", ["SwiGLU", "SwiGLUPacked"])
def test_weights_of_gated_mlps_start_as_in_timm(name):
    ours = VisionTransformer(**START, act_layer="silu", mlp_layer=getattr(layers, name))
    assert_weights_start_alike(
        ours, TimmVisionTransformer(**START, act_layer=nn.SiLU, mlp_layer=getattr(timm.layers, name))
    )


def test_intermediates_agree_with_timm_in_every_form():
    ours, theirs = _pair(depth=3, reg_tokens=1)
    images = images_for(theirs)
    for options in (
        {},
        {"indices": 2},
        {"indices": [0, -1], "norm": True},
        {"indices": [0], "stop_early": True, "intermediates_only": True},
        {"output_fmt": "NLC", "return_prefix_tokens": True},
        {"output_dict": True, "return_prefix_tokens": True},
        {"output_dict": True, "intermediates_only": True},
    ):
        mine = ours.forward_intermediates(images, **options)
        other = theirs.forward_intermediates(images, **options)
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5, msg=str(options))
    for options in ({}, {"n": [0, 2], "reshape": True}, {"n": 2, "return_prefix_tokens": True, "norm": True}):
        mine = ours.get_intermediate_layers(images, **options)
        torch.testing.assert_close(mine, theirs.get_intermediate_layers(images, **options), rtol=1e-5, atol=1e-5)
    for bad in ({"indices": 4}, {"indices": [3]}, {"output_fmt": "NHWC"}):
        with pytest.raises(ValueError, match="expected"):
            ours.forward_intermediates(images, **bad)


def test_parts_of_forward_agree_with_timm():
    ours, theirs = _pair(global_pool="avg")
    images = images_for(theirs)
    features = ours.forward_features(images)
    torch.testing.assert_close(features, theirs.forward_features(images), rtol=1e-5, atol=1e-5)
    for options in ({}, {"pre_logits": True}):
        torch.testing.assert_close(ours.forward_head(features, **options), theirs.forward_head(features, **options))
    assert ours.no_weight_decay() | {"dist_token"} == theirs.no_weight_decay()
    assert ours.group_matcher() == theirs.group_matcher()


def test_reset_classifier():
    model, _ = _pair()
    images = images_for(model)
    assert model.get_classifier() is model.head
    model.reset_classifier(7, "avg")
    assert model(images).shape == (2, 7)
    model.reset_classifier(0, "")
    assert torch.equal(model(images), model.forward_features(images))
    with pytest.raises(ValueError, match="unknown pool 'sum'"):
        model.reset_classifier(7, "sum")


@pytest.mark.parametrize("backend", ["torch", KERNELS])
def test_gradient_checkpointing_gives_the_same_gradients(backend, device):
    """Whatever is dropped is drawn again: attention's weights by a seed of the kernels' own."""
    norm = functools.partial(nn.LayerNorm, eps=1e-5)  # with the dropout, what test_layers.py compiles
    model, _ = _pair(device, drop_path_rate=0.3, init_values=0.5, attn_drop_rate=0.4, norm_layer=norm, **FEW)
    model.train()
    images, upstream, results = images_for(model, batch=3), None, []
    with vitkernels.use_backend(backend):
        for enable in (False, True):
            model.set_grad_checkpointing(enable)
            torch.manual_seed(3)
            result, upstream = outputs_and_gradients(model, images, upstream)
            results.append(result)
    for name in results[0]:
        assert torch.equal(results[0][name], results[1][name]), name


def test_gradient_checkpointing_runs_each_block_again():
    model, _ = _pair()
    calls = []
    model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    model.set_grad_checkpointing()
    model(images_for(model)).sum().backward()
    assert len(calls) == 2


def test_representation_size_puts_a_tanh_layer_before_the_head():
    model = VisionTransformer(**SMALL, representation_size=20).eval()
    assert model.pre_logits.fc.weight.shape == (20, 48)
    assert model.head.weight.shape == (5, 20) and model.head_hidden_size == 20
    images = images_for(model)
    hidden = torch.tanh(model.forward_features(images)[:, 0] @ model.pre_logits.fc.weight.T + model.pre_logits.fc.bias)
    torch.testing.assert_close(model.forward_head(model.forward_features(images), pre_logits=True), hidden)
    torch.testing.assert_close(model(images), hidden @ model.head.weight.T + model.head.bias)


def test_sincos1d_is_the_table_of_the_paper():
    model = VisionTransformer(**SMALL, pos_embed="sincos1d", reg_tokens=1)
    assert model.pos_embed.shape == (1, 18, 48)
    for position in range(18):
        for i in range(24):
            angle = position / 10000 ** (2 * i / 48)
            assert model.pos_embed[0, position, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert model.pos_embed[0, position, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)


@pytest.mark.parametrize("no_embed_class", [False, True])
def test_sincos2d_is_the_table_of_mae(no_embed_class):
    model = VisionTransformer(**SMALL | {"img_size": (24, 32)}, pos_embed="sincos2d", no_embed_class=no_embed_class)
    table = model.pos_embed[0]
    if not no_embed_class:
        assert not table[0].any()
        table = table[1:]
    assert table.shape == (12, 48)
    for row in range(3):
        for column in range(4):
            for i in range(12):
                omega = 10000 ** (-i / 12)
                expected = [f(p * omega) for p in (column, row) for f in (math.sin, math.cos)]
                assert table[4 * row + column, i::12].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kind", ["sincos1d", "sincos2d"])
def test_fixed_tables_are_saved_and_resampled_but_not_trained(kind):
    model = VisionTransformer(**SMALL, pos_embed=kind).eval()
    learned, theirs = VisionTransformer(**SMALL).eval(), TimmVisionTransformer(**SMALL).eval()
    for other in (learned, theirs):
        other.load_state_dict(model.state_dict(), strict=True)
    images = images_for(model)
    torch.testing.assert_close(model(images), theirs(images), rtol=1e-5, atol=1e-5)
    assert "pos_embed" not in dict(model.named_parameters())
    for m in (model, theirs):
        m.set_input_size(48)
    assert not isinstance(model.pos_embed, nn.Parameter) and "pos_embed" in model.state_dict()
    torch.testing.assert_close(model.pos_embed, theirs.pos_embed.detach(), rtol=0, atol=0)
    again = VisionTransformer(**SMALL | {"img_size": 48}, pos_embed=kind).eval()
    again.load_state_dict(model.state_dict(), strict=True)
    larger = images_for(model)
    assert torch.equal(again(larger), model(larger))


def test_a_copy_a_pickle_and_another_dtype_work():
    import io

    model, _ = _pair(init_values=0.1, drop_path_rate=0.1)
    images = images_for(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(images), model(images))
    assert model.bfloat16()(images.bfloat16()).dtype == torch.bfloat16
    assert VisionTransformer(**SMALL, dtype=torch.float64)(images.double()).dtype == torch.float64


def test_an_empty_batch_gives_no_logits():
    model, _ = _pair()
    assert model(torch.empty(0, 3, 32, 32)).shape == (0, 5)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(3, 32, 32), ValueError, r"shape \(3, 32, 32\); expected \(batch, channels, height, width\)"),
        (torch.zeros(1, 1, 32, 32), ValueError, "1 channels; expected 3"),
        (torch.zeros(1, 3, 32, 40), ValueError, "32×40 pixels; expected 32×32"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), TypeError, "torch.uint8; expected floating-point"),
        ([[0.0]], TypeError, "list; expected floating-point"),
    ],
)
def test_bad_images_are_refused(images, error, message):
    with pytest.raises(error, match=message):
        VisionTransformer(**SMALL)(images)


@pytest.mark.parametrize("size", [(30, 32), (32, 30), (4, 32), (0, 32)])
def test_images_that_the_patch_does_not_divide_are_refused(size):
    with pytest.raises(ValueError, match=f"{size[0]}×{size[1]} pixels does not divide into patches of 8×8"):
        VisionTransformer(**SMALL, dynamic_img_size=True)(torch.zeros(1, 3, *size))


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"img_size": 30}, ValueError, "does not divide"),
        ({"num_heads": 5}, ValueError, "num_heads 5 does not divide dim 48"),
        ({"class_token": False}, ValueError, "'token' pool needs a class token"),
        ({"global_pool": "sum"}, ValueError, "unknown pool 'sum'"),
        ({"global_pool": "map"}, NotImplementedError, "attention pooling"),
        ({"pos_embed": "rope"}, ValueError, "unknown pos_embed 'rope'; expected one of learn"),
        ({"pos_embed": "sincos1d", "embed_dim": 45}, ValueError, "even number"),
        ({"pos_embed": "sincos2d", "embed_dim": 54}, ValueError, "4 divides, got 54"),
        ({"act_layer": "relu"}, ValueError, "unknown act_layer 'relu'; expected one of gelu"),
        ({"act_layer": nn.ReLU}, NotImplementedError, "ReLU"),
        ({"norm_layer": "rmsnorm"}, NotImplementedError, "rmsnorm"),
        ({"norm_layer": nn.RMSNorm}, NotImplementedError, "RMSNorm"),
        ({"attn_drop_rate": 1.1}, ValueError, "probability has to be between 0 and 1"),
        ({"scale_attn_norm": True}, NotImplementedError, "scale_attn_norm=True is not supported"),
        (
            {"mlp_layer": timm.layers.Mlp, "act_layer": nn.GELU},
            NotImplementedError,
            "makes a Mlp; expected one of this",
        ),
        ({"weight_init": "jax"}, NotImplementedError, "weight_init is 'jax'"),
        ({"colour": 1}, TypeError, "no argument 'colour'"),
        ({"drop_path_rate": 1.5}, ValueError, "drop_prob is 1.5"),
        ({"patch_drop_rate": 1.0}, ValueError, "prob is 1.0"),
    ],
)
def test_bad_arguments_are_refused(kwargs, error, message):
    with pytest.raises(error, match=message):
        VisionTransformer(**SMALL | kwargs)
