"""Eva against timm's: keys, logits, gradients, and what a user may do to a model."""

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
from vitkernels import ops
from vitkernels.layers import BeitAttention, fused, rope2d
from vitkernels.models import Eva

timm = pytest.importorskip("timm")
from timm.models.eva import Eva as TimmEva  # noqa: E402

pytestmark = pytest.mark.usefixtures("plain_pytorch")

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
ROPE = {"use_rot_pos_emb": True, "ref_feat_shape": (3, 5)}
EVA02 = ROPE | {"swiglu_mlp": True, "mlp_ratio": 4 * 2 / 3}
CASES = {
    "eva02": EVA02,
    "eva02 large": EVA02 | {"scale_mlp": True, "init_values": 0.1},
    "eva": {"init_values": 0.1, "use_fc_norm": False, "norm_layer": functools.partial(nn.LayerNorm, eps=1e-5)},
    "oblong, no reference": {"use_rot_pos_emb": True, "img_size": (24, 40), "patch_size": (8, 4)},
    "hot, token": ROPE | {"rope_temperature": 100.0, "global_pool": "token", "qkv_bias": False},
    "rotary alone, no pool, grey": ROPE
    | {"use_abs_pos_emb": False, "in_chans": 1, "num_classes": 0, "global_pool": ""},
}


def pair(device="cpu", **kwargs):
    return make_pair(Eva, TimmEva, device, **SMALL | kwargs)


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_agree_with_timm(case):
    ours, theirs = pair(**CASES[case])
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    assert_agree(ours, theirs, images_for(theirs))


def test_logits_and_gradients_agree_with_timm_through_the_kernels(device, monkeypatch):
    pytest.importorskip("triton")
    few = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "num_heads": 2, "depth": 1}
    ours, theirs = pair(device, **EVA02 | few)
    rotated, original = [], fused.block
    monkeypatch.setattr(fused, "block", lambda *a, **k: rotated.append(k["rope"]) or original(*a, **k))
    with vitkernels.use_backend(KERNELS):
        assert_agree(ours, theirs, images_for(theirs))
    assert rotated and all(isinstance(rope, ops.Rope) for rope in rotated)


@pytest.mark.parametrize("case", ["eva02", "oblong, no reference"])
def test_set_input_size_agrees_with_timm(case):
    ours, theirs = pair(**CASES[case])
    for size in ((48, 40), (16, 24)):
        for model in (ours, theirs):
            model.set_input_size(img_size=size)
        theirs.load_state_dict(ours.state_dict(), strict=True)
        assert_agree(ours, theirs, images_for(theirs))


@pytest.mark.parametrize("options", [{"drop_path_rate": 0.5}, {"pos_drop_rate": 0.2, "drop_rate": 0.2}], ids=str)
def test_random_parts_follow_the_seed_as_in_timm(options):
    ours, theirs = pair(**EVA02 | options)
    assert_follows_the_seed(ours, theirs, images_for(theirs, batch=6))


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "eva02_small_patch14_336.mim_in22k_ft_in1k"])
def test_full_size_models_have_timms_keys_and_shapes(name):
    with torch.device("meta"):
        theirs = timm.create_model(name)
    ours = Eva.from_timm(theirs)
    shapes = [[(key, tuple(tensor.shape)) for key, tensor in m.state_dict().items()] for m in (ours, theirs)]
    assert shapes[0] == shapes[1]


def test_weights_start_as_in_timm():
    kwargs = SMALL | {"embed_dim": 192, "init_values": 0.1} | EVA02
    assert_weights_start_alike(Eva(**kwargs), TimmEva(**kwargs))


@pytest.mark.parametrize("case", ["eva02", "eva02 large", "eva", "hot, token"])
def test_timm_and_back(case):
    _, theirs = pair(**CASES[case])
    ours = Eva.from_timm(theirs).eval()
    images = images_for(theirs)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-5)
    back = ours.to_timm()
    assert type(back) is type(theirs) and torch.equal(back(images), theirs(images))
    features = Eva.from_timm(theirs, features_only=True).eval()(images)
    torch.testing.assert_close(features, theirs.forward_features(images), rtol=1e-4, atol=1e-5)


def test_positions_are_timms():
    for grid_size, reference in (((3, 5), None), ((4, 2), (16, 16))):
        theirs = timm.layers.RotaryEmbeddingCat(
            16, temperature=50.0, in_pixels=False, feat_shape=grid_size, ref_feat_shape=reference
        )
        rope = rope2d(grid_size, 16, temperature=50.0, reference=reference)
        assert torch.equal(torch.cat([rope.sin, rope.cos], dim=-1), theirs.get_embed())
    with pytest.raises(ValueError, match="that 4 divides, got 18"):
        rope2d((2, 2), 18)


def test_intermediates_agree_with_timm():
    ours, theirs = pair(**CASES["oblong, no reference"], depth=3)
    images = images_for(theirs)
    for options in ({}, {"indices": 2}, {"output_fmt": "NLC", "return_prefix_tokens": True}):
        mine, other = (model.forward_intermediates(images, **options) for model in (ours, theirs))
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5, msg=str(options))
    assert ours.no_weight_decay() == theirs.no_weight_decay() & {name for name, _ in theirs.named_parameters()}


def test_gradient_checkpointing_gives_the_same_gradients():
    model, _ = pair(**EVA02, drop_path_rate=0.3)
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


def test_an_adapter_on_any_layer_counts():
    ours, theirs = pair(**EVA02)
    called = []
    ours.blocks[1].attn.qkv.register_forward_hook(lambda *_: called.append(1))
    for model in (ours, theirs):
        for path in ("0.attn.proj", "1.mlp.fc2"):
            model.blocks.get_submodule(path).__class__ = Doubled
    assert_agree(ours, theirs, images_for(theirs))
    assert called == [1]


def test_a_copy_a_pickle_and_another_dtype_work():
    model, theirs = pair(**EVA02)
    images = images_for(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(images), model(images))
    assert Eva.from_timm(theirs.double()).eval()(images.double()).dtype == torch.float64
    assert model.bfloat16()(images.bfloat16()).dtype == torch.bfloat16


def test_masks_hide_patches_and_visible_ones_alone_are_refused():
    model, _ = pair(**EVA02, use_fc_norm=False)
    masked = Eva(**SMALL | EVA02, use_mask_token=True).eval()
    images, mask = images_for(model), torch.zeros(2, 16, dtype=torch.bool)
    mask[:, 3] = True
    changed = images.clone()
    changed[:, :, :8, 24:] = 0.0  # the fourth patch
    assert torch.equal(masked.forward_features(images, mask=mask), masked.forward_features(changed, mask=mask))
    assert not torch.equal(masked.forward_features(images), masked.forward_features(changed))
    with pytest.raises(ValueError, match="rotary positions need all patches"):
        model.forward_features(images, visible=torch.zeros(2, 3, dtype=torch.long))


def test_what_does_not_fit():
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    with pytest.raises(NotImplementedError, match="the model is a VisionTransformer; expected a Eva"):
        Eva.from_timm(vit)
    for options, why in (
        ({"qkv_fused": False}, r"blocks.0.attn.qkv is a NoneType; expected a Linear"),
        ({"use_rot_pos_emb": True, "rope_rotate_half": True}, "rope.rotate_half is True; expected False"),
        ({"use_rot_pos_emb": True, "rope_type": "mixed"}, "rope is a RotaryEmbeddingMixed"),
        ({"use_post_norm": True}, "blocks.0 is a EvaBlockPostNorm"),
        ({"num_reg_tokens": 2}, "more tokens beside it"),
        ({"scale_attn_inner": True}, r"blocks.0.attn.norm is a LayerNorm"),
    ):
        with pytest.raises(NotImplementedError, match=why):
            Eva.from_timm(TimmEva(**SMALL | options))
        if options.keys() != {"use_rot_pos_emb"}:
            with pytest.raises(NotImplementedError, match="is not supported"):
                Eva(**SMALL | options)
    with pytest.raises(TypeError, match="Eva has no argument 'use_rel_pos_bias'"):
        Eva(**SMALL, use_rel_pos_bias=True)
    attention = BeitAttention(48, 3, window_size=(2, 2))
    with pytest.raises(ValueError, match="an attention with biases by relative position"):
        attention(torch.randn(1, 5, 48), rope2d((2, 2), 16))
    for read in (Eva.from_torchvision, Eva.from_hf):
        with pytest.raises(NotImplementedError, match="has no EVA"):
            read("vit_b_16")


def test_compiled():
    model, _ = pair(**EVA02)
    images = images_for(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), model(images), rtol=1e-4, atol=1e-5)
