"""The error rule itself: what it must let pass, and what it must not."""

import pytest
import torch

from vitkernels.testing import check, judge_op

NAN, INF = float("nan"), float("inf")


@pytest.fixture
def truth():
    return torch.randn(64, 96, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_rounding_passes_and_a_tenth_of_a_percent_fails(dtype, truth):
    yardstick = truth.to(dtype)
    assert check("t", truth.to(dtype), yardstick, truth).passed
    assert not check("t", (truth * 1.001).to(dtype), yardstick, truth).passed


def test_a_gain_among_errors_that_leave_none(truth):
    """Random errors of 1.3 times PyTorch's may have a gain by luck; two tenths of a percent on top are none."""
    rounding = truth.bfloat16().double() - truth
    for seed in range(20):
        signs = torch.randn(64, 96, generator=torch.Generator().manual_seed(seed)).sign()
        noisy = truth + rounding.abs() * 1.3 * signs
        as_bf16 = [t.to(torch.bfloat16) for t in (noisy, noisy + 0.002 * truth, truth)]
        assert check("t", as_bf16[0], as_bf16[2], truth).passed, seed
        assert not check("t", as_bf16[1], as_bf16[2], truth).passed, seed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_wrong_row_fails(dtype, truth):
    wrong = truth.clone()
    wrong[17] = wrong[18]
    assert not check("t", wrong.to(dtype), truth.to(dtype), truth).passed


def test_truncation_in_bf16_fails(truth):
    truncated = (truth.float().view(torch.int32) & -65536).view(torch.float32).bfloat16()
    assert not check("t", truncated, truth.bfloat16(), truth).passed


def test_shape_and_dtype_count(truth):
    assert "shape" in check("t", truth[:3].float(), truth.float(), truth).detail
    assert "dtype" in check("t", truth.half(), truth.float(), truth).detail


@pytest.mark.parametrize(
    ("got", "want", "passed"),
    [(NAN, NAN, True), (INF, INF, True), (-INF, INF, False), (INF, NAN, False), (NAN, INF, False), (1.0, NAN, False),
     (NAN, 1.0, False)],
)  # fmt: skip
def test_nan_and_infinities_go_where_they_belong(got, want, passed):
    actual, expected = torch.tensor([got, 2.0]), torch.tensor([want, 2.0])
    assert check("t", actual, expected, expected.double()).passed is passed


@pytest.mark.parametrize(("error", "passed"), [(0.0, True), (1e-12, False)])
def test_in_fp64_another_order_of_the_sum_passes_and_a_wrong_digit_fails(error, passed):
    """The truth is PyTorch's own product, whose error must be known from elsewhere."""
    tensors = {n: torch.randn(40, 300, dtype=torch.float64, requires_grad=True) for n in ("x", "weight")}

    def backwards(x, weight):
        total = torch.zeros(40, 40, dtype=torch.float64)
        for k in reversed(range(300)):
            total = total + x[:, k, None] * weight[None, :, k]
        return total * (1 + error)

    verdicts = judge_op(backwards, lambda x, weight: x @ weight.T, tensors)
    assert [v.passed for v in verdicts] == [passed] * 3
    assert (verdicts[0].ratio < 100) is passed  # a few where sums are rounded alone


class OneToken(torch.autograd.Function):
    """Attention to one key: p · (dp − delta) is 0, and ``error`` what rounding leaves of it, a share of dp."""

    @staticmethod
    def forward(ctx, q, k, v, error):
        ctx.save_for_backward(q, k, v)
        ctx.error = error
        return v.clone()

    @staticmethod
    def backward(ctx, do):
        q, k, v = ctx.saved_tensors
        ds = ctx.error * (do * v).sum(-1, keepdim=True) * q.shape[-1] ** -0.5
        return ds * k, ds * q, do, None


@pytest.mark.parametrize(
    ("error", "passed", "size", "dtype"),
    [
        (0.25, True, 0.1, torch.float32),
        (0.25, True, 1.0, torch.bfloat16),
        (0.25, True, 10.0, torch.float64),
        (64.0, False, 0.1, torch.bfloat16),
        (64.0, False, 1.0, torch.float64),
        (64.0, False, 10.0, torch.float32),
        ("wrong", False, 0.1, torch.float64),
        ("wrong", False, 1.0, torch.float32),
        ("wrong", False, 10.0, torch.bfloat16),
    ],
    ids=str,
)
def test_what_is_left_where_terms_cancel(error, passed, size, dtype):
    """The truth is 0, and PyTorch may get it: how much of a rounding is right hangs on what cancels."""
    tensors = {n: (size * torch.randn(2, 3, 1, 64)).to(dtype).requires_grad_() for n in "qkv"}
    error = 1.0 if error == "wrong" else error * torch.finfo(dtype).eps

    def plain(q, k, v):
        weights = torch.softmax(q @ k.transpose(-1, -2) * 0.125, -1)
        return weights @ v

    verdicts = judge_op(lambda q, k, v: OneToken.apply(q, k, v, error), plain, tensors)
    assert [v.passed for v in verdicts] == [True, passed, passed, True]
