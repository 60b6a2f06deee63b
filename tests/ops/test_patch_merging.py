"""Patch merging: against PyTorch by the error rule, and the reference against timm's and torchvision's."""

import pytest
import torch
from torch import nn

from vitkernels import ops, reference
from vitkernels.testing import check_op


def make(Y=6, X=10, C=16, F=24, B=2, dtype=torch.float32, norm_last=False, bias=False, device="cpu"):
    width = F if norm_last else 4 * C
    shapes = {"x": (B, Y, X, C), "weight": (F, 4 * C), "norm_weight": (width,), "norm_bias": (width,)}
    shapes |= {"bias": (F,)} if bias else {}
    scales = {"weight": (4 * C) ** -0.5}
    return {
        name: (torch.randn(shape) * scales.get(name, 1.0)).to(device, dtype).requires_grad_()
        for name, shape in shapes.items()
    }


def compare(tensors, **options):
    check_op(
        lambda **given: ops.patch_merging(**given, **options),
        lambda **given: reference.patch_merging(**given, **options),
        tensors,
    )


SIZES = {"even": (6, 10), "odd rows": (5, 8), "odd columns": (4, 7), "both odd": (7, 5), "one patch": (1, 1)}


@pytest.mark.parametrize("norm_last", [False, True], ids=["Swin", "V2"])
@pytest.mark.parametrize("size", SIZES)
def test_outputs_and_gradients(size, norm_last, device):
    compare(make(*SIZES[size], norm_last=norm_last, bias=size == "even", device=device), norm_last=norm_last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("norm_last", [False, True], ids=["Swin", "V2"])
def test_dtypes(norm_last, dtype, device):
    compare(make(9, 14, C=12, B=3, dtype=dtype, norm_last=norm_last, device=device), norm_last=norm_last)


def test_rows_wider_than_a_tile(device):
    compare(make(3, 2, C=2056, F=16, B=1, device=device))


@pytest.mark.parametrize("missing", ["norm_weight", "norm_bias"])
def test_without(missing, device):
    tensors = make(device=device)
    del tensors[missing]
    compare(tensors, eps=1e-3)


def test_strided_images(device):
    tensors = make(device=device)
    tensors["x"] = tensors["x"].detach().permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1).requires_grad_()
    compare(tensors)


def test_variance_near_eps(device):
    tensors = make(4, 4, device=device)
    tensors["x"] = (tensors["x"].detach() * 1e-3).requires_grad_()
    compare(tensors)


@pytest.mark.parametrize("norm_last", [False, True], ids=["Swin", "V2"])
def test_gradcheck(norm_last, device):
    tensors = make(3, 4, C=3, F=4, B=1, dtype=torch.float64, norm_last=norm_last, device=device)
    names, values = zip(*tensors.items(), strict=True)

    def merge(*given):
        return ops.patch_merging(**dict(zip(names, given, strict=True)), norm_last=norm_last)

    torch.autograd.gradcheck(merge, values, fast_mode=True)


@pytest.mark.parametrize("norm_last", [False, True], ids=["Swin", "V2"])
def test_no_images(norm_last, device):
    tensors = make(5, 4, B=0, norm_last=norm_last, device=device)
    out = ops.patch_merging(**tensors, norm_last=norm_last)
    grads = torch.autograd.grad(out.sum(), list(tensors.values()))
    assert out.shape == (0, 3, 2, 24)
    assert all(g.shape == t.shape and not g.any() for g, t in zip(grads, tensors.values(), strict=True))


def test_a_nan_stays_in_its_patch(device):
    tensors = {name: t.detach() for name, t in make(4, 6, device=device).items()}
    tensors["x"][0, 1, 2, 3] = float("nan")
    out = ops.patch_merging(**tensors).isnan().any(-1)
    assert out.nonzero().tolist() == [[0, 0, 1]]


def test_frozen_parameters(device):
    """Only the image's gradient is asked for, then only that of the norm's weight."""
    tensors = make(device=device)
    for name in ("x", "norm_weight"):
        given = {n: t.detach().requires_grad_(n == name) for n, t in tensors.items()}
        compare(given)


def originals():
    from timm.models import swin_transformer, swin_transformer_v2
    from torchvision.models import swin_transformer as torchvision

    yield swin_transformer.PatchMerging, False
    yield swin_transformer_v2.PatchMerging, True
    yield torchvision.PatchMerging, False
    yield torchvision.PatchMergingV2, True


@pytest.mark.parametrize("size", [(4, 6), (5, 7)])
def test_reference_is_what_libraries_compute(size):
    for cls, norm_last in originals():
        merging = cls(8)
        nn.init.normal_(merging.norm.weight)
        x = torch.randn(2, *size, 8)
        norm = {"norm_weight": merging.norm.weight, "norm_bias": merging.norm.bias, "eps": merging.norm.eps}
        out = reference.patch_merging(x, merging.reduction.weight, **norm, norm_last=norm_last)
        torch.testing.assert_close(out, merging(x))


X, WEIGHT = torch.zeros(1, 4, 6, 8), torch.zeros(16, 32)
WRONG = {
    "no image": (lambda: ops.patch_merging(X[0], WEIGHT), ValueError, "expected \\(B, Y, X, C\\)"),
    "no rows": (lambda: ops.patch_merging(X[:, :0], WEIGHT), ValueError, "only B may be 0"),
    "weight": (lambda: ops.patch_merging(X, WEIGHT[:, 1:]), ValueError, "expected \\(out features, 32\\)"),
    "no features": (lambda: ops.patch_merging(X, WEIGHT[:0]), ValueError, "weight has shape \\(0, 32\\); expected"),
    "bias": (lambda: ops.patch_merging(X, WEIGHT, X.new_zeros(8)), ValueError, "bias has shape \\(8,\\)"),
    "norm": (
        lambda: ops.patch_merging(X, WEIGHT, norm_weight=X.new_zeros(16)), ValueError,
        "norm_weight has shape \\(16,\\); expected \\(32,\\), the channels of four patches"
    ),
    "last norm": (
        lambda: ops.patch_merging(X, WEIGHT, norm_bias=X.new_zeros(32), norm_last=True), ValueError,
        "norm_bias has shape \\(32,\\); expected \\(16,\\), the weight's rows"
    ),
    "eps": (lambda: ops.patch_merging(X, WEIGHT, eps=-1.0), ValueError, "eps is -1.0"),
    "dtype": (lambda: ops.patch_merging(X.long(), WEIGHT), TypeError, "x has dtype torch.int64"),
    "weight's dtype": (lambda: ops.patch_merging(X, WEIGHT.double()), TypeError, "weight has dtype torch.float64"),
}  # fmt: skip


@pytest.mark.usefixtures("no_launch")
@pytest.mark.parametrize("what", WRONG)
def test_errors(what):
    call, error, message = WRONG[what]
    with pytest.raises(error, match=message):
        call()
