"""Masks, learned biases, causality and dropout of attention, in each of its regimes."""

import dataclasses
import itertools
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import vitkernels
from vitkernels import _intercept, ops, reference
from vitkernels.emulator.launch import emulating
from vitkernels.ops._attention.config import Tiling, choose_config
from vitkernels.runtime import DeviceFacts, next_power_of_2
from vitkernels.testing import check_op

MODULES = [sys.modules[f"vitkernels.ops._attention.{name}"] for name in ("forward", "backward")]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Tokens and dtype: in fp32 products of whole rows take a compiler seconds, and are not chosen.
REGIMES = {"windows": (49, torch.bfloat16), "row": (100, torch.float16), "blocks": (150, torch.float32)}


@pytest.fixture(params=REGIMES)
def N(request, monkeypatch):
    """A number of tokens, in each regime."""
    force(request.param, monkeypatch)
    return REGIMES[request.param][0]


def force(regime, monkeypatch):
    """Take the kernels of ``regime``, whatever the dtype and the GPU."""

    def choose(N_q, N_kv, D, dtype, facts, **options):
        config = choose_config(10_000, 10_000, D, dtype, facts, **options)
        if regime == "blocks" or options.get("varlen"):
            return config
        block_m, block_n = (max(16, next_power_of_2(n)) for n in (N_q, N_kv))
        if regime == "windows":
            tiling = Tiling("windows", block_m, block_n, 4, 1)
            return dataclasses.replace(config, forward=tiling, backward=tiling if D <= 32 else config.backward)
        forward, backward = Tiling("row", 64, 64, 4, 1), Tiling("row", 32, block_n, 4, 1)
        return dataclasses.replace(config, forward=forward, backward=backward)

    for module in MODULES:
        monkeypatch.setattr(module, "choose_config", choose)


def make(B, H, N, D, dtype=None, N_kv=None, device="cpu", grad=True):
    """q, k and v, as a projection leaves them: the heads of a token side by side."""
    dtype = dtype or dtype_at(N)
    return {
        name: torch.randn(B, n, H, D, dtype=torch.float64).to(device, dtype).transpose(1, 2).requires_grad_(grad)
        for name, n in (("q", N), ("k", N_kv or N), ("v", N_kv or N))
    }


def heads_of(N):
    """Few rows average few roundings out: the shorter the sequence, the more heads."""
    return max(2, 200 // N)


def learned(*shape, device="cpu"):
    """A bias over the last two dims that requires grad."""
    return torch.randn(shape, dtype=torch.float64).to(device, dtype_at(shape[-1])).requires_grad_()


def dtype_at(N):
    return dict(REGIMES.values()).get(N, torch.float32)


def test_short_rows_have_kernels_of_their_own():
    facts = DeviceFacts("H100", "sm_90", 132, 227 << 10)
    chosen = {N: choose_config(N, N, 32, torch.bfloat16, facts, heads=264, masked=True) for N in (49, 100, 300)}
    assert [c.forward.regime for c in chosen.values()] == ["windows", "row", "blocks"]
    assert [c.backward.regime for c in chosen.values()] == ["windows", "blocks", "blocks"]
    assert choose_config(100, 100, 32, torch.bfloat16, facts, heads=264).backward.regime == "row"


BOOL_MASKS = {
    "keys of each image": lambda B, H, N: random_bool(B, 1, 1, N),
    "keys of all": lambda B, H, N: random_bool(N),
    "pairs of each head": lambda B, H, N: random_bool(B, H, N, N),
    "pairs of all": lambda B, H, N: random_bool(N, N),
    "pairs of a head": lambda B, H, N: random_bool(H, N, N),
    "pairs of an image": lambda B, H, N: random_bool(B, 1, N, N),
    "queries": lambda B, H, N: random_bool(B, 1, N, 1),
    "one": lambda B, H, N: torch.ones(B, H, 1, 1, dtype=torch.bool),
    "expanded": lambda B, H, N: random_bool(1, 1, N, N).expand(B, H, N, N),
    "transposed": lambda B, H, N: random_bool(B, H, N, N).transpose(-1, -2),
    "sliced": lambda B, H, N: random_bool(B, H, N, N + 3)[..., 3:],
}


def random_bool(*shape):
    return torch.rand(shape) > 0.4


def kinds_and_regimes(common, others):
    """The commonest kind in each regime, others in one."""
    turns = zip(others, itertools.cycle(REGIMES), strict=False)
    return [*((common, regime) for regime in REGIMES), *turns]


@pytest.mark.parametrize(
    ("kind", "N"),
    kinds_and_regimes(
        "keys of each image", ["one", "queries", "pairs of a head", "pairs of all", "sliced", "expanded"]
    ),
    indirect=["N"],
)
def test_bool_masks(kind, N, device):
    H = heads_of(N)
    mask = BOOL_MASKS[kind](2, H, N).to(device)
    check_op(ops.attention, reference.attention, make(2, H, N, 24, device=device), options={"attn_mask": mask})


@pytest.mark.parametrize(
    ("kind", "N"),
    kinds_and_regimes(
        "pairs of a head", ["keys of all", "expanded", "pairs of all", "pairs of an image", "transposed"]
    ),
    indirect=["N"],
)
def test_added_masks_and_their_gradients(kind, N, device):
    # A bias that requires grad is laid out as the mask of that kind.
    H = heads_of(N)
    mask = BOOL_MASKS[kind](2, H, N)
    bias = torch.randn(mask.shape, dtype=torch.float64)
    bias = bias.as_strided(mask.shape, mask.stride()) if 0 in mask.stride() else bias
    bias = bias.transpose(-1, -2).contiguous().transpose(-1, -2) if kind == "transposed" else bias
    bias = bias.to(device, dtype_at(N))
    tensors = make(2, H, N, 24, device=device)
    check_op(ops.attention, reference.attention, tensors | {"attn_mask": bias.requires_grad_()})


@pytest.mark.parametrize("N", ["windows", "blocks"], indirect=True)
def test_a_bias_of_whole_rows_gets_no_gradient(N, device):
    tensors = make(2, 2, N, 24, device=device)
    bias = torch.randn(1, 1, N, 1, device=device).to(dtype_at(N)).requires_grad_()
    check_op(ops.attention, reference.attention, tensors, options={"attn_mask": bias.detach()})
    (gradient,) = torch.autograd.grad(ops.attention(**tensors, attn_mask=bias).square().sum(), bias)
    # What is left are roundings of o, of which the backward takes Σ do · o.
    assert gradient.shape == bias.shape and gradient.abs().max() < 100 * torch.finfo(bias.dtype).eps


def test_a_bias_kept_in_fp32(device):
    """As under autocast: PyTorch rounds it first."""
    N = 49
    tensors = make(2, 2, N, 24, torch.bfloat16, device=device)
    bias = torch.randn(2, N, N, device=device).bfloat16().float().requires_grad_()
    out = ops.attention(**tensors, attn_mask=bias)
    assert torch.equal(out, ops.attention(**tensors, attn_mask=bias.detach().bfloat16()))
    assert torch.autograd.grad(out.sum(), bias)[0].dtype == torch.float32


def test_packed_with_a_bias(N, device):
    H = heads_of(N)
    qkv = torch.randn(2, N, 3, H, 24, device=device).to(dtype_at(N)).requires_grad_()
    bias = learned(H, N, N, device=device)
    check_op(ops.attention_qkvpacked, reference.attention_qkvpacked, {"qkv": qkv, "attn_mask": bias})


@pytest.mark.parametrize(
    ("trained", "N"),
    [("attn_mask", "windows"), ("q and attn_mask", "row"), ("k and attn_mask", "blocks")],
    indirect=["N"],
)
def test_frozen_operands_change_no_gradient(trained, N, device):
    tensors = make(2, 2, N, 24, device=device)
    tensors["attn_mask"] = learned(2, N, N, device=device)
    do = torch.randn_like(tensors["q"])
    all_grads = dict(
        zip(tensors, torch.autograd.grad(ops.attention(**tensors), list(tensors.values()), do), strict=True)
    )
    wanted = {name: tensors[name] for name in trained.split(" and ")}
    frozen = {name: t if name in wanted else t.detach() for name, t in tensors.items()}
    # Other kernels may run, whose weights come from the rounded lse.
    for name, grad in zip(wanted, torch.autograd.grad(ops.attention(**frozen), list(wanted.values()), do), strict=True):
        eps = torch.finfo(grad.dtype).eps
        torch.testing.assert_close(grad, all_grads[name], rtol=1000 * eps, atol=100 * eps)


@pytest.mark.parametrize(("N_q", "N_kv"), [(70, 54), (54, 90)])
def test_cross_attention_with_a_bias(N_q, N_kv, device):
    tensors = make(2, 2, N_q, 24, N_kv=N_kv, device=device)
    bias = learned(1, 2, N_q, N_kv, device=device)
    check_op(ops.attention, reference.attention, tensors | {"attn_mask": bias})


def test_cropped_bias_gradients_reach_the_whole(device):
    # A window at the border takes a part of the table's rows, at whatever stride.
    tensors = make(2, 2, 54, 24, device=device)
    table = torch.randn(2, 64, 64, device=device, requires_grad=True)
    check_op(lambda q, k, v, table: ops.attention(q, k, v, attn_mask=table[:, 3:57, 7:61]),
             lambda q, k, v, table: reference.attention(q, k, v, attn_mask=table[:, 3:57, 7:61]),
             tensors | {"table": table})  # fmt: skip


@pytest.mark.parametrize(("masks", "N"), [("float", "windows"), ("bool", "row"), ("float", "blocks")], indirect=["N"])
def test_a_query_that_looks_at_no_key(masks, N, device):
    tensors = make(2, heads_of(N), N, 24, device=device)
    mask = random_bool(2, 1, N, N).to(device)
    mask[0, 0, 5] = mask[1, 0, N - 1] = False
    if masks == "float":
        mask = torch.zeros(mask.shape, dtype=dtype_at(N), device=device).masked_fill(~mask, float("-inf"))
    check_op(ops.attention, reference.attention, tensors, options={"attn_mask": mask})
    out = ops.attention(**tensors, attn_mask=mask)
    dq, dk, dv = torch.autograd.grad(out.sum(), list(tensors.values()))
    assert not out[0, :, 5].any() and not out[1, :, N - 1].any()
    assert not dq[0, :, 5].any() and not dq[1, :, N - 1].any()
    assert dk.isfinite().all() and dv.isfinite().all()


def math_attention(**tensors):
    # PyTorch's flash kernel for CPUs loses the sum of such a row in its lse: the gradients of one of 8 keys are 8 times
    # too large.
    with sdpa_kernel(SDPBackend.MATH):
        return reference.attention(**tensors)


MIN = {dtype: torch.finfo(dtype).min for dtype in (*DTYPES, torch.float64)}


@pytest.mark.parametrize(
    ("kind", "dtype", "mask_dtype", "least"),
    [
        ("pairs", torch.float32, torch.float32, MIN[torch.float32]),
        ("learned", torch.float32, torch.float32, MIN[torch.float32]),
        ("learned", torch.float32, torch.float32, MIN[torch.float16]),
        ("learned", torch.float64, torch.float64, MIN[torch.float64]),
        ("pairs", torch.float32, torch.bfloat16, MIN[torch.bfloat16]),
        ("keys", torch.float32, torch.float64, MIN[torch.float64]),
    ],
    ids=str,
)
def test_a_row_of_the_least_number_weighs_its_keys_alike(kind, dtype, mask_dtype, least, device):
    """As libraries mask: what is finite looks at its keys, and where all are as low, at all of them."""
    N = 150
    tensors = make(2, 2, N, 4 if dtype == torch.float64 else 24, dtype, device=device)
    mask = torch.randn(2, 1, 1 if kind == "keys" else N, N, device=device).to(mask_dtype)
    mask[..., 3:9] = least
    mask[0, 0, -1] = mask[1, 0, 0] = least
    mask[1, 0, 0, N // 2 :] = float("-inf")
    if kind == "learned":
        check_op(ops.attention, math_attention, tensors | {"attn_mask": mask.requires_grad_()})
    else:
        check_op(ops.attention, math_attention, tensors, options={"attn_mask": mask})


@pytest.mark.parametrize("largest", [torch.finfo(torch.float32).max, 1e9])
def test_a_key_of_the_largest_number_is_looked_at_alone(largest, device):
    N = 54
    mask = torch.zeros(N, N, device=device)
    mask[4, 3:5] = largest
    check_op(ops.attention, math_attention, make(2, 2, N, 24, device=device) | {"attn_mask": mask.requires_grad_()})


@pytest.mark.parametrize(
    ("dtype", "mask_dtype", "N"),
    [
        (torch.float16, torch.float16, "row"),
        (torch.bfloat16, torch.bfloat16, "windows"),
        (torch.float16, torch.float32, "blocks"),
    ],
    indirect=["N"],
    ids=str,
)
def test_a_row_of_the_least_number_in_half_precision(dtype, mask_dtype, N, device):
    """Its scores are alike, as are those of a query of zeros without a mask."""
    tensors = make(2, 2, N, 24, dtype, device=device)
    row = torch.tensor([5], device=device)
    zeroed = tensors | {"q": tensors["q"].detach().index_fill(2, row, 0.0).requires_grad_()}
    if mask_dtype == torch.float16:  # its least number leaves room for scores
        tensors = zeroed
    unmasked = torch.randn(1, 2, N, N, device=device).to(mask_dtype).index_fill(2, row, 0.0).requires_grad_()
    masked = unmasked.detach().index_fill(2, row, torch.finfo(mask_dtype).min).requires_grad_()
    do = torch.randn_like(tensors["q"])
    results = []
    for t, mask in ((tensors, masked), (zeroed, unmasked)):
        out = ops.attention(**t, attn_mask=mask)
        dq, dv, dmask = torch.autograd.grad(out, [t["q"], t["v"], mask], do)
        results.append((out[:, :, 5], dq[:, :, 5], dv, dmask))
    torch.testing.assert_close(*results, rtol=0, atol=0)
    mean = tensors["v"].detach().double().mean(2)
    assert (results[0][0].double() - mean).abs().max() <= 2 * torch.finfo(dtype).eps * tensors["v"].abs().max()


@pytest.mark.parametrize("mask_dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_the_reference_keeps_finite_what_is(autocast, dtype, mask_dtype):
    """In fp16, bf16 and fp32 finfo.min of what is wider would be -inf, and a query look nowhere."""
    q, k, v = make(1, 1, 5, 8, dtype).values()
    mask = torch.full((5, 5), torch.finfo(mask_dtype).min, dtype=mask_dtype, requires_grad=True)
    mine = [x.bfloat16() if autocast else x for x in (q, k, v)]
    drawn = torch.ones(1, 1, 5, 5)
    with torch.autocast("cpu", enabled=autocast), vitkernels.use_backend("torch"):
        for out in (
            ops.attention(q, k, v, attn_mask=mask),
            ops.attention_weights(q, k, attn_mask=mask).to(dtype) @ v,
            reference.attention(*mine, attn_mask=mask, dropout_scale=drawn),
        ):
            torch.testing.assert_close(out.double(), v.double().mean(2, keepdim=True).expand_as(v), rtol=0, atol=0.02)
            assert torch.autograd.grad(out.square().sum(), mask)[0].count_nonzero() == 25


def test_no_query_looks_anywhere(N, device):
    tensors = make(2, 2, N, 24, device=device)
    out = ops.attention(**tensors, attn_mask=torch.zeros(2, 1, 1, N, dtype=torch.bool, device=device))
    assert not out.any()
    assert not any(g.any() for g in torch.autograd.grad(out.sum(), list(tensors.values())))


@pytest.mark.parametrize(
    ("masked", "N"), [(False, "windows"), (False, "row"), (False, "blocks"), (True, "windows")], indirect=["N"]
)
def test_causal(masked, N, device):
    mask = random_bool(2, 1, 1, N).to(device)
    mask[..., 0] = True
    options = {"is_causal": True, "attn_mask": mask} if masked else {"is_causal": True}
    check_op(ops.attention, reference.attention, make(2, heads_of(N), N, 24, device=device), options=options)


@pytest.mark.parametrize(("N_q", "N_kv"), [(70, 54), (118, 310)])
def test_causal_of_unequal_lengths_counts_from_the_first(N_q, N_kv, device):
    tensors = make(2, 2, N_q, 24, N_kv=N_kv, device=device)
    check_op(ops.attention, reference.attention, tensors, options={"is_causal": True})


@pytest.mark.parametrize(
    ("p", "N"), [(0.1, "windows"), (0.5, "row"), (0.1, "blocks"), (1.0, "windows")], indirect=["N"]
)
def test_dropout_is_that_of_its_seed(p, N, device):
    torch.manual_seed(7)
    seed = torch.randint(2**62, (1,), device=device)
    H = heads_of(N)
    drawn = reference.dropout_scale(int(seed), (2, H, N, N), p).to(device)

    def dropped(q, k, v):
        torch.manual_seed(7)
        return ops.attention(q, k, v, dropout_p=p)

    tensors = make(2, H, N, 24, device=device)
    if p == 1.0:
        out = dropped(**tensors)
        assert not out.any()
        assert not any(g.any() for g in torch.autograd.grad(out.sum(), list(tensors.values())))
        return
    check_op(dropped, lambda q, k, v: reference.attention(q, k, v, dropout_scale=drawn.to(q.dtype)), tensors)


def test_dropout_with_a_bias(device):
    N = 54
    torch.manual_seed(3)
    drawn = reference.dropout_scale(int(torch.randint(2**62, (1,), device=device)), (2, 2, N, N), 0.4).to(device)

    def dropped(q, k, v, attn_mask):
        torch.manual_seed(3)
        return ops.attention(q, k, v, attn_mask=attn_mask, dropout_p=0.4)

    def expected(q, k, v, attn_mask):
        return reference.attention(q, k, v, attn_mask=attn_mask, dropout_scale=drawn.to(q.dtype))

    bias = learned(2, N, N, device=device)
    check_op(dropped, expected, make(2, 2, N, 24, device=device) | {"attn_mask": bias})


def test_dropout_draws_as_often_as_it_says():
    drawn = reference.dropout_scale(2**61 + 12345, (4, 4, 128, 128), 0.3)
    kept = drawn > 0
    torch.testing.assert_close(drawn[kept], torch.full_like(drawn[kept], 1 / 0.7), rtol=1e-8, atol=0)
    n = drawn.numel()
    assert abs(kept.double().mean() - 0.7) < 4 * (0.21 / n) ** 0.5
    # No row, column or head is drawn as its neighbour is.
    for dim in range(4):
        if drawn.shape[dim] > 1:
            agree = (kept == kept.roll(1, dim)).double().mean()
            assert abs(agree - 0.58) < 4 * (0.58 * 0.42 / n) ** 0.5
    other = reference.dropout_scale(2**61 + 12346, (4, 4, 128, 128), 0.3) > 0
    assert abs((kept == other).double().mean() - 0.58) < 4 * (0.58 * 0.42 / n) ** 0.5


def test_dropout_is_repeated_by_manual_seed_alone(device):
    qkv = torch.randn(2, 54, 3, 2, 24, device=device)
    torch.manual_seed(0)
    first, second = (ops.attention_qkvpacked(qkv, dropout_p=0.1) for _ in range(2))
    torch.manual_seed(0)
    assert torch.equal(first, ops.attention_qkvpacked(qkv, dropout_p=0.1)) and not torch.equal(first, second)


def test_gradcheck(device):
    tensors = make(2, 1, 70, 4, torch.float64, device=device)
    bias = torch.randn(1, 70, 70, dtype=torch.float64, device=device, requires_grad=True)

    def f(q, k, v, bias):
        torch.manual_seed(1)
        return ops.attention(q, k, v, attn_mask=bias, dropout_p=0.2, is_causal=True)

    assert torch.autograd.gradcheck(f, [*tensors.values(), bias], fast_mode=True)


def test_gradcheck_over_blocks(device, monkeypatch):
    force("blocks", monkeypatch)
    tensors = make(2, 2, 70, 4, torch.float64, device=device)
    bias = torch.randn(2, 1, 70, 70, dtype=torch.float64, device=device, requires_grad=True)
    f = lambda q, k, v, bias: ops.attention(q, k, v, attn_mask=bias)  # noqa: E731
    assert torch.autograd.gradcheck(f, [*tensors.values(), bias], fast_mode=True)


def test_reruns_are_bit_equal(N, device):
    tensors = make(3, 2, N, 24, device=device)
    bias = learned(2, N, N, device=device)
    do = torch.randn_like(tensors["q"])

    def run():
        out = ops.attention(**tensors, attn_mask=bias)
        return out, *torch.autograd.grad(out, [*tensors.values(), bias], do)

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def most_elements(function) -> int:
    """Return the most elements that one of the ops of ``function()`` gives out."""
    found = []

    def see(op, args, kwargs, out):
        found.extend(t.untyped_storage().nbytes() // t.element_size() for t in _intercept.tensors(out))

    with _intercept.Intercept(saw=see):
        function()
    return max(found)


def test_a_shared_bias_costs_no_tensor_of_all_pairs(N, device):
    B, H = 3, 2
    tensors = make(B, H, N, 24, device=device)
    bias = learned(H, N, N, device=device)
    largest = most_elements(lambda: ops.attention(**tensors, attn_mask=bias).sum().backward())
    assert bias.grad.shape == bias.shape
    # Partial sums: as many as programs share the work, which does not grow with the images.
    assert largest < B * H * N * N


def test_an_expanded_mask_is_not_written_out(N, device):
    tensors = make(3, 2, N, 24, device=device, grad=False)
    mask = learned(1, 1, N, N, device=device).expand(3, 2, N, N)
    with torch.no_grad():
        largest = most_elements(lambda: ops.attention(**tensors, attn_mask=mask))
    assert largest < 3 * 2 * N * N


def test_an_expanded_leaf_gets_a_gradient_an_element(N, device):
    """Nothing sums the gradient of a leaf, so that what lies in one place may still want many."""
    H = heads_of(N)
    tensors = make(2, H, N, 24, device=device)
    tensors["attn_mask"] = learned(1, N, N, device=device).detach().expand(H, N, N).requires_grad_()
    check_op(ops.attention, reference.attention, tensors)


@pytest.mark.parametrize(("where", "N"), [("k", "windows"), ("v", "row"), ("attn_mask", "blocks")], indirect=["N"])
def test_a_nan_in_one_image_stays_there(where, N, device):
    tensors = make(3, 2, N, 24, device=device)
    tensors["attn_mask"] = torch.zeros(3, 1, N, N, dtype=dtype_at(N), device=device)
    with torch.no_grad():
        tensors[where][1, 0, N // 2, 3] = float("nan")
    out = ops.attention(**tensors)
    grads = torch.autograd.grad(out.sum(), [tensors[x] for x in "qkv"])
    for t in (out, *grads):
        assert t[0].isfinite().all() and t[2].isfinite().all()
    assert not out[1].isfinite().all()


def test_programs_in_any_order_agree_bit_for_bit(N):
    if torch.cuda.is_available():
        pytest.skip("a GPU orders programs as it likes; the reruns above are compared there")
    tensors = make(3, 2, N, 24)
    bias = learned(2, N, N)
    do = torch.randn_like(tensors["q"])

    def run():
        out = ops.attention(**tensors, attn_mask=bias)
        return out, *torch.autograd.grad(out, [*tensors.values(), bias], do)

    before = run()
    for seed in range(3):
        with emulating(seed=seed):
            assert all(torch.equal(a, b) for a, b in zip(before, run(), strict=True))


def test_compiled_equals_eager(device, computed_by_pytorch):
    N = 70
    tensors = make(2, 2, N, 24, device=device)
    bias = learned(2, N, N, device=device)

    def f(q, k, v, bias):
        return ops.attention(q, k, v, attn_mask=bias, is_causal=True)

    runs = []
    for g in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
        out = g(*tensors.values(), bias)
        runs.append((out, *torch.autograd.grad(out.square().sum(), [*tensors.values(), bias])))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


class FirstImages(torch.nn.Module):
    """Attention of the first images alone: how many is known when it runs."""

    def forward(self, count, q, bias):
        n = count.item()
        torch._check(n > 0)
        torch._check(n <= q.shape[0])
        return ops.attention(q[:n], q[:n], q[:n], attn_mask=bias)


@pytest.mark.parametrize("shape", [(1, 2, 5, 5), (5, 5)], ids=str)
def test_export_of_as_many_images_as_data_tell(shape, device, computed_by_pytorch):
    q, bias = torch.randn(4, 2, 5, 8, device=device), torch.randn(shape, device=device)
    exported = torch.export.export(FirstImages(), (torch.tensor(3), q, bias)).module()
    for n in (1, 2):
        assert torch.equal(exported(torch.tensor(n), q, bias), ops.attention(q[:n], q[:n], q[:n], attn_mask=bias))


def test_opcheck_and_the_references_of_registered_ops(device):
    file = sys.modules["vitkernels.ops._attention.registered"]
    tests = ("test_schema", "test_faketensor")
    q, k, v = (torch.randn(2, 54, 2, 24, device=device) for _ in range(3))
    qkv = torch.stack([q, k, v], 2)
    scale = 24**-0.5
    seed = torch.tensor([12345], device=device)
    options = (torch.randn(1, 2, 54, 54, device=device), seed, False, 0.4)
    o, lse = file.attention_fwd(q, k, v, scale, False, *options)
    backward = (o.cos(), q, k, v, o, lse, scale, [True, True, True], False, *options)
    packed = (o.cos(), qkv, o, lse, scale, lse.dtype, True, *options)
    for op, arguments, expected in (
        (file.attention_fwd, (q, k, v, scale, False, *options), file._reference_forward),
        (file.attention_bwd, backward, file._reference_backward),
        (file.attention_qkvpacked_bwd, packed, file._reference_packed_backward),
    ):
        torch.library.opcheck(op, arguments, test_utils=tests)
        for a, e in zip(op(*arguments), expected(*arguments), strict=True):
            assert a.shape == e.shape and a.dtype == e.dtype
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


Q = torch.zeros(2, 3, 5, 8)
QKV = torch.zeros(2, 5, 3, 4, 8)
BAD = {
    "mask does not broadcast": (
        lambda: ops.attention(Q, Q, Q, attn_mask=torch.zeros(2, 3, 5, 4)),
        ValueError,
        r"attn_mask has shape \(2, 3, 5, 4\); expected one that broadcasts to \(2, 3, 5, 5\)",
    ),
    "mask of five dims": (
        lambda: ops.attention(Q, Q, Q, attn_mask=torch.zeros(1, 1, 1, 5, 5)),
        ValueError,
        "broadcasts",
    ),
    "mask of integers": (
        lambda: ops.attention(Q, Q, Q, attn_mask=torch.ones(5, 5, dtype=torch.int64)),
        TypeError,
        r"attn_mask has dtype torch.int64; expected bool \(True: look\) or a floating dtype",
    ),
    "mask elsewhere": (
        lambda: ops.attention(Q, Q, Q, attn_mask=torch.zeros(5, 5, device="meta")),
        ValueError,
        "attn_mask is on meta, q on cpu",
    ),
    "mask is a list": (lambda: ops.attention(Q, Q, Q, attn_mask=[True]), TypeError, "attn_mask is a list"),
    "mask is sparse": (
        lambda: ops.attention_qkvpacked(QKV, attn_mask=torch.zeros(5, 5).to_sparse()),
        NotImplementedError,
        "attn_mask is nested or sparse",
    ),
    "dropout below 0": (lambda: ops.attention(Q, Q, Q, dropout_p=-0.1), ValueError, "dropout_p is -0.1; expected 0 to"),
    "dropout above 1": (lambda: ops.attention_qkvpacked(QKV, dropout_p=1.5), ValueError, "dropout_p is 1.5"),
    "dropout NaN": (lambda: ops.attention(Q, Q, Q, dropout_p=float("nan")), ValueError, "dropout_p is nan"),
    "dropout a tensor": (lambda: ops.attention(Q, Q, Q, dropout_p=torch.ones(())), TypeError, "dropout_p is a Tensor"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, no_launch):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


def test_dataclass_fields_of_a_tiling_are_what_a_tuning_table_holds():
    fields = [f.name for f in dataclasses.fields(sys.modules["vitkernels.ops._attention.config"].Tiling)]
    assert fields == ["regime", "block_m", "block_n", "num_warps", "num_stages"]
