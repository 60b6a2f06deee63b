"""cast: what PyTorch's ``to`` gives, for several tensors in one launch."""

import pytest
import torch

from vitkernels.ops._cast import MOST, _cast, cast

SHAPES = [(3,), (70, 130), (1,), (4096,), (4097,), (0,), (5, 5), (9000,)]


def draw(count, dtype, device):
    return [torch.randn(shape, device=device).to(dtype) for shape in SHAPES[:count]]


@pytest.mark.parametrize("count", [1, 2, MOST])
@pytest.mark.parametrize(
    ("dtype", "wanted"),
    [(torch.float32, torch.bfloat16), (torch.float32, torch.float16), (torch.bfloat16, torch.float32)],
    ids=str,
)
def test_as_pytorch_casts(dtype, wanted, count, device):
    tensors = draw(count, dtype, device)
    tensors[0] = torch.stack([tensors[0], tensors[0]], 1)[:, 0]  # strided
    for actual, given in zip(cast(wanted, *tensors), tensors, strict=True):
        assert actual.is_contiguous()
        assert torch.equal(actual, given.to(wanted))


def test_what_needs_no_cast_is_returned(device):
    tensors = draw(3, torch.float32, device)
    assert all(a is b for a, b in zip(cast(None, *tensors), tensors, strict=True))
    mixed = [None, tensors[0].bfloat16(), tensors[1]]
    nothing, same, other = cast(torch.bfloat16, *mixed)
    assert nothing is None and same is mixed[1] and torch.equal(other, tensors[1].bfloat16())


def test_opcheck(device):
    first, *others = draw(4, torch.float32, device)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(_cast, (first, others, torch.bfloat16), test_utils=tests)
