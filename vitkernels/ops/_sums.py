"""Sums over programs: a launch leaves one row of partial sums a program, and one more launch adds them all.

PyTorch would take a sum and a cast for each parameter of the launch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vitkernels.ops import _tile
from vitkernels.ops._triton import tl, triton
from vitkernels.runtime import cdiv

BLOCK_P, BLOCK_C = 64, 32  # rows and columns that a program loads at once


@triton.jit(do_not_specialize=["programs"])
def _sum_shares_kernel(
    shares_ptr,  # (sums, programs, C), contiguous
    sum0_ptr,  # (C,): like the next four
    sum1_ptr,
    sum2_ptr,
    sum3_ptr,
    sum4_ptr,
    programs,
    C,
    ACC: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    blocks_c = tl.cdiv(C, BLOCK_C)
    which = tl.program_id(0) // blocks_c
    offs_p = tl.arange(0, BLOCK_P)
    offs_c = tl.program_id(0) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    rows = shares_ptr + (which.to(tl.int64) * programs + offs_p)[:, None] * C + offs_c[None, :]
    total = tl.zeros((BLOCK_P, BLOCK_C), ACC)
    for first in range(0, programs, BLOCK_P):
        total += tl.load(rows, mask=(offs_p < programs - first)[:, None] & mask_c[None, :], other=0.0)
        rows += BLOCK_P * C
    total = tl.sum(total, axis=0)
    if which == 0:
        tl.store(sum0_ptr + offs_c, total.to(sum0_ptr.dtype.element_ty), mask=mask_c)
    elif which == 1:
        tl.store(sum1_ptr + offs_c, total.to(sum1_ptr.dtype.element_ty), mask=mask_c)
    elif which == 2:
        tl.store(sum2_ptr + offs_c, total.to(sum2_ptr.dtype.element_ty), mask=mask_c)
    elif which == 3:
        tl.store(sum3_ptr + offs_c, total.to(sum3_ptr.dtype.element_ty), mask=mask_c)
    else:
        tl.store(sum4_ptr + offs_c, total.to(sum4_ptr.dtype.element_ty), mask=mask_c)


def new_shares(
    needed: Sequence[bool], programs: int, C: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, list[Tensor]]:
    """Allocate the partial sums of a launch, ``programs`` rows of C for each sum that is needed.

    Returns them as :func:`sum_shares` takes them, and for each of ``needed`` its (programs, C): a kernel argument,
    which for a sum that is not needed is never written.
    """
    shares = torch.empty((sum(needed), programs, C), dtype=dtype, device=device)
    parts = iter(shares.unbind())
    return shares, [next(parts) if n else shares for n in needed]


def sum_shares(shares: Tensor, needed: Sequence[bool], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """Sum ``shares`` (sums, programs, C) of :func:`new_shares` over the programs, of which there may be none.

    Returns for each of ``needed``, at most five, a sum (C,) or an empty tensor, of the dtype given.
    """
    C = shares.shape[2]
    sums = [torch.empty(C if n else 0, dtype=d, device=shares.device) for n, d in zip(needed, dtypes, strict=True)]
    sum_into(shares, [each for each, n in zip(sums, needed, strict=True) if n])
    return sums


def sum_into(shares: Tensor, outputs: Sequence[Tensor]) -> None:
    """Write ``shares[i].sum(0)`` into ``outputs[i]``, contiguous, at most five; shares are (sums, programs, C)."""
    count, programs, C = shares.shape
    if count:
        _sum_shares_kernel[(cdiv(C, BLOCK_C) * count,)](
            shares_ptr=shares,
            **{f"sum{i}_ptr": outputs[min(i, count - 1)] for i in range(5)},
            programs=programs,
            C=C,
            ACC=_tile.accumulator(shares.dtype),
            BLOCK_P=BLOCK_P,
            BLOCK_C=BLOCK_C,
            num_warps=4,
        )
