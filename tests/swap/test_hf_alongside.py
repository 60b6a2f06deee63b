"""What must survive a swap in models of transformers: everything of its own and of PEFT's that people do to a model."""

import copy
import io
import pathlib

import pytest
import torch
from torch import Tensor, nn

from vitkernels import accelerate, explain, ops, restore, use_backend

transformers = pytest.importorskip("transformers", minversion="4.53")  # vitkernels.hf
from hf_models import (  # noqa: E402
    OLD,
    VISION,
    attention,
    build,
    clip_pair,
    dinov2,
    images,
    inputs_of,
    layers,
    llava,
    path_of,
    tensors,
    texts,
    vit,
)
from parity import shake  # noqa: E402

import vitkernels.hf  # noqa: E402

pytestmark = pytest.mark.usefixtures("computed_by_pytorch")  # the ops are other tests'


@pytest.fixture
def model(device) -> nn.Module:
    return shake(vit(num_hidden_layers=2), 0.3).to(device).eval()


@pytest.fixture
def inputs(device) -> dict[str, Tensor]:
    return {name: x.to(device) for name, x in images().items()}


@pytest.fixture
def fused_calls(monkeypatch) -> list[str]:
    """The names of the ops in the order of their calls."""
    calls = []
    for name in (
        "add_layer_norm",
        "attention",
        "linear",
        "lora_linear",
        "lora_mlp",
        "mlp",
        "patch_embed",
        "swiglu_mlp",
    ):
        original = getattr(ops, name)

        def spy(*args, _name=name, _original=original, **kwargs):
            calls.append(_name)
            return _original(*args, **kwargs)

        monkeypatch.setattr(ops, name, spy)
    return calls


def close(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def reasons(model: nn.Module) -> dict[str, str]:
    return {entry.module: entry.reason for entry in accelerate(model).kept}


def classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def test_layers_run_fused(model, inputs, fused_calls):
    expected = model(**inputs).logits
    accelerate(model)
    close(model(**inputs).logits, expected)
    layer = ["linear", "linear", "linear", "attention", "linear", "add_layer_norm", "mlp"]
    assert fused_calls == ["patch_embed", *layer, *layer]


def test_nothing_moves_and_all_comes_back(model):
    before, keys = classes(model), list(model.state_dict())
    vars_before = [set(vars(module)) for module in model.modules()]
    first = accelerate(model)
    assert all(isinstance(module, cls) for module, cls in zip(model.modules(), before, strict=True))
    assert list(model.state_dict()) == keys
    assert [set(vars(module)) for module in model.modules()] == vars_before, "a fused class has state of its own"
    swapped = classes(model)
    assert accelerate(model) == first == explain(model)
    assert classes(model) == swapped != before
    restore(model)
    assert classes(model) == before


def test_deepcopy_and_pickle(model, inputs):
    accelerate(model)
    expected = model(**inputs).logits
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for copied in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert classes(copied) == classes(model)
        assert torch.equal(copied(**inputs).logits, expected)


def test_save_and_load(model, inputs, tmp_path):
    plain = copy.deepcopy(model)
    accelerate(model)
    model.save_pretrained(tmp_path / "accelerated")
    plain.save_pretrained(tmp_path / "plain")
    files = [pathlib.Path(tmp_path, name, "config.json").read_text() for name in ("accelerated", "plain")]
    assert files[0] == files[1]
    loaded = type(plain).from_pretrained(tmp_path / "accelerated").to(inputs["pixel_values"].device)
    assert classes(loaded) == classes(plain)
    assert loaded.state_dict().keys() == plain.state_dict().keys()
    with use_backend("torch"):
        assert torch.equal(loaded(**inputs).logits, plain(**inputs).logits)
    accelerate(loaded)
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    model.load_state_dict(plain.state_dict())


@pytest.mark.parametrize("name", ["vit", "dinov3", "clip pair", "llava"])
def test_hidden_states(name, device, fused_calls):
    """transformers collects them by hooks that it finds the places for with isinstance, and leaves there for good."""
    model = build(name).to(device)
    inputs = inputs_of(name, next(model.parameters()))
    with torch.no_grad():
        expected = model(**inputs, output_hidden_states=True)
        accelerate(model)
        fused_calls.clear()
        actual = model(**inputs, output_hidden_states=True)
        calls = fused_calls.count("add_layer_norm")
        close(tensors(actual), tensors(expected))
        assert calls == sum(
            type(module).__name__.endswith("Layer") for module in model.modules() if hasattr(module, "_rule")
        )
        model(**inputs)
        assert fused_calls.count("add_layer_norm") == 2 * calls > 0, "hooks that collect nothing must cost no fusion"
    assert any("hidden_states" in key for key in tensors(expected))


@pytest.mark.parametrize("when", ["before", "after"])
def test_attention_weights(model, inputs, when, fused_calls):
    """Eager's attention returns its weights, and so stays what it was; the layers around it are fused all the same."""
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("eager")
    if when == "before":
        model.set_attn_implementation("eager")
        assert "attention implementation is eager" in reasons(model)[path_of(attention(layers(model)[0]), model)]
    accelerate(model)
    model.set_attn_implementation("eager")
    expected, actual = (m(**inputs, output_attentions=True) for m in (plain, model))
    close(actual.logits, expected.logits)
    assert len(actual.attentions) == 2
    close(actual.attentions, expected.attentions)
    assert "attention" not in fused_calls
    assert fused_calls.count("add_layer_norm") == 2
    model.set_attn_implementation("sdpa")
    accelerate(model)
    close(model(**inputs).logits, expected.logits)
    assert fused_calls.count("attention") == 2


def test_masks(device, fused_calls):
    """Bool masks, additive ones and the causal one, and what is not known."""
    attend = layers(build("clip"))[0].self_attn.to(device)
    x = torch.randn(2, 5, 32, device=device)
    mask = torch.rand(2, 1, 5, 5, device=device) > 0.4
    mask[..., 0] = True
    additive = torch.zeros(2, 1, 5, 5, device=device).masked_fill(~mask, torch.finfo(torch.float32).min)
    expected = [attend(x, m)[0] for m in (mask, additive)]
    close(*expected)
    # Releases 4.5x have a mask for what is causal.
    is_causal = (
        {"is_causal": True} if not OLD else {"causal_attention_mask": torch.ones(5, 5).tril().bool()[None, None]}
    )
    causal = attend(x, None, **is_causal)[0]
    accelerate(attend)
    close([attend(x, m)[0] for m in (mask, additive)], expected)
    close(attend(x, None, **is_causal)[0], causal)
    assert fused_calls.count("attention") == 3
    if OLD:
        attend(x, None, output_attentions=True)
    else:
        close(attend(x, None, unheard_of=2.0)[0], attend(x)[0])
        fused_calls.remove("attention")
    assert fused_calls.count("attention") == 3, "what is told and not known must reach the original"


def test_gradient_checkpointing(model, inputs, fused_calls):
    model.train()
    model(**inputs).logits.sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.gradient_checkpointing_enable()
    accelerate(model)
    model.zero_grad()
    logits = model(**inputs).logits
    assert fused_calls.count("mlp") == 2
    logits.sum().backward()
    assert fused_calls.count("mlp") == 4, "backward must compute the layers again"
    close([p.grad for p in model.parameters()], expected)
    model.gradient_checkpointing_disable()
    model(**inputs)
    assert fused_calls.count("mlp") == 6


@pytest.mark.parametrize("when", ["before", "after"])
def test_lora(model, inputs, when, fused_calls):
    peft = pytest.importorskip("peft")
    q, last = ("query", "output.dense") if OLD else ("q_proj", "fc2")
    config = peft.LoraConfig(target_modules=[q, last], init_lora_weights=False, layers_to_transform=[0])
    torch.manual_seed(0)
    expected = peft.get_peft_model(copy.deepcopy(model), config)(**inputs).logits
    without = model(**inputs).logits
    if when == "after":
        accelerate(model)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, config)
    if when == "before":
        accelerate(adapted)
    fused_calls.clear()
    close(adapted(**inputs).logits, expected)
    assert not torch.allclose(expected, without, atol=1e-2)
    assert fused_calls.count("attention") == 2
    told, layer = reasons(adapted), layers(adapted)[0]
    assert path_of(attention(layer), adapted) not in told
    assert fused_calls.count("add_layer_norm") == 2 and path_of(layer, adapted) not in told
    adapted(**inputs).logits.sum().backward()
    assert all(p.grad is not None for name, p in adapted.named_parameters() if "lora_B" in name)
    merged = adapted.merge_and_unload()
    accelerate(merged)
    fused_calls.clear()
    close(merged(**inputs).logits, expected)
    assert fused_calls.count("add_layer_norm") == 2


@pytest.mark.parametrize("name", ["dinov3", "beit", "clip pair"])
def test_lora_on_every_layer(name, device, fused_calls):
    """An adapter on all projections of attention and MLP, in both towers of a pair."""
    peft = pytest.importorskip("peft")
    model = shake(build(name)).to(device)
    linears = {"q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "fc1", "fc2", "up_proj", "down_proj"}
    torch.manual_seed(0)
    config = peft.LoraConfig(r=3, target_modules=sorted(linears), init_lora_weights=False)
    model = peft.get_peft_model(model, config)
    inputs = inputs_of(name, next(model.parameters()))

    def run() -> tuple[list[Tensor], list[Tensor]]:
        model.zero_grad()
        outputs = tensors(model(**inputs))
        sum(t.float().square().sum() for t in outputs.values() if t.requires_grad).backward()
        return outputs, [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected, grads = run()
    told = reasons(model)
    fused_calls.clear()
    actual, actual_grads = run()
    close(actual, expected)
    close(actual_grads, grads)
    layers = sum(type(module).__name__.endswith("Layer") for module in model.modules() if hasattr(module, "_rule"))
    assert fused_calls.count("lora_linear") == 4 * layers and fused_calls.count("lora_mlp") == layers > 0
    assert not [reason for reason in told.values() if "peft" in reason or "adapter" in reason]


def test_a_hook_on_the_attention_fires_and_the_layer_stays_fused(model, inputs, fused_calls):
    accelerate(model)
    seen = []
    attention(layers(model)[0]).register_forward_hook(lambda module, args, output: seen.append(output[0].shape))
    model(**inputs)
    assert seen == [(2, 5, 32)]
    assert fused_calls.count("add_layer_norm") == fused_calls.count("attention") == 2


def test_a_hook_on_what_is_not_called_fires(model, inputs, fused_calls):
    seen = []
    first, second = layers(model)
    mlp, fc1 = (first.intermediate, "dense") if OLD else (first.mlp, "fc1")
    getattr(mlp, fc1).register_forward_hook(lambda *_: seen.append("fc1"))
    second.layernorm_after.register_forward_hook(lambda *_: seen.append("norm"))
    expected = model(**inputs).logits
    told = reasons(model)
    assert f"hook on {fc1}" in told[path_of(mlp, model)]
    assert "hook on layernorm_after" in told[path_of(second, model)]
    close(model(**inputs).logits, expected)
    assert seen == ["fc1", "norm"] * 2
    assert "add_layer_norm" not in fused_calls


def test_larger_images(device):
    """Positions are interpolated by the originals; CLIP's embeddings refuse the size unless they are asked for that."""
    for name in ("clip", "siglip", "dinov2"):
        model = build(name).to(device)
        inputs = {name: x.to(device) for name, x in images(48, batch=1).items()}
        more = {} if name == "dinov2" else {"interpolate_pos_encoding": True}
        expected = tensors(model(**inputs, **more))
        accelerate(model)
        close(tensors(model(**inputs, **more)), expected)
    clip = build("clip").to(device)
    accelerate(clip)
    with pytest.raises(ValueError, match="doesn't match model"):
        clip(**inputs)


def test_masked_patches(device):
    model = shake(transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**VISION, num_register_tokens=1)))
    model.to(device).eval()
    inputs = {name: x.to(device) for name, x in images().items()}
    masked = torch.tensor([[True, False, False, True], [False, True, False, False]], device=device)
    expected = model(**inputs, bool_masked_pos=masked).last_hidden_state
    accelerate(model)
    close(model(**inputs, bool_masked_pos=masked).last_hidden_state, expected)


def test_backbones(device):
    """Feature maps of chosen stages."""
    config = transformers.Dinov2Config(**VISION | {"num_hidden_layers": 2}, out_features=["stage1", "stage2"])
    model = shake(transformers.Dinov2Backbone(config)).to(device).eval()
    inputs = {name: x.to(device) for name, x in images().items()}
    expected = model(**inputs).feature_maps
    accelerate(model)
    close(model(**inputs).feature_maps, expected)
    assert [tuple(x.shape) for x in expected] == [(2, 32, 2, 2)] * 2


def test_the_tower_alone():
    """The vision tower of a larger model is fused, and what is not known there is left and told of."""
    report = explain(llava())
    swapped = {entry.module for entry in report.swapped}
    tower = "model.vision_tower.vision_model" if OLD else "model.vision_tower"
    assert f"{tower}.encoder.layers.0" in swapped
    assert f"{tower}.embeddings" in swapped
    assert f"{tower}.pre_layrnorm" in swapped
    assert not any("language_model" in path for path in swapped)
    assert any(entry.module.endswith("language_model.norm") for entry in report.kept)


def test_texts_keep_their_causal_masks(device, fused_calls):
    """A later token must not change an earlier one, with and without padding."""
    model = shake(clip_pair(), 0.3).text_model.to(device).eval()
    inputs = {name: x.to(device) for name, x in texts().items()}
    accelerate(model)
    for given in (inputs, {"input_ids": inputs["input_ids"]}):
        before = model(**given).last_hidden_state
        changed = dict(given, input_ids=given["input_ids"].clone())
        changed["input_ids"][:, 4] += 1
        after = model(**changed).last_hidden_state
        assert torch.equal(after[:, :4], before[:, :4])
        assert (after[:, 4] - before[:, 4]).abs().max() > 0.01
    assert fused_calls.count("attention") == 4


def test_meta_model(inputs):
    with torch.device("meta"):
        model = vit(num_hidden_layers=2)
    assert len(explain(model).swapped) == (16 if OLD else 12)
    assert accelerate(model) == explain(model)
    assert model(inputs["pixel_values"].to("meta")).logits.shape == (2, 2)


def test_export(model, inputs):
    accelerate(model)
    expected = model(**inputs).logits
    exported = torch.export.export(model, (), inputs)
    assert "vitkernels.mlp_fwd.default" in {str(node.target) for node in exported.graph.nodes}
    close(exported.module()(**inputs).logits, expected)


@pytest.mark.parametrize("hidden_act", ["gelu_new", "gelu_pytorch_tanh", "silu", "relu"])
def test_activations(hidden_act, device, fused_calls):
    mlp = layers(shake(dinov2(hidden_act=hidden_act), 0.5))[0].mlp.to(device)
    x = torch.randn(2, 5, 32, device=device)
    expected = mlp(x)
    accelerate(mlp)
    close(mlp(x), expected)
    assert fused_calls == ([] if hidden_act == "relu" else ["mlp"])


class MyLayer(transformers.models.vit.modeling_vit.ViTLayer):
    pass


def spoil_gate(model):
    attention(layers(model)[0]).gate = nn.Linear(32, 32)
    return attention(layers(model)[0])


def spoil_activation(model):
    layer = layers(model)[0]
    mlp, act = (layer.intermediate, "intermediate_act_fn") if OLD else (layer.mlp, "activation_fn")
    setattr(mlp, act, nn.ReLU())
    return mlp


def spoil_class(model):
    layer = layers(model)[0]
    layer.__class__ = MyLayer
    return layer


def spoil_implementation(model):
    model.config._attn_implementation = "flash_attention_2"
    return attention(layers(model)[1])


def spoil_stride(model):
    model.vit.embeddings.patch_embeddings.projection.stride = (4, 4)
    return model.vit.embeddings.patch_embeddings


def spoil_groups(model):
    attention(layers(model)[0]).num_key_value_groups = 2
    return attention(layers(model)[0])


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (spoil_gate, "a child 'gate' (Linear) that is unknown"),
        (spoil_activation, "is a ReLU"),
        (spoil_class, "a subclass of ViTLayer"),
        (spoil_implementation, "attention implementation is flash_attention_2"),
        (spoil_stride, "are not one size"),
        (spoil_groups, "an attribute 'num_key_value_groups' that is unknown"),
    ],
)
def test_spoilt_models_fail_closed(spoil, reason, model):
    spoilt = spoil(model)
    before = type(spoilt)
    assert reason in reasons(model)[path_of(spoilt, model)]
    assert type(spoilt) is before


def test_a_forward_that_takes_more_is_of_no_kind():
    """As those of a release to come may."""
    from vitkernels.swap import hf

    class Newer(nn.Module):
        def forward(self, hidden_states, attention_mask=None, position_ids=None):
            return hidden_states

    kinds = hf._CLIP["EncoderLayer"]
    assert hf._kind_of(Newer, kinds) is None
    assert hf._kind_of(transformers.models.clip.modeling_clip.CLIPEncoderLayer, kinds) is kinds[OLD]


@pytest.mark.parametrize("name", ["vit", "dinov3", "siglip", "clip pair"])
def test_cpu_runs_the_very_original(name):
    model, inputs = build(name), inputs_of(name)
    plain = tensors(model(**inputs))
    vitkernels.hf.register()
    with use_backend("auto"):
        assert len(accelerate(model).swapped) > 5
        for implementation in ("sdpa", "vitkernels"):
            model.set_attn_implementation(implementation)
            assert all(torch.equal(x, plain[key]) for key, x in tensors(model(**inputs)).items())
