"""The products for Hopper against fp64: epilogues, both ways of working, tails, layouts, plans, what is chosen."""

import dataclasses
import functools
import warnings

import pytest
import torch
from drawn import drawn

pytest.importorskip("triton.experimental.gluon", reason="the kernels are written in Gluon")

from vitkernels import ops, reference, runtime
from vitkernels.ops import _plan, _product, _product_hopper, _triton
from vitkernels.ops._attention import forward_hopper
from vitkernels.ops._plan import Plans
from vitkernels.ops._product import product, product_dact
from vitkernels.ops._product_config import HOPPER, ProductConfig, choose_config
from vitkernels.runtime import DeviceFacts
from vitkernels.testing import check_op
from vitkernels.testing.compare import check

H100 = DeviceFacts("h100", "sm_90", 132, 227 << 10)
HALVES = [torch.float16, torch.bfloat16]
ACTIVATIONS = [None, *reference.ACTIVATIONS]


@pytest.fixture
def taken(monkeypatch, device):
    """Let the kernels for Hopper compute all they can, in few programs of several tiles; list what they compute."""
    few = dataclasses.replace(runtime.device_facts(device), num_sms=2)
    if few.arch != "sm_90":
        pytest.skip("the kernels are for sm_90")
    taken = []

    def choose(M, N, K, dtype, *, kind, facts, tma=False):
        config = choose_config(M, N, K, dtype, kind=kind, facts=facts, tma=tma)
        if not tma or kind == "plain":
            return config
        taken.append(kind)
        return ProductConfig(**HOPPER[width if kind == "epilogue" else 128])

    width = 128
    monkeypatch.setattr(runtime, "device_facts", lambda device: few)
    monkeypatch.setattr(_product, "choose_config", choose)

    def wide(columns):
        nonlocal width
        width = columns
        return taken

    return wide


def make(*shape, dtype, device, scale=1.0, grad=True):
    return (scale * torch.randn(*shape, dtype=torch.float64)).to(device, dtype).requires_grad_(grad)


def layers(M, C, F, *, dtype, device, residual=None):
    return {
        "x": make(M, C, dtype=dtype, device=device),
        "w1": make(F, C, dtype=dtype, device=device, scale=C**-0.5),
        "b1": make(F, dtype=dtype, device=device),
        "w2": make(C, F, dtype=dtype, device=device, scale=F**-0.5),
        "b2": make(C, dtype=dtype, device=device),
        "residual": make(M, C, dtype=residual or dtype, device=device),
        "layer_scale": make(C, dtype=dtype, device=device),
    }


@pytest.mark.parametrize(
    ("M", "width", "activation", "dtype"),
    drawn(8, [197, 257, 577], [128, 256], ACTIVATIONS, HALVES),
    ids=str,
)
def test_mlp(M, width, activation, dtype, device, taken):
    """Forward and backward at tails of M, N and K: fc1, fc2 with its residual, and the gradient between them."""
    kinds = taken(width)
    check_op(ops.mlp, reference.mlp, layers(M, 72, 328, dtype=dtype, device=device), options={"activation": activation})
    assert kinds == ["epilogue", "epilogue", "dact"]


@pytest.mark.parametrize(("width", "recompute"), [(128, False), (256, True)])
def test_drop_path(width, recompute, device, taken):
    kinds = taken(width)
    tensors = layers(2 * 133, 72, 136, dtype=torch.bfloat16, device=device)
    tensors |= {name: tensors[name].detach().view(2, 133, 72).requires_grad_() for name in ("x", "residual")}
    tensors["drop_path_scale"] = torch.tensor([1.25, 0.0], device=device).bfloat16()
    check_op(functools.partial(ops.mlp, recompute=recompute), reference.mlp, tensors)
    assert kinds == ["epilogue", "epilogue", "dact"]


@pytest.mark.parametrize(
    ("width", "rank", "dtype"),
    [(128, 8, torch.bfloat16), (256, 72, torch.bfloat16), (128, 64, torch.float16), (256, 12, torch.float16)],
    ids=str,
)
def test_lora(width, rank, dtype, device, taken):
    """The update's tiles follow the operands' through the ring, with tails of K and of the rank."""
    kinds = taken(width)
    tensors = layers(133, 72, 136, dtype=dtype, device=device)
    for i, (K, N) in enumerate(((72, 136), (136, 72)), start=1):
        tensors[f"a{i}"] = make(rank, K, dtype=dtype, device=device, scale=K**-0.5)
        tensors[f"up{i}"] = make(N, rank, dtype=dtype, device=device, scale=rank**-0.5)

    def call(function, a1, up1, a2, up2, **others):
        return function(**others, lora1=(a1, up1), lora2=(a2, up2))

    check_op(functools.partial(call, ops.lora_mlp), functools.partial(call, reference.lora_mlp), tensors)
    assert kinds == ([] if rank == 12 else ["epilogue", "epilogue", "dact", "epilogue"])


@pytest.mark.parametrize("width", [128, 256])
def test_1025_rows(width, device, taken):
    taken(width)
    check_op(ops.mlp, reference.mlp, layers(1025, 8, 136, dtype=torch.bfloat16, device=device))


@pytest.mark.parametrize("recompute", [False, True])
def test_recomputation(recompute, device, taken):
    taken(128)
    tensors = layers(130, 40, 136, dtype=torch.bfloat16, device=device)
    check_op(functools.partial(ops.mlp, recompute=recompute), reference.mlp, tensors)


@pytest.mark.parametrize("width", [128, 256])
def test_a_residual_in_fp32(width, device, taken):
    kinds = taken(width)
    tensors = layers(140, 72, 136, dtype=torch.bfloat16, device=device, residual=torch.float32)
    check_op(ops.mlp, reference.mlp, tensors)
    assert kinds == ["epilogue", "epilogue", "dact"]


@pytest.mark.parametrize(
    ("width", "given", "dtype"),
    drawn(6, [128, 256], [(), ("alpha",), ("bias", "residual"), ("alpha", "bias", "gamma", "residual")], HALVES),
    ids=str,
)
@pytest.mark.parametrize("by_rows", [False, True])
def test_every_epilogue_of_both_layouts(width, given, dtype, by_rows, device, taken):
    """All steps at once, and few: more than one op of the library takes together."""
    kinds = taken(width)
    M, N, K = 260, 264, 200
    a, b = make(M, K, dtype=dtype, device=device, grad=False), make(N, K, dtype=dtype, device=device, grad=False)
    b = b.t().contiguous() if by_rows else b.t()
    shapes = {"alpha": (1,), "bias": (N,), "gamma": (N,), "residual": (M, N)}
    extra = {name: make(*shapes[name], dtype=dtype, device=device, grad=False) for name in given}
    with emulated(device):
        y, z = product(a, b, activation="silu", save_z=True, **extra)

    def want(double):
        wide = torch.float64 if double else torch.float32
        more = {name: t.to(wide) for name, t in extra.items()}
        z = a.to(wide) @ b.to(wide) * more.get("alpha", 1.0) + more.get("bias", 0.0)
        return torch.nn.functional.silu(z) * more.get("gamma", 1.0) + more.get("residual", 0.0), z

    for name, got, yardstick, truth in zip("yz", (y, z), want(False), want(True), strict=True):
        verdict = check(name, got, yardstick.to(dtype), truth)
        assert verdict.passed, verdict.detail
    assert kinds == ["epilogue"]


def emulated(device):
    """Where there is no GPU, emulate one: the launchers here are called without the op around them."""
    if device.type == "cuda":
        return torch.cuda.device(device)
    from vitkernels.emulator.launch import emulating

    return emulating("sm_90")


@pytest.mark.parametrize("width", [128, 256])
def test_nan_stays_in_its_row_and_reruns_are_equal(width, device, taken):
    taken(width)
    a, b = (make(*s, dtype=torch.bfloat16, device=device, grad=False) for s in ((300, 136), (136, 136)))
    a[140] = float("nan")
    with emulated(device):
        (y, z), again = (product(a, b, activation="gelu", save_z=True) for _ in range(2))
        dz, act, sums = product_dact(a, b, torch.ones_like(z), "gelu", alpha=None, save_act=True, sum_dz=True)
        repeated = product_dact(a, b, torch.ones_like(z), "gelu", alpha=None, save_act=True, sum_dz=True)
    for t in (y, z, dz):
        rows = t.isnan().any(1).nonzero().flatten().tolist()
        assert rows == [140] and t[140].isnan().all()
    assert sums.isnan().all() and not act.isnan().any()
    for first, second in zip((y, z, dz, act), (*again, *repeated), strict=False):
        assert torch.equal(first.nan_to_num(7.0), second.nan_to_num(7.0))


def test_no_rows(device, taken):
    taken(128)
    tensors = layers(0, 24, 40, dtype=torch.bfloat16, device=device)
    ops.mlp(**tensors).sum().backward()
    assert torch.equal(tensors["w1"].grad, torch.zeros_like(tensors["w1"]))


BASE = {"M": 40, "N": 24, "K": 16}
UNSUITED = {
    "dtype": lambda a, b: (a.float(), b.float()),
    "a's rows": lambda a, b: (a.repeat(1, 2)[:, 4:20], b),  # begin 8 bytes off
    "a transposed": lambda a, b: (a.t().contiguous().t(), b),
    "a expanded": lambda a, b: (a[:1].expand(40, 16), b),
    "stride of b": lambda a, b: (a, b.t().repeat(1, 2)[:, :20].contiguous()[:, :16].t()),
    "columns": lambda a, b: (a, b[:, :20]),
}


@pytest.mark.parametrize("how", UNSUITED)
def test_others_are_left_to_triton(how, device, taken):
    kinds = taken(128)
    a, b = torch.randn(40, 16).bfloat16().to(device), torch.randn(24, 16).bfloat16().to(device).t()
    assert _product_hopper.suits(a, b, a.dtype, None, True)
    a, b = UNSUITED[how](a, b)
    assert not _product_hopper.suits(a, b, a.dtype, None, True)
    with emulated(device):
        y, _ = product(a, b, activation="silu")
    yardstick, truth = (torch.nn.functional.silu(a.to(wide) @ b.to(wide)) for wide in (torch.float32, torch.float64))
    verdict = check("y", y, yardstick.to(y.dtype), truth)
    assert verdict.passed, verdict.detail
    assert kinds == []


def test_a_residual_that_does_not_suit():
    a, b = torch.zeros(40, 16).bfloat16(), torch.zeros(16, 24).bfloat16()
    fits = torch.zeros(40, 24).bfloat16()
    assert _product_hopper.suits(a, b, a.dtype, fits, True)
    assert not _product_hopper.suits(a, b, torch.float32, fits, False)
    assert not _product_hopper.suits(a, b, a.dtype, torch.zeros(40, 28).bfloat16()[:, 4:], False)
    assert _product_hopper.suits(a, b, torch.float32, fits.float(), False)
    assert not _product_hopper.suits(a, b, torch.float32, fits.float(), True)


def test_plans_repeat_a_launch_on_other_tensors(device, taken):
    """A plan describes the tensors of its call, not of the call that it was recorded from; it keeps none alive."""
    kinds = taken(128)
    plans = Plans(
        lambda x, w, residual: torch.ops.vitkernels.linear_fwd(x, w, None, None, residual, "gelu", None, True)
    )
    makes = [
        [make(*s, dtype=torch.bfloat16, device=device, grad=False) for s in ((136, 72), (40, 72), (136, 40))]
        for _ in range(3)
    ]
    with emulated(device):
        got = [plans("here", *tensors) for tensors in makes]
        (plan,) = plans._plans.values()
        assert plan.source.count("_product_hopper_kernel") == 1 and plan.source.count("tile") == 5
        assert kinds == ["epilogue"] * 2
        for tensors, (y, z) in zip(makes, got, strict=True):
            want = torch.ops.vitkernels.linear_fwd(*tensors[:2], None, None, tensors[2], "gelu", None, True)
            assert torch.equal(y, want[0]) and torch.equal(z, want[1])


def test_who_multiplies():
    def chosen(M, N, K, kind, tma=True, facts=H100):
        config = choose_config(M, N, K, torch.bfloat16, kind=kind, facts=facts, tma=tma)
        return config.provider, config.block_n

    fc1, fc2 = (50_432, 3072, 768), (50_432, 768, 3072)
    assert chosen(*fc1, "epilogue") == chosen(*fc1, "dact") == ("gluon", 128)
    assert chosen(*fc2, "epilogue") == ("gluon", 256)
    assert chosen(*fc1, "plain")[0] == "torch"
    assert chosen(*fc1, "epilogue", tma=False) == ("triton", 128)
    assert chosen(197, 768, 768, "epilogue") == ("triton", 64)
    for arch in ("sm_80", "sm_100", "sm_120"):
        assert chosen(*fc1, "epilogue", facts=dataclasses.replace(H100, arch=arch))[0] == "triton"


def test_a_table_may_choose(monkeypatch):
    from vitkernels import tuning

    rows = {"epilogue": {"provider": "gluon", "block_n": 256, "parts": 8}, "dact": {"provider": "triton"}}
    monkeypatch.setattr(tuning, "lookup", lambda op, device, key: rows[key.rpartition(",")[2]])
    sizes = (50_432, 3072, 768, torch.bfloat16)
    assert choose_config(*sizes, kind="epilogue", facts=H100, tma=True) == ProductConfig(**HOPPER[256])
    assert choose_config(*sizes, kind="epilogue", facts=H100, tma=False).provider == "triton"
    dact = choose_config(*sizes, kind="dact", facts=H100, tma=True)
    assert (dact.provider, dact.num_warps, dact.num_stages) == ("triton", 8, 3)


def test_a_gpu_that_lacks_gluon_says_so_once(monkeypatch, device):
    """Beside it the kernels in Triton run."""
    monkeypatch.setattr(_triton, "GLUON_MISSING", ImportError("No module named 'triton.experimental.gluon'"))
    for module in (_product_hopper, forward_hopper):
        monkeypatch.setattr(module, "HAS_GLUON", False)
    x, w, b = (make(*shape, dtype=torch.bfloat16, device=device, grad=False) for shape in ((33, 64), (24, 64), (24,)))
    qkv = make(1, 33, 3, 1, 64, dtype=torch.bfloat16, device=device, grad=False)

    def warned(arch):
        monkeypatch.setattr(runtime, "device_facts", lambda device: dataclasses.replace(facts, arch=arch))
        found = []
        product, attention = (lambda: ops.linear(x, w, b, activation="gelu"), lambda: ops.attention_qkvpacked(qkv))
        for run in (product, attention, product, attention):
            _plan.forget()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                run()
            found.append([str(each.message) for each in caught if each.category is RuntimeWarning])
        return found

    facts = runtime.device_facts(device)
    _triton._warn_without_gluon.cache_clear()
    assert warned("sm_80") == [[]] * 4
    (first,), *others = warned("sm_90")
    assert "cannot be imported (No module named 'triton.experimental.gluon'): on this GPU, sm_90, large" in first
    assert others == [[]] * 3
    _triton._warn_without_gluon.cache_clear()
    assert not ops.linear(x.float(), w.float(), b.float(), activation="gelu").isnan().any()  # in fp32 there is no such
    assert _triton._warn_without_gluon.cache_info().currsize == 0
