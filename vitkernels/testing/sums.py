"""fp32 matrix products summed as a GPU does without tensor cores: the yardstick on a machine without a GPU."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vitkernels import runtime
from vitkernels._intercept import Intercept

aten = torch.ops.aten


def sums_alike(*tensors: Tensor) -> bool:
    """Tell whether :func:`summed_alike` has an effect for ``tensors``."""
    return runtime.emulated_arch() is not None and all(t.is_cpu and t.dtype == torch.float32 for t in tensors)


def summed_alike(*tensors: Tensor, order: int = 0) -> contextlib.AbstractContextManager:
    """Make PyTorch sum fp32 products in the GPU's order, if all ``tensors`` are fp32 on a CPU that emulates a GPU.

    ``order`` as for :func:`summed_in_a_chain`.
    """
    return summed_in_a_chain(order) if sums_alike(*tensors) else contextlib.nullcontext()


@contextlib.contextmanager
def summed_in_a_chain(order: int = 0) -> Iterator[None]:
    """Compute PyTorch's fp32 products in this block as a GPU without tensor cores: one chain of FMAs per element.

    CUTLASS documents this for its SIMT kernels ("Efficient GEMM in CUDA": each thread accumulates its elements over the
    whole of k), and Triton's kernels compile to it; how cuBLAS sums is not published. A CPU's BLAS adds several chains,
    one per vector lane, in blocks of k. Over 5,632 terms its error is a fifth as large, so a kernel that sums in one
    chain cannot stay within twice that.

    Args:
        order: The order of the terms: 0 for their order in memory, else a seed that draws the order.
    """
    with sdpa_kernel(SDPBackend.MATH), Intercept(_Chains(order).run):
        yield


@dataclasses.dataclass(frozen=True)
class _Chains:
    """Computes fp32 matrix products, and fp32 convolutions that cut an image into patches, in one chain."""

    order: int

    def run(self, op, args, kwargs):
        tensors = [a for a in args if isinstance(a, Tensor)]
        if not kwargs and tensors and all(t.dtype == torch.float32 for t in tensors):
            if op in (aten.mm.default, aten.bmm.default):
                return self._chain(*args)
            if op in (aten.addmm.default, aten.baddbmm.default):
                return self._chain(*args[1:]) + args[0]
            if op is aten.convolution.default and _cuts_patches(*args[1:2], *args[3:9]):
                return self._embed(*args[:3])
            if op is aten.convolution_backward.default and _cuts_patches(*args[2:3], *args[4:10]):
                return self._embed_backward(*args[:3], args[10])
        return NotImplemented

    def _chain(self, a: Tensor, b: Tensor) -> Tensor:
        """Return ``a @ b`` for (..., M, K) and (..., K, N)."""
        if self.order:
            terms = torch.randperm(b.shape[-2], generator=torch.Generator().manual_seed(self.order))
            a, b = a[..., terms], b[..., terms, :]
        total = torch.zeros(*a.shape[:-1], b.shape[-1])
        a, b = a.double(), b.double()  # exact: the product of two fp32 numbers fits in fp64
        for k in range(a.shape[-1]):
            total = torch.addcmul(total.double(), a[..., k, None], b[..., k, None, :]).float()
        return total

    def _embed(self, images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        patches = _patches(images, weight)
        out = self._chain(patches.flatten(0, 2).flatten(1), weight.flatten(1).t())
        out = out if bias is None else out + bias
        return out.view(*patches.shape[:3], len(weight)).permute(0, 3, 1, 2)

    def _embed_backward(self, dout: Tensor, images: Tensor, weight: Tensor, wanted: list[bool]) -> tuple:
        patches = _patches(images, weight)
        rows = dout.permute(0, 2, 3, 1).flatten(0, 2)
        dimages = dweight = dbias = None
        if wanted[0]:
            dimages = torch.zeros_like(images)
            _patches(dimages, weight).copy_(self._chain(rows, weight.flatten(1)).view(patches.shape))
        if wanted[1]:
            dweight = self._chain(rows.t(), patches.flatten(0, 2).flatten(1)).view_as(weight)
        if wanted[2]:
            dbias = rows.sum(0)
        return dimages, dweight, dbias


def _cuts_patches(weight, stride, padding, dilation, transposed, output_padding, groups) -> bool:
    return (
        weight.ndim == 4 and [*stride] == [*weight.shape[2:]] and not any(padding) and not transposed and groups == 1
        and all(d == 1 for d in dilation)
    )  # fmt: skip


def _patches(images: Tensor, weight: Tensor) -> Tensor:
    """View images (B, channels, Y, X) as patches (B, rows, columns, channels, height, width)."""
    height, width = weight.shape[2:]
    return images.unfold(2, height, height).unfold(3, width, width).permute(0, 2, 3, 1, 4, 5)
