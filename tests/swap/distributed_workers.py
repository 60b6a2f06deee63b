"""What each of two processes runs for test_gets_along_distributed.py."""

import conftest  # noqa: F401  sets up the emulated GPU and torchvision, before timm is imported
import timm
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from vitkernels import accelerate
from vitkernels.layers import fused

BATCH = 4


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
    """Train a step in every way; rank 0 writes the gradients, and how many blocks ran fused, for the test to judge."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    ways = {
        "ddp after accelerate": lambda: ddp(before=True),
        "ddp before accelerate": lambda: ddp(before=False),
        "fsdp after accelerate": lambda: fsdp(before=True),
        "fsdp before accelerate": lambda: fsdp(before=False),
    }
    results = {}
    for name, wrap in ways.items():
        model, report = wrap()
        blocks = []
        original = fused.block
        fused.block = lambda *args, **kwargs: (blocks.append(1), original(*args, **kwargs))[1]  # noqa: B023
        loss_of(model, images().chunk(world)[rank]).backward()
        fused.block = original
        gradients = {
            parameter.removeprefix("module."): (p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad)
            for parameter, p in model.named_parameters()
        }
        kept = {entry.module.removeprefix("module."): entry.reason for entry in report.kept}
        results[name] = {"gradients": gradients, "blocks": len(blocks), "kept": kept}
    if rank == 0:
        torch.save(results, f"{folder}/results.pt")
    dist.barrier()
    dist.destroy_process_group()


def ddp(before: bool):
    model = build()
    report = accelerate(model) if before else None
    wrapped = DistributedDataParallel(model)
    return wrapped, report or accelerate(wrapped)


def fsdp(before: bool):
    model = build()
    report = accelerate(model) if before else None
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    assert isinstance(model.blocks[0], FSDPModule)
    if before:  # once more changes nothing
        classes = [type(module) for module in model.modules()]
        again = accelerate(model)
        assert [entry.module for entry in again.swapped] == [entry.module for entry in report.swapped]
        assert [type(module) for module in model.modules()] == classes
    return model, report or accelerate(model)
