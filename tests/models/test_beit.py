"""Beit against timm's: keys, logits, gradients, and what a user may do to a model."""

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
from vitkernels.models import Beit

timm = pytest.importorskip("timm")
from timm.models.beit import Beit as TimmBeit  # noqa: E402

pytestmark = pytest.mark.usefixtures("plain_pytorch")

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
TABLES = {"use_abs_pos_emb": False, "use_rel_pos_bias": True, "init_values": 0.1}
CASES = {
    "beit": TABLES,
    "no bias at all": {},
    "shared": {"use_shared_rel_pos_bias": True, "use_abs_pos_emb": False},
    "both, oblong": TABLES | {"use_shared_rel_pos_bias": True, "img_size": (24, 40), "patch_size": (8, 4)},
    "beit3": {"scale_mlp": True, "norm_layer": functools.partial(nn.LayerNorm, eps=1e-5), "use_fc_norm": False},
    "swiglu": TABLES | {"swiglu_mlp": True, "scale_mlp": True, "mlp_ratio": 3.0},
    "plain swiglu": {"swiglu_mlp": True},
    "token": TABLES | {"global_pool": "token", "qkv_bias": False},
    "no pool, grey": TABLES | {"in_chans": 1, "num_classes": 0, "global_pool": ""},
    "token, norm behind": {"global_pool": "token", "use_fc_norm": True},
}


def pair(device="cpu", **kwargs):
    return make_pair(Beit, TimmBeit, device, **SMALL | kwargs)


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_agree_with_timm(case):
    ours, theirs = pair(**CASES[case])
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert_agree(ours, theirs, images_for(theirs))


def test_logits_and_gradients_agree_with_timm_through_the_kernels(device):
    pytest.importorskip("triton")
    few = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "num_heads": 2, "depth": 1}
    ours, theirs = pair(device, **TABLES | few)
    with vitkernels.use_backend(KERNELS):
        assert_agree(ours, theirs, images_for(theirs))


@pytest.mark.parametrize("case", ["beit", "shared", "both, oblong", "no bias at all"])
def test_set_input_size_agrees_with_timm(case):
    ours, theirs = pair(**CASES[case])
    tables = dict(ours.named_parameters())
    ours.set_input_size(ours.patch_embed.img_size)
    assert all(p is tables[name] for name, p in ours.named_parameters()), "the same size, the same Parameters"
    for size in ((48, 40), (16, 24)):
        for model in (ours, theirs):
            model.set_input_size(img_size=size)
        for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6, msg=name)
        assert all(p.requires_grad for p in ours.parameters())
        theirs.load_state_dict(ours.state_dict(), strict=True)
        assert_agree(ours, theirs, images_for(theirs))
    with pytest.raises(ValueError, match="does not divide"):
        ours.set_input_size(50)


@pytest.mark.parametrize(
    "options", [{"drop_path_rate": 0.5}, {"pos_drop_rate": 0.2, "drop_rate": 0.2}, {"proj_drop_rate": 0.2}], ids=str
)
def test_random_parts_follow_the_seed_as_in_timm(options):
    ours, theirs = pair(**CASES["shared"] | options)
    assert_follows_the_seed(ours, theirs, images_for(theirs, batch=6))


def test_attention_dropout_is_active_in_training_only():
    model, _ = pair(**TABLES, attn_drop_rate=0.5)
    images = images_for(model)
    assert torch.equal(model(images), model(images))
    model.train()
    assert not torch.equal(model(images), model(images))


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "beitv2_base_patch16_224", "beit_large_patch16_384"])
def test_full_size_models_have_timms_keys_and_shapes(name):
    with torch.device("meta"):
        theirs = timm.create_model(name)
    shapes = [
        [(key, tuple(tensor.shape)) for key, tensor in m.state_dict().items()] for m in (Beit.from_timm(theirs), theirs)
    ]
    assert shapes[0] == shapes[1]


def test_default_arguments_are_timms():
    ours, theirs = (cls(device="meta") for cls in (Beit, TimmBeit))
    shapes = [[(name, tuple(tensor.shape)) for name, tensor in m.state_dict().items()] for m in (ours, theirs)]
    assert shapes[0] == shapes[1]
    for name in (
        "num_features",
        "embed_dim",
        "head_hidden_size",
        "global_pool",
        "num_prefix_tokens",
        "head_init_scale",
    ):
        assert getattr(ours, name) == getattr(theirs, name), name


@pytest.mark.parametrize("more", [{}, {"swiglu_mlp": True}], ids=str)
def test_weights_start_as_in_timm(more):
    kwargs = SMALL | {"embed_dim": 192, "init_values": 0.1, "use_rel_pos_bias": True} | more
    assert_weights_start_alike(Beit(**kwargs), TimmBeit(**kwargs))


@pytest.mark.parametrize("case", ["beit", "both, oblong", "beit3", "swiglu", "token, norm behind"])
def test_timm_and_back(case, tmp_path):
    _, theirs = pair(**CASES[case])
    ours = Beit.from_timm(theirs).eval()
    images = images_for(theirs)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-5)
    back = ours.to_timm()
    assert type(back) is type(theirs) and torch.equal(back(images), theirs(images))
    features = Beit.from_timm(theirs, features_only=True).eval()(images)
    torch.testing.assert_close(features, theirs.forward_features(images), rtol=1e-4, atol=1e-5)
    if case == "beit":
        torch.save(theirs.state_dict(), tmp_path / "model.pth")
        read = Beit.from_timm(tmp_path / "model.pth", architecture="beit_base_patch16_224", **SMALL).eval()
        torch.testing.assert_close(read(images), theirs(images), rtol=1e-4, atol=1e-5)


def test_what_does_not_fit():
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    with pytest.raises(NotImplementedError, match="the model is a VisionTransformer; expected a Beit"):
        Beit.from_timm(vit)
    _, theirs = pair()
    theirs.blocks[1].norm2 = timm.layers.RmsNorm(48)
    with pytest.raises(NotImplementedError, match=r"blocks.1.norm2 is a RmsNorm"):
        Beit.from_timm(theirs)
    _, theirs = pair()
    theirs.blocks[0].mlp.act = nn.SiLU()
    with pytest.raises(NotImplementedError, match="expected a SiLU in SwiGLU, else a GELU"):
        Beit.from_timm(theirs)
    with pytest.raises(NotImplementedError, match="no normalize"):
        Beit(**SMALL, normalize=((0.5,) * 3, (0.5,) * 3)).to_timm()
    for read in (Beit.from_torchvision, Beit.from_hf):
        with pytest.raises(NotImplementedError, match="BEiT"):
            read("vit_b_16")


def test_intermediates_and_parts_of_forward_agree_with_timm():
    ours, theirs = pair(**CASES["both, oblong"], depth=3)
    images = images_for(theirs)
    for options in (
        {},
        {"indices": 2},
        {"indices": [0], "stop_early": True, "intermediates_only": True},
        {"output_fmt": "NLC", "return_prefix_tokens": True},
    ):
        mine = ours.forward_intermediates(images, **options)
        other = theirs.forward_intermediates(images, **options)
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5, msg=str(options))
    features = ours.forward_features(images)
    torch.testing.assert_close(features, theirs.forward_features(images), rtol=1e-4, atol=1e-5)
    for options in ({}, {"pre_logits": True}):
        torch.testing.assert_close(ours.forward_head(features, **options), theirs.forward_head(features, **options))
    assert ours.no_weight_decay() == theirs.no_weight_decay()
    assert ours.group_matcher() == theirs.group_matcher()


def test_reset_classifier():
    model, _ = pair(**TABLES)
    images = images_for(model)
    model.reset_classifier(7, "token")
    assert model(images).shape == (2, 7)
    with pytest.raises(ValueError, match="unknown pool 'max'"):
        model.reset_classifier(7, "max")


def test_gradient_checkpointing_gives_the_same_gradients():
    model, _ = pair(**CASES["both, oblong"], drop_path_rate=0.3, attn_drop_rate=0.4)
    model.train()
    images, upstream, results = images_for(model, batch=3), None, []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        torch.manual_seed(3)
        result, upstream = outputs_and_gradients(model, images, upstream)
        results.append(result)
    for name in results[0]:
        assert torch.equal(results[0][name], results[1][name]), name


class Doubled(nn.Linear):
    """An adapter that a forward which reads its weight would skip."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("case", ["beit", "shared", "no bias at all", "swiglu"])
def test_an_adapter_on_any_layer_counts(case):
    ours, theirs = pair(**CASES[case])
    called = []
    for model in (ours, theirs):
        for path in ("0.attn.proj", "1.mlp.fc2"):
            model.blocks.get_submodule(path).__class__ = Doubled
    ours.blocks[0].attn.qkv.register_forward_hook(lambda *_: called.append(1))
    assert_agree(ours, theirs, images_for(theirs))
    assert called == [1]


def test_a_hook_on_the_dropout_of_weights_is_refused():
    model, _ = pair(**TABLES)
    model.blocks[0].attn.attn_drop.register_forward_hook(lambda *_: None)
    with pytest.raises(NotImplementedError, match="no weights are kept for it"):
        model(images_for(model))


def test_a_copy_a_pickle_and_another_dtype_work():
    model, theirs = pair(**CASES["both, oblong"], drop_path_rate=0.1)
    images = images_for(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(images), model(images))
    assert Beit.from_timm(theirs.double()).eval()(images.double()).dtype == torch.float64
    assert model.bfloat16()(images.bfloat16()).dtype == torch.bfloat16


def test_an_empty_batch_gives_no_logits():
    model, _ = pair(**TABLES)
    assert model(torch.empty(0, 3, 32, 32)).shape == (0, 5)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"img_size": 30}, ValueError, "does not divide"),
        ({"num_heads": 5}, ValueError, "num_heads 5 does not divide dim 48"),
        ({"global_pool": "max"}, ValueError, "unknown pool 'max'"),
        ({"norm_layer": nn.RMSNorm}, NotImplementedError, "RMSNorm"),
        ({"weight_init": "jax"}, NotImplementedError, "weight_init is 'jax'"),
        ({"colour": 1}, TypeError, "Beit has no argument 'colour'"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(kwargs, error, message):
    with pytest.raises(error, match=message):
        Beit(**SMALL | TABLES | kwargs)


def test_compiled():
    model, _ = pair(**CASES["both, oblong"])
    images = images_for(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), model(images), rtol=1e-4, atol=1e-5)
