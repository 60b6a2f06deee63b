"""block against fp64: every gradient, dtypes, optional and frozen parameters, bad input."""

import functools

import pytest
import torch

from vitkernels import ops, reference
from vitkernels.testing import check, check_op

HEADS = 3
USUAL = (8, 10, 48, 64)  # images, tokens, channels and hidden features, where they are not the subject
FRONT = ("norm1_weight", "norm1_bias", "qkv_weight", "qkv_bias", "proj_weight", "proj_bias", "gamma1")
BACK = ("norm2_weight", "norm2_bias", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias", "gamma2")


def on_names(function):
    """``function`` with its pairs of tensors as arguments of their own, by name."""

    @functools.wraps(function)
    def call(x, gamma1=None, gamma2=None, **tensors):
        pairs = {
            layer: (tensors.get(f"{layer}_weight"), tensors.get(f"{layer}_bias"))
            for layer in ("norm1", "qkv", "proj", "norm2", "fc1", "fc2")
        }
        options = {k: v for k, v in tensors.items() if not k.endswith(("_weight", "_bias"))}
        return function(x, **pairs, layer_scale=(gamma1, gamma2), num_heads=HEADS, **options)

    return call


block, reference_block = on_names(ops.block), on_names(reference.block)


def make(B, N, C, F, *, dtype=torch.float32, device="cpu"):
    def new(*shape, scale=1.0):
        return (scale * torch.randn(*shape, dtype=torch.float64)).to(device, dtype).requires_grad_()

    return {
        "x": new(B, N, C),
        "norm1_weight": new(C),
        "norm1_bias": new(C),
        "qkv_weight": new(3 * C, C, scale=C**-0.5),
        "qkv_bias": new(3 * C),
        "proj_weight": new(C, C, scale=C**-0.5),
        "proj_bias": new(C),
        "gamma1": new(C),
        "norm2_weight": new(C),
        "norm2_bias": new(C),
        "fc1_weight": new(F, C, scale=C**-0.5),
        "fc1_bias": new(F),
        "fc2_weight": new(C, F, scale=F**-0.5),
        "fc2_bias": new(C),
        "gamma2": new(C),
    }


def without(tensors, *names):
    return {name: None if name in names else t for name, t in tensors.items()}


def check_draws(draws, run=block, **options):
    """Judge outputs and gradients over several draws at once.

    Through a whole block one rounding moves much of a small gradient: over 12 seeds of fp16 blocks the RMS error of
    ours is 0.3 to 1.0 times PyTorch's on average, and up to 1.6 times in one of them. In fp32 the largest error, which
    one LayerNorm of a nearly constant row decides, gives way to the RMS error: at most 1.5 times PyTorch's.
    """

    def results(function, tensors, upstream, convert=lambda t: t):
        leaves = {k: None if t is None else convert(t.detach()).requires_grad_() for k, t in tensors.items()}
        y = function(**leaves, **options)
        given = {k: t for k, t in leaves.items() if t is not None}
        grads = dict(zip(given, torch.autograd.grad(y, list(given.values()), convert(upstream)), strict=True))
        if "qkv_bias" in grads:  # three parts that have little in common; the keys' is zero but for rounding
            q, k, v = grads.pop("qkv_bias").chunk(3)
            grads["qkv_bias v"] = v
            if y.shape[1] >= 50:  # of few tokens these two are rounding noise and little else; of one, nothing else
                grads |= {"qkv_bias q": q, "qkv_bias k": k}
        return {"y": y.detach(), **grads}

    pooled = {}
    for tensors in draws:
        upstream = torch.randn_like(tensors["x"])
        ours, torchs = results(run, tensors, upstream), results(reference_block, tensors, upstream)
        truth = results(reference_block, tensors, upstream, convert=torch.Tensor.double)
        for name in truth:
            pooled.setdefault(name, []).append((ours[name], torchs[name], truth[name]))
    failed = []
    for name, runs in pooled.items():
        actual, yardstick, truth = (torch.stack(t) for t in zip(*runs, strict=True))
        if actual.dtype != torch.float32:
            verdict = check(name, actual, yardstick, truth)
            failed += [] if verdict.passed else [f"{name}: {verdict.detail}"]
            continue
        error, torch_error = ((t.double() - truth).square().mean().sqrt() for t in (actual, yardstick))
        limit = 1.5 * torch_error + torch.finfo(actual.dtype).eps * truth.square().mean().sqrt()
        if not error <= limit:
            failed.append(f"{name}: RMS error {error:.3g}, limit {limit:.3g} (PyTorch's {torch_error:.3g})")
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize(
    ("shape", "scaled", "dtype"),
    [
        ((2, 50, 60, 132), True, torch.float16),
        (USUAL, False, torch.float32),
        ((80, 1, 48, 64), True, torch.float32),
    ],
    ids=str,
)
def test_block(shape, scaled, dtype, device):
    draws = [make(*shape, dtype=dtype, device=device) for _ in range(3)]
    check_draws(draws if scaled else [without(tensors, "gamma1", "gamma2") for tensors in draws])


@pytest.mark.parametrize(("activation", "recompute"), [(None, True), ("silu", False)])
def test_activations_and_recompute(activation, recompute, device):
    draws = [make(*USUAL, device=device) for _ in range(4)]
    check_draws(draws, functools.partial(block, recompute=recompute), activation=activation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("scaled", "missing"), [(True, []), (False, ["proj_bias", "fc2_bias"])], ids=str)
def test_drop_path(scaled, missing, dtype, device):
    first = torch.tensor([0.0, 1.25, 1.25, 0.0, 1.25, 1.25, 1.25, 1.25], device=device)
    draws = [make(*USUAL, dtype=dtype, device=device) for _ in range(4)]
    draws = [without(tensors, *missing, *["gamma1", "gamma2"] * (not scaled)) for tensors in draws]
    for paths in ((first, first.flip(0)), (None, first), (first, None)):
        check_draws(draws, drop_path_scale=tuple(None if p is None else p.to(dtype) for p in paths))


def test_a_dropped_branch_gets_no_gradient(device):
    tensors = make(*USUAL, device=device)
    dropped = torch.zeros(USUAL[0], device=device)
    y = block(**tensors, drop_path_scale=(dropped, dropped))
    assert torch.equal(y, tensors["x"])
    y.sum().backward()
    assert torch.equal(tensors["x"].grad, torch.ones_like(y))
    assert not any(t.grad.any() for name, t in tensors.items() if name != "x")


@pytest.mark.parametrize(
    "missing",
    [["qkv_bias", "proj_bias", "fc1_bias", "fc2_bias"], ["norm1_weight", "norm1_bias", "norm2_weight", "gamma2"]],
    ids=str,
)
def test_missing_parameters(missing, device):
    check_draws([without(make(*USUAL, device=device), *missing) for _ in range(4)])


@pytest.mark.parametrize(
    "trained",
    [["x"], ["fc2_bias"], ["gamma2"], ["gamma1"], ["proj_bias"], ["qkv_bias"], ["norm2_weight"], FRONT, BACK],
    ids=str,
)
def test_only_some_are_trained(trained, device):
    tensors = make(*USUAL, device=device)
    for name, t in tensors.items():
        t.requires_grad_(name in trained)
    check_op(block, reference_block, tensors)


def test_autocast_leaves_the_gradients_of_fp32_weights_unrounded(device):
    tensors = make(*USUAL, device=device)
    weights = [t for name, t in tensors.items() if name.endswith("weight") and not name.startswith("norm")]
    with torch.autocast(device.type, torch.bfloat16):
        y = block(**tensors)
        yardstick = reference_block(**tensors)
    doubles = {name: t.detach().double().requires_grad_() for name, t in tensors.items()}
    names = [name for name, t in tensors.items() if any(t is weight for weight in weights)]
    ours, torchs = (torch.autograd.grad(out.sum(), weights) for out in (y, yardstick))
    truth = torch.autograd.grad(reference_block(**doubles).sum(), [doubles[name] for name in names])
    for name, actual, expected, exact in zip(names, ours, torchs, truth, strict=True):
        assert actual.dtype == torch.float32
        assert not torch.equal(actual, actual.bfloat16().float())
        verdict = check(name, actual, expected, exact)
        assert verdict.passed, verdict.detail


def test_gradcheck(device):
    tensors = make(1, 2, 3, 2, dtype=torch.float64, device=device)
    given = [name for name, t in tensors.items() if t is not None]

    def call(*values):
        return block(**dict(zip(given, values, strict=True)))

    inputs = [tensors[name] for name in given]
    assert torch.autograd.gradcheck(call, inputs, eps=1e-6)


def test_empty_batch_and_inference(device):
    tensors = make(0, *USUAL[1:], device=device)
    block(**tensors).sum().backward()
    for name, t in tensors.items():
        assert torch.equal(t.grad, torch.zeros_like(t)), name
    tensors = make(*USUAL, device=device)
    with torch.no_grad():
        expected = block(**tensors)
    torch.testing.assert_close(block(**tensors).detach(), expected, rtol=0, atol=0)


def test_upstream_with_strides(device):
    tensors = make(*USUAL, device=device)
    for upstream in (lambda y: y.new_ones(()).expand_as(y), lambda y: torch.randn_like(y).repeat(1, 1, 2)[..., ::2]):
        check_op(block, reference_block, tensors, upstream=upstream)


def test_reruns_are_bit_equal(device):
    tensors = make(*USUAL, device=device)

    def run():
        return torch.autograd.grad(block(**tensors).square().sum(), list(tensors.values()))

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


BAD = {
    "rank": ({"x": torch.zeros(5, 36)}, ValueError, r"x has shape \(5, 36\); expected \(batch, tokens ≥ 1, channels\)"),
    "no tokens": ({"x": torch.zeros(2, 0, 36)}, ValueError, "tokens ≥ 1"),
    "integer": ({"x": torch.zeros(2, 5, 36).int()}, TypeError, "x has dtype torch.int32"),
    "heads": (
        {"qkv_weight": torch.zeros(107, 36), "qkv_bias": None},
        ValueError,
        "107 rows; expected 3 · 3 heads · head dim",
    ),
    "head dim": (
        {"qkv_weight": torch.zeros(3 * 3 * 257, 36), "qkv_bias": None},
        NotImplementedError,
        "head dim is 257",
    ),
    "proj": ({"proj_weight": torch.zeros(24, 36), "proj_bias": None}, ValueError, r"proj weight has shape \(24, 36\)"),
    "fc2": ({"fc2_weight": torch.zeros(36, 41)}, ValueError, r"fc2 weight has shape \(36, 41\); expected .*40"),
    "dtype": ({"fc1_weight": torch.zeros(40, 36).half()}, TypeError, "fc1 weight has dtype torch.float16"),
    "device": ({"gamma1": torch.zeros(36, device="meta")}, ValueError, r"layer_scale\[0\] is on meta, x on cpu"),
    "gamma": ({"gamma2": torch.zeros(35)}, ValueError, r"layer_scale\[1\] has shape \(35,\)"),
    "drop path": (
        {"drop_path_scale": (None, torch.ones(3))},
        ValueError,
        r"drop_path_scale\[1\] has shape \(3,\); expected \(2,\), one scale a sample of x",
    ),
    "drop path's gradient": (
        {"drop_path_scale": (torch.ones(2, requires_grad=True), None)},
        NotImplementedError,
        r"drop_path_scale\[0\] requires a gradient",
    ),
    "activation": ({"activation": "relu"}, ValueError, "'relu'"),
    "eps": ({"eps": (1e-6, -1.0)}, ValueError, "eps is -1.0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, no_launch):
    change, error, message = BAD[case]
    with pytest.raises(error, match=message):
        block(**(make(2, 5, 36, 40) | change))
