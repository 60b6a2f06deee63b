"""Every op bench: what it is given fits the op, ours is right on it, and its formulas count what PyTorch counts."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.judge import judge_op
from benchmarks.ops import MODES, STAGES, all_ops
from benchmarks.ops.measure import call_of, measure_op, results_of, truth_of, upstreams_of
from benchmarks.run import CpuTimer
from vitkernels import runtime
from vitkernels.testing.cases import CASES, Case

OPS = all_ops()
SMALL = {  # of the size whose kernels the tests of swapped models share
    "mlp": Case("mlp", 3, 35, 16, 1, 32, 2, 128, "gelu_tanh", layer_scale=True),
    "packed": Case("packed", 2, 32, 16, 1, 32, 2, 85, "silu", norm="rms_norm", mlp="packed"),
    "separate": Case("separate", 2, 32, 16, 0, 32, 2, 85, "silu", mlp="separate", mlp_norm=True),
    # As in Swin's first stage, but of 2 × 2 windows.
    "windows": dataclasses.replace(STAGES["swin_tiny_patch4_window7_224 stage 1"], batch=1, image=56),
    "cosine": dataclasses.replace(STAGES["swinv2_base_window8_256 stage 1"], batch=1, image=64),
    "relative": dataclasses.replace(STAGES["beit_base_patch16_224"], batch=1, image=64),
}
APPLY = [(name, case) for name, bench in OPS.items() for case, shape in SMALL.items() if bench.applies(shape)]
ONCE = list({name: (name, case) for name, case in APPLY}.values())


@pytest.mark.parametrize(("name", "case"), APPLY)
def test_ours_is_right_on_its_inputs(name, case, device):
    bench, shape = OPS[name], SMALL[case]
    tensors = bench.inputs(shape, torch.float32, device)
    for upstreams in (None, upstreams_of(bench.reference, shape, tensors)):
        got, yardstick = (results_of(f, shape, tensors, upstreams) for f in (bench.ours, bench.reference))
        verdict = judge_op(got, yardstick, truth_of(bench.reference, shape, tensors, upstreams))
        assert verdict.right, verdict.reason
    assert len(got) > len([n for n in got if n.startswith("output")]), "no gradient was asked for"


@pytest.mark.parametrize(("name", "case"), APPLY)
def test_inputs_have_the_shapes_of_the_case_in_every_dtype(name, case, device):
    for dtype in (torch.bfloat16, torch.float16):
        tensors = OPS[name].inputs(SMALL[case], dtype, device)
        floats = [t for t in tensors.values() if t.is_floating_point()]
        assert {t.dtype for t in floats} == {dtype}
        assert all(t.is_leaf for t in floats), "a gradient would stop short"
        assert all(t.float().std() > 0.01 for t in floats if t.numel() > 10), "zeros run faster than data"


@pytest.mark.parametrize(("name", "case"), ONCE)
def test_the_rival_compiles_whole(name, case):
    torch.compiler.reset()
    bench, shape = OPS[name], SMALL[case]
    tensors = bench.inputs(shape, torch.float32, torch.device("cpu"))
    compiled = torch.compile(bench.reference, dynamic=False, fullgraph=True, backend="aot_eager")
    upstreams = upstreams_of(bench.reference, shape, tensors)
    for given in (None, upstreams):
        got, plain = (results_of(f, shape, tensors, given) for f in (compiled, bench.reference))
        for key in plain:
            torch.testing.assert_close(got[key], plain[key], rtol=1e-4, atol=1e-4)


MERGING = ("patch_merging", "patch_merging_v2")
PRODUCTS = ("linear", "linear_activation", "linear_residual", "mlp", "swiglu_mlp", "patch_embed", *MERGING)


@pytest.mark.parametrize(("name", "case"), [(n, c) for n, c in APPLY if n in PRODUCTS])
@pytest.mark.parametrize("mode", MODES)
def test_flops_are_those_that_pytorch_counts(name, case, mode):
    bench, shape = OPS[name], SMALL[case]
    tensors = bench.inputs(shape, torch.float32, torch.device("cpu"))
    run = call_of(bench.reference, shape, tensors, mode, upstreams_of(bench.reference, shape, tensors))
    with FlopCounterMode(display=False) as counter:
        run()
    assert counter.get_total_flops() == bench.flops(shape, mode)


@pytest.mark.parametrize("varlen", [False, True])
def test_flops_of_attention_are_those_of_its_products(varlen):
    bench, shape = OPS["attention_varlen" if varlen else "attention"], SMALL["mlp"]
    lengths = [5, 15 // 4, 5 // 4] if varlen else [5] * 3
    scores = sum(n * n for n in lengths) * shape.heads * shape.head_dim
    assert shape.tokens == 5
    assert [bench.flops(shape, mode) for mode in MODES] == [4 * scores, 10 * scores, 14 * scores]


WINDOWS = ("window_attention", "window_attention_cosine", "relative_attention")


@pytest.mark.parametrize(("name", "case"), [(n, c) for n, c in APPLY if n in WINDOWS])
def test_flops_and_rivals_of_windows(name, case):
    bench, shape, cpu = OPS[name], SMALL[case], torch.device("cpu")
    keys = {"windows": 7 * 7, "cosine": 8 * 8, "relative": 1 + 4 * 4}[case]
    scores = shape.batch * shape.tokens * keys * shape.channels
    assert [bench.flops(shape, mode) for mode in MODES] == [4 * scores, 10 * scores, 14 * scores]
    tensors = bench.inputs(shape, torch.float32, cpu)
    plain = results_of(bench.reference, shape, tensors, None)["output 0"]
    for make in bench.rivals.values():
        torch.testing.assert_close(results_of(make(cpu), shape, tensors, None)["output 0"], plain)


@pytest.mark.parametrize(
    "name", ["layer_norm", "add_layer_norm", "linear", "linear_residual", "attention", "mlp", *WINDOWS, *MERGING]
)
def test_bytes_are_those_of_the_tensors_in_and_out(name):
    bench, shape = OPS[name], dataclasses.replace(SMALL[dict(reversed(APPLY))[name]], batch=64)
    tensors = bench.inputs(shape, torch.bfloat16, torch.device("cpu"))
    outputs = results_of(bench.reference, shape, tensors, None)
    size = sum(t.nbytes for t in [*tensors.values(), *outputs.values()])
    hidden = 2 * 2 * shape.batch * shape.tokens * shape.hidden if name == "mlp" else 0
    vectors = sum(t.nbytes for t in tensors.values() if t.ndim == 1)
    assert bench.bytes(shape, "forward", 2) == size + hidden - vectors
    assert bench.bytes(shape, "both", 2) == bench.bytes(shape, "forward", 2) + bench.bytes(shape, "backward", 2)


def test_measuring_an_op(session):
    session.timer = CpuTimer()
    session.budget.clock = CpuTimer().clock
    session.budget.__post_init__()
    session.results.ceilings = {"tflops fp32": 1.0, "gb_per_s": 10.0}
    with runtime.use_backend("torch"):
        rows = [row for mode in measure_op(session, OPS["mlp"], SMALL["mlp"], "fp32", seconds=0.02) for row in mode]
    assert [(row.mode, row.provider) for row in rows] == [(m, p) for m in MODES for p in ("vitkernels", "torch")]
    for row in rows:
        assert (row.status, row.batch, row.dtype) == ("measured", 3, "fp32"), row.reason
        assert row.time.median > 0
        assert 0 < row.error < 1e-5
    assert set(session.results.providers) == {"compile", "compile max-autotune"}


def test_every_named_case_has_its_ops():
    for case in CASES.values():
        names = {name for name, bench in OPS.items() if bench.applies(case)}
        assert case.norm in names
        assert ("mlp" in names) == (case.mlp == "mlp")
        assert ("swiglu_mlp" in names) == (case.mlp != "mlp")
