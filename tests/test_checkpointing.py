"""Under activation checkpointing a forward is computed again on the backend that it had, wherever its backward runs."""

import contextlib
import copy
import threading

import pytest
import torch
import triton
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import vitkernels
from vitkernels import checkpoint_context, checkpoint_policy, ops, runtime, use_backend
from vitkernels.layers import Block, LayerNorm, Mlp

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


# What is kept, and the kernels that then do not run again in the backward.
SAVE = {
    "attention": ("attention", {"attention"}),
    "linear": (["linear"], {"linear"}),
    "mlp": ({"mlp"}, {"mlp"}),
    "attention and linear": (("attention", "linear"), {"attention", "linear"}),
    "all": (["attention", "linear", "mlp"], {"attention", "linear", "mlp"}),
}


class Vit(nn.Module):
    """Blocks of this library, each behind a checkpoint with ``context_fn`` (None: without)."""

    def __init__(self, context_fn, depth=2):
        super().__init__()
        self.blocks = nn.ModuleList(Block(32, 2) for _ in range(depth))
        self.context_fn = context_fn

    def forward(self, x):
        for block in self.blocks:
            if self.context_fn == "no checkpoint":
                x = block(x)
            elif self.context_fn is None:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = checkpoint(block, x, use_reentrant=False, context_fn=self.context_fn)
        return x


@pytest.fixture
def called(monkeypatch):
    """The registered ops that ran since it was last cleared, by a plan of their own or by their launcher."""
    from vitkernels.ops._plan import Plans

    names, original = [], Plans.__call__
    of = {id(found.launcher): name for name, found in vitkernels.ops._registry.OPS.items()}

    def call(self, device, *args):
        if id(self._launcher) in of:
            names.append(of[id(self._launcher)])
        return original(self, device, *args)

    monkeypatch.setattr(Plans, "__call__", call)
    return names


def forwards(called) -> dict[str, int]:
    """How often the forward of each kind of op ran."""
    kinds = {"attention_fwd": "attention", "attention_qkvpacked_fwd": "attention", "linear_fwd": "linear"}
    kinds |= {"mlp_fwd": "mlp", "layer_norm_fwd": "norm"}
    found = dict.fromkeys(kinds.values(), 0)
    for name in called:
        if name in kinds:
            found[kinds[name]] += 1
    return found


@pytest.mark.parametrize("choice", SAVE)
def test_what_is_saved_does_not_run_again(choice, called, device):
    """A block calls two LayerNorms, two projections, attention and the MLP; that one node holds them hides none."""
    save, kept = SAVE[choice]
    plain = Vit("no checkpoint").to(device)
    x = torch.randn(2, 5, 32, device=device, requires_grad=True)
    expected = gradients(plain, x, None)
    once = {"attention": 2, "linear": 4, "mlp": 2, "norm": 4}
    model = Vit(checkpoint_context(save)).to(device)
    model.load_state_dict(plain.state_dict())
    for _ in range(4):  # with plans from the third on
        loss = model(x).square().sum()
        model.zero_grad()
        called.clear()
        in_a_thread(loss.backward)
        again = forwards(called)
        assert again["attention"] == (0 if "attention" in kept else once["attention"])
        assert again["linear"] == (0 if "linear" in kept else once["linear"])
        assert again["norm"] == once["norm"]
        assert again["mlp"] == (0 if "mlp" in kept else once["mlp"])
        for p, want in zip(model.parameters(), expected, strict=True):
            assert torch.equal(p.grad, want)


class Allocated(TorchDispatchMode):
    """What ops allocate within the block; :meth:`held` tells the bytes of it that something still holds."""

    def __init__(self):
        super().__init__()
        self.storages = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for t in results if isinstance(results, (tuple, list)) else (results,):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return results

    def held(self) -> int:
        return sum(size for ref, size in self.storages.values() if not ref.expired())


def held(context_fn, x):
    """Bytes that the forward of a model of two blocks leaves for its backward, without the output's."""
    model = Vit(context_fn).to(x.device)
    with Allocated() as allocated:
        y = model(x)
    return allocated.held() - y.untyped_storage().nbytes()


def test_bytes_that_are_saved(device):
    B, N, C, H, F = 2, 5, 32, 2, 128
    x = torch.randn(B, N, C, device=device, requires_grad=True)
    none = held(None, x)
    assert none == B * N * C * 4  # between the blocks
    per_token = {"attention": C + H, "linear": 3 * C + C, "mlp": C + 2 * F}
    # The last block's MLP returns the model's output.
    for save in ("attention", "linear", ("attention", "linear")):
        numbers = sum(per_token[name] for name in ([save] if isinstance(save, str) else save))
        assert held(checkpoint_context(save), x) - none == 2 * B * N * numbers * 4, save
    # Its output is the next block's input, or the model's.
    assert held(checkpoint_context("mlp"), x) - none == 2 * B * N * 2 * F * 4
    everything = held("no checkpoint", x)
    assert none < held(checkpoint_context("attention"), x) < held(checkpoint_context(["attention", "linear"]), x)
    assert held(checkpoint_context(["attention", "linear"]), x) < everything


def test_attention_of_pytorch_is_saved_too(device):
    """Where the backend is torch."""
    x = torch.randn(2, 5, 32, device=device, requires_grad=True)
    plain, seen = Vit("no checkpoint").to(device), []

    def policy(context, op, *args, **kwargs):
        chosen = checkpoint_policy("attention")(context, op, *args, **kwargs)
        if chosen == CheckpointPolicy.MUST_SAVE:
            seen.append(op.name())
        return chosen

    model = Vit(lambda: create_selective_checkpoint_contexts(policy)).to(device)
    model.load_state_dict(plain.state_dict())
    for got, want in zip(gradients(model, x, "torch"), gradients(plain, x, "torch"), strict=True):
        assert torch.equal(got, want)
    assert len(seen) == 2 and all(name.startswith("aten::_scaled_dot_product_") for name in seen)


def test_in_the_switch_of_transformers(called, device):
    model, enable = hf_vit()
    model.to(device)
    images = torch.randn(2, 3, 32, 32, device=device)

    def run():
        model.zero_grad()
        loss = model(images).logits.square().sum()
        called.clear()
        loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = run()
    enable(gradient_checkpointing_kwargs={"use_reentrant": False, "context_fn": checkpoint_context()})
    for got, want in zip(run(), expected, strict=True):
        assert torch.equal(got, want)
    assert forwards(called)["attention"] == 0 < forwards(called)["linear"]


def test_around_the_blocks_of_timm(called, device):
    """As for FSDP: each block in a wrapper, which state dicts do not show."""
    model, _ = timm_vit()
    model.to(device)
    images, keys = torch.randn(2, 3, 32, 32, device=device), list(model.state_dict())

    def run():
        model.zero_grad()
        loss = model(images).square().sum()
        called.clear()
        loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    expected = run()
    for i, block in enumerate(model.blocks):
        model.blocks[i] = checkpoint_wrapper(
            block, checkpoint_impl=CheckpointImpl.NO_REENTRANT, context_fn=checkpoint_context(["attention", "linear"])
        )
    assert list(model.state_dict()) == keys
    for got, want in zip(run(), expected, strict=True):
        assert torch.equal(got, want)
    again = forwards(called)
    assert again["attention"] == again["linear"] == 0 < again["norm"]


@pytest.mark.parametrize("save", ["attention", ("attention", "linear")], ids=str)
def test_compiled(save, called, device):
    torch._dynamo.reset()
    plain = Vit("no checkpoint").to(device)
    x = torch.randn(2, 5, 32, device=device, requires_grad=True)
    expected = gradients(plain, x, None)
    model = Vit(checkpoint_context(save)).to(device)
    model.load_state_dict(plain.state_dict())
    compiled = torch.compile(model, backend="aot_eager_decomp_partition", fullgraph=True)
    loss = compiled(x).square().sum()
    called.clear()
    loss.backward()
    again = forwards(called)
    assert again["attention"] == 0 < again["norm"]
    assert (again["linear"] == 0) == ("linear" in save)
    for p, want in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, want)


@pytest.mark.parametrize(
    ("save", "error", "message"),
    [
        ("atention", ValueError, "save holds 'atention'; expected some of attention, linear, mlp"),
        (["attention", "norm"], ValueError, "save holds 'norm'; expected some of"),
        ((), ValueError, "save is empty; checkpoint without context_fn to keep nothing"),
        (None, TypeError, "save is a NoneType; expected a name or several"),
        ([torch.ops.aten.mm.default], TypeError, "save holds a OpOverload; expected names"),
    ],
    ids=str,
)
def test_unknown_choices(save, error, message):
    for make in (checkpoint_policy, checkpoint_context):
        with pytest.raises(error, match=message):
            make(save)


def test_attention_of_pytorch_that_draws_is_computed_again():
    q = torch.zeros(1, 1, 4, 8)
    policy, aten = vitkernels.checkpoint_policy("attention"), torch.ops.aten
    for op, dropout_at in (
        (aten._scaled_dot_product_flash_attention.default, 3),
        (aten._scaled_dot_product_efficient_attention.default, 5),
    ):
        kept, drawn = (policy(None, op, *[q, q, q, None, True][:dropout_at], p) for p in (0.0, 0.1))
        assert kept == CheckpointPolicy.MUST_SAVE and drawn == CheckpointPolicy.PREFER_RECOMPUTE
    assert policy(None, op, q, q, q, None, True) == CheckpointPolicy.MUST_SAVE


def test_every_forward_op_says_what_it_does():
    from vitkernels.ops._registry import OPS, WORK, register

    kept = {name: set() for name in WORK}
    for name, found in OPS.items():
        assert (found.work is None) == name.endswith("_bwd")
        if found.work is not None:
            kept[found.work].add(name)
    assert all(kept.values()) and "patch_embed_fwd" in kept["linear"]
    for save, ops_of_it in kept.items():
        if save == "pass":
            continue
        policy = checkpoint_policy(save)
        for name in OPS:
            op = getattr(torch.ops.vitkernels, name).default
            assert (policy(None, op) == CheckpointPolicy.MUST_SAVE) == (name in ops_of_it)
    rest = {"launcher": print, "reference": print, "fake": print}
    for schema, work in (("new_fwd(Tensor x) -> Tensor", None), ("new_fwd(Tensor x) -> Tensor", "norm"),
                         ("new_bwd(Tensor x) -> Tensor", "linear")):  # fmt: skip
        with pytest.raises(ValueError, match=r"work is .*; expected one of attention, linear, mlp, pass, or"):
            register(schema, **rest, work=work)
    assert not any(name.startswith("new") for name in OPS)


def test_products_of_pytorch_are_told_by_their_whole_names():
    policy, aten = checkpoint_policy("linear"), torch.ops.aten
    for op in (aten.mm.default, aten.addmm.default, aten.convolution.default):
        assert policy(None, op) == CheckpointPolicy.MUST_SAVE
    for op in (aten.mm.out, aten.addmm.out, aten.convolution_backward.default, aten.bmm.default):
        assert policy(None, op) == CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("backend", ["torch", KERNELS])
def test_patches_are_linear(backend, device):
    images, weight = torch.randn(2, 3, 8, 8, device=device), torch.randn(16, 3, 4, 4, device=device, requires_grad=True)
    kept = []

    def policy(context, op, *args, **kwargs):
        chosen = checkpoint_policy("linear")(context, op, *args, **kwargs)
        if chosen == CheckpointPolicy.MUST_SAVE:
            kept.append(op.name())
        return chosen

    with use_backend(backend):
        context_fn = lambda: create_selective_checkpoint_contexts(policy)  # noqa: E731
        y = checkpoint(ops.patch_embed, images, weight, use_reentrant=False, context_fn=context_fn)
        (got,) = torch.autograd.grad(y.square().sum(), (weight,))
        (want,) = torch.autograd.grad(ops.patch_embed(images, weight).square().sum(), (weight,))
    assert torch.equal(got, want)
    assert set(kept) == {"aten::convolution" if backend == "torch" else "vitkernels::patch_embed_fwd"}
