"""Hostile inputs 43 to 48: what autograd is asked for."""

import itertools

import pytest
import torch
from op_calls import OPS, call, each_op, parameters

from vitkernels._intercept import Intercept, tensors
from vitkernels.testing import check

hostile = pytest.mark.hostile
RIGHT = "the right result"


def leaves(made) -> dict[str, torch.Tensor]:
    return {n: t for n, t in made.tensors.items() if t.requires_grad}


def gradients(made, outputs, **more):
    return torch.autograd.grad(outputs, list(leaves(made).values()), [torch.ones_like(y) for y in outputs], **more)


@hostile(
    43,
    "a tensor edited in place between forward and backward",
    "`RuntimeError` of its version where it is saved, else the right gradients",
)
@each_op()
def test_edited_in_place(op, device, computed_by_pytorch):
    made = call(op, device=device)
    expected = gradients(made, made.outputs())
    refused = set()
    for name, t in leaves(made).items():
        outputs = made.outputs()
        with torch.no_grad():
            before = t.clone()
            t.mul_(2.0)
        try:
            got = gradients(made, outputs)
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)  # noqa: PT017
            refused.add(name)
        else:
            torch.testing.assert_close(got, expected, rtol=0, atol=0)
        with torch.no_grad():
            t.copy_(before)
    if not op.startswith("add_"):  # of a sum the sum alone is saved
        assert made.op.inputs[0] in refused
    assert refused & {*parameters(op)} or not parameters(op)


@hostile(43, "the sum that a norm returns, edited in place before backward", "`RuntimeError` of its version")
@each_op(["add_layer_norm", "add_rms_norm"])
def test_returned_sum_edited_in_place(op, device, computed_by_pytorch):
    made = call(op, device=device)
    y, r = made.outputs()
    with torch.no_grad():
        r.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@hostile(44, "a second derivative, whatever the upstream gradient", "`NotImplementedError`")
@pytest.mark.parametrize(
    ("op", "upstream"),
    [*((op, torch.sum) for op in OPS), *((op, lambda y: y.square().sum()) for op in ("linear", "attention"))],
)
def test_double_backward(op, upstream, device, computed_by_pytorch):
    made = call(op, device=device)
    loss = torch.stack([upstream(y) for y in made.outputs()]).sum()
    grads = torch.autograd.grad(loss, list(leaves(made).values()), create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiated again"):
        torch.stack([g.square().sum() for g in grads]).sum().backward()


def jvp(function, x):
    return torch.func.jvp(function, (x,), (torch.ones_like(x),))


def vmap(function, x):
    return torch.func.vmap(function)(torch.stack([x, x]))


def grad(function, x):
    return torch.func.grad(lambda x: function(x).sum())(x)


@hostile(45, "`torch.func.jvp`, `vmap` and `grad`", "`RuntimeError`; never zeros")
@each_op()
@pytest.mark.parametrize("transform", [jvp, vmap, grad])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_functional_transforms(op, transform, requires_grad, no_launch, device):
    made = call(op, device=device, grad=requires_grad)
    for name in made.tensors:
        if name.startswith("drop_path"):
            continue  # a constant, which no transform may differentiate
        with pytest.raises(RuntimeError, match="setup_context"):
            transform(lambda x, name=name: made.outputs(**{name: x})[0], made.tensors[name].detach())


@hostile(45, "forward-mode differentiation by dual numbers", "`RuntimeError`; never zeros")
@each_op()
def test_dual_numbers(op, no_launch, device):
    made = call(op, device=device, grad=False)
    name = made.op.inputs[0]
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(made.tensors[name], torch.ones_like(made.tensors[name]))
        with pytest.raises(RuntimeError, match="forward-mode differentiation"):
            made(**{name: dual})


@hostile(46, "`torch.inference_mode`, around the op and around its tensors", RIGHT)
@each_op()
def test_inference_mode(op, device):
    made = call(op, device=device)
    expected = made.outputs()
    with torch.inference_mode():
        for inside in (made, made.map(torch.clone, made.tensors)):
            for y, want in zip(inside.outputs(), expected, strict=True):
                assert y.is_inference() and torch.equal(y, want)


@hostile(47, "autocast in bf16 and fp16", "the right result, in the dtype that PyTorch gives")
@pytest.mark.parametrize(
    ("op", "dtype"),
    zip((op for op in OPS if op != "block"), itertools.cycle([torch.bfloat16, torch.float16])),
    ids=str,
)  # of a block the kernels round less than PyTorch does: tests/test_torch_integration.py
def test_autocast(op, dtype, device, computed_by_pytorch):
    made = call(op, N=17, device=device)

    def run(function, double=False):
        tensors = {n: t.detach().double() if double else t.detach() for n, t in made.tensors.items()}
        tensors = {n: t.requires_grad_(made.tensors[n].requires_grad) for n, t in tensors.items()}
        with torch.autocast(device.type, dtype=dtype, enabled=not double):
            outputs = function(**tensors, **made.options)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        wanted = {n: t for n, t in tensors.items() if t.requires_grad}
        grads = torch.autograd.grad(
            outputs, list(wanted.values()), [u.to(y.dtype) for u, y in zip(upstream, outputs, strict=True)]
        )
        return [*((f"output {i}", y) for i, y in enumerate(outputs)), *zip(wanted, grads, strict=True)]

    upstream = [torch.randn_like(y) for y in made.outputs()]
    runs = run(made.op.function), run(made.op.reference), run(made.op.reference, double=True)
    for (name, got), (_, torch_got), (_, truth) in zip(*runs, strict=True):
        assert got.dtype == torch_got.dtype, name
        # The values are of half precision, whatever dtype they are kept in.
        if got.numel() < 100:
            continue  # few numbers average few roundings out
        verdict = check(name, got.to(dtype), torch_got.to(dtype), truth, gain_counts=False)
        assert verdict.passed, f"{verdict.name}: {verdict.detail}"


def backward_elements(made) -> int:
    """Return how many elements this package's ops give back in the backward of ``made``."""
    found = []

    def see(op, args, kwargs, result):
        if op.namespace == "vitkernels":
            found.extend(t.numel() for t in tensors(result))

    outputs = made.outputs()
    with Intercept(saw=see):
        gradients(made, outputs)
    return sum(found)


@hostile(48, "a frozen tensor", "no gradient, no memory for one, and the others' gradients as ever")
@each_op(["add_layer_norm", "linear", "mlp", "swiglu_mlp", "attention", "patch_embed"])
def test_frozen(op, device):
    made = call(op, device=device)
    whole, expected = backward_elements(made), dict(zip(leaves(made), gradients(made, made.outputs()), strict=True))
    names = {made.op.inputs[0], *parameters(op)[:2]}  # of most a matrix and a bias
    for name in names:
        one = made.changed(**{name: made.tensors[name].detach()})
        if not leaves(one):
            continue
        got = dict(zip(leaves(one), gradients(one, one.outputs()), strict=True))
        for other, g in got.items():
            torch.testing.assert_close(g, expected[other], msg=f"d{other} with {name} frozen")
        matrix = made.tensors[name].ndim in (2, 4) and name in parameters(op)
        assert backward_elements(one) <= whole - matrix * made.tensors[name].numel(), name


@hostile(48, "all weights frozen", "no kernel is launched for any of their gradients")
@each_op([n for n in OPS if parameters(n)])
def test_all_weights_frozen(op, device, record_launches, monkeypatch):
    for product in (torch.mm, torch.addmm):  # those that are PyTorch's are no launches

        def noted(*args, product=product, **options):
            record_launches.append(product)
            return product(*args, **options)

        monkeypatch.setattr(torch, product.__name__, noted)

    def launched(made):
        outputs = made.outputs()
        record_launches.clear()
        gradients(made, outputs)
        return len(record_launches)

    made = call(op, device=device)
    frozen = made.map(torch.clone, [])
    frozen = frozen.changed(**{n: made.tensors[n].detach() for n in parameters(op)})
    products = {"linear": 1, "mlp": 2, "swiglu_mlp": 2, "block": 4, "patch_embed": 1}  # one a weight
    assert launched(frozen) <= launched(made) - products.get(op, 0)
