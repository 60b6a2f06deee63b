"""A bias of keys, as the logarithm of the size of merged tokens (ToMe, arXiv 2210.09461), in every attention op."""

import sys

import pytest
import torch
from test_attention_masks import REGIMES, dtype_at, force, heads_of, learned, make, random_bool
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import vitkernels
from vitkernels import ops, reference
from vitkernels.ops._attention.config import choose_config
from vitkernels.runtime import DeviceFacts
from vitkernels.testing import check, check_op

FILE = sys.modules["vitkernels.ops._attention.registered"]
SIZES = torch.tensor([1.0, 1.0, 2.0, 3.0, 8.0])


@pytest.fixture(params=REGIMES)
def N(request, monkeypatch):
    """A number of tokens, in each regime."""
    force(request.param, monkeypatch)
    return REGIMES[request.param][0]


def log_sizes(*shape, dtype=torch.float32, device="cpu", grad=True):
    sizes = SIZES[torch.randint(len(SIZES), shape)] + torch.rand(shape)
    return sizes.log().to(device, dtype).requires_grad_(grad)


def plain(q, k, v, key_bias, **options):
    """PyTorch's attention; its math kernel, as its flash kernel for CPUs computes half precision in fp32 here."""
    with sdpa_kernel(SDPBackend.MATH):
        return reference.attention(q, k, v, key_bias=key_bias, **options)


def test_the_reference_is_proportional_attention():
    """A key of size s weighs as s equal keys do."""
    q, k, v = make(2, 2, 7, 8, torch.float64, N_kv=4).values()
    sizes = torch.tensor([[1, 3, 2, 1], [2, 2, 1, 1]])
    for b, n in enumerate(sizes):
        keys, values = (x[b : b + 1].repeat_interleave(n, dim=2) for x in (k, v))
        expected = reference.attention(q[b : b + 1], keys, values)
        got = reference.attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], key_bias=sizes[b : b + 1].double().log())
        torch.testing.assert_close(got, expected)


def test_outputs_and_gradients(N, device):
    H = heads_of(N)
    tensors = make(2, H, N, 24, device=device) | {"key_bias": log_sizes(2, N, dtype=dtype_at(N), device=device)}
    check_op(ops.attention, plain, tensors)


@pytest.mark.parametrize(
    ("mask", "N"),
    [("keys", "windows"), ("pairs", "row"), ("pairs", "blocks"), ("learned", "windows"), ("learned", "row"),
     ("learned", "blocks")],
    indirect=["N"],
)  # fmt: skip
def test_beside_a_mask(mask, N, device):
    H = heads_of(N)
    tensors = make(2, H, N, 24, device=device) | {"key_bias": log_sizes(2, N, dtype=dtype_at(N), device=device)}
    if mask == "learned":
        check_op(ops.attention, plain, tensors | {"attn_mask": learned(H, N, N, device=device)})
        return
    seen = random_bool(2, 1, 1 if mask == "keys" else N, N).to(device)
    seen[..., 0] = True
    check_op(ops.attention, plain, tensors, options={"attn_mask": seen})


def test_causal(N, device):
    H = heads_of(N)
    tensors = make(2, H, N, 24, device=device) | {"key_bias": log_sizes(2, N, dtype=dtype_at(N), device=device)}
    check_op(ops.attention, plain, tensors, options={"is_causal": True})


def test_dropout(N, device):
    H = heads_of(N)
    tensors = make(2, H, N, 24, device=device) | {"key_bias": log_sizes(2, N, dtype=dtype_at(N), device=device)}
    torch.manual_seed(5)
    seed = int(torch.randint(2**62, (1,), device=device))
    drawn = reference.dropout_scale(seed, (2, H, N, N), 0.3).to(device)

    def dropped(**given):
        torch.manual_seed(5)
        return ops.attention(**given, dropout_p=0.3)

    check_op(dropped, lambda **given: reference.attention(**given, dropout_scale=drawn), tensors)


def test_cross_attention_of_other_dtypes(device):
    """The bias keeps its dtype, and its gradient has it."""
    for dtype, kept in ((torch.bfloat16, torch.float32), (torch.float32, torch.float64), (torch.float32, torch.half)):
        tensors = make(2, 4, 70, 24, dtype, N_kv=54, device=device)
        bias = log_sizes(2, 54, dtype=kept, device=device)
        rounded = bias.detach().to(torch.promote_types(kept, torch.float32))
        out = ops.attention(**tensors, key_bias=bias)
        assert torch.equal(out, ops.attention(**tensors, key_bias=rounded))
        assert torch.autograd.grad(out.sum(), bias)[0].dtype == kept


@pytest.mark.parametrize("N", ["windows", "blocks"], indirect=True)
def test_packed(N, device):
    H = heads_of(N)
    qkv = torch.randn(2, N, 3, H, 24, device=device).to(dtype_at(N)).requires_grad_()
    tensors = {"qkv": qkv, "key_bias": log_sizes(2, N, dtype=dtype_at(N), device=device)}
    check_op(ops.attention_qkvpacked, reference.attention_qkvpacked, tensors)


def test_packed_with_rope_norms_and_a_mask(device):
    qkv = torch.randn(2, 54, 3, 2, 24, device=device, requires_grad=True)
    angles = torch.rand(53, 12, device=device).repeat(1, 2)
    options = {"rope": (angles.cos(), angles.sin()), "num_prefix_tokens": 1, "q_norm": (None, None, 1e-6, True)}
    tensors = {"qkv": qkv, "key_bias": log_sizes(2, 54, device=device), "attn_mask": learned(2, 54, 54, device=device)}
    f = lambda qkv, key_bias, attn_mask: ops.attention_qkvpacked(  # noqa: E731
        qkv, key_bias=key_bias, attn_mask=attn_mask, **options
    )
    plain = lambda qkv, key_bias, attn_mask: reference.attention_qkvpacked(  # noqa: E731
        qkv, key_bias=key_bias, attn_mask=attn_mask, **options | {"rope": (*options["rope"], False)}
    )
    check_op(f, plain, tensors)


@pytest.mark.parametrize(("D", "dtype"), [(24, torch.float32), (64, torch.bfloat16)], ids=str)
def test_varlen(D, dtype, device):
    lengths = [1, 50, 130, 64]
    T = sum(lengths) + 3  # the last tokens belong to no image
    tensors = {x: torch.randn(T, 4, D).to(device, dtype).requires_grad_() for x in "qkv"}
    tensors["key_bias"] = log_sizes(T, dtype=dtype, device=device)
    starts = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    check_op(
        lambda **given: ops.attention_varlen(**given, cu_seqlens=starts, max_seqlen=130),
        lambda **given: reference.attention_varlen(**given, cu_seqlens=starts),
        tensors,
    )
    out = ops.attention_varlen(**tensors, cu_seqlens=starts, max_seqlen=130)
    assert not torch.autograd.grad(out.sum(), tensors["key_bias"])[0][-3:].any()


def test_weights(device):
    q, k, _ = make(2, 2, 9, 8, torch.float32, N_kv=6, device=device, grad=False).values()
    bias = log_sizes(2, 6, device=device, grad=False)
    expected = ((q @ k.transpose(-1, -2)) * 8**-0.5 + bias[:, None, None]).softmax(-1)
    torch.testing.assert_close(ops.attention_weights(q, k, key_bias=bias), expected)
    torch.testing.assert_close(ops.attention_weights(q, k, key_bias=bias, query=-1), expected[:, :, -1:])
    causal = ops.attention_weights(q[:, :, :6], k, key_bias=bias, is_causal=True)
    torch.testing.assert_close(ops.attention_weights(q[:, :, :6], k, key_bias=bias, is_causal=True, query=2)[:, :, 0],
                               causal[:, :, 2])  # fmt: skip


def test_minus_infinity_hides_a_key(N, device):
    """Of a whole image, too: its queries give 0 and get no gradient."""
    tensors = make(2, 2, N, 24, device=device)
    bias = torch.zeros(2, N, device=device)
    bias[0, 3:9] = bias[1] = float("-inf")
    out = ops.attention(**tensors, key_bias=bias)
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    grads = torch.autograd.grad(out.float().square().sum(), list(tensors.values()))
    assert all(not g[1].any() and g.isfinite().all() for g in grads)
    assert all(not g[0, :, 3:9].any() for g in grads[1:])
    seen = {name: t[:1].detach() for name, t in tensors.items()}
    kept = torch.tensor([i for i in range(N) if not 3 <= i < 9], device=device)
    alone = ops.attention(seen["q"], seen["k"][:, :, kept], seen["v"][:, :, kept])
    given = seen["q"], *(seen[name][:, :, kept] for name in "kv")
    yardstick, truth = (plain(*(t.to(dtype) for t in given), None) for dtype in (out.dtype, torch.float64))
    for actual in (out[:1].detach(), alone):
        verdict = check("output", actual, yardstick, truth)
        assert verdict.passed, verdict.detail


@pytest.mark.parametrize("trained", ["key_bias", "q and key_bias", "v"])
def test_frozen_operands_change_no_gradient(trained, N, device):
    tensors = make(2, 2, N, 24, device=device) | {"key_bias": log_sizes(2, N, dtype=dtype_at(N), device=device)}
    do = torch.randn_like(tensors["q"])
    everything = torch.autograd.grad(ops.attention(**tensors), list(tensors.values()), do)
    expected = dict(zip(tensors, everything, strict=True))
    wanted = trained.split(" and ")
    frozen = {name: t if name in wanted else t.detach() for name, t in tensors.items()}
    got = torch.autograd.grad(ops.attention(**frozen), [tensors[name] for name in wanted], do)
    for name, grad in zip(wanted, got, strict=True):
        eps = torch.finfo(grad.dtype).eps  # other kernels may run, whose weights come from the rounded lse
        torch.testing.assert_close(grad, expected[name], rtol=1000 * eps, atol=100 * eps)


def test_layouts(device):
    """Every second image of a bias, one row for all images, and every second key."""
    tensors = make(2, 2, 54, 24, torch.float32, device=device, grad=False)
    for bias in (torch.randn(4, 54)[::2], torch.randn(1, 54).expand(2, 54), torch.randn(2, 108)[:, ::2]):
        bias = bias.to(device).requires_grad_()
        dense = bias.detach().contiguous().clone().requires_grad_()
        outs = [ops.attention(**tensors, key_bias=b) for b in (bias, dense)]
        torch.testing.assert_close(*outs, rtol=0, atol=0)
        grads = [torch.autograd.grad(out.sum(), b)[0] for out, b in zip(outs, (bias, dense), strict=True)]
        torch.testing.assert_close(*grads, rtol=0, atol=0)


def test_gradcheck(device):
    tensors = [t.detach().double().requires_grad_() for t in make(2, 2, 7, 4, torch.float64, device=device).values()]
    bias = torch.randn(2, 7, dtype=torch.float64, device=device, requires_grad=True)
    mask = torch.randn(2, 7, 7, dtype=torch.float64, device=device, requires_grad=True)
    separate = lambda q, k, v, b, m: ops.attention(q, k, v, key_bias=b, attn_mask=m, is_causal=True)  # noqa: E731
    assert torch.autograd.gradcheck(separate, (*tensors, bias, mask), fast_mode=True)
    qkv = torch.randn(2, 7, 3, 2, 4, dtype=torch.float64, device=device, requires_grad=True)
    packed = lambda qkv, b: ops.attention_qkvpacked(qkv, key_bias=b)  # noqa: E731
    assert torch.autograd.gradcheck(packed, (qkv, bias), fast_mode=True)
    starts, rows = torch.tensor([0, 3, 6], device=device), [t[0].transpose(0, 1) for t in tensors]
    varlen = lambda q, k, v, b: ops.attention_varlen(q, k, v, starts, 3, key_bias=b)  # noqa: E731
    rows = [t.detach().contiguous().requires_grad_() for t in rows]
    assert torch.autograd.gradcheck(varlen, (*rows, bias[0].detach().requires_grad_()), fast_mode=True)


def test_reruns_and_plans_are_bit_equal(device):
    tensors = make(2, 2, 54, 24, torch.bfloat16, device=device) | {"key_bias": log_sizes(2, 54, device=device)}

    def run():
        out = ops.attention(**tensors)
        return out, *torch.autograd.grad(out.sum(), list(tensors.values()))

    first = run()
    for _ in range(3):  # seen, recorded and repeated
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def test_no_images(device):
    q = torch.zeros(0, 2, 5, 8, device=device, requires_grad=True)
    bias = torch.zeros(0, 5, device=device, requires_grad=True)
    (grad,) = torch.autograd.grad(ops.attention(q, q, q, key_bias=bias).sum(), bias)
    assert grad.shape == bias.shape
    q, bias = torch.zeros(2, 0, 5, 8, device=device), torch.zeros(2, 5, device=device, requires_grad=True)
    (grad,) = torch.autograd.grad(ops.attention(q, q, q, key_bias=bias).sum(), bias)  # no heads
    assert not grad.any()


def test_opcheck_and_the_references_of_registered_ops(device):
    tests = ("test_schema", "test_faketensor")
    q, k, v = (torch.randn(2, 54, 2, 24, device=device) for _ in range(3))
    qkv, bias, scale = torch.stack([q, k, v], 2), torch.randn(2, 54, device=device), 24**-0.5
    seed = torch.tensor([12345], device=device)
    options = (torch.randn(1, 2, 54, 54, device=device), seed, False, 0.4)
    o, lse = FILE.attention_fwd(q, k, v, scale, False, *options, None, 0, bias)
    packed = (qkv, scale, *options, None, 0, bias)
    backward = (o.cos(), q, k, v, o, lse, bias, scale, [True, True, True, True], False, *options)
    only = (*backward[:8], [False, False, False, True], *backward[9:])
    packed_backward = (o.cos(), qkv, o, lse, bias, scale, True, True, *options)
    starts = torch.tensor([0, 40, 50], dtype=torch.int32, device=device)
    rows = [x[0].contiguous() for x in (q, k, v)]
    varlen = (*rows, scale, False, None, None, True, 0.0, starts, 40, bias[0])
    o, lse = FILE.attention_fwd(*varlen)
    varlen_backward = (o.cos(), *rows, o, lse, bias[0], scale, [True, True, False, True], *varlen[4:-1])
    for op, arguments in (
        (FILE.attention_fwd, (q, k, v, scale, False, *options, None, 0, bias)),
        (FILE.attention_fwd, varlen),
        (FILE.attention_qkvpacked_fwd, packed),
        (FILE.attention_biased_bwd, backward),
        (FILE.attention_biased_bwd, only),
        (FILE.attention_biased_bwd, varlen_backward),
        (FILE.attention_qkvpacked_biased_bwd, packed_backward),
    ):
        torch.library.opcheck(op, arguments, test_utils=tests)
        expected = vitkernels.ops._registry.OPS[op._schema.name.partition("::")[2]].reference(*arguments)
        for i, (a, e) in enumerate(zip(op(*arguments), expected, strict=True)):
            assert a.shape == e.shape and a.dtype == e.dtype
            if arguments is only and i in (1, 2):  # computed beside the bias's gradient, and thrown away
                continue
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


def test_compiled_and_exported(device, computed_by_pytorch):
    tensors = list(make(2, 2, 5, 8, torch.float32, device=device).values())
    bias = log_sizes(2, 5, device=device)

    def f(q, k, v, bias):
        return ops.attention(q, k, v, key_bias=bias)

    runs = []
    for g in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
        out = g(*tensors, bias)
        runs.append((out, *torch.autograd.grad(out.square().sum(), [*tensors, bias])))
    for eager, compiled in zip(*runs, strict=True):  # their products may add in another order
        torch.testing.assert_close(compiled, eager)

    class Module(nn.Module):
        def forward(self, q, bias):
            return ops.attention(q, q, q, key_bias=bias)

    q, bias = tensors[0].detach(), bias.detach()
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(Module(), (q, bias), dynamic_shapes=({0: batch}, {0: batch})).module()
    q, bias = torch.randn(3, 2, 5, 8, device=device), torch.randn(3, 5, device=device)
    assert torch.equal(exported(q, bias), f(q, q, q, bias))


def test_a_bias_keeps_the_kernels_of_whole_rows():
    """An attn_mask of the same numbers takes two kernels and a third for its gradient."""
    for arch, name in (("sm_90", "H100"), ("sm_100", "B200")):
        facts = DeviceFacts(name, arch, 132, 227 << 10)
        options = {"heads": 384, "key_bias": True}
        assert choose_config(197, 197, 64, torch.bfloat16, facts, **options).backward.regime == "row"
        options = {"heads": 384, "masked": True}
        assert choose_config(197, 197, 64, torch.bfloat16, facts, **options).backward.regime == "blocks"


class MergedAttention(nn.Module):
    """What ToMe makes of timm's attention: log(size) on the scores, and the keys for the next merge."""

    def __init__(self, channels, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def forward(self, x, size):
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        o = self.attend(qkv, size)
        return self.proj(o.flatten(2)), qkv[:, :, 1].mean(2)

    def attend(self, qkv, size):
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        if size is not None:
            scores = scores + size.log()[:, None, None, :, 0]
        return (scores.softmax(-1) @ v).transpose(1, 2)


class OurMergedAttention(MergedAttention):
    """The same on our op."""

    def attend(self, qkv, size):
        return ops.attention_qkvpacked(qkv, key_bias=None if size is None else size.log().squeeze(-1))


def merge(x, keys, size, r):
    """Merge r pairs of similar tokens, of even and odd places, by the mean of all that they stand for."""
    with torch.no_grad():
        keys = keys / keys.norm(dim=-1, keepdim=True)
        best, partner = (keys[:, ::2] @ keys[:, 1::2].transpose(-1, -2)).max(-1)
        order = best.argsort(-1, descending=True)[..., None]
        gone, kept = order[:, :r], order[:, r:]
        into = partner[..., None].gather(1, gone)

    def summed(t):
        even, odd = t[:, ::2], t[:, 1::2]
        moved = even.gather(1, gone.expand(-1, -1, t.shape[-1]))
        odd = odd.scatter_add(1, into.expand(-1, -1, t.shape[-1]), moved)
        return torch.cat([even.gather(1, kept.expand(-1, -1, t.shape[-1])), odd], 1)

    merged_size = summed(size)
    return summed(x * size) / merged_size, merged_size


def test_a_model_with_merged_tokens(device):
    """Three blocks of ToMe's attention, tokens merged between them: outputs and the gradients of all parameters."""
    blocks = nn.ModuleList(MergedAttention(32, 2) for _ in range(3)).to(device)
    ours = nn.ModuleList(OurMergedAttention(32, 2) for _ in range(3)).to(device)
    ours.load_state_dict(blocks.state_dict())
    x = torch.randn(2, 26, 32, device=device)

    def run(blocks):
        tokens, size, lengths = x, torch.ones_like(x[..., :1]), []
        for block in blocks:
            out, keys = block(tokens, size)
            tokens, size = merge(tokens + out, keys, size, 4)
            lengths.append(tokens.shape[1])
        assert lengths == [22, 18, 14] and torch.equal(size.sum(1), torch.full((2, 1), 26.0, device=device))
        blocks.zero_grad()
        tokens.square().sum().backward()
        return tokens, *(p.grad for p in blocks.parameters())

    for got, expected in zip(run(ours), run(blocks), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


Q, QKV, ROW = torch.zeros(2, 3, 5, 8), torch.zeros(2, 5, 3, 4, 8), torch.zeros(7, 3, 8)
STARTS = torch.tensor([0, 3, 7], dtype=torch.int32)
BAD = {
    "a row for all images": (lambda: ops.attention(Q, Q, Q, key_bias=torch.zeros(5)), ValueError,
                             r"attention: key_bias has shape \(5,\); expected \(2, 5\), \(B, N_kv\)"),
    "of the queries": (lambda: ops.attention(Q[:, :, :4], Q, Q, key_bias=torch.zeros(2, 4)), ValueError,
                       r"key_bias has shape \(2, 4\); expected \(2, 5\)"),
    "of heads": (lambda: ops.attention_qkvpacked(QKV, key_bias=torch.zeros(2, 4, 5)), ValueError,
                 r"attention_qkvpacked: key_bias has shape \(2, 4, 5\); expected \(2, 5\), \(B, N\)"),
    "packed images of two dims": (lambda: ops.attention_varlen(ROW, ROW, ROW, STARTS, 4, key_bias=torch.zeros(1, 7)),
                                  ValueError, r"attention_varlen: key_bias has shape \(1, 7\); expected \(7,\)"),
    "weights": (lambda: ops.attention_weights(Q, Q, key_bias=torch.zeros(2, 6)), ValueError, r"expected \(2, 5\)"),
    "integers": (lambda: ops.attention(Q, Q, Q, key_bias=torch.ones(2, 5, dtype=torch.int64)), TypeError,
                 "key_bias has dtype torch.int64; expected float16, bfloat16, float32 or float64"),
    "bool": (lambda: ops.attention(Q, Q, Q, key_bias=torch.ones(2, 5) > 0), TypeError, "key_bias has dtype torch.bool"),
    "a list": (lambda: ops.attention(Q, Q, Q, key_bias=[0.0]), TypeError, "key_bias is a list"),
    "elsewhere": (lambda: ops.attention(Q, Q, Q, key_bias=torch.zeros(2, 5, device="meta")), ValueError,
                  "key_bias is on meta, q on cpu"),
    "sparse": (lambda: ops.attention(Q, Q, Q, key_bias=torch.zeros(2, 5).to_sparse()), NotImplementedError,
               "key_bias is torch.sparse_coo; expected a dense"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, no_launch):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()
