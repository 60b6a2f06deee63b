"""Rivals at one workload: only a right result gets a time, and whoever cannot take part is told of."""

import functools

import pytest
import torch

from benchmarks.compete import Contender, Entry, compare, compete
from benchmarks.environment import Missing
from benchmarks.judge import judge_model, judge_op
from benchmarks.schema import Row, Times

TRUTH = {"output 0": torch.linspace(-1, 1, 60, dtype=torch.float64).reshape(6, 10)}
RIGHT = {"output 0": TRUTH["output 0"].float()}
WRONG = {"output 0": TRUTH["output 0"].float() * 1.001}
WORKLOAD = Row("op", "layer_norm", "vit_base_patch16_224", "", "forward", "fp32", 1, flops=10, bytes=1 << 30)


def raising(error):
    def build():
        raise error

    return Contender(build)


def run(session, contenders, **options):
    options = {"truth": TRUTH, "yardstick": RIGHT, "judge": judge_op, "seconds": 0.5} | options
    return {row.provider: row for row in compete(session, WORKLOAD, contenders, **options)}


def test_a_provider_twice_as_slow_reads_twice(session, clock):
    session.results.ceilings = {"tflops fp32": 1.0, "gb_per_s": 2 * (1 << 30) / 1e9}
    contenders = {
        "vitkernels": Contender(lambda: Entry(clock.work(1.0), RIGHT)),
        "torch": Contender(lambda: Entry(clock.work(2.0), RIGHT)),
        "slow": Contender(lambda: Entry(clock.work(3.0), RIGHT)),
    }
    rows = run(session, contenders)
    assert rows["torch"].time.median == pytest.approx(2 * rows["vitkernels"].time.median)
    assert rows["vitkernels"].over_best_rival == pytest.approx(2.0)
    assert rows["torch"].over_best_rival is None
    assert rows["vitkernels"].of_roofline == pytest.approx(0.5)  # 1 GiB at 2 GiB/s takes half a second
    assert rows["vitkernels"].error < 1e-7


@pytest.mark.parametrize("judge", [judge_op, judge_model])
def test_a_wrong_provider_gets_no_time(session, clock, judge):
    called = []

    def named(results):
        return {"output 0" if judge is judge_op else "output": results["output 0"]}

    contenders = {
        "vitkernels": Contender(lambda: Entry(clock.work(1.0), named(RIGHT))),
        "fast and wrong": Contender(lambda: Entry(lambda: called.append(1), named(WRONG))),
    }
    rows = run(session, contenders, judge=judge, truth=named(TRUTH), yardstick=named(RIGHT))
    wrong = rows["fast and wrong"]
    assert (wrong.status, wrong.time, wrong.over_best_rival, called) == ("wrong", None, None, [])
    assert "error" in wrong.reason
    assert wrong.error == pytest.approx(1e-3, rel=0.01)
    assert rows["vitkernels"].status == "measured"
    assert rows["vitkernels"].over_best_rival is None, "a wrong rival is no rival"


@pytest.mark.parametrize("result", [torch.zeros(3), torch.full((6, 10), float("nan"))])
@pytest.mark.parametrize("judge", [judge_op, judge_model])
def test_other_shapes_and_nan_are_wrong(result, judge):
    name = "output 0" if judge is judge_op else "output"
    verdict = judge({name: result}, {name: RIGHT["output 0"]}, {name: TRUTH["output 0"]})
    assert not verdict.right
    assert verdict.reason


def test_a_model_may_err_half_as_much_again_as_pytorch():
    truth = {"output": TRUTH["output 0"]}
    noise = torch.randn(6, 10, dtype=torch.float64) * 1e-4
    yardstick = {"output": (truth["output"] + noise).float()}
    for factor, right in ((1.4, True), (1.6, False)):
        verdict = judge_model({"output": (truth["output"] + factor * noise).float()}, yardstick, truth)
        assert verdict.right is right
        assert verdict.ratio == pytest.approx(factor, rel=0.01)


def test_gradients_of_a_model_count_together_and_apart_from_the_output():
    truth = {"output": TRUTH["output 0"], "dw": TRUTH["output 0"] * 5, "db": TRUTH["output 0"][0]}
    yardstick = {name: t.float() for name, t in truth.items()}
    assert judge_model(yardstick, yardstick, truth).right
    verdict = judge_model(yardstick | {"dw": yardstick["dw"] * 1.01}, yardstick, truth)
    assert not verdict.right
    assert verdict.reason.startswith("gradients")


def test_who_cannot_take_part(session, clock):
    contenders = {
        "vitkernels": raising(Missing("no such op")),
        "vitkernels graph": raising(Missing("no GPU")),
        "liger": raising(Missing("not installed")),
        "torch": Contender(lambda: Entry(clock.work(1.0), RIGHT)),
        "breaks": raising(RuntimeError("first line\nsecond line")),
        "large": raising(torch.OutOfMemoryError("much")),
        "dear": Contender(functools.partial(pytest.fail, "was built"), seconds=99.5),
    }
    rows = run(session, contenders)
    said = {provider: (row.status, row.reason) for provider, row in rows.items()}
    assert said == {
        "vitkernels": ("skipped", "no such op"),
        "torch": ("measured", ""),
        "breaks": ("failed", "RuntimeError: first line"),
        "large": ("skipped", "out of memory on the device"),
        "dear": ("skipped", "the budget has no time left to build it"),
    }
    assert session.results.providers == {"vitkernels graph": "no GPU", "liger": "not installed"}


def test_timing_ends_with_the_budget(session, clock):
    clock.now = 99.0
    run(session, {"torch": Contender(lambda: Entry(clock.work(0.1), RIGHT))}, seconds=50.0)
    assert clock.now == pytest.approx(100.0, abs=0.2)


def test_the_best_rival_counts_and_ceilings_of_the_dtype():
    def row(provider, us, dtype="bf16"):
        times = Times(us, us, us, 5)
        return Row("op", "mlp", "c", provider, "forward", dtype, 1, time=times, flops=10**9, bytes=10)

    rows = [row("vitkernels", 100.0), row("torch", 150.0), row("compile", 120.0), row("vitkernels graph", 60.0)]
    compare(rows, {"tflops bf16": 50.0, "tflops fp32": 5.0, "gb_per_s": 1000.0})
    assert [r.over_best_rival for r in rows] == [pytest.approx(1.2), None, None, pytest.approx(2.0)]
    assert [r.of_roofline for r in rows[:2]] == [pytest.approx(0.2), pytest.approx(20 / 150)]
    (amp,) = [row("torch", 100.0, "amp")]
    compare([amp], {"tflops bf16": 50.0, "gb_per_s": 1000.0})
    assert amp.of_roofline == pytest.approx(0.2)
    (fp16,) = [row("torch", 100.0, "fp16")]
    compare([fp16], {"tflops bf16": 50.0, "gb_per_s": 1000.0})
    assert fp16.of_roofline is None
