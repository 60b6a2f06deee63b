"""layer_norm and add_layer_norm against fp64: dtypes, shapes, layouts, gradients, bad input."""

import sys

import pytest
import torch
from drawn import drawn

from vitkernels import ops, reference
from vitkernels.ops._layer_norm.config import choose_backward_config
from vitkernels.ops._registry import OPS
from vitkernels.runtime import DeviceFacts
from vitkernels.testing import check_op

FILE = sys.modules["vitkernels.ops._layer_norm"]  # the package's attribute of that name is the function
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
USUAL = (4, 7, 20)  # samples, tokens and channels, where they are not the subject
C = USUAL[-1]


def make(*shape, dtype=torch.float32, device="cpu", grad=True):
    return torch.randn(*shape, dtype=torch.float64).to(device, dtype).requires_grad_(grad)


SHAPES = [(2, 197, 192), (1, 50, 387), (257, 100), (48,), (5, 1)]


@pytest.mark.parametrize(("shape", "dtype"), drawn(len(SHAPES), SHAPES, DTYPES), ids=str)
def test_layer_norm(shape, dtype, device):
    C = shape[-1]
    tensors = {"x": make(*shape, dtype=dtype, device=device)}
    tensors |= {"weight": make(C, dtype=dtype, device=device), "bias": make(C, dtype=dtype, device=device)}
    check_op(ops.layer_norm, reference.layer_norm, tensors)


@pytest.mark.parametrize(
    ("shape", "scaled", "dtype"), drawn(4, [(2, 197, 96), (3, 50, 387), (4, 1, 72)], [True, False], DTYPES), ids=str
)
def test_add_layer_norm(shape, scaled, dtype, device):
    C = shape[-1]
    tensors = {name: make(*shape, dtype=dtype, device=device) for name in ("x", "residual")}
    tensors |= {name: make(C, dtype=dtype, device=device) for name in ("weight", "bias")}
    if scaled:
        tensors["layer_scale"] = make(C, dtype=dtype, device=device)
        tensors["drop_path_scale"] = torch.tensor([0.0, 1.25] * 2, dtype=dtype, device=device)[: shape[0]]
    check_op(ops.add_layer_norm, reference.add_layer_norm, tensors)


@pytest.mark.parametrize(("given", "add"), [("weight", False), ("bias", False), ("", False), ("", True)])
def test_parameters_may_be_missing(given, add, device):
    tensors = {"x": make(*USUAL, device=device), "weight": None, "bias": None}
    if given:
        tensors[given] = make(C, device=device)
    if add:
        check_op(ops.add_layer_norm, reference.add_layer_norm, tensors | {"residual": make(*USUAL, device=device)})
    else:
        check_op(ops.layer_norm, reference.layer_norm, tensors)


@pytest.mark.parametrize("C", [8192 + 24, 2 * 8192 + 1])
def test_rows_wider_than_a_program(C, device):
    tensors = {name: make(3, C, device=device) for name in ("x", "residual")}
    tensors |= {name: make(C, device=device) for name in ("weight", "bias", "layer_scale")}
    tensors["drop_path_scale"] = torch.tensor([0.0, 2.0, 1.0], device=device)
    check_op(ops.add_layer_norm, reference.add_layer_norm, tensors)


LAYOUTS = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "last dim strided": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda x: x[:1].expand_as(x),
    "sliced": lambda x: torch.cat([x[..., :4], x], -1)[..., 4:],
    "misaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_inputs_and_upstream(layout, device):
    strided = LAYOUTS[layout]
    tensors = {name: strided(make(*USUAL, device=device, grad=False)) for name in ("x", "residual")}
    tensors |= {name: make(C, device=device) for name in ("weight", "bias", "layer_scale")}
    for name in ("x", "residual"):
        tensors[name].requires_grad_()
    check_op(ops.add_layer_norm, reference.add_layer_norm, tensors, upstream=lambda y: strided(torch.randn_like(y)))
    del tensors["residual"], tensors["layer_scale"]
    check_op(ops.layer_norm, reference.layer_norm, tensors, upstream=lambda y: strided(torch.randn_like(y)))


def test_stride_zero_upstream(device):
    x, w = make(*USUAL, device=device), make(C, device=device)
    ops.layer_norm(x, w).sum().backward()
    tensors = {"x": x.detach().requires_grad_(), "weight": w.detach().requires_grad_()}
    check_op(ops.layer_norm, reference.layer_norm, tensors, upstream=lambda y: y.new_ones(()).expand_as(y))
    assert x.grad.isfinite().all() and w.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 197, 64), (2, 0, 64)], ids=str)
def test_empty_batch_gives_zero_gradients(shape, device, computed_by_pytorch):
    tensors = {name: make(*shape, device=device) for name in ("x", "residual")}
    tensors |= {name: make(64, device=device) for name in ("weight", "bias", "layer_scale")}
    outputs = ops.add_layer_norm(**tensors)
    sum(o.sum() for o in outputs).backward()
    assert [o.shape for o in outputs] == [torch.Size(shape)] * 2
    for name in ("weight", "bias", "layer_scale"):
        assert torch.equal(tensors[name].grad, torch.zeros(64, device=device)), name


@pytest.mark.parametrize("frozen", ["x", "residual", "weight", "bias", "layer_scale"])
def test_frozen_inputs_cost_nothing(frozen, device, monkeypatch):
    tensors = {name: make(*USUAL, device=device) for name in ("x", "residual")}
    tensors |= {name: make(C, device=device) for name in ("weight", "bias", "layer_scale")}
    tensors[frozen].requires_grad_(False)
    check_op(ops.add_layer_norm, reference.add_layer_norm, tensors)
    flags = []
    backward = FILE.layer_norm_bwd
    monkeypatch.setattr(FILE, "layer_norm_bwd", lambda *a: flags.append(a[11]) or backward(*a))
    outputs = ops.add_layer_norm(**tensors)
    torch.autograd.backward(outputs, [torch.ones_like(o) for o in outputs])
    order = ["x", "residual", "weight", "bias", "layer_scale"]
    assert flags == [[*(name != frozen for name in order), False, False]]
    assert tensors[frozen].grad is None


def test_gradcheck(device):
    tensors = [make(2, 1, 7, dtype=torch.float64, device=device) for _ in range(2)]
    tensors += [make(7, dtype=torch.float64, device=device) for _ in range(3)]
    scale = torch.tensor([0.5, 2.0], dtype=torch.float64, device=device)

    def add(x, residual, w, b, gamma):
        return ops.add_layer_norm(x, residual, w, b, layer_scale=gamma, drop_path_scale=scale)

    assert torch.autograd.gradcheck(add, tensors, eps=1e-6)
    assert torch.autograd.gradcheck(lambda x, w, b: ops.layer_norm(x, w, b), [tensors[0], *tensors[2:4]], eps=1e-6)
    assert torch.autograd.gradcheck(lambda x, r: ops.add_layer_norm(x, r), tensors[:2], eps=1e-6)


def test_only_one_output_used(device):
    tensors = [make(2, 1, 7, dtype=torch.float64, device=device) for _ in range(2)]
    for i in (0, 1):
        assert torch.autograd.gradcheck(lambda x, r, i=i: ops.add_layer_norm(x, r)[i], tensors, eps=1e-6)


def test_mixed_dtypes(device):
    dtype = torch.bfloat16
    x = make(*USUAL, dtype=dtype, device=device)
    w, b = make(C, device=device), make(C, device=device)
    y = ops.layer_norm(x, w, b)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype, w.grad.dtype) == (dtype, dtype, torch.float32)
    residual = make(*USUAL, device=device)
    normed, total = ops.add_layer_norm(x, residual, w, b)
    torch.autograd.backward([normed, total], [torch.randn_like(normed), torch.randn_like(total)])
    assert (normed.dtype, total.dtype, residual.grad.dtype) == (torch.float32, torch.float32, torch.float32)
    torch.testing.assert_close(total, x.float() + residual, rtol=0, atol=0)


def test_constant_row_gives_the_bias_and_eps_zero_is_exact(device):
    x = torch.full((5, C), 7.0, device=device)
    b = torch.randn(C, device=device)
    torch.testing.assert_close(ops.layer_norm(x, None, b), b.expand(5, C), rtol=0, atol=0)
    x = make(5, C, device=device, grad=False)
    torch.testing.assert_close(ops.layer_norm(x, eps=0.0), torch.nn.functional.layer_norm(x, (C,), eps=0.0))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_row_stays_in_its_row(value, device):
    x = make(5, C, device=device, grad=False)
    x[2, 3] = value
    y = ops.layer_norm(x)
    assert y[2].isnan().all() and y[[0, 1, 3, 4]].isfinite().all()


def test_a_bad_row_reaches_the_gradients_of_the_parameters(device):
    x, weight, bias = make(5, C, device=device), make(C, device=device), make(C, device=device)
    with torch.no_grad():
        x[2, 3] = float("nan")
    y = ops.layer_norm(x, weight, bias)
    dweight, dbias = torch.autograd.grad(y, [weight, bias], torch.ones_like(y))
    assert dweight.isnan().all() and dbias.isfinite().all()


def test_eps_beside_a_small_variance(device):
    tensors = {"x": 1e-3 * make(5, C, device=device), "weight": make(C, device=device)}
    tensors["x"] = tensors["x"].detach().requires_grad_()
    check_op(ops.layer_norm, reference.layer_norm, tensors)


def test_fp16_near_its_limit(device):
    tensors = {"x": (torch.randn(4, 96, device=device) * 2e4).clamp(-6e4, 6e4).half()}
    check_op(ops.layer_norm, reference.layer_norm, tensors)


X = torch.zeros(2, 3, 8)
BAD = {
    "integer": (lambda: ops.layer_norm(X.int()), TypeError, "int32.*expected float16"),
    "complex": (lambda: ops.layer_norm(X.cfloat()), TypeError, "complex64"),
    "no tensor": (lambda: ops.layer_norm([1.0]), TypeError, "x is a list"),
    "scalar": (lambda: ops.layer_norm(torch.zeros(())), ValueError, r"shape \(\)"),
    "no features": (lambda: ops.layer_norm(torch.zeros(2, 0)), ValueError, "at least one channel"),
    "weight width": (lambda: ops.layer_norm(X, torch.ones(7)), ValueError, r"weight has shape \(7,\); expected \(8,\)"),
    "weight rank": (lambda: ops.layer_norm(X, torch.ones(1, 8)), ValueError, r"weight has shape \(1, 8\)"),
    "weight dtype": (lambda: ops.layer_norm(X, torch.ones(8).half()), TypeError, "weight has dtype torch.float16"),
    "weight device": (
        lambda: ops.layer_norm(X, torch.ones(8, device="meta")),
        ValueError,
        "weight is on meta, x on cpu",
    ),
    "eps negative": (lambda: ops.layer_norm(X, eps=-1e-6), ValueError, "eps is -1e-06"),
    "eps NaN": (lambda: ops.layer_norm(X, eps=float("nan")), ValueError, "eps is nan"),
    "sparse": (lambda: ops.layer_norm(X.to_sparse()), NotImplementedError, "sparse"),
    "residual shape": (lambda: ops.add_layer_norm(X, X[:1]), ValueError, r"residual has shape \(1, 3, 8\)"),
    "gamma width": (lambda: ops.add_layer_norm(X, X, layer_scale=torch.ones(3)), ValueError, "layer_scale"),
    "path shape": (lambda: ops.add_layer_norm(X, X, drop_path_scale=torch.ones(3)), ValueError, r"expected \(2,\)"),
    "path without a batch": (
        lambda: ops.add_layer_norm(X[0, 0], X[0, 0], drop_path_scale=torch.ones(8)),
        ValueError,
        r"x has shape \(8,\); drop_path_scale needs",
    ),
    "path gradient": (
        lambda: ops.add_layer_norm(X, X, drop_path_scale=torch.ones(2, requires_grad=True)),
        NotImplementedError,
        "detach it",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, no_launch):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


def test_double_backward_and_forward_mode_are_errors(device, computed_by_pytorch):
    x = make(3, 8, device=device)
    (dx,) = torch.autograd.grad(ops.layer_norm(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated again"):
        dx.sum().backward()
    x = x.detach()
    for transform in (
        lambda: torch.func.jvp(ops.layer_norm, (x,), (x,)),
        lambda: torch.func.grad(lambda x: ops.layer_norm(x).sum())(x),
        lambda: torch.vmap(ops.layer_norm)(x),
    ):
        with pytest.raises(RuntimeError, match="setup_context"):
            transform()
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        ops.layer_norm(torch.autograd.forward_ad.make_dual(x, x))


@pytest.mark.parametrize(("rms", "affine", "C"), [(True, True, 96), (False, False, 8192 + 32)])
def test_padded_rows(rms, affine, C, device):
    """The registered op with ``width``, as swiglu_mlp calls it: padding stays zero and counts for nothing."""
    width = C - 22
    x, dy, dr = (make(5, C, device=device, grad=False) for _ in range(3))
    x[:, width:] = dy[:, width:] = dr[:, width:] = 0.0
    weight, bias = (make(width, device=device, grad=False) if affine else None for _ in range(2))
    bias = None if rms else bias
    padded = FILE.layer_norm_fwd(x, None, weight, bias, None, None, 1e-6, x.dtype, rms, width)
    plain = FILE.layer_norm_fwd(x[:, :width], None, weight, bias, None, None, 1e-6, x.dtype, rms)
    assert not padded[0][:, width:].any()
    torch.testing.assert_close(padded[0][:, :width], plain[0])
    torch.testing.assert_close(padded[2:], plain[2:])
    needed = [False, True, affine, affine and not rms, False, True, True]
    options = (None, weight, None, None, *plain[2:], 1e-6, x.dtype, needed, rms)
    padded = FILE.layer_norm_bwd(dy, dr, x, *options, width)
    plain = FILE.layer_norm_bwd(dy[:, :width], dr[:, :width], x[:, :width], *options)
    for got, want in zip(padded, plain, strict=True):
        assert not got[..., width:].any()
        torch.testing.assert_close(got[..., :width], want, rtol=1e-5, atol=1e-5)
    for call, arguments in (
        ("layer_norm_fwd", (x, None, weight, bias, None, None, 1e-6, x.dtype, rms, width)),
        ("layer_norm_bwd", (dy, dr, x, *options, width)),
    ):
        got, want = getattr(FILE, call)(*arguments), OPS[call].reference(*arguments)
        for g, w in zip(got, want, strict=True):
            assert (g.shape, g.stride(), g.dtype) == (w.shape, w.stride(), w.dtype)
            torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4)


def test_config_caps_programs_and_covers_rows():
    h200 = DeviceFacts("h200", "sm_90", 132, 227 << 10)
    for C in (1, 48, 192, 768, 1024, 4096, 8192, 100_000):
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            config = choose_backward_config(50_432, C, h200, dtype)
            assert config.programs * config.num_warps <= 16 * h200.num_sms, "they all run at the same time"
            assert config.block_c >= min(C, 8192) and config.block_c & (config.block_c - 1) == 0
    assert choose_backward_config(1, 768, h200, torch.float32).programs == 1


def test_a_wider_residual_stays_wide(device):
    x, w = make(4, 9, 72, device=device), make(72, device=device)
    residual = make(4, 9, 72, dtype=torch.float64, device=device)
    normed, total = ops.add_layer_norm(x, residual, w.double())
    expected = reference.add_layer_norm(x.double(), residual, w.double())
    for got, want in zip((normed, total), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_scales_widen_as_torch_promotes(device):
    x, residual = (make(2, 9, 72, dtype=torch.bfloat16, device=device) for _ in range(2))
    path = torch.tensor([0.0, 1 / 0.9], device=device)
    expected = reference.add_layer_norm(x, residual, layer_scale=make(72, device=device), drop_path_scale=path)
    got = ops.add_layer_norm(x, residual, layer_scale=make(72, device=device), drop_path_scale=path)
    assert [t.dtype for t in got] == [t.dtype for t in expected] == [torch.float32] * 2
