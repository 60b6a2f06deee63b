"""The backend ``emulated``: the library's ops on tensors of the CPU, as an emulated GPU runs them."""

import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import vitkernels
from vitkernels import ops, reference, runtime
from vitkernels.emulator.execute import Kind
from vitkernels.emulator.launch import EmulationError, emulating
from vitkernels.testing.cases import DTYPES
from vitkernels.tools.console import prepare_torchvision
from vitkernels.tools.verify.accuracy import judge
from vitkernels.tools.verify.problems import WINDOW, problems


def launches(function):
    """What each launch of ``function()`` did."""
    with emulating(runs=[]) as emulation:
        function()
    return emulation.runs


def test_it_is_chosen_by_a_block_or_by_the_environment(monkeypatch):
    monkeypatch.delenv("VITKERNELS_BACKEND", raising=False)
    x = torch.randn(3, 8)
    plain = ops.layer_norm(x)
    assert not ops.uses_kernels(x) and runtime.emulated_arch() is None
    for name, arch in (("emulated", "sm_90"), ("emulated:sm_80", "sm_80"), ("emulated:sm_120", "sm_120")):
        with vitkernels.use_backend(name):
            assert ops.uses_kernels(x) and runtime.emulated_arch() == arch == runtime.device_facts(x.device).arch
            torch.testing.assert_close(ops.layer_norm(x), plain)
        monkeypatch.setenv("VITKERNELS_BACKEND", name)
        assert runtime.emulated_arch() == arch
        monkeypatch.delenv("VITKERNELS_BACKEND")
    with pytest.raises(ValueError, match=r"unknown backend 'emulated:sm_70'; expected one of auto, triton, emulated,"):
        vitkernels.use_backend("emulated:sm_70").__enter__()


PROBLEMS = list(problems(WINDOW))
# Other tests run on sm_90. Products are mma.sync on both of these.
FIRST_OF_EACH_OP = list({problem.op: problem for problem in reversed(PROBLEMS)}.values())
LAST_OF_EACH_OP = list({problem.op: problem for problem in PROBLEMS}.values())
ELSEWHERE = [
    *(("sm_80", "bf16", problem) for problem in FIRST_OF_EACH_OP),
    *(("sm_80", "bf16", problem) for problem in PROBLEMS if problem.variant in ("learned bias", "dropout")),
    # A block has the kernels of norms, products and attention.
    *(("sm_120", "bf16", p) for p in LAST_OF_EACH_OP if p.op in ("attention_varlen", "patch_embed", "block")),
    *(("sm_80", "fp32", p) for p in LAST_OF_EACH_OP if p.op in ("mlp", "attention_varlen")),
]


@pytest.mark.parametrize(("arch", "dtype", "problem"), ELSEWHERE, ids=lambda x: getattr(x, "id", x))
def test_every_op_forward_and_backward(arch, dtype, problem):
    with vitkernels.use_backend(f"emulated:{arch}"):
        verdicts = judge(problem, DTYPES[dtype], torch.device("cpu"), 0)
    assert not [v for v in verdicts if not v.passed]


def test_gradcheck():
    tensors = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 6), (4, 6), (4,))]
    with vitkernels.use_backend("emulated"):
        assert torch.autograd.gradcheck(lambda x, w, b: ops.linear(x, w, b, activation="gelu"), tensors)
        assert torch.autograd.gradcheck(ops.layer_norm, (tensors[0],))


def test_a_backward_runs_where_its_forward_ran():
    """Also behind the block, and in another thread."""
    x, w = torch.randn(6, 16, requires_grad=True), torch.randn(8, 16, requires_grad=True)
    with vitkernels.use_backend("emulated:sm_80"):
        y = ops.linear(x, w, activation="gelu")
    seen = []
    thread = threading.Thread(target=lambda: seen.extend(launches(lambda: y.sum().backward())))
    thread.start()
    thread.join()
    assert seen and {run.arch for run in seen} == {80}


def test_a_checkpoint_is_computed_again_there():
    x = torch.randn(6, 16, requires_grad=True)

    def forward(x):
        return ops.layer_norm(x).square()

    with vitkernels.use_backend("emulated"):
        y = checkpoint(forward, x, use_reentrant=False).sum()
    kernels = [run.kernel for run in launches(y.backward)]
    assert kernels == ["_layer_norm_fwd_kernel", "_layer_norm_bwd_kernel"]


def test_compiled():
    x, w = torch.randn(6, 16, requires_grad=True), torch.randn(8, 16, requires_grad=True)

    def f(x, w):
        return ops.linear(ops.layer_norm(x), w, activation="gelu").square().sum()

    with vitkernels.use_backend("emulated"):
        expected = torch.autograd.grad(f(x, w), (x, w))
        got = torch.autograd.grad(torch.compile(f, fullgraph=True, backend="aot_eager")(x, w), (x, w))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_threads_side_by_side_on_different_gpus():
    x, w = torch.randn(64, 40), torch.randn(24, 40)
    results = {}

    def work(name):
        with vitkernels.use_backend(name):
            for _ in range(4):
                results[name] = ops.linear(x, w, activation="gelu")

    threads = [threading.Thread(target=work, args=(n,)) for n in ("emulated", "emulated:sm_80", "torch")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = reference.linear(x, w, activation="gelu")
    assert len(results) == 3
    for result in results.values():
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


def test_an_accelerated_block_trains():
    prepare_torchvision()
    timm = pytest.importorskip("timm")
    model = timm.models.vision_transformer.Block(32, 2, qkv_bias=True)
    x = torch.randn(2, 5, 32)
    expected = model(x)
    report = vitkernels.accelerate(model)
    assert report.swapped
    with vitkernels.use_backend("emulated"):
        runs = launches(lambda: torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-3))
        assert {"_layer_norm_fwd_kernel", "_attention_fwd_blocks_kernel"} <= {run.kernel for run in runs}
        assert len(launches(lambda: model(x).sum().backward())) > len(runs)


def test_a_finding_is_an_error_that_says_where():
    from vitkernels.tools.verify.mutants import MUTANTS, seeded_defect

    defect = next(m for m in MUTANTS if m.by == "memory" and m.op == "layer_norm")
    problem = next(p for p in problems(WINDOW) if p.op == "layer_norm")
    tensors = problem.draw(DTYPES["fp32"], torch.device("cpu"))
    with seeded_defect(defect), vitkernels.use_backend("emulated"), pytest.raises(EmulationError) as caught:
        problem.function(**tensors)
    said = str(caught.value)
    for word in ("_layer_norm_fwd_kernel", "emulated H100", "layer_norm", "rstd_ptr, byte", "program", "warp", "lane"):
        assert word in said


def test_an_accumulator_copied_behind_the_fence_is_ptxass_to_order():
    """Where one product is all, LLVM copies the accumulator between wgmma.fence and wgmma: ptxas says C7519."""
    x, w1, b1, w2 = (torch.randn(shape, dtype=torch.bfloat16) for shape in ((1, 33, 1), (1, 1), (1,), (1, 1)))
    runs = launches(lambda: ops.mlp(x, w1, b1, w2, None, activation="gelu"))
    assert Kind.unfenced_operand in {finding.kind for run in runs for finding in run.findings}
