"""The layers that transformers 4.50 to 4.57 have and 5 no more, on a stand-in: under such a release test_hf.py runs."""

import copy
import pickle

import pytest
import torch
from parity import judge, shake
from torch import Tensor, nn

from vitkernels import accelerate, ops, restore
from vitkernels.testing.sums import summed_alike

pytest.importorskip("transformers", minversion="4.50")
import hf4_stand_in as stand_in

from vitkernels.swap import hf

pytestmark = pytest.mark.usefixtures("computed_by_pytorch")  # the ops are other tests'

FAMILIES = {
    "ViT": hf._VIT,
    "EarlyViT": hf._VIT,
    "Dinov2": hf._DINOV2,
    "EarlyDinov2": hf._DINOV2,
    "Siglip": hf._SIGLIP,
    "CLIP": hf._CLIP,
}
VIT_OPS = ["linear", "linear", "linear", "attention", "linear", "add_layer_norm", "mlp"]
LAYERS = ["ViTLayer", "EarlyViTLayer", "Dinov2Layer", "EarlyDinov2Layer", "SiglipEncoderLayer", "CLIPEncoderLayer"]


@pytest.fixture(scope="module", autouse=True)
def _known():
    for prefix, kinds in FAMILIES.items():
        own = {name: cls for name, cls in vars(stand_in).items() if isinstance(cls, type)}
        hf._add_classes(stand_in.__name__, own, prefix, kinds)


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


def layer_of(name: str, device: torch.device, **options) -> nn.Module:
    return shake(getattr(stand_in, name)(stand_in.config(**options))).to(device).eval()


def arguments(name: str, x: Tensor) -> tuple:
    """What the encoder passes behind the hidden states; CLIP's and SigLIP's with padding, CLIP's causal too."""
    if "Encoder" not in name:
        return (None,)
    lowest = torch.finfo(x.dtype).min
    N = x.shape[1]
    padding = x.new_zeros(len(x), 1, N, N)
    padding[1, :, :, N - 2 :] = lowest
    causal = x.new_full((N, N), lowest).triu(1).expand(len(x), 1, N, N)
    return (padding, causal) if name.startswith("CLIP") else (padding,)


def run(layer: nn.Module, x: Tensor, args: tuple, upstream: Tensor, seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    layer.zero_grad()
    x = x.clone().requires_grad_()
    out = layer(x, *args)
    out = out[0] if isinstance(out, tuple) else out
    (out * upstream.to(out.dtype)).sum().backward()
    return {"out": out.detach(), "dx": x.grad} | {f"d{k}": p.grad.clone() for k, p in layer.named_parameters()}


def assert_parity(name: str, layer: nn.Module, x: Tensor) -> None:
    plain, wide = copy.deepcopy(layer), copy.deepcopy(layer).double()
    upstream = torch.randn_like(x)
    report = accelerate(layer)
    assert not [entry for entry in report.kept if entry.known], report
    assert any(entry.module == "" for entry in report.swapped), report

    def draw(seed: int) -> tuple[dict, dict, dict]:
        given = torch.randn_like(x)
        args = arguments(name, given)
        with summed_alike(x):
            yardstick = run(plain, given, args, upstream, seed)
        truth = run(wide, given.double(), arguments(name, given.double()), upstream, seed)
        return run(layer, given, args, upstream, seed), yardstick, truth

    judge(draw)


@pytest.fixture
def x(device) -> Tensor:
    return torch.randn(2, 7, 32, device=device)


@pytest.mark.parametrize("name", LAYERS)
def test_parity(name, device, x, fused_calls):
    assert_parity(name, layer_of(name, device), x)
    assert fused_calls[: len(VIT_OPS)] == VIT_OPS


def test_parity_swiglu(device, x, fused_calls):
    assert_parity("Dinov2Layer", layer_of("Dinov2Layer", device, swiglu=True), x)
    assert fused_calls[: len(VIT_OPS)] == [*VIT_OPS[:-1], "swiglu_mlp"]


@pytest.mark.parametrize(
    ("name", "options"),
    [("ViTLayer", {"dropout": 0.3}), ("EarlyViTLayer", {"dropout": 0.3}), ("EarlyDinov2Layer", {"drop_path": 0.6})],
)
def test_training(name, options, device, x, monkeypatch):
    """What is dropped is what PyTorch drops under the same seed."""
    # Draws differ between dtypes, and the truth must drop what the others drop.
    drawn, dropped = torch.rand, torch.nn.functional.dropout
    monkeypatch.setattr(torch, "rand", lambda *size, dtype, **more: drawn(*size, dtype=torch.float32, **more).to(dtype))
    monkeypatch.setattr(
        torch.nn.functional,
        "dropout",
        lambda x, p=0.5, training=True, inplace=False: (
            x * dropped(torch.ones_like(x, dtype=torch.float32), p, training)
        ),
    )
    layer, x = layer_of(name, device, **options).train(), torch.randn(3, 5, 32, device=device)
    assert_parity(name, layer, x)
    with torch.no_grad():
        torch.manual_seed(0)
        first, second = (layer(x, None) for _ in range(2))
    first, second = (out[0] if isinstance(out, tuple) else out for out in (first, second))
    assert (first - second).abs().max() > 0.01, "nothing was dropped"


@pytest.mark.parametrize("name", LAYERS)
def test_what_is_returned(name, device, x):
    """Tuples where the original returns tuples, as long as it does."""
    layer = layer_of(name, device)
    accelerated = copy.deepcopy(layer)
    accelerate(accelerated)
    args = arguments(name, x)
    asked = [{}] if name in ("ViTLayer", "Dinov2Layer") else [{}, {"output_attentions": True}]
    for options in asked:
        expected, actual = layer(x, *args, **options), accelerated(x, *args, **options)
        assert isinstance(expected, tuple) == (len(asked) == 2)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    inner = "self_attn" if "Encoder" in name else "attention.attention"
    expected, actual = (m.get_submodule(inner)(x) for m in (layer, accelerated))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["ViTLayer", "EarlyDinov2Layer"])
def test_masked_heads(name, device, x, fused_calls):
    """A mask of heads, which sdpa adds to the scores: the original attends, the rest of the layer is fused."""
    layer = layer_of(name, device)
    head_mask = torch.randn(1, 2, 1, 1, device=device).expand(1, 2, 7, 7).tril()
    expected = layer(x, head_mask)
    accelerate(layer)
    torch.testing.assert_close(layer(x, head_mask), expected, rtol=1e-4, atol=1e-4)
    assert fused_calls == ["linear", "add_layer_norm", "mlp"]


@pytest.mark.parametrize("name", ["EarlyViTLayer", "CLIPEncoderLayer"])
def test_attention_weights(name, device, x, fused_calls):
    layer = layer_of(name, device)
    expected = layer(x, *arguments(name, x), output_attentions=True)
    accelerate(layer)
    torch.testing.assert_close(layer(x, *arguments(name, x), output_attentions=True), expected, rtol=1e-4, atol=1e-4)
    assert "attention" not in fused_calls
    assert fused_calls[-2:] == ["add_layer_norm", "mlp"]


def test_eager_is_kept(device):
    layer = layer_of("ViTLayer", device, implementation="eager")
    reasons = {entry.module: entry.reason for entry in accelerate(layer).kept}
    assert "attention implementation is eager" in reasons["attention.attention"]
    assert type(layer).__qualname__ == "FusedViTLayer"


@pytest.mark.parametrize("masks", [(), ("attention_mask",), ("causal_attention_mask",)])
def test_masks_of_clip(masks, device, x, fused_calls):
    attention = layer_of("CLIPAttention", device)
    given = dict(zip(("attention_mask", "causal_attention_mask"), arguments("CLIPEncoderLayer", x), strict=True))
    given = {name: given[name] for name in masks}
    expected = attention(x, **given)
    accelerate(attention)
    torch.testing.assert_close(attention(x, **given), expected, rtol=1e-4, atol=1e-4)
    assert fused_calls.count("attention") == 1


def test_sizes_of_images(device, fused_calls):
    embed = layer_of("ViTPatchEmbeddings", device)
    images = {size: torch.randn(2, 3, size, size, device=device) for size in (32, 48)}
    expected = [embed(images[32]), embed(images[48], interpolate_pos_encoding=True)]
    accelerate(embed)
    actual = [embed(images[32]), embed(images[48], interpolate_pos_encoding=True)]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert fused_calls == ["patch_embed"] * 2
    with pytest.raises(ValueError, match="doesn't match"):
        embed(images[48])
    with pytest.raises(ValueError, match="channels"):
        embed(images[32][:, :1])


@pytest.mark.parametrize("name", LAYERS)
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
        ("ViTLayer", "intermediate", ("intermediate_act_fn", nn.ReLU()), "intermediate: intermediate_act_fn is a ReLU"),
        ("ViTLayer", "output", ("adapter", nn.Linear(32, 32)), "output: it has a child 'adapter'"),
        ("Dinov2Layer", "mlp", ("activation", nn.ReLU()), "mlp: activation is a ReLU"),
        ("CLIPEncoderLayer", "mlp", ("fc2", nn.Bilinear(2, 2, 2)), "mlp: fc2 is a Bilinear"),
    ],
)
def test_spoilt_layers_fail_closed(name, path, child, reason, device):
    layer = layer_of(name, device)
    setattr(layer.get_submodule(path), *child)
    reasons = {entry.module: entry.reason for entry in accelerate(layer).kept}
    assert reason in reasons[""]


def test_a_forward_that_was_bound_to_its_own_module(device, x):
    """As 4.56 and 4.57 leave it where they have collected hidden states: the same code, so nothing to be afraid of."""
    layer = layer_of("ViTLayer", device)
    expected = layer(x, None)
    for _ in range(2):
        layer.forward = layer.forward
        assert any(entry.module == "" for entry in accelerate(layer).swapped)
        torch.testing.assert_close(layer(x, None), expected, rtol=1e-4, atol=1e-4)
    layer.forward = layer.forward
    restore(layer)
    assert torch.equal(layer(x, None), expected)
    accelerate(layer)
    own = layer.forward
    layer.forward = lambda *args: own(*args)
    assert "forward is bound" in {entry.module: entry.reason for entry in restore(layer).kept}[""]
    torch.testing.assert_close(layer(x, None), expected, rtol=1e-4, atol=1e-4)
