"""Attention with decomposed relative positions: against PyTorch by the error rule, the reference against timm's SAM."""

import pytest
import torch
from timm.models.vision_transformer_sam import get_decomposed_rel_pos_bias

from vitkernels import ops, reference
from vitkernels.testing import check_op


def make(Y, X, window=None, H=2, D=16, B=2, dtype=torch.bfloat16, padding=False, device="cpu"):
    rows, columns = window or (Y, X)
    tensors = {
        "qkv": torch.randn(B, Y, X, 3, H, D),
        "rel_pos_h": torch.randn(2 * rows - 1, D) * 0.3,
        "rel_pos_w": torch.randn(2 * columns - 1, D) * 0.3,
    }
    if padding:
        tensors["padding"] = torch.randn(3, H, D)
    return {name: t.to(device, dtype).requires_grad_() for name, t in tensors.items()}


def plain(qkv, rel_pos_h, rel_pos_w, window=None, **options):
    image = qkv.shape[1:3]
    out = reference.window_attention(
        qkv.flatten(1, 2), tuple(image), window or tuple(image), rel_pos=(rel_pos_h, rel_pos_w), **options
    )
    return out.unflatten(1, image)


def compare(tensors, window, yardstick_options=None, **options):
    check_op(
        lambda **given: ops.decomposed_attention(**given, window_size=window, **options),
        lambda **given: plain(**given, window=window, **options | (yardstick_options or {})),
        tensors,
    )


CASES = {
    "whole image": ((9, 11), None),
    "rows of one tile": ((3, 64), None),
    "columns of several tiles": ((3, 72), None),
    "one column": ((20, 1), None),
    "windows": ((8, 12), (4, 6)),
    "padded": ((9, 10), (4, 7)),
    "larger than the image": ((5, 3), (7, 7)),
    "SAM's": ((16, 15), (14, 14)),
}


def is_padded(case):
    image, window = CASES[case]
    return window is not None and any(n % w for n, w in zip(image, window, strict=True))


@pytest.mark.parametrize(
    ("case", "padding"), [(c, p) for c in CASES for p in ("hidden", "value") if p == "hidden" or is_padded(c)]
)
def test_outputs_and_gradients(case, padding, device):
    image, window = CASES[case]
    compare(make(*image, window, padding=padding == "value", device=device), window)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("case", ["padded", "columns of several tiles"])
def test_dtypes(case, dtype, device):
    image, window = CASES[case]
    compare(make(*image, window, D=24, B=1, dtype=dtype, padding=is_padded(case), device=device), window)


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
        out = ops.decomposed_attention(**tensors, window_size=4)
        return out, *torch.autograd.grad(out, list(tensors.values()), do)

    for a, b in zip(run(tensors, upstream), run(strided, lay_out(upstream)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("D", [80, 128])
def test_wide_heads(D, device):
    compare(make(6, 5, D=D, H=1, B=1, device=device), None, scale=0.2)


@pytest.mark.parametrize("names", [("rel_pos_h", "rel_pos_w"), ("rel_pos_w",)])
def test_tables_of_another_dtype(names, device):
    tensors = make(6, 5, B=1, device=device)
    for name in names:
        tensors[name] = tensors[name].detach().float().requires_grad_()
    compare(tensors, None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("case", ["padded", "whole image"])
def test_dropout(case, dtype, device):
    image, window = CASES[case]
    tensors = make(*image, window, padding=is_padded(case), dtype=dtype, device=device)
    rows, columns = window or image
    torch.manual_seed(5)
    seed = int(torch.randint(2**62, (1,), device=device))
    count = -(-image[0] // rows) * -(-image[1] // columns)
    drawn = reference.dropout_scale(seed, (2 * count, 2, rows * columns, rows * columns), 0.3).to(device)

    def dropped(**given):
        torch.manual_seed(5)
        return ops.decomposed_attention(**given, window_size=window, dropout_p=0.3)

    check_op(dropped, lambda **given: plain(**given, window=window, dropout_scale=drawn), tensors)


def test_gradcheck(device):
    tensors = make(3, 4, (2, 3), H=1, D=4, B=1, dtype=torch.float64, padding=True, device=device)

    def attend(*given):
        return ops.decomposed_attention(**dict(zip(tensors, given, strict=True)), window_size=(2, 3))

    torch.autograd.gradcheck(attend, list(tensors.values()), fast_mode=True)


def test_a_nan_stays_in_its_window(device):
    tensors = make(8, 8, (4, 4), device=device)
    with torch.no_grad():
        tensors["qkv"][0, 1, 1, 1] = float("nan")  # a key of the first window
        out = ops.decomposed_attention(**tensors, window_size=4)
    assert out[0, :4, :4].isnan().all()
    assert not out[1].isnan().any()
    assert not out[0, 4:].isnan().any()
    assert not out[0, :4, 4:].isnan().any()


@pytest.mark.parametrize("needed", ["qkv", "rel_pos_h", "rel_pos_w", "padding"])
def test_gradient_of_one_tensor_alone(needed, device):
    tensors = make(5, 6, (4, 4), B=1, padding=True, device=device)
    alone = {name: t.detach().requires_grad_(name == needed) for name, t in tensors.items()}
    (grad,) = torch.autograd.grad(ops.decomposed_attention(**alone, window_size=4).sum(), [alone[needed]])
    (expected,) = torch.autograd.grad(ops.decomposed_attention(**tensors, window_size=4).sum(), [tensors[needed]])
    assert torch.equal(grad, expected)


@pytest.mark.parametrize("sizes", [{"B": 0}, {"H": 0}])
def test_nothing_to_attend_to(sizes, device):
    tensors = make(5, 4, (3, 3), padding=True, device=device, **sizes)
    out = ops.decomposed_attention(**tensors, window_size=3)
    grads = torch.autograd.grad(out.sum(), list(tensors.values()))
    assert out.shape == (sizes.get("B", 2), 5, 4, sizes.get("H", 2), 16)
    assert all(g.shape == t.shape and not g.any() for g, t in zip(grads, tensors.values(), strict=True))


def test_the_reference_has_the_bias_of_timm():
    tensors = make(5, 7, B=2, dtype=torch.float64)
    q, k, v = tensors["qkv"].flatten(1, 2).permute(2, 0, 3, 1, 4).flatten(1, 2).unbind(0)
    bias = get_decomposed_rel_pos_bias(q, tensors["rel_pos_h"], tensors["rel_pos_w"], (5, 7), (5, 7))
    expected = ((q * 0.25) @ k.transpose(1, 2) + bias).softmax(-1) @ v
    expected = expected.view(2, 2, 5, 7, 16).permute(0, 2, 3, 1, 4)
    torch.testing.assert_close(plain(**tensors, scale=0.25), expected)


QKV, HEIGHT, WIDTH = torch.zeros(1, 4, 6, 3, 2, 8), torch.zeros(7, 8), torch.zeros(11, 8)
WRONG = {
    "no image": (lambda: ops.decomposed_attention(QKV[:, 0], HEIGHT, WIDTH), ValueError, "expected \\(B, Y, X, 3, H,"),
    "table": (
        lambda: ops.decomposed_attention(QKV, WIDTH, WIDTH), ValueError, "rel_pos_h has shape \\(11, 8\\).*\\(7, 8\\)"
    ),
    "window": (
        lambda: ops.decomposed_attention(QKV, HEIGHT, WIDTH, window_size=0), ValueError, "window_size is 0; expected 1"
    ),
    "tables of a window": (
        lambda: ops.decomposed_attention(QKV, HEIGHT, WIDTH, window_size=3), ValueError, "rel_pos_h has shape"
    ),
    "no table": (lambda: ops.decomposed_attention(QKV, HEIGHT, None), TypeError, "rel_pos_w"),
    "dtype": (lambda: ops.decomposed_attention(QKV.long(), HEIGHT, WIDTH), TypeError, "qkv has dtype torch.int64"),
}  # fmt: skip


@pytest.mark.usefixtures("no_launch")
@pytest.mark.parametrize("what", WRONG)
def test_errors(what):
    call, error, message = WRONG[what]
    with pytest.raises(error, match=message):
        call()
