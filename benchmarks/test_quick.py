"""Quick benchmarks with pytest-benchmark: ``pytest benchmarks``. The full ones are ``python -m benchmarks``."""

import copy

import pytest
import torch

import vitkernels
from benchmarks import host_costs
from benchmarks.environment import find_device
from benchmarks.judge import judge_op
from benchmarks.ops import all_ops
from benchmarks.ops.measure import call_of, results_of, truth_of, upstreams_of, with_batch
from vitkernels.testing.cases import CASES, DTYPES
from vitkernels.tools import names

DEVICE = find_device()
DTYPE = "bf16" if DEVICE.type == "cuda" else "fp32"
CASE = with_batch(CASES["vit_base_patch16_224"], 32 if DEVICE.type == "cuda" else 1)
OPS = [(name, who) for name, bench in all_ops().items() if bench.applies(CASE) for who in ("vitkernels", "torch")]


def synchronized(function):
    """Make ``function`` wait for the device, as pytest-benchmark measures wall-clock time."""

    def run():
        result = function()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return result

    return run


@pytest.mark.parametrize("mode", ["forward", "both"])
@pytest.mark.parametrize(("name", "who"), OPS)
def test_op(benchmark, name, who, mode):
    bench = all_ops()[name]
    benchmark.group = f"{name}, {mode}"
    tensors = bench.inputs(CASE, DTYPES[DTYPE], DEVICE)
    upstreams = None if mode == "forward" else upstreams_of(bench.reference, CASE, tensors)
    function = bench.ours if who == "vitkernels" else bench.reference
    verdict = judge_op(
        results_of(function, CASE, tensors, upstreams),
        results_of(bench.reference, CASE, tensors, upstreams),
        truth_of(bench.reference, CASE, tensors, upstreams),
    )
    assert verdict.right, verdict.reason
    benchmark.pedantic(
        synchronized(call_of(function, CASE, tensors, mode, upstreams)), rounds=10, warmup_rounds=2, iterations=1
    )


@pytest.mark.parametrize("who", ["vitkernels", "timm"])
def test_model(benchmark, who):
    pytest.importorskip("timm")
    benchmark.group = "vit_base_patch16_224, inference"
    model = names.build("vit_base_patch16_224")[0].to(DEVICE, DTYPES[DTYPE]).eval()
    images = torch.randn(CASE.batch, 3, 224, 224, device=DEVICE, dtype=DTYPES[DTYPE])
    if who == "vitkernels":
        model = copy.deepcopy(model)
        vitkernels.accelerate(model)
    with torch.no_grad():
        benchmark.pedantic(synchronized(lambda: model(images)), rounds=5, warmup_rounds=1, iterations=1)


def test_accelerate(benchmark):
    benchmark.group = "accelerate, ViT-g"
    pytest.importorskip("timm")
    with torch.device("meta"):
        model, _ = names.build(host_costs.LARGEST)
    benchmark.pedantic(vitkernels.accelerate, (model,), setup=lambda: vitkernels.restore(model) and None, rounds=20)
