"""Hostile inputs 49 to 52 and 56: threads, graphs, what other libraries do to a model, Triton's cache."""

import copy
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from op_calls import HAS_GPU, OPS, call, each_op, needs_gpu
from torch import nn

from vitkernels import accelerate, explain, restore, use_backend

hostile = pytest.mark.hostile
RIGHT = "the right result"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def compiling():
    """A function of a scenario and a cache: what :mod:`compiling` prints of it, compiling for an absent sm_90."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, str(Path(__file__).with_name("compiling.py"))]
    with subprocess.Popen(words, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def run(scenario: str, cache: Path) -> dict:
            print(json.dumps([scenario, str(cache)]), file=process.stdin, flush=True)
            found = json.loads(process.stdout.readline())
            assert "raised" not in found, found["raised"]
            return found

        yield run


@pytest.fixture(scope="module")
def filled_cache(tmp_path_factory, compiling) -> Path:
    """A cache that holds the kernel."""
    cache = tmp_path_factory.mktemp("filled")
    assert compiling("once", cache)["launched"] == ["_activation_bwd_kernel"]
    return cache


@hostile(
    49,
    "eight threads launch a kernel that none has compiled",
    "each compiles or waits, all launch; one entry in the cache",
)
def test_eight_threads_compile(compiling, tmp_path):
    found = compiling("threads", tmp_path)
    assert found["errors"] == [None] * 8 and len(found["launched"]) == 8 and found["entries"] == 1


@hostile(49, "eight threads, each with all the ops, forward and backward", RIGHT)
@pytest.mark.parametrize("backend", ["torch", "kernels"])
def test_eight_threads_compute(backend):
    device = "cuda" if HAS_GPU else "cpu"
    backend = "emulated" if backend == "kernels" and not HAS_GPU else backend.replace("kernels", "triton")
    few = ["layer_norm", "linear", "attention"]
    calls = [call(op, device=device) for op in (few if backend == "emulated" else OPS)]

    def run(made):
        outputs = made.outputs()
        leaves = [t for t in made.tensors.values() if t.requires_grad]
        return [*outputs, *torch.autograd.grad(outputs, leaves, [torch.ones_like(y) for y in outputs])]

    found, start = [], threading.Barrier(8)

    def work():
        start.wait()
        with use_backend(backend):
            found.append([run(made) for made in calls])

    with use_backend(backend):
        expected = [run(made) for made in calls]
    workers = [threading.Thread(target=work) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 8
    for got in found:
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


@hostile(
    50,
    "a kernel that is not compiled yet, launched while a CUDA graph is captured",
    "`RuntimeError` that names `vitkernels.warmup`; once compiled, captured",
)
def test_cold_kernel_while_capturing(compiling, tmp_path):
    found = compiling("capture", tmp_path)
    error = found["cold"]["error"]
    assert error.startswith("RuntimeError: _activation_bwd_kernel is launched for the first time")
    assert "captured; expected it to be compiled before" in error and "vitkernels.warmup" in error
    assert found["eager"]["error"] is None and found["warm"]["error"] is None
    assert len(found["launched"]) == 2


@hostile(50, "the same on a GPU, each op; and a warm capture replayed", "`RuntimeError`; replayed, the right result")
@needs_gpu
@each_op()
def test_capture(op, device):
    made = call(op, C=48, F=40, D=24, N=11, device=device, grad=False)  # sizes that no other test compiles for
    graph = torch.cuda.CUDAGraph()
    if op != "linear":  # whose kernels others may have compiled
        with pytest.raises(RuntimeError, match=r"vitkernels\.warmup"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            made()
    expected = made.outputs()
    with torch.cuda.graph(graph):
        outputs = made.outputs()
    for y in outputs:
        y.zero_()
    graph.replay()
    for y, want in zip(outputs, expected, strict=True):
        assert torch.equal(y, want)


@pytest.fixture
def model(device):
    timm = pytest.importorskip("timm")
    sizes = {"img_size": 32, "embed_dim": 32, "num_heads": 2, "depth": 1, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", **sizes).eval().to(device)


@pytest.fixture
def images(device):
    return torch.randn(2, 3, 32, 32, device=device)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@hostile(51, "`accelerate` twice", "the same report and the same model")
def test_accelerate_twice(model, images):
    expected = model(images)
    first = accelerate(model)
    classes = [type(m) for m in model.modules()]
    assert accelerate(model) == first and [type(m) for m in model.modules()] == classes
    assert first.swapped
    close(model(images), expected)
    restore(model)
    assert torch.equal(model(images), expected)


@hostile(
    51,
    "`accelerate` under DistributedDataParallel, before and after it",
    "the right result and gradients, every block fused",
)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.usefixtures("lone_process_group")
def test_accelerate_under_ddp(when, model, images):
    expected = model(images)
    expected.square().sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    if when == "before":
        accelerate(model)
    parallel = nn.parallel.DistributedDataParallel(model)
    report = accelerate(parallel)
    assert any(entry.was == "Block" for entry in report.swapped)
    logits = parallel(images)
    logits.square().sum().backward()
    close(logits, expected)
    close({n: p.grad for n, p in model.named_parameters()}, grads)


@hostile(51, "`accelerate` on a compiled model, and compiling an accelerated one", RIGHT)
@pytest.mark.parametrize("when", ["before", "after"])
def test_accelerate_under_compile(when, model, images):
    expected = model(images)
    if when == "before":
        accelerate(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    if when == "after":
        close(compiled(images), expected)
        assert accelerate(compiled).swapped
    close(compiled(images), expected)


class LowRank(nn.Module):
    """An adapter as LoRA's: the layer it stands for, and something more."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return self.base(x) + 0.5


def adapter(block):
    block.mlp.fc1 = LowRank(block.mlp.fc1)


def hook(block):
    block.mlp.fc1.register_forward_hook(lambda module, args, out: out + 0.5)


def parametrization(block):
    nn.utils.parametrizations.weight_norm(block.mlp.fc1)
    with torch.no_grad():
        block.mlp.fc1.parametrizations.weight.original0.mul_(1.5)


@hostile(
    52,
    "an adapter, a hook or a parametrization inside a fused block, before and after `accelerate`",
    "the right result: unfused, and the report says why",
)
@pytest.mark.parametrize("change", [adapter, hook, parametrization])
@pytest.mark.parametrize("when", ["before", "after"])
def test_changes_inside_a_fused_block(change, when, model, images):
    plain = copy.deepcopy(model)
    change(plain.blocks[0])
    expected = plain(images)
    assert not torch.allclose(expected, model(images), atol=1e-3), "the change must show"
    if when == "after":
        accelerate(model)
    change(model.blocks[0])
    if when == "before":
        accelerate(model)
    close(model(images), expected)
    kept = {entry.module: entry.reason for entry in explain(model).kept}
    assert "fc1" in kept["blocks.0.mlp"]


@hostile(56, "a Triton cache that cannot be written", "the right result, with a warning that names it")
def test_cache_that_cannot_be_written(compiling, tmp_path):
    cache = tmp_path / "cache"
    cache.write_text("a file, where no directory can be made by anybody, root included")
    found = compiling("once", cache)
    assert found["error"] is None and found["launched"] == ["_activation_bwd_kernel"]
    (warning,) = found["warnings"]
    assert f"Triton's cache at {cache} cannot be read or written" in warning and "TRITON_CACHE_DIR" in warning


@hostile(
    56, "the same, met by Triton's driver, which is compiled first", "the right result, with a warning that names it"
)
def test_driver_that_cannot_be_written(compiling, tmp_path):
    found = compiling("no_driver", tmp_path)
    assert found["error"] is None and f"Triton's cache at {tmp_path} cannot" in found["warnings"][0]
    assert found["caches"][0] == str(tmp_path) != found["caches"][1]


@hostile(56, "a kernel that fails to compile or to load, the cache being whole", "its own error, after one compilation")
def test_errors_that_are_not_the_caches(compiling, tmp_path):
    found = compiling("failing", tmp_path)
    assert len(found["attempts"]) == 7
    for attempt in found["attempts"]:
        assert attempt["error"].startswith(attempt["wanted"]), attempt
        assert attempt["compiled"] == 1 and not attempt["warnings"], attempt


def garbage(path: Path) -> None:
    path.write_bytes(b"\x80\x04 garbage")


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


@hostile(
    56, "a Triton cache with a broken entry: its metadata, its binary", "the right result, with a warning that names it"
)
@pytest.mark.parametrize(
    ("suffix", "change"),
    [("kernel.json", truncated), ("kernel.json", garbage), (".cubin", emptied), (".cubin", garbage)],
)
def test_broken_cache(suffix, change, compiling, filled_cache, tmp_path):
    cache = tmp_path / "cache"
    copy_cache(filled_cache, cache)
    (broken,) = (p for p in cache.rglob(f"*{suffix}") if not p.name.startswith("__grp__"))
    change(broken)
    found = compiling("once", cache)
    assert found["error"] is None and found["launched"] == ["_activation_bwd_kernel"]
    assert f"Triton's cache at {cache} cannot be read" in found["warnings"][0]


@hostile(56, "a Triton cache with a broken index of an entry", "the right result: Triton compiles anew")
def test_broken_index_of_the_cache(compiling, filled_cache, tmp_path):
    cache = tmp_path / "cache"
    copy_cache(filled_cache, cache)
    (index,) = cache.rglob("__grp__*")
    garbage(index)
    found = compiling("once", cache)
    assert found["error"] is None and found["launched"] == ["_activation_bwd_kernel"]


def copy_cache(source: Path, target: Path) -> None:
    """Copy a cache: its indices hold absolute paths."""
    for path in source.rglob("*"):
        if path.is_file():
            copied = target / path.relative_to(source)
            copied.parent.mkdir(parents=True, exist_ok=True)
            data = path.read_bytes()
            copied.write_bytes(
                data.replace(str(source).encode(), str(target).encode()) if path.name.startswith("__grp__") else data
            )
