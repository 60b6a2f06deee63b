"""BEiT and data2vec-vision of transformers, accelerated: biases by relative position are read from their tables."""

import copy

import pytest
import torch
from parity import assert_parity, no_call_of, shake
from torch import Tensor, nn

from vitkernels import accelerate

transformers = pytest.importorskip("transformers", minversion="4.50")
from hf_models import OLD, beit, data2vec  # noqa: E402

if OLD:
    pytest.skip("releases 4.5x cut these layers into other parts", allow_module_level=True)

FAMILIES = {"beit": beit, "data2vec": lambda **more: data2vec(use_shared_relative_position_bias=False, **more)}
# Of patches of 16: the model's own image, a larger one, and one that is not square.
IMAGES = {"own": (32, 32), "larger": (48, 48), "wide": (32, 64)}


class Logits(nn.Module):
    """A model that takes images and returns its logits alone."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor, **options) -> Tensor:
        return self.inner(images, **options).logits


def build(family: str, **more) -> nn.Module:
    return shake(Logits(FAMILIES[family](**more))).eval()


def biases(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if type(m).__name__.endswith("RelativePositionBias")]


def layer_of(model: nn.Module) -> nn.Module:
    return next(m for m in model.modules() if type(m).__name__ in ("BeitLayer", "Data2VecVisionLayer"))


def close(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("family", FAMILIES)
def test_fp32(family, image, device):
    model, x = build(family).to(device), torch.randn(2, 3, *IMAGES[image], device=device)
    assert_parity(model, x)
    with torch.no_grad(), no_call_of(type(biases(model)[0]).forward):
        model(x)


@pytest.mark.usefixtures("computed_by_pytorch")
@pytest.mark.parametrize("family", FAMILIES)
class TestBehaviours:
    """What is around the kernels, computed by PyTorch where there is no GPU."""

    def test_a_model_that_is_not_square(self, family, device):
        """transformers then resizes its table by mistaken sides, even for an image of its own size."""
        plain = build(family).to(device)
        for bias in biases(plain):
            bias.window_size, bias.num_relative_distance = (2, 3), 18
            bias.relative_position_bias_table = nn.Parameter(torch.randn(18, 2, device=device))
        model, x = copy.deepcopy(plain), torch.randn(2, 3, 32, 48, device=device)
        accelerate(model)
        with torch.no_grad(), no_call_of(type(biases(model)[0]).forward):
            actual = model(x)
        close(actual, plain(x))

    def test_a_resized_bias_is_transformers(self, family, device):
        plain = build(family).to(device)
        model, x = copy.deepcopy(plain), torch.randn(2, 3, 48, 48, device=device)
        accelerate(model)
        close(model(x, interpolate_pos_encoding=True), plain(x, interpolate_pos_encoding=True))

    @pytest.mark.parametrize("where", ["relative_position_bias", "attention", "q"])
    def test_a_hook_sees_its_module_called(self, family, where, device):
        plain = build(family).to(device)
        model, called, x = copy.deepcopy(plain), [], torch.randn(2, 3, 32, 32, device=device)
        accelerate(model)
        names = {"q": ("q_proj", "query"), "attention": ("attention",)}.get(where, (where,))
        hooked = next(m for path, m in model.named_modules() if path.rpartition(".")[2] in names and [*m.parameters()])
        hooked.register_forward_hook(lambda *_: called.append(1))
        close(model(x), plain(x))
        assert called == [1]

    def test_drops_the_right_share_of_weights(self, family, device):
        """The mean over many draws is what nothing dropped gives."""
        model = build(family, attention_probs_dropout_prob=0.3).to(device)
        layer, seen = layer_of(model), []
        accelerate(model)
        layer.attention.register_forward_hook(lambda _, args, out: seen.append(out[0]))
        x = torch.randn(1, 5, 32, device=device)
        with torch.no_grad():
            layer(x, resolution=(32, 32))
            layer.train()(x.expand(256, -1, -1), resolution=(32, 32))
        expected, outputs = seen
        deviation = outputs.std(0) / 256**0.5
        assert deviation.min() > 0
        assert ((outputs.mean(0) - expected[0]) / deviation).square().mean() < 2.0


@pytest.mark.usefixtures("computed_by_pytorch")
def test_attention_weights_are_transformers(device):
    plain = build("beit").to(device)
    plain.inner.set_attn_implementation("eager")
    model, x = copy.deepcopy(plain), torch.randn(2, 3, 32, 32, device=device)
    accelerate(model)
    actual, expected = (each.inner(x, output_attentions=True).attentions[0] for each in (model, plain))
    close(actual, expected)


@pytest.mark.usefixtures("computed_by_pytorch")
def test_a_mask_is_added_to_the_bias(device):
    plain = build("beit").to(device)
    model, mask = copy.deepcopy(plain), torch.zeros(2, 1, 5, 5, device=device)
    mask[..., 3:] = -1e4
    accelerate(model)
    x = torch.randn(2, 5, 32, device=device)
    close(*(layer_of(each)(x, attention_mask=mask, resolution=(32, 32)) for each in (model, plain)))
