"""FP8 ops: rows and products against fp64 of the same operands, shapes, values that are not finite, bad input."""

import pytest
import torch
from drawn import drawn

from vitkernels import ops, reference, use_backend
from vitkernels.ops import _fp8
from vitkernels.ops._fp8.product import choose_config
from vitkernels.runtime import DeviceFacts
from vitkernels.testing.compare import check

E4M3 = torch.float8_e4m3fn
ACTIVATIONS = [None, *reference.ACTIVATIONS]
LARGE = DeviceFacts("none", "sm_90", 132, 227 << 10)


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


def make(*shape, dtype=torch.bfloat16, device="cpu", scale=1.0):
    return (scale * torch.randn(*shape, dtype=torch.float64)).to(device, dtype)


def judge(name, got, yardstick, truth):
    verdict = check(name, got, yardstick, truth)
    assert verdict.passed, f"{name}: {verdict.detail}"


def exactly(operand, x):
    """Assert that ``operand`` is ``x``, fp32 or fp64, rounded to e4m3 by scales that differ from the exact by rounding.

    A value beside a tie may go either way.
    """
    values, scale = reference.quantize_fp8(x, None if operand.scale.shape[0] == 1 else 128)
    assert operand.values.dtype == E4M3 and operand.scale.dtype == torch.float32
    torch.testing.assert_close(operand.scale.double(), scale.double(), rtol=1e-5, atol=0)
    differ = operand.values.float() != values.float()
    assert differ.double().mean() < 2e-3
    step = (operand.values.float() - values.float()).abs() / values.float().abs().clamp_min(2**-6)
    assert step.max() <= 0.125  # one step of three bits of mantissa


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(2, 197, 192), (3, 40), (1, 1, 1), (5, 1152)], ids=str)
def test_quantized_rows_are_the_references(shape, dtype, device):
    x = make(*shape, dtype=dtype, device=device)
    got, want = ops.quantize_fp8(x), reference.quantize_fp8(x)
    assert torch.equal(got.values.float(), want[0].float())
    assert torch.equal(got.scale, want[1])
    assert got.scale.shape == (1, *shape[:-1])


def test_rows_that_are_not_finite(device):
    x = make(6, 48, device=device)
    x[0], x[1, 3], x[2, 5], x[3], x[4] = 0.0, float("nan"), float("inf"), 1e-38, 3e38
    operand = ops.quantize_fp8(x)
    # Of a row with a NaN no value is left, not even of those beside it.
    dequantized = reference.dequantize_fp8(*operand)
    assert dequantized[1:3].isnan().all() and dequantized[3:].isfinite().all()
    weight = ops.quantize_fp8(make(40, 48, device=device))
    y = ops.linear_fp8(operand, weight, dtype=torch.float32)
    assert y[0].eq(0).all() and y[3].abs().max() < 1e-30
    assert y[1].isnan().all() and y[2].isnan().all()
    others = torch.tensor([0, 3, 5])
    assert y[others.to(device)].isfinite().all()
    assert operand.values[4].float().isfinite().all() and operand.values[4].float().eq(448).all()
    want = reference.dequantize_fp8(*operand)[5]
    assert (want - x[5].float()).abs().max() <= x[5].float().abs().max() / 28 + 1e-6  # half a step of the top binade


def test_weight_row_with_nan_stays_in_its_channel(device):
    w = make(40, 48, device=device)
    w[7, 0] = float("nan")
    y = ops.linear_fp8(ops.quantize_fp8(make(5, 48, device=device)), ops.quantize_fp8(w))
    assert y[:, 7].isnan().all() and y[:, :7].isfinite().all() and y[:, 8:].isfinite().all()


@pytest.mark.parametrize(
    ("affine", "scaled", "dtype"),
    drawn(4, [True, False], [None, False, True], [torch.float16, torch.bfloat16, torch.float32]),
    ids=str,
)
def test_layer_norm(affine, scaled, dtype, device):
    C = 200
    x = make(2, 50, C, dtype=dtype, device=device, scale=2.0)
    weight, bias = (make(C, dtype=dtype, device=device) if affine else None for _ in range(2))
    if scaled is None:
        normed = ops.layer_norm_fp8(x, weight, bias, 1e-3)
        r = x
    else:
        residual, gamma = make(2, 50, C, dtype=dtype, device=device), make(C, dtype=dtype, device=device)
        gamma = gamma if scaled else None
        normed, r = ops.add_layer_norm_fp8(x, residual, weight, bias, 1e-3, layer_scale=gamma)
        wide_gamma = None if gamma is None else gamma.double()
        _, exact = reference.add_layer_norm(x.double(), residual.double(), layer_scale=wide_gamma)
        judge("sum", r, reference.add_layer_norm(x, residual, layer_scale=gamma)[1], exact)
    wide = [None if t is None else t.double() for t in (weight, bias)]
    exactly(normed, reference.layer_norm(r.double(), *wide, 1e-3))


@pytest.mark.parametrize(
    ("shape", "activation", "epilogue", "dtype"),
    [
        ((1, 197, 192, 208), None, False, torch.bfloat16),
        ((2, 197, 208, 192), "gelu", True, torch.float16),
        ((1, 257, 384, 130), "silu", True, torch.bfloat16),
        ((1, 1, 16, 1), None, True, torch.float32),
        ((3, 5, 144, 40), "gelu_tanh", False, torch.float32),
        ((1, 70, 48, 300), "quick_gelu", True, torch.bfloat16),
    ],
    ids=str,
)
def test_products(shape, activation, epilogue, dtype, device):
    B, N, K, F = shape
    x = ops.quantize_fp8(make(B, N, K, device=device))
    weight = ops.quantize_fp8(make(F, K, device=device, scale=K**-0.5))
    bias = make(F, dtype=dtype, device=device)
    more = {"activation": activation}
    if epilogue:
        more["residual"] = make(B, N, F, dtype=dtype, device=device)
        more["layer_scale"] = make(F, dtype=dtype, device=device)
    got = ops.linear_fp8(x, weight, bias, dtype=dtype, **more)
    assert got.dtype == dtype and got.shape == (B, N, F)
    wide = [(values, scale.double()) for values, scale in (x, weight)]
    truth = reference.linear_fp8(*wide, bias, **more)
    judge("linear_fp8", got, reference.linear_fp8(x, weight, bias, **more).to(dtype), truth)


@pytest.mark.parametrize("features", [384, 208, 96], ids=str)
def test_a_product_of_a_product(features, device):
    """What one product writes in e4m3, with a scale for each 128 columns, the next one reads."""
    x, w1 = ops.quantize_fp8(make(2, 70, 64, device=device)), ops.quantize_fp8(make(features, 64, device=device))
    hidden = ops.linear_fp8(x, w1, activation="gelu", dtype=E4M3)
    assert hidden.scale.shape == (-(-features // 128), 2, 70)
    exact = reference.linear_fp8(*((v, s.double()) for v, s in (x, w1)), activation="gelu")
    exactly(hidden, exact)
    w2 = ops.quantize_fp8(make(40, features, device=device))
    got = ops.linear_fp8(hidden, w2, dtype=torch.float32)
    truth = reference.linear_fp8(*((v, s.double()) for v, s in (hidden, w2)))
    judge("second", got, reference.linear_fp8(hidden, w2), truth)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is no other GPU")
def test_another_gpu(device):
    x, w = ops.quantize_fp8(make(70, 144)), ops.quantize_fp8(make(40, 144))
    with use_backend("emulated:sm_120"):
        again = ops.quantize_fp8(make(70, 144))
        got = ops.linear_fp8(x, w, dtype=torch.float32)
    assert again.values.dtype == E4M3
    truth = reference.linear_fp8(*((v, s.double()) for v, s in (x, w)))
    judge("sm_120", got, reference.linear_fp8(x, w), truth)
    with use_backend("emulated:sm_80"):
        with pytest.raises(NotImplementedError, match="quantize_fp8: sm_80 has no e4m3"):
            ops.quantize_fp8(make(70, 144))
        with pytest.raises(NotImplementedError, match="linear_fp8: sm_80 has no e4m3"):
            ops.linear_fp8(x, w)


def test_a_rerun_is_bit_equal_and_inputs_are_kept(device):
    x, w, b = make(197, 192, device=device), make(80, 192, device=device), make(80, device=device)
    kept = x.clone()
    results = []
    for _ in range(3):  # the third runs by plan
        results.append(ops.linear_fp8(ops.quantize_fp8(x), ops.quantize_fp8(w), b))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert torch.equal(x, kept)


def test_strides_and_empty_batches(device):
    wide = make(4, 40, 96, device=device)
    for x in (wide.transpose(0, 1), wide[..., 16:80]):
        got, want = ops.quantize_fp8(x), ops.quantize_fp8(x.contiguous())
        assert torch.equal(got.values.float(), want.values.float()) and torch.equal(got.scale, want.scale)
    empty = ops.quantize_fp8(make(0, 7, 32, device=device))
    assert empty.values.shape == (0, 7, 32) and empty.scale.shape == (1, 0, 7)
    w = ops.quantize_fp8(make(24, 32, device=device))
    assert ops.linear_fp8(empty, w).shape == (0, 7, 24)
    hidden = ops.linear_fp8(empty, w, dtype=E4M3)
    assert hidden.values.shape == (0, 7, 24) and hidden.scale.shape == (1, 0, 7)
    residual = make(4, 40, 24, device=device).transpose(0, 1)
    x = ops.quantize_fp8(make(40, 4, 32, device=device))
    assert torch.equal(ops.linear_fp8(x, w, residual=residual), ops.linear_fp8(x, w, residual=residual.contiguous()))


def operand(*shape, groups=1):
    return ops.Fp8(torch.zeros(shape, dtype=E4M3), torch.ones(groups, *shape[:-1]))


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: ops.quantize_fp8(torch.randn(3, 4, dtype=torch.float64)), TypeError, "float64"),
        (lambda: ops.quantize_fp8(torch.randn(3, 0)), ValueError, "at least one channel"),
        (lambda: ops.quantize_fp8(torch.randn(3, 8208)), NotImplementedError, "8208 channels"),
        (lambda: ops.layer_norm_fp8(torch.randn(3, 4), torch.randn(5)), ValueError, "weight has shape"),
        (lambda: ops.layer_norm_fp8(torch.randn(3, 4), eps=-1.0), ValueError, "eps"),
        (lambda: ops.add_layer_norm_fp8(torch.randn(3, 4), torch.randn(3, 5)), ValueError, "residual has shape"),
        (lambda: ops.add_layer_norm_fp8(torch.randn(3, 4), None), TypeError, "residual is a NoneType"),
        (lambda: ops.linear_fp8(torch.randn(3, 16), operand(4, 16)), TypeError, "x is a Tensor"),
        (lambda: ops.linear_fp8(operand(3, 16), operand(4, 32)), ValueError, "expected \\(out features, 16\\)"),
        (lambda: ops.linear_fp8(operand(3, 24), operand(4, 24)), NotImplementedError, "multiple of 16"),
        (lambda: ops.linear_fp8(operand(3, 16), operand(4, 16), torch.randn(5)), ValueError, "bias has shape"),
        (lambda: ops.linear_fp8(operand(3, 16), operand(4, 16), dtype=torch.float64), TypeError, "dtype is"),
        (lambda: ops.linear_fp8(operand(3, 16), operand(4, 16), activation="relu"), ValueError, "relu"),
        (lambda: ops.linear_fp8(operand(3, 16, groups=2), operand(4, 16)), ValueError, "scale has shape"),
        (lambda: ops.linear_fp8(operand(3, 256), operand(4, 256, groups=2)), ValueError, "1, out features"),
        (
            lambda: ops.linear_fp8(ops.Fp8(torch.randn(3, 16), torch.ones(1, 3)), operand(4, 16)),
            TypeError,
            "values has dtype torch.float32; expected float8_e4m3fn",
        ),
    ],
)
def test_bad_input_raises_before_any_launch(call, error, match, no_launch):
    with pytest.raises(error, match=match):
        call()


def test_gradients_raise_before_any_launch(no_launch):
    x, w = operand(3, 16), operand(4, 16)
    with torch.enable_grad():
        for call in (
            lambda: ops.quantize_fp8(torch.randn(3, 16, requires_grad=True)),
            lambda: ops.layer_norm_fp8(torch.randn(3, 16), torch.randn(16, requires_grad=True)),
            lambda: ops.linear_fp8(x, w, torch.randn(4, requires_grad=True)),
        ):
            with pytest.raises(NotImplementedError, match="FP8 is for inference"):
                call()


class Chain(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w1 = torch.nn.Parameter(make(48, 32), requires_grad=False)
        self.w2 = torch.nn.Parameter(make(32, 48), requires_grad=False)

    def forward(self, x):
        hidden = ops.layer_norm_fp8(x)
        hidden = ops.linear_fp8(hidden, ops.quantize_fp8(self.w1), activation="gelu", dtype=E4M3)
        return ops.linear_fp8(hidden, ops.quantize_fp8(self.w2), residual=x)


def test_compile_and_export(device):
    model, x = Chain().to(device), make(2, 7, 32, device=device)
    want = model(x)
    assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(x), want)
    exported = torch.export.export(model, (x,))
    assert torch.equal(exported.module()(x), want)


# test_schema compares tensors by a multiplication, which PyTorch does not have in e4m3.
CHECKS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def test_opcheck(device):
    x, bias = make(2, 7, 32, device=device), make(48, device=device)
    torch.library.opcheck(_fp8.rows_fp8, (x, x.clone(), bias[:32], None, bias[:32], 1e-6), test_utils=CHECKS)
    operands = (*ops.quantize_fp8(x), *ops.quantize_fp8(make(48, 32, device=device)))
    torch.library.opcheck(_fp8.product_fp8, (*operands, bias, None, None, "gelu", torch.bfloat16), test_utils=CHECKS)
    torch.library.opcheck(_fp8.product_fp8, (*operands, bias, None, None, "gelu", E4M3), test_utils=CHECKS)


def test_reference_and_launcher_give_alike_layouts(device):
    x = make(2, 7, 32, device=device)
    operands = (*ops.quantize_fp8(x), *ops.quantize_fp8(make(48, 32, device=device)))
    for dtype in (torch.bfloat16, E4M3):
        arguments = (*operands, None, None, None, None, dtype)
        for got, want in zip(_fp8.product_fp8(*arguments), _fp8.product.reference_product(*arguments), strict=True):
            assert (got.shape, got.stride(), got.dtype) == (want.shape, want.stride(), want.dtype)


def test_configurations_fit():
    for M, N, K in ((50432, 2304, 768), (197, 768, 3072), (1, 8, 16)):
        config = choose_config(M, N, K, LARGE)
        assert (config.block_m + 128) * 128 * config.num_stages <= LARGE.shared_memory
        assert config.block_m == (128 if M > 1000 else 64)
