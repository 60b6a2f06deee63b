"""Under activation checkpointing a forward is computed again on the backend that it had, wherever its backward runs."""

import contextlib
import copy
import threading

import pytest
import torch
import triton
from torch import nn
from torch.utils.checkpoint import checkpoint

import vitkernels
from vitkernels import ops, runtime, use_backend
from vitkernels.layers import LayerNorm, Mlp

KERNELS = "triton" if torch.cuda.is_available() else "emulated"


@pytest.fixture
def launches(monkeypatch, without_plans):
    """The kernels launched since it was last cleared."""
    names = []
    launch = triton.JITFunction.__getitem__

    def getitem(self, grid):
        names.append(self.fn.__name__)
        return launch(self, grid)

    monkeypatch.setattr(triton.JITFunction, "__getitem__", getitem)
    return names


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.mlp = LayerNorm(16), Mlp(16, 32)

    def forward(self, x):
        return x + self.mlp(self.norm(x))


class Checkpointed(nn.Module):
    def __init__(self, module, reentrant: bool):
        super().__init__()
        self.module, self.reentrant = module, reentrant

    def forward(self, x):
        return checkpoint(self.module, x, use_reentrant=self.reentrant)


def within(name: str | None):
    return use_backend(name) if name else contextlib.nullcontext()


def behind(function):
    function()


def in_a_thread(function):
    errors = []

    def run():
        try:
            function()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def within_torch(function):
    with use_backend("torch"):
        function()


def within_kernels(function):
    with use_backend(KERNELS):
        function()


WHERE = [behind, in_a_thread, within_torch, within_kernels]


def gradients(model, x, backend, where=behind):
    model.zero_grad()
    with within(backend):
        loss = model(x).square().sum()
    where(loss.backward)
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("backend", ["torch", KERNELS, None])
@pytest.mark.parametrize("nested", ["one", "nested", "nested, the other kind"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_where_it_was_computed(reentrant, nested, backend, where, launches, device):
    part = Part().to(device)
    x = torch.randn(2, 5, 16, device=device, requires_grad=True)
    expected = gradients(part, x, backend)
    model = Checkpointed(part, reentrant)
    if nested != "one":
        model = Checkpointed(model, reentrant if nested == "nested" else not reentrant)
    with within(backend):
        loss = model(x).square().sum()
    model.zero_grad()
    launches.clear()
    where(loss.backward)
    assert bool(launches) == (backend != "torch")
    for p, want in zip(part.parameters(), expected, strict=True):
        assert torch.equal(p.grad, want)


def timm_vit():
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5, embed_dim=32, num_heads=2)
    vitkernels.accelerate(model)
    return model, model.set_grad_checkpointing


def hf_vit():
    transformers = pytest.importorskip("transformers", minversion="4.50")
    config = transformers.ViTConfig(
        hidden_size=32, num_attention_heads=2, num_hidden_layers=2, intermediate_size=128, image_size=32, patch_size=16
    )
    model = transformers.ViTForImageClassification(config).train()
    vitkernels.accelerate(model)
    return model, model.gradient_checkpointing_enable


def own_vit():
    sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    model = vitkernels.models.VisionTransformer(**sizes)
    return model, model.set_grad_checkpointing


@pytest.mark.parametrize("build", [timm_vit, hf_vit, own_vit])
def test_models(build, launches, device):
    """Three forwards in flight, with and without a choice, and their backwards in a thread."""
    model, enable = build()
    model.to(device)
    images = torch.randn(2, 3, 32, 32, device=device)

    def loss():
        out = model(images)
        return getattr(out, "logits", out).square().sum()

    expected = {}
    for backend in ("torch", KERNELS, None):
        model.zero_grad()
        with within(backend):
            loss().backward()
        expected[backend] = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    enable()
    losses = {}
    for backend in expected:
        with within(backend):
            losses[backend] = loss()
    for backend in (KERNELS, "torch", None):
        model.zero_grad()
        launches.clear()
        in_a_thread(losses[backend].backward)
        assert bool(launches) == (backend != "torch")
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        for got, want in zip(grads, expected[backend], strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("where", WHERE)
def test_blocks_within_the_checkpoint_stay_within_it(reentrant, where):
    """What is outside of an inner block keeps the outer choice, or none."""
    unchosen = runtime.backend()
    for outer in (None, "torch", KERNELS):
        seen = []

        def function(x, seen=seen):
            seen.append(runtime.backend())
            with use_backend("auto"):
                seen.append(runtime.backend())
                with contextlib.ExitStack() as stack:
                    stack.enter_context(use_backend("torch"))
                    seen.append(runtime.backend())
            seen.append(runtime.backend())
            return x.sin()

        with within(outer):
            y = checkpoint(function, torch.ones(2, requires_grad=True) * 1, use_reentrant=reentrant)
        where(y.sum().backward)
        assert seen[:4] == seen[4:] == [outer or unchosen, "auto", "torch", outer or unchosen]


def test_other_hooks_of_saved_tensors_around_and_within():
    seen = []

    def function(x):
        with torch.autograd.graph.save_on_cpu():
            seen.append(runtime.backend())
            y = x.sin().cos()
        return y.exp()

    with use_backend("torch"), torch.autograd.graph.saved_tensors_hooks(lambda t: [t], lambda box: box[0]):
        y = checkpoint(function, torch.ones(2, requires_grad=True) * 1, use_reentrant=False)
        pair = torch._C._autograd._top_saved_tensors_default_hooks(True)
        assert pair[0](3) == [3]  # as they were
    in_a_thread(y.sum().backward)
    assert seen == ["torch", "torch"]


def test_checkpoints_of_torch_distributed():
    from torch.distributed._composable import checkpoint as composable
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    seen = []

    class Module(nn.Module):
        def forward(self, x):
            seen.append(runtime.backend())
            return x.sin()

    for module in (composable(Module()), checkpoint_wrapper(Module())):
        seen.clear()
        with use_backend("torch"):
            y = module(torch.ones(2, requires_grad=True) * 1)
        in_a_thread(y.sum().backward)
        assert seen == ["torch", "torch"]


def test_compiled_with_the_checkpoint_in_it(launches, device):
    for backend, where in (("torch", in_a_thread), ("torch", within_kernels), (KERNELS, within_torch)):
        torch._dynamo.reset()
        part = Part().to(device)
        x = torch.randn(2, 5, 16, device=device, requires_grad=True)
        expected = gradients(part, x, backend)
        model = torch.compile(Checkpointed(copy.deepcopy(part), False), backend="aot_eager")
        launches.clear()
        got = gradients(model, x, backend, where)
        assert bool(launches) == (backend != "torch")
        for g, want in zip(got, expected, strict=True):
            torch.testing.assert_close(g, want)


@pytest.mark.parametrize("backend", ["torch", KERNELS])
def test_a_backward_takes_its_forwards_backend(backend, launches, device):
    x = torch.randn(4, 16, device=device, requires_grad=True)
    with use_backend(backend):
        y = ops.layer_norm(x).sum()
    launches.clear()
    with use_backend("torch" if backend == KERNELS else KERNELS):
        y.backward()
    assert bool(launches) == (backend == KERNELS)


def test_unknown_checkpoints_are_refused():
    def pack(x):
        return x

    pack.__module__ = "torch.utils.checkpoint"
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, pack)
    with use_backend("torch"), hooks, pytest.raises(RuntimeError, match="which is not known; expected PyTorch"):
        runtime.backend()


def test_nothing_is_looked_for_without_a_choice(monkeypatch):
    monkeypatch.setattr(runtime, "_checkpoints", lambda end: pytest.fail("looked for checkpoints"))
    y = checkpoint(lambda x: x * len(runtime.backend()), torch.ones(2, requires_grad=True) * 1, use_reentrant=False)
    y.sum().backward()
