"""Cast the weights of a layer or a block to the dtype of autocast in one launch; PyTorch takes one for each tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from vitkernels.ops._registry import register
from vitkernels.ops._triton import tl, triton
from vitkernels.runtime import cdiv

MOST = 8  # tensors of a launch
BLOCK = 4096


@triton.jit
def _cast_kernel(
    x0_ptr, x1_ptr, x2_ptr, x3_ptr, x4_ptr, x5_ptr, x6_ptr, x7_ptr,  # contiguous
    y0_ptr, y1_ptr, y2_ptr, y3_ptr, y4_ptr, y5_ptr, y6_ptr, y7_ptr,
    n0, n1, n2, n3, n4, n5, n6, n7,  # elements of each, 0 where there is none
    BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    end0 = tl.cdiv(n0, BLOCK)
    end1 = end0 + tl.cdiv(n1, BLOCK)
    end2 = end1 + tl.cdiv(n2, BLOCK)
    end3 = end2 + tl.cdiv(n3, BLOCK)
    end4 = end3 + tl.cdiv(n4, BLOCK)
    end5 = end4 + tl.cdiv(n5, BLOCK)
    end6 = end5 + tl.cdiv(n6, BLOCK)
    if block < end0:
        _cast_block(x0_ptr, y0_ptr, block, n0, BLOCK)
    elif block < end1:
        _cast_block(x1_ptr, y1_ptr, block - end0, n1, BLOCK)
    elif block < end2:
        _cast_block(x2_ptr, y2_ptr, block - end1, n2, BLOCK)
    elif block < end3:
        _cast_block(x3_ptr, y3_ptr, block - end2, n3, BLOCK)
    elif block < end4:
        _cast_block(x4_ptr, y4_ptr, block - end3, n4, BLOCK)
    elif block < end5:
        _cast_block(x5_ptr, y5_ptr, block - end4, n5, BLOCK)
    elif block < end6:
        _cast_block(x6_ptr, y6_ptr, block - end5, n6, BLOCK)
    else:
        _cast_block(x7_ptr, y7_ptr, block - end6, n7, BLOCK)


@triton.jit
def _cast_block(x_ptr, y_ptr, block, n, BLOCK: tl.constexpr):
    first = block.to(tl.int64) * BLOCK
    offs = tl.arange(0, BLOCK)
    mask = offs < n - first
    x = tl.load(x_ptr + first + offs, mask=mask)
    tl.store(y_ptr + first + offs, x.to(y_ptr.dtype.element_ty), mask=mask)


def _launch(first: Tensor, others: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    tensors = [t.contiguous() for t in (first, *others)]
    outputs = _fake(first, others, dtype)
    sizes = [t.numel() for t in tensors]
    blocks = sum(cdiv(size, BLOCK) for size in sizes)
    if blocks:
        each = {f"x{i}_ptr": tensors[i] if i < len(tensors) else first for i in range(MOST)}
        each |= {f"y{i}_ptr": outputs[i] if i < len(tensors) else first for i in range(MOST)}
        each |= {f"n{i}": sizes[i] if i < len(tensors) else 0 for i in range(MOST)}
        _cast_kernel[(blocks,)](**each, BLOCK=BLOCK, num_warps=4)
    return outputs


def _fake(first: Tensor, others: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [torch.empty(t.shape, dtype=dtype, device=t.device) for t in (first, *others)]


_cast = register(
    "cast(Tensor first, Tensor[] others, ScalarType dtype) -> Tensor[]",
    launcher=_launch,
    reference=lambda first, others, dtype: [t.to(dtype, copy=True).contiguous() for t in (first, *others)],
    fake=_fake,
    work="pass",
)


def cast(dtype: torch.dtype | None, *tensors: Tensor | None) -> list[Tensor | None]:
    """Return the tensors in ``dtype``, at most eight; those of that dtype, and all if it is None, as they are.

    Autograd does not pass through: an ``autograd.Function`` casts its own inputs, and gives gradients of their dtypes.
    """
    casts = [] if dtype is None else [t for t in tensors if t is not None and t.dtype is not dtype]
    if not casts:
        return list(tensors)
    done = iter(_cast(casts[0], casts[1:], dtype))
    return [next(done) if t is not None and t.dtype is not dtype else t for t in tensors]
