"""Tracers that see modules as Python does: torch.fx, ``torch.jit.trace`` and ``torch.jit.script``.

What they make of an accelerated model is what they make of the plain one: the original forwards, node by node.
"""

import copy
import warnings

import pytest
import test_dino
import torch
from parity import shake
from torch import nn

from vitkernels import accelerate, restore

timm = pytest.importorskip("timm")
torchvision_models = pytest.importorskip("torchvision.models")
from timm.models import create_feature_extractor as timms_extractor  # noqa: E402
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names  # noqa: E402

pytestmark = pytest.mark.usefixtures("computed_by_pytorch")  # the ops are other tests'

TINY = {"img_size": 32, "embed_dim": 32, "num_heads": 2, "depth": 1, "num_classes": 5}
SWIN = {"embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2)}


def timm_model(name: str, **more):
    return lambda: timm.create_model(name, **(more or TINY))


def open_clip_tower() -> nn.Module:
    pytest.importorskip("open_clip")
    from test_open_clip import tower

    return tower(layers=1)


def part_of_transformers(name: str, *ends: str):
    """The first module whose class's name ends so: a whole model of transformers is more than torch.fx can follow."""

    def build() -> nn.Module:
        transformers = pytest.importorskip("transformers")
        from hf_models import VISION

        if not hasattr(transformers, f"{name}Config"):
            pytest.skip(f"this release of transformers has no {name}")
        model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**VISION))
        return next(module for module in model.modules() if type(module).__name__.endswith(ends))

    return build


MODELS = {
    "timm vit": timm_model("vit_tiny_patch16_224", init_values=0.5, qk_norm=True, **TINY),
    "timm eva": timm_model("vit_small_patch16_rope_224", **TINY),
    "timm post-norm": timm_model("vit_relpos_base_patch16_clsgap_224", **TINY),
    "timm swin": timm_model("swin_tiny_patch4_window7_224", img_size=32, window_size=4, **SWIN),
    "torchvision vit": lambda: torchvision_models.VisionTransformer(32, 16, 1, 2, 32, 128, num_classes=5),
    "torchvision swin": lambda: torchvision_models.swin_transformer.SwinTransformer([4, 4], window_size=[4, 4], **SWIN),
    "open_clip": open_clip_tower,
}
PARTS = {
    "dinov2's mlp": lambda: test_dino.dinov2()[1].mlp,
    "dinov2's swiglu": lambda: test_dino.dinov2(ffn_layer=test_dino.SwiGLUFFNFused)[1].mlp,
    "dinov3's mlp": lambda: test_dino.DINOv3().blocks[0].mlp,
    "transformers' mlp": part_of_transformers("ViT", "MLP", "Intermediate"),
    "transformers' gated mlp": part_of_transformers("DINOv3ViT", "MLP"),
    "torch's norm": lambda: nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 5)),
}
# What torch.fx cannot follow, plain or not.
BEYOND_FX = {
    "dinov2": test_dino.dinov2,
    "dinov3": test_dino.DINOv3,
    "transformers' layer": part_of_transformers("ViT", "Layer"),
}
ALL = MODELS | PARTS | BEYOND_FX


def pair(name: str, device) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """A plain model, the same one accelerated, and an input."""
    plain = shake(ALL[name]()).to(device).eval()
    fast = copy.deepcopy(plain)
    assert accelerate(fast).swapped
    tokens = name in PARTS or name == "transformers' layer"
    return plain, fast, torch.randn((2, 5, 32) if tokens else (2, 3, 32, 32), device=device)


def nodes(graph: torch.fx.Graph) -> list[tuple]:
    return [(node.op, node.name, str(node.target)) for node in graph.nodes]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", MODELS | PARTS)
def test_fx(name, training, device):
    plain, fast, x = pair(name, device)
    plain.train(training), fast.train(training)
    expected, actual = torch.fx.symbolic_trace(plain), torch.fx.symbolic_trace(fast)
    assert nodes(actual.graph) == nodes(expected.graph)
    assert actual.code == expected.code
    if not training:
        # A leaf, such as torch.nn's LayerNorm, is called as it is: fused in the accelerated model.
        torch.testing.assert_close(actual(x), expected(x), rtol=1e-4, atol=1e-4)


def test_fx_with_the_module_itself_as_root_and_masks(device):
    """All arguments are proxies then, those with defaults too."""
    plain, fast, _ = pair("timm vit", device)
    for path in ("blocks.0", "blocks.0.attn"):
        for arguments in ({"is_causal": False}, {"is_causal": False, "attn_mask": None}):
            traced = [torch.fx.symbolic_trace(model.get_submodule(path), arguments) for model in (plain, fast)]
            assert traced[1].code == traced[0].code


def test_leaves_stay_leaves(device):
    """torch.nn's LayerNorm is one node, whose name an extractor goes by; timm's and open_clip's are traced through."""
    plain, fast, _ = pair("torchvision swin", device)
    names = get_graph_node_names(plain, suppress_diff_warning=True)
    assert get_graph_node_names(fast, suppress_diff_warning=True) == names
    assert "features.1.0.norm1" in names[0]


@pytest.mark.parametrize(
    ("name", "node"), [("torchvision vit", "encoder.layers.encoder_layer_0.mlp"), ("torchvision swin", "norm")]
)
def test_torchvisions_extractor(name, node, device):
    plain, fast, x = pair(name, device)
    expected = create_feature_extractor(plain, {node: "f"}, suppress_diff_warning=True)(x)["f"]
    extractor = create_feature_extractor(fast, {node: "f"}, suppress_diff_warning=True)
    torch.testing.assert_close(extractor(x)["f"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["timm vit", "timm eva", "timm swin"])
def test_timms_extractor(name, device):
    plain, fast, x = pair(name, device)
    node = "layers.0.blocks.0.mlp.fc2" if "swin" in name else "blocks.0.mlp.fc2"
    expected = timms_extractor(plain, {node: "f"})(x)["f"]
    torch.testing.assert_close(timms_extractor(fast, {node: "f"})(x)["f"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.* is deprecated")
@pytest.mark.parametrize("name", ALL)
def test_jit_trace(name, device):
    """The original's operations, whatever size comes next, and what is saved needs no vitkernels."""
    plain, fast, x = pair(name, device)
    with torch.no_grad():
        expected, actual = (torch.jit.trace(model, x) for model in (plain, fast))
        assert "vitkernels::" not in str(actual.inlined_graph)
        kinds = [[node.kind() for node in traced.inlined_graph.nodes()] for traced in (expected, actual)]
        assert kinds[1] == kinds[0]
        for batch in (2, 3):
            other = torch.randn(batch, *x.shape[1:], device=device)
            assert torch.equal(actual(other), expected(other))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.* is deprecated")
def test_jit_trace_warns_of_no_more_than_the_plain_models(device):
    told = []
    for model in pair("open_clip", device)[:2]:
        with warnings.catch_warnings(record=True) as caught, torch.no_grad():
            warnings.simplefilter("always")
            torch.jit.trace(model, torch.randn(2, 3, 32, 32, device=device))
        told.append({(w.category, str(w.message)) for w in caught})
    assert told[1] == told[0]


SCRIPTED = [name for name in MODELS | PARTS if name not in ("dinov2's swiglu", "transformers' gated mlp")]


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
@pytest.mark.parametrize("name", SCRIPTED)
def test_jit_script(name, device):
    plain, fast, x = pair(name, device)
    expected, actual = torch.jit.script(plain), torch.jit.script(fast)
    with torch.no_grad():
        assert torch.equal(actual(x), expected(x))
    assert str(actual.inlined_graph).count("\n") == str(expected.inlined_graph).count("\n")
    assert {type(m) for m in fast.modules()} != {type(m) for m in plain.modules()}, "the model itself stays fused"
    restore(fast)
    assert {type(m) for m in fast.modules()} == {type(m) for m in plain.modules()}
