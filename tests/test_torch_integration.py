"""What PyTorch does with ops and modules, done to a block on a GPU's kernels, emulated if need be."""

import copy
import functools
import os
import sys

import pytest
import torch
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from vitkernels import ops, reference, use_backend
from vitkernels._intercept import Intercept
from vitkernels.layers import Block
from vitkernels.models import VisionTransformer
from vitkernels.testing import check

KERNELS = "triton" if torch.cuda.is_available() else "emulated"


@pytest.fixture
def block(device):
    return Block(32, 2, qkv_bias=True, init_values=0.5).to(device)


@pytest.fixture
def x(device):
    return torch.randn(2, 5, 32, device=device)


def gradients(function, block, x):
    """The output and the gradients of the input and of every parameter, upstream all ones over the output's size."""
    x = x.detach().requires_grad_()
    y = function(x)
    y.square().mean().backward()
    grads = [x.grad, *(p.grad for p in block.parameters())]
    block.zero_grad(set_to_none=True)
    return [y.detach(), *grads]


def kernels_in(graph: torch.fx.Graph) -> set[str]:
    return {str(n.target).split(".")[1] for n in graph.nodes if str(n.target).startswith("vitkernels.")}


def test_fullgraph_compile_equals_eager(block, x):
    expected = gradients(block, block, x)
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for got, want in zip(gradients(compiled, block, x), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_inductor_compile_equals_eager(block, x):
    expected = gradients(block, block, x)
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True)
    for got, want in zip(gradients(compiled, block, x), expected, strict=True):
        torch.testing.assert_close(got, want)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x.transpose(0, 1)), block(x.transpose(0, 1)))


def test_export_keeps_the_ops(block, x):
    program = torch.export.export(block.eval(), (x,))
    expected = {"layer_norm_fwd", "linear_fwd", "attention_qkvpacked_fwd", "mlp_fwd"}
    got = kernels_in(program.graph)
    assert expected - {"attention_qkvpacked_fwd"} <= got
    assert any(name.startswith("attention") for name in got)
    torch.testing.assert_close(program.module()(x), block(x), rtol=0, atol=0)


def test_export_of_a_model(device):
    model = VisionTransformer(
        img_size=16, patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=5, reg_tokens=2, device=device
    ).eval()
    images = torch.randn(2, 3, 16, 16, device=device)
    program = torch.export.export(model, (images,))
    assert "patch_embed_fwd" in kernels_in(program.graph)
    torch.testing.assert_close(program.module()(images), model(images), rtol=0, atol=0)


SIZES = [(16, 16), (24, 16), (16, 40)]  # the first is the model's own


@pytest.mark.parametrize(
    ("exported", "backend", "strict"),
    [(SIZES[0], KERNELS, False), (SIZES[1], KERNELS, True), (SIZES[0], "torch", True)],
)
def test_export_of_a_model_for_every_size(exported, backend, strict, device):
    """One program, whatever the size it was exported at, the model's own or another one."""
    options = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 5}
    model = VisionTransformer(**options, reg_tokens=2, dynamic_img_size=True, device=device).eval()
    batch, height, width = (torch.export.Dim(name, min=1, max=64) for name in ("batch", "height", "width"))
    with use_backend(backend), torch.no_grad():
        images = torch.randn(2, 3, *exported, device=device)
        shapes = ({0: batch, 2: 8 * height, 3: 8 * width},)
        program = torch.export.export(model, (images,), dynamic_shapes=shapes, strict=strict)
        assert ("patch_embed_fwd" in kernels_in(program.graph)) == (backend != "torch")
        for n, size in enumerate(SIZES, start=1):
            images = torch.randn(n, 3, *size, device=device)
            torch.testing.assert_close(program.module()(images), model(images), rtol=0, atol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"pos_embed": "sincos2d"},
        {"reg_tokens": 2, "no_embed_class": True},
        {"class_token": False, "global_pool": "avg"},
    ],
)
def test_export_of_other_positions_for_every_size(options, device):
    options = {"img_size": (16, 24), "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2} | options
    model = VisionTransformer(**options, dynamic_img_size=True, device=device).eval()
    size = {2: 8 * torch.export.Dim("height", max=64), 3: 8 * torch.export.Dim("width", max=64)}
    with torch.no_grad():
        images = torch.randn(2, 3, 24, 32, device=device)
        program = torch.export.export(model, (images,), dynamic_shapes=(size,))
        for size in ((16, 24), (40, 16)):
            images = torch.randn(2, 3, *size, device=device)
            torch.testing.assert_close(program.module()(images), model(images), rtol=0, atol=0)


def test_a_compiled_model_takes_every_size(device):
    options = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 5}
    model = VisionTransformer(**options, dynamic_img_size=True, device=device).eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for n, size in enumerate([(24, 32), (16, 16), (8, 8)], start=1):
            images = torch.randn(n, 3, *size, device=device)
            torch.testing.assert_close(compiled(images), model(images))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(block, x, reentrant):
    expected = gradients(block, block, x)
    got = gradients(lambda x: checkpoint(block, x, use_reentrant=reentrant), block, x)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_selective_checkpointing_by_op(block, x):
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    seen = []

    def policy(ctx, op, *args, **kwargs):
        seen.append(str(op))
        attention = str(op).startswith("vitkernels.attention")
        return CheckpointPolicy.MUST_SAVE if attention else CheckpointPolicy.PREFER_RECOMPUTE

    expected = gradients(block, block, x)
    got = gradients(
        lambda x: checkpoint(
            block, x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy)
        ),
        block,
        x,
    )
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert any(op.startswith("vitkernels.attention") for op in seen)


def test_inference_mode(block, x):
    expected = block(x).detach()
    with torch.inference_mode():
        y = block(x)
        assert y.is_inference()
        torch.testing.assert_close(y, expected, rtol=0, atol=0)


def test_autocast(block, x, device):
    dtype = torch.bfloat16
    with use_backend("torch"):
        truth_block = copy.deepcopy(block).double()
        truth = gradients(truth_block, truth_block, x.double())

    def run(x):
        with torch.autocast(device.type, dtype=dtype):
            return block(x)

    with use_backend("torch"):
        yardstick = gradients(run, block, x)
    got = gradients(run, block, x)
    names = ["y", "dx", *(f"d{name}" for name, _ in block.named_parameters())]
    for name, actual, torch_got, want in zip(names, got, yardstick, truth, strict=True):
        assert actual.dtype == torch_got.dtype, name
        # The values are of half precision, whatever dtype they are kept in.
        verdict = check(name, actual.to(dtype), torch_got.to(dtype), want, gain_counts=False)
        assert verdict.passed, f"{verdict.name}: {verdict.detail}"


def test_deepcopy_and_pickle(block, x, tmp_path):
    torch.save(block, tmp_path / "block.pt")
    loaded = torch.load(tmp_path / "block.pt", weights_only=False)
    for twin in (copy.deepcopy(block), loaded):
        torch.testing.assert_close(twin(x), block(x), rtol=0, atol=0)


def test_meta_and_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    y = Block(32, 2, device="meta")(torch.empty(2, 10, 32, device="meta"))
    assert (y.device.type, y.shape) == ("meta", (2, 10, 32))
    with FakeTensorMode():  # of a GPU, on any machine
        shapes = (2, 10, 32), (64, 32), (64,), (32, 64)
        x, w1, b1, w2 = (torch.empty(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes)
        y = ops.mlp(ops.layer_norm(x), w1, b1, w2, None)
        assert (y.device.type, y.dtype, y.shape) == ("cuda", torch.bfloat16, (2, 10, 32))


@functools.cache
def opcheck_cases(device):
    """Each registered op with arguments, taken from what a forward and a backward of everything calls."""
    calls = {}

    def record(op, args, kwargs, result):
        if op.namespace == "vitkernels":
            calls.setdefault(op, []).append(
                tree_map(lambda a: a.detach().clone() if isinstance(a, torch.Tensor) else a, args)
            )

    def randn(*shape):
        return torch.randn(*shape, device=device, requires_grad=True)

    with Intercept(saw=record):
        x, w = randn(2, 7, 20), randn(20)
        outputs = [ops.layer_norm(x, w, w), *ops.add_layer_norm(x, x, w, w, layer_scale=w)]
        outputs += [
            ops.linear(x, randn(12, 20), randn(12), activation="gelu"),
            ops.linear(x, randn(20, 20), residual=x),
        ]
        mlp = randn(36, 20), randn(36), randn(20, 36), w
        outputs += [ops.mlp(x, *mlp, residual=x, layer_scale=w)]
        outputs += [ops.mlp(x, *mlp, layer_scale=w, drop_path_scale=randn(2).detach())]
        down, up = randn(4, 20), randn(36, 4)
        outputs += [ops.lora_linear(x, mlp[0], mlp[1], down, up, activation="gelu")]
        outputs += [ops.lora_linear(x, mlp[0], None, down, up, lora_x=randn(2, 7, 20), layer_scale=randn(36))]
        outputs += [ops.lora_mlp(x, *mlp[:3], w, lora1=(down, up), residual=x, layer_scale=w)]
        outputs += [ops.lora_mlp(x, *mlp[:3], None, lora2=(randn(4, 36), randn(20, 4)), recompute=True,
                                 drop_path_scale=randn(2).detach())]  # fmt: skip
        path = randn(2).detach()
        outputs += [ops.block(x, norm1=(w, w), qkv=(randn(60, 20), randn(60)), proj=(randn(20, 20), w), norm2=(w, w),
                              fc1=mlp[:2], fc2=mlp[2:], layer_scale=(w, w), drop_path_scale=(path, path),
                              num_heads=2, scale=0.02)]  # fmt: skip
        outputs += [ops.rms_norm(x, w), *ops.add_rms_norm(x, x, w, layer_scale=w)]
        last = randn(20, 36), w
        outputs += [ops.swiglu_mlp(x, randn(72, 20), randn(72), *last, residual=x, layer_scale=w)]
        outputs += [ops.swiglu_mlp(x, (randn(36, 20), randn(36, 20)), None, *last, norm=(randn(36), randn(36), 1e-3),
                                   gate_last=True, recompute=True)]  # fmt: skip
        outputs += [ops.attention(*(randn(2, 2, 5, 16) for _ in range(3)))]
        outputs += [ops.attention_qkvpacked(randn(2, 5, 3, 2, 16))]
        outputs += [ops.attention(*(randn(2, 2, 5, 16) for _ in range(3)), key_bias=randn(2, 5))]
        outputs += [ops.attention_qkvpacked(randn(2, 5, 3, 2, 16), key_bias=randn(2, 5))]
        prepared = {"rope": (randn(5, 16).detach(), randn(5, 16).detach(), True), "q_norm": (randn(16),)}
        outputs += [ops.attention_qkvpacked(randn(2, 5, 3, 2, 16), attn_mask=randn(2, 5, 5), **prepared)]
        outputs += [ops.attention(*(randn(2, 2, 5, 16) for _ in range(3)), **prepared)]
        outputs += [ops.patch_embed(randn(2, 3, 12, 8), randn(36, 3, 4, 4), randn(36), pos_embed=randn(1, 6, 36),
                                    pos_embed_prefix=False, prefix_tokens=randn(1, 1, 36))]  # fmt: skip
        outputs += [ops.patch_merging(randn(2, 5, 4, 6), randn(12, 24), norm_weight=randn(24), norm_bias=randn(24))]
        patches = torch.arange(12, device=device).view(2, 6)
        for more in (
            {"mask": patches % 5 == 0, "mask_token": randn(36)},
            {"visible": patches[:, :4] % 6},
        ):
            outputs += [ops.patch_embed(randn(2, 3, 12, 8), randn(36, 3, 4, 4), pos_embed=randn(6, 36), **more)]
        torch.autograd.backward(outputs, [torch.ones_like(o) for o in outputs])
        with torch.no_grad():
            ops.mlp(x, randn(36, 20), None, randn(20, 36), None, drop_path_scale=randn(2).detach())
            ops.swiglu_mlp(x, randn(72, 20), randn(72), *last, layer_scale=w, residual=x)
            ops.swiglu_mlp(x, (randn(36, 20), randn(36, 20)), None, randn(20, 36), None, norm=(randn(36), None, 1e-3))
            with torch.autocast(device.type, torch.bfloat16):
                ops.linear(x, randn(12, 20), randn(12))
    return calls


def test_registered_ops_without_kernels_agree(device):
    """A graph exported with the ops in it runs on a machine without Triton: the CPU implementations agree."""
    registry = sys.modules["vitkernels.ops._registry"]
    for op, argument_lists in opcheck_cases(device).items():
        function = registry.OPS[op.name().split("::")[1]].reference
        for args in argument_lists:
            got = op(*args)
            want = function(*args)
            got, want = ((r,) if isinstance(r, torch.Tensor) else r for r in (got, want))
            for g, w in zip(got, want, strict=True):
                assert (g.shape, g.stride(), g.dtype) == (w.shape, w.stride(), w.dtype), op
                torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4, msg=lambda m, op=op: f"{op}: {m}")


def test_opcheck(device):
    calls = opcheck_cases(device)
    registered = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("vitkernels::")
    }
    elsewhere = {"rows_fp8", "product_fp8"}  # tests/ops/test_fp8.py
    windows = ("window_attention", "decomposed_attention")
    elsewhere |= {f"{op}_{direction}" for op in windows for direction in ("fwd", "bwd")}  # verify's integration checks
    assert {f.name().split("::")[1] for f in calls} == registered - elsewhere, "an op is never called here"
    for op, argument_lists in calls.items():
        for args in argument_lists[:1] + argument_lists[1:][-1:]:  # the first and the last: each takes half a second
            torch.library.opcheck(op, args)


def test_backend_is_chosen_by_thread_and_checked(x, monkeypatch):
    import threading

    assert ops.uses_kernels(x)
    seen = []
    with use_backend("torch"):
        assert not ops.uses_kernels(x)
        thread = threading.Thread(target=lambda: seen.append(ops.uses_kernels(x)))
        thread.start()
        thread.join()
    assert seen == [True]
    monkeypatch.setenv("VITKERNELS_BACKEND", "torch")
    assert not ops.uses_kernels(x)
    monkeypatch.setenv("VITKERNELS_BACKEND", "cuda")
    with pytest.raises(ValueError, match=r"VITKERNELS_BACKEND is 'cuda'; expected one of auto, triton, emulated, "):
        ops.uses_kernels(x)
    with pytest.raises(ValueError, match="unknown backend 'cuda'"), use_backend("cuda"):
        pass
    monkeypatch.setattr(os, "environ", {"VITKERNELS_BACKEND": "torch"})  # keeps no dict of encoded names
    assert not ops.uses_kernels(x)
    monkeypatch.setattr(os, "environ", {})
    assert ops.uses_kernels(x) == x.is_cuda


def test_compiled_ops_follow_the_environment(x, monkeypatch):
    linear = torch.compile(lambda x: ops.linear(x, x[0]), fullgraph=True, backend="eager")
    ours = linear(x)
    monkeypatch.setattr(reference, "linear", lambda *args, **options: args[0] * 0)
    monkeypatch.setenv("VITKERNELS_BACKEND", "torch")
    assert linear(x).count_nonzero() == 0
    monkeypatch.setenv("VITKERNELS_BACKEND", KERNELS)
    torch.testing.assert_close(linear(x), ours)


def test_contiguous_results_on_either_backend(device):
    x, w = torch.randn(2, 7, 20, device=device), torch.randn(20, 20, device=device)
    strided = torch.randn(7, 2, 20, device=device).transpose(0, 1)
    images = torch.randn(2, 3, 12, 8, device=device)
    for name in (KERNELS, "torch"):
        with use_backend(name):
            results = [
                ops.linear(x, w, residual=strided),
                ops.mlp(x, w, None, w, None, residual=strided),
                *ops.add_layer_norm(x, strided),
                ops.patch_embed(images, torch.randn(36, 3, 4, 4, device=device)),
            ]
        assert all(r.is_contiguous() for r in results), name


def test_eight_threads(device):
    from concurrent.futures import ThreadPoolExecutor

    x, w = torch.randn(14, 20, device=device), torch.randn(12, 20, device=device)
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: ops.linear(x, w, activation="gelu"), range(8)))
    for result in results:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0)
    torch.testing.assert_close(results[0], reference.linear(x, w, activation="gelu"), rtol=1e-3, atol=1e-3)


def test_tf32_by_either_api(device, monkeypatch):
    from vitkernels import runtime

    assert runtime.dot_precision(device) == "ieee"
    try:
        for value in ("tf32", "ieee"):
            torch.backends.cuda.matmul.fp32_precision = value
            assert runtime.dot_precision(device) == value
            ops.linear(torch.randn(2, 8, device=device), torch.randn(4, 8, device=device))
        torch.set_float32_matmul_precision("high")
        assert runtime.dot_precision(device) == "tf32"
        facts = runtime.DeviceFacts("MI250", "gfx90a", 104, 64 << 10)
        monkeypatch.setattr(runtime, "device_facts", lambda device: facts)
        assert runtime.dot_precision(device) == "ieee", "the chip has no TF32"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("init_values", [None, 1.0])
def test_drop_path_under_autocast_keeps_its_scale(init_values, device):
    """1 / 0.9 rounded to bf16 would scale every kept branch by 0.998."""
    block = Block(32, 2, drop_path=0.1, init_values=init_values).to(device).train()
    with torch.no_grad():  # the first branch is a constant vector
        for p in block.parameters():
            p.zero_()
        block.attn.proj.bias.fill_(1.0)
        if init_values:
            block.ls1.gamma.fill_(1.0)
    x = torch.zeros(5, 2, 32, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        got = set(block(x).flatten().tolist())
    rounded = torch.tensor(1 / 0.9, dtype=torch.float32 if init_values else torch.bfloat16).item()
    assert got <= {0.0, rounded} and rounded in got
