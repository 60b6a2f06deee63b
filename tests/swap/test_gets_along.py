"""What other libraries do to a model, before and after accelerate: the result is theirs, and the report says why."""

import copy
import io

import pytest
import torch
from parity import shake
from torch import nn

from vitkernels import accelerate, explain, restore
from vitkernels.layers import fused

timm = pytest.importorskip("timm")

pytestmark = pytest.mark.usefixtures("computed_by_pytorch")  # the ops are other tests'
TINY = {"img_size": 32, "embed_dim": 32, "num_heads": 2, "depth": 1, "num_classes": 5}


def build(**more) -> nn.Module:
    return shake(timm.create_model("vit_tiny_patch16_224", **{**TINY, **more}).eval())


@pytest.fixture
def model(device):
    return build().to(device)


@pytest.fixture
def images(device):
    return torch.randn(2, 3, 32, 32, device=device)


@pytest.fixture
def fused_calls(monkeypatch):
    calls = []
    for name in ("norm", "attention", "mlp", "block", "patch_embed"):
        original = getattr(fused, name)
        monkeypatch.setattr(fused, name, lambda *a, f=original, n=name, **k: (calls.append(n), f(*a, **k))[1])
    return calls


def close(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def reasons(report) -> dict[str, str]:
    return {k.module: k.reason for k in report.kept}


def gradients(model, images) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(images).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


ADAPTERS = {
    "lora": ("LoraConfig", {"r": 2, "target_modules": ["qkv", "fc1"], "modules_to_save": ["head"]}),
    "dora": ("LoraConfig", {"r": 2, "target_modules": ["qkv", "fc1"], "use_dora": True}),
    "loha": ("LoHaConfig", {"r": 2, "target_modules": ["qkv", "fc1"]}),
    "ia3": ("IA3Config", {"target_modules": ["qkv", "fc1"], "feedforward_modules": ["fc1"]}),
}


@pytest.mark.parametrize(
    ("adapter", "when"),
    [("lora", "before"), ("lora", "after"), ("dora", "before"), ("loha", "after"), ("ia3", "before")],
)
def test_peft(adapter, when, model, images, fused_calls):
    peft = pytest.importorskip("peft")
    kind, options = ADAPTERS[adapter]
    without = model(images)
    plain = peft.get_peft_model(copy.deepcopy(model), getattr(peft, kind)(**options))
    with torch.no_grad():
        for parameter in plain.parameters():
            if parameter.requires_grad:  # a fresh adapter does nothing
                parameter.add_(torch.randn_like(parameter) * 0.3)
    expected, expected_grads = plain(images), gradients(plain, images)
    assert not torch.allclose(expected, without, atol=1e-2)
    if when == "after":
        accelerate(model)
    model = peft.get_peft_model(model, getattr(peft, kind)(**options))
    model.load_state_dict(plain.state_dict())
    if when == "before":
        accelerate(model)
    close(model(images), expected)
    close(gradients(model, images), expected_grads)
    report = reasons(accelerate(model))
    inner = next((name for name in report if name.endswith("blocks.0.attn")), None)
    if adapter == "lora":
        assert "block" in fused_calls and inner is None
    else:
        assert "block" not in fused_calls
        assert "norm" in fused_calls
        wanted = "qkv: adapter 'default': it is no plain LoRA" if adapter == "dora" else "qkv is a peft.tuners."
        assert wanted in report[inner]

    merged = model.merge_and_unload()
    accelerate(merged)
    fused_calls.clear()
    close(merged(images), expected)
    assert fused_calls.count("block") == 1


def torchao_int8(model):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())


def bitsandbytes_with(make):
    def swap_linears(model):
        bnb = pytest.importorskip("bitsandbytes")
        for module in list(model.modules()):
            for name, child in module.named_children():
                if type(child) is nn.Linear:
                    linear = make(bnb, child)
                    linear.load_state_dict(child.state_dict())
                    setattr(module, name, linear.to(child.weight.device))

    return swap_linears


QUANTIZED = {
    "torchao": ("torchao", torchao_int8, "qkv: weight is a Int8Tensor, not a plain Parameter"),
    "bitsandbytes 8 bit": (
        "bitsandbytes",
        bitsandbytes_with(
            lambda bnb, c: bnb.nn.Linear8bitLt(c.in_features, c.out_features, has_fp16_weights=False, threshold=6.0)
        ),
        "qkv is a Linear8bitLt, not exactly Linear",
    ),
    "bitsandbytes 4 bit": (
        "bitsandbytes",
        bitsandbytes_with(lambda bnb, c: bnb.nn.Linear4bit(c.in_features, c.out_features)),
        "qkv is a Linear4bit, not exactly Linear",
    ),
}


@pytest.mark.parametrize(
    ("kind", "when"), [("torchao", "before"), ("bitsandbytes 8 bit", "after"), ("bitsandbytes 4 bit", "before")]
)
def test_quantized_weights(kind, when, model, images, fused_calls):
    library, quantize, reason = QUANTIZED[kind]
    pytest.importorskip(library)
    plain = copy.deepcopy(model)
    quantize(plain)
    with torch.no_grad():
        expected = plain(images)
        assert not torch.equal(expected, model(images)), "quantization must show"
        for step in (accelerate, quantize) if when == "after" else (quantize, accelerate):
            step(model)
        close(model(images), expected)
    assert "block" not in fused_calls
    assert "mlp" not in fused_calls
    assert reason in reasons(accelerate(model))["blocks.0.attn"]


HOOKS = {
    "forward": lambda module, note: module.register_forward_hook(lambda *_: note()),
    "forward pre": lambda module, note: module.register_forward_pre_hook(lambda *_: note()),
    "backward": lambda module, note: module.register_full_backward_hook(lambda *_: note()),
    "backward pre": lambda module, note: module.register_full_backward_pre_hook(lambda *_: note()),
}


@pytest.mark.parametrize(
    ("kind", "when"),
    [("forward", "after"), ("forward pre", "before"), ("backward", "before"), ("backward pre", "after")],
)
def test_hooks_on_inner_modules(kind, when, model, images):
    """Each on a module that the block reads and does not call: none may be passed over."""
    seen, inner = [], ["norm1", "attn.proj", "mlp.act", "mlp.fc2"]
    expected = gradients(model, images)
    if when == "after":
        accelerate(model)
    for name in inner:
        HOOKS[kind](model.blocks[0].get_submodule(name), lambda name=name: seen.append(name))
    if when == "before":
        accelerate(model)
    close(gradients(model, images), expected)
    assert sorted(seen) == sorted(inner)
    report = reasons(explain(model))
    assert report["blocks.0"] == "a hook on norm1, which fusion would not call"
    assert report["blocks.0.attn"] == "a hook on proj, which fusion would not call"
    assert report["blocks.0.mlp"] == "a hook on act, which fusion would not call"


def weight_norm(linear):
    return nn.utils.parametrizations.weight_norm(linear)


def old_weight_norm(linear):
    return nn.utils.weight_norm(linear)


def spectral_norm(linear):
    return nn.utils.parametrizations.spectral_norm(linear).eval()


def pruned(linear):
    from torch.nn.utils import prune

    return prune.random_unstructured(linear, "weight", 0.5)


@pytest.mark.parametrize(
    ("parametrize", "when", "reason"),
    [
        (weight_norm, "after", "fc1 is a ParametrizedLinear, not exactly Linear"),
        (old_weight_norm, "before", "a hook on fc1"),
        (spectral_norm, "before", "fc1 is a ParametrizedLinear"),
        (pruned, "after", "a hook on fc1"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_parametrized_weights(parametrize, reason, when, images, device, fused_calls):
    model = build(depth=2).to(device)
    if when == "after":
        accelerate(model)
    parametrize(model.blocks[0].mlp.fc1)
    if when == "before":
        accelerate(model)
    actual, actual_grads = model(images), gradients(model, images)
    assert fused_calls.count("block") == 2, "the other block, twice"
    assert reason in reasons(explain(model))["blocks.0.mlp"]
    restore(model)
    close(actual, model(images))
    close(actual_grads, gradients(model, images))


def test_parametrized_swapped_module(model, images):
    accelerate(model)
    norm = model.norm
    nn.utils.parametrizations.weight_norm(norm)
    with torch.no_grad():
        norm.parametrizations.weight.original0.mul_(3.0)
    expected_norm = copy.deepcopy(norm)
    tokens = torch.randn(2, 5, 32, device=images.device)
    expected = nn.functional.layer_norm(tokens, (32,), expected_norm.weight, norm.bias, norm.eps)
    close(norm(tokens), expected)
    assert "its parameters are ['bias'], not ['bias', 'weight']" in reasons(accelerate(model))["norm"]


@pytest.mark.parametrize(("kind", "when"), [("timm", "before"), ("torch", "after")])
def test_moving_averages(kind, when, model, images, fused_calls):
    def average(model):
        if kind == "timm":
            return timm.utils.ModelEmaV3(model, decay=0.5)
        return torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))

    def update(ema, model):
        (ema.update if kind == "timm" else ema.update_parameters)(model)

    def train(model, accelerate_first):
        if accelerate_first:
            accelerate(model)
        ema = average(model)
        if when == "after":
            accelerate(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        for _ in range(2):
            model.zero_grad()
            model(images).square().sum().backward()
            optimizer.step()
            update(ema, model)
        return ema.module

    plain = copy.deepcopy(model)
    accelerated = train(model, when == "before")
    restore(plain)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "accelerate", lambda model: None)
        expected = train(plain, False)
    close(dict(accelerated.named_parameters()), dict(expected.named_parameters()))
    fused_calls.clear()
    close(accelerated(images), expected(images))
    assert ("block" in fused_calls) == (when == "before"), "a copy is what the model was when it was copied"


@pytest.mark.parametrize("when", ["before", "after"])
def test_compiled_training(when, model, images, fused_calls):
    expected = gradients(model, images)
    if when == "before":
        accelerate(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    if when == "after":
        close(gradients(compiled, images), {f"_orig_mod.{n}": g for n, g in expected.items()})
        accelerate(compiled)
    close(gradients(compiled, images), {f"_orig_mod.{n}": g for n, g in expected.items()})
    assert fused_calls.count("block") == 1, "traced once, through the kernels"


@pytest.mark.parametrize("when", ["before", "after"])
def test_checkpointed_blocks_are_computed_again_in_the_backward(when, model, images, fused_calls):
    model.train()
    expected = gradients(model, images)
    if when == "before":
        model.set_grad_checkpointing()
    accelerate(model)
    if when == "after":
        model.set_grad_checkpointing()
    close(gradients(model, images), expected)
    assert fused_calls.count("block") == 2, "forward and again in the backward"


def test_export(model, images):
    accelerate(model)
    with torch.no_grad():
        program = torch.export.export(model, (images,))
        close(program.module()(images), model(images))
    targets = [str(node.target) for node in program.graph.nodes]
    assert sum("vitkernels" in target for target in targets) >= 4, "a block is its kernels"
    assert program.state_dict.keys() == build().state_dict().keys()


def test_export_of_any_batch(model, images):
    accelerate(model)
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        program = torch.export.export(model, (images,), dynamic_shapes=({0: batch},))
        more = torch.randn(3, 3, 32, 32, device=images.device)
        close(program.module()(more), model(more))


@pytest.mark.parametrize("exported", [(32, 32), (32, 48)])
def test_export_of_any_size(exported, device):
    """One program for every size, as of timm's model, be it the model's own size or not."""
    model = build(dynamic_img_size=True).to(device).eval()
    accelerate(model)
    size = {i: 16 * torch.export.Dim(name, min=2, max=64) for i, name in ((2, "height"), (3, "width"))}
    with torch.no_grad():
        images = torch.randn(2, 3, *exported, device=device)
        program = torch.export.export(model, (images,), dynamic_shapes=(size,))
        for size in ((32, 32), (32, 48), (48, 32)):
            images = torch.randn(2, 3, *size, device=device)
            close(program.module()(images), model(images))


def test_state_dicts_in_both_directions(model, images):
    accelerated = build().to(images.device)
    accelerate(accelerated)
    accelerated.load_state_dict(model.state_dict())
    close(accelerated(images), model(images))
    file = io.BytesIO()
    torch.save(accelerated.state_dict(), file)
    file.seek(0)
    plain = build().to(images.device)
    plain.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(plain(images), model(images))
    accelerated.load_state_dict({k: v.clone() for k, v in build().to(images.device).state_dict().items()}, assign=True)
    plain.load_state_dict(accelerated.state_dict(), assign=True)
    close(accelerated(images), plain(images))
    assert explain(accelerated).swapped == explain(plain).swapped


def test_functional_call_with_other_parameters(model, images):
    other = {name: p * 1.5 for name, p in model.named_parameters()}
    expected = torch.func.functional_call(model, other, (images,))
    accelerate(model)
    close(torch.func.functional_call(model, other, (images,)), expected)


def test_optimizer_made_before_and_after(model, images):
    plain = copy.deepcopy(model)
    before = torch.optim.AdamW(model.parameters(), lr=1e-3)
    accelerate(model)
    after = torch.optim.AdamW(model.parameters(), lr=1e-3)
    assert [id(p) for g in before.param_groups for p in g["params"]] == [
        id(p) for g in after.param_groups for p in g["params"]
    ]
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-3)
    for optimizer, one in ((before, model), (reference, plain)):
        for _ in range(2):
            gradients(one, images)
            optimizer.step()
    close(model(images), plain(images))
