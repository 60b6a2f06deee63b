"""The checks of what PyTorch does with the ops: each runs or says why not, covers every op, and can fail."""

import dataclasses
import shutil

import pytest
import torch

from vitkernels import ops
from vitkernels.ops._registry import OPS
from vitkernels.tools.verify import integration
from vitkernels.tools.verify.integration import integration_checks

NO_OPS = {"QKNorm", "Rope", "attention_provider", "attention_weights", "uses_kernels"}  # launch nothing of their own
FP8 = {"Fp8", "quantize_fp8", "layer_norm_fp8", "add_layer_norm_fp8", "linear_fp8"}  # no problem calls them
WAYS = {"opcheck", "compile", "export", "checkpointing", "autocast", "inference-mode", "cuda-graph", "side-stream",
        "second-device", "threads"}  # fmt: skip


def results(device, *patterns, quick=True):
    chosen = [c for c in integration_checks(device, 0, quick=quick) if c.matches(patterns)]
    assert chosen
    return [r for check in chosen for r in check.run()]


@pytest.mark.parametrize("quick", [True, False])
def test_every_op_every_way(device, quick):
    ids = {check.id for check in integration_checks(device, 0, quick=quick)}
    public = set(ops.__all__) - NO_OPS - FP8
    assert ids == {f"integration/opcheck/{name}" for name in OPS if not name.endswith("_fp8")} | {
        f"integration/{way}/{op}" for way in WAYS - {"opcheck"} for op in public
    }


def test_every_registered_op_is_called(device):
    calls = integration._calls(integration._by_op(), device, 0)
    assert calls.keys() == {name for name in OPS if not name.endswith("_fp8")}


@pytest.mark.parametrize("op", ["mlp", "attention_varlen"])
def test_the_ops_pass(device, op):
    found = results(device, f"integration/*/{op}", f"integration/opcheck/{op}*")
    assert {r.check.split("/")[1] for r in found} >= WAYS - {"opcheck"}
    assert not [r for r in found if r.status in ("failed", "broken")]
    skipped = {r.check.split("/")[1]: r.detail for r in found if r.status == "skipped"}
    if device.type == "cpu":
        assert skipped.keys() == {"cuda-graph", "side-stream", "second-device"}
        assert all(reason.startswith("no GPU") for reason in skipped.values())
    else:
        assert skipped.keys() <= {"second-device"}


@pytest.mark.parametrize("way", ["compile", "checkpointing", "export"])
def test_dropout_draws_the_same(device, way):
    """Checkpointing must replay the generator, and a graph must hold the draw: nothing is seeded inside the op."""
    (dropout,) = [p for p in integration._by_op()["attention"] if p.variant == "dropout"]
    found = list(integration._look("id", integration._QUICK_WAYS[way], [dropout], device, 0))
    assert found
    assert all(r.status == "passed" for r in found), found


def test_inductor_or_why_not(device, monkeypatch):
    layer_norm = integration._by_op()["layer_norm"][:1]
    monkeypatch.setattr(shutil, "which", lambda name: None)
    if device.type == "cpu":
        found = list(integration._look("id", integration._WAYS["compile"], layer_norm, device, 0))
        assert [r.status for r in found] == ["passed", "skipped"]
        assert "C++ compiler" in found[1].detail
    monkeypatch.undo()
    if device.type == "cpu" and not integration._has_cpp_compiler():
        pytest.skip("no C++ compiler")
    found = list(integration._look("id", integration._WAYS["compile"], layer_norm, device, 0))
    assert [(r.status, r.name) for r in found] == [("passed", "plain, aot_eager"), ("passed", "plain, inductor")]


def broken_in(problem, function):
    return dataclasses.replace(problem, function=function)


def wrong_where(condition):
    """LayerNorm, 2 % too large where ``condition`` holds."""

    def function(x, weight, bias):
        y = ops.layer_norm(x, weight, bias)
        return y * 1.02 if condition() else y

    return function


def graph_break(x, weight, bias):
    torch._dynamo.graph_break()
    return ops.layer_norm(x, weight, bias)


def of_wrong_dtype(x, weight, bias):
    return ops.layer_norm(x, weight, bias).double()


class EveryThird:
    """Checkpointing calls a function a second time in backward, after the plain call and the first: that one errs."""

    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return self.calls == 3


@pytest.mark.parametrize(
    ("way", "function", "said"),
    [
        ("compile", wrong_where(torch.compiler.is_compiling), "output 0: "),
        ("compile", graph_break, "Unsupported: "),
        ("export", wrong_where(torch.compiler.is_compiling), "output 0: "),
        ("export", lambda x, weight, bias: x * weight + bias, "none of vitkernels' ops"),
        ("checkpointing", wrong_where(EveryThird()), "dx: "),
        ("autocast", wrong_where(lambda: torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")), "RMS"),
        ("autocast", of_wrong_dtype, "dtype torch.float64, PyTorch gives"),
        ("inference-mode", wrong_where(torch.is_inference_mode_enabled), "output 0: "),
    ],
)  # fmt: skip
def test_each_way_can_fail(device, way, function, said):
    problem = broken_in(integration._by_op()["layer_norm"][0], function)
    found = list(integration._look("id", integration._QUICK_WAYS[way], [problem], device, 0))
    failed = [r for r in found if r.status == "failed"]
    assert failed
    assert said in failed[0].detail


def test_opcheck_can_fail(device):
    x = torch.randn(3, device=device)
    with torch.library._scoped_library("vitkernels", "FRAGMENT") as library:
        library.define("of_wrong_shape(Tensor x) -> Tensor")
        library.impl("of_wrong_shape", lambda x: x + 1, "CompositeExplicitAutograd")
        torch.library.register_fake("vitkernels::of_wrong_shape", lambda x: x.new_empty(4), lib=library)
        (result,) = integration._opcheck("id", "of_wrong_shape", lambda: {"of_wrong_shape": [(x,)]}, quick=True)
    assert result.status == "failed"
    assert result.detail.startswith("test_faketensor: ")
    (result,) = integration._opcheck("id", "of_wrong_shape", dict, quick=True)
    assert (result.status, result.detail) == ("broken", "no problem calls it")
