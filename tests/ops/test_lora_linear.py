"""lora_linear and lora_mlp against fp64: ranks, epilogues, dtypes, frozen weights, gradients, bad input."""

import pytest
import torch
from drawn import drawn

from vitkernels import ops, reference
from vitkernels.ops import _product
from vitkernels.testing import check_op

HALVES = [torch.float16, torch.bfloat16]
ACTIVATIONS = [None, *reference.ACTIVATIONS]
USUAL = (2, 50, 36, 72)  # images, tokens, and features before and behind, of fp16 and bf16 where they are no subject
SMALL = (2, 7, 20, 12)  # of fp32


def make(*shape, dtype=torch.float32, device="cpu", scale=1.0):
    return (scale * torch.randn(*shape, dtype=torch.float64)).to(device, dtype).requires_grad_()


def lora(K, N, rank, **of):
    return make(rank, K, scale=K**-0.5, **of), make(N, rank, scale=rank**-0.5, **of)


def layer(B, M, K, N, rank=4, *, dtype=torch.float32, device="cpu", dropped=False):
    of = {"dtype": dtype, "device": device}
    a, b = lora(K, N, rank, **of)
    tensors = {"x": make(B, M, K, **of), "weight": make(N, K, scale=K**-0.5, **of), "bias": make(N, **of)}
    tensors |= {"lora_a": a, "lora_b": b, "residual": make(B, M, N, **of), "layer_scale": make(N, **of)}
    return tensors | ({"lora_x": make(B, M, K, **of)} if dropped else {})


def layers(B, M, C, F, ranks=(4, 4), *, dtype=torch.float32, device="cpu"):
    of = {"dtype": dtype, "device": device}
    tensors = {"x": make(B, M, C, **of)}
    tensors |= {"w1": make(F, C, scale=C**-0.5, **of), "b1": make(F, **of)}
    tensors |= {"w2": make(C, F, scale=F**-0.5, **of), "b2": make(C, **of)}
    tensors |= {"residual": make(B, M, C, **of), "layer_scale": make(C, **of)}
    for i, (K, N, rank) in enumerate(((C, F, ranks[0]), (F, C, ranks[1])), start=1):
        if rank:
            tensors |= dict(zip((f"a{i}", f"up{i}"), lora(K, N, rank, **of), strict=True))
    return tensors


def mlp(function):
    """``function`` with each tensor by a name of its own."""

    def call(a1=None, up1=None, a2=None, up2=None, **tensors):
        pairs = {"lora1": (a1, up1) if a1 is not None else None, "lora2": (a2, up2) if a2 is not None else None}
        return function(**tensors, **pairs)

    return call


LORA_MLP, PLAIN_MLP = mlp(ops.lora_mlp), mlp(reference.lora_mlp)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("rank", [1, 4, 8, 16, 64, 100])
def test_ranks(rank, dtype, device):
    tensors = layer(*(SMALL if dtype == torch.float32 else USUAL), rank, dtype=dtype, device=device)
    check_op(ops.lora_linear, reference.lora_linear, tensors)


@pytest.mark.parametrize(
    ("dtype", "ranks"), drawn(8, [torch.float32, *HALVES], [(1, 16), (8, 0), (0, 64), (0, 0)]), ids=str
)
def test_ranks_of_an_mlp(ranks, dtype, device):
    tensors = layers(*(SMALL if dtype == torch.float32 else USUAL), ranks, dtype=dtype, device=device)
    check_op(LORA_MLP, PLAIN_MLP, tensors)


@pytest.mark.parametrize(
    ("activation", "dropped", "dtype"), drawn(8, ACTIVATIONS, [False, True], [torch.float32, *HALVES]), ids=str
)
def test_activations_and_another_input_of_the_update(activation, dropped, dtype, device):
    tensors = layer(*(SMALL if dtype == torch.float32 else USUAL), dtype=dtype, device=device, dropped=dropped)
    check_op(ops.lora_linear, reference.lora_linear, tensors, options={"activation": activation})


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_without_epilogue_on_several_tiles(activation, device):
    tensors = layer(1, 257, 300, 130, 24, dtype=torch.bfloat16, device=device)
    tensors = {name: t for name, t in tensors.items() if name not in ("residual", "layer_scale")} | {"bias": None}
    check_op(ops.lora_linear, reference.lora_linear, tensors, options={"activation": activation})


FROZEN = ("weight", "bias", "layer_scale", "residual")


@pytest.mark.parametrize("trained", ["x", "lora_a", "lora_b", "lora_x", "all but the base"])
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_only_some_train(trained, activation, device):
    tensors = layer(*SMALL, device=device, dropped=trained == "lora_x")
    for name, t in tensors.items():
        t.requires_grad_(name not in FROZEN if trained == "all but the base" else name == trained)
    check_op(ops.lora_linear, reference.lora_linear, tensors, options={"activation": activation})


@pytest.mark.parametrize("trained", ["x", "a1", "up1", "a2", "up2", "all but the base"])
@pytest.mark.parametrize("recompute", [False, True])
def test_only_some_train_in_an_mlp(trained, recompute, device):
    tensors = layers(*SMALL, device=device)
    base = ("w1", "b1", "w2", "b2", "layer_scale", "residual")
    for name, t in tensors.items():
        t.requires_grad_(name not in base if trained == "all but the base" else name == trained)
    check_op(mlp(lambda **t: ops.lora_mlp(**t, recompute=recompute)), PLAIN_MLP, tensors)


@pytest.mark.parametrize("recompute", [False, True])
def test_drop_path(recompute, device):
    tensors = layers(3, 7, 20, 12, device=device) | {"drop_path_scale": torch.tensor([0.0, 1.25, 1.25], device=device)}
    check_op(mlp(lambda **t: ops.lora_mlp(**t, recompute=recompute)), PLAIN_MLP, tensors)


def test_a_layer_scale_of_1e_5_survives_fp16(device):
    tensors = layer(*USUAL, dtype=torch.float16, device=device)
    tensors["layer_scale"] = torch.full((72,), 1e-5, device=device, requires_grad=True)
    # A loss scale, without which PyTorch's own gradients underflow.
    check_op(ops.lora_linear, reference.lora_linear, tensors, upstream=lambda y: 1024 * torch.randn_like(y))


def test_gradcheck(device):
    for activation in (None, "gelu"):
        tensors = layer(1, 3, 5, 4, 2, dtype=torch.float64, device=device, dropped=True)
        names = list(tensors)
        assert torch.autograd.gradcheck(
            lambda *values, names=names, activation=activation: ops.lora_linear(
                **dict(zip(names, values, strict=True)), activation=activation
            ),
            list(tensors.values()),
        )
    tensors = layers(1, 3, 5, 4, (2, 3), dtype=torch.float64, device=device)
    names = list(tensors)
    call = lambda *values: LORA_MLP(**dict(zip(names, values, strict=True)))  # noqa: E731
    assert torch.autograd.gradcheck(call, list(tensors.values()))


def test_an_update_below_the_weights_rounding_is_not_lost(device):
    """In bf16 W + B A is W again if B A is small enough; beside W it counts in full."""
    tensors = layer(*USUAL, dtype=torch.bfloat16, device=device)
    tensors = {name: tensors[name].detach() for name in ("x", "weight", "lora_a", "lora_b")}
    tensors["weight"].zero_()
    tensors["weight"][:, 0], tensors["x"][..., 0] = 1.0, 0.0  # what is large meets nothing
    tensors["lora_a"][:, 1:] = 0.0
    tensors["lora_a"][:, 0] = 2.0**-12
    merged = tensors["weight"] + tensors["lora_b"] @ tensors["lora_a"]
    assert torch.equal(merged, tensors["weight"]), "the test's update must vanish in the sum"
    tensors["x"][..., 0] = 1.0
    base = ops.linear(tensors["x"], tensors["weight"])
    with_residual = ops.lora_linear(**tensors, bias=None, residual=-base.float())
    check = reference.lora_linear(**{n: t.double() for n, t in tensors.items()}, bias=None) - base.double()
    torch.testing.assert_close(with_residual.double(), check, rtol=2**-7, atol=2**-20)


def test_adapters_in_fp32_beside_half_weights(device):
    tensors = layer(*USUAL, dtype=torch.bfloat16, device=device)
    halves = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}
    for name in ("lora_a", "lora_b"):
        tensors[name] = tensors[name].detach().float().requires_grad_()
    upstream = torch.randn(2, 50, 72, dtype=torch.bfloat16, device=device)
    ys = [ops.lora_linear(**given) for given in (tensors, halves)]
    for y in ys:
        y.backward(upstream)
    assert torch.equal(*ys)
    for name in ("lora_a", "lora_b"):
        assert tensors[name].grad.dtype == torch.float32
        assert torch.equal(tensors[name].grad.bfloat16(), halves[name].grad)
    assert torch.equal(tensors["x"].grad, halves["x"].grad)


def test_autocast(device):
    tensors = layer(*SMALL, device=device)
    mlp_tensors = layers(*SMALL, device=device)
    for given, function in ((tensors, ops.lora_linear), (mlp_tensors, LORA_MLP)):
        del given["residual"], given["layer_scale"]
        with torch.autocast(device.type, torch.bfloat16):
            y = function(**given)
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
        assert all(t.grad.dtype == torch.float32 for t in given.values())


@pytest.mark.parametrize("lead", [(0, 5), (2, 0)], ids=str)
def test_empty_batch_gives_zero_gradients(lead, device):
    for tensors, function in ((layer(*lead, 20, 12, device=device), ops.lora_linear),
                              (layers(*lead, 20, 12, device=device), LORA_MLP)):  # fmt: skip
        y = function(**tensors)
        y.sum().backward()
        for name, t in tensors.items():
            assert torch.equal(t.grad, torch.zeros_like(t)), name


def test_transposed_factors_and_inputs(device):
    tensors = layer(*SMALL, device=device)
    for name in ("x", "lora_a", "lora_b"):
        t = tensors[name].detach()
        tensors[name] = t.transpose(0, -1).contiguous().transpose(0, -1).requires_grad_()
    check_op(ops.lora_linear, reference.lora_linear, tensors, upstream=lambda y: torch.randn_like(y).mT.clone().mT)


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_no_pass_over_the_output(activation, device, monkeypatch):
    """A layer takes two products: one of R columns, and one with both sums in a tile."""
    widths = []

    def spy(a, b, **options):
        widths.append((b.shape[1], options.get("low_rank") is not None))
        return product(a, b, **options)

    product = _product.product
    for module in ("_low_rank", "_linear"):
        monkeypatch.setattr(f"vitkernels.ops.{module}.product", spy)
    with torch.no_grad():
        ops.lora_linear(**layer(*SMALL, device=device), activation=activation)
    assert widths == [(4, False), (12, True)]


@pytest.mark.parametrize("wide", ["lora_b", "up2"])
def test_a_gradient_of_fp32_beside_one_of_16_bits(wide, device):
    """It is not rounded to 16 bits."""
    of = {"dtype": torch.bfloat16, "device": device}
    tensors, op = (layer(*USUAL, **of), ops.lora_linear) if wide == "lora_b" else (layers(*USUAL, **of), LORA_MLP)
    tensors[wide] = tensors[wide].detach().float().requires_grad_()
    op(**tensors).sum().backward()
    grad = tensors[wide].grad
    assert grad.dtype == torch.float32 and not torch.equal(grad, grad.bfloat16().float())


X, W, A, B = torch.zeros(2, 3, 8), torch.zeros(4, 8), torch.zeros(2, 8), torch.zeros(4, 2)
W2 = torch.zeros(8, 4)
BAD = {
    "A's width": (lambda: ops.lora_linear(X, W, None, A[:, :7], B), ValueError, r"lora_a has shape \(2, 7\); .*8"),
    "no rank": (lambda: ops.lora_linear(X, W, None, A[:0], B), ValueError, r"lora_a has shape \(0, 8\)"),
    "A's dims": (lambda: ops.lora_linear(X, W, None, A[0], B), ValueError, r"lora_a has shape \(8,\)"),
    "B's rank": (lambda: ops.lora_linear(X, W, None, A, B[:, :1]), ValueError, r"lora_b has .*expected \(4, 2\)"),
    "B's rows": (lambda: ops.lora_linear(X, W, None, A, torch.zeros(5, 2)), ValueError, r"lora_b has .*\(4, 2\)"),
    "A's dtype": (lambda: ops.lora_linear(X, W, None, A.half(), B), TypeError, "lora_a has dtype torch.float16"),
    "no A": (lambda: ops.lora_linear(X, W, None, None, B), TypeError, "lora_a is a NoneType; expected a torch.Tensor"),
    "B's device": (lambda: ops.lora_linear(X, W, None, A, B.to("meta")), ValueError, "lora_b is on meta"),
    "lora_x": (lambda: ops.lora_linear(X, W, None, A, B, lora_x=X[:1]), ValueError, "lora_x has shape"),
    "activation": (lambda: ops.lora_linear(X, W, None, A, B, activation="relu"), ValueError, "'relu'"),
    "no pair": (lambda: ops.lora_mlp(X, W, None, W2, None, lora1=A), TypeError, "lora1 is a Tensor; expected a pair"),
    "a pair's shape": (lambda: ops.lora_mlp(X, W, None, W2, None, lora2=(A, B)), ValueError, "lora2's A has shape"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, no_launch):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


def test_double_backward_is_an_error(device):
    tensors = layer(*SMALL, device=device)
    (dx,) = torch.autograd.grad(ops.lora_linear(**tensors).square().sum(), tensors["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated again"):
        dx.sum().backward()
