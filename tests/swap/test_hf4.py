"""What the layers of transformers 4.50 to 4.57 have and those of 5 have no more: a mask of heads, tuples, two masks.

``.ci/run_transformers_4`` runs this, and the other tests of transformers, on the oldest and newest of these releases.
"""

import copy
import inspect
import pickle

import pytest
import torch
from torch import Tensor, nn

from vitkernels import accelerate, ops, restore

transformers = pytest.importorskip("transformers", minversion="4.50")
from hf_models import OLD, attention, build, dinov2, layers  # noqa: E402
from parity import shake  # noqa: E402

if not OLD:
    reason = f"transformers {transformers.__version__} has other layers: .ci/run_transformers_4 runs this on 4.x"
    pytest.skip(reason, allow_module_level=True)

pytestmark = pytest.mark.usefixtures("computed_by_pytorch")  # the ops are other tests'

ATTENTION_OPS = ["linear", "linear", "linear", "attention", "linear"]
NAMES = ["vit", "dinov2", "siglip", "clip"]


@pytest.fixture
def fused_calls(monkeypatch) -> list[str]:
    calls = []
    for name in ("add_layer_norm", "attention", "linear", "mlp", "patch_embed", "swiglu_mlp"):
        original = getattr(ops, name)

        def spy(*args, _name=name, _original=original, **kwargs):
            calls.append(_name)
            return _original(*args, **kwargs)

        monkeypatch.setattr(ops, name, spy)
    return calls


def layer_of(name: str, device: torch.device) -> nn.Module:
    return layers(build(name))[0].to(device)


def arguments(name: str, x: Tensor) -> tuple:
    """What the encoder passes behind the hidden states; CLIP's and SigLIP's with padding, CLIP's causal too."""
    if name in ("vit", "dinov2"):
        return (None,)
    lowest = torch.finfo(x.dtype).min
    N = x.shape[1]
    padding = x.new_zeros(len(x), 1, N, N)
    padding[1, :, :, N - 2 :] = lowest
    causal = x.new_full((N, N), lowest).triu(1).expand(len(x), 1, N, N)
    return (padding, causal) if name == "clip" else (padding,)


def close(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture
def x(device) -> Tensor:
    return torch.randn(2, 7, 32, device=device)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_returned(name, device, x, fused_calls):
    """Tuples where the original returns tuples, as long as it does."""
    layer = layer_of(name, device)
    accelerated = copy.deepcopy(layer)
    accelerate(accelerated)
    args = arguments(name, x)
    close(accelerated(x, *args), layer(x, *args))
    assert fused_calls == [*ATTENTION_OPS, "add_layer_norm", "mlp"]
    attend, plain = (m.self_attn if hasattr(m, "self_attn") else attention(m) for m in (accelerated, layer))
    close(attend(x), plain(x))
    if "output_attentions" in inspect.signature(type(layer).forward).parameters:
        fused_calls.clear()
        close(accelerated(x, *args, output_attentions=True), layer(x, *args, output_attentions=True))
        assert "attention" not in fused_calls
        assert fused_calls[-2:] == ["add_layer_norm", "mlp"]


def test_swiglu(device, x, fused_calls):
    layer = layers(shake(dinov2(use_swiglu_ffn=True)))[0].to(device)
    expected = layer(x)
    accelerate(layer)
    close(layer(x), expected)
    assert fused_calls == [*ATTENTION_OPS, "add_layer_norm", "swiglu_mlp"]


@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_masked_heads(name, device, x, fused_calls):
    """A mask of heads, which sdpa adds to the scores: the original attends, the rest of the layer is fused."""
    layer = layer_of(name, device)
    head_mask = torch.randn(1, 2, 1, 1, device=device).expand(1, 2, 7, 7).tril()
    expected = layer(x, head_mask)
    accelerate(layer)
    close(layer(x, head_mask), expected)
    assert fused_calls == ["linear", "add_layer_norm", "mlp"]


@pytest.mark.parametrize("masks", [(), ("attention_mask",), ("causal_attention_mask",)])
def test_masks_of_clip(masks, device, x, fused_calls):
    attend = layer_of("clip", device).self_attn
    given = dict(zip(("attention_mask", "causal_attention_mask"), arguments("clip", x), strict=True))
    given = {name: given[name] for name in masks}
    expected = attend(x, **given)
    accelerate(attend)
    close(attend(x, **given), expected)
    assert fused_calls.count("attention") == 1


def test_sizes_of_images(device, fused_calls):
    embed = build("vit").vit.embeddings.patch_embeddings.to(device)
    images = {size: torch.randn(2, 3, size, size, device=device) for size in (32, 48)}
    expected = [embed(images[32]), embed(images[48], interpolate_pos_encoding=True)]
    accelerate(embed)
    close([embed(images[32]), embed(images[48], interpolate_pos_encoding=True)], expected)
    assert fused_calls == ["patch_embed"] * 2
    with pytest.raises(ValueError, match="doesn't match"):
        embed(images[48])
    with pytest.raises(ValueError, match="channel"):
        embed(images[32][:, :1])


@pytest.mark.parametrize("name", NAMES)
def test_copies_and_back(name, device, x):
    layer = layer_of(name, device)
    before = [type(module) for module in layer.modules()]
    accelerate(layer)
    expected = layer(x, *arguments(name, x))
    again = pickle.loads(pickle.dumps(layer))
    assert type(again) is type(layer)
    torch.testing.assert_close(again(x, *arguments(name, x)), expected, rtol=0, atol=0)
    restore(layer)
    assert [type(module) for module in layer.modules()] == before


@pytest.mark.parametrize(
    ("name", "path", "child", "reason"),
    [
        ("vit", "intermediate", ("intermediate_act_fn", nn.ReLU()), "intermediate: intermediate_act_fn is a ReLU"),
        ("vit", "output", ("adapter", nn.Linear(32, 32)), "output: it has a child 'adapter'"),
        ("dinov2", "mlp", ("activation", nn.ReLU()), "mlp: activation is a ReLU"),
        ("clip", "mlp", ("fc2", nn.Bilinear(2, 2, 2)), "mlp: fc2 is a Bilinear"),
    ],
)
def test_spoilt_layers_fail_closed(name, path, child, reason, device):
    layer = layer_of(name, device)
    setattr(layer.get_submodule(path), *child)
    reasons = {entry.module: entry.reason for entry in accelerate(layer).kept}
    assert reason in reasons[""]


def test_a_forward_that_was_bound_to_its_own_module(device, x):
    """As 4.56 and 4.57 leave it where they have collected hidden states: the same code, so nothing to be afraid of."""
    layer = layer_of("vit", device)
    expected = layer(x, None)
    for _ in range(2):
        layer.forward = layer.forward
        assert any(entry.module == "" for entry in accelerate(layer).swapped)
        close(layer(x, None), expected)
    layer.forward = layer.forward
    restore(layer)
    torch.testing.assert_close(layer(x, None), expected, rtol=0, atol=0)
    accelerate(layer)
    own = layer.forward
    layer.forward = lambda *args: own(*args)
    assert "forward is bound" in {entry.module: entry.reason for entry in restore(layer).kept}[""]
    close(layer(x, None), expected)
