"""Hostile inputs 32 to 37: NaN, infinities, large and constant values, eps, and what may be None."""

import dataclasses

import pytest
import torch
from op_calls import ATTENTION, OPS, ROWS, call, each_op

hostile = pytest.mark.hostile
RIGHT = "the right result"


@hostile(32, "NaN in one sample", "NaN in that sample's result alone; the others are bit-equal to what they were")
@each_op()
def test_nan_stays_in_its_sample(op, device):
    made = call(op, B=3, device=device, grad=False)
    N = made.tensors["q"].shape[0] // 3 if op == "attention_varlen" else 1
    clean = made.outputs()
    for name in made.op.inputs:
        poisoned = made.tensors[name].clone()
        poisoned[N] = float("nan")
        for y, before in zip(made.outputs(**{name: poisoned}), clean, strict=True):
            kept = [i for i in range(len(y)) if not N <= i < 2 * N]
            assert torch.equal(y[kept], before[kept])
            assert y[N : 2 * N].isnan().any() == (y is not None)


@hostile(32, "NaN in one row", "NaN in that row's result and gradient alone")
@each_op([*ROWS, "attention"])
def test_nan_stays_in_its_row(op, device):
    made = call(op, device=device)
    name = made.op.inputs[0]  # of attention the queries
    row = (0, 1, 2) if op == "attention" else (0, 2)
    with torch.no_grad():
        made.tensors[name][(*row, 3)] = float("nan")
    outputs = made.outputs()
    (dx,) = torch.autograd.grad(outputs, made.tensors[name], [torch.ones_like(y) for y in outputs])
    for t in (*outputs, dx):
        bad = t.isnan().any(-1)
        assert bad[row] or (t is dx and op in ("linear", "lora_linear"))
        assert bad.sum() <= 1 and t[~bad].isfinite().all()


@hostile(
    33, "+∞ and −∞ in an input", "infinities and NaN where fp64 has them; gradients not finite where fp64's are not"
)
@each_op()
@pytest.mark.parametrize("value", [float("inf"), float("-inf")])
def test_infinities(op, value, device):
    made = call(op, device=device)
    for name in made.op.inputs:
        hostile_one = made.tensors[name].detach().clone()
        hostile_one.view(-1)[7] = value
        one = made.changed(**{name: hostile_one.requires_grad_()})
        one.changed(**{n: t.detach() for n, t in one.tensors.items()}).check()
        wide = dataclasses.replace(
            one.map(torch.Tensor.double, one.tensors), op=dataclasses.replace(one.op, function=one.op.reference)
        )
        outputs, truths = one.outputs(), wide.outputs()
        upstream = [torch.randn_like(y) for y in outputs]
        leaves = [n for n, t in one.tensors.items() if t.requires_grad]
        got = torch.autograd.grad(outputs, [one.tensors[n] for n in leaves], upstream)
        want = torch.autograd.grad(truths, [wide.tensors[n] for n in leaves], [u.double() for u in upstream])
        for n, g, w in zip(leaves, got, want, strict=True):
            assert torch.equal(g.isfinite(), w.isfinite()), f"d{n} with {value} in {name}"


@hostile(34, "fp16 at 6e4, near its largest number", RIGHT)
@each_op(n for n in OPS if n not in ("layer_norm", "rms_norm", "mlp", "attention"))
def test_fp16_near_its_largest(op, device):
    made = call(op, N=16, dtype=torch.float16, device=device, grad=False)
    large = made.map(lambda t: t.sign() * 6e4, [made.op.inputs[0]])
    small = [n for n, t in large.tensors.items() if n not in made.op.inputs and t.ndim > 1]
    large = large.map(lambda t: t * 1e-3, small)  # so that the products stay below 65,504

    def in_fp32(**arguments):
        kind = arguments[made.op.inputs[0]].dtype
        half = {n: t.float() for n, t in arguments.items() if getattr(t, "dtype", None) == torch.float16}
        y = made.op.reference(**arguments | half)
        return tuple(part.to(kind) for part in y) if isinstance(y, tuple) else y.to(kind)

    # Others sum up first, which overflows in PyTorch's half precision. Merged patches are normed and rounded, and then
    # summed up.
    yardstick = made.op.reference if op == "patch_merging" else in_fp32
    dataclasses.replace(large, op=dataclasses.replace(made.op, reference=yardstick)).check()


@hostile(35, "rows of one value, whose variance is 0", "the bias, but for the rounding of the mean over √eps")
@each_op(["layer_norm", "add_layer_norm"])
@pytest.mark.parametrize("value", [0.0, 0.1, -3.7, 3e4])
def test_constant_rows_give_the_bias(op, value, device):
    made = call(op, C=13, device=device)
    rows = torch.full((2, 5, 13), value, device=device)
    made = made.changed(x=rows) if op == "layer_norm" else made.changed(x=torch.zeros_like(rows), residual=rows)
    y = made.outputs()[0]
    bias, weight = made.tensors["bias"], made.tensors["weight"]
    assert ((y - bias).abs() <= weight.abs() * abs(value) * 2**-23 / 1e-6**0.5 + 1e-6).all()


@hostile(35, "rows of zeros to RMSNorm, whose mean square is 0", "0")
@each_op(["rms_norm", "add_rms_norm"])
def test_zero_rows_give_zero(op, device):
    made = call(op, device=device)
    y = made.map(torch.zeros_like, made.op.inputs).outputs()[0]
    assert torch.equal(y, torch.zeros_like(y))


@hostile(36, "eps = 0", RIGHT)
@each_op(normed=True)
def test_eps_of_zero(op, device):
    made = call(op, device=device)
    made.options["eps"] = 0.0
    made.check()


@hostile(36, "eps below 0, or NaN", "`ValueError`")
@each_op(normed=True)
@pytest.mark.parametrize("eps", [-1e-6, float("nan"), float("-inf")])
def test_bad_eps(op, eps, no_launch, device):
    with pytest.raises(ValueError, match=f"{op}: .*eps is {eps}; expected a number ≥ 0"):
        call(op, device=device)(eps=eps)


@hostile(36, "eps below 0, NaN or infinite, of the norms of queries and keys", "`ValueError`")
@each_op(ATTENTION)
@pytest.mark.parametrize("eps", [-1e-6, float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["q_norm", "k_norm"])
def test_bad_eps_of_qk_norm(op, which, eps, no_launch, device):
    with pytest.raises(ValueError, match=f"{op}: {which}.eps is {eps}; expected a finite number, 0 at least"):
        call(op, device=device)(**{which: (None, None, eps, False)})


@hostile(37, "each tensor that may be None, left out alone: weight without bias, bias without weight", RIGHT)
@each_op(["add_layer_norm", "linear", "patch_embed"])
def test_left_out_tensors(op, device):
    made = call(op, device=device)
    for name in made.op.optional:
        more = {"pos_embed": None} if name == "prefix_tokens" else {}  # whose rows count the prefix tokens
        made.changed(**{name: None}, **more).check()


@hostile(37, "all tensors that may be None, left out together", RIGHT)
@each_op([n for n in OPS if OPS[n].optional])
def test_all_left_out(op, device):
    made = call(op, device=device)
    made.changed(**dict.fromkeys(made.op.optional)).check()
