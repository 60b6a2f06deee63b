"""Attention within windows: against PyTorch by the error rule, and the reference against timm's own windows."""

import contextlib

import pytest
import torch

from vitkernels import ops, reference
from vitkernels.runtime import use_backend
from vitkernels.testing import check_op


def make(Y, X, window, H=2, D=16, B=2, dtype=torch.bfloat16, table=True, padding=False, cosine=False, device="cpu"):
    rows, columns = window
    tensors = {"qkv": torch.randn(B, Y, X, 3, H, D)}
    if table:
        tensors["bias_table"] = torch.randn((2 * rows - 1) * (2 * columns - 1), H)
    if padding:
        tensors["padding"] = torch.randn(3, H, D)
    if cosine:
        tensors["logit_scale"] = torch.rand(H) * 10 + 5
    return {name: t.to(device, dtype).requires_grad_() for name, t in tensors.items()}


def plain(qkv, window, **options):
    B, Y, X, _, H, D = qkv.shape
    return reference.window_attention(qkv.flatten(1, 2), (Y, X), window, **options).view(B, Y, X, H, D)


def compare(tensors, window, yardstick_options=None, **options):
    check_op(
        lambda **given: ops.window_attention(**given, window_size=window, **options),
        lambda **given: plain(**given, window=window, **options | (yardstick_options or {})),
        tensors,
    )


CASES = {
    "whole": ((8, 8), (4, 4), {}),
    "shifted": ((8, 8), (4, 4), {"shift": (2, 2)}),
    "padded": ((9, 10), (4, 4), {}),
    "padded and shifted": ((9, 10), (4, 4), {"shift": (2, 1)}),
    "padded, then shifted": ((9, 10), (4, 4), {"shift": (2, 2), "roll_padded": True}),
    "shifted, with another mask": ((8, 8), (4, 4), {"shift": (2, 2), "mask_value": -3}),
    "seven": ((14, 14), (7, 7), {"shift": (3, 3)}),
    "one window": ((7, 7), (7, 7), {}),
    "larger than the image": ((5, 3), (7, 7), {}),
    "shifted by more than the image": ((2, 3), (7, 7), {"shift": (3, 3)}),
    "rectangular": ((6, 16), (3, 8), {"shift": (1, 4)}),
    "grid": ((8, 12), (4, 3), {"grid": True}),
    "blocks": ((12, 12), (9, 10), {"shift": (4, 5)}),
}


def is_padded(case):
    image, window, _ = CASES[case]
    return image[0] % window[0] > 0 or image[1] % window[1] > 0


@pytest.mark.parametrize(
    ("case", "padding"), [(c, p) for c in CASES for p in ("hidden", "value") if p == "hidden" or is_padded(c)]
)
def test_outputs_and_gradients(case, padding, device):
    image, window, options = CASES[case]
    compare(make(*image, window, padding=padding == "value", device=device), window, **options)


@pytest.mark.parametrize("case", ["padded and shifted", "seven", "blocks"])
def test_cosine(case, device):
    image, window, options = CASES[case]
    compare(make(*image, window, padding=is_padded(case), cosine=True, device=device), window, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("case", ["padded and shifted", "blocks"])
def test_dtypes(case, dtype, device):
    image, window, options = CASES[case]
    tensors = make(*image, window, D=24, B=1, dtype=dtype, padding=True, cosine=case == "blocks", device=device)
    compare(tensors, window, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("grid", "prefix"), [((5, 4), 1), ((7, 7), 0), ((6, 12), 1), ((3, 3), 2)])
def test_relative_attention(grid, prefix, dtype, device):
    entries = (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3 * (prefix > 0)
    tensors = {"qkv": torch.randn(2, prefix + grid[0] * grid[1], 3, 2, 16), "bias_table": torch.randn(entries, 2)}
    tensors = {name: t.to(device, dtype).requires_grad_() for name, t in tensors.items()}

    def yardstick(qkv, bias_table):
        return reference.window_attention(qkv, grid, grid, num_prefix_tokens=prefix, bias_table=bias_table)

    check_op(
        lambda **given: ops.relative_attention(**given, grid_size=grid, num_prefix_tokens=prefix), yardstick, tensors
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("case", ["padded and shifted", "blocks"])
def test_dropout(case, dtype, device):
    image, window, options = CASES[case]
    tensors = make(*image, window, padding=True, dtype=dtype, device=device)
    torch.manual_seed(5)
    seed = int(torch.randint(2**62, (1,), device=device))
    count = -(-image[0] // window[0]) * -(-image[1] // window[1])
    tokens = window[0] * window[1]
    drawn = reference.dropout_scale(seed, (2 * count, 2, tokens, tokens), 0.3).to(device)

    def dropped(**given):
        torch.manual_seed(5)
        return ops.window_attention(**given, window_size=window, dropout_p=0.3, **options)

    check_op(dropped, lambda **given: plain(**given, window=window, dropout_scale=drawn, **options), tensors)


def test_dropout_adds_no_factor(device):
    """The largest weight is 1 before it is divided by the sum: rounded there, 1/(1 − p) would be off for all rows."""
    tensors = make(16, 16, (8, 8), H=4, table=False, B=4, device=device)
    torch.manual_seed(5)
    seed = int(torch.randint(2**62, (1,), device=device))
    kept = reference.dropout_scale(seed, (16, 4, 64, 64), 0.3).to(device) > 0

    def dropped(**given):
        torch.manual_seed(5)
        return ops.window_attention(**given, window_size=8, scale=1.0, dropout_p=0.3)

    check_op(dropped, lambda **given: plain(**given, window=(8, 8), scale=1.0, dropout_scale=kept) / 0.7, tensors)


def test_hidden_keys_of_cosine_attention_in_fp16_by_pytorch(device):
    tensors = make(5, 5, (4, 4), cosine=True, dtype=torch.float16, device=device)
    with use_backend("torch"):
        out = ops.window_attention(**tensors, window_size=4)
    grads = torch.autograd.grad(out.sum(), list(tensors.values()))
    assert all(t.isfinite().all() for t in (out, *grads))


def test_gradcheck(device):
    tensors = make(5, 7, (4, 4), H=1, D=4, B=1, dtype=torch.float64, padding=True, cosine=True, device=device)
    names, values = zip(*tensors.items(), strict=True)

    def attend(*given):
        return ops.window_attention(**dict(zip(names, given, strict=True)), window_size=4, shift=(2, 1))

    torch.autograd.gradcheck(attend, values, fast_mode=True)


def test_a_nan_stays_in_its_window(device):
    tensors = make(8, 8, (4, 4), device=device)
    qkv = tensors["qkv"].detach().clone()
    qkv[0, 1, 1, 1] = float("nan")  # a key of the first window
    out = ops.window_attention(qkv, 4, bias_table=tensors["bias_table"].detach())
    assert out[0, :4, :4].isnan().all()
    assert not out[1].isnan().any()
    assert not out[0, 4:].isnan().any()
    assert not out[0, :4, 4:].isnan().any()


def test_a_nan_reaches_no_gradient_by_padded_queries(device):
    tensors = make(5, 5, (4, 4), padding=True, device=device)
    with torch.no_grad():
        tensors["qkv"][0, 4, 4, 1] = float("nan")  # a key of the last window, of which one token is in the image
    ours = ops.window_attention(**tensors, window_size=4)
    theirs = plain(**tensors, window=(4, 4))
    for name, tensor in tensors.items():
        got, want = (torch.autograd.grad(o.sum(), tensor, retain_graph=True)[0] for o in (ours, theirs))
        assert torch.equal(got.isfinite(), want.isfinite()), name


@pytest.mark.parametrize("layout", ["gapped", "transposed"])
def test_layouts_of_inputs_and_upstream(layout, device):
    tensors = make(5, 6, (4, 4), padding=True, device=device)
    lay_out = {
        "gapped": lambda t: torch.stack([t, t * 0 + 7], -1)[..., 0],
        "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    }[layout]
    strided = {name: lay_out(t.detach()).requires_grad_() for name, t in tensors.items()}
    upstream = torch.randn(2, 5, 6, 2, 16, device=device).to(torch.bfloat16)

    def run(tensors, do):
        out = ops.window_attention(**tensors, window_size=4, shift=2)
        return out, *torch.autograd.grad(out, list(tensors.values()), do)

    for a, b in zip(run(tensors, upstream), run(strided, lay_out(upstream)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["torch", None])
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("sizes", [{"B": 0}, {"H": 0}])
def test_nothing_to_attend_to(sizes, padding, backend, device):
    tensors = make(5, 4, (3, 3), padding=padding, device=device, **sizes)
    with use_backend(backend) if backend else contextlib.nullcontext():
        out = ops.window_attention(**tensors, window_size=3, shift=1)
        grads = torch.autograd.grad(out.sum(), list(tensors.values()))
    assert out.shape == (sizes.get("B", 2), 5, 4, sizes.get("H", 2), 16)
    assert all(g.shape == t.shape and not g.any() for g, t in zip(grads, tensors.values(), strict=True))


QKV = torch.zeros(1, 4, 6, 3, 2, 8)
WRONG = {
    "no image": (lambda: ops.window_attention(QKV[:, 0], 2), ValueError, "expected \\(B, Y, X, 3, H, D\\)"),
    "shift": (lambda: ops.window_attention(QKV, 2, shift=2), ValueError, "shift is \\(2, 2\\); expected less than"),
    "window": (lambda: ops.window_attention(QKV, 0), ValueError, "window_size is 0; expected 1 at least"),
    "grid": (lambda: ops.window_attention(QKV, 5, grid=True), ValueError, "expected a multiple of the window"),
    "shifted grid": (lambda: ops.window_attention(QKV, 2, shift=1, grid=True), ValueError, "expected 0 with grid"),
    "table": (
        lambda: ops.window_attention(QKV, 2, bias_table=torch.zeros(8, 2)), ValueError,
        "bias_table has shape \\(8, 2\\)"
    ),
    "two scales": (
        lambda: ops.window_attention(QKV, 2, scale=1.0, logit_scale=torch.ones(2)), ValueError, "expected one of them"
    ),
    "tokens": (
        lambda: ops.relative_attention(QKV[:, 0], (2, 2)), ValueError, "qkv has 6 tokens; expected num_prefix_tokens"
    ),
    "mask": (lambda: ops.window_attention(QKV, 2, mask_value=-1.5), TypeError, "mask_value"),
    "dtype": (lambda: ops.window_attention(QKV.long(), 2), TypeError, "qkv has dtype torch.int64"),
}  # fmt: skip


@pytest.mark.usefixtures("no_launch")
@pytest.mark.parametrize("what", WRONG)
def test_errors(what):
    call, error, message = WRONG[what]
    with pytest.raises(error, match=message):
        call()
