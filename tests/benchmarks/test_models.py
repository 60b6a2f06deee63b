"""Whole networks: every provider is judged on the batch that is timed, and steps leave the others' weights alone."""

import copy

import pytest
import torch

pytest.importorskip("timm")

from benchmarks.models import bench_vit
from benchmarks.models.bench_vit import MODELS, Model, Task, build, forward_flops, measure_model
from benchmarks.run import Budget, CpuTimer
from vitkernels import runtime

TINY = Model("vit_tiny_patch16_224", 32)


@pytest.fixture
def quick(session):
    session.timer, session.budget = CpuTimer(), Budget(60.0)
    with runtime.use_backend("torch"):
        yield session


@pytest.mark.parametrize(("dtype", "mode"), [("fp32", "inference"), ("amp", "training"), ("bf16", "inference")])
def test_measuring_a_model(quick, mode, dtype):
    rows = {row.provider: row for row in measure_model(quick, TINY, 2, dtype, mode, seconds=0.05)}
    assert set(rows) == {"vitkernels", "timm"}
    for row in rows.values():
        assert row.status == "measured", row.reason
        assert row.case == "32 px"
        assert row.error < {"fp32": 1e-5}.get(dtype, 0.1)
        assert row.flops == forward_flops(TINY) * 2 * (3 if mode == "training" else 1)
    assert rows["timm"].error_ratio == pytest.approx(1.0)
    assert "compile" in quick.results.providers


def task(mode, batch=10):
    torch.manual_seed(0)
    network = build(TINY, torch.float32, "cpu").train(mode == "training")
    return Task(network, torch.randn(batch, 3, 32, 32), torch.randint(1000, (batch,)), mode, None)


def test_the_batch_that_is_timed_is_the_one_that_is_judged():
    """Ten images run, the first eight are compared: with the gradients that eight alone would give."""
    whole = task("training")
    network = whole.plain
    few = Task(network, whole.images[:8], whole.labels[:8], "training", None)
    a, b = whole.results(network), few.results(network)
    assert a.keys() == b.keys()
    assert a["output"].shape == (8, 1000)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-6)


def test_training_steps_do_not_touch_the_others_weights():
    whole = task("training", 2)
    before = copy.deepcopy(whole.plain.state_dict())
    entry = bench_vit._entry(whole, whole.plain, None)
    for _ in range(3):
        entry.function()
    for name, t in whole.plain.state_dict().items():
        assert torch.equal(t, before[name]), name


def test_accelerated_and_plain_have_the_same_weights():
    whole = task("inference", 1)
    mine, plain = whole.accelerated.state_dict(), whole.plain.state_dict()
    assert mine.keys() == plain.keys()
    assert all(torch.equal(mine[name], plain[name]) for name in plain)
    assert type(whole.accelerated.blocks[0]) is not type(whole.plain.blocks[0])


def test_flops_by_hand():
    tokens, C, F = 5, 192, 768
    block = 2 * tokens * C * (4 * C + 2 * F) + 4 * tokens**2 * C
    embedding = 2 * 4 * 3 * 16 * 16 * C
    assert forward_flops(TINY) == 12 * block + embedding + 2 * C * 1000


def test_every_model_is_one_of_timms():
    import timm

    for model in MODELS:
        assert timm.is_model(model.name), model
    assert {m.image for m in MODELS if "dinov2" in m.name} == {224, 518}


@pytest.mark.parametrize(
    "name",
    ["vit_large_patch16_dinov3", "vit_so400m_patch14_siglip_384", "vit_giant_patch14_dinov2", "maxvit_tiny_tf_224"],
)
def test_networks_that_are_built_another_way(name):
    model = next(model for model in MODELS if model.name == name)
    assert forward_flops(model) > 1e10
