"""Hostile inputs 18 to 31: images, dtypes, devices and kinds of tensors."""

import dataclasses
import warnings

import pytest
import torch
import torch.nn.functional as F
from op_calls import OPS, WINDOWS, call, each_op, needs_two_gpus, parameters, tiny_model
from torch._subclasses.fake_tensor import FakeTensorMode

from vitkernels import ops, runtime, use_backend

hostile = pytest.mark.hostile
RIGHT = "the right result"


@hostile(18, "a height or width that is no multiple of the patch", "`ValueError`")
@each_op(["patch_embed"])
@pytest.mark.parametrize(("Y", "X"), [(7, 12), (8, 13), (2, 12)])
def test_images_that_do_not_divide(op, Y, X, no_launch, device):
    images = torch.zeros(2, 3, Y, X, device=device)
    with pytest.raises(ValueError, match=f"{op}: images of {Y}×{X} pixels .* patches of 4×4; expected .* multiple"):
        call(op, device=device).changed(images=images, pos_embed=None)()
    with pytest.raises(ValueError, match=f"{Y}×{X}.*expected"):
        tiny_model(device)(images)


@hostile(19, "images of another number of channels than the weight's", "`ValueError`")
@each_op(["patch_embed"])
@pytest.mark.parametrize("channels", [1, 4])
def test_other_image_channels(op, channels, no_launch, device):
    with pytest.raises(ValueError, match=f"{op}: images have {channels} channels; expected 3, the weight's"):
        call(op, device=device).changed(images=torch.zeros(2, channels, 8, 12, device=device))()
    with pytest.raises(ValueError, match=f"images have {channels} channels; expected 3"):
        tiny_model(device)(torch.zeros(2, channels, 16, 16, device=device))


@hostile(20, "uint8 images", "`TypeError` that names `normalize`")
@each_op(["patch_embed"])
def test_uint8_images(op, no_launch, device):
    images = torch.zeros(2, 3, 8, 12, dtype=torch.uint8, device=device)
    wanted = r"torch.uint8; expected .*normalize=\(mean, std\)"
    with pytest.raises(TypeError, match=wanted):
        call(op, device=device).changed(images=images)()
    with pytest.raises(TypeError, match=wanted):
        tiny_model(device)(torch.zeros(2, 3, 16, 16, dtype=torch.uint8, device=device))


def refused_in_every_place(op, dtype, device):
    made = call(op, device=device)
    for name, t in made.tensors.items():
        with pytest.raises(TypeError, match=f"{op}: .*{dtype}.*; expected"):
            made.changed(**{name: torch.zeros(t.shape, device=device).to(dtype)})()


@hostile(21, "integers, booleans or complex numbers as any tensor", "`TypeError`")
@each_op()
@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64], ids=str)
def test_no_floating_point(op, dtype, no_launch, device):
    refused_in_every_place(op, dtype, device)


@hostile(22, "fp64", RIGHT)
@each_op(
    [
        *("add_layer_norm", "add_rms_norm", "swiglu_mlp", "attention_varlen"),
        *(*WINDOWS, "patch_merging", "block", "patch_embed"),
    ]
)
def test_fp64(op, device):
    made = call(op, dtype=torch.float64, device=device)
    expected = made.op.reference(**made.tensors, **made.options)
    for y, want in zip(made.outputs(), expected if isinstance(expected, tuple) else (expected,), strict=True):
        torch.testing.assert_close(y, want, rtol=1e-13, atol=1e-13)  # a rounding to fp32 anywhere would show as 1e-8


@hostile(23, "fp8 as any tensor", "`TypeError`")
@each_op()
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_fp8(op, dtype, no_launch, device):
    refused_in_every_place(op, dtype, device)


NORMS = {n for n in OPS if n.endswith("norm")}


@hostile(
    24,
    "x and weight of different dtypes",
    "PyTorch's rule: norms take fp32 weights beside half inputs, as LoRA does; sums the widest dtype; windows take any "
    "table and padding; else `TypeError`",
)
@pytest.mark.parametrize(
    ("op", "x_dtype", "weight_dtype"),
    [
        *((op, torch.bfloat16, torch.float32) for op in OPS if parameters(op)),
        ("add_layer_norm", torch.float16, torch.float32),
        ("linear", torch.float32, torch.bfloat16),
        ("add_rms_norm", torch.float16, torch.bfloat16),
        ("mlp", torch.float64, torch.float32),
    ],
    ids=str,
)
def test_mixed_dtypes(op, x_dtype, weight_dtype, device, request):
    if (op, x_dtype) != ("add_layer_norm", torch.bfloat16):  # all norms have its kernels, the rest is decided before
        request.getfixturevalue("computed_by_pytorch")
    made = call(op, dtype=x_dtype, device=device, grad=False)
    for name in parameters(op):
        mixed = made.map(lambda t: t.to(weight_dtype), [name])
        may_be_wider = op in NORMS or name.startswith(("norm", "lora"))
        beside_half = x_dtype.itemsize == 2 and weight_dtype == torch.float32
        if name.startswith(("drop_path", "layer_scale", "gamma")):
            assert mixed.outputs()[0].dtype == torch.promote_types(x_dtype, weight_dtype), name
        elif op in WINDOWS:
            assert mixed.outputs()[0].dtype == x_dtype, name
        elif may_be_wider and beside_half:
            for y, want in zip(mixed.outputs(), made.outputs(), strict=True):
                assert torch.equal(y, want), f"{name} holds the same numbers in fp32"
        else:
            with pytest.raises(TypeError, match=f"{op}: .*expected .*"):
                mixed()


@hostile(25, "one tensor on another device than the others", "`ValueError`")
@each_op()
def test_one_tensor_elsewhere(op, no_launch, device):
    made = call(op, device=device)
    for name, t in list(made.tensors.items())[1:]:
        with pytest.raises(ValueError, match=rf"{op}: .* is on meta, .* on {device}.*; expected one"):
            made.changed(**{name: t.detach().to("meta")})()


@hostile(26, "tensors of the CPU, with PyTorch as the backend", "the right result, bit for bit PyTorch's")
@each_op()
def test_cpu_tensors(op):
    made = call(op)
    with use_backend("torch"):
        outputs = made.outputs()
        made.check()
    expected = made.op.reference(**made.tensors, **made.options)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for y, want in zip(outputs, expected, strict=True):
        assert torch.equal(y, want)


def plain_norms(x, residual, weight, bias, layer_scale):
    """Each op that takes fp32 weights of a norm beside half inputs, and the same in PyTorch's own words."""
    C = x.shape[-1]
    total = residual + x * layer_scale
    half = {n: (0.2 * torch.randn(s)).to(x.dtype) for n, s in (("3C", (3 * C, C)), ("C", (C, C)), ("2C", (2 * C, C)))}
    q, k, v = F.linear(x, half["3C"]).unflatten(-1, (3, 2, C // 2)).permute(2, 0, 3, 1, 4)
    q_weight, k_weight = weight[: C // 2], bias[: C // 2]
    norm = (weight, bias)

    def block():
        h = F.linear(F.layer_norm(x, (C,), *norm, 1e-6), half["3C"])
        h = F.scaled_dot_product_attention(*h.unflatten(-1, (3, 2, C // 2)).permute(2, 0, 3, 1, 4))
        r = x + F.linear(h.transpose(1, 2).flatten(2), half["C"])
        return r + F.linear(F.gelu(F.linear(F.layer_norm(r, (C,), *norm, 1e-6), half["C"])), half["C"])

    def swiglu():
        gate, value = F.linear(x, half["2C"]).chunk(2, -1)
        return F.linear(F.layer_norm(F.silu(gate) * value, (C,), *norm, 1e-6), half["C"])

    def attention():
        prepared = F.layer_norm(q, (C // 2,), q_weight, None, 1e-6), F.rms_norm(k, (C // 2,), k_weight, 1e-6)
        return F.scaled_dot_product_attention(*prepared, v)

    weights = {"qkv": (half["3C"], None), "proj": (half["C"], None), "fc1": (half["C"], None), "fc2": (half["C"], None)}
    return {
        "layer_norm": (lambda: ops.layer_norm(x, *norm), lambda: F.layer_norm(x, (C,), *norm, 1e-6)),
        "no bias": (lambda: ops.layer_norm(x, weight), lambda: F.layer_norm(x, (C,), weight, None, 1e-6)),
        "rms_norm": (lambda: ops.rms_norm(x, weight), lambda: F.rms_norm(x, (C,), weight, 1e-6)),
        "add_layer_norm": (
            lambda: ops.add_layer_norm(x, residual, *norm, layer_scale=layer_scale)[0],
            lambda: F.layer_norm(total, (C,), *norm, 1e-6),
        ),
        "add_rms_norm": (
            lambda: ops.add_rms_norm(x, residual, weight, layer_scale=layer_scale)[0],
            lambda: F.rms_norm(total, (C,), weight, 1e-6),
        ),
        "block": (lambda: ops.block(x, norm1=norm, norm2=norm, **weights, num_heads=2), block),
        "swiglu_mlp": (
            lambda: ops.swiglu_mlp(x, half["2C"], None, half["C"], None, norm=(*norm, 1e-6)), swiglu
        ),
        "attention": (
            lambda: ops.attention(q, k, v, q_norm=(q_weight, None, 1e-6), k_norm=(k_weight, None, 1e-6, True)),
            attention,
        ),
    }  # fmt: skip


@hostile(26, "half inputs of the CPU beside fp32 weights of a norm, with PyTorch as the backend", "PyTorch's bits")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # PyTorch's, of its own RMSNorm
def test_cpu_tensors_of_half_precision(dtype):
    leaves = [torch.randn(2, 9, 32).to(dtype), torch.randn(2, 9, 32).to(dtype), torch.randn(32), torch.randn(32)]
    leaves = [t.requires_grad_() for t in (*leaves, torch.randn(32).to(dtype))]
    with use_backend("torch"):
        for name, (ours, plain) in plain_norms(*leaves).items():
            results = []
            for function in (ours, plain):
                y = function()
                grads = torch.autograd.grad(y.float().sin().sum(), leaves, allow_unused=True, retain_graph=True)
                results.append((y, *(g for g in grads if g is not None)))
            for got, want in zip(*results, strict=True):
                assert got.dtype == want.dtype and torch.equal(got, want), name


@hostile(26, "an fp32 weight of a norm beside a half bias and half inputs", "the right result; PyTorch takes no such")
def test_half_bias_beside_an_fp32_weight():
    x, weight, bias = torch.randn(9, 32).half(), torch.randn(32), torch.randn(32).half()
    with use_backend("torch"):
        y = ops.layer_norm(x, weight, bias)
    assert torch.equal(y, F.layer_norm(x, (32,), weight, bias.float(), 1e-6))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_fp32_bias_without_a_weight_has_gradients(dtype):
    """PyTorch's own backward raises there."""
    x, bias = torch.randn(9, 32, dtype=dtype, requires_grad=True), torch.randn(32, requires_grad=True)
    with use_backend("torch"):
        y = ops.layer_norm(x, None, bias)
    dx, dbias = torch.autograd.grad(y, (x, bias), torch.ones_like(y))
    assert torch.equal(y, F.layer_norm(x, (32,), torch.ones(32), bias, 1e-6))
    assert (dx.dtype, dbias.dtype) == (dtype, torch.float32) and torch.equal(dbias, torch.full((32,), 9.0))


@hostile(26, "tensors of the CPU, with no backend chosen", RIGHT)
@each_op()
def test_cpu_tensors_on_no_chosen_backend(op, monkeypatch, no_launch):
    monkeypatch.delenv("VITKERNELS_BACKEND", raising=False)
    call(op).check()


@hostile(
    26,
    "tensors of the CPU, with the kernels asked for and no GPU emulated",
    "`RuntimeError` that names `VITKERNELS_BACKEND=emulated`",
)
@each_op()
def test_kernels_asked_for_on_a_cpu(op, no_launch):
    with use_backend("triton"), pytest.raises(RuntimeError, match="VITKERNELS_BACKEND=emulated"):
        call(op)()


@hostile(27, "tensors of cuda:1 while cuda:0 is current", RIGHT)
@needs_two_gpus
@each_op()
def test_second_gpu(op):
    with torch.cuda.device(0):
        made = call(op, device="cuda:1")
        made.check()
        assert all(y.device.index == 1 for y in made.outputs())
        assert torch.cuda.current_device() == 0


@hostile(27, "tensors of cuda:1: the launch makes it the current device", RIGHT)
def test_launches_go_to_the_tensors_device(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "device", chosen.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        runtime.device_guard(torch.empty(1, device="cuda:1"))
    assert chosen == [torch.device("cuda:1")]


@hostile(28, "tensors on meta", "the right shapes, strides and dtypes, of gradients too")
@each_op()
def test_meta(op, device):
    for got, want in zip(run(call(op, device="meta")), run(call(op, device=device)), strict=True):
        assert (got.shape, got.dtype, got.stride(), got.device.type) == (want.shape, want.dtype, want.stride(), "meta")


def run(made) -> list[torch.Tensor]:
    outputs = made.outputs()
    leaves = [t for t in made.tensors.values() if t.requires_grad]
    return [*outputs, *torch.autograd.grad(outputs, leaves, [torch.ones_like(y) for y in outputs])]


@hostile(28, "a model on meta", "the right shape")
def test_meta_model(no_launch):
    assert tiny_model("meta")(torch.empty(2, 3, 16, 16, device="meta")).shape == (2, 3)


@hostile(29, "fake tensors", "the right shapes, strides and dtypes, of gradients too")
@each_op()
def test_fake(op, device):
    real = run(call(op, device=device))
    with FakeTensorMode():
        fake = run(call(op, device=device))
    for got, want in zip(fake, real, strict=True):
        assert (got.shape, got.dtype, got.stride(), got.device.type) == (
            want.shape,
            want.dtype,
            want.stride(),
            device.type,
        )


@hostile(29, "fake tensors of a GPU, where there may be none", "the right shapes, strides and dtypes")
@each_op(n for n in OPS if n != "attention_varlen")  # whose views of fake tensors need a CUDA build of PyTorch
def test_fake_of_a_gpu(op, device, monkeypatch):
    facts = runtime.DeviceFacts("h200", "sm_90", 132, 227 << 10)  # what its driver would tell
    monkeypatch.setattr(runtime, "device_facts", lambda device: facts)
    made = call(op, device=device, grad=False)

    def on_a_gpu(t):
        return torch.empty(t.shape, dtype=t.dtype, device="cuda") if isinstance(t, torch.Tensor) else t

    with FakeTensorMode():
        tensors, options = ({n: on_a_gpu(t) for n, t in given.items()} for given in (made.tensors, made.options))
        fake = dataclasses.replace(made, tensors=tensors, options=options).outputs()
    for got, want in zip(fake, made.outputs(), strict=True):
        assert (got.shape, got.dtype, got.stride(), got.device.type) == (want.shape, want.dtype, want.stride(), "cuda")


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    dist = torch.distributed
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this build of PyTorch has no gloo")
    store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@hostile(30, "a DTensor as any tensor", "`TypeError` that names `parallelize` and `local_map`")
@each_op()
def test_dtensor(op, mesh, no_launch):
    from torch.distributed.tensor import DTensor, Replicate

    made = call(op)
    for name, t in made.tensors.items():
        sharded = DTensor.from_local(t.detach(), mesh, [Replicate()])
        with pytest.raises(TypeError, match=f"{op}: .* is a DTensor; .*vitkernels.parallelize.*local_map"):
            made.changed(**{name: sharded})()


def nested(t):
    return torch.nested.nested_tensor([t.detach(), t.detach()])


def jagged(t):
    return torch.nested.nested_tensor([t.detach(), t.detach()], layout=torch.jagged)


def sparse(t):
    return t.detach().to_sparse()


def quantized(t):
    return torch.quantize_per_tensor(t.detach(), 0.1, 0, torch.qint8)


@hostile(
    31, "a nested, sparse or quantized tensor as any tensor", "`NotImplementedError`, or `TypeError` for quantized"
)
@each_op()
@pytest.mark.parametrize("kind", [nested, jagged, sparse, quantized], ids=lambda kind: kind.__name__)
@pytest.mark.filterwarnings("ignore:.*(nested tensors|quantize_per_tensor|quantized).*")
def test_tensors_that_are_not_dense(op, kind, no_launch):
    made = call(op)
    for name, t in made.tensors.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            hostile_one = kind(t)
        with pytest.raises((NotImplementedError, TypeError), match=f"{op}: .*; expected"):
            made.changed(**{name: hostile_one})()
