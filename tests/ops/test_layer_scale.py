"""LayerScale's backward by the folded weight, against formulas in fp64, and the sums over a launch's programs."""

import contextlib
import itertools

import pytest
import torch

from vitkernels.emulator.launch import emulating
from vitkernels.ops._layer_scale import layer_scale_bwd
from vitkernels.ops._registry import OPS
from vitkernels.ops._sums import sum_shares

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def arguments(N, K, dtype, device, bias=True):
    wide = torch.promote_types(dtype, torch.float32)
    dfolded, dy_sum = torch.randn(N, K, dtype=wide, device=device), torch.randn(N, dtype=wide, device=device)
    weight, gamma, b = (torch.randn(*shape, dtype=dtype, device=device) for shape in ((N, K), (N,), (N,)))
    return dfolded, weight, gamma, b if bias else None, dy_sum if bias else None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "K"), [(37, 50), (5, 1100)])
def test_gradients(N, K, dtype, device):
    given = arguments(N, K, dtype, device)
    dfolded, weight, gamma, bias, dy_sum = (t.double() for t in given)
    expected = gamma[:, None] * dfolded, gamma * dy_sum, (weight * dfolded).sum(1) + bias * dy_sum
    for out_dtype in {None, torch.promote_types(dtype, torch.float32)}:
        grads = layer_scale_bwd(*given, [True] * 3, out_dtype)
        assert [g.dtype for g in grads] == [out_dtype or dtype] * 2 + [dtype]
        for grad, truth in zip(grads, expected, strict=True):
            eps = torch.finfo(grad.dtype).eps
            torch.testing.assert_close(grad.double(), truth, rtol=eps, atol=1e-14 if dtype == DTYPES[-1] else 2e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_only_some_are_needed(bias, device):
    given = arguments(6, 40, torch.float32, device, bias)
    whole = layer_scale_bwd(*given, [True, bias, True])
    for needed in itertools.product([True, False], [True, False] if bias else [False], [True, False]):
        for grad, expected, n in zip(layer_scale_bwd(*given, list(needed)), whole, needed, strict=True):
            torch.testing.assert_close(grad, expected if n else expected.new_empty(0), rtol=0, atol=0)
        torch.library.opcheck(layer_scale_bwd, (*given, list(needed)), test_utils=("test_schema", "test_faketensor"))


def test_reference_agrees_with_the_kernel(device):
    given = arguments(6, 40, torch.bfloat16, device)
    reference = OPS["layer_scale_bwd"].reference(*given, [True] * 3)
    for grad, expected in zip(layer_scale_bwd(*given, [True] * 3), reference, strict=True):
        torch.testing.assert_close(grad, expected, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("programs", [0, 1, 64, 130])
@pytest.mark.parametrize("dtypes", [DTYPES[:1], [*DTYPES[:3], torch.float32, torch.bfloat16]], ids=len)
def test_sums_over_programs(dtypes, programs, device):
    shares = torch.randn(len(dtypes), programs, 70, device=device)
    needed = [True, False, *[True] * (len(dtypes) - 1)]
    with emulating() if device.type == "cpu" else contextlib.nullcontext():
        first, nothing, *others = sum_shares(shares, needed, [dtypes[0], torch.float16, *dtypes[1:]])
    assert nothing.shape == (0,) and nothing.dtype == torch.float16
    for total, share, dtype in zip([first, *others], shares, dtypes, strict=True):
        assert total.dtype == dtype
        torch.testing.assert_close(total.double(), share.double().sum(0), rtol=torch.finfo(dtype).eps, atol=2e-5)
