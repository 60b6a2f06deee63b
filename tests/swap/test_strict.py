"""``accelerate(model, strict=True)`` raises for each part of a transformer that would be left, and for nothing else."""

import copy

import pytest
import torch
from torch import nn

from vitkernels import accelerate, explain
from vitkernels.swap._parts import part_of

timm = pytest.importorskip("timm")

# By their kinds of block, MLP, norm, positions, stem and head.
WHOLE = [
    "vit_tiny_patch16_224",
    "deit3_small_patch16_224",
    "eva02_tiny_patch14_224",
    "eva_giant_patch14_224",
    "aimv2_large_patch14_224",
    "vit_small_r26_s32_224",
    "vit_small_patch16_18x2_224",
    "naflexvit_base_patch16_gap",
    "pit_ti_distilled_224",
    "gmixer_24_224",
    "mobilevit_s",
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256",
    "beit_base_patch16_224",
    "maxvit_pico_rw_256",
    "samvit_base_patch16",
]
LEFT = {
    "vit_base_patch16_siglip_224": {"attn_pool": "attention"},
    "swinv2_cr_tiny_224": {"patch_embed": "a patch embedding"},
    "convnext_atto": {"stem.0": "a patch embedding"},
    "vitamin_small_224": {"patch_embed.backbone.stem.norm1": "a norm"},
    "vit_relpos_small_patch16_224": {"blocks.*.attn.rel_pos.mlp": None},  # of a known class, with a ReLU
    "convit_tiny": {"blocks.*.attn": "attention"},
    "gemma4_vit_167m": {"encoder.blocks.*.mlp": "an MLP", "encoder.patch_embed": "a patch embedding"},
}


def meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name)


@pytest.mark.parametrize("name", WHOLE)
def test_passes_where_nothing_is_left(name):
    report = accelerate(meta(name), strict=True)
    assert report.swapped


@pytest.mark.parametrize("name", LEFT)
def test_raises_for_what_is_left(name):
    model = meta(name)
    before = [type(module) for module in model.modules()]
    with pytest.raises(NotImplementedError, match=r"strict, and \d+ modules cannot be swapped") as raised:
        accelerate(model, strict=True)
    assert [type(module) for module in model.modules()] == before
    lines = [line.split() for line in str(raised.value).splitlines()[1:]]
    for path, part in LEFT[name].items():
        assert any(line[0] == path for line in lines), raised.value
        of_it = [k for k in explain(model).kept if _matches(k.module, path)]
        assert part in {k.part for k in of_it}


def _matches(path: str, pattern: str) -> bool:
    ours, theirs = path.split("."), pattern.split(".")
    return len(ours) == len(theirs) and all(b in (a, "*") for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", ["test_vit3", "test_convnext", "test_vit4"])
def test_a_model_that_is_refused_is_as_it_was(name, device):
    model = timm.create_model(name).to(device).eval()
    plain, before = copy.deepcopy(model), [type(module) for module in model.modules()]
    x = torch.randn(1, 3, *model.pretrained_cfg["input_size"][1:], device=device)
    try:
        accelerate(model, strict=True)
    except NotImplementedError:
        assert [type(module) for module in model.modules()] == before
        assert torch.equal(model(x), plain(x))
    else:
        assert name == "test_vit4", "its pooling is the mean; the others have parts that are left"


def test_torchvision():
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        accelerate(torchvision.models.vit_b_16(), strict=True)
        with pytest.raises(NotImplementedError, match="a patch embedding"):
            accelerate(torchvision.models.swin_t(), strict=True)


def test_transformers():
    pytest.importorskip("transformers", minversion="4.50")
    from hf_models import MODELS, build

    # SigLIP pools by attention, the others hold a language model.
    left = {"siglip": "head", "siglip2": "head", "siglip pair": "head"}
    left |= {"llava": "language_model", "paligemma": "language_model"}
    for name in MODELS:
        if name in left:
            with pytest.raises(NotImplementedError, match=left[name]):
                accelerate(build(name), strict=True)
        else:
            accelerate(build(name), strict=True)


class Attention(nn.Module):
    """As anybody may write it."""

    def __init__(self):
        super().__init__()
        self.to_qkv, self.to_out = nn.Linear(8, 24, bias=False), nn.Linear(8, 8)


class FeedForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Dropout(0.1), nn.Linear(32, 8))


class ScaleNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.g = nn.Parameter(torch.ones(1))


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.fc_aux = nn.Linear(8, 3), nn.Linear(8, 3)


@pytest.mark.parametrize(
    ("module", "part"),
    [
        (Attention(), "attention"),
        (nn.MultiheadAttention(8, 2), "attention"),
        (nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)), "an MLP"),
        (FeedForward(), "an MLP"),
        (nn.TransformerEncoderLayer(8, 2), "an MLP"),
        (nn.RMSNorm(8), "a norm"),
        (type("LayerNorm2d", (nn.LayerNorm,), {})(8), "a norm"),
        (nn.Conv2d(3, 8, 4, 4), "a patch embedding"),
        (nn.Conv3d(3, 8, (2, 4, 4), (2, 4, 4)), "a patch embedding"),
        (nn.Conv2d(3, 8, 7, 2, 3), None),
        (nn.Conv2d(8, 8, 2, 2, groups=8), None),
        (nn.Conv2d(3, 8, 1), None),
        (nn.Linear(8, 3), None),
        (nn.Sequential(nn.Linear(8, 3)), None),
        (nn.Sequential(nn.Linear(8, 8), nn.Tanh()), None),
        (Classifier(), None),
        (nn.Embedding(9, 8), None),
        (nn.BatchNorm2d(8), None),
        (nn.GroupNorm(2, 8), None),
        (ScaleNorm(), None),
        (nn.Dropout(), None),
        (nn.Identity(), None),
        (nn.AdaptiveAvgPool2d(1), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_what_counts(module, part):
    assert part_of(module) == part
    model = nn.Sequential(nn.LayerNorm(8), module)
    if part is None:
        accelerate(model, strict=True)
    else:
        with pytest.raises(NotImplementedError, match=type(module).__name__):
            accelerate(model, strict=True)
        assert type(model[0]) is nn.LayerNorm


def test_the_message():
    model = nn.Sequential(nn.LayerNorm(8), nn.ModuleList(Attention() for _ in range(3)), nn.Linear(8, 2))
    with pytest.raises(NotImplementedError) as raised:
        accelerate(model, strict=True)
    assert str(raised.value) == (
        "accelerate: strict, and 3 modules cannot be swapped:\n"
        "  *.* ×3  Attention  kept: attention of a class that is not known here"
    )
