"""Kernels that each break one rule of the contract, and one that breaks none."""

import torch
import triton
import triton.language as tl


@triton.jit
def good(x_ptr, y_ptr, stride, M, BLOCK: tl.constexpr):
    pid = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    for row in range(pid, M, tl.num_programs(0)):
        tl.store(y_ptr + row * stride + offs, tl.load(x_ptr + row * stride + offs))


@triton.jit
def spills(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs).to(tl.float32)
    tl.store(y_ptr + offs, x - tl.sum(x))


@triton.jit
def narrow_loop(x_ptr, y_ptr, stride, M, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK) * stride
    total = tl.load(x_ptr + offs).to(tl.float32)
    for i in range(1, M):
        total += tl.load(x_ptr + i + offs).to(tl.float32)
    tl.store(y_ptr + tl.arange(0, BLOCK), total)


@triton.jit
def atomic(x_ptr, y_ptr, BLOCK: tl.constexpr):
    tl.atomic_add(y_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, BLOCK)).to(tl.float32)))


@triton.jit
def product(x_ptr, y_ptr, ROWS: tl.constexpr, PRECISION: tl.constexpr):
    rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, 64)[None, :]
    x = tl.load(x_ptr + rows * 64 + columns)
    w = tl.load(x_ptr + tl.arange(0, 64)[:, None] * 64 + columns)
    tl.store(y_ptr + rows * 64 + columns, tl.dot(x, w, input_precision=PRECISION))


@triton.jit
def short_address(x_ptr, y_ptr, stride, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * stride + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs))


def launch(target: str) -> None:
    def new(n: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(n, dtype=dtype, device="cuda")

    x, y, single = new(1 << 20), new(1 << 20), new(1 << 20, torch.float32)
    good[(8,)](x, y, 1024, 64, BLOCK=1024)
    if target.startswith("sm"):
        spills[(1,)](x, y, BLOCK=4096, num_warps=1, maxnreg=64)
    else:
        spills[(1,)](x, y, BLOCK=1 << 13, num_warps=1, waves_per_eu=8)
    narrow_loop[(1,)](x, single, 1027, 64, BLOCK=1024)
    atomic[(8,)](x, single, BLOCK=1024)
    product[(1,)](x, single, ROWS=64, PRECISION="ieee")
    product[(1,)](x, single, ROWS=16, PRECISION="ieee")
    product[(1,)](x, single, ROWS=64, PRECISION="ieee", num_warps=2)  # a warpgroup has four
    product[(1,)](single, single, ROWS=64, PRECISION="tf32")
    short_address[(8,)](x, y, 1027, BLOCK=1024)
