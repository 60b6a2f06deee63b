"""``attn_implementation="vitkernels"``: the same results as sdpa, masks and all."""

import pytest
import torch
from torch import nn

from vitkernels import accelerate, use_backend

transformers = pytest.importorskip("transformers", minversion="4.53")  # vitkernels.hf
from hf_models import OLD, VISION, build, inputs_of, tensors  # noqa: E402
from parity import shake  # noqa: E402
from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: E402

import vitkernels.hf  # noqa: E402

pytestmark = pytest.mark.usefixtures("computed_by_pytorch")  # the ops are other tests'


@pytest.fixture(autouse=True)
def _registered():
    vitkernels.hf.register()


def close(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def both(model: nn.Module, inputs: dict) -> tuple[dict, dict]:
    """Outputs and gradients with vitkernels, then with sdpa."""
    results = []
    for implementation in ("vitkernels", "sdpa"):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        outputs = tensors(model(**inputs))
        sum(t.square().sum() for t in outputs.values() if t.requires_grad).backward()
        results.append(outputs | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    return tuple(results)


@pytest.mark.parametrize("name", ["vit", "dinov3", "siglip2", "clip pair", "siglip pair", "llava"])
def test_same_as_sdpa(name, device, monkeypatch):
    model = build(name).to(device)
    inputs = inputs_of(name, next(model.parameters()))
    calls = []
    original = vitkernels.ops.attention
    monkeypatch.setattr(vitkernels.ops, "attention", lambda *a, **k: calls.append(k) or original(*a, **k))
    close(*both(model, inputs))
    assert calls
    # The masks that FIELD knows to be lost where the attention alone is registered.
    assert any(k["attn_mask"] is not None for k in calls) == (name in ("siglip2", "clip pair", "siglip pair"))


def test_masks_count(device):
    """Padding must not be looked at: what it holds changes nothing."""
    model = build("siglip2").to(device)
    model.set_attn_implementation("vitkernels")
    inputs = inputs_of("siglip2", next(model.parameters()))
    before = model(**inputs).last_hidden_state
    inputs["pixel_values"][1, 4:] = 100.0
    after = model(**inputs).last_hidden_state
    assert torch.equal(after[0], before[0])
    close(after[1, :4], before[1, :4])


def test_from_config_and_from_pretrained(tmp_path, device):
    model = transformers.AutoModel.from_config(transformers.ViTConfig(**VISION), attn_implementation="vitkernels")
    assert model.config._attn_implementation == "vitkernels"
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModel.from_pretrained(tmp_path, attn_implementation="vitkernels").to(device).eval()
    close(*both(loaded, inputs_of("vit", next(loaded.parameters()))))


def test_on_an_accelerated_model(device):
    model = build("clip").to(device)
    inputs = inputs_of("clip", next(model.parameters()))
    expected = tensors(model(**inputs))
    model.set_attn_implementation("vitkernels")
    report = accelerate(model)
    assert any(entry.was == "CLIPAttention" for entry in report.swapped)
    close(tensors(model(**inputs)), expected)


def test_generation_with_a_cache_and_grouped_heads(device):
    """A language model's: one query against many keys, causal masks, two heads of queries to one of keys."""
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=50, eos_token_id=None,
    )  # fmt: skip
    model = shake(transformers.LlamaForCausalLM(config), 0.3).to(device).eval()
    ids = torch.randint(0, 50, (2, 5), device=device)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    generated = []
    for implementation in ("sdpa", "vitkernels"):
        model.set_attn_implementation(implementation)
        options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
        generated.append(
            model.generate(ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **options)
        )
    close(generated[1].logits, generated[0].logits)
    assert torch.equal(generated[1].sequences, generated[0].sequences)


def test_compiled(device):
    model = build("clip text").to(device)
    model.set_attn_implementation("vitkernels")
    inputs = inputs_of("clip text", next(model.parameters()))
    expected = tensors(model(**inputs))
    torch._dynamo.reset()
    close(tensors(torch.compile(model, backend="aot_eager", fullgraph=True)(**inputs)), expected)


def test_backend_torch_is_sdpa(device):
    module = nn.Module()
    q, k, v = (torch.randn(2, 2, 5, 16, device=device) for _ in range(3))
    with use_backend("torch"):
        for is_causal in (None, False, True):  # without a word from anybody, sdpa is causal
            actual = vitkernels.hf.attention(module, q, k, v, None, is_causal=is_causal, scaling=0.3)
            expected = sdpa_attention_forward(module, q, k, v, None, is_causal=is_causal, scaling=0.3)
            assert torch.equal(actual[0], expected[0])
            assert actual[1] is None


@pytest.mark.parametrize("is_causal", [None, False, True])
def test_who_says_causal(device, is_causal):
    module = nn.Module()
    q, k, v = (torch.randn(2, 2, 5, 16, device=device) for _ in range(3))
    # Releases 4.5x take is_causal=True at its word for one query too, which then sees the first key alone.
    for query in (q,) if OLD and is_causal else (q, q[:, :, :1]):
        actual = vitkernels.hf.attention(module, query, k, v, None, is_causal=is_causal)[0]
        close(actual, sdpa_attention_forward(module, query, k, v, None, is_causal=is_causal)[0])


@pytest.mark.parametrize("name", ["softcap", "position_bias", "s_aux", "cache"])
def test_what_it_cannot_do_is_told(device, name):
    q = torch.randn(1, 2, 5, 16, device=device)
    with pytest.raises(NotImplementedError, match=f"got {name}; expected none"):
        vitkernels.hf.attention(nn.Module(), q, q, q, None, **{name: 1.0})
