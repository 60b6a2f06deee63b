"""fp32 products as a GPU sums them without tensor cores, for a yardstick on a machine without a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


@contextlib.contextmanager
def summed_in_a_chain() -> Iterator[None]:
    """Compute PyTorch's fp32 products within as a GPU does without tensor cores: by one chain of FMAs an element.

    CUTLASS documents its SIMT kernels so ("Efficient GEMM in CUDA": each thread accumulates its elements over the whole
    of k), Triton's compile to it; how cuBLAS sums is not published. A CPU's BLAS adds several chains, a lane of its
    vectors each, in blocks of k: over 5,632 terms it errs a fifth as much, and no kernel that sums in one chain is as
    exact as twice that.
    """
    with sdpa_kernel(SDPBackend.MATH), _Chains():
        yield


class _Chains(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        product = _PRODUCTS.get(func)
        if product is None or args[-1].dtype != torch.float32 or kwargs:
            return func(*args, **(kwargs or {}))
        return product(*args)


def _chain(a: Tensor, b: Tensor, start: Tensor | None = None) -> Tensor:
    """``start + a @ b`` of (..., M, K) and (..., K, N)."""
    shape = (*a.shape[:-1], b.shape[-1])
    total = torch.zeros(shape) if start is None else start.expand(shape).clone()
    a, b = a.double(), b.double()  # exact: the product of two fp32 numbers fits in fp64
    for k in range(a.shape[-1]):
        total = torch.addcmul(total.double(), a[..., k, None], b[..., k, None, :]).float()
    return total


_PRODUCTS = {
    aten.mm.default: _chain,
    aten.bmm.default: _chain,
    aten.addmm.default: lambda bias, a, b: _chain(a, b) + bias,
    aten.baddbmm.default: lambda start, a, b: _chain(a, b) + start,
}
