"""RoPE and QK-norm in front of attention, and the weights that attention never writes out."""

import sys

import pytest
import torch
from drawn import drawn
from test_attention_masks import most_elements

from vitkernels import ops, reference
from vitkernels.testing import check_op

FILE = sys.modules["vitkernels.ops._attention.registered"]
PREPARE = sys.modules["vitkernels.ops._attention.prepare"]
TABLES = {
    "all": lambda B, H, n, D: (n, D),
    "each head": lambda B, H, n, D: (H, n, D),
    "each image": lambda B, H, n, D: (B, 1, n, D),
    "each head of each image": lambda B, H, n, D: (B, H, n, D),
}


# Where size is not what is tested, it is test_attention.py's, for whose attention the kernels are compiled once.
USUAL = B, H, N, D = 2, 2, 70, 24


def make(B, H, N, D, dtype=torch.float32, device="cpu"):
    """q, k and v as a projection leaves them: the heads of a token side by side."""
    return {x: torch.randn(B, N, H, D).to(device, dtype).transpose(1, 2).requires_grad_() for x in "qkv"}


def make_packed(device):
    return torch.randn(B, N, 3, H, D, device=device, requires_grad=True)


def tables(shape, interleaved, device, dtype=torch.float32):
    """Random angles; also ones that differ within a pair, which no rotation has but the op promises."""
    angles = torch.rand(*shape[:-1], shape[-1] // 2, dtype=torch.float64) * 6
    angles = angles.repeat_interleave(2, -1) if interleaved else torch.cat([angles, angles], -1)
    return ops.Rope(angles.cos().to(device, dtype), angles.sin().to(device, dtype), interleaved)


@pytest.mark.parametrize(("kind", "interleaved", "prefix"), drawn(4, TABLES, [False, True], [0, 5]))
def test_rope(interleaved, kind, prefix, device):
    rope = tables(TABLES[kind](B, H, N - prefix, D), interleaved, device)
    options = {"rope": rope, "num_prefix_tokens": prefix}
    check_op(ops.attention, reference.attention, make(*USUAL, device=device), options=options)


@pytest.mark.parametrize(
    ("N", "H", "D", "interleaved", "dtype"),
    [
        (197, 3, 64, True, torch.bfloat16),
        (197, 2, 72, False, torch.float16),
    ],
    ids=str,
)
def test_rope_by_dtype(N, H, D, interleaved, dtype, device):
    rope = tables((N - 1, D), interleaved, device)
    # PyTorch's own route rounds the turned q and k as ours does, from tables of the same precision.
    options = {"rope": rope, "num_prefix_tokens": 1}
    check_op(ops.attention, reference.attention, make(1, H, N, D, dtype, device), options=options)


def free_tables(*shape, device):
    """Two that are no rotation. They leave the scores small: above 30 the rounding of lse is seen (promises.md)."""
    return 0.5 * torch.randn(2, *shape, device=device)


def test_rope_of_tables_that_are_no_rotation(device):
    rope = ops.Rope(*free_tables(N, D, device=device))
    for interleaved in (False, True):
        options = {"rope": rope._replace(interleaved=interleaved)}
        check_op(ops.attention, reference.attention, make(*USUAL, device=device), options=options)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("expanded", ["cos", "sin", "both"])
def test_rope_of_expanded_tables(expanded, dim, device):
    """One of the tables may lie in memory in another way than the other."""
    cos, sin = free_tables(N, D, device=device)
    one = {name: t.narrow(dim, 0, 1).expand_as(t) for name, t in (("cos", cos), ("sin", sin))}
    cos = one["cos"] if expanded != "sin" else cos
    sin = one["sin"] if expanded != "cos" else sin
    options = {"rope": ops.Rope(cos, sin, True)}
    check_op(ops.attention, reference.attention, make(*USUAL, device=device), options=options)


def test_rope_is_timms(device):
    timm = pytest.importorskip("timm.layers.pos_embed_sincos")
    x = torch.randn(2, 3, 20, 16, device=device)
    table = torch.randn(20, 32, device=device)
    for half in (False, True):
        expected = timm.apply_rot_embed_cat(x, table, half=half)
        sin, cos = table.chunk(2, -1)
        torch.testing.assert_close(reference.rope(x, cos, sin, interleaved=not half), expected)


def test_learned_tables_get_their_gradients(device, computed_by_pytorch):
    tensors = make(*USUAL, device=device)
    cos, sin = (t.requires_grad_() for t in free_tables(H, N, D, device=device))

    def with_rope(attention):
        return lambda q, k, v, cos, sin: attention(q, k, v, rope=(cos, sin, True))

    check_op(with_rope(ops.attention), with_rope(reference.attention), tensors | {"cos": cos, "sin": sin})

    def packed(attention):
        return lambda qkv, cos, sin: attention(qkv, rope=(cos, sin, True))

    qkv = make_packed(device)
    check_op(
        packed(ops.attention_qkvpacked), packed(reference.attention_qkvpacked), {"qkv": qkv, "cos": cos, "sin": sin}
    )


def norms(rms, D, device, dtype=torch.float32, which=("q_norm", "k_norm")):
    """Parameters by name, and a function that makes the op's options of them."""
    tensors = {}
    for name in which:
        tensors[f"{name}_weight"] = (torch.randn(D) + 1).to(device, dtype).requires_grad_()
        if not rms:
            tensors[f"{name}_bias"] = torch.randn(D).to(device, dtype).requires_grad_()
    eps = {"q_norm": 1e-6, "k_norm": 1e-5}

    def with_norms(attention, **options):
        def function(**given):
            parameters = {
                name: ops.QKNorm(given.pop(f"{name}_weight"), given.pop(f"{name}_bias", None), eps[name], rms)
                for name in which
            }
            return attention(**given, **parameters, **options)

        return function

    return tensors, with_norms


@pytest.mark.parametrize(
    ("N", "H", "D", "rms", "dtype"),
    [
        (50, 12, 64, False, torch.float16),
        (71, 3, 72, True, torch.float32),
        (50, 12, 36, True, torch.bfloat16),
    ],
    ids=str,
)
def test_qk_norm(N, H, D, rms, dtype, device):
    parameters, with_norms = norms(rms, D, device, dtype)
    tensors = make(1, H, N, D, dtype, device) | parameters
    check_op(with_norms(ops.attention), with_norms(reference.attention), tensors)


@pytest.mark.parametrize(
    ("which", "interleaved"),
    [(("q_norm",), None), (("k_norm",), False), (("q_norm", "k_norm"), True)],
)
def test_packed(which, interleaved, device):
    parameters, with_norms = norms(False, D, device, which=which)
    options = {} if interleaved is None else {"rope": tables((N - 5, D), interleaved, device), "num_prefix_tokens": 5}
    qkv = make_packed(device)
    check_op(
        with_norms(ops.attention_qkvpacked, **options),
        with_norms(reference.attention_qkvpacked, **options),
        {"qkv": qkv} | parameters,
    )


def test_packed_with_everything(device):
    parameters, with_norms = norms(True, D, device)
    bias = torch.randn(H, N, N, device=device, requires_grad=True)
    options = {"rope": tables((H, N, D), False, device), "is_causal": True}
    qkv = make_packed(device)
    check_op(
        with_norms(ops.attention_qkvpacked, **options),
        with_norms(reference.attention_qkvpacked, **options),
        {"qkv": qkv, "attn_mask": bias} | parameters,
    )


@pytest.mark.parametrize("affine", ["none", "weight alone"])
def test_norms_without_parameters(affine, device):
    weight = torch.randn(D, device=device, requires_grad=True) if affine == "weight alone" else None

    def with_norm(attention):
        return lambda q, k, v, w: attention(q, k, v, q_norm=(w, None, 1e-6, False), k_norm=(None, None, 1e-6, True))

    tensors = make(*USUAL, device=device) | {"w": weight}
    check_op(with_norm(ops.attention), with_norm(reference.attention), tensors)


@pytest.mark.parametrize("frozen", ["qkv", "weights"])
def test_frozen(frozen, device):
    parameters, with_norms = norms(False, D, device)
    qkv = make_packed(device).requires_grad_(frozen == "weights")
    for t in parameters.values():
        t.requires_grad_(frozen == "qkv")
    options = {"rope": tables((N - 5, D), True, device), "num_prefix_tokens": 5}
    check_op(
        with_norms(ops.attention_qkvpacked, **options),
        with_norms(reference.attention_qkvpacked, **options),
        {"qkv": qkv} | parameters,
    )


@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck(packed, device):
    rope = tables((5, 6), True, device, torch.float64)
    qkv = torch.randn(2, 6, 3, 2, 6, dtype=torch.float64, device=device, requires_grad=True)
    parameters = [torch.randn(6, dtype=torch.float64, device=device, requires_grad=True) for _ in range(3)]

    def f(qkv, q_weight, q_bias, k_weight):
        options = {
            "rope": rope, "num_prefix_tokens": 1, "q_norm": (q_weight, q_bias), "k_norm": (k_weight, None, 1e-6, True)
        }  # fmt: skip
        if packed:
            return ops.attention_qkvpacked(qkv, **options)
        return ops.attention(*(x.transpose(1, 2) for x in qkv.unbind(2)), **options)

    assert torch.autograd.gradcheck(f, [qkv, *parameters], fast_mode=True)


def test_packed_equals_separate_bit_for_bit(device):
    weight, bias = torch.randn(2, D, device=device)
    options = {"rope": tables((N - 5, D), True, device), "num_prefix_tokens": 5, "q_norm": (weight, bias)}
    qkv = make_packed(device)
    do = torch.randn(B, N, H, D, device=device)
    out = ops.attention_qkvpacked(qkv, **options)
    (dqkv,) = torch.autograd.grad(out, qkv, do)
    separate = ops.attention(*(x.transpose(1, 2) for x in qkv.unbind(2)), **options).transpose(1, 2)
    assert torch.equal(out, separate)
    assert torch.equal(dqkv, torch.autograd.grad(separate, qkv, do)[0])


@pytest.mark.parametrize("layout", ["transposed", "reversed tables"])
def test_layouts(layout, device):
    qkv = make_packed(device).detach()
    cos, sin, _ = tables((N, D), True, device)
    if layout == "transposed":
        qkv = qkv.transpose(1, 3).contiguous().transpose(1, 3)
    else:
        cos, sin = cos.t().contiguous().t(), torch.cat([sin, sin], 1)[:, D:]
    options = {"rope": (cos, sin, True), "q_norm": ops.QKNorm()}
    check_op(
        ops.attention_qkvpacked, reference.attention_qkvpacked, {"qkv": qkv.requires_grad_()}, options=options,
        upstream=lambda o: torch.randn_like(o.transpose(1, 2)).transpose(1, 2),
    )  # fmt: skip


def test_empty_batch(device, computed_by_pytorch):
    qkv = torch.randn(0, 5, 3, 2, 8, device=device, requires_grad=True)
    weight = torch.ones(8, device=device, requires_grad=True)
    out = ops.attention_qkvpacked(qkv, rope=tables((5, 8), True, device), q_norm=(weight,))
    out.sum().backward()
    assert out.shape == (0, 5, 2, 8) and qkv.grad.shape == qkv.shape and not weight.grad.any()


def test_a_nan_stays_in_its_row(device):
    q, k, v = make(*USUAL, device=device).values()
    with torch.no_grad():
        q[1, 0, 7, 3] = float("nan")
    out = ops.attention(q, k, v, rope=tables((N, D), True, device), q_norm=(None,))
    bad = out.isnan().any(-1)
    assert bad[1, 0, 7] and bad.sum() == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_keeps_tables_and_weights(dtype, device, computed_by_pytorch):
    qkv = torch.randn(1, 20, 3, 2, 16, device=device, requires_grad=True)
    weight = torch.randn(16, device=device, requires_grad=True)
    options = {"rope": tables((20, 16), True, device), "q_norm": (weight,)}
    with torch.autocast(device.type, dtype):
        out = ops.attention_qkvpacked(qkv, **options)
    out.sum().backward()
    assert out.dtype == dtype and weight.grad.dtype == qkv.grad.dtype == torch.float32


def test_opcheck_and_the_references_of_registered_ops(device):
    tests = ("test_schema", "test_faketensor")
    x, dy = (torch.randn(B, N, H, D, device=device) for _ in range(2))
    weight, bias = torch.randn(D, device=device), torch.randn(D, device=device)
    for (cos, sin, interleaved), norm, (w, b) in (
        ((None, None, False), "layer", (weight, bias)),
        (tables((1, 1, 65, D), False, device), "", (None, None)),
        (tables((1, H, 65, D), True, device), "rms", (weight, None)),
    ):
        spec = (w, b, cos, sin, norm, 1e-6, interleaved, 5)
        torch.library.opcheck(PREPARE.prepare_fwd, (x, *spec), test_utils=tests)
        torch.testing.assert_close(PREPARE._reference_forward(x, *spec), PREPARE.prepare_fwd(x, *spec))
        backward = (dy, x, *spec, [w is not None, b is not None])
        torch.library.opcheck(PREPARE.prepare_bwd, backward, test_utils=tests)
        for a, e in zip(PREPARE._reference_backward(*backward), PREPARE.prepare_bwd(*backward), strict=True):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)

    qkv, do, scale = make_packed(device).detach(), torch.randn(B, N, H, D, device=device), D**-0.5
    mask = torch.randn(1, H, N, N, device=device)
    cos, sin, interleaved = tables((1, 1, 65, D), True, device)
    q = PREPARE.prepare_fwd(qkv[:, :, 0], weight, bias, cos, sin, "layer", 1e-6, interleaved, 5)
    k = PREPARE.prepare_fwd(qkv[:, :, 1], None, None, cos, sin, "rms", 1e-6, interleaved, 5)
    o, lse = FILE.attention_fwd(q, k, qkv[:, :, 2], scale, False, mask, None, True)
    for needed in ([True, True, False, False], [False] * 4):
        arguments = (
            do, qkv, q, k, o, lse, scale, mask, None, True, 0.0, True, needed, weight, bias, "layer", 1e-6, None, None,
            "rms", 1e-6, cos, sin, interleaved, 5,
        )  # fmt: skip
        torch.library.opcheck(FILE.attention_prepared_bwd, arguments, test_utils=tests)
        actual, expected = FILE._reference_prepared_backward(*arguments), FILE.attention_prepared_bwd(*arguments)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


def test_fullgraph_compile(device, computed_by_pytorch):
    qkv = torch.randn(1, 9, 3, 2, 8, device=device, requires_grad=True)
    weight = torch.randn(8, device=device, requires_grad=True)
    rope = tables((8, 8), True, device)

    def f(qkv, weight):
        options = {"rope": rope, "num_prefix_tokens": 1, "q_norm": (weight,)}
        separate = ops.attention(*(x.transpose(1, 2) for x in qkv.unbind(2)), **options)
        return ops.attention_qkvpacked(qkv, **options).square().sum() + separate.square().sum()

    runs = [
        torch.autograd.grad(g(qkv, weight), (qkv, weight))
        for g in (f, torch.compile(f, fullgraph=True, backend="aot_eager"))
    ]
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b)


def test_attention_weights(device):
    q, k, v = (t.detach().double() for t in make(2, 3, 20, 16, device=device).values())
    mask = torch.randn(3, 20, 20, device=device, dtype=torch.float64)
    rope = tables((18, 16), False, device, torch.float64)
    options = {"rope": rope, "num_prefix_tokens": 2, "q_norm": ops.QKNorm(), "k_norm": ops.QKNorm(), "scale": 0.4}
    for more in ({}, {"attn_mask": mask}, {"is_causal": True}, {"attn_mask": mask > -1, "is_causal": True}):
        weights = ops.attention_weights(q, k, **options, **more)
        torch.testing.assert_close(weights @ v, reference.attention(q, k, v, **options, **more))
        for query in (0, 7, -1):
            row = ops.attention_weights(q, k, query=query, **options, **more)
            assert row.shape == (2, 3, 1, 20)
            torch.testing.assert_close(row[:, :, 0], weights[:, :, query])


def test_attention_weights_of_rows_that_look_nowhere_and_in_half_precision(device):
    q, k, _ = (t.detach().half() for t in make(1, 2, 5, 8, device=device).values())
    mask = torch.ones(5, 5, dtype=torch.bool, device=device)
    mask[2] = False
    weights = ops.attention_weights(q, k, attn_mask=mask)
    assert weights.dtype == torch.float32 and not weights[:, :, 2].any()
    torch.testing.assert_close(weights.sum(-1)[:, :, [0, 1, 3, 4]], torch.ones(1, 2, 4, device=device))


def test_one_row_of_weights_forms_no_other(device):
    q, k, _ = (t.detach() for t in make(1, 2, 300, 8, device=device).values())
    largest = most_elements(lambda: ops.attention_weights(q, k, query=0))
    assert largest < 2 * 300 * 300


Q = torch.zeros(2, 3, 5, 8)
TABLE = torch.zeros(5, 8)
WEIGHT = torch.ones(8)
BAD = {
    "odd head": (lambda: ops.attention(*[Q[..., :7]] * 3, rope=(TABLE[:, :7],) * 2), ValueError, "an even head dim"),
    "table": (
        lambda: ops.attention(Q, Q, Q, rope=(TABLE[:4], TABLE[:4])),
        ValueError,
        r"rope.cos has shape \(4, 8\); expected one that broadcasts to .* = \(2, 3, 5, 8\)",
    ),
    "sin": (lambda: ops.attention(Q, Q, Q, rope=(TABLE, TABLE[None])), ValueError, "rope.sin has shape"),
    "prefix": (
        lambda: ops.attention(Q, Q, Q, rope=(TABLE, TABLE), num_prefix_tokens=6),
        ValueError,
        "num_prefix_tokens is 6; expected 0 to 5",
    ),
    "prefix alone": (lambda: ops.attention(Q, Q, Q, num_prefix_tokens=1), ValueError, "is 1 without rope"),
    "cross": (lambda: ops.attention(Q, Q[:, :, :4], Q[:, :, :4], rope=(TABLE,) * 2), ValueError, "5 queries and 4"),
    "table dtype": (lambda: ops.attention(Q, Q, Q, rope=(TABLE.int(), TABLE)), TypeError, "rope.cos has dtype"),
    "weight": (lambda: ops.attention(Q, Q, Q, q_norm=(WEIGHT[:4],)), ValueError, r"q_norm.weight has shape \(4,\)"),
    "rms bias": (
        lambda: ops.attention(Q, Q, Q, k_norm=(WEIGHT, WEIGHT, 1e-6, True)),
        ValueError,
        "k_norm is an RMSNorm with a bias",
    ),
    "eps": (lambda: ops.attention(Q, Q, Q, q_norm=(WEIGHT, None, -1.0)), ValueError, "q_norm.eps is -1.0"),
    "query": (lambda: ops.attention_weights(Q, Q, query=5), IndexError, "query is 5; expected −5 to 4"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, no_launch):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()
