"""warmup: what it runs, that it leaves no trace, and what it reports of real compilations."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import vitkernels
from vitkernels import accelerate, use_backend, warmup

ROOT = Path(__file__).parents[1]


class Recorder:
    """Keeps of each forward of a module how it was run."""

    def __init__(self, module: nn.Module):
        self.calls = []
        module.register_forward_hook(self, with_kwargs=True)

    def __call__(self, module, args, kwargs, out):
        self.calls.append(
            {
                "inputs": [(tuple(x.shape), x.dtype) for x in (*args, *kwargs.values())],
                "names": list(kwargs),
                "training": module.training,
                "grad": torch.is_grad_enabled(),
                "out": out.dtype if isinstance(out, torch.Tensor) else None,
            }
        )


@pytest.fixture
def model(device):
    timm = pytest.importorskip("timm")
    vit = timm.models.VisionTransformer(
        img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=3, drop_path_rate=0.5, drop_rate=0.5
    )
    model = nn.Sequential(vit, nn.BatchNorm1d(3)).to(device)
    assert accelerate(model).swapped
    return model


def state(model):
    """All that a run could change, copied."""
    return {
        "values": {k: v.clone() for k, v in model.state_dict().items()},
        "tensors": {k: id(v) for k, v in (*model.named_parameters(), *model.named_buffers())},
        "grads": {k: None if p.grad is None else (id(p.grad), p.grad.clone()) for k, p in model.named_parameters()},
        "modes": [m.training for m in model.modules()],
        "random": [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])],
        "grad enabled": torch.is_grad_enabled(),
    }


def same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("training", [False, True])
def test_leaves_no_trace(training, model, device):
    model.train()
    model[0].blocks[0].eval()  # one that its user keeps out of training
    model[0].patch_embed.proj.weight.requires_grad_(False)
    model[0].norm.weight.grad = torch.randn(32, device=device)
    recorder, inner = Recorder(model), Recorder(model[0].blocks[1])
    before = state(model)
    assert (before["grads"]["0.norm.weight"] is not None) and before["grads"]["0.norm.bias"] is None
    warmup(model, (2, 3, 16, 16), training=training)
    same(state(model), before)
    expected = {"inputs": [((2, 3, 16, 16), torch.float32)], "names": [], "training": training, "grad": training}
    assert recorder.calls == [expected | {"out": torch.float32}]
    assert [call["training"] for call in inner.calls] == [training]


def test_training_runs_the_backward(model, device):
    ran = []
    model[0].cls_token.register_hook(lambda grad: ran.append(grad.shape))
    warmup(model, (2, 3, 16, 16))
    assert ran == []
    warmup(model, (2, 3, 16, 16), training=True)
    assert ran == [(1, 1, 32)]


def test_an_error_leaves_no_trace(model):
    before = state(model)
    with pytest.raises(AssertionError, match="Input height"):
        warmup(model, (2, 3, 24, 24), training=True)
    same(state(model), before)


class Replaces(nn.Module):
    """Keeps a buffer that each forward replaces, and one that it counts in."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("last", torch.zeros(2), persistent=False)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.last = x.detach().sum(0) + 1
        self.count += 1
        return x * self.scale


def test_buffers_come_back(device):
    model = Replaces().to(device)
    last, count = model.last, model.count
    warmup(model, (3, 2))
    assert model.last is last and model.count is count
    same([last, count], [torch.zeros(2, device=device), torch.zeros((), device=device)])


class Several(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4, dtype=torch.float16)

    def forward(self, a, b=None):
        b = a if b is None else b
        return {"first": [self.linear(a)], "second": (b.sum(), "text")}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("shapes", "inputs", "names"),
    [
        ((2, 4), [((2, 4), torch.float16)], []),
        ([2, 4], [((2, 4), torch.float16)], []),
        (torch.Size([2, 4]), [((2, 4), torch.float16)], []),
        ([(2, 4)], [((2, 4), torch.float16)], []),
        ([(2, 4), [3]], [((2, 4), torch.float16), ((3,), torch.float16)], []),
        ({"b": (3,), "a": (2, 4)}, [((3,), torch.float16), ((2, 4), torch.float16)], ["b", "a"]),
        (((2, 4), torch.arange(5)), [((2, 4), torch.float16), ((5,), torch.int64)], []),
    ],
    ids=str,
)
def test_inputs(shapes, inputs, names, training, device):
    model = Several().to(device)
    recorder = Recorder(model)
    warmup(model, shapes, training=training)
    (call,) = recorder.calls
    assert (call["inputs"], call["names"]) == (inputs, names)


def test_dtype_and_autocast(model, computed_by_pytorch):
    recorder = Recorder(model[0])
    warmup(model.double(), (2, 3, 16, 16))
    warmup(model.float(), (2, 3, 16, 16), torch.float32, autocast=torch.bfloat16)
    warmup(model.bfloat16(), (2, 3, 16, 16), torch.bfloat16)
    assert [call["inputs"][0][1] for call in recorder.calls] == [torch.float64, torch.float32, torch.bfloat16]
    assert [call["out"] for call in recorder.calls] == [torch.float64, torch.bfloat16, torch.bfloat16]


def test_nothing_runs_where_no_kernel_does(model):
    recorder = Recorder(model)
    with use_backend("torch"):
        assert warmup(model, (2, 3, 16, 16)).kernels == ()
    assert warmup(model.to("meta"), (2, 3, 16, 16), training=True).kernels == ()
    assert warmup(nn.Identity(), (2, 3)).kernels == ()
    assert recorder.calls == []


@pytest.mark.usefixtures("lone_process_group")
def test_a_wrapped_model_can_train_on(model, device):
    wrapped = nn.parallel.DistributedDataParallel(model)
    outer, inner = Recorder(wrapped), Recorder(model)
    warmup(wrapped, (2, 3, 16, 16), training=True)
    assert (len(outer.calls), len(inner.calls)) == (0, 1)
    for _ in range(2):
        wrapped(torch.randn(2, 3, 16, 16, device=device)).sum().backward()
    assert model[0].cls_token.grad is not None


BAD = {
    "no module": (lambda m: warmup(torch.relu, (1, 3)), TypeError, "model is a builtin_function_or_method"),
    "no dtype": (lambda m: warmup(m, (1, 3), "bf16"), TypeError, "dtype is 'bf16'; expected a torch.dtype"),
    "no autocast": (lambda m: warmup(m, (1, 3), autocast=True), TypeError, "autocast is True"),
    "no shape": (lambda m: warmup(m, 224), ValueError, "shape is 224; expected positive integers"),
    "empty": (lambda m: warmup(m, ()), ValueError, r"shape is \(\)"),
    "no integers": (lambda m: warmup(m, (1, 3, 2.0)), ValueError, r"shape is \(1, 3, 2.0\)"),
    "no batch": (lambda m: warmup(m, {"x": (0, 3)}), ValueError, r"shape is \(0, 3\)"),
    "mixed": (lambda m: warmup(m, [(1, 3), 4]), ValueError, r"shape is \[\(1, 3\), 4\]"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, model):
    call, error, message = BAD[case]
    with pytest.raises(error, match=f"^warmup: .*{message}"):
        call(model)


def test_it_is_the_package_s_own():
    assert vitkernels.warmup is warmup and "warmup" in dir(vitkernels)


# A model whose forward launches real kernels, for a GPU that is not there: the JIT compiles, and does not launch.
COMPILES = """
import json, sys, unittest.mock
import torch, triton
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from vitkernels import _warmup, runtime, warmup
from vitkernels.tools.aot import build
from vitkernels.ops._registry import OPS

class Model(nn.Linear):
    purpose = "first"
    def forward(self, x):
        patch = unittest.mock.patch.object
        with (
            build._named_driver("sm_90", self.purpose),
            patch(runtime, "device_facts", return_value=build.TARGETS["sm_90"].facts),
            patch(FakeTensor, "data_ptr", lambda t: 0),
            patch(triton.JITFunction, "__getitem__", lambda k, grid: lambda **kw: k.run(grid=grid, warmup=True, **kw)),
            FakeTensorMode(),
        ):
            x = torch.empty(x.shape, dtype=torch.bfloat16, device="cuda")
            w = torch.empty(x.shape[-1], dtype=torch.bfloat16, device="cuda")
            OPS["layer_norm_fwd"].launcher(x, None, w, w, None, None, 1e-6, x.dtype)
        return self.weight

heard = []
def listener(**told):
    heard.append(told["metadata"]["name"])
triton.knobs.compilation.listener = listener
model, rows = Model(8, 8), []
with unittest.mock.patch.object(_warmup, "uses_kernels", lambda x: True):
    for shape, purpose in (((64, 768), "first"), ((64, 768), "first"), ((128, 768), "first"), ((64, 768), "again"),
                           ((64, 2048), "again")):
        model.purpose = purpose
        report = warmup(model, shape)
        rows.append([[k.name, k.seconds, k.from_disk] for k in report.kernels] + [report.seconds, str(report)])
assert triton.knobs.compilation.listener is listener
json.dump({"rows": rows, "heard": heard}, sys.stdout)
"""


def test_reports_what_was_compiled_and_compiles_nothing_twice(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", COMPILES], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    told = json.loads(run.stdout)
    kernels = [[(name, from_disk) for name, _, from_disk in row[:-2]] for row in told["rows"]]
    name = "_layer_norm_fwd_kernel"
    # As large a batch has the same kernel, another process finds it on disk, and another width needs its own.
    assert kernels == [[(name, False)], [], [], [(name, True)], [(name, False)]]
    for *compiled, seconds, text in told["rows"]:
        assert 0 <= sum(s for _, s, _ in compiled) <= seconds
        assert text.splitlines()[0].startswith(f"{len(compiled)} kernels made ready in")
    assert told["rows"][0][0][1] > 0.01
    assert told["heard"] == [name] * 3
