"""SwinTransformer and SwinTransformerV2 against timm's: keys, logits, gradients, and what a user may do to a model."""

import copy
import functools
import io

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
from vitkernels.models import SwinTransformer, SwinTransformerV2

timm = pytest.importorskip("timm")
from timm.models import SwinTransformer as TimmSwin  # noqa: E402
from timm.models import SwinTransformerV2 as TimmSwinV2  # noqa: E402

pytestmark = pytest.mark.usefixtures("plain_pytorch")

VERSIONS = {"v1": (SwinTransformer, TimmSwin), "v2": (SwinTransformerV2, TimmSwinV2)}
SMALL = {"img_size": 32, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4, "num_classes": 5}
CASES = {
    "whole windows": {},
    "padded": {"img_size": (40, 28), "window_size": (4, 3)},
    "windows of stages": {"window_size": (2, 3), "always_partition": True, "global_pool": "avgmax"},
    "larger than the image": {"window_size": ((5, 3), 9), "always_partition": True, "global_pool": "max"},
    "no pool, grey": {"in_chans": 1, "num_classes": 0, "global_pool": "", "qkv_bias": False},
    "odd stages": {"img_size": (36, 28), "window_size": 2, "mlp_ratio": 2.0, "patch_size": (4, 2)},
}
OF_V1 = {"head dims": {"head_dim": (8, 16), "mlp_ratio": (2.0, 3.0)}}
OF_V2 = {"measured": {"pretrained_window_sizes": (6, 3), "act_layer": "gelu_tanh"}}
ALL = [(v, n, c) for v in VERSIONS for n, c in (CASES | (OF_V1 if v == "v1" else OF_V2)).items()]
EACH = pytest.mark.parametrize("version", VERSIONS)


def pair(version, device="cpu", **kwargs):
    return make_pair(*VERSIONS[version], device, **SMALL | {"drop_path_rate": 0.0} | kwargs)


@pytest.mark.parametrize(("version", "case", "options"), ALL, ids=lambda value: value if isinstance(value, str) else "")
def test_logits_and_gradients_agree_with_timm(version, case, options):
    if case == "windows of stages":  # timm reads two numbers as rows and columns
        options = options | {"window_size": ((2, 2), (3, 3))}
    ours, theirs = pair(version, **options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert_agree(ours, theirs, images_for(theirs))


@EACH
def test_logits_and_gradients_agree_with_timm_through_the_kernels(version, device):
    pytest.importorskip("triton")
    cut = {"img_size": (40, 28), "window_size": (4, 3), "embed_dim": 32, "depths": (2,), "num_heads": (2,)}
    ours, theirs = pair(version, device, **cut)
    with vitkernels.use_backend(KERNELS):
        assert_agree(ours, theirs, images_for(theirs))


@EACH
def test_set_input_size_agrees_with_timm(version):
    ours, theirs = pair(version)
    for options in (
        {"img_size": (48, 40)},
        {"img_size": 32, "window_ratio": (2, 4)},
        {"img_size": 64, "window_size": ((3, 4), (4, 4)), "always_partition": True},
        {"window_ratio": 2, "always_partition": False},
        {},
        {"img_size": 40, "patch_size": 4},
    ):
        for model in (ours, theirs):
            model.set_input_size(**options)
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6, msg=str(options))
        theirs.load_state_dict(ours.state_dict(), strict=True)
        images = images_for(theirs)
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-5, msg=str(options))
    with pytest.raises(ValueError, match="does not divide"):
        ours.set_input_size(50)
    with pytest.raises(NotImplementedError, match="patch_size is 8"):
        ours.set_input_size(patch_size=8)
    with pytest.raises(ValueError, match=r"window_size is .*; expected one number, or one for each of 2 stages"):
        ours.set_input_size(64, window_size=(1, 2, 3))
    with pytest.raises(ValueError, match="window_ratio is 0"):
        ours.set_input_size(64, window_ratio=0)
    assert ours.patch_embed.img_size == (40, 40), "nothing changed by what is refused"


@EACH
def test_any_size_of_image_agrees_with_timm(version):
    for argument in ({"dynamic_img_size": True}, {"strict_img_size": False}):
        ours, theirs = pair(version, **argument)
        assert ours.dynamic_img_size
        for size in ((32, 32), (44, 36), (16, 64)):
            images = images_for(theirs, size=size)
            torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-5)


@EACH
@pytest.mark.parametrize("options", [{"drop_path_rate": 0.5}, {"drop_rate": 0.4}], ids=str)
def test_random_parts_follow_the_seed_as_in_timm(version, options):
    ours, theirs = pair(version, **options)
    assert_follows_the_seed(ours, theirs, images_for(theirs, batch=6))


@EACH
@pytest.mark.parametrize("rate", ["proj_drop_rate", "attn_drop_rate"])
def test_dropout_in_the_blocks_is_active_in_training_only(version, rate):
    """A window's elements are not drawn in timm's order, as no window is ever made."""
    model, _ = pair(version, **{rate: 0.5})
    images = images_for(model)
    assert torch.equal(model(images), model(images))
    model.train()
    assert not torch.equal(model(images), model(images))


@EACH
def test_default_arguments_are_timms(version):
    ours, theirs = (cls(device="meta") for cls in VERSIONS[version])
    shapes = [[(name, tuple(tensor.shape)) for name, tensor in m.state_dict().items()] for m in (ours, theirs)]
    assert shapes[0] == shapes[1]
    rates = [[m.drop_prob for m in model.modules() if hasattr(m, "drop_prob")] for model in (ours, theirs)]
    assert rates[0] == rates[1] and len(rates[0]) == 22
    assert {m.eps for m in ours.modules() if isinstance(m, nn.LayerNorm)} == {1e-5}
    assert ours.feature_info == theirs.feature_info
    for name in (
        "num_features",
        "embed_dim",
        "num_layers",
        "head_hidden_size",
        "global_pool",
        "output_fmt",
        "in_chans",
    ):
        assert getattr(ours, name) == getattr(theirs, name), name


@pytest.mark.parametrize(
    "name",
    [
        "swin_base_patch4_window12_384",
        "swin_s3_tiny_224",
        "swinv2_tiny_window8_256",
        "swinv2_base_window12to24_192to384",
    ],
)
def test_full_size_models_have_timms_keys_and_shapes(name):
    with torch.device("meta"):
        theirs = timm.create_model(name)
    ours = (SwinTransformerV2 if "v2" in name else SwinTransformer).from_timm(theirs)
    shapes = [[(name, tuple(tensor.shape)) for name, tensor in m.state_dict().items()] for m in (ours, theirs)]
    assert shapes[0] == shapes[1]


@EACH
def test_weights_start_as_in_timm(version):
    cut = SMALL | {"img_size": 64, "embed_dim": 96, "num_heads": (6, 12), "window_size": 8}
    assert_weights_start_alike(*(cls(**cut) for cls in VERSIONS[version]))


@EACH
def test_timm_and_back(version, tmp_path):
    ours_class, _ = VERSIONS[version]
    _, theirs = pair(version, img_size=(40, 28), window_size=7)
    ours = ours_class.from_timm(theirs).eval()
    images = images_for(theirs)
    assert torch.equal(ours(images), theirs(images)) or torch.allclose(ours(images), theirs(images), atol=1e-5)
    back = ours.to_timm()
    assert type(back) is type(theirs) and torch.equal(back(images), theirs(images))
    features = ours_class.from_timm(theirs, features_only=True).eval()(images)
    torch.testing.assert_close(features, theirs.forward_features(images), rtol=1e-4, atol=1e-5)
    for model in (ours, theirs):
        model.set_input_size((64, 32))
    larger = images_for(theirs)
    torch.testing.assert_close(ours(larger), theirs(larger), rtol=1e-4, atol=1e-5)
    again = ours_class.from_timm(theirs).eval()
    torch.testing.assert_close(again(larger), theirs(larger), rtol=1e-4, atol=1e-5)

    name = {"v1": "swin_tiny_patch4_window7_224", "v2": "swinv2_tiny_window8_256"}[version]
    _, theirs = pair(version)
    torch.save(theirs.state_dict(), tmp_path / "model.pth")
    read = ours_class.from_timm(tmp_path / "model.pth", architecture=name, **SMALL).eval()
    images = images_for(theirs)
    torch.testing.assert_close(read(images), theirs(images), rtol=1e-4, atol=1e-5)


def test_timm_models_that_do_not_fit():
    def made(name, **more):
        return timm.create_model(name, **SMALL | more)

    for cls, model, reason in (
        (SwinTransformerV2, made("swin_tiny_patch4_window7_224"), "the model is a SwinTransformer; expected a"),
        (SwinTransformer, made("swinv2_tiny_window8_256"), "the model is a SwinTransformerV2; expected a"),
        (
            SwinTransformer,
            made("swin_tiny_patch4_window7_224", norm_layer=timm.layers.RmsNorm),
            "patch_embed.norm is a RmsNorm",
        ),
    ):
        with pytest.raises(NotImplementedError, match=reason):
            cls.from_timm(model)
    replaced = made("swin_tiny_patch4_window7_224")
    for block in replaced.layers[0].blocks:
        block.mlp.act = nn.ReLU()
    with pytest.raises(NotImplementedError, match="the activation is a ReLU"):
        SwinTransformer.from_timm(replaced)
    with pytest.raises(NotImplementedError, match="no normalize"):
        SwinTransformer(**SMALL, normalize=((0.5,) * 3, (0.5,) * 3)).to_timm()


@EACH
def test_intermediates_agree_with_timm_in_every_form(version):
    ours, theirs = pair(version, depths=(1, 1, 1), num_heads=(2, 4, 8))
    images = images_for(theirs)
    for options in (
        {},
        {"indices": 2, "norm": True},
        {"indices": [0, -1]},
        {"indices": [0], "stop_early": True},
        {"indices": [1], "stop_early": True, "intermediates_only": True},
    ):
        mine = ours.forward_intermediates(images, **options)
        other = theirs.forward_intermediates(images, **options)
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5, msg=str(options))
    for bad in ({"indices": 4}, {"indices": [3]}, {"output_fmt": "NLC"}):
        with pytest.raises(ValueError, match="expected"):
            ours.forward_intermediates(images, **bad)


@EACH
def test_parts_of_forward_agree_with_timm(version):
    ours, theirs = pair(version)
    images = images_for(theirs)
    features = ours.forward_features(images)
    assert features.shape == (2, 4, 4, 32)
    torch.testing.assert_close(features, theirs.forward_features(images), rtol=1e-4, atol=1e-5)
    for options in ({}, {"pre_logits": True}):
        torch.testing.assert_close(ours.forward_head(features, **options), theirs.forward_head(features, **options))
    assert ours.no_weight_decay() == theirs.no_weight_decay() != set()
    for coarse in (False, True):
        groups = ours.group_matcher(coarse), theirs.group_matcher(coarse)
        assert groups[0]["blocks"] == groups[1]["blocks"]


@EACH
def test_reset_classifier(version):
    model, theirs = pair(version)
    images = images_for(model)
    assert model.get_classifier() is model.head.fc
    for each in (model, theirs):
        each.reset_classifier(7, "max")
    assert model(images).shape == (2, 7)
    assert list(model.state_dict()) == list(theirs.state_dict())
    model.reset_classifier(0, "")
    assert torch.equal(model(images), model.forward_features(images))
    with pytest.raises(ValueError, match="unknown pool 'sum'"):
        model.reset_classifier(7, "sum")
    assert model.global_pool == "" and model.num_classes == 0, "nothing changed by what is refused"


@EACH
def test_gradient_checkpointing_runs_each_block_again_and_gives_the_same_gradients(version):
    model, _ = pair(version, drop_path_rate=0.3, attn_drop_rate=0.4)
    model.train()
    images, upstream, results, calls = images_for(model, batch=3), None, [], []
    model.layers[1].blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        torch.manual_seed(3)
        result, upstream = outputs_and_gradients(model, images, upstream)
        results.append(result)
    assert len(calls) == 3
    for name in results[0]:
        assert torch.equal(results[0][name], results[1][name]), name


class Doubled(nn.Linear):
    """An adapter that a forward which reads its weight would skip."""

    def forward(self, x):
        return 2 * super().forward(x)


@EACH
def test_an_adapter_or_a_hook_on_any_layer_counts(version):
    ours, theirs = pair(version, img_size=(40, 28), window_size=(4, 3))
    for path in ("attn.qkv", "attn.proj", "mlp.fc1"):
        for model in (ours, theirs):
            layer = model.layers[0].blocks[1].get_submodule(path)
            if version == "v1" or path != "attn.qkv":  # timm's V2 reads the weight of its qkv itself
                layer.__class__ = Doubled
    called = []
    ours.layers[0].blocks[1].norm1.register_forward_hook(lambda *_: called.append(1))
    ours.layers[1].blocks[1].attn.qkv.register_forward_hook(lambda *_: called.append(1))
    assert_agree(ours, theirs, images_for(theirs))
    # Padded images are projected once more, for what stands in their padding.
    assert len(called) == 3


def test_a_hook_on_the_dropout_of_weights_is_refused():
    model, _ = pair("v1")
    model.layers[0].blocks[0].attn.attn_drop.register_forward_hook(lambda *_: None)
    with pytest.raises(NotImplementedError, match="attention keeps no weights for it"):
        model(images_for(model))


@EACH
def test_a_copy_a_pickle_and_another_dtype_work(version):
    model, theirs = pair(version, drop_path_rate=0.1)
    images = images_for(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(images), model(images))
    cls, _ = VERSIONS[version]
    assert cls.from_timm(theirs.double()).eval()(images.double()).dtype == torch.float64
    assert model.bfloat16()(images.bfloat16()).dtype == torch.bfloat16


@EACH
def test_an_empty_batch_gives_no_logits(version):
    model, _ = pair(version)
    assert model(torch.empty(0, 3, 32, 32)).shape == (0, 5)


def test_it_normalises_images_itself():
    plain, _ = pair("v1")
    model = SwinTransformer(**SMALL, normalize=((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))).eval()
    model.load_state_dict(plain.state_dict())
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mean, std = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    torch.testing.assert_close(model(images), plain((images / 255 - mean) / std), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"img_size": 30}, ValueError, "does not divide"),
        ({"num_heads": (3, 4)}, ValueError, "num_heads 3 does not divide dim 16"),
        ({"num_heads": (2, 4, 8)}, ValueError, "expected one number for each of 2 stages"),
        ({"window_size": (4, 4, 4)}, ValueError, r"window_size is .* of 2 stages"),
        ({"window_size": 0}, ValueError, "window_size is 0; expected 1 at least"),
        ({"global_pool": "token"}, ValueError, "unknown pool 'token'"),
        ({"norm_layer": nn.RMSNorm}, NotImplementedError, "RMSNorm"),
        ({"attn_drop_rate": 1.1}, ValueError, "probability has to be between 0 and 1"),
        ({"weight_init": "jax"}, NotImplementedError, "weight_init is 'jax'"),
        ({"colour": 1}, TypeError, "no argument 'colour'"),
    ],
    ids=str,
)
@EACH
def test_bad_arguments_are_refused(version, kwargs, error, message):
    with pytest.raises(error, match=message):
        VERSIONS[version][0](**SMALL | kwargs)


def test_bad_arguments_of_one_version_are_refused():
    with pytest.raises(NotImplementedError, match="embed_layer"):
        SwinTransformer(**SMALL, embed_layer=nn.Identity)
    with pytest.raises(ValueError, match="mlp_ratio is"):
        SwinTransformer(**SMALL, mlp_ratio=(1.0, 2.0, 3.0))
    with pytest.raises(ValueError, match="pretrained_window_sizes is"):
        SwinTransformerV2(**SMALL, pretrained_window_sizes=(1,))
    with pytest.raises(ValueError, match="unknown act_layer"):
        SwinTransformerV2(**SMALL, act_layer="relu")


def test_bad_images_are_refused():
    model, _ = pair("v1")
    for images, error, message in (
        (torch.zeros(3, 32, 32), ValueError, "shape"),
        (torch.zeros(1, 3, 32, 40), ValueError, "32×40 pixels; expected 32×32"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), TypeError, "expected floating-point"),
    ):
        with pytest.raises(error, match=message):
            model(images)


def test_other_eps():
    ours, theirs = pair("v1", norm_layer=functools.partial(nn.LayerNorm, eps=1e-2))
    assert {m.eps for m in ours.modules() if isinstance(m, nn.LayerNorm)} == {1e-2}
    images = images_for(theirs)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-5)


@EACH
def test_compiled(version):
    model, _ = pair(version, depths=(2,), num_heads=(2,))
    images = images_for(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), model(images), rtol=1e-4, atol=1e-5)
