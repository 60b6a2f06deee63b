"""PEFT's LoRA on every linear layer of the families that are swapped: all stay fused, and compute and train PEFT's.

The ops are other tests': here they go to their references, except in a few of the families.
"""

import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import nn

timm = pytest.importorskip("timm")
peft = pytest.importorskip("peft")
pytest.importorskip("transformers", minversion="4.50")

import hf_models  # noqa: E402
import test_dino  # noqa: E402
import test_hf_mobilevit  # noqa: E402
import test_hf_sam  # noqa: E402
import test_hf_swin  # noqa: E402
import test_hf_vitdet  # noqa: E402
import test_maxvit_blocks  # noqa: E402
import test_microsoft_swin  # noqa: E402
import test_mobilevit  # noqa: E402
import test_mvitv2  # noqa: E402
import test_parity  # noqa: E402
import test_relative_models  # noqa: E402
import test_sam_timm  # noqa: E402
import test_swin_timm  # noqa: E402
import test_swin_torchvision  # noqa: E402
import test_torchvision  # noqa: E402
import test_torchvision_maxvit  # noqa: E402
import test_window_blocks  # noqa: E402
from parity import assert_parity, shake  # noqa: E402
from timm.models import vitamin  # noqa: E402

from vitkernels import accelerate, models, use_backend  # noqa: E402

ops_are_other_tests = pytest.mark.usefixtures("computed_by_pytorch")

LoraLinear = peft.tuners.lora.Linear


class FirstOutput(nn.Module):
    """A model of transformers that takes images, and returns the first of its outputs."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return next(iter(hf_models.tensors(self.inner(pixel_values=images)).values()))


class Case(NamedTuple):
    """A model, the shape of what it takes, and the ends of names of layers that PEFT computes, or that are left out."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...] = (2, 3, 32, 32)
    outside: tuple[str, ...] = ("head",)
    left_out: tuple[str, ...] = ()


def of_hf(name: str, *outside: str) -> Case:
    return Case(lambda: FirstOutput(hf_models.build(name)), outside=outside)


def naflexvit() -> nn.Module:
    size = {"patch_size": 16, "embed_dim": 32, "num_heads": 2, "depth": 1, "num_classes": 5}
    return shake(timm.create_model("naflexvit_base_patch16_gap", **size).eval())


def sam2() -> nn.Module:
    import test_hf_sam2  # skips where transformers is older than its SAM 2

    return test_hf_sam2.build()


def block(blocks: dict, name: str, *outside: str) -> Case:
    make, shapes = blocks[name]
    return Case(lambda: nn.Sequential(shake(make().eval())), shapes[-1], outside)


GATED = ("dinov2 giant", "dinov3 huge", "eva02", "aimv2", "dropout, gated")
WITH_TABLE_MLP = ("cpb_mlp.0", "cpb_mlp.2", "reduction", "head.fc")
MODELS = {
    **{name: Case(lambda name=name: test_parity.build(name)) for name in (*GATED, "sapiens2", "norms behind")},
    **{f"timm, {name}": block(test_window_blocks.BLOCKS, name) for name in test_window_blocks.BLOCKS},
    "maxvit": block(test_maxvit_blocks.BLOCKS, "windows"),
    "maxvit, mlp": block(test_maxvit_blocks.BLOCKS, "windows, mlp", "rel_pos.mlp.fc1", "rel_pos.mlp.fc2"),
    "maxvit, parallel": block(test_maxvit_blocks.BLOCKS, "parallel"),
    "mvitv2": Case(test_mvitv2.build, (2, 64, 32)),
    "mvitv2, widened behind": Case(lambda: test_mvitv2.build(expand_attn=False), (2, 64, 32)),
    "vitamin, mlp": Case(lambda: nn.Sequential(shake(vitamin.GeGluMlp(32, 64).eval())), (2, 7, 32)),
    "mobilevit": Case(lambda: nn.Sequential(test_mobilevit.build()), (2, 8, 8, 6)),
    "sam": Case(lambda: test_sam_timm.build((32, 40)), (2, 3, 32, 40), ("head.fc",)),
    "beit": Case(lambda: test_relative_models.build("beit", (32, 32)), left_out=("qkv",)),
    "beit, without biases": Case(lambda: test_relative_models.build("beit", (32, 32), qkv_bias=False)),
    "relative": Case(lambda: test_relative_models.build("bias", (32, 32))),
    "relative, shared": Case(
        lambda: test_relative_models.build("mlp, shared", (32, 32)), outside=("head", "mlp.fc1", "mlp.fc2")
    ),
    "swin": Case(lambda: test_swin_timm.build("swin", (40, 28), (4, 3)), (2, 3, 40, 28), ("reduction", "head.fc")),
    "swinv2": Case(lambda: test_swin_timm.build("swinv2"), outside=WITH_TABLE_MLP, left_out=("qkv",)),
    "swinv2, without biases": Case(
        lambda: test_swin_timm.build("swinv2", qkv_bias=False), outside=WITH_TABLE_MLP
    ),
    "swinv2 cr": Case(
        lambda: test_swin_timm.build("swinv2 cr"), outside=("reduction", "head.fc"), left_out=("mlp.fc1", "mlp.fc2")
    ),
    "torchvision": Case(test_torchvision.build, left_out=("out_proj",)),
    "naflexvit": Case(naflexvit, outside=("embeds.proj", "head")),
    "torchvision, swin": Case(
        lambda: test_swin_torchvision.build(1, [4, 4]), left_out=("attn.qkv", "attn.proj")
    ),
    "torchvision, maxvit": Case(lambda: nn.Sequential(test_torchvision_maxvit.build("grid")), (2, 32, 8, 8)),
    "microsoft, swin": Case(lambda: test_microsoft_swin.build(1), outside=("reduction",)),
    "microsoft, swinv2": Case(
        lambda: test_microsoft_swin.build(2), outside=(*WITH_TABLE_MLP, "reduction"), left_out=("attn.qkv", "attn.proj")
    ),
    "dinov2's own": Case(lambda: test_dino.dinov2().eval()),
    "dinov2's own, plain": Case(lambda: test_dino.dinov2(test_dino.Block, attn_class=test_dino.Attention).eval()),
    "dinov2's own, gated": Case(lambda: test_dino.dinov2(ffn_layer=test_dino.SwiGLUFFNFused).eval()),
    "dinov3's own, masked bias": Case(lambda: test_dino.DINOv3(mask_k_bias=True).eval()),
    "dinov3's own, gated": Case(lambda: test_dino.DINOv3(ffn_layer=test_dino.SwiGLUFFN).eval()),
    "transformers, swin": Case(lambda: test_hf_swin.build("swin"), (2, 3, 40, 28)),
    "transformers, swinv2": Case(
        lambda: test_hf_swin.build("swinv2"), (2, 3, 40, 28), ("bias_mlp.0", "bias_mlp.2")
    ),
    "transformers, donut": Case(lambda: test_hf_swin.build("donut"), (2, 3, 40, 28)),
    "transformers, sam": Case(lambda: test_hf_sam.build("sam", 32)),
    "transformers, got_ocr2": Case(lambda: test_hf_sam.build("got_ocr2", 32)),
    "transformers, slanext": Case(lambda: test_hf_sam.build("slanext", 32)),
    "transformers, sam2": Case(sam2, (2, 3, 64, 64)),
    "transformers, vitdet": Case(test_hf_vitdet.build),
    "transformers, mobilevit": Case(test_hf_mobilevit.block, (2, 4, 16, 12)),
    "transformers, dinov2, gated": of_hf("dinov2, swiglu"),
    "transformers, dinov3, gated": of_hf("dinov3, gated"),
    "transformers, dinov2, registers": of_hf("dinov2, registers"),
    "transformers, beit": of_hf("beit", "classifier"),
    "transformers, data2vec": of_hf("data2vec", "classifier", *(("query", "key", "value") if hf_models.OLD else ())),
}  # fmt: skip


def adapted(model: nn.Module, left_out: tuple[str, ...] = (), **more) -> nn.Module:
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    options = {"r": 3, "lora_alpha": 5, "init_lora_weights": False, **more}
    targets = [name for name in layers if not name.endswith(left_out)]
    return peft.inject_adapter_in_model(peft.LoraConfig(target_modules=targets, **options), model)


def computed_by_peft(model: nn.Module, x: torch.Tensor) -> list[str]:
    """The names of the adapted layers whose own forward runs; a hook would change which."""
    names, found = {module: name for name, module in model.named_modules()}, []

    def watch(frame, event, _) -> None:
        if event == "call" and frame.f_code is LoraLinear.forward.__code__:
            found.append(names[frame.f_locals["self"]])

    sys.setprofile(watch)
    try:
        model(x)
    finally:
        sys.setprofile(None)
    return found


def blames(report) -> list[str]:
    return [f"{entry.module}: {entry.reason}" for entry in report.kept if "peft" in entry.reason]


# Whose originals drop of tensors that lie in memory as ours do: then a seed drops the same. Not windows, for instance.
LIE_ALIKE = {
    *GATED, "sapiens2", "beit", "relative", "timm, cait", "timm, sam2, whole", "mvitv2", "torchvision",
    "transformers, dinov3, gated", "transformers, beit", "transformers, data2vec",
}  # fmt: skip


@ops_are_other_tests
@pytest.mark.parametrize("drops", [False, True], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("name", MODELS)
def test_each_family(name, drops, device):
    """With dropout in front of each adapter, too, or with all dropped."""
    case = MODELS[name]
    model = adapted(case.make(), case.left_out, lora_dropout=(0.3 if name in LIE_ALIKE else 1.0) * drops).to(device)
    for module in model.modules():
        if isinstance(module, LoraLinear):
            module.train()
    x = torch.randn(case.shape, device=device)
    report = assert_parity(model, x)
    assert all("reduction" in each for each in blames(report)), report
    outside = computed_by_peft(model, x)
    assert all(each.endswith(case.outside) for each in outside), f"PEFT computes {outside}"


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("swin", torch.float32), ("dinov3 huge", torch.bfloat16), ("transformers, swin", torch.bfloat16)],
)
def test_kernels(name, dtype, device):
    case = MODELS[name]
    model = adapted(case.make().to(device, dtype))
    assert_parity(model, torch.randn(case.shape, device=device, dtype=dtype))


@ops_are_other_tests
@pytest.mark.parametrize("name", ["swin", "dinov2 giant", "beit", "transformers, swin", "transformers, dinov3, gated"])
def test_merged_and_parted(name, device):
    case = MODELS[name]
    model = adapted(case.make(), case.left_out).to(device)
    x = torch.randn(case.shape, device=device)
    with use_backend("torch"), torch.no_grad():
        expected = model(x)
    accelerate(model)
    layers = [module for module in model.modules() if isinstance(module, LoraLinear)]
    with torch.no_grad():
        for change in (LoraLinear.merge, LoraLinear.unmerge):
            for layer in layers:
                change(layer)
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
            assert len(computed_by_peft(model, x)) < len(layers) / 2


@ops_are_other_tests
def test_open_clip(device):
    pytest.importorskip("open_clip")
    import test_open_clip

    model = adapted(test_open_clip.tower(), ("out_proj",)).to(device)
    x = torch.randn(2, 3, 32, 32, device=device)
    assert not blames(assert_parity(model, x))
    assert computed_by_peft(model, x) == []


@ops_are_other_tests
@pytest.mark.parametrize("name", ["dinov2 giant", "relative"])
def test_no_images(name, device):
    case = MODELS[name]
    model = adapted(case.make(), case.left_out).to(device)
    x = torch.randn(0, *case.shape[1:], device=device)
    expected = model(x)
    accelerate(model)
    assert model(x).shape == expected.shape


IGNORED = {
    "beit": ("timm reads the weight of qkv", lambda: test_relative_models.build("beit", (32, 32))),
    "eva": ("timm reads the weight of qkv", lambda: test_parity.build("eva")),
    "swinv2": ("timm reads the weight of qkv", lambda: test_swin_timm.build("swinv2")),
    "torchvision": ("attn: qkv is a peft", lambda: test_swin_torchvision.build(1, [4, 4])),
    "microsoft": ("attn: qkv is a peft", lambda: test_microsoft_swin.build(2)),
}


@ops_are_other_tests
@pytest.mark.parametrize("name", IGNORED)
def test_an_adapter_that_the_original_ignores_stays_without_effect(name, device):
    """Some code multiplies by the weight of a layer that it does not call."""
    reason, make = IGNORED[name]
    model = adapted(make(), ("proj", "fc1", "fc2", "head", "reduction")).to(device)
    x = torch.randn(2, 3, 32, 32, device=device)
    model.requires_grad_()
    report = assert_parity(model, x)
    assert [entry for entry in report.kept if reason in entry.reason], report
    factors = {n: p.grad for n, p in model.named_parameters() if "qkv.lora_" in n}
    assert factors and all(grad is None for grad in factors.values())


@ops_are_other_tests
def test_an_adapter_that_is_ignored_from_the_second_call_on(device):
    """It comes after a guard was written for the module."""
    model = test_relative_models.build("beit", (32, 32)).to(device)
    accelerate(model)
    x = torch.randn(2, 3, 32, 32, device=device)
    expected = model(x)
    torch.testing.assert_close(adapted(model, ("proj", "fc1", "fc2", "head"))(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [naflexvit, test_torchvision.build])
def test_the_root_of_a_model_with_adapters_is_swapped(make):
    """PEFT leaves its configuration there."""
    model = peft.get_peft_model(make(), peft.LoraConfig(target_modules=["mlp.fc1", "mlp.0"]))
    assert "base_model.model" in {entry.module for entry in accelerate(model).swapped}


@ops_are_other_tests
@pytest.mark.parametrize("family", ["Beit", "SwinTransformer", "SwinTransformerV2"])
def test_our_own_models(family, device):
    make = {
        "Beit": lambda: models.Beit.from_timm(test_relative_models.build("beit", (32, 32))),
        "SwinTransformer": lambda: models.SwinTransformer.from_timm(test_swin_timm.build("swin")),
        "SwinTransformerV2": lambda: models.SwinTransformerV2.from_timm(test_swin_timm.build("swinv2")),
    }[family]
    model = adapted(make(), lora_dropout=0.2).to(device)
    x = torch.randn(2, 3, 32, 32, device=device)
    assert_parity(model, x)
    assert all(name.endswith((*WITH_TABLE_MLP, "head")) for name in computed_by_peft(model, x))
