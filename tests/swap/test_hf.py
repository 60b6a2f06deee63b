"""Accelerated models of transformers against the originals: outputs and all gradients, by the error rule."""

import contextlib
import copy
import inspect
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from vitkernels import accelerate
from vitkernels.testing.sums import summed_alike

transformers = pytest.importorskip("transformers", minversion="4.50")
from hf_models import (  # noqa: E402
    MODELS,
    OLD,
    attention,
    beit,
    build,
    data2vec,
    dinov2,
    dinov3,
    images,
    inputs_of,
    layers,
    tensors,
    vit,
)
from parity import judge, shake  # noqa: E402


def run(model: nn.Module, inputs: dict[str, Tensor], upstream: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Return outputs and, of their sum weighted by ``upstream``, every parameter's gradient."""
    torch.manual_seed(seed)
    model.zero_grad()
    outputs = tensors(model(**inputs))
    loss = sum((t * upstream[k].to(t.dtype)).sum() for k, t in outputs.items() if t.requires_grad)
    loss.backward()
    grads = {f"d{k}": p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    return {k: t.detach() for k, t in (outputs | grads).items()}


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def three_ways(
    model: nn.Module, inputs_of: Callable[[], dict[str, Tensor]]
) -> Callable[[int], tuple[dict, dict, dict]]:
    """Return a draw: what the accelerated model gives, what PyTorch gives in the same dtype, and the truth in fp64."""
    plain, wide = copy.deepcopy(model), copy.deepcopy(model).double()
    with torch.no_grad():
        upstream = {k: torch.randn_like(t) for k, t in tensors(model(**inputs_of())).items()}
    report = accelerate(model)
    assert not [entry for entry in report.kept if entry.known], report

    def draw(seed: int) -> tuple[dict, dict, dict]:
        inputs = inputs_of()
        with summed_alike(*model.parameters()):
            yardstick = run(plain, inputs, upstream, seed)
        with default_dtype(torch.float64):  # the causal masks of 4.5x are made in it, and overflow in another
            wide_inputs = {k: x.double() if x.is_floating_point() else x for k, x in inputs.items()}
            truth = run(wide, wide_inputs, upstream, seed)
        return run(model, inputs, upstream, seed), yardstick, truth

    return draw


def prepared(
    name: str, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, Callable[[], dict[str, Tensor]]]:
    model = build(name).to(device, dtype)
    return model, lambda: inputs_of(name, next(model.parameters()))


@pytest.mark.parametrize("name", MODELS)
def test_fp32(name, device):
    model, inputs = prepared(name, device)
    judge(three_ways(model, inputs))
    swapped = [entry.was for entry in accelerate(model).swapped]
    missing = [end for end in MODELS[name][2] if not any(cls.endswith(end) for cls in swapped)]
    assert not missing, f"no {missing} was swapped"


@pytest.mark.parametrize("name", ["vit", "dinov3"])
def test_bf16(name, device, computed_by_pytorch):
    """As in fp32, but with the gain judged over all tensors of the models: through a network that of one is luck."""
    draws = []
    draw = three_ways(*prepared(name, device, torch.bfloat16))
    judge(lambda seed: (draws.append(draw(seed)), draws[-1])[1], gain_counts=False)
    actual, plain, truth = draws[0]
    gains, torch_gains = (
        torch.stack(
            [((x[k] - truth[k]) * truth[k]).sum() / truth[k].square().sum() for k in truth if "k_proj.bias" not in k]
        )
        for x in (actual, plain)
    )
    assert gains.square().mean().sqrt() <= 1.5 * torch_gains.square().mean().sqrt()


@pytest.mark.parametrize(
    "make",
    [
        lambda: vit(hidden_dropout_prob=0.3),
        lambda: dinov2(drop_path_rate=0.6),
        lambda: beit(num_hidden_layers=2, drop_path_rate=0.6, hidden_dropout_prob=0.3, layer_scale_init_value=0.0),
        lambda: data2vec(num_hidden_layers=2, drop_path_rate=0.6, hidden_dropout_prob=0.3),
        lambda: dinov3(drop_path_rate=0.6, num_register_tokens=0, pos_embed_jitter=1.5, pos_embed_shift=0.2),
    ],
    ids=["dropout", "drop path", "dropout and drop path", "data2vec", "drop path and moved positions"],
)
def test_training(make, device, monkeypatch, computed_by_pytorch):
    """What is dropped is what transformers drops under the same seed."""
    drawn = torch.rand
    # Draws differ between dtypes, and the truth must drop what the others drop.
    monkeypatch.setattr(torch, "rand", lambda *size, dtype, **more: drawn(*size, dtype=torch.float32, **more).to(dtype))
    model = shake(make()).to(device).train()
    judge(three_ways(model, lambda: {k: x.to(device) for k, x in images(batch=3).items()}))
    inputs = {k: x.to(device) for k, x in images(batch=3).items()}
    with torch.no_grad():
        torch.manual_seed(0)
        first = model(**inputs)[0]
        assert (model(**inputs)[0] - first).abs().max() > 0.01, "nothing was dropped"


def test_drop_path_in_bf16_keeps_the_scale(device, computed_by_pytorch):
    """1 / keep of 0.3 rounded to bf16 is 1.5e-3 off: more than eps / 32."""
    layer = layers(shake(dinov2(drop_path_rate=0.7)))[0].to(device, torch.bfloat16).train()
    x = torch.randn(64, 5, 32, device=device, dtype=torch.bfloat16)
    outputs = []
    for swap in (False, True):
        if swap:
            accelerate(layer)
        torch.manual_seed(0)
        out = layer(x)
        outputs.append(((out[0] if isinstance(out, tuple) else out) - x).detach().double())
    expected, actual = outputs
    assert 0 < int((expected.abs().amax((1, 2)) == 0).sum()) < 64, "some must be dropped on both branches, not all"
    gain = ((actual - expected) * expected).sum() / expected.square().sum()
    assert abs(gain) < 3e-4


def test_dropped_attention_weights(device):
    """The kernels draw by themselves: the mean over many draws is what nothing dropped gives."""
    attend = attention(layers(shake(vit(attention_probs_dropout_prob=0.4)))[0]).to(device)
    accelerate(attend)
    x = torch.randn(1, 7, 32, device=device)
    with torch.no_grad():
        expected = attend.eval()(x)[0]
        outputs = attend.train()(x.expand(64, -1, -1))[0]
    deviation = outputs.std(0) / 64**0.5
    assert (outputs[0] - outputs[1]).abs().max() > 0.01
    assert ((outputs.mean(0) - expected[0]).abs() / deviation).max() < 5


@pytest.mark.parametrize("name", ["dinov3", "clip text"])
def test_compiled(name, device):
    """One graph, as of the original, with the very results of eager."""
    model, draw = prepared(name, device)
    inputs = draw()
    for parameter in model.parameters():
        parameter.grad = None
    accelerate(model)
    expected = tensors(model(**inputs))
    sum(t.square().sum() for t in expected.values()).backward()
    grads = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch._dynamo.reset()
    actual = tensors(torch.compile(model, backend="aot_eager", fullgraph=True)(**inputs))
    sum(t.square().sum() for t in actual.values()).backward()
    close(actual, expected)
    close({k: p.grad for k, p in model.named_parameters() if p.grad is not None}, grads)


def close(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_mixed_precision(device, computed_by_pytorch):
    """Under autocast, where products run in bf16 and the residual stream in fp32."""
    model, draw = prepared("clip", device)
    inputs = draw()
    truth = tensors(copy.deepcopy(model).double()(**{k: x.double() for k, x in inputs.items()}))
    with torch.autocast(device.type, torch.bfloat16), torch.no_grad():
        yardstick = tensors(model(**inputs))
        accelerate(model)
        actual = tensors(model(**inputs))
    for name in ("image_embeds", "last_hidden_state"):
        error, torch_error = ((x[name] - truth[name]).square().mean().sqrt() for x in (actual, yardstick))
        assert actual[name].dtype == yardstick[name].dtype
        assert error < 1.5 * torch_error


def test_classes_of_one_kind_have_one_forward():
    """One mixin serves many classes: their forwards must be the same code, in this release and in the next."""
    from vitkernels.swap import _rules, hf

    forwards: dict[str, dict[tuple, list[str]]] = {}
    for rule in {id(rule): rule for rule in _rules.RULES.values()}.values():
        if rule.fused.__module__ == hf.__name__:
            kind, original = rule.fused.__bases__
            code = inspect.unwrap(original.forward).__code__
            same = forwards.setdefault(f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}", {})
            same.setdefault((code.co_code, code.co_names, code.co_varnames), []).append(original.__name__)
    # DINOv3's layer differs from DINOv2's by the name of its positions alone, ViT-MAE's patches in 4.5x from ViT's by
    # the words of an error.
    expected = {"_mixins_4.SizedPatchEmbeddings": 2} if OLD else {"_mixins.Dinov2Layer": 2}
    originals = {name for same in forwards.values() for names in same.values() for name in names}
    # Until 4.51 these have a class for each implementation.
    expected |= {f"_mixins_4.{cls}Attention": 2 for cls in ("CLIP", "Siglip") if f"{cls}SdpaAttention" in originals}
    assert {kind: len(same) for kind, same in forwards.items() if len(same) > 1} == expected, forwards
