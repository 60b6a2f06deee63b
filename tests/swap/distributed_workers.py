"""What each of two processes runs for test_gets_along_distributed.py."""

import collections
import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path

import conftest  # noqa: F401  sets up the emulated GPU and torchvision, before timm is imported
import pytest
import timm
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vitkernels import accelerate
from vitkernels.layers import fused

BATCH = 4


def start(work: Callable[[int, int, str], None], processes: int, folder: Path) -> None:
    """Run ``work(rank, processes, folder)`` in so many processes."""
    with pytest.MonkeyPatch.context() as patch:  # one process imports what all use, and they are forked from it
        # Other folders of tests have a conftest.py, too.
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[1]), *sys.path]))
        multiprocessing.get_context("forkserver").set_forkserver_preload([work.__module__])
        torch.multiprocessing.start_processes(
            work, (processes, str(folder)), nprocs=processes, start_method="forkserver"
        )


def build() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=32, num_heads=2, depth=1, num_classes=5, init_values=0.5
    )


def images() -> torch.Tensor:
    return torch.randn(BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().mean()


def work(rank: int, world: int, folder: str) -> None:
    """Train a step in every way; rank 0 writes the gradients, how many blocks ran fused, what was sent, and how much
    was kept for the backward, for the test to judge."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    ways = {
        "ddp after accelerate": lambda: ddp(before=True),
        "ddp before accelerate": lambda: ddp(before=False),
        "fsdp after accelerate": lambda: fsdp(before=True),
        "fsdp before accelerate": lambda: fsdp(before=False),
        "plain ddp": lambda: (DistributedDataParallel(build()), None),
        "plain fsdp": lambda: (sharded(build()), None),
    }
    results = {}
    for name, wrap in ways.items():
        model, report = wrap()
        blocks = []
        original = fused.block
        fused.block = lambda *args, **kwargs: (blocks.append(1), original(*args, **kwargs))[1]  # noqa: B023
        with Kept({p.data_ptr() for p in model.parameters()}) as kept_bytes, Sent() as sent:
            loss_of(model, images().chunk(world)[rank]).backward()
        fused.block = original
        gradients = {
            parameter.removeprefix("module."): (p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad)
            for parameter, p in model.named_parameters()
        }
        kept = {entry.module.removeprefix("module."): entry.reason for entry in report.kept} if report else {}
        results[name] = {
            "gradients": gradients, "blocks": len(blocks), "kept": kept, "sent": dict(sent.bytes),
            "kept for backward": kept_bytes.total,
        }  # fmt: skip
    if rank == 0:
        torch.save(results, f"{folder}/results.pt")
    dist.barrier()
    dist.destroy_process_group()


class Sent(TorchDispatchMode):
    """Counts the bytes that this process gives each collective of ``torch.distributed``, by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            self.bytes[func.name()] += sum(t.nbytes for t in given)
        return func(*args, **(kwargs or {}))


class Kept(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes of what autograd keeps for the backward, each storage once, without the parameters'."""

    def __init__(self, parameters: set[int]) -> None:
        self.storages = {}
        super().__init__(self._pack, lambda t: t)
        self.parameters = parameters

    def _pack(self, t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in self.parameters:
            self.storages[storage.data_ptr()] = storage.nbytes()
        return t

    def __enter__(self):
        super().__enter__()
        return self

    @property
    def total(self) -> int:
        return sum(self.storages.values())


def ddp(before: bool):
    model = build()
    report = accelerate(model) if before else None
    wrapped = DistributedDataParallel(model)
    return wrapped, report or accelerate(wrapped)


def fsdp(before: bool):
    model = build()
    report = accelerate(model) if before else None
    sharded(model)
    assert isinstance(model.blocks[0], FSDPModule)
    if before:  # once more changes nothing
        classes = [type(module) for module in model.modules()]
        again = accelerate(model)
        assert [entry.module for entry in again.swapped] == [entry.module for entry in report.swapped]
        assert [type(module) for module in model.modules()] == classes
    return model, report or accelerate(model)


def sharded(model: nn.Module) -> nn.Module:
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)
