"""How often a kernel is compiled: once a configuration, whatever the number of images."""

import collections
import dataclasses
import functools
import importlib
import json

import pytest
import torch

pytest.importorskip("triton", reason="the JIT says what it would compile")

from vitkernels.ops._registry import OPS
from vitkernels.testing.cases import CASES
from vitkernels.tools.aot import launches, trace

BATCHES = (1, 2, 15, 16, 17, 32)


def several(traced) -> list[str]:
    """Which kernels would be compiled more than once for the same constants, dtypes and options."""
    found = collections.defaultdict(set)
    for label, launch in traced:
        module, _, name = launch.kernel.rpartition(".")
        constants = {p.num for p in getattr(importlib.import_module(module), name).params if p.is_constexpr}
        said = json.loads(launch.specialization)
        chosen = [
            (k, v) for k, v in zip(said["constant_keys"], said["constant_vals"], strict=True) if k[0] in constants
        ]
        pointers = [t for t in said["signature"].values() if t.startswith("*")]
        found[label, name, repr((chosen, pointers, said["options"]))].add(launch.specialization)
    return [f"{len(variants)} × {name}, {label}" for (label, name, _), variants in found.items() if len(variants) > 1]


@pytest.mark.parametrize(
    "name",
    ["vit_base_patch16_224", "vit_so400m_patch14_siglip_378", "eva02_large_patch14_448", "aimv2_large_patch14_224"],
)
def test_a_last_batch_compiles_nothing_anew(name):
    traced = [
        (op, launch)
        for batch in BATCHES
        for op, launcher in launches(dataclasses.replace(CASES[name], batch=batch), torch.bfloat16).items()
        # One image's mask of keys is taken for one that all images share: stride 0, not 197. The windows kernels are
        # compiled on their own for one image a program, which needs no loop.
        if not (batch == 1 and op == "attention_key_mask") and op not in ("attention_windows", "attention_visible")
        for launch in trace(launcher, "sm_90")
    ]
    assert several(traced) == []


def windows(batch: int):
    def new(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="cuda")

    qkv, o, lse = new(batch, 49, 3, 4, 32), new(batch, 49, 4, 32), new(batch, 4, 49, 2, dtype=torch.float32)
    for mask in (new(1, 4, 49, 49), new(batch, 4, 49, 49)):
        options = mask, None, False, 0.0
        OPS["attention_qkvpacked_fwd"].launcher(qkv, 0.2, *options)
        OPS["attention_qkvpacked_bwd"].launcher(o, qkv, o, lse, 0.2, lse.dtype, True, *options)


def test_nor_do_windows():
    traced = [("windows", launch) for batch in BATCHES for launch in trace(functools.partial(windows, batch), "sm_90")]
    assert several(traced) == []


@pytest.mark.parametrize("sides", [(224, 256, 384, 448), (518, 490, 378, 14)], ids=["aligned", "unaligned"])
def test_nor_do_other_images(sides):
    """As long as their rows begin at addresses as round."""
    case = CASES["vit_large_patch14_clip_336" if 518 in sides else "vit_base_patch16_224"]
    traced = [
        (op, launch)
        for side in sides
        for batch in (1, 32)
        for op in ("patch_embed", "patch_embed_uint8")
        for launch in trace(launches(dataclasses.replace(case, image=side, batch=batch), torch.bfloat16)[op], "sm_90")
    ]
    assert several(traced) == []
