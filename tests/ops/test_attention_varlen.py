"""attention_varlen: images of different size packed in one row of tokens."""

import itertools
import sys

import pytest
import torch

from vitkernels import ops, reference, use_backend
from vitkernels.testing import check_op

FILE = sys.modules["vitkernels.ops._attention.registered"]
LENGTHS = [1, 50, 130, 64, 7]


def make(lengths=LENGTHS, H=2, D=24, dtype=torch.float32, device="cpu", extra=0):
    T = sum(lengths) + extra
    tensors = {x: torch.randn(T, H, D).to(device, dtype).requires_grad_() for x in "qkv"}
    starts = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    return tensors, {"cu_seqlens": starts, "max_seqlen": max(lengths)}


def varlen(q, k, v, cu_seqlens, max_seqlen, **options):
    return reference.attention_varlen(q, k, v, cu_seqlens, **options)


@pytest.mark.parametrize(("D", "dtype"), [(24, torch.float32), (64, torch.bfloat16), (72, torch.float16)], ids=str)
def test_images_do_not_see_each_other(D, dtype, device):
    tensors, options = make(H=4, D=D, dtype=dtype, device=device)
    check_op(ops.attention_varlen, varlen, tensors, options=options)


def test_packed_images_equal_the_same_one_by_one(device):
    tensors, options = make([70, 33], device=device)
    do = torch.randn_like(tensors["q"])
    out = ops.attention_varlen(**tensors, **options)
    grads = torch.autograd.grad(out, list(tensors.values()), do)
    bounds = options["cu_seqlens"].tolist()
    for start, end in itertools.pairwise(bounds):
        image = [x[start:end].detach().transpose(0, 1)[None].requires_grad_() for x in tensors.values()]
        alone = ops.attention(*image)
        torch.testing.assert_close(out[start:end], alone[0].transpose(0, 1), rtol=1e-5, atol=1e-6)
        for packed, single in zip(
            grads, torch.autograd.grad(alone, image, do[start:end].transpose(0, 1)[None]), strict=True
        ):
            torch.testing.assert_close(packed[start:end], single[0].transpose(0, 1), rtol=1e-5, atol=2e-6)


def test_causal_scale_and_int64_bounds(device):
    tensors, options = make(device=device)
    options |= {"is_causal": True, "scale": 0.3, "cu_seqlens": options["cu_seqlens"].long()}
    check_op(ops.attention_varlen, varlen, tensors, options=options)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_and_qk_norm(interleaved, device):
    tensors, options = make(device=device)
    T, weight = tensors["q"].shape[0], torch.randn(24, device=device)
    rope = (*0.5 * torch.randn(2, T, 24, device=device), interleaved)  # no rotation, and scores that stay small

    def expected(q, k, v, cu_seqlens, max_seqlen):
        q, k = (x.transpose(0, 1)[None] for x in (q, k))
        q, k = reference.prepare_qk(q, k, rope, 0, (weight, None, 1e-6, False), None)
        return reference.attention_varlen(q[0].transpose(0, 1), k[0].transpose(0, 1), v, cu_seqlens)

    check_op(
        lambda **given: ops.attention_varlen(**given, rope=rope, q_norm=(weight,)), expected, tensors, options=options
    )


def test_tokens_of_no_image_are_zero(device):
    tensors, options = make([40, 30], extra=9, device=device)
    check_op(ops.attention_varlen, varlen, tensors, options=options)
    out = ops.attention_varlen(**tensors, **options)
    grads = torch.autograd.grad(out.sum(), list(tensors.values()))
    for t in (out, *grads):
        assert not t[70:].any()


def test_an_image_without_tokens(device):
    tensors, options = make([40, 0, 30], device=device)
    check_op(ops.attention_varlen, varlen, tensors, options=options)


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("backend", ["torch", "auto" if torch.cuda.is_available() else "emulated"])
@pytest.mark.parametrize(("max_seqlen", "T"), [(0, 0), (40, 0), (40, 140)])
def test_nothing_but_images_without_tokens(T, max_seqlen, backend, prepared, device):
    starts = torch.zeros(4, dtype=torch.int32, device=device)
    q, k, v = (torch.randn(T, 2, 24, device=device, requires_grad=True) for _ in range(3))
    more = {"rope": torch.randn(2, T, 24, device=device).unbind(0), "q_norm": (torch.ones(24, device=device),)}
    with use_backend(backend):
        for _ in range(3):  # the third is known
            with torch.no_grad():
                assert torch.equal(ops.attention_varlen(q, k, v, starts, max_seqlen), torch.zeros_like(q))
        out = ops.attention_varlen(q, k, v, starts, max_seqlen, **(more if prepared else {}))
        assert torch.equal(out, torch.zeros_like(q))
        for grad in torch.autograd.grad(out.sum(), (q, k, v)):
            assert torch.equal(grad, torch.zeros_like(q))


def test_slices_of_a_packed_projection(device):
    qkv = torch.randn(sum(LENGTHS), 3, 2, 24, device=device, requires_grad=True)
    _, options = make(device=device)
    check_op(lambda qkv, **options: ops.attention_varlen(*qkv.unbind(1), **options),
             lambda qkv, **options: varlen(*qkv.unbind(1), **options), {"qkv": qkv}, options=options)  # fmt: skip


@pytest.mark.parametrize("trained", ["q", "k", "v", "kv"])
def test_frozen(trained, device):
    tensors, options = make(device=device)
    for name, t in tensors.items():
        t.requires_grad_(name in trained)
    check_op(ops.attention_varlen, varlen, tensors, options=options)


def test_a_nan_stays_in_its_image(device):
    tensors, options = make([40, 70, 30], device=device)
    with torch.no_grad():
        for t in tensors.values():
            t[60, 0, 3] = float("nan")
    out = ops.attention_varlen(**tensors, **options)
    grads = torch.autograd.grad(out.sum(), list(tensors.values()))
    for t in (out, *grads):
        assert t[:40].isfinite().all() and t[110:].isfinite().all()
        assert not t[40:110].isfinite().all()


def test_gradcheck(device):
    tensors, options = make([3, 1, 5], D=4, dtype=torch.float64, device=device)
    f = lambda q, k, v: ops.attention_varlen(q, k, v, **options)  # noqa: E731
    assert torch.autograd.gradcheck(f, [t.detach().double().requires_grad_() for t in tensors.values()], fast_mode=True)


def test_dropout_is_drawn_by_image(device):
    tensors, options = make([40, 70], device=device)
    torch.manual_seed(5)
    drawn = reference.dropout_scale(int(torch.randint(2**62, (1,), device=device)), (2, 2, 70, 70), 0.4).to(device)

    def dropped(**given):
        torch.manual_seed(5)
        return ops.attention_varlen(**given, dropout_p=0.4)

    def expected(q, k, v, cu_seqlens, max_seqlen):
        out = []
        for i, (start, end) in enumerate(((0, 40), (40, 110))):
            image = (x[start:end].transpose(0, 1)[None] for x in (q, k, v))
            scale = drawn[i : i + 1, :, : end - start, : end - start].to(q.dtype)
            out.append(reference.attention(*image, dropout_scale=scale)[0].transpose(0, 1))
        return torch.cat(out)

    check_op(dropped, expected, tensors, options=options)


def test_reruns_are_bit_equal(device):
    tensors, options = make(device=device)
    do = torch.randn_like(tensors["q"])

    def run():
        out = ops.attention_varlen(**tensors, **options)
        return out, *torch.autograd.grad(out, list(tensors.values()), do)

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_opcheck_and_the_references_of_registered_ops(device):
    tensors, options = make([40, 1, 66], device=device, extra=2)
    q, k, v = (t.detach() for t in tensors.values())
    more = (False, None, None, True, 0.0, options["cu_seqlens"], options["max_seqlen"])
    o, lse = FILE.attention_fwd(q, k, v, 0.3, *more)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(FILE.attention_fwd, (q, k, v, 0.3, *more), test_utils=tests)
    for a, e in zip(FILE._reference_forward(q, k, v, 0.3, *more), (o, lse), strict=True):
        torch.testing.assert_close(a, e)
    backward = (torch.randn_like(o), q, k, v, o, lse, 0.3, [True, True, False], *more)
    torch.library.opcheck(FILE.attention_bwd, backward, test_utils=tests)
    for a, e in zip(FILE._reference_backward(*backward), FILE.attention_bwd(*backward), strict=True):
        torch.testing.assert_close(a, e)


def test_fullgraph_compile(device, computed_by_pytorch):
    tensors, options = make([4, 1, 6], D=8, device=device)

    def f(q, k, v):
        return ops.attention_varlen(q, k, v, **options).square().sum()

    runs = [
        torch.autograd.grad(g(*tensors.values()), list(tensors.values()))
        for g in (f, torch.compile(f, fullgraph=True, backend="aot_eager"))
    ]
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b)


Q = torch.zeros(10, 3, 8)
STARTS = torch.tensor([0, 4, 10], dtype=torch.int32)
BAD = {
    "rank": (lambda: ops.attention_varlen(Q[None], Q, Q, STARTS, 6), ValueError, r"expected \(T, H, D\)"),
    "shape of k": (lambda: ops.attention_varlen(Q, Q[:9], Q, STARTS, 6), ValueError, r"k has shape \(9, 3, 8\)"),
    "bounds of floats": (lambda: ops.attention_varlen(Q, Q, Q, STARTS.float(), 6), TypeError, "is torch.float32"),
    "bounds a list": (lambda: ops.attention_varlen(Q, Q, Q, [0, 10], 6), TypeError, "cu_seqlens is list"),
    "no image": (lambda: ops.attention_varlen(Q, Q, Q, STARTS[:1], 6), ValueError, r"cu_seqlens has shape \(1,\)"),
    "bounds elsewhere": (lambda: ops.attention_varlen(Q, Q, Q, STARTS.to("meta"), 6), ValueError, "is on meta"),
    "falling": (lambda: ops.attention_varlen(Q, Q, Q, STARTS[[0, 2, 1]], 10), ValueError, r"is \[0, 10, 4\]"),
    "beyond": (lambda: ops.attention_varlen(Q, Q, Q, STARTS * 2, 12), ValueError, "the last 10 at most"),
    "tokens in front": (lambda: ops.attention_varlen(Q, Q, Q, STARTS[1:], 6), ValueError, "the first 0"),
    "too long": (lambda: ops.attention_varlen(Q, Q, Q, STARTS, 5), ValueError, "5, max_seqlen, at most apart"),
    "max_seqlen 0": (lambda: ops.attention_varlen(Q, Q, Q, STARTS, 0), ValueError, "0, max_seqlen, at most apart"),
    "max_seqlen −1": (lambda: ops.attention_varlen(Q, Q, Q, STARTS, -1), ValueError, "max_seqlen is -1; expected 0"),
    "max_seqlen float": (lambda: ops.attention_varlen(Q, Q, Q, STARTS, 6.0), TypeError, "max_seqlen is a float"),
    "no tokens": (lambda: ops.attention_varlen(Q[:0], Q[:0], Q[:0], STARTS, 6), ValueError, "the last 0 at most"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, no_launch):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()
