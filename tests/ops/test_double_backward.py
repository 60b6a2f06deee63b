"""A second derivative raises, whatever the upstream gradient; a graph of gradients that nobody differentiates works."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from vitkernels import ops, reference

AGAIN = "differentiated again"


@dataclasses.dataclass(frozen=True)
class Case:
    """An op of named tensors that may require a gradient, and the same in PyTorch."""

    function: Callable
    plain: Callable
    shapes: dict[str, tuple[int, ...]]
    autocast: bool = False

    def tensors(self, device, trainable: set[str] | None = None) -> dict[str, Tensor]:
        made = {n: 0.5 * torch.randn(s, device=device) for n, s in self.shapes.items()}
        return {n: t.requires_grad_(trainable is None or n in trainable) for n, t in made.items()}

    def gradients(self, function: Callable, tensors: dict[str, Tensor], **more) -> list[Tensor]:
        """Of the outputs' sum."""
        with torch.autocast(next(iter(tensors.values())).device.type, torch.bfloat16, enabled=self.autocast):
            outputs = function(**tensors)
        outputs = [y for y in (outputs if isinstance(outputs, tuple) else (outputs,)) if y.requires_grad]
        leaves = [t for t in tensors.values() if t.requires_grad]
        grads = torch.autograd.grad(outputs, leaves, [torch.ones_like(y) for y in outputs], **more)
        return list(grads)


def _attention(op: Callable, *, packed: bool) -> Callable:
    def attend(qkv, mask, q_weight, q_bias, k_weight):
        cos, sin = torch.randn(2, 4, 8, device=qkv.device)
        options = {
            "attn_mask": mask, "rope": (cos, sin), "num_prefix_tokens": 1, "q_norm": (q_weight, q_bias, 1e-6, False),
            "k_norm": (k_weight, None, 1e-6, True),
        }  # fmt: skip
        if op in (reference.attention, reference.attention_qkvpacked):
            options["rope"] = (cos, sin, False)
        return op(qkv, **options) if packed else op(*qkv.permute(2, 0, 3, 1, 4), **options)

    return attend


def _varlen(op: Callable) -> Callable:
    def attend(q, k, v):
        starts = torch.tensor([0, 3, 7], dtype=torch.int32, device=q.device)
        return op(q, k, v, starts, 4) if op is ops.attention_varlen else op(q, k, v, starts)

    return attend


def _block(op: Callable, **options) -> Callable:
    def block(x, n1_w, n1_b, qkv_w, qkv_b, proj_w, proj_b, gamma1, n2_w, n2_b, w1, b1, w2, b2, gamma2):
        return op(
            x, norm1=(n1_w, n1_b), qkv=(qkv_w, qkv_b), proj=(proj_w, proj_b), norm2=(n2_w, n2_b), fc1=(w1, b1),
            fc2=(w2, b2), layer_scale=(gamma1, gamma2), num_heads=2, **options,
        )  # fmt: skip

    return block


def _swiglu(op: Callable, **options) -> Callable:
    def swiglu(x, w1, b1, w2, b2, w3, b3, norm_w, norm_b, residual, gamma):
        norm = (norm_w, norm_b, 1e-6)
        return op(x, (w1, w2), (b1, b2), w3, b3, norm=norm, residual=residual, layer_scale=gamma, **options)

    return swiglu


def _packed_swiglu(op: Callable, **options) -> Callable:
    return lambda x, w12, b12, w3, b3: op(x, w12, b12, w3, b3, **options)


C, F = 16, 12  # F is padded to 16
NORM = {"x": (2, 5, C), "weight": (C,)}
SUM = {"residual": (2, 5, C), "layer_scale": (C,)}
LINEAR = {"x": (2, 5, C), "weight": (F, C), "bias": (F,), "residual": (2, 5, F), "layer_scale": (F,)}
MLP = {"x": (2, 5, C), "w1": (F, C), "b1": (F,), "w2": (C, F), "b2": (C,), **SUM}
SWIGLU = {
    "x": (2, 5, C), "w1": (F, C), "b1": (F,), "w2": (F, C), "b2": (F,), "w3": (C, F), "b3": (C,), "norm_w": (F,),
    "norm_b": (F,), "residual": (2, 5, C), "gamma": (C,),
}  # fmt: skip
BLOCK = {
    "x": (2, 5, C), "n1_w": (C,), "n1_b": (C,), "qkv_w": (3 * C, C), "qkv_b": (3 * C,), "proj_w": (C, C),
    "proj_b": (C,), "gamma1": (C,), "n2_w": (C,), "n2_b": (C,), "w1": (F, C), "b1": (F,), "w2": (C, F), "b2": (C,),
    "gamma2": (C,),
}  # fmt: skip
PREPARED = {"qkv": (2, 5, 3, 2, 8), "mask": (2, 5, 5), "q_weight": (8,), "q_bias": (8,), "k_weight": (8,)}
PATCHES = {
    "images": (2, 3, 8, 12), "weight": (C, 3, 4, 4), "bias": (C,), "pos_embed": (1, 7, C), "prefix_tokens": (1, 1, C),
}  # fmt: skip

CASES = {
    "layer_norm": Case(ops.layer_norm, reference.layer_norm, NORM | {"bias": (C,)}),
    "rms_norm": Case(ops.rms_norm, reference.rms_norm, NORM),
    "add_layer_norm": Case(ops.add_layer_norm, reference.add_layer_norm, NORM | {"bias": (C,)} | SUM),
    "add_rms_norm": Case(ops.add_rms_norm, reference.add_rms_norm, NORM | SUM),
    "linear": Case(ops.linear, reference.linear, LINEAR),
    "linear with GELU": Case(
        lambda **t: ops.linear(**t, activation="gelu"), lambda **t: reference.linear(**t, activation="gelu"), LINEAR
    ),
    "mlp": Case(ops.mlp, reference.mlp, MLP),
    "mlp, recomputed": Case(lambda **t: ops.mlp(**t, recompute=True), reference.mlp, MLP),
    "mlp, autocast": Case(ops.mlp, reference.mlp, MLP, autocast=True),
    "swiglu_mlp": Case(_swiglu(ops.swiglu_mlp), _swiglu(reference.swiglu_mlp), SWIGLU),
    "swiglu_mlp, recomputed": Case(_swiglu(ops.swiglu_mlp, recompute=True), _swiglu(reference.swiglu_mlp), SWIGLU),
    "swiglu_mlp, packed": Case(
        _packed_swiglu(ops.swiglu_mlp), _packed_swiglu(reference.swiglu_mlp),
        {"x": (2, 5, C), "w12": (2 * F, C), "b12": (2 * F,), "w3": (C, F), "b3": (C,)},
    ),
    "attention": Case(ops.attention, reference.attention, dict.fromkeys("qkv", (2, 2, 5, 8))),
    "attention, prepared": Case(
        _attention(ops.attention, packed=False), _attention(reference.attention, packed=False), PREPARED
    ),
    "attention_qkvpacked": Case(ops.attention_qkvpacked, reference.attention_qkvpacked, {"qkv": (2, 5, 3, 2, 8)}),
    "attention_qkvpacked, prepared": Case(
        _attention(ops.attention_qkvpacked, packed=True), _attention(reference.attention_qkvpacked, packed=True),
        PREPARED,
    ),
    "attention_varlen": Case(
        _varlen(ops.attention_varlen), _varlen(reference.attention_varlen), dict.fromkeys("qkv", (7, 2, 8))
    ),
    "block": Case(_block(ops.block), _block(reference.block), BLOCK),
    "block, autocast": Case(_block(ops.block, recompute=True), _block(reference.block), BLOCK, autocast=True),
    "patch_embed": Case(ops.patch_embed, reference.patch_embed, PATCHES),
    "patch_embed, autocast": Case(ops.patch_embed, reference.patch_embed, PATCHES, autocast=True),
}  # fmt: skip


def penalty(grads: list[Tensor]) -> Tensor:
    return torch.stack([g.float().square().sum() for g in grads]).sum()


def wants(case: Case, tensors: dict[str, Tensor]) -> set[str]:
    """Return by which of ``tensors`` PyTorch's own second derivative is not 0."""
    with sdpa_kernel(SDPBackend.MATH):
        loss = penalty(case.gradients(case.plain, tensors, create_graph=True))
    if not loss.requires_grad:
        return set()
    leaves = {n: t for n, t in tensors.items() if t.requires_grad}
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {n for n, g in zip(leaves, grads, strict=True) if g is not None and g.norm() > 1e-6}


@pytest.mark.parametrize("name", CASES)
def test_raises_by_each_tensor_of_each_op(name, device, computed_by_pytorch):
    case = CASES[name]
    tensors = case.tensors(device)
    hangs_on = wants(case, tensors)
    assert len(hangs_on) > len(tensors) // 2 or "patch_embed" in name
    torch.manual_seed(0)
    expected = case.gradients(case.function, tensors)
    torch.manual_seed(0)
    grads = case.gradients(case.function, tensors, create_graph=True)
    for got, want in zip(grads, expected, strict=True):
        assert torch.equal(got, want)
    loss = penalty(grads)
    for by in hangs_on:
        with pytest.raises(NotImplementedError, match=AGAIN):
            torch.autograd.grad(loss, tensors[by], allow_unused=True, retain_graph=True)
    grads[0].mul_(2.0)  # they are the caller's


@pytest.mark.parametrize("name", CASES)
def test_raises_where_one_tensor_alone_is_trained(name, device, computed_by_pytorch):
    case = CASES[name]
    for alone in case.shapes:
        tensors = case.tensors(device, {alone})
        if not wants(case, tensors):
            continue
        loss = penalty(case.gradients(case.function, tensors, create_graph=True))
        with pytest.raises(NotImplementedError, match=AGAIN):
            loss.backward()


def test_upstream_gradients_of_the_caller_stay_as_they_are(device):
    x, upstream = torch.randn(3, 8, device=device, requires_grad=True), torch.randn(3, 8, device=device)
    weight = torch.randn(8, 8, device=device)
    y = ops.linear(torch.randn(3, 8, device=device), weight.requires_grad_(), residual=x)
    (dx,) = torch.autograd.grad(y, x, upstream, create_graph=True)
    assert torch.equal(dx, upstream)
    assert not upstream.requires_grad


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        from vitkernels.layers import LayerNorm, Mlp

        self.norm, self.mlp = LayerNorm(16), Mlp(16, 32)

    def forward(self, x):
        return self.mlp(self.norm(x))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_graph_of_gradients_that_nobody_differentiates(checkpointed, device):
    model, x = Layers().to(device), torch.randn(2, 5, 16, device=device)

    def gradients(**more):
        model.zero_grad()
        y = checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)
        y.mean().backward(**more)
        return [p.grad.clone() for p in model.parameters()]

    for got, want in zip(gradients(create_graph=True), gradients(), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    model.zero_grad()  # PyTorch's own circle of a parameter and its gradient's graph


def test_raises_under_activation_checkpointing(device):
    model, x = Layers().to(device), torch.randn(2, 5, 16, device=device, requires_grad=True)
    (dx,) = torch.autograd.grad(checkpoint(model, x, use_reentrant=False).mean(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=AGAIN):
        dx.square().sum().backward()


def test_raises_when_compiled(device):
    model, x = Layers().to(device), torch.randn(2, 5, 16, device=device, requires_grad=True)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    (dx,) = torch.autograd.grad(compiled(x).mean(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):  # PyTorch's own, of every graph that it differentiates
        dx.square().sum().backward()
