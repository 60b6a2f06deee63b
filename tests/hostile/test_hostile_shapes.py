"""Hostile inputs 1 to 9: sizes."""

import pytest
import torch
from op_calls import ATTENTION, HAS_GPU, OPS, ROWS, WINDOWS, call, each_op, needs_gpu, tiny_model

hostile = pytest.mark.hostile
RIGHT = "the right result"


@hostile(1, "a batch of 0", "the right result, and zeros as the gradients of the parameters")
@each_op(n for n in OPS if n != "attention_varlen")
def test_empty_batch(op, device):
    made = call(op, B=0, device=device)
    made.check()
    outputs = made.outputs()
    assert all(y.shape[0] == 0 for y in outputs)
    sum(y.sum() for y in outputs).backward()
    for name, t in made.tensors.items():
        if t.requires_grad:
            assert torch.equal(t.grad, torch.zeros_like(t)), name


@hostile(1, "an image without tokens among packed ones", RIGHT)
@each_op(["attention_varlen"])
def test_empty_image_among_others(op, device):
    made = call(op, B=3, device=device)
    made.options["cu_seqlens"] = torch.tensor([0, 5, 5, 10], dtype=torch.int32, device=device)
    made.check()


@hostile(1, "packed images none of which has a token, `max_seqlen` 0", RIGHT)
@each_op(["attention_varlen"])
@pytest.mark.parametrize("behind", [0, 3])
def test_nothing_but_empty_images(op, behind, device):
    made = call(op, B=1, N=behind, device=device)
    made.options.update(cu_seqlens=torch.zeros(4, dtype=torch.int32, device=device), max_seqlen=0)
    (y,) = made.outputs()
    assert torch.equal(y, torch.zeros_like(made.tensors["q"]))
    y.sum().backward()
    assert all(torch.equal(t.grad, torch.zeros_like(t)) for t in made.tensors.values())


@hostile(1, "a batch of 0 images to a model", RIGHT)
def test_empty_batch_of_a_model(device):
    model = tiny_model(device)
    logits = model(torch.empty(0, 3, 16, 16, device=device))
    assert logits.shape == (0, 3)
    logits.sum().backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters())


@hostile(2, "no tokens, where an op knows of tokens", "`ValueError`")
@each_op(["attention", "attention_qkvpacked", *WINDOWS, "patch_merging", "block", "patch_embed"])
def test_no_tokens(op, device, no_launch):
    made = call(op, N=0, Y=0, device=device, P=4) if op != "patch_embed" else call(op, device=device)
    if op == "patch_embed":
        made = made.changed(images=torch.empty(2, 3, 0, 12, device=device), pos_embed=None)
    images = {"patch_embed": "a positive multiple", "patch_merging": "only B may be 0"}
    wanted = images.get(op, "expected (at least one|.*tokens ≥ 1|1 at least)")
    with pytest.raises(ValueError, match=f"{op}: .* (0×12|shape .*[(, ]0[,)]|[(]0, 0[)]).*{wanted}"):
        made()


@hostile(2, "no rows, where an op knows rows alone", "the right result: it is as empty")
@each_op(ROWS)
def test_no_rows(op, device):
    call(op, N=0, device=device).check()


@hostile(3, "no channels, and no channels a head", "`ValueError`")
@each_op()
def test_no_features(op, device, no_launch):
    with pytest.raises(ValueError, match=rf"{op}: .*\b0\b.*; expected"):
        call(op, C=0, D=0, I=0, device=device)()


@hostile(3, "no hidden features, no output features", "`ValueError`")
@each_op(["linear", "mlp", "swiglu_mlp", "block"])
def test_no_hidden_features(op, device, no_launch):
    with pytest.raises(ValueError, match=rf"{op}: .* has shape \(0, 16\); expected \(out features, 16\)"):
        call(op, F=0, device=device)()


@hostile(4, "one token", RIGHT)
@each_op(["add_layer_norm", "linear", "attention", "attention_varlen", "patch_merging", "patch_embed"])
def test_one_token(op, device):
    call(op, N=1, Y=4, X=4, R=0, device=device).check()


@hostile(5, "one channel, one channel a head, one hidden feature", RIGHT)
@each_op(["add_rms_norm", "swiglu_mlp", "attention_qkvpacked", "patch_merging", "patch_embed"])
def test_one_channel(op, device):
    one = {"C": 1, "H": 1, "D": 1, "F": 1, "I": 1, "P": 1, "Y": 1, "X": 2, "device": device}
    # In fp64: PyTorch's error in a gradient of one number may happen to be none, which is no yardstick.
    made = call(op, B=1, N=2, **one, dtype=torch.float64)
    wanted = made.op.reference(**made.tensors, **made.options)
    for y, want in zip(made.outputs(), wanted if isinstance(wanted, tuple) else (wanted,), strict=True):
        torch.testing.assert_close(y, want, rtol=1e-13, atol=1e-13)
    names = list(made.tensors)
    assert torch.autograd.gradcheck(lambda *t: made(**dict(zip(names, t, strict=True))), list(made.tensors.values()))


@hostile(6, "a prime number of tokens and of channels", RIGHT)
@each_op(["add_layer_norm", "mlp", "attention", *WINDOWS, "patch_merging", "patch_embed"])
def test_prime_sizes(op, device):
    call(op, B=3, N=17, C=13, H=1, D=13, F=19, P=3, Y=9, X=15, R=2, device=device).check()


@hostile(7, "more than 65,536 channels", RIGHT)
@each_op(["add_layer_norm", "rms_norm", "linear", "swiglu_mlp", "patch_embed"])
def test_many_channels(op, device):
    # One hidden feature is one sum: in fp32 its error is a draw, as is PyTorch's, and all that follows is off by it.
    dtype = torch.float16 if op == "swiglu_mlp" else torch.float32
    call(op, dtype=dtype, B=1, N=2, C=65_537, H=1, F=1, I=1, P=1, Y=1, X=2, device=device).check()


@hostile(7, "more than 256 channels a head", "`NotImplementedError`")
@each_op([*ATTENTION, *WINDOWS, "block"])
def test_many_channels_a_head(op, device, no_launch):
    with pytest.raises(NotImplementedError, match=f"{op}: .*head dim.* 65537.* 256"):
        call(op, H=1, D=65_537, device=device)()


@pytest.fixture(scope="module")
def far_apart(tmp_path_factory):
    """Lay a tensor out with 2³⁰ elements from one index of ``dim`` to the next, in a file of holes."""

    def spread(t, dim):
        strides = list(t.contiguous().stride())
        strides[dim] = 1 << 30
        size = t.element_size() * (t.shape[dim] << 30)
        path = tmp_path_factory.mktemp("far") / "tensor"
        with path.open("wb") as file:
            file.truncate(size)
        storage = torch.UntypedStorage.from_file(str(path), True, size)
        path.unlink()
        return torch.empty(0, dtype=t.dtype).set_(storage, 0, t.shape, strides).copy_(t)

    return spread


@hostile(8, "inputs and gradients whose rows lie more than 2³¹ elements apart", RIGHT)
@pytest.mark.skipif(HAS_GPU, reason="a file of holes is of the CPU's memory: the next one is the GPU's")
@pytest.mark.parametrize(
    ("op", "dim"),
    [("add_rms_norm", 0), ("swiglu_mlp", 1), ("attention_varlen", 0)],
)
def test_far_apart(op, dim, far_apart):
    sizes = {"B": 2, "N": 3} if op == "attention_varlen" else {"B": 4, "N": 4}  # the emulator takes 32 GiB
    made = call(op, **sizes, R=0, X=8)
    inputs = made.op.inputs

    def spread(t):
        return far_apart(t, dim) if t.ndim > dim + 1 and t.shape[dim] > 2 else t

    made.map(spread, inputs).check(upstream=lambda y: spread(torch.randn_like(y)))


@hostile(8, "more than 2³¹ elements", RIGHT)
@needs_gpu
@each_op([*ROWS, "attention_qkvpacked", "patch_merging", "patch_embed"])
def test_many_elements(op, device):
    sizes = {"B": 2**31 // (2**10 * 768) + 2, "N": 2**10, "C": 768, "H": 4, "D": 64, "F": 8, "Y": 32, "X": 1024}
    if op == "patch_embed":
        sizes |= {"B": 2**31 // (3 * 32 * 1024) + 2, "P": 32, "C": 64}
    if op == "attention_qkvpacked":
        sizes |= {"B": 2**31 // (3 * 2**8 * 256) + 2, "N": 2**8}
    made = call(op, **sizes, dtype=torch.bfloat16, device=device, grad=False)
    names = [n for n in made.op.inputs if n != "residual"]
    assert any(made.tensors[n].numel() > 2**31 for n in names)
    whole = made.outputs()
    # Every sample is computed by itself: the last ones must be what they are alone.
    tail = made.map(lambda t: t[-2:].clone(), [n for n in (*made.op.inputs, "drop_path_scale") if n in made.tensors])
    for y, alone in zip(whole, tail.outputs(), strict=True):
        torch.testing.assert_close(y[-2:], alone, rtol=0.02, atol=0.02)
    tail.check()


@hostile(9, "more than 65,535 batch · heads: grid axes 1 and 2 stay within 65,535", RIGHT)
@each_op()
def test_grids_of_many_samples(op, device, record_launches):
    made = call(op, B=70_000, N=1, C=4, H=1, D=4, F=4, I=1, P=1, Y=1, X=1, R=0, device=device)
    outputs = made.outputs()
    torch.autograd.backward(outputs, [torch.zeros_like(y) for y in outputs])
    assert len(record_launches) > 1, "forward and backward"
    for kernel, grid in record_launches:
        assert all(0 < n <= 65_535 for n in grid[1:]) and 0 < grid[0] < 2**31, (kernel, grid)


@hostile(9, "more than 65,535 batch · heads, run", RIGHT)
@needs_gpu
@each_op([*ATTENTION, *WINDOWS, "block"])
def test_many_samples(op, device):
    call(op, B=33_000, N=3, H=2, D=16, device=device).check()
