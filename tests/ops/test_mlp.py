"""mlp against fp64: activations, dtypes, layouts, gradients, bad input."""

import dataclasses
import functools

import pytest
import torch
from drawn import drawn

from vitkernels import ops, reference
from vitkernels.ops import _product
from vitkernels.ops._product_config import choose_config
from vitkernels.testing import check_op

HALVES = [torch.float16, torch.bfloat16]
ACTIVATIONS = [None, *reference.ACTIVATIONS]
USUAL = (2, 50, 36, 72)  # images, tokens, channels and hidden features of fp16 and bf16, where they are no subject
SMALL = (2, 7, 20, 36)  # of fp32


def make(*shape, dtype=torch.float32, device="cpu", scale=1.0):
    return (scale * torch.randn(*shape, dtype=torch.float64)).to(device, dtype).requires_grad_()


def layers(B, N, C, F, out=None, *, dtype=torch.float32, device="cpu", epilogue=True):
    out = out or C
    tensors = {
        "x": make(B, N, C, dtype=dtype, device=device),
        "w1": make(F, C, dtype=dtype, device=device, scale=C**-0.5),
        "b1": make(F, dtype=dtype, device=device),
        "w2": make(out, F, dtype=dtype, device=device, scale=F**-0.5),
        "b2": make(out, dtype=dtype, device=device),
    }
    if epilogue:
        tensors["residual"] = make(B, N, out, dtype=dtype, device=device)
        tensors["layer_scale"] = make(out, dtype=dtype, device=device)
    return tensors


@pytest.mark.parametrize(
    ("activation", "epilogue", "recompute", "dtype"),
    drawn(5, ACTIVATIONS, [True, False], [True, False], HALVES),
    ids=str,
)
def test_activations(activation, epilogue, recompute, dtype, device):
    tensors = layers(*USUAL, dtype=dtype, device=device, epilogue=epilogue)
    mlp = functools.partial(ops.mlp, recompute=recompute)
    check_op(mlp, reference.mlp, tensors, options={"activation": activation})


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 1, 20, 30, 12), torch.float32),
        ((2, 197, 48, 192), torch.bfloat16),
        ((2, 7, 20, 2730), torch.float32),
    ],
    ids=str,
)
def test_shapes(shape, dtype, device):
    check_op(ops.mlp, reference.mlp, layers(*shape, dtype=dtype, device=device))


def test_epilogues_in_shares_of_columns(device, monkeypatch):
    """Four, as of tiles of 128 columns; the tiles elsewhere here are taken whole or in two."""

    def choose(*args, **kwargs):
        return dataclasses.replace(choose_config(*args, **kwargs), parts=4)

    monkeypatch.setattr(_product, "choose_config", choose)
    check_op(ops.mlp, reference.mlp, layers(*USUAL, dtype=torch.bfloat16, device=device))


@pytest.mark.parametrize("missing", [["b1", "b2", "residual"], ["b2", "layer_scale"]], ids=str)
def test_optional_inputs(missing, device):
    tensors = layers(*SMALL, device=device)
    check_op(ops.mlp, reference.mlp, {name: None if name in missing else t for name, t in tensors.items()})


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("missing", [[], ["b2", "layer_scale"], ["residual", "layer_scale"]], ids=str)
def test_drop_path(missing, recompute, device):
    tensors = {name: None if name in missing else t for name, t in layers(*USUAL, device=device).items()}
    tensors["drop_path_scale"] = torch.tensor([0.0, 1.25], device=device)
    check_op(functools.partial(ops.mlp, recompute=recompute), reference.mlp, tensors)


@pytest.mark.parametrize("trained", ["w2", "b2", "layer_scale"])
def test_drop_path_where_only_the_last_layer_is_trained(trained, device):
    tensors = layers(*SMALL, device=device)
    for name, t in tensors.items():
        t.requires_grad_(name == trained)
    tensors["drop_path_scale"] = torch.tensor([0.0, 1.25], device=device)
    check_op(functools.partial(ops.mlp, recompute=True), reference.mlp, tensors)


@pytest.mark.parametrize(
    "frozen",
    [["x"], ["w1", "b1"], ["x", "w1", "b1"], ["w2", "b2"], ["layer_scale"], ["x", "w1", "b1", "w2", "layer_scale"]],
    ids=str,
)
def test_frozen_inputs(frozen, device):
    tensors = layers(*SMALL, device=device)
    for name in frozen:
        tensors[name].requires_grad_(False)
    check_op(ops.mlp, reference.mlp, tensors)


LAYOUTS = {
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "expanded": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_inputs_and_upstream(layout, device):
    strided = LAYOUTS[layout]
    tensors = {
        name: strided(t.detach()).requires_grad_() if t.ndim > 1 else t
        for name, t in layers(*SMALL, device=device).items()
    }
    upstreams = {"expanded": lambda y: y.new_ones(()).expand_as(y)}
    check_op(ops.mlp, reference.mlp, tensors, upstream=upstreams.get(layout, lambda y: strided(torch.randn_like(y))))


def test_empty_batch_gives_zero_gradients(device):
    tensors = layers(0, 5, 20, 36, device=device)
    ops.mlp(**tensors).sum().backward()
    for name in ("w1", "b1", "w2", "b2", "layer_scale"):
        assert torch.equal(tensors[name].grad, torch.zeros_like(tensors[name])), name


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_gradcheck(activation, device):
    tensors = layers(1, 3, 4, 5, dtype=torch.float64, device=device)

    def call(x, w1, b1, w2, b2, residual, gamma):
        return ops.mlp(x, w1, b1, w2, b2, activation=activation, residual=residual, layer_scale=gamma)

    assert torch.autograd.gradcheck(call, list(tensors.values()), eps=1e-6)


def test_layer_scale_of_1e_5(device):
    tensors = layers(*USUAL, dtype=torch.float16, device=device)
    tensors["layer_scale"] = torch.full((36,), 1e-5, device=device, requires_grad=True)
    check_op(ops.mlp, reference.mlp, tensors, upstream=lambda y: 1024 * torch.randn_like(y))


def test_recompute_keeps_half(device):
    tensors = layers(*SMALL, device=device)
    saved, results = {}, {}
    for recompute in (False, True):
        kept = saved[recompute] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            y = ops.mlp(**tensors, recompute=recompute)
        results[recompute] = [y, *torch.autograd.grad(y.square().sum(), list(tensors.values()))]
    hidden = 2 * 7 * 36
    assert (saved[False].count(hidden), saved[True].count(hidden)) == (2, 1)
    for kept, recomputed in zip(results[False], results[True], strict=True):
        torch.testing.assert_close(recomputed, kept, rtol=1e-6, atol=1e-6)


X, W1, W2 = torch.zeros(2, 3, 8), torch.zeros(16, 8), torch.zeros(8, 16)
BAD = {
    "integer": (lambda: ops.mlp(X.int(), W1, None, W2, None), TypeError, "x has dtype torch.int32"),
    "w1 width": (lambda: ops.mlp(X, W2, None, W1, None), ValueError, r"w1 has shape \(8, 16\); expected .*8\)"),
    "w2 width": (lambda: ops.mlp(X, W1, None, W1, None), ValueError, r"w2 has shape \(16, 8\); expected .*16\)"),
    "b1 shape": (lambda: ops.mlp(X, W1, torch.zeros(8), W2, None), ValueError, r"b1 has shape \(8,\)"),
    "b2 dtype": (lambda: ops.mlp(X, W1, None, W2, torch.zeros(8).half()), TypeError, "b2 has dtype torch.float16"),
    "w2 device": (lambda: ops.mlp(X, W1, None, W2.to("meta"), None), ValueError, "w2 is on meta, x on cpu"),
    "activation": (lambda: ops.mlp(X, W1, None, W2, None, activation="relu"), ValueError, "'relu'"),
    "drop path": (
        lambda: ops.mlp(X, W1, None, W2, None, drop_path_scale=torch.ones(3)),
        ValueError,
        r"drop_path_scale has shape \(3,\); expected \(2,\)",
    ),
    "drop path of one row": (
        lambda: ops.mlp(X[0, 0], W1, None, W2, None, drop_path_scale=torch.ones(1)),
        ValueError,
        r"x has shape \(8,\); drop_path_scale needs \(batch, ..., channels\)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, no_launch):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


def test_double_backward_is_an_error(device):
    tensors = layers(*SMALL, device=device)
    (dx,) = torch.autograd.grad(ops.mlp(**tensors).square().sum(), tensors["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated again"):
        dx.sum().backward()
