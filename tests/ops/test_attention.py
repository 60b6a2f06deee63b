"""attention and attention_qkvpacked against fp64: dtypes, shapes, layouts, gradients, bad input."""

import sys

import pytest
import torch

from vitkernels import ops, reference
from vitkernels.ops._attention.config import choose_config, head_parts, key_pieces, shared_bytes, useful_share
from vitkernels.ops._attention.operands import LOG2_E, addressing
from vitkernels.ops._triton import tl
from vitkernels.runtime import DeviceFacts
from vitkernels.testing import check_op
from vitkernels.tools.aot.build import TARGETS

FILE = sys.modules["vitkernels.ops._attention.registered"]  # vitkernels.ops.attention is the function
OPERANDS = sys.modules["vitkernels.ops._attention.operands"]
BACKWARD = sys.modules["vitkernels.ops._attention.backward"]
KERNELS = (
    "_attention_bwd_delta_kernel",
    "_attention_bwd_dkv_kernel",
    "_attention_bwd_dq_kernel",
    "_attention_bwd_row_kernel",
)


def make(*shape, dtype=torch.float32, device="cpu", grad=True):
    return torch.randn(*shape, dtype=torch.float64).to(device, dtype).requires_grad_(grad)


def make_qkv(B, H, N_q, N_kv, D, grad=True, **kwargs):
    """q, k and v of (B, H, N, D) that lie in memory as a projection leaves them, the heads of a token side by side."""
    lengths = {"q": N_q, "k": N_kv, "v": N_kv}
    return {x: make(B, n, H, D, grad=False, **kwargs).transpose(1, 2).requires_grad_(grad) for x, n in lengths.items()}


# Where size is not what is tested, it is this one, for which the kernels are compiled once: two blocks, one not full.
USUAL = (2, 2, 70, 70, 24)  # B, H, N_q, N_kv, D
SCALE = 24**-0.5
# Numbers of tokens and head dims that vision transformers have, one for each way to hold rows and heads; real
# configurations of the long rows are tests/emulator's.
SIZES = [
    (1, 16, torch.float32), (16, 32, torch.bfloat16), (49, 24, torch.bfloat16), (50, 64, torch.float16),
    (64, 48, torch.float32), (197, 64, torch.bfloat16), (197, 72, torch.float32), (256, 104, torch.float16),
    (577, 112, torch.bfloat16),
]  # fmt: skip


@pytest.mark.parametrize(("N", "D", "dtype"), SIZES, ids=str)
def test_attention(N, D, dtype, device):
    # Few rows average few roundings out: the shorter the sequence, the more heads.
    tensors = make_qkv(1, max(1, 600 // N), N, N, D, dtype=dtype, device=device)
    if N == 1:  # the gradients of q and k are exactly zero: see below
        tensors["q"].requires_grad_(False)
        tensors["k"].requires_grad_(False)
    check_op(ops.attention, reference.attention, tensors)


@pytest.mark.parametrize(
    ("N", "H", "D", "dtype"),
    [
        (50, 12, 36, torch.bfloat16),
        (70, 2, 24, torch.float32),
        (197, 2, 72, torch.float16),
    ],
    ids=str,
)
def test_qkvpacked(N, H, D, dtype, device):
    qkv = make(1, N, 3, H, D, dtype=dtype, device=device)
    check_op(ops.attention_qkvpacked, reference.attention_qkvpacked, {"qkv": qkv})


@pytest.mark.parametrize(("D", "dtype"), [(1, torch.float32), (144, torch.float16), (256, torch.bfloat16)], ids=str)
def test_other_head_dims(D, dtype, device):
    check_op(ops.attention, reference.attention, make_qkv(1, 8, 67, 67, D, dtype=dtype, device=device))


@pytest.mark.parametrize(
    ("N_q", "N_kv", "dtype"),
    [
        (1, 197, torch.bfloat16),
        (197, 1, torch.float16),
        (65, 130, torch.float32),
    ],
    ids=str,
)
def test_cross_lengths(N_q, N_kv, dtype, device):
    tensors = make_qkv(2, 2, N_q, N_kv, 24, dtype=dtype, device=device)
    if N_kv == 1:  # the gradients of q and k are exactly zero: see the next test
        tensors["q"].requires_grad_(False)
        tensors["k"].requires_grad_(False)
    check_op(ops.attention, reference.attention, tensors)


@pytest.mark.parametrize(("N_q", "dtype"), [(1, torch.float32), (50, torch.float16)], ids=str)
def test_one_key_gives_its_value_and_no_gradient_to_the_scores(N_q, dtype, device):
    D = 16
    tensors = make_qkv(2, 2, N_q, 1, D, dtype=dtype, device=device)
    out = ops.attention(**tensors)
    assert torch.equal(out, tensors["v"].expand_as(out))
    do = torch.randn_like(out)
    dq, dk, _ = torch.autograd.grad(out, list(tensors.values()), do)
    # dS = do · v − do · o is 0, but for two fp32 sums of D equal terms in whatever order.
    q, k, v = (t.detach().double() for t in tensors.values())
    d_score = 2 * D * torch.finfo(torch.float32).eps * (do.double() * v).abs().sum(-1, keepdim=True)
    assert (dq.double().abs() <= D**-0.5 * d_score * k.abs()).all()
    assert (dk.double().abs() <= D**-0.5 * (d_score * q.abs()).sum(2, keepdim=True)).all()


def check_scale(scale, device):
    tensors = make_qkv(*USUAL, dtype=torch.bfloat16, device=device)
    check_op(ops.attention, reference.attention, tensors, options={"scale": scale})
    qkv = {"qkv": make(2, 70, 3, 2, 24, dtype=torch.bfloat16, device=device)}
    check_op(ops.attention_qkvpacked, reference.attention_qkvpacked, qkv, options={"scale": scale})


@pytest.mark.parametrize("scale", [0.0, -0.2])
def test_scale(scale, device):
    check_scale(scale, device)


def test_scale_of_an_integer(device, computed_by_pytorch):
    check_scale(2, device)


LAYOUTS = {
    "tokens first": lambda x: x.transpose(0, 2).contiguous().transpose(0, 2),
    "heads outside": lambda x: x.contiguous(),
    "last dim strided": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "last dim outermost": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
    "expanded heads": lambda x: x[:, :1].expand_as(x),
    "expanded tokens": lambda x: x[:, :, :1].expand_as(x),
    "sliced": lambda x: torch.cat([x, x], -1)[..., x.shape[-1] :],
    "misaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_inputs_and_upstream(layout, device):
    strided = LAYOUTS[layout]
    # With channels that do not lie side by side PyTorch attends by another way, in fp32 within.
    dtype = torch.float32 if layout == "last dim strided" else torch.bfloat16
    N = 49 if layout == "expanded heads" else 70  # that one tile holds, and that take several
    tensors = {
        name: strided(t).requires_grad_()
        for name, t in make_qkv(2, 2, N, N, 24, dtype=dtype, device=device, grad=False).items()
    }
    check_op(ops.attention, reference.attention, tensors, upstream=lambda o: strided(torch.randn_like(o)))


@pytest.mark.parametrize("layout", ["tokens first", "last dim strided", "expanded heads", "misaligned"])
def test_layouts_of_packed_inputs_and_upstream(layout, device):
    strided = LAYOUTS[layout]
    qkv = make(2, 2, 70, 3 * 24, dtype=torch.bfloat16, device=device, grad=False)
    qkv = strided(qkv).unflatten(-1, (3, 24)).permute(0, 2, 3, 1, 4)
    check_op(
        ops.attention_qkvpacked,
        reference.attention_qkvpacked,
        {"qkv": qkv.requires_grad_()},
        upstream=lambda o: strided(torch.randn_like(o).transpose(1, 2)).transpose(1, 2),
    )


def test_stride_zero_upstream(device):
    check_op(
        ops.attention, reference.attention, make_qkv(*USUAL, dtype=torch.bfloat16, device=device),
        upstream=lambda o: o.new_ones(()).expand_as(o),
    )  # fmt: skip
    qkv = make(2, 70, 3, 2, 24, dtype=torch.bfloat16, device=device)
    ops.attention_qkvpacked(qkv).sum().backward()
    assert qkv.grad.isfinite().all()


@pytest.mark.parametrize(("B", "H"), [(0, 2), (2, 0)])
def test_empty_batch(B, H, device, computed_by_pytorch):
    tensors = make_qkv(B, H, 5, 7, 16, device=device)
    out = ops.attention(**tensors)
    out.sum().backward()
    assert out.shape == (B, H, 5, 16)
    for name, t in tensors.items():
        assert t.grad.shape == t.shape, name
    qkv = make(B, 5, 3, H, 16, device=device)
    out = ops.attention_qkvpacked(qkv)
    out.sum().backward()
    assert out.shape == (B, 5, H, 16) and qkv.grad.shape == qkv.shape


@pytest.mark.parametrize("trained", ["q", "k", "v", "qk", "qv", "kv"])
def test_frozen_inputs_run_only_the_kernels_needed(trained, device, monkeypatch):
    # As many heads as the H100 has multiprocessors: for fewer, whole rows would leave some idle.
    tensors = make_qkv(1, 132, 70, 50, 24, dtype=torch.bfloat16, device=device)
    for name, t in tensors.items():
        t.requires_grad_(name in trained)
    launched = []
    for name in KERNELS:
        kernel = getattr(BACKWARD, name)
        monkeypatch.setattr(BACKWARD, name, _Spy(kernel, lambda name=name: launched.append(name)))
    check_op(ops.attention, reference.attention, tensors)
    delta, dkv, dq, row = KERNELS
    expected = {"q": [dq], "k": [delta, dkv], "v": [delta, dkv], "kv": [delta, dkv], "qk": [row], "qv": [row]}
    assert launched == expected[trained]


class _Spy:
    def __init__(self, kernel, note):
        self.kernel, self.note = kernel, note

    def __getitem__(self, grid):
        self.note()
        return self.kernel[grid]


def test_gradcheck(device):
    tensors = make_qkv(1, 2, 3, 2, 3, dtype=torch.float64, device=device)
    assert torch.autograd.gradcheck(lambda *qkv: ops.attention(*qkv, scale=0.7), list(tensors.values()), eps=1e-6)
    qkv = make(1, 3, 3, 2, 3, dtype=torch.float64, device=device)
    assert torch.autograd.gradcheck(lambda x: ops.attention_qkvpacked(x, scale=0.7), [qkv], eps=1e-6)


def test_gradcheck_over_several_blocks(device):
    tensors = make_qkv(1, 1, 70, 66, 3, dtype=torch.float64, device=device)
    assert torch.autograd.gradcheck(ops.attention, list(tensors.values()), eps=1e-6, fast_mode=True)


def test_packed_equals_separate_bit_for_bit(device):
    qkv = make(2, 70, 3, 2, 24, dtype=torch.bfloat16, device=device)
    do = torch.randn(2, 70, 2, 24, dtype=torch.bfloat16, device=device)
    out = ops.attention_qkvpacked(qkv)
    (dqkv,) = torch.autograd.grad(out, qkv, do)
    q, k, v = (t.transpose(1, 2).contiguous().requires_grad_() for t in qkv.detach().unbind(2))
    separate = ops.attention(q, k, v)
    grads = torch.autograd.grad(separate, (q, k, v), do.transpose(1, 2))
    assert torch.equal(out, separate.transpose(1, 2))
    assert torch.equal(dqkv, torch.stack([g.transpose(1, 2) for g in grads], 2))
    assert out.is_contiguous() and dqkv.is_contiguous() and separate.transpose(1, 2).is_contiguous()


def test_reruns_are_bit_equal(device):
    tensors = make_qkv(*USUAL, dtype=torch.bfloat16, device=device)
    do = torch.randn_like(tensors["q"])

    def run():
        out = ops.attention(**tensors)
        return out, *torch.autograd.grad(out, list(tensors.values()), do)

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_with_and_without_gradients_agree(device):
    tensors = make_qkv(*USUAL, device=device)
    qkv = torch.stack([t.detach().transpose(1, 2) for t in tensors.values()], 2)
    with torch.inference_mode():
        out, packed = ops.attention(**tensors), ops.attention_qkvpacked(qkv)
    assert torch.equal(out, ops.attention(**tensors))
    assert torch.equal(packed, ops.attention_qkvpacked(qkv.requires_grad_()))


def test_log_sum_exp(device):
    q, k, v = (t.detach().transpose(1, 2) for t in make_qkv(2, 2, 70, 66, 24, device=device).values())
    o, lse = FILE.attention_fwd(q, k, v, SCALE)
    scores = torch.einsum("bmhd,bnhd->bhmn", q.double(), k.double()) * SCALE
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1) * LOG2_E, rtol=1e-6, atol=1e-6)
    for actual, expected in zip(FILE._reference_forward(q, k, v, SCALE), (o, lse), strict=True):
        assert actual.stride() == expected.stride() and actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_a_bad_value_stays_where_fp64_has_it(where, value, device):
    tensors = make_qkv(*USUAL, device=device, grad=False)
    tensors[where][1, 0, 65, 3] = value
    check_op(ops.attention, reference.attention, tensors)
    out = ops.attention(**tensors)
    truth = reference.attention(**{name: t.double() for name, t in tensors.items()})
    for infinite_or_nan in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(infinite_or_nan(out), infinite_or_nan(truth))
    assert not truth[1, 0].isfinite().all() and out[0].isfinite().all() and out[1, 1].isfinite().all()


@pytest.mark.parametrize(
    ("where", "N", "dtype"),
    [("q", 70, torch.float32), ("q", 49, torch.bfloat16), ("k", 70, torch.float32), ("v", 70, torch.float32)],
    ids=str,
)
def test_a_nan_reaches_the_gradients_of_its_head_alone(where, N, dtype, device):
    tensors = make_qkv(2, 2, N, N, 24, dtype=dtype, device=device)
    with torch.no_grad():
        tensors[where][1, 0, N - 5, 3] = float("nan")
    do = torch.randn_like(tensors["q"])
    grads = torch.autograd.grad(ops.attention(**tensors), list(tensors.values()), do)
    wide = [t.detach().double().requires_grad_() for t in tensors.values()]
    truth = torch.autograd.grad(reference.attention(*wide), wide, do.double())
    for grad, expected in zip(grads, truth, strict=True):
        assert torch.equal(grad.isnan(), expected.isnan())
    assert truth[0].isnan().any()


def test_a_block_of_overflowing_scores_does_not_spoil_its_rows(device):
    tensors = make_qkv(1, 2, 70, 198, 24, device=device, grad=False)
    tensors["q"].fill_(1e20)
    tensors["k"][:, :, :128] = -1e20  # scores of -inf in the whole of the first blocks
    tensors["k"][:, :, 128:] *= 1e-20
    truth = reference.attention(**{name: t.double() for name, t in tensors.items()})
    torch.testing.assert_close(ops.attention(**tensors).double(), truth, rtol=1e-4, atol=1e-5)


def test_fp16_near_its_limit(device):
    tensors = {
        name: (t * 2e4).clamp(-6e4, 6e4).half().requires_grad_()
        for name, t in make_qkv(*USUAL, device=device, grad=False).items()
    }
    out = ops.attention(**tensors)
    truth = reference.attention(*(t.detach().double() for t in tensors.values()))
    torch.testing.assert_close(out.double(), truth, rtol=1e-3, atol=0)
    for grad in torch.autograd.grad(out, list(tensors.values()), torch.randn_like(out) * 1e-4):
        assert grad.isfinite().all()


def test_no_weight_is_above_one_however_far_the_scores_drift_between_passes(device):
    # On a GPU the backward may sum a product in another order; at scores of 1e10 that is off by thousands.
    q, k, v = (t.detach().transpose(1, 2) for t in make_qkv(2, 2, 70, 66, 24, device=device).values())
    o, lse = FILE.attention_fwd(q, k, v, SCALE)
    for grad in FILE.attention_bwd(torch.randn_like(o), q, k, v, o, lse - 1000.0, SCALE, [True, True, False]):
        assert grad.isfinite().all()


def test_keys_beyond_the_last_have_no_weight_in_the_backward(device):
    # Their scores of 0 lie far above all others here, and with a weight they would overflow fp16's dS.
    values = {"q": -10.0, "k": 10.0, "v": 300.0}
    tensors = {
        name: torch.full_like(t, values[name], requires_grad=True)
        for name, t in make_qkv(*USUAL, dtype=torch.float16, device=device).items()
    }
    out = ops.attention(**tensors)
    for grad in torch.autograd.grad(out, list(tensors.values()), torch.full_like(out, 300.0)):
        assert grad.isfinite().all()


def test_autocast(device, computed_by_pytorch):
    dtype = torch.bfloat16
    tensors = make_qkv(1, 2, 50, 50, 24, device=device)
    qkv = torch.stack([t.detach().transpose(1, 2) for t in tensors.values()], 2).requires_grad_()
    with torch.autocast(device.type, dtype):
        out, packed = ops.attention(**tensors), ops.attention_qkvpacked(qkv)
        assert reference.attention(**tensors).dtype == dtype
        assert ops.attention(*(t.double() for t in tensors.values())).dtype == torch.float64
        mixed = ops.attention(tensors["q"], tensors["k"].to(dtype), tensors["v"])
    assert out.dtype == packed.dtype == dtype
    assert torch.equal(out, ops.attention(*(t.to(dtype) for t in tensors.values()))) and torch.equal(out, mixed)
    do = torch.randn_like(out)
    out.backward(do)
    packed.backward(do.transpose(1, 2))
    assert all(t.grad.dtype == torch.float32 for t in (*tensors.values(), qkv))
    assert torch.equal(qkv.grad[:, :, 0], tensors["q"].grad.transpose(1, 2))


Q = torch.zeros(2, 3, 5, 8)
QKV = torch.zeros(2, 5, 3, 4, 8)
WIDE = torch.zeros(1, 1, 2, 264)
BAD = {
    "integer": (lambda: ops.attention(Q.int(), Q, Q), TypeError, "q has dtype torch.int32; expected float16"),
    "no tensor": (lambda: ops.attention(Q, None, Q), TypeError, "k is a NoneType"),
    "rank of q": (lambda: ops.attention(Q[0], Q, Q), ValueError, r"q has shape \(3, 5, 8\); expected \(B, H, N, D\)"),
    "rank of k": (lambda: ops.attention(Q, Q[0], Q), ValueError, r"k has shape \(3, 5, 8\); expected \(B, H, N, D\)"),
    "heads": (lambda: ops.attention(Q, Q[:, :1], Q[:, :1]), ValueError, r"k has shape \(2, 1, 5, 8\); expected \(2"),
    "batch": (lambda: ops.attention(Q, Q[:1], Q[:1]), ValueError, r"k has shape \(1, 3, 5, 8\)"),
    "head dim": (lambda: ops.attention(Q, Q[..., :4], Q), ValueError, r"k has shape \(2, 3, 5, 4\)"),
    "v length": (lambda: ops.attention(Q, Q, Q[:, :, :4]), ValueError, r"v has shape \(2, 3, 4, 8\).*k's shape"),
    "dtypes": (lambda: ops.attention(Q, Q, Q.half()), TypeError, "v has dtype torch.float16, q has torch.float32"),
    "devices": (lambda: ops.attention(Q, Q.to("meta"), Q), ValueError, "k is on meta, q on cpu"),
    "no queries": (lambda: ops.attention(Q[:, :, :0], Q, Q), ValueError, "q has shape .*no tokens"),
    "no keys": (lambda: ops.attention(Q, Q[:, :, :0], Q[:, :, :0]), ValueError, "k has shape .*no tokens"),
    "no channels": (lambda: ops.attention(*[Q[..., :0]] * 3), ValueError, "at least one channel"),
    "wide head": (lambda: ops.attention(WIDE, WIDE, WIDE), NotImplementedError, "head dim 264; expected 256 at most"),
    "scale NaN": (lambda: ops.attention(Q, Q, Q, scale=float("nan")), ValueError, "scale is nan"),
    "scale infinite": (lambda: ops.attention_qkvpacked(QKV, scale=float("inf")), ValueError, "scale is inf"),
    "scale tensor": (lambda: ops.attention(Q, Q, Q, scale=torch.ones(())), TypeError, "scale is a Tensor"),
    "sparse": (lambda: ops.attention(Q.to_sparse(), Q, Q), NotImplementedError, "sparse"),
    "packed rank": (lambda: ops.attention_qkvpacked(QKV[0]), ValueError, r"\(5, 3, 4, 8\); expected \(B, N, 3, H, D\)"),
    "packed order": (lambda: ops.attention_qkvpacked(QKV.transpose(1, 2)), ValueError, r"has shape \(2, 3, 5, 4, 8\)"),
    "packed integer": (lambda: ops.attention_qkvpacked(QKV.long()), TypeError, "qkv has dtype torch.int64"),
    "packed empty": (lambda: ops.attention_qkvpacked(QKV[:, :0]), ValueError, "qkv has shape .*no tokens"),
    "packed wide": (lambda: ops.attention_qkvpacked(QKV.repeat(1, 1, 1, 1, 33)), NotImplementedError, "head dim 264"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, no_launch):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


def test_double_backward_and_forward_mode_are_errors(device, computed_by_pytorch):
    q = make(1, 1, 3, 8, device=device)
    (dq,) = torch.autograd.grad(ops.attention(q, q, q).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated again"):
        dq.sum().backward()
    q = q.detach()
    qkv = torch.randn(1, 3, 3, 1, 8, device=device)
    for f, x in ((lambda x: ops.attention(x, x, x), q), (ops.attention_qkvpacked, qkv)):
        for transform in (
            lambda f=f, x=x: torch.func.jvp(f, (x,), (x,)),
            lambda f=f, x=x: torch.func.grad(lambda x: f(x).sum())(x),
        ):
            with pytest.raises(RuntimeError, match="setup_context"):
                transform()
        with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
            f(torch.autograd.forward_ad.make_dual(x, x))


def test_opcheck(device):
    q, k, v = (t.transpose(1, 2) for t in make_qkv(2, 2, 70, 66, 24, device=device, grad=False).values())
    o, lse = FILE.attention_fwd(q, k, v, SCALE)
    qkv = torch.randn(2, 70, 3, 2, 24, device=device)
    po, plse = FILE.attention_qkvpacked_fwd(qkv, SCALE)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(FILE.attention_fwd, (q, k, v, SCALE), test_utils=tests)
    torch.library.opcheck(FILE.attention_qkvpacked_fwd, (qkv, SCALE), test_utils=tests)
    for sum_dtype in (torch.float32, torch.float16, None):
        torch.library.opcheck(FILE.attention_qkvpacked_bwd, (po, qkv, po, plse, SCALE, sum_dtype), test_utils=tests)
    for needed in ([True, True, False], [True, False, False], [False, True, False]):
        torch.library.opcheck(FILE.attention_bwd, (o, q, k, v, o, lse, SCALE, needed), test_utils=tests)


def test_reference_backward_agrees_with_the_kernels(device):
    q, k, v = (t.transpose(1, 2) for t in make_qkv(2, 2, 70, 66, 24, device=device, grad=False).values())
    o, lse = FILE.attention_fwd(q, k, v, SCALE)
    for needed in ([True, True, False], [True, False, False], [False, True, False]):
        arguments = (torch.randn_like(o), q, k, v, o, lse, SCALE, needed)
        for actual, expected in zip(FILE._reference_backward(*arguments), FILE.attention_bwd(*arguments), strict=True):
            assert actual.stride() == expected.stride()
            torch.testing.assert_close(actual, expected)
    qkv = torch.randn(2, 70, 3, 2, 24, device=device)
    o, lse = FILE.attention_qkvpacked_fwd(qkv, SCALE)
    arguments = (torch.randn_like(o), qkv, o, lse, SCALE, lse.dtype)
    torch.testing.assert_close(FILE._reference_packed_backward(*arguments), FILE.attention_qkvpacked_bwd(*arguments))


def test_registered_ops_take_heads_first(device):
    """On (B, H, N, D) what is computed, and where it lies in memory, is as on (B, N, H, D)."""
    q, k, v = make_qkv(2, 2, 54, 50, 24, device=device, grad=False).values()
    tokens_first = [t.transpose(1, 2) for t in (q, k, v)]
    options = (None, None, True)
    o, lse = FILE.attention_fwd(q, k, v, SCALE, True, *options)
    expected, expected_lse = FILE.attention_fwd(*tokens_first, SCALE, False, *options)
    assert torch.equal(o.transpose(1, 2), expected) and torch.equal(lse, expected_lse)
    assert o.transpose(1, 2).is_contiguous()
    torch.library.opcheck(FILE.attention_fwd, (q, k, v, SCALE, True, *options))
    reference_o, reference_lse = FILE._reference_forward(q, k, v, SCALE, True, *options)
    assert reference_o.stride() == o.stride()
    torch.testing.assert_close((reference_o, reference_lse), (o, lse))

    do = torch.randn_like(o)
    for needed in ([True, True, False], [True, False, False], [False, True, False]):
        arguments = (do, q, k, v, o, lse, SCALE, needed, True, *options)
        grads = FILE.attention_bwd(*arguments)
        first = (do.transpose(1, 2), *tokens_first, expected, lse, SCALE, needed, False, *options)
        for grad, other, n in zip(grads[:3], FILE.attention_bwd(*first), (needed[0], *needed[1:2] * 2), strict=False):
            assert torch.equal(grad.transpose(1, 2) if n else grad, other)
        torch.library.opcheck(FILE.attention_bwd, arguments)
        for grad, other in zip(grads, FILE._reference_backward(*arguments), strict=True):
            assert grad.stride() == other.stride()
            torch.testing.assert_close(grad, other)


def test_fullgraph_compile(device, computed_by_pytorch):
    qkv = make(1, 5, 3, 2, 8, device=device)

    def f(x):
        q, k, v = (t.transpose(1, 2) for t in x.unbind(2))
        return ops.attention_qkvpacked(x), ops.attention(q, k, v)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(sum(o.square().sum() for o in g(qkv)), qkv)[0] for g in (compiled, f)]
    torch.testing.assert_close(*grads)


def test_addressing():
    x = torch.empty(2, 5, 3, 72, dtype=torch.bfloat16)
    assert addressing(x) == {"ALIGN": 16, "INDEX": tl.int32}
    assert addressing(x[..., 4:])["ALIGN"] == 8 and addressing(x[..., 1:])["ALIGN"] == 2
    assert addressing(x, x.view(2, 5, 6, 36))["ALIGN"] == 8
    # No memory lies behind such strides; nothing is read.
    for tokens, index in ((1000, tl.int32), (3000, tl.int64)):
        far = torch.empty(2, tokens, 1, 8, device="meta").as_strided((2, tokens, 1, 8), (8, 2**20, 8, 1))
        far.data_ptr = lambda: 0
        assert addressing(far)["INDEX"] == index
    assert addressing(x, mask_reach=2**31)["INDEX"] == tl.int64


def test_int64_offsets_give_the_same(device, monkeypatch):
    tensors = make_qkv(*USUAL, device=device)
    do = torch.randn_like(tensors["q"])
    runs = []
    for reach in (OPERANDS.MAX_INT32_REACH, 0):
        monkeypatch.setattr(OPERANDS, "MAX_INT32_REACH", reach)
        out = ops.attention(**tensors)
        runs.append((out, *torch.autograd.grad(out, list(tensors.values()), do)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_config_fits_shared_memory():
    for arch, shared in (("sm_90", 227 << 10), ("sm_120", 99 << 10), ("gfx942", 64 << 10), ("small", 33 << 10)):
        for D in (1, 16, 64, 72, 128):
            for dtype in (torch.float32, torch.bfloat16):
                config = choose_config(1374, 1374, D, dtype, DeviceFacts("none", arch, 1, shared), heads=8)
                for kernel in ("forward", "dkv", "dq"):
                    tiling = getattr(config, kernel)
                    used = shared_bytes(kernel, tiling, sum(head_parts(D)), dtype.itemsize)
                    assert used <= shared, (arch, D, dtype, kernel)
                    assert min(tiling.block_m, tiling.block_n) >= 16


def test_pieces_hold_every_key_and_little_else():
    for largest in (64, 128):
        for N in range(1, 300):
            starts, sizes = key_pieces(N, largest)
            assert list(starts) == [sum(sizes[:i]) for i in range(len(sizes))]
            assert N <= sum(sizes) < N + max(16, largest // 4) + (N % largest > largest // 2) * largest // 4
            assert starts[-1] < N and all(s & (s - 1) == 0 and s >= 16 for s in sizes)
    assert key_pieces(197, 128)[1] == (128, 64, 16)


def test_heads_are_split_rather_than_padded():
    assert [head_parts(D) for D in (16, 36, 64, 72, 80, 88, 96)] == [
        (16,), (32, 16), (64,), (64, 16), (64, 16), (64, 32), (64, 32)
    ]  # fmt: skip
    for D in range(1, 257):
        assert D <= sum(head_parts(D)) <= max(16, 1 << (D - 1).bit_length())


@pytest.mark.parametrize("target", TARGETS)
def test_useful_share_of_the_scores(target):
    # 197²/(256 · 208) is 72.9 %, 577²/(640 · 592) 87.9 %: rounded, what 64 rows and pieces of 16 keys allow.
    for N, least in ((197, 0.728), (577, 0.878)):
        config = choose_config(N, N, 64, torch.bfloat16, TARGETS[target].facts, heads=384)
        if target.startswith(("sm_9", "sm_10", "gfx")) or N == 197:
            assert useful_share(N, N, config.forward) > least
