"""PEFT's LoRA on an accelerated model: the layers stay fused, and what they compute and train is PEFT's."""

import contextlib
import copy
import io

import pytest
import torch
from parity import assert_parity, shake
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from vitkernels import accelerate, ops, restore, use_backend
from vitkernels.models import VisionTransformer
from vitkernels.testing import check

timm = pytest.importorskip("timm")
peft = pytest.importorskip("peft")
hotswap = pytest.importorskip("peft.utils.hotswap")

ALL = ["qkv", "proj", "fc1", "fc2"]
TINY = {"img_size": 32, "embed_dim": 32, "num_heads": 2, "depth": 2, "num_classes": 5, "init_values": 0.5}


def build(**more) -> nn.Module:
    return shake(timm.create_model("vit_tiny_patch16_224", **{**TINY, **more}).eval())


def config(**more) -> "peft.LoraConfig":
    options = {"r": 4, "target_modules": ALL, "exclude_modules": "patch_embed.*", "init_lora_weights": False}
    return peft.LoraConfig(**{**options, **more})


def adapted(model: nn.Module, **more) -> nn.Module:
    torch.manual_seed(1)
    return peft.get_peft_model(model, config(**more))


@pytest.fixture
def model(device) -> nn.Module:
    return build().to(device)


@pytest.fixture
def images(device):
    return torch.randn(2, 3, 32, 32, device=device)


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The names of the ops in the order of their calls."""
    made = []
    for name in ("block", "linear", "lora_linear", "mlp", "lora_mlp", "add_layer_norm"):
        original = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, f=original, n=name, **k: (made.append(n), f(*a, **k))[1])
    return made


BLOCK = ["lora_linear", "lora_linear", "add_layer_norm", "lora_mlp"]


def close(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def gradients(model, images, seed=0) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(seed)
    model(images).float().square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def reasons(model) -> dict[str, str]:
    return {entry.module: entry.reason for entry in accelerate(model).kept}


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_block_runs_fused(when, model, images, calls):
    plain = adapted(copy.deepcopy(model), modules_to_save=["head"])
    if when == "after":
        accelerate(model)
    model = adapted(model, modules_to_save=["head"])
    if when == "before":
        report = accelerate(model)
        assert not [entry for entry in report.kept if "blocks" in entry.module], "an adapter's parts are the block's"
    keys = list(plain.state_dict())
    assert list(model.state_dict()) == keys
    with use_backend("torch"):
        expected, expected_grads = plain(images), gradients(plain, images)
    calls.clear()
    close(model(images), expected)
    assert calls == 2 * BLOCK
    actual = gradients(model, images)
    close(actual, expected_grads)
    assert sum("lora" in name for name in actual) == 2 * 4 * 2
    assert {name for name in actual if "lora" not in name} == {
        f"base_model.model.head.modules_to_save.default.{name}" for name in ("weight", "bias")
    }
    restore(model)
    with use_backend("torch"):
        assert torch.equal(model(images), expected)


@pytest.mark.parametrize(
    ("dtype", "cast"), [(torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False), (torch.float16, False)]
)
def test_parity(dtype, cast, device):
    """PEFT keeps adapters in fp32 beside weights of 16 bits, unless told not to (``autocast_adapter_dtype``)."""
    model = build(depth=1).to(device, dtype)
    model = peft.get_peft_model(model, config(r=8, lora_alpha=12), autocast_adapter_dtype=cast)
    factor = model.base_model.model.blocks[0].attn.qkv.lora_A["default"].weight
    assert factor.dtype == (torch.float32 if cast else dtype)
    report = assert_parity(model, torch.randn(2, 3, 32, 32, device=device, dtype=dtype))
    assert not [entry for entry in report.kept if "blocks" in entry.module]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_wider_or_narrower_adapter_runs_as_it_did(dtype, device, calls):
    """Of fp16 weights with fp32 adapters A's gradient would be 0 in fp16: B is small in the first steps."""
    model = adapted(build(depth=1)).to(device)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data * 1e-7 if "lora_B" in name else parameter.data
        parameter.data = parameter.data if "lora_" in name else parameter.data.to(dtype)
    images = torch.randn(2, 3, 32, 32, device=device, dtype=dtype)
    plain, wide = copy.deepcopy(model), copy.deepcopy(model).double()
    told = reasons(model)
    assert f"lora_A's weight is torch.float32 on {device}" in told["base_model.model.blocks.0.attn"]
    with use_backend("torch"):
        expected, truth = gradients(plain, images), gradients(wide, images.double())
    actual = gradients(model, images)
    for name in (name for name in expected if "lora_A" in name):
        verdict = check(name, actual[name], expected[name], truth[name])
        assert verdict.passed, f"{name}: {verdict.detail}"
        assert expected[name].abs().max() > 0
    assert not [name for name in calls if "lora" in name]


@pytest.mark.parametrize("training", [False, True])
def test_dropout_drops_the_same(training, model, images, calls):
    plain = adapted(copy.deepcopy(model), lora_dropout=0.3).train(training)
    model = adapted(model, lora_dropout=0.3).train(training)
    accelerate(model)
    with use_backend("torch"):
        expected = gradients(plain, images, seed=3)
    calls.clear()
    close(gradients(model, images, seed=3), expected)
    mlp = ["lora_linear", "lora_linear"] if training else ["lora_mlp"]
    assert calls == 2 * [*BLOCK[:-1], *mlp]


def test_dropout_beside_other_randomness(device, images, calls):
    """Attention's own dropout draws otherwise (docs), so it is off; the others draw in timm's and PEFT's order."""
    model = build(proj_drop_rate=0.2, drop_path_rate=0.4).to(device)
    plain = adapted(copy.deepcopy(model), lora_dropout=0.3).train()
    model = adapted(model, lora_dropout=0.3).train()
    accelerate(model)
    with use_backend("torch"):
        expected = gradients(plain, images, seed=3)
    close(gradients(model, images, seed=3), expected)
    assert "lora_linear" in calls


def add_second(model: nn.Module) -> nn.Module:
    """Add an adapter of another rank, scaled as rsLoRA scales, on other layers too, and activate both."""
    model.add_adapter("other", config(r=3, target_modules=["qkv", "fc2"], use_rslora=True))
    model.base_model.set_adapter(["default", "other"])
    return model


def test_several_adapters(model, images, calls):
    torch.manual_seed(1)
    plain = add_second(adapted(copy.deepcopy(model)))
    torch.manual_seed(1)
    accelerate(model)
    model = add_second(adapted(model))
    model.load_state_dict(plain.state_dict())
    for active in (["default", "other"], ["other"], ["default"]):
        for each in (plain, model):
            each.base_model.set_adapter(active)
        with use_backend("torch"):
            expected, grads = plain(images), gradients(plain, images)
        calls.clear()
        close(model(images), expected)
        assert "block" not in calls and calls.count("lora_mlp") == 2
        close(gradients(model, images), grads)


def test_disabled_and_merged(model, images, calls):
    without = model(images)
    model = adapted(model)
    accelerate(model)
    adapted_once = model(images)
    assert not torch.allclose(adapted_once, without, atol=1e-2)
    calls.clear()
    with model.disable_adapter():
        close(model(images), without)
    assert calls == ["block", "block"]
    model.merge_adapter()
    calls.clear()
    close(model(images), adapted_once)
    assert calls == ["block", "block"]
    with model.disable_adapter():  # PEFT's forward takes the weights apart again
        close(model(images), without)
    assert calls == ["block", "block"]
    close(model(images), adapted_once)
    assert calls[2:] == 2 * BLOCK


def test_saved_loaded_and_unloaded(model, images, calls, tmp_path):
    base = copy.deepcopy(model)
    model = adapted(model, modules_to_save=["head"])
    accelerate(model)
    expected = model(images)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).to(images.device)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    with use_backend("torch"):
        close(loaded(images), expected)
    accelerate(base)
    close(peft.PeftModel.from_pretrained(base, tmp_path)(images), expected)
    merged = model.merge_and_unload()
    calls.clear()
    close(merged(images), expected)
    assert calls == ["block", "block"]


def test_a_weighted_adapter(model, images):
    model = add_second(adapted(model))
    plain = copy.deepcopy(model)
    accelerate(model)
    for each in (model, plain):
        each.add_weighted_adapter(["default", "other"], [0.7, 0.2], "both", combination_type="cat")
        each.set_adapter("both")
    with use_backend("torch"):
        expected = plain(images)
    close(model(images), expected)


def test_a_copy_and_training(model, images):
    """An optimizer's steps, which change the adapters in place, are seen; the base stays."""
    plain = adapted(copy.deepcopy(model))
    accelerate(model)
    model = copy.deepcopy(adapted(model))
    for each, backend in ((plain, "torch"), (model, None)):
        optimizer = torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=0.01)
        with use_backend(backend) if backend else contextlib.nullcontext():
            for _ in range(2):
                optimizer.zero_grad()
                each(images).square().mean().backward()
                optimizer.step()
    close(dict(model.named_parameters()), dict(plain.named_parameters()))


def first(model: nn.Module) -> nn.Module:
    return model.base_model.model.blocks[0].attn.qkv


def hook(at: str):
    return lambda m: first(m).get_submodule(at).register_forward_hook(lambda _, args, out: out * 1.5)


def set_forward(m: nn.Module) -> None:
    down = first(m).lora_A["default"]
    down.forward = lambda x: type(down).forward(down, x) * 2.0


def replace(part: str, make):
    return lambda m: first(m).get_submodule(part).__setitem__("default", make(first(m).get_submodule(part)["default"]))


class Other(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 3.0


def other(linear: nn.Linear) -> Other:
    made = Other(linear.in_features, linear.out_features, bias=False, device=linear.weight.device)
    made.weight = linear.weight
    return made


def add_bias(m: nn.Module) -> None:
    up = first(m).lora_B["default"]
    up.bias = nn.Parameter(torch.ones(len(up.weight), device=up.weight.device))


def two_with_dropout(m: nn.Module) -> None:
    add_second(m)
    first(m).lora_dropout["other"] = nn.Dropout(0.1)


def adapt_the_base(m: nn.Module) -> None:
    wrapped = peft.get_peft_model(nn.Sequential(first(m).base_layer), peft.LoraConfig(target_modules=["0"]))
    first(m).base_layer = wrapped.base_model.model[0]


def wrap_the_base(m: nn.Module) -> None:
    first(m).base_layer = nn.Sequential(first(m).base_layer)


STRANGE = {
    "a hook on PEFT's layer": (hook(""), "a hook, which fusion would not call"),
    "a hook on the base layer": (hook("base_layer"), "a hook on qkv"),
    "a hook on A": (hook("lora_A.default"), "a hook or a forward of its own on lora_A"),
    "a hook on B": (hook("lora_B.default"), "a hook or a forward of its own on lora_B"),
    "a hook on the dropout": (hook("lora_dropout.default"), "a hook or a forward of its own on lora_dropout"),
    "another forward": (set_forward, "a hook or a forward of its own on lora_A"),
    "another class": (replace("lora_A", other), "lora_A is a Other"),
    "another dropout": (replace("lora_dropout", lambda _: nn.AlphaDropout(0.0)), "lora_dropout is a AlphaDropout"),
    "a bias": (add_bias, "lora_B has a bias"),
    "an unknown attribute": (lambda m: setattr(first(m), "new_option", 2), "'new_option', which is unknown here"),
    "an unknown child": (lambda m: first(m).add_module("gate", nn.Identity()), "'gate', which is unknown here"),
    "no cast": (lambda m: (setattr(first(m), "cast_input_dtype_enabled", False), first(m).lora_A.double(),
                           first(m).lora_B.double()), "lora_A's weight is torch.float64"),
    "a wrapped base layer": (wrap_the_base, "its base layer is a Sequential, which has no weight"),
    "a method of its own": (lambda m: setattr(first(m), "_cast_input_dtype", lambda x, dtype: 2 * x),
                            "its method '_cast_input_dtype' is hidden"),
    "several, one with dropout": (two_with_dropout, "several adapters are active, and it drops something"),
    "an adapter of an adapter": (adapt_the_base, "qkv is a peft.tuners.lora.layer.Linear, not exactly Linear"),
}  # fmt: skip


@pytest.mark.parametrize("case", STRANGE)
def test_what_is_no_plain_lora_runs_as_it_did(case, model, images, calls):
    change, reason = STRANGE[case]
    plain, model = adapted(copy.deepcopy(model)), adapted(model)
    accelerate(model)
    model(images)
    assert calls == 2 * BLOCK
    for each in (plain, model):
        torch.manual_seed(5)
        change(each)
    calls.clear()
    if case != "no cast":  # PyTorch refuses
        torch.manual_seed(5)
        with use_backend("torch"):
            expected = plain(images)
        torch.manual_seed(5)
        close(model(images), expected)
        assert calls.count("lora_mlp") == 2 and calls.count("lora_linear") < 4, "the change is not seen at the call"
    told = reasons(model)["base_model.model.blocks.0.attn"]
    assert reason in told, told


@pytest.mark.parametrize("variant", ["use_dora", "lora_bias"])
def test_variants_stay_unfused(variant, model, images, calls):
    plain, model = adapted(copy.deepcopy(model), **{variant: True}), adapted(model, **{variant: True})
    told = reasons(model)["base_model.model.blocks.1.mlp"]
    assert "fc1: adapter 'default': " + {"use_dora": "it is no plain LoRA but DoraLinearVariant",
                                         "lora_bias": "lora_B has a bias"}[variant] in told  # fmt: skip
    with use_backend("torch"):
        expected, grads = plain(images), gradients(plain, images)
    close(model(images), expected)
    close(gradients(model, images), grads)
    assert "lora_linear" not in calls and "lora_mlp" not in calls


def test_a_batch_of_several_adapters(model, images):
    """PEFT's hooks tell each layer which sample has which adapter; a hook ends fusion for that call."""
    model = add_second(adapted(model)).eval()
    plain = copy.deepcopy(model)
    accelerate(model)
    model(images)
    with use_backend("torch"):
        expected = plain(images, adapter_names=["default", "__base__"])
    close(model(images, adapter_names=["default", "__base__"]), expected)


def test_a_replaced_forward_of_the_class(model, images, calls, monkeypatch):
    model = adapted(model)
    accelerate(model)
    model(images)
    assert calls == 2 * BLOCK
    calls.clear()
    original = peft.tuners.lora.Linear.forward
    monkeypatch.setattr(peft.tuners.lora.Linear, "forward", lambda self, x: original(self, x) * 2.0)
    with use_backend("torch"):
        expected = model(images)
    close(model(images), expected)
    assert "lora_linear" not in calls


def test_fp8_refuses_an_adapter(model, images, calls):
    early, late = adapted(copy.deepcopy(model)), model
    report = accelerate(early, precision="fp8")
    refused = {e.module: e.reason for e in report.swapped if e.precision is None}
    assert refused["base_model.model.blocks.0"] == "an adapter of a layer does not run in FP8"
    accelerate(late, precision="fp8")
    late = adapted(late).requires_grad_(False)
    with pytest.raises(NotImplementedError, match=r"a layer has got an adapter.*accelerate\(model\) again"):
        late(images)
    accelerate(late)
    with use_backend("torch"):
        expected = early(images)
    for each in (early, late):
        calls.clear()
        close(each(images), expected)
        assert calls == 2 * BLOCK


def test_compiled(model, images, calls):
    model = adapted(model)
    accelerate(model)
    expected = model(images)
    calls.clear()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    close(compiled(images), expected)
    assert calls == 2 * BLOCK


def test_own_model(device, images, calls):
    model = VisionTransformer.from_timm(build()).to(device)
    plain = adapted(copy.deepcopy(model))
    with use_backend("torch"):
        expected, grads = plain(images), gradients(plain, images)
    model = adapted(model)
    calls.clear()
    close(model(images), expected)
    assert [call for call in calls if call != "linear"] == 2 * BLOCK  # its head is a linear op
    close(gradients(model, images), grads)


def reload(model: nn.Module, path, **options) -> None:
    model.save_pretrained(path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.mul_(-0.5)  # so that what is loaded differs from what stays
    model.load_adapter(path, "again", **options)
    model.set_adapter("again")


def hot_swap(model: nn.Module, path) -> None:
    """Load another adapter's numbers into the place of this one, whatever their ranks."""
    torch.manual_seed(7)
    depth, device = len(model.base_model.model.blocks), first(model).weight.device
    other = adapted(build(depth=depth).to(device), r=2, lora_alpha=6, target_modules=["qkv", "fc2"])
    other.save_pretrained(path)
    hotswap.hotswap_adapter(model, str(path), "default", torch_device=str(device))


def scale_by_a_tensor(model: nn.Module, path) -> None:
    """As PEFT prepares a model that is compiled: ranks padded, and the scaling a tensor."""
    hotswap.prepare_model_for_compiled_hotswap(model, target_rank=6)
    assert isinstance(first(model).scaling["default"], torch.Tensor)


def each_layer(method: str, *args):
    def call(model: nn.Module, path) -> None:
        for module in model.modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                getattr(module, method)(*args)

    return call


def delete(name: str):
    return lambda model, _: (add_second(model), model.delete_adapter(name))


def merge(*names: str):
    return lambda model, _: (add_second(model), model.merge_adapter(list(names)))


def merge_and_part(model: nn.Module, path) -> None:
    add_second(model).merge_adapter()
    model.unmerge_adapter()


METHODS = {
    "delete one of two": delete("other"),
    "delete the first of two": delete("default"),
    "merge one of two": merge("other"),
    "merge two and part them": merge_and_part,
    "merge safely": lambda model, _: model.merge_adapter(safe_merge=True),
    "load into low memory": lambda model, path: reload(model, path, low_cpu_mem_usage=True),
    "load as it is": reload,
    "hot swap": hot_swap,
    "scale by a tensor": scale_by_a_tensor,
    "set the scale": each_layer("set_scale", "default", 0.3),
    "scale and take it back": lambda *a: (each_layer("scale_layer", 3.0)(*a), each_layer("unscale_layer")(*a)),
    "freeze one of two": lambda model, _: add_second(model).set_requires_grad("other", False),
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.usefixtures("computed_by_pytorch")
def test_methods_of_peft(method, model, images, calls, tmp_path):
    """After each, an accelerated model computes and trains what one does that was never accelerated."""
    plain, model = adapted(copy.deepcopy(model), modules_to_save=["head"]), adapted(model, modules_to_save=["head"])
    accelerate(model)
    close(model(images), plain(images))
    for each, path in ((plain, tmp_path / "plain"), (model, tmp_path / "model")):
        torch.manual_seed(5)
        METHODS[method](each, path)
    with use_backend("torch"):
        expected, grads = plain(images), gradients(plain, images)
    calls.clear()
    close(model(images), expected)
    assert calls == 2 * ["block"] or calls[-1] == "lora_mlp", "a block runs unfused"
    close(gradients(model, images), grads)


CONFIGS = {
    "ranks and scales by layer": {"rank_pattern": {"fc1": 2, r"blocks\.1\.attn\.qkv": 7}, "alpha_pattern": {"proj": 9}},
    "one layer of all": {"target_modules": ["blocks.1.mlp.fc1"]},
    "biases of the base": {"bias": "all"},
    "biases of adapted layers": {"bias": "lora_only"},
    "PiSSA": {"init_lora_weights": "pissa"},
    "OLoRA": {"init_lora_weights": "olora"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "rsLoRA": {"use_rslora": True},
    "a norm saved whole": {"modules_to_save": ["norm1"]},
    "all linear layers": {"target_modules": "all-linear"},
    "patches by a convolution": {"target_modules": ["qkv", "patch_embed.proj"], "exclude_modules": None},
    "a parameter": {"target_modules": ["fc1"], "target_parameters": ["qkv.weight"]},
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.usefixtures("computed_by_pytorch")
def test_configurations_of_peft(case, model, images, calls):
    early, late = adapted(copy.deepcopy(model), **CONFIGS[case]), model
    with use_backend("torch"):
        expected, grads = early(images), gradients(early, images)
    accelerate(early)
    accelerate(late)
    for each in (early, adapted(late, **CONFIGS[case])):
        calls.clear()
        close(each(images), expected)
        assert [name for name in calls if "lora" in name], "no adapter runs fused"
        close(gradients(each, images), grads)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.usefixtures("computed_by_pytorch")
def test_checkpointed(reentrant, device, calls):
    """transformers' gradient checkpointing, which computes the forward again in the backward."""
    transformers = pytest.importorskip("transformers")
    size = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 64}
    model = shake(transformers.ViTModel(transformers.ViTConfig(**size, image_size=32, patch_size=16)), 0.2)
    options = config(target_modules="all-linear", exclude_modules=None, lora_dropout=0.2)
    model = peft.get_peft_model(model.to(device), options).train()
    accelerate(model)
    images = torch.randn(2, 3, 32, 32, device=device)

    def grads() -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        model.zero_grad()
        model(pixel_values=images).last_hidden_state.square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = grads()
    calls.clear()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    actual = grads()
    assert calls.count("lora_linear") == 2 * 2 * 6, "each layer runs twice, six projections fused"
    close(actual, expected)


@pytest.mark.usefixtures("computed_by_pytorch")
def test_switched_after_compiling(device, images):
    """A compiled model is traced anew, except for what PEFT prepares so that it need not be."""
    model = build(depth=1).to(device)
    plain = add_second(adapted(copy.deepcopy(model))).eval()
    accelerate(model)
    model = add_second(adapted(model)).eval()
    model.load_state_dict(plain.state_dict())
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for change in (
        lambda each: None,
        lambda each: each.set_adapter("other"),
        lambda each: first(each).set_scale("other", 3.0),
        lambda each: each.merge_adapter(),
    ):
        change(plain)
        change(model)
        with use_backend("torch"):
            expected = plain(images)
        close(compiled(images), expected)


@pytest.mark.usefixtures("computed_by_pytorch")
def test_hot_swapped_without_compiling_again(device, images, tmp_path):
    model = build(depth=1).to(device)
    plain = adapted(copy.deepcopy(model))
    accelerate(model)
    model = adapted(model)
    for each in (plain, model):
        scale_by_a_tensor(each, None)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    before = compiled(images)
    for each, path in ((plain, tmp_path / "plain"), (model, tmp_path / "model")):
        hot_swap(each, path)
    with use_backend("torch"):
        expected = plain(images)
    assert not torch.allclose(expected, before, atol=1e-2)
    with torch.compiler.set_stance("fail_on_recompile"):
        close(compiled(images), expected)


@pytest.mark.usefixtures("computed_by_pytorch")
def test_pickled(model, images):
    accelerate(model)
    model = adapted(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(images), model(images))


@pytest.mark.parametrize("within", ["the blocks", "an adapted layer"])
@pytest.mark.usefixtures("computed_by_pytorch", "lone_process_group")
def test_fsdp2(within, model, images, calls):
    """A layer that FSDP2 gathers by itself has hooks, so it stays PEFT's."""
    plain = adapted(copy.deepcopy(model))
    accelerate(model)
    model = adapted(model)
    mesh = init_device_mesh(images.device.type, (1,))
    for block in model.base_model.model.blocks:
        if within == "an adapted layer":
            fully_shard(block.attn.qkv, mesh=mesh)
        fully_shard(block, mesh=mesh)
    with use_backend("torch"):
        expected = gradients(plain, images)
    calls.clear()
    actual = gradients(model, images)
    close({n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in actual.items()}, expected)
    assert calls == 2 * (BLOCK if within == "the blocks" else ["lora_mlp"])
