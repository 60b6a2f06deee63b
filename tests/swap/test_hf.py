"""Accelerated models of transformers against the originals: outputs and all gradients, by the error rule."""

import contextlib
import copy
import inspect

import pytest
import torch
from torch import Tensor, nn

from vitkernels import accelerate
from vitkernels.testing.compare import check

transformers = pytest.importorskip("transformers", minversion="4.50")
from hf_models import (  # noqa: E402
    MODELS,
    OLD,
    attention,
    build,
    dinov2,
    dinov3,
    images,
    inputs_of,
    layers,
    tensors,
    vit,
)
from parity import shake  # noqa: E402

DRAWS = 3  # of inputs: over one, the largest error of a bias of 36 numbers is too much a matter of luck


def run(model: nn.Module, draws: list[dict[str, Tensor]], upstream: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs and, of their sum weighted by ``upstream``, every parameter's gradient, stacked over the draws."""
    found: dict[str, list[Tensor]] = {}
    for seed, inputs in enumerate(draws):
        torch.manual_seed(seed)
        model.zero_grad()
        outputs = tensors(model(**inputs))
        loss = sum((t * upstream[k].to(t.dtype)).sum() for k, t in outputs.items() if t.requires_grad)
        loss.backward()
        grads = {f"d{k}": p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
        for k, t in (outputs | grads).items():
            found.setdefault(k, []).append(t.detach())
    return {k: torch.stack(v) for k, v in found.items()}


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def three_ways(model: nn.Module, draws: list[dict[str, Tensor]]) -> tuple[dict, dict, dict]:
    """Return what the accelerated model gives, what PyTorch gives in the same dtype, and the truth in fp64."""
    with torch.no_grad():
        upstream = {k: torch.randn_like(t) for k, t in tensors(model(**draws[0])).items()}
    wide = [{k: x.double() if x.is_floating_point() else x for k, x in inputs.items()} for inputs in draws]
    with default_dtype(torch.float64):  # the causal masks of 4.5x are made in it, and overflow in another
        truth = run(copy.deepcopy(model).double(), wide, upstream)
    yardstick = run(model, draws, upstream)
    report = accelerate(model)
    assert not [entry for entry in report.kept if entry.known], report
    return run(model, draws, upstream), yardstick, truth


def judge(actual: dict, yardstick: dict, truth: dict, **options) -> None:
    assert actual.keys() == yardstick.keys() == truth.keys()
    verdicts = [check(k, actual[k], yardstick[k], truth[k], **options) for k in truth]
    failed = [f"{v.name}: {v.detail}" for v in verdicts if not v.passed]
    assert not failed, "\n".join(failed)


def prepared(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, list[dict]]:
    model = build(name).to(device, dtype)
    return model, [inputs_of(name, next(model.parameters())) for _ in range(DRAWS)]


@pytest.mark.parametrize("name", MODELS)
def test_fp32(name, device):
    model, draws = prepared(name, device)
    judge(*three_ways(model, draws))
    swapped = [entry.was for entry in accelerate(model).swapped]
    missing = [end for end in MODELS[name][2] if not any(cls.endswith(end) for cls in swapped)]
    assert not missing, f"no {missing} was swapped"


@pytest.mark.parametrize("name", ["vit", "dinov3", "clip", "siglip2"])
def test_bf16(name, device):
    """As in fp32, but with the gain judged over all tensors of the models: through a network that of one is luck."""
    actual, yardstick, truth = three_ways(*prepared(name, device, torch.bfloat16))
    judge(actual, yardstick, truth, gain_counts=False)
    gains, torch_gains = (
        torch.stack(
            [((x[k] - truth[k]) * truth[k]).sum() / truth[k].square().sum() for k in truth if "k_proj.bias" not in k]
        )
        for x in (actual, yardstick)
    )
    assert gains.square().mean().sqrt() <= 1.5 * torch_gains.square().mean().sqrt()


@pytest.mark.parametrize(
    "make",
    [
        lambda: vit(hidden_dropout_prob=0.3),
        lambda: dinov2(drop_path_rate=0.6),
        lambda: dinov3(drop_path_rate=0.6, pos_embed_jitter=1.5, pos_embed_shift=0.2),
    ],
    ids=["dropout", "drop path", "drop path and moved positions"],
)
def test_training(make, device, monkeypatch):
    """What is dropped is what transformers drops under the same seed."""
    drawn = torch.rand
    # Draws differ between dtypes, and the truth must drop what the others drop.
    monkeypatch.setattr(torch, "rand", lambda *size, dtype, **more: drawn(*size, dtype=torch.float32, **more).to(dtype))
    model = shake(make()).to(device).train()
    draws = [{k: x.to(device) for k, x in images(batch=4).items()} for _ in range(DRAWS)]
    judge(*three_ways(model, draws))
    with torch.no_grad():
        torch.manual_seed(0)
        first = model(**draws[0])[0]
        assert (model(**draws[0])[0] - first).abs().max() > 0.01, "nothing was dropped"


def test_drop_path_in_bf16_keeps_the_scale(device):
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


@pytest.mark.parametrize("name", ["vit", "dinov2", "dinov3", "siglip", "clip", "clip text"])
def test_compiled(name, device):
    """One graph, as of the original, with the very results of eager."""
    model, (inputs, *_) = prepared(name, device)
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


def test_mixed_precision(device):
    """Under autocast, where products run in bf16 and the residual stream in fp32."""
    model, (inputs, *_) = prepared("clip", device)
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
    expected = {"_kinds_4.SizedPatchEmbeddings": 2} if OLD else {"_kinds.Dinov2Layer": 2}
    originals = {name for same in forwards.values() for names in same.values() for name in names}
    # Until 4.51 these have a class for each implementation.
    expected |= {f"_kinds_4.{cls}Attention": 2 for cls in ("CLIP", "Siglip") if f"{cls}SdpaAttention" in originals}
    assert {kind: len(same) for kind, same in forwards.items() if len(same) > 1} == expected, forwards
