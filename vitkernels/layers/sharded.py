"""Tensor parallelism: what a fused forward does with the weights that :func:`vitkernels.parallelize` sharded.

A column-parallel layer has some of the output features, a row-parallel one some of the input features (Megatron-LM,
arXiv 1909.08053). The weights are DTensors. Between the two layers a process computes on its own heads or hidden
features alone; in front of the first and behind the second all processes hold the same tokens. So a branch costs one
all-reduce forward and one backward. Its biases, LayerScale, DropPath and residual stay in the products' epilogues.

With sequence parallelism (arXiv 2205.05198) a process holds its own images' tokens alone outside these layers: in front
of the first they are gathered, behind the second each process gets its part of the sum, which costs as much as an
all-reduce. It is the batch that is shared out, since a ViT's number of tokens is often prime (197).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# The attribute of a Linear with shards ("columns" or "rows"), of an attention or MLP of such layers ("whole"), and of a
# block that passes on this process's tokens (PASSES), or takes these and returns all (LAST).
MARK = "_vitkernels_sharded"
PASSES, LAST = "passes tokens", "last"

# Before PyTorch 2.13 they have other names, of which it warns; a build without torch.distributed has neither.
_all_gather = getattr(dist, "all_gather_single", getattr(dist, "all_gather_into_tensor", None))
_reduce_scatter = getattr(dist, "reduce_scatter_single", getattr(dist, "reduce_scatter_tensor", None))


def no_other_forward(name: str, reason: str) -> RuntimeError:
    """Return the error of a sharded module of the class ``name`` that cannot run fused for that ``reason``."""
    return RuntimeError(
        f"{name}: vitkernels.parallelize sharded it, so it has only a fused forward, and {reason}; undo that, or call "
        "vitkernels.restore(model)"
    )


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
        mesh: The mesh of the shards.
        processes: Its group of ``torch.distributed``.
        rank: This process's number in it.
        size: How many processes there are.
        shares_tokens: Whether a process holds its own part of the batch outside the sharded layers.
    """

    mesh: dist.device_mesh.DeviceMesh
    processes: dist.ProcessGroup
    rank: int
    size: int
    shares_tokens: bool = False

    def enter(self, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return ``tensors``, which are the same on all processes; their gradients are summed over them in one go.

        Each process uses them for its own part of the work.
        """
        return _Enter.apply(self.processes, *tensors)

    def tokens_in(self, x: Tensor) -> Tensor:
        """Return the tokens that a column-parallel layer takes: all."""
        return _Move.apply(x, self.gathered, self.scattered) if self.shares_tokens else self.enter(x)[0]

    def tokens_out(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return the tokens behind a row-parallel layer: the sum of x over the processes, or this process's part of it.

        The sum is written over x; the gradient of x is that of the sum. ``residual`` is in the first process's x
        already. The other processes get its gradient here.
        """
        if self.shares_tokens:
            return _Move.apply(x, self.scattered, self.gathered)
        passed = residual is not None and self.rank > 0
        return _Sum.apply(x, residual if passed else None, self.processes)

    def own_rows(self, x: Tensor) -> Tensor:
        """Return this process's part of x along dim 0."""
        rows = x.shape[0] // self.size
        return x.narrow(0, self.rank * rows, rows)

    def gathered(self, x: Tensor) -> Tensor:
        """Return the parts x of all processes, along dim 0."""
        whole = x.new_empty((x.shape[0] * self.size, *x.shape[1:]))
        _all_gather(whole, x.contiguous(), group=self.processes)
        return whole

    def scattered(self, x: Tensor) -> Tensor:
        """Return this process's part along dim 0 of the sum of x over the processes."""
        part = x.new_empty((x.shape[0] // self.size, *x.shape[1:]))
        _reduce_scatter(part, x.contiguous(), group=self.processes)
        return part

    def share_tokens(self, x: Tensor) -> Tensor:
        """Return this process's tokens of x (B, N, C), which all processes hold or which is a DTensor."""
        from torch.distributed.tensor import DTensor  # takes a third of a second

        return x.to_local() if isinstance(x, DTensor) else _Move.apply(x, self.own_rows, self.gathered)

    def pass_tokens(self, x: Tensor, *, last: bool) -> Tensor:
        """Return this process's tokens x as a DTensor of all, or behind the ``last`` block all tokens."""
        from torch.distributed.tensor import DTensor, Shard

        if last:
            return _Move.apply(x, self.gathered, self.own_rows)
        return DTensor.from_local(x, self.mesh, [Shard(0)], run_check=False)

    def share(self, bias: Tensor | None) -> Tensor | None:
        """Return this process's summand of ``bias``: all of it in the first process, else zeros.

        The gradient passes unchanged, because it is the whole gradient on every process.
        """
        return None if bias is None else _Share.apply(bias, self.rank == 0)

    def own_heads(self, x: Tensor, dim: int = -3) -> Tensor:
        """Return this process's heads of x, such as a mask (B, H, N, N); all of x if ``dim`` is 1 or missing."""
        if x.ndim < -dim or x.shape[dim] == 1:
            # Its gradient, too, is a sum over all heads; that of the narrowed is no other tensor's, as enter() asks.
            return self.enter(x)[0].narrow(-1, 0, x.shape[-1]) if x.requires_grad else x
        heads = x.shape[dim] // self.size
        return self.enter(x)[0].narrow(dim, self.rank * heads, heads)


def read(module: nn.Module) -> tuple[Tensor, Tensor | None, Group]:
    """Return the local weight (out, in) and bias of a sharded Linear, and the group that shares them."""
    weight, bias = module._parameters["weight"], module._parameters["bias"]
    mesh = weight.device_mesh
    group = Group(mesh, mesh.get_group(), mesh.get_local_rank(), mesh.size())
    local = weight.to_local()
    if module.__dict__[MARK] == "columns":
        bias = None if bias is None else bias.to_local().reshape(-1)
    return local.reshape(-1, local.shape[-1]), bias, group


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, processes, *tensors):
        ctx.processes = processes
        ctx.set_materialize_grads(False)
        return tuple(None if t is None else t.view_as(t) for t in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        wanted = [i for i, grad in enumerate(grads) if grad is not None and ctx.needs_input_grad[i + 1]]
        sums = list(grads)
        if len(wanted) == 1:
            # A gradient of all tokens, in place: nothing else reads what an op of ours returned.
            sums[wanted[0]] = _all_reduced(grads[wanted[0]].contiguous(), ctx.processes)
        elif wanted:
            flat = _all_reduced(torch.cat([grads[i].reshape(-1) for i in wanted]), ctx.processes)
            parts = flat.split([grads[i].numel() for i in wanted])
            for i, part in zip(wanted, parts, strict=True):
                sums[i] = part.view_as(grads[i]).to(grads[i].dtype)
        return None, *sums


def _all_reduced(x: Tensor, processes: dist.ProcessGroup) -> Tensor:
    dist.all_reduce(x, group=processes)
    return x


class _Move(torch.autograd.Function):
    """``there``, a linear map of tokens between the processes, with ``back``, its adjoint, for the gradient."""

    @staticmethod
    def forward(ctx, x, there, back):
        ctx.back = back
        return there(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return ctx.back(grad), None, None


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
