"""rms_norm and add_rms_norm against fp64; what they share with LayerNorm is tested there as well."""

import pytest
import torch
import torch.nn.functional as F
from drawn import drawn

from vitkernels import ops, reference
from vitkernels.ops import _registry
from vitkernels.testing import check_op

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
USUAL = (4, 7, 20)  # samples, tokens and channels, where they are not the subject
C = USUAL[-1]


def make(*shape, dtype=torch.float32, device="cpu", grad=True):
    # The offset tells RMSNorm from LayerNorm: rows with a mean.
    return (torch.randn(*shape, dtype=torch.float64) + 0.5).to(device, dtype).requires_grad_(grad)


def test_reference():
    x, residual, weight, gamma = (torch.randn(*s, dtype=torch.float64) for s in ((3, 2, 5), (3, 2, 5), (5,), (5,)))
    path = torch.tensor([0.0, 2.0, 0.5], dtype=torch.float64)

    def formula(x):
        return x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt() * weight

    torch.testing.assert_close(reference.rms_norm(x, weight, 0.1), formula(x))
    total = residual + path[:, None, None] * gamma * x
    got = reference.add_rms_norm(x, residual, weight, 0.1, layer_scale=gamma, drop_path_scale=path)
    torch.testing.assert_close(got, (formula(total), total))


SHAPES = [(2, 197, 192), (1, 50, 387), (48,), (5, 6)]


@pytest.mark.parametrize(("shape", "dtype"), drawn(len(SHAPES), SHAPES, DTYPES), ids=str)
def test_rms_norm(shape, dtype, device):
    tensors = {"x": make(*shape, dtype=dtype, device=device), "weight": make(shape[-1], dtype=dtype, device=device)}
    check_op(ops.rms_norm, reference.rms_norm, tensors)


def test_a_larger_eps(device):
    tensors = {"x": make(*USUAL, device=device), "weight": make(C, device=device)}
    check_op(ops.rms_norm, reference.rms_norm, tensors, options={"eps": 0.3})


@pytest.mark.parametrize(
    ("shape", "scaled", "dtype"), drawn(4, [(2, 197, 96), (3, 50, 387), (4, 1, 72)], [True, False], DTYPES), ids=str
)
def test_add_rms_norm(shape, scaled, dtype, device):
    C = shape[-1]
    tensors = {name: make(*shape, dtype=dtype, device=device) for name in ("x", "residual")}
    tensors["weight"] = make(C, dtype=dtype, device=device)
    if scaled:
        tensors["layer_scale"] = make(C, dtype=dtype, device=device)
        tensors["drop_path_scale"] = torch.tensor([0.0, 1.25] * 2, dtype=dtype, device=device)[: shape[0]]
    check_op(ops.add_rms_norm, reference.add_rms_norm, tensors)


def test_one_channel(device):
    """dx cancels down to eps · rstd² of its terms: what is left is measured against these."""
    x, weight = make(50, 1, device=device), make(1, device=device)
    check_op(ops.rms_norm, reference.rms_norm, {"x": x.detach(), "weight": weight})
    upstream = torch.randn(50, 1, device=device)
    (dx,) = torch.autograd.grad(ops.rms_norm(x, weight), x, upstream)
    wide = x.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(reference.rms_norm(wide, weight.detach().double()), wide, upstream.double())
    terms = (upstream * weight / x).abs()
    assert ((dx - truth).abs() <= 8 * torch.finfo(torch.float32).eps * terms).all()


def test_the_weight_may_be_missing(device):
    x = {"x": make(*USUAL, device=device)}
    check_op(ops.rms_norm, reference.rms_norm, x)
    check_op(ops.add_rms_norm, reference.add_rms_norm, x | {"residual": make(*USUAL, device=device)})


@pytest.mark.parametrize("C", [8192 + 24, 2 * 8192 + 1])
def test_rows_wider_than_a_program(C, device):
    tensors = {name: make(3, C, device=device) for name in ("x", "residual")}
    tensors |= {name: make(C, device=device) for name in ("weight", "layer_scale")}
    tensors["drop_path_scale"] = torch.tensor([0.0, 2.0, 1.0], device=device)
    check_op(ops.add_rms_norm, reference.add_rms_norm, tensors)


LAYOUTS = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "last dim strided": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda x: x[:1].expand_as(x),
    "sliced": lambda x: torch.cat([x[..., :4], x], -1)[..., 4:],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_inputs_and_upstream(layout, device):
    strided = LAYOUTS[layout]
    tensors = {name: strided(make(*USUAL, device=device, grad=False)).requires_grad_() for name in ("x", "residual")}
    tensors |= {name: make(C, device=device) for name in ("weight", "layer_scale")}
    check_op(ops.add_rms_norm, reference.add_rms_norm, tensors, upstream=lambda y: strided(torch.randn_like(y)))
    check_op(ops.add_rms_norm, reference.add_rms_norm, tensors, upstream=lambda y: y.new_ones(()).expand_as(y))


@pytest.mark.parametrize("shape", [(0, 197, 64), (2, 0, 64)], ids=str)
def test_empty_batch_gives_zero_gradients(shape, device):
    x, weight = make(*shape, device=device), make(64, device=device)
    ops.rms_norm(x, weight).sum().backward()
    assert x.grad.shape == shape
    assert torch.equal(weight.grad, torch.zeros(64, device=device))


@pytest.mark.parametrize("frozen", ["residual", "weight"])
def test_frozen_inputs(frozen, device):
    tensors = {name: make(*USUAL, device=device) for name in ("x", "residual")}
    tensors |= {name: make(C, device=device) for name in ("weight", "layer_scale")}
    tensors[frozen].requires_grad_(False)
    check_op(ops.add_rms_norm, reference.add_rms_norm, tensors)


def test_gradcheck(device):
    tensors = [make(2, 1, 7, dtype=torch.float64, device=device) for _ in range(2)]
    tensors += [make(7, dtype=torch.float64, device=device) for _ in range(2)]
    scale = torch.tensor([0.5, 2.0], dtype=torch.float64, device=device)

    def add(x, residual, weight, gamma):
        return ops.add_rms_norm(x, residual, weight, layer_scale=gamma, drop_path_scale=scale)

    assert torch.autograd.gradcheck(add, tensors, eps=1e-6)
    assert torch.autograd.gradcheck(ops.rms_norm, [tensors[0], tensors[2]], eps=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
def test_eps_none_is_pytorchs(dtype, device, computed_by_pytorch):
    x = (1e-3 * make(6, 50, device=device, grad=False)).to(dtype)
    torch.testing.assert_close(ops.rms_norm(x, eps=None), F.rms_norm(x, (50,)))
    torch.testing.assert_close(ops.add_rms_norm(x, x, eps=None)[0], F.rms_norm(x + x, (50,)))
    assert not torch.allclose(ops.rms_norm(x), F.rms_norm(x, (50,)), rtol=0.02)


def test_weight_in_fp32(device):
    dtype = torch.bfloat16
    x, weight = make(*USUAL, dtype=dtype, device=device), make(C, device=device)
    y = ops.rms_norm(x, weight)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype, weight.grad.dtype) == (dtype, dtype, torch.float32)
    torch.testing.assert_close(y, reference.rms_norm(x.double(), weight.double()).to(dtype))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_row_stays_in_its_row(value, device):
    x = make(5, C, device=device, grad=False)
    x[2, 3] = value
    y = ops.rms_norm(x)
    assert torch.equal(y.isfinite(), F.rms_norm(x, (C,), eps=1e-6).isfinite())
    assert y[[0, 1, 3, 4]].isfinite().all() and not y[2].isfinite().all()


def test_reruns_agree_bit_for_bit(device):
    x, weight = make(200, C, device=device), make(C, device=device)
    runs = []
    for _ in range(3):
        y = ops.rms_norm(x, weight)
        runs.append([y, *torch.autograd.grad(y.square().sum(), (x, weight))])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def test_compiled_equals_eager(device, computed_by_pytorch):
    tensors = make(2, 9, 24, device=device), make(2, 9, 24, device=device), make(24, device=device)

    def run(function):
        y, total = function(*tensors)
        return [y, total, *torch.autograd.grad((y * y + total).sum(), tensors)]

    torch._dynamo.reset()
    compiled = torch.compile(ops.add_rms_norm, fullgraph=True, backend="aot_eager")
    for got, want in zip(run(compiled), run(ops.add_rms_norm), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_opcheck_and_agreement_with_pytorch(device):
    """The shared op's RMSNorm: as torch.library wants an op, and the same without kernels."""
    x, w, dy = (make(*shape, device=device, grad=False) for shape in (USUAL, (C,), USUAL))
    forward, backward = torch.ops.vitkernels.layer_norm_fwd.default, torch.ops.vitkernels.layer_norm_bwd.default
    arguments = (x, dy, w, None, w, None, 1e-6, torch.float32, True)
    _, r, mean, rstd = forward(*arguments)
    assert mean.numel() == 0
    needed = [True, True, True, False, True, True, True]
    calls = [
        (forward, "layer_norm_fwd", arguments),
        (backward, "layer_norm_bwd", (dy, x, r, x, w, w, None, mean, rstd, 1e-6, torch.float32, needed, True)),
    ]
    for op, name, arguments in calls:
        torch.library.opcheck(op, arguments)
        for got, want in zip(op(*arguments), _registry.OPS[name].reference(*arguments), strict=True):
            assert (got.shape, got.stride(), got.dtype) == (want.shape, want.stride(), want.dtype)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


X = torch.zeros(2, 3, 8)
BAD = {
    "integer": (lambda: ops.rms_norm(X.int()), TypeError, "rms_norm: x has dtype torch.int32"),
    "no tensor": (lambda: ops.rms_norm([1.0], eps=None), TypeError, "x is a list"),
    "scalar": (lambda: ops.rms_norm(torch.zeros(())), ValueError, r"shape \(\)"),
    "weight shape": (lambda: ops.rms_norm(X, torch.ones(7)), ValueError, r"weight has shape \(7,\); expected \(8,\)"),
    "weight dtype": (lambda: ops.rms_norm(X, torch.ones(8).half()), TypeError, "weight has dtype torch.float16"),
    "eps": (lambda: ops.rms_norm(X, eps=-1.0), ValueError, "eps is -1.0"),
    "residual shape": (lambda: ops.add_rms_norm(X, X[:1]), ValueError, r"add_rms_norm: residual has shape \(1, 3, 8\)"),
    "residual dtype": (lambda: ops.add_rms_norm(X, X.int(), eps=None), TypeError, "residual has dtype torch.int32"),
    "gamma shape": (lambda: ops.add_rms_norm(X, X, layer_scale=torch.ones(3)), ValueError, r"layer_scale has shape"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, no_launch):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


def test_double_backward_is_an_error(device):
    x = make(*USUAL, device=device)
    (dx,) = torch.autograd.grad(ops.rms_norm(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated again"):
        dx.sum().backward()
