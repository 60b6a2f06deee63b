"""The checks of ``vitkernels verify`` themselves: each sees the defect that it is there for, and no other."""

import dataclasses

import pytest
import torch

from vitkernels import ops, reference
from vitkernels.ops._registry import OPS
from vitkernels.testing import fp8
from vitkernels.tools.verify import accuracy, properties
from vitkernels.tools.verify.memory import GuardedMemory, amid_nan
from vitkernels.tools.verify.problems import QUICK, WINDOW, Problem, fp8_problems, problems

NORM, LINEAR = (next(p for p in problems(WINDOW) if p.op == op) for op in ("layer_norm", "linear"))


def statuses(check, problem: Problem, device, **options) -> dict[str, str]:
    results = check("id", problem, torch.float32, device, 0, **options)
    return {r.name: r.status for r in results}


def with_function(problem: Problem, function) -> Problem:
    return dataclasses.replace(problem, function=function)


def test_problems_cover_every_public_op_and_have_distinct_names():
    found = [problem for case in QUICK for problem in (*problems(case), *fp8_problems(case))]
    assert {p.op for p in found} == {
        "layer_norm", "add_layer_norm", "rms_norm", "add_rms_norm", "linear", "mlp", "lora_linear",
        "lora_mlp", "swiglu_mlp", "attention",
        "attention_qkvpacked", "attention_varlen", "window_attention", "relative_attention", "decomposed_attention",
        "block", "patch_embed", "patch_merging",
        *fp8.NAMES,
    }  # fmt: skip
    assert len({p.id for p in found}) == len(found)


def test_a_seed_draws_the_same_again(device):
    drawn = []
    for _ in range(2):
        with accuracy.seeded(3, device):
            drawn.append(LINEAR.draw(torch.float32, device))
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])


def test_accuracy_sees_a_tenth_of_a_percent_and_a_missing_gradient(device):
    assert set(statuses(accuracy.check_accuracy, LINEAR, device).values()) == {"passed"}
    off = with_function(LINEAR, lambda **t: ops.linear(**t) * 1.001)
    assert statuses(accuracy.check_accuracy, off, device)["output 0"] == "failed"
    frozen = with_function(LINEAR, lambda x, weight, bias: ops.linear(x, weight, bias.detach()) + 0 * bias)
    assert statuses(accuracy.check_accuracy, frozen, device) == {
        "output 0": "passed", "dx": "passed", "dweight": "passed", "dbias": "failed",
    }  # fmt: skip


def test_luck_is_drawn_again_and_a_defect_is_not(device):
    calls = []

    def unlucky_once(**t):
        calls.append(1)
        return ops.linear(**t) * (1 + 1e-6 * (len(calls) == 1))

    assert set(statuses(accuracy.check_accuracy, with_function(LINEAR, unlucky_once), device).values()) == {"passed"}
    assert len(calls) == accuracy.DRAWS


def test_a_changed_input_is_seen(device):
    def changes(x, weight, bias):
        y = ops.linear(x, weight, bias)
        with torch.no_grad():
            x.mul_(2.0)
        return y

    frozen = dataclasses.replace(LINEAR, draw=lambda *a: {n: t.detach() for n, t in LINEAR.draw(*a).items()})
    verdicts = accuracy.judge(with_function(frozen, changes), torch.float32, device, 0)
    assert "x" in [v.name for v in verdicts if not v.passed]


@pytest.mark.parametrize("before", [True, False], ids=["before", "behind"])
def test_guard_bands_see_a_byte_on_either_side(before, device):
    with GuardedMemory() as memory:
        x = torch.empty(5, device=device)
        astray = x.as_strided((1,), (1,), x.storage_offset() + (-1 if before else 5))
        assert not memory.trampled()
        astray.fill_(1.0)
    assert x.isnan().all()
    assert memory.allocations == 1
    assert memory.trampled() == x.itemsize


def test_memory_sees_what_is_left_unwritten_and_what_is_read_astray(device, monkeypatch):
    assert set(statuses(properties.check_memory, NORM, device).values()) == {"passed"}
    op = OPS["layer_norm_fwd"]
    launch = op.kernels[device.type]

    def forgets_a_row(*args):
        y, *others = launch(*args)
        return y.new_empty(y.shape).copy_(y).index_copy_(
            1, torch.tensor([3], device=y.device), y.new_empty(y.shape)[:, :1]
        ), *others

    def reads_astray(*args):
        y, *others = launch(*args)
        x = args[0]
        return y + 0 * x.as_strided((1,), (1,), x.storage_offset() - 1), *others

    for defect in (forgets_a_row, reads_astray):
        monkeypatch.setitem(OPS, "layer_norm_fwd", dataclasses.replace(op, kernels={device.type: defect}))
        found = statuses(properties.check_memory, NORM, device)
        assert found["poisoned memory"] == "failed", defect.__name__
        assert found["inputs unchanged"] == "passed"


def test_memory_is_broken_where_no_launcher_is_reached(device):
    assert statuses(properties.check_memory, with_function(NORM, reference.layer_norm), device) == {
        "guard bands": "broken"
    }


def test_amid_nan_keeps_values_and_strides():
    x = torch.randn(3, 8)[:, ::2].requires_grad_()
    y = amid_nan(x)
    assert torch.equal(x, y) and x.stride() == y.stride() and y.requires_grad
    assert y.as_strided((1,), (1,), y.storage_offset() - 1).isnan()


def test_nonfinite_sees_a_nan_that_is_swallowed_or_spreads(device):
    assert set(statuses(properties.check_nonfinite, NORM, device, every=True).values()) == {"passed"}
    swallows = with_function(NORM, lambda **t: ops.layer_norm(**t).nan_to_num(0.0))
    assert statuses(properties.check_nonfinite, swallows, device, every=False)["nan in x"] == "failed"
    spreads = with_function(NORM, lambda **t: ops.layer_norm(**t) + 0 * t["x"].sum())
    assert statuses(properties.check_nonfinite, spreads, device, every=False)["nan in x"] == "failed"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs 8 GiB of a GPU's memory")
def test_reach_sees_an_offset_that_wraps(device):
    assert statuses(properties.check_reach, NORM, device) == {"rows far apart": "passed"}
    wraps = with_function(NORM, lambda x, **t: ops.layer_norm(x if x.stride(0) < 2**26 else x[:1].expand_as(x), **t))
    assert statuses(properties.check_reach, wraps, device) == {"rows far apart": "failed"}


def test_layouts_see_a_kernel_that_takes_all_for_contiguous(device):
    assert set(statuses(properties.check_layouts, NORM, device, every=True).values()) == {"passed"}

    def ignores_strides(x, weight, bias):
        return ops.layer_norm(x.as_strided(x.shape, (x.shape[1] * x.shape[2], x.shape[2], 1)), weight, bias)

    # Only an order of strides that fills its storage can be misread without leaving it.
    assert statuses(properties.check_layouts, with_function(NORM, ignores_strides), device, every=False)[
        "transposed"
    ] == "failed"  # fmt: skip


def test_reruns_see_one_bit(device):
    assert statuses(properties.check_reruns, NORM, device, times=3) == {"3 runs bit-equal": "passed"}
    calls = []

    def drifts(**t):
        calls.append(1)
        return ops.layer_norm(**t) * (1.0 + 1e-6 * (len(calls) == 3))

    assert statuses(properties.check_reruns, with_function(NORM, drifts), device, times=5) == {"rerun 2 of 5": "failed"}
