"""Hostile inputs 38 to 42: masks, head dims, dropout, widths."""

import pytest
import torch
from op_calls import ATTENTION, WINDOWS, call, each_op, tiny_model

from vitkernels.layers import Attention

hostile = pytest.mark.hostile
RIGHT = "the right result"
MASKED = ("attention", "attention_qkvpacked")


@hostile(38, "a query that looks at no key, by a bool mask or a mask of −∞", "0, and no gradient")
@pytest.mark.parametrize(("op", "kind", "N"), [("attention", "bool", 70), ("attention_qkvpacked", "float", 5)])
def test_fully_masked_rows(op, kind, N, device):
    made = call(op, N=N, device=device)
    looks = torch.rand(N, N, device=device) < 0.7
    looks[2] = False
    mask = looks if kind == "bool" else torch.zeros(N, N, device=device).masked_fill(~looks, float("-inf"))
    made.options["attn_mask"] = mask
    y = made()
    row = y[:, :, 2] if op == "attention" else y[:, 2]
    assert torch.equal(row, torch.zeros_like(row))
    made.check()


@hostile(39, "bool and float masks of every shape that broadcasts", RIGHT)
@pytest.mark.parametrize(
    ("op", "shape", "dtype"),
    [
        ("attention", (5,), torch.bool),
        ("attention_qkvpacked", (5, 5), torch.float64),
        ("attention_qkvpacked", (1, 5), torch.float32),
        ("attention", (5, 1), torch.bool),
        ("attention", (2, 5, 5), torch.float32),
        ("attention_qkvpacked", (2, 1, 1, 5), torch.bool),
        ("attention", (1, 2, 5, 5), torch.float32),
        ("attention_qkvpacked", (2, 2, 5, 5), torch.bool),
    ],
    ids=str,
)
def test_masks(op, shape, dtype, device):
    made = call(op, grad=len(shape) == 4 and op == "attention", device=device)
    mask = (
        torch.rand(shape, device=device) < 0.8 if dtype == torch.bool else torch.randn(shape, device=device).to(dtype)
    )
    made.options["attn_mask"] = mask
    made.check()


@hostile(39, "a mask that does not broadcast", "`ValueError`")
@each_op(MASKED)
@pytest.mark.parametrize("shape", [(4, 5), (5, 4), (3, 1, 5, 5), (3, 5, 5), (1, 1, 2, 5, 5), (0, 5)], ids=str)
def test_masks_that_do_not_broadcast(op, shape, no_launch, device):
    mask = torch.ones(shape, dtype=torch.bool, device=device)
    with pytest.raises(
        ValueError, match=rf"{op}: attn_mask has shape .*; expected one that broadcasts to \(2, 2, 5, 5\)"
    ):
        call(op, device=device)(attn_mask=mask)


@hostile(39, "a mask of integers", "`TypeError`")
@each_op(MASKED)
def test_integer_masks(op, no_launch, device):
    mask = torch.ones(5, 5, dtype=torch.int64, device=device)
    with pytest.raises(TypeError, match=f"{op}: attn_mask has dtype torch.int64; expected bool"):
        call(op, device=device)(attn_mask=mask)


@hostile(40, "72, 80 and other head dims that 16 or a power of two does not divide", RIGHT)
@pytest.mark.parametrize(
    ("op", "D", "dtype"),
    [
        ("attention", 72, torch.float16),
        ("attention_qkvpacked", 80, torch.bfloat16),
        ("attention_varlen", 20, torch.float32),
        ("attention", 3, torch.float32),
    ],
    ids=str,
)
def test_head_dims(op, D, dtype, device):
    call(op, N=17, D=D, dtype=dtype, device=device).check()


@hostile(41, "dropout below 0, above 1 or NaN", "`ValueError`")
@each_op([*ATTENTION, *WINDOWS])
@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan"), float("inf")])
def test_dropout_that_is_no_probability(op, p, no_launch, device):
    with pytest.raises(ValueError, match=f"{op}: dropout_p is {p}; expected 0 to 1"):
        call(op, device=device)(dropout_p=p)


@hostile(41, "dropout of 1", "zeros, and gradients of zero")
@each_op(["attention", "attention_varlen"])
def test_dropout_of_one(op, device):
    made = call(op, dtype=torch.bfloat16, device=device)
    y = made(dropout_p=1.0)
    y.sum().backward()
    for t in (y, *(t.grad for t in made.tensors.values())):
        assert torch.equal(t, torch.zeros_like(t))


@hostile(42, "a width that the heads do not divide", "`ValueError`")
@each_op(["block"])
@pytest.mark.parametrize("heads", [3, 0, -2])
def test_width_that_heads_do_not_divide(op, heads, no_launch, device):
    with pytest.raises(ValueError, match=f"{op}: the qkv weight has 48 rows; expected 3 · {heads} heads"):
        call(op, device=device)(num_heads=heads)


@hostile(42, "a width that the heads do not divide, to a layer or a model", "`ValueError`")
@pytest.mark.parametrize("heads", [3, 0, -2])
def test_layers_of_such_a_width(heads):
    for make in (lambda: Attention(16, heads), lambda: tiny_model(num_heads=heads)):
        with pytest.raises(ValueError, match=f"num_heads.* {heads}.* 16; choose another"):
            make()
