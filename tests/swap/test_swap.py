"""What must survive a swap: everything of timm's and PyTorch's that people do to a model."""

import copy
import io
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from torch import nn

from vitkernels import accelerate, explain, restore, use_backend
from vitkernels.layers import fused

timm = pytest.importorskip("timm")

pytestmark = pytest.mark.usefixtures("computed_by_pytorch")  # the ops are other tests'
TINY = {"img_size": 32, "embed_dim": 32, "num_heads": 2, "depth": 2, "num_classes": 5}


def build(**more) -> nn.Module:
    model = timm.create_model("vit_tiny_patch16_224", **{**TINY, **more}).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # fresh weights are so small that a skipped layer would not show
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.fixture
def model(device):
    return build().to(device)


@pytest.fixture
def images(device):
    return torch.randn(2, 3, 32, 32, device=device)


@pytest.fixture
def fused_calls(monkeypatch):
    """The names of the fused forwards in the order of their calls."""
    calls = []
    for name in ("norm", "attention", "mlp", "block", "patch_embed"):
        original = getattr(fused, name)

        def spy(*args, _name=name, _original=original, **kwargs):
            calls.append(_name)
            return _original(*args, **kwargs)

        monkeypatch.setattr(fused, name, spy)
    return calls


def classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def close(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_blocks_run_fused(model, images, fused_calls):
    expected = model(images)
    accelerate(model)
    close(model(images), expected)
    assert fused_calls.count("block") == 2
    assert fused_calls.count("patch_embed") == 1


def test_nothing_moves(model, images):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    parameters, keys = dict(model.named_parameters()), list(model.state_dict())
    vars_before = [set(vars(module)) for module in model.modules()]
    accelerate(model)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert list(model.state_dict()) == keys
    assert [set(vars(module)) for module in model.modules()] == vars_before, "a fused class has state of its own"
    before = model.blocks[0].attn.qkv.weight.detach().clone()
    model(images).sum().backward()
    optimizer.step()
    assert not torch.equal(model.blocks[0].attn.qkv.weight, before)


def test_isinstance_holds(model):
    accelerate(model)
    block = model.blocks[0]
    assert isinstance(block, timm.models.vision_transformer.Block)
    assert isinstance(block.norm1, nn.LayerNorm)
    assert isinstance(block.attn, timm.layers.Attention)
    assert isinstance(block.mlp, timm.layers.Mlp)
    assert isinstance(model.patch_embed, timm.layers.PatchEmbed)


def test_twice_is_once_and_restore_is_the_inverse(model):
    before = classes(model)
    first = accelerate(model)
    swapped = classes(model)
    assert swapped != before
    assert accelerate(model) == first == explain(model)
    assert classes(model) == swapped
    back = restore(model)
    assert classes(model) == before
    assert [(s.module, s.was, s.now) for s in back.swapped] == [(s.module, s.now, s.was) for s in first.swapped]
    assert restore(model).swapped == ()


def test_explain_touches_nothing(model):
    before = classes(model)
    report = explain(model)
    assert classes(model) == before
    assert report == accelerate(model)


def test_hook_on_a_block_fires_and_the_block_stays_fused(model, images, fused_calls):
    seen = []
    model.blocks[0].register_forward_hook(lambda module, args, output: seen.append(output.shape))
    accelerate(model)
    model(images)
    assert seen == [(2, 5, 32)]
    assert fused_calls.count("block") == 2


@pytest.mark.parametrize("when", ["before", "after"])
def test_hook_on_a_bypassed_child_fires(model, images, fused_calls, when):
    expected = model(images)
    seen = []
    if when == "after":
        accelerate(model)
    handle = model.blocks[0].attn.proj.register_forward_hook(lambda *_: seen.append("proj"))
    if when == "before":
        report = accelerate(model)
        reasons = {k.module: k.reason for k in report.kept}
        assert "hook on proj" in reasons["blocks.0"]
        assert "hook on proj" in reasons["blocks.0.attn"]
        assert "blocks.0.mlp" in {s.module for s in report.swapped}
    close(model(images), expected)
    assert seen == ["proj"]
    assert fused_calls.count("block") == 1  # the other one
    assert fused_calls.count("mlp") == 1, "the Mlp of the block that fell back still runs fused"
    handle.remove()
    accelerate(model)
    fused_calls.clear()
    model(images)
    assert fused_calls.count("block") == 2


def test_global_hook_sees_every_child(model, images):
    accelerate(model)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        model(images)
    finally:
        handle.remove()
    assert model.blocks[1].mlp.fc2 in seen


class Lora(nn.Linear):
    """As PEFT does it: a subclass in the place of the Linear, with the same weight and an addition."""

    def forward(self, x):
        return super().forward(x) + x[..., :1]


def test_adapter_put_in_later_is_followed(model, images):
    plain, without = copy.deepcopy(model), model(images)
    accelerate(model)
    for m in (plain, model):
        m.blocks[0].attn.qkv.__class__ = Lora
    expected = plain(images)
    assert not torch.allclose(expected, without, atol=1e-2)
    close(model(images), expected)
    reasons = {k.module: k.reason for k in accelerate(model).kept}
    assert "qkv is a Lora, not exactly Linear" in reasons["blocks.0.attn"]
    assert type(model.blocks[0]) is timm.models.vision_transformer.Block


def test_parametrization_and_instance_forward_are_followed(model, images):
    expected = model(images)
    accelerate(model)

    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    nn.utils.parametrize.register_parametrization(model.blocks[0].mlp.fc1, "weight", Double())
    fc2 = model.blocks[1].mlp.fc2
    fc2.forward = lambda x: -nn.functional.linear(x, fc2.weight)
    actual = model(images)
    assert not torch.allclose(actual, expected, atol=1e-2)
    reasons = {k.module: k.reason for k in accelerate(model).kept}
    assert "fc1 is a ParametrizedLinear" in reasons["blocks.0.mlp"]
    assert "bound to the instance" in reasons["blocks.1.mlp"]
    restore(model)
    close(actual, model(images))


def test_deepcopy_and_pickle(model, images):
    accelerate(model)
    expected = model(images)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for copied in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert classes(copied) == classes(model)
        assert torch.equal(copied(images), expected)


def test_gradient_checkpointing(model, images):
    model.train()
    model(images).sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    accelerate(model)
    model.set_grad_checkpointing()
    model.zero_grad()
    model(images).sum().backward()
    close([p.grad for p in model.parameters()], expected)


def test_intermediates_and_masks(model, images, device):
    mask = torch.rand(5, 5, device=device) > 0.4
    mask.fill_diagonal_(True)

    def everything():
        with torch.no_grad():
            return [
                model.forward_intermediates(images, indices=[0, 1]),
                model.get_intermediate_layers(images, n=1, norm=True),
                model.forward_features(images, attn_mask=mask),
                model.forward_features(images, is_causal=True),
            ]

    expected = everything()
    accelerate(model)
    close(everything(), expected)


def test_new_head_and_new_size(model, images, device):
    accelerate(model)
    model.reset_classifier(7)
    model.set_input_size(img_size=48)
    larger = torch.randn(1, 3, 48, 48, device=device)
    actual = model(larger)
    restore(model)
    close(actual, model(larger))
    assert actual.shape == (1, 7)


def test_compiled_code_follows_the_swap_and_what_comes_later(model, images):
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(" ".join(str(node.target) for node in graph.graph.nodes))
        return graph.forward

    with torch.no_grad():
        expected = model(images)
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        close(compiled(images), expected)
        report = accelerate(compiled)
        assert "_orig_mod.blocks.0" in {s.module for s in report.swapped}
        close(compiled(images), expected)
        for block in model.blocks:
            block.attn.qkv.__class__ = Lora
            block.mlp.fc1.__class__ = Lora
        with_adapters = model(images)
        close(compiled(images), with_adapters)
    assert not torch.allclose(with_adapters, expected, atol=1e-2)
    assert ["vitkernels.mlp" in graph for graph in graphs] == [False, True, False]


def test_data_parallel_wrapper(model, images):
    wrapped = nn.DataParallel(model)
    assert accelerate(wrapped).swapped == tuple(
        type(s)(f"module.{s.module}", s.was, s.now) for s in explain(model).swapped
    )


def test_fx_tracing_sees_the_original(model, images):
    block = model.blocks[0].eval()
    accelerate(model)
    tokens = torch.randn(2, 5, 32, device=images.device)
    traced = torch.fx.symbolic_trace(block.mlp)
    close(traced(tokens), block.mlp(tokens))


def test_meta_model():
    model = timm.create_model("vit_base_patch16_224", device="meta")
    assert len(explain(model).swapped) == 62
    assert accelerate(model) == explain(model)
    assert model(torch.empty(1, 3, 224, 224, device="meta")).shape == (1, 1000)


def test_backend_torch_runs_the_original(model, images, fused_calls):
    expected = model(images)
    accelerate(model)
    with use_backend("torch"):
        assert torch.equal(model(images), expected)
    assert fused_calls == []


REASONS = {
    "head_dim": ({"embed_dim": 264, "num_heads": 1}, "attn", "head dim is 264"),
    "act": ({"act_layer": nn.ReLU}, "mlp", "act is a ReLU"),
    "gate": ({"mlp_layer": timm.layers.GluMlp, "act_layer": nn.Sigmoid}, "mlp", "act is a Sigmoid"),
}


@pytest.mark.parametrize("case", REASONS)
def test_kept_with_a_reason(case, images):
    options, child, reason = REASONS[case]
    model = build(depth=1, **options).to(images.device)
    expected = model(images)
    report = accelerate(model)
    reasons = {k.module: k.reason for k in report.kept}
    assert reason in reasons[f"blocks.0.{child}"]
    assert reason in reasons["blocks.0"]
    assert {"mlp", "attn"} - {child} <= {s.module.removeprefix("blocks.0.") for s in report.swapped}
    close(model(images), expected)


def spoil_dtype(block):
    block.mlp.fc2.double()


def spoil_child(block):
    block.attn.adapter = nn.Linear(32, 32)


def spoil_attribute(block):
    block.attn.window = 7


def spoil_weight(block):
    block.attn.qkv.weight = nn.Parameter(torch.randn(96, 32).as_subclass(Quantized))


def spoil_fast_norm(block):
    block.norm1._fast_norm = True


def spoil_layer_scale(block):
    block.ls1 = timm.layers.LayerScale(32, inplace=True)


def spoil_norm(block):
    block.norm1 = timm.layers.LayerNormFp32(32)


def spoil_subclass(block):
    block.mlp.__class__ = type("MyMlp", (timm.layers.Mlp,), {})


class Quantized(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("spoil", "where", "reason"),
    [
        (spoil_dtype, ".mlp", "mixed dtypes: float32, float64"),
        (spoil_child, ".attn", "a child 'adapter' (Linear) that is unknown"),
        (spoil_attribute, ".attn", "an attribute 'window' that is unknown"),
        (spoil_weight, ".attn", "qkv: weight is a Quantized, not a plain Parameter"),
        (spoil_fast_norm, ".norm1", "fast norm"),
        (spoil_layer_scale, "", "LayerScale works in place"),
        (spoil_norm, ".norm1", "a subclass of LayerNorm"),
        (spoil_subclass, ".mlp", "a subclass of Mlp"),
    ],
)
def test_spoilt_blocks_fail_closed(spoil, where, reason):
    block = timm.models.vision_transformer.Block(32, 2)
    spoil(block)
    model = nn.Sequential(block)
    reasons = {k.module: k.reason for k in explain(model).kept}
    assert reason in reasons[f"0{where}"]
    assert "0" in reasons
    with pytest.raises(NotImplementedError, match="strict, and"):
        accelerate(model, strict=True)
    assert type(block) is timm.models.vision_transformer.Block, "strict raised, so nothing may have changed"


def test_strict_passes_where_all_is_known(model):
    accelerate(model, strict=True)


def test_nothing_to_swap():
    report = accelerate(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.BatchNorm1d(3)))
    assert report.swapped == ()
    assert [(k.module, k.cls) for k in report.kept] == [("0", "Linear"), ("2", "BatchNorm1d")]
    with pytest.raises(NotImplementedError, match="no module of ReLU can be swapped"):
        accelerate(nn.ReLU(), strict=True)


@pytest.mark.parametrize("function", [accelerate, explain, restore])
def test_only_modules(function):
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module, got a dict"):
        function({})


def test_release_of_timm_that_lacks_a_class_is_told_and_survived(monkeypatch):
    monkeypatch.delattr(timm.layers, "GluMlp")
    for name in ("vitkernels.swap.timm", "vitkernels.swap.timm.layers"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.warns(UserWarning, match="the modules of timm .* are not known here: cannot import name 'GluMlp'"):
        report = explain(nn.LayerNorm(4))
    assert len(report.swapped) == 1


def test_plain_layer_norm_anywhere(device):
    model = nn.Sequential(nn.LayerNorm(12), nn.LayerNorm((3, 12))).to(device)
    x = torch.randn(2, 3, 12, device=device)
    expected = model(x)
    report = accelerate(model)
    assert [s.module for s in report.swapped] == ["0"]
    assert "last 2 dims" in report.kept[0].reason
    close(model(x), expected)


def in_a_fresh_process(code: str) -> None:
    tests = pathlib.Path(__file__).parents[1]
    environment = {k: v for k, v in os.environ.items() if k != "VITKERNELS_BACKEND"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    environment["PYTHONPATH"] = os.pathsep.join([str(tests.parent), str(tests), environment.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr


# conftest makes torchvision, and with it timm, importable, and asks for an emulated GPU, which is not wanted here.
WITHOUT_TRITON = """
import os, sys
sys.modules["triton"] = None
import torch, conftest
del os.environ["VITKERNELS_BACKEND"]
import timm, vitkernels, vitkernels.ops, vitkernels.models
model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5)
x = torch.randn(2, 3, 32, 32)
plain = model(x)
report = vitkernels.accelerate(model)
assert len(report.swapped) == 12, report
assert not vitkernels.ops.uses_kernels(x)
assert torch.equal(model(x), plain)
"""


def test_without_triton():
    in_a_fresh_process(WITHOUT_TRITON)


def test_cpu_runs_the_very_original():
    model, x = build(), torch.randn(2, 3, 32, 32)
    plain = model(x)
    with use_backend("auto"):
        assert len(accelerate(model).swapped) == 12
        assert torch.equal(model(x), plain)


def test_no_library_is_imported_for_those_who_do_not_use_it():
    code = """
import sys, torch, vitkernels
from vitkernels import *
assert vitkernels.accelerate(torch.nn.Sequential(torch.nn.LayerNorm(4))).swapped
assert not {"timm", "transformers", "torchvision", "open_clip"} & set(sys.modules)
"""
    in_a_fresh_process(code)
