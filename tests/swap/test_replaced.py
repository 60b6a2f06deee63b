"""A method set on a library's class, as ``timm.layers.Mlp.forward = mine``, counts: before accelerate and after."""

import contextlib
import copy
import functools
import importlib
import types

import pytest
import test_dino
import torch
from parity import shake
from torch import nn

from vitkernels import accelerate, explain, layers, models, use_backend
from vitkernels.layers import fused

timm = pytest.importorskip("timm")
TINY = {"img_size": 32, "embed_dim": 32, "num_heads": 2, "depth": 1, "num_classes": 5}


def torchvision_model() -> nn.Module:
    return pytest.importorskip("torchvision.models").VisionTransformer(32, 16, 1, 2, 32, 128, num_classes=5)


def open_clip_tower() -> nn.Module:
    pytest.importorskip("open_clip")
    from test_open_clip import tower

    return tower(layers=1, ls_init_value=0.5)


class Keywords(nn.Module):
    """A model of transformers, called with an image and giving a tensor."""

    def __init__(self, name: str):
        super().__init__()
        pytest.importorskip("transformers")
        from hf_models import build, inputs_of

        self.model, self.inputs = build(name), {k: v for k, v in inputs_of(name).items() if k != "pixel_values"}

    def forward(self, images):
        return self.model(images, **self.inputs)[0]


MODELS = {
    "timm vit": lambda: timm.create_model("vit_tiny_patch16_224", init_values=0.5, qk_norm=True, **TINY),
    "timm eva": lambda: timm.create_model("eva02_tiny_patch14_224", patch_size=16, **TINY),
    "torchvision": torchvision_model,
    "open_clip": open_clip_tower,
    "dinov2": test_dino.dinov2,
    "dinov3": test_dino.DINOv3,
    "transformers vit": lambda: Keywords("vit"),
    "transformers dinov2": lambda: Keywords("dinov2, swiglu"),
    "transformers dinov3": lambda: Keywords("dinov3"),
}


@pytest.fixture
def images(device) -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, device=device)


def turned(original):
    """``original`` with its result turned round."""

    def mine(self, *args, **kwargs):
        out = original(self, *args, **kwargs)
        if isinstance(out, torch.Tensor):
            return -2 * out
        return (-2 * out[0], *out[1:]) if type(out) is tuple else out

    return mine


@contextlib.contextmanager
def replaced(cls: type, name: str = "forward", change=turned):
    had = name in vars(cls)
    before = getattr(cls, name)
    setattr(cls, name, change(before))
    try:
        yield
    finally:
        if had:
            setattr(cls, name, before)
        else:
            delattr(cls, name)


def close(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


def swapped(report) -> list[str]:
    return [entry.module for entry in report.swapped]


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_forward_of_every_class_in_a_model(name, images, device):
    plain = shake(MODELS[name]()).to(device).eval()
    called = [m for m in plain.modules() if m is not plain and type(m).forward is not nn.Module.forward]
    classes = list(dict.fromkeys(map(type, called)))
    swapped_before = copy.deepcopy(plain)
    everything = swapped(accelerate(swapped_before))
    untouched, seen, told = plain(images), 0, 0
    for cls in classes:
        with replaced(cls):
            expected = plain(images)
            close(swapped_before(images), expected)
            now = copy.deepcopy(plain)
            report = accelerate(now)
            close(now(images), expected)
            with use_backend("torch"):
                close(now(images), expected)
            reason = f"{cls.__name__}.forward is not the library's own"
            told += any(reason in entry.reason for entry in report.kept)
            seen += not torch.equal(expected, untouched)
        assert swapped(accelerate(now)) == everything, "set back, it is swapped again"
    close(swapped_before(images), untouched)
    assert seen >= 5 and told >= 5


METHODS = {
    "a convolution's": ("timm vit", lambda: nn.Conv2d, "_conv_forward"),
    "torchvision's patches": ("torchvision", lambda: type(torchvision_model()), "_process_input"),
    "open_clip's embedding": ("open_clip", lambda: type(open_clip_tower()), "_embeds"),
    "dinov3's attention": ("dinov3", lambda: type(test_dino.DINOv3().blocks[0].attn), "compute_attention"),
    "what calls a module": ("timm vit", lambda: timm.layers.Mlp, "__call__"),
    "what calls a Linear": ("timm vit", lambda: nn.Linear, "__call__"),
}


@torch.no_grad()
@pytest.mark.parametrize(("method", "when"), list(zip(METHODS, ["before", "after"] * 3, strict=True)))
def test_other_methods(method, when, images, device):
    name, cls, attribute = METHODS[method]
    cls, plain = cls(), shake(MODELS[name]()).to(device).eval()
    fast = copy.deepcopy(plain)
    if when == "after":
        accelerate(fast)
    untouched = plain(images)
    with replaced(cls, attribute):
        expected = plain(images)
        assert not torch.allclose(expected, untouched, rtol=1e-2, atol=1e-2)
        report = accelerate(fast) if when == "before" else explain(fast)
        close(fast(images), expected)
    if method != "what calls a module":  # which is called as ever, where it is not read by a block
        assert any(f"{cls.__name__}.{attribute} is not" in entry.reason for entry in report.kept)
    close(fast(images), untouched)


@torch.no_grad()
def test_packed_images_of_naflex(device):
    model = shake(timm.create_model("naflexvit_base_patch16_gap", embed_dim=32, num_heads=2, depth=1)).to(device).eval()
    patches = {
        "patches": torch.randn(2, 6, 768, device=device),
        "patch_coord": torch.cartesian_prod(torch.arange(2), torch.arange(3)).expand(2, 6, 2).to(device),
        "patch_valid": torch.arange(6).expand(2, 6).lt(torch.tensor([[6], [4]])).to(device),
    }
    fast = copy.deepcopy(model)
    accelerate(fast)
    for cls, name in (
        (type(model), "forward_features"),
        (type(model), "_forward_embeds"),
        (timm.layers.Mlp, "forward"),
    ):

        def negated(original):
            def mine(self, *args, **kwargs):
                out = original(self, *args, **kwargs)
                return out | {"patches": -out["patches"]} if isinstance(out, dict) else -out

            return mine

        before = model(patches)
        with replaced(cls, name, negated):
            expected = model(patches)
            assert not torch.allclose(expected, before, rtol=1e-3, atol=1e-3)
            close(fast(patches), expected)


def wrapped(original):
    """As a careful author writes it: the names, and what is wrapped, are the original's."""

    @functools.wraps(original)
    def mine(self, *args, **kwargs):
        return 2 * original(self, *args, **kwargs)

    return mine


class Callable_:
    def __init__(self, original):
        self.original = original

    def __call__(self, x):
        return x


STRANGERS = {
    "wrapped": wrapped,
    "without gradients": lambda original: torch.no_grad()(original),
    "another class's of the library": lambda original: timm.layers.GluMlp.forward,
    "no function": Callable_,
    "partial": lambda original: functools.partialmethod(original),
    "of the same names": lambda original: types.FunctionType(original.__code__, dict(original.__globals__), "forward"),
}


@pytest.mark.parametrize("kind", STRANGERS)
def test_whatever_is_set_is_no_more_the_librarys_own(kind, device):
    model = timm.create_model("vit_tiny_patch16_224", **TINY).to(device)
    with replaced(timm.layers.Mlp, change=STRANGERS[kind]):
        report = accelerate(model)
        reasons = {entry.module: entry.reason for entry in report.kept}
        assert "timm.layers.mlp.Mlp.forward is not the library's own" in reasons["blocks.0.mlp"]
        assert "timm.layers.mlp.Mlp.forward is not the library's own" in reasons["blocks.0"]
        assert {"blocks.0.attn", "norm"} <= set(swapped(report))
        with pytest.raises(NotImplementedError, match=r"Mlp\.forward is not the library's own"):
            accelerate(model, strict=True)


def test_all_of_each_library_is_its_own():
    """Decorated forwards, as transformers has them, too: what is refused here would never be swapped."""
    for name in ("torchvision.models", "open_clip", "transformers.models.vit.modeling_vit"):
        pytest.importorskip(name.partition(".")[0])
        importlib.import_module(name)
    explain(nn.Identity())
    from vitkernels.layers import _own

    assert len(_own._noted) > 80
    assert not [cls for cls in _own._noted if _own.replaced(cls)]


def test_subclasses_and_their_parents(device):
    """What is set on a class that does not come to be called changes nothing."""
    model = timm.create_model("vit_tiny_patch16_224", **TINY).to(device)
    with replaced(nn.LayerNorm), replaced(timm.layers.GluMlp), replaced(nn.SiLU):
        assert "blocks.0" in swapped(accelerate(model)), "timm's LayerNorm has a forward of its own"


@torch.no_grad()
def test_compiled_code_made_after(images, device):
    model = shake(timm.create_model("vit_tiny_patch16_224", **TINY)).to(device).eval()
    plain = copy.deepcopy(model)
    accelerate(model)
    with replaced(nn.Linear):
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        close(compiled(images), plain(images))
    torch._dynamo.reset()
    close(torch.compile(model, fullgraph=True, backend="eager")(images), plain(images))


@torch.no_grad()
def test_script_of_what_was_replaced_is_no_other(device):
    """TorchScript compiles sources: of an accelerated model it has no other than the library's."""
    model = timm.create_model("vit_tiny_patch16_224", **TINY).to(device).eval()
    accelerate(model)
    with replaced(timm.layers.Mlp), pytest.raises(NotImplementedError, match=r"Mlp\.forward.*restore"):
        torch.jit.script(model)


@torch.no_grad()
def test_module_call_of_a_profiler(images, device):
    """Who replaces torch.nn.Module.__call__ sees every module called, as who registers a global hook does."""
    model = shake(timm.create_model("vit_tiny_patch16_224", **TINY)).to(device).eval()
    plain, seen = copy.deepcopy(model), []
    accelerate(model)

    def noting(original):
        def mine(self, *args, **kwargs):
            seen.append(type(self).__name__)
            return original(self, *args, **kwargs)

        return mine

    called = []
    with replaced(nn.Module, "__call__", noting):
        for each in (plain, model):
            seen.clear()
            each(images)
            called.append(list(seen))
    assert called[1] == called[0]


@torch.no_grad()
def test_attention_function_of_transformers(device):
    """Its table of attention implementations is made to be added to; who replaces sdpa in it is followed."""
    pytest.importorskip("transformers")
    from hf_models import attention, build, inputs_of, layers
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model = build("vit").to(device)
    inputs, plain = inputs_of("vit", next(model.parameters())), copy.deepcopy(model)
    accelerate(model)
    own = ALL_ATTENTION_FUNCTIONS["sdpa"]
    before = plain(**inputs)[0]
    type(ALL_ATTENTION_FUNCTIONS).register("sdpa", lambda *a, **k: (2 * own(*a, **k)[0], None))
    try:
        expected = plain(**inputs)[0]
        assert not torch.allclose(expected, before, rtol=1e-2, atol=1e-2)
        close(model(**inputs)[0], expected)
        reasons = [entry.reason for entry in accelerate(model).kept]
        assert any("sdpa is not transformers' own" in reason for reason in reasons)
        assert attention(layers(model)[0]) is not None
    finally:
        type(ALL_ATTENTION_FUNCTIONS).register("sdpa", own)
    close(model(**inputs)[0], before)


@torch.no_grad()
@pytest.mark.parametrize(
    "cls",
    [nn.Linear, nn.Dropout, nn.GELU, nn.Identity, layers.LayerNorm, layers.LayerScale, layers.Attention, layers.Mlp],
    ids=lambda cls: cls.__name__,
)
def test_own_layers(cls, device, monkeypatch):
    """What a layer of this package reads, it calls once another forward is set on its class."""
    block = shake(layers.Block(32, 2, init_values=0.5)).to(device).eval()
    x = torch.randn(2, 5, 32, device=device)
    before = block(x)
    with replaced(cls):
        monkeypatch.setattr(fused, "block", lambda *a, **k: pytest.fail("the block is read"))
        out = block(x)
        assert not torch.allclose(out, before, rtol=1e-2, atol=1e-2)
        monkeypatch.setattr(layers.Block, "fuses", lambda self: False)
        close(out, block(x))
    monkeypatch.undo()
    assert torch.equal(block(x), before)


def test_own_model(device):
    model = models.VisionTransformer(img_size=16, patch_size=8, embed_dim=32, depth=1, num_heads=2).to(device).eval()
    images = torch.randn(2, 3, 16, 16, device=device)
    with torch.no_grad():
        before = model(images)
        with replaced(nn.GELU):
            assert not torch.allclose(model(images), before, rtol=1e-2, atol=1e-2)
        assert torch.equal(model(images), before)
