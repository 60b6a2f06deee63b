"""linear against fp64: every epilogue, dtypes, layouts, gradients, bad input."""

import contextlib
import dataclasses
import itertools

import pytest
import torch
from drawn import drawn

from vitkernels import ops, reference
from vitkernels.emulator.launch import emulating
from vitkernels.ops._layer_scale import fold_layer_scale
from vitkernels.ops._product_config import choose_config
from vitkernels.runtime import DeviceFacts
from vitkernels.testing import check_op

HALVES = [torch.float16, torch.bfloat16]
ACTIVATIONS = [None, *reference.ACTIVATIONS]
USUAL = (2, 50, 36, 72)  # images, tokens, and features before and behind, of fp16 and bf16 where they are no subject
SMALL = (2, 7, 20, 12)  # of fp32


def make(*shape, dtype=torch.float32, device="cpu", grad=True, scale=1.0):
    return (scale * torch.randn(*shape, dtype=torch.float64)).to(device, dtype).requires_grad_(grad)


def layer(B, N, K, F, *, dtype=torch.float32, device="cpu", epilogue=True):
    tensors = {
        "x": make(B, N, K, dtype=dtype, device=device),
        "weight": make(F, K, dtype=dtype, device=device, scale=K**-0.5),
        "bias": make(F, dtype=dtype, device=device),
    }
    if epilogue:
        tensors["residual"] = make(B, N, F, dtype=dtype, device=device)
        tensors["layer_scale"] = make(F, dtype=dtype, device=device)
    return tensors


@pytest.mark.parametrize(
    ("activation", "epilogue", "dtype"),
    [*drawn(5, ACTIVATIONS, [True, False], HALVES), *((name, True, torch.float32) for name in ACTIVATIONS)],
    ids=str,
)
def test_epilogues(activation, epilogue, dtype, device):
    shape = SMALL if dtype == torch.float32 else USUAL
    tensors = layer(*shape, dtype=dtype, device=device, epilogue=epilogue)
    check_op(ops.linear, reference.linear, tensors, options={"activation": activation})


@pytest.mark.parametrize(
    ("shape", "activation", "dtype"),
    [
        ((1, 1, 20, 4), "gelu", torch.bfloat16),
        ((2, 197, 100, 72), "gelu", torch.float32),
        ((1, 257, 300, 130), None, torch.float16),
        ((3, 1, 1, 1), "gelu", torch.float32),
        ((3, 1, 1, 1), None, torch.float32),
    ],
    ids=str,
)
def test_shapes(shape, activation, dtype, device):
    tensors = layer(*shape, dtype=dtype, device=device)
    check_op(ops.linear, reference.linear, tensors, options={"activation": activation})


GIVEN = [c for n in range(4) for c in itertools.combinations(("bias", "residual", "layer_scale"), n)]


@pytest.mark.parametrize(("given", "activation"), drawn(8, GIVEN, [None, "gelu"]), ids=str)
def test_optional_inputs(given, activation, device):
    tensors = {name: t if name in (*given, "x", "weight") else None for name, t in layer(*SMALL, device=device).items()}
    check_op(ops.linear, reference.linear, tensors, options={"activation": activation})


LAYOUTS = {
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "strided": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda x: x[:1].expand_as(x),
    "sliced": lambda x: torch.cat([x, x], -1)[..., x.shape[-1] :],
}


@pytest.mark.parametrize(
    ("layout", "activation"), [("transposed", "gelu"), ("strided", None), ("expanded", "gelu"), ("sliced", None)]
)
def test_layouts_of_inputs_and_upstream(layout, activation, device):
    strided = LAYOUTS[layout]
    tensors = {
        name: strided(t.detach()).requires_grad_() if t.ndim > 1 else t
        for name, t in layer(*SMALL, device=device).items()
    }
    options = {"activation": activation}
    upstreams = {"expanded": lambda y: y.new_ones(()).expand_as(y)}
    upstream = upstreams.get(layout, lambda y: strided(torch.randn_like(y)))
    check_op(ops.linear, reference.linear, tensors, options=options, upstream=upstream)


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("lead", [(0, 5), (2, 0)], ids=str)
def test_empty_batch_gives_zero_gradients(lead, activation, device):
    tensors = layer(*lead, 20, 12, device=device)
    y = ops.linear(**tensors, activation=activation)
    y.sum().backward()
    assert y.shape == (*lead, 12)
    for name in ("weight", "bias", "layer_scale"):
        assert torch.equal(tensors[name].grad, torch.zeros_like(tensors[name])), name


@pytest.mark.parametrize("frozen", ["x", "weight", "bias", "residual", "layer_scale"])
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_frozen_inputs(frozen, activation, device):
    tensors = layer(*SMALL, device=device)
    tensors[frozen].requires_grad_(False)
    check_op(ops.linear, reference.linear, tensors, options={"activation": activation})


def test_gelu_is_off_by_roundings_alone(device):
    """In fp32 GELU takes no erf: y and dy/dz at every scale, in both tails and where they are not finite."""
    z = torch.cat([torch.linspace(-14, 14, 8001), torch.randn(200) * 1e-4, torch.tensor([-1e30, -0.0, 1e30])]).double()
    x = z.float().to(device)[:, None].requires_grad_()
    y = ops.linear(x, x.new_ones(1, 1), activation="gelu")
    (dx,) = torch.autograd.grad(y.sum(), x)
    z = x.detach().double().cpu()[:, 0].requires_grad_()
    cdf = 0.5 * torch.erfc(-z * 0.5**0.5)  # 1 + erf would cancel in fp64, too
    want = (z * cdf).detach()
    (dwant,) = torch.autograd.grad((z * cdf).sum(), z)
    error, derror = (y[:, 0].double().cpu() - want).abs(), (dx[:, 0].double().cpu() - dwant).abs()
    assert (error <= 2**-21 * want.abs().clamp_min(0.25)).all(), f"{error.max():.3g}"
    assert (derror <= 2**-21).all(), f"{derror.max():.3g}"
    strange = torch.tensor([float("inf"), float("-inf"), float("nan")], device=device)[:, None]
    y = ops.linear(strange, strange.new_ones(1, 1), activation="gelu")
    assert y[0] == float("inf") and y[1:].isnan().all()  # as 0.5 z (1 + erf) has it


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation, device):
    tensors = layer(1, 3, 5, 4, dtype=torch.float64, device=device)

    def call(x, w, b, residual, gamma):
        return ops.linear(x, w, b, activation=activation, residual=residual, layer_scale=gamma)

    assert torch.autograd.gradcheck(call, list(tensors.values()), eps=1e-6)


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_gradcheck_of_the_product_alone(activation, device):
    x, w = (make(*shape, dtype=torch.float64, device=device) for shape in ((1, 3, 5), (4, 5)))
    assert torch.autograd.gradcheck(lambda x, w: ops.linear(x, w, activation=activation), [x, w], eps=1e-6)


def test_residual_in_fp32_keeps_fp32(device):
    tensors = layer(*USUAL, dtype=torch.bfloat16, device=device)
    tensors["residual"] = make(2, 50, 72, device=device)
    verdicts = check_op(ops.linear, reference.linear, tensors)
    assert ops.linear(**tensors).dtype == torch.float32
    assert {v.name for v in verdicts} == {"output 0", "dx", "dweight", "dbias", "dresidual", "dlayer_scale"}


def test_layer_scale_of_1e_5_survives_fp16(device):
    tensors = layer(*USUAL, dtype=torch.float16, device=device)
    tensors["layer_scale"] = torch.full((72,), 1e-5, device=device, requires_grad=True)
    # A loss scale, without which PyTorch's own gradients underflow.
    check_op(ops.linear, reference.linear, tensors, upstream=lambda y: 1024 * torch.randn_like(y))
    with emulating() if device.type == "cpu" else contextlib.nullcontext():
        folded, alpha = fold_layer_scale(tensors["weight"], tensors["layer_scale"])
    expected = tensors["weight"].double() * tensors["layer_scale"].double()[:, None]
    torch.testing.assert_close(alpha.double() * folded.double(), expected, rtol=2**-10, atol=0)


def test_a_bad_row_stays_in_its_row(device):
    tensors = layer(*SMALL, device=device)
    with torch.no_grad():
        tensors["x"][0, 2, 3] = float("nan")
    y = ops.linear(**tensors, activation="gelu")
    assert y[0, 2].isnan().all() and y[0, [0, 1, 3, 4, 5, 6]].isfinite().all() and y[1].isfinite().all()


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_reruns_are_bit_equal(activation, device):
    def run():
        tensors = {name: t.detach().requires_grad_() for name, t in inputs.items()}
        y = ops.linear(**tensors, activation=activation)
        return [y, *torch.autograd.grad(y.square().sum(), list(tensors.values()))]

    inputs = layer(2, 197, 100, 72, device=device)
    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


X, W = torch.zeros(2, 3, 8), torch.zeros(4, 8)
BAD = {
    "integer": (lambda: ops.linear(X.int(), W), TypeError, "x has dtype torch.int32"),
    "scalar": (lambda: ops.linear(torch.zeros(()), W), ValueError, "at least one feature"),
    "no features": (lambda: ops.linear(torch.zeros(2, 0), torch.zeros(4, 0)), ValueError, "at least one feature"),
    "width": (lambda: ops.linear(X, torch.zeros(4, 7)), ValueError, r"weight has shape \(4, 7\); expected .*8"),
    "weight rank": (lambda: ops.linear(X, torch.zeros(8)), ValueError, r"weight has shape \(8,\)"),
    "weight dtype": (lambda: ops.linear(X, W.half()), TypeError, "weight has dtype torch.float16, x has torch.float32"),
    "weight device": (lambda: ops.linear(X, W.to("meta")), ValueError, "weight is on meta, x on cpu"),
    "bias shape": (lambda: ops.linear(X, W, torch.zeros(8)), ValueError, r"bias has shape \(8,\); expected \(4,\)"),
    "activation": (lambda: ops.linear(X, W, activation="relu"), ValueError, "'relu'; expected one of gelu"),
    "residual": (lambda: ops.linear(X, W, residual=X), ValueError, r"residual has shape .*expected \(2, 3, 4\)"),
    "layer_scale": (lambda: ops.linear(X, W, layer_scale=torch.zeros(8)), ValueError, "layer_scale has shape"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, no_launch):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


def test_double_backward_and_transforms_are_errors(device):
    x, w = make(3, 8, device=device), make(4, 8, device=device)
    (dx,) = torch.autograd.grad(ops.linear(x, w).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated again"):
        dx.sum().backward()
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.jvp(lambda x: ops.linear(x, w.detach()), (x.detach(),), (x.detach(),))


def test_config_says_who_multiplies():
    h200 = DeviceFacts("h200", "sm_90", 132, 227 << 10)
    bf16 = torch.bfloat16
    assert choose_config(50_432, 2304, 768, bf16, kind="plain", facts=h200).provider == "torch"
    fc1 = choose_config(50_432, 3072, 768, bf16, kind="epilogue", facts=h200)
    assert (fc1.provider, fc1.block_m, fc1.block_n, fc1.num_stages, fc1.parts) == ("triton", 128, 128, 3, 4)
    assert choose_config(197, 768, 768, bf16, kind="epilogue", facts=h200).block_m == 64
    dact = {
        arch: choose_config(50_432, 3072, 768, bf16, kind="dact", facts=dataclasses.replace(h200, arch=arch))
        for arch in ("sm_80", "sm_90", "sm_103")
    }
    assert {arch: (c.block_n, c.parts) for arch, c in dact.items()} == {
        "sm_80": (64, 2),
        "sm_90": (128, 4),
        "sm_103": (128, 4),
    }
    for arch, shared in (("sm_120", 99 << 10), ("gfx942", 64 << 10)):
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            c = choose_config(50_432, 3072, 768, dtype, kind="epilogue", facts=DeviceFacts(arch, arch, 100, shared))
            assert c.num_stages * (c.block_m + c.block_n) * c.block_k * dtype.itemsize <= shared
