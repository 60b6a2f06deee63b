"""Tensor parallelism: what a fused forward does with the weights that :func:`vitkernels.parallelize` sharded.

A column-parallel layer has some of the output features, a row-parallel one some of the input features (Megatron-LM,
arXiv 1909.08053). The weights are DTensors. Between the two layers a process computes on its own heads or hidden
features alone; in front of the first and behind the second all processes hold the same tokens. So a branch costs one
all-reduce forward and one backward. Its biases, LayerScale, DropPath and residual stay in the products' epilogues.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

MARK = "_vitkernels_sharded"  # the attribute of a Linear with shards, and of each module whose forward reads one


class Layers(NamedTuple):
    """The linear layers of an attention or an MLP that can be sharded.

    Attributes:
        columns: The names of the layers in front; those that a module lacks do not count.
        rows: The name of the layer behind.
        packed: How many layers are packed in the one in front, if it is one: 3 for queries, keys and values, 2 for gate
            and value. Each of them is sharded.
    """

    columns: tuple[str, ...]
    rows: str
    packed: int = 1


ATTENTION = Layers(("qkv",), "proj", packed=3)
MLP = Layers(("fc1",), "fc2")
GATED_MLP = Layers(("fc1_g", "fc1_x"), "fc2")
PACKED_GATED_MLP = Layers(("fc1",), "fc2", packed=2)


class Group(NamedTuple):
    """The processes that hold a layer's shards.

    Attributes:
        processes: The group of ``torch.distributed``.
        rank: This process's number in it.
        size: How many processes there are.
    """

    processes: dist.ProcessGroup
    rank: int
    size: int

    def enter(self, x: Tensor) -> Tensor:
        """Return x, which is the same on all processes; its gradient is summed over them, since each uses its own part.

        The sum is written over the gradient that comes in, so nothing else may read that.
        """
        return _Enter.apply(x, self.processes)

    def sum(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return the sum of x over the processes, written over x; the gradient of x is that of the sum.

        ``residual`` is in the first process's x already. The other processes get its gradient here.
        """
        passed = residual is not None and self.rank > 0
        return _Sum.apply(x, residual if passed else None, self.processes)

    def share(self, bias: Tensor | None) -> Tensor | None:
        """Return this process's summand of ``bias``: all of it in the first process, else zeros.

        The gradient passes unchanged, because it is the whole gradient on every process.
        """
        return None if bias is None else _Share.apply(bias, self.rank == 0)

    def own_heads(self, x: Tensor, dim: int = -3) -> Tensor:
        """Return this process's heads of x, such as a mask (B, H, N, N); all of x if ``dim`` is 1 or missing."""
        if x.ndim < -dim or x.shape[dim] == 1:
            # Its gradient, too, is a sum over all heads; that of the narrowed is no other tensor's, as enter() asks.
            return self.enter(x).narrow(-1, 0, x.shape[-1]) if x.requires_grad else x
        heads = x.shape[dim] // self.size
        return self.enter(x).narrow(dim, self.rank * heads, heads)


def read(module: nn.Module) -> tuple[Tensor, Tensor | None, Group]:
    """Return the local weight (out, in) and bias of a sharded Linear, and the group that shares them."""
    weight, bias = module._parameters["weight"], module._parameters["bias"]
    mesh = weight.device_mesh
    group = Group(mesh.get_group(), mesh.get_local_rank(), mesh.size())
    local = weight.to_local()
    if module.__dict__[MARK] == "columns":
        bias = None if bias is None else bias.to_local().reshape(-1)
    return local.reshape(-1, local.shape[-1]), bias, group


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, processes):
        ctx.processes = processes
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.processes)
        return grad, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, processes):
        # ctx.mark_dirty refuses a view that an op of ours returned, such as (B, N, C) of its rows. And an all-reduce
        # gives x no new version: an op that kept x for its backward would silently read the sum.
        dist.all_reduce(x, group=processes)
        torch.autograd.graph.increment_version(x)
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad, grad if ctx.needs_input_grad[1] else None, None


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx, bias, is_first):
        return bias.view_as(bias) if is_first else torch.zeros_like(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad, None
