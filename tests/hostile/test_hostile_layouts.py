"""Hostile inputs 10 to 17: how tensors lie in memory.

Each layout is a kernel of its own to Triton. An op of each kind has it: norms, products, attention, patches.
"""

import pytest
import torch
from op_calls import ATTENTION, OPS, call, each_op, tiny_model

hostile = pytest.mark.hostile
RIGHT = "the right result"


def transposed(t):
    return t.transpose(0, -1).contiguous().transpose(0, -1)


def every_other(t):
    return t.repeat_interleave(2, -1)[..., ::2]


def expanded(t):
    return t[:1].expand_as(t)


def off_by_one_element(t):
    """``t`` one element behind the start of its memory: no address in it divides by 16."""
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)


def odd_strides(t):
    """``t`` with a stride of 7 wherever a dim has one element, where any stride is as good."""
    strides = [7 if n == 1 else s for n, s in zip(t.shape, t.stride(), strict=True)]
    return t.as_strided(t.shape, strides)


def lazily_negated(t):
    """``t``, while its memory holds -``t``: PyTorch negates when somebody reads, which a kernel would not know of."""
    lazy = torch.complex(t, -t).conj().imag
    assert lazy.is_neg()
    return lazy


@hostile(10, "transposed inputs, weights and gradients", RIGHT)
@each_op(["add_layer_norm", "swiglu_mlp", "attention", "window_attention", "patch_merging", "patch_embed"])
def test_transposed(op, device):
    made = call(op, device=device)
    made.map(transposed, made.tensors).check(upstream=lambda y: transposed(torch.randn_like(y)))


@hostile(11, "every other element of a row, `[..., ::2]`", RIGHT)
@each_op(["add_rms_norm", "mlp", "attention_qkvpacked", "relative_attention", "patch_merging", "patch_embed"])
def test_every_other_element(op, device):
    made = call(op, device=device)
    made.map(every_other, made.tensors).check(upstream=lambda y: every_other(torch.randn_like(y)))


@hostile(12, "inputs of stride 0, one sample expanded to all", RIGHT)
@each_op(["layer_norm", "linear", "attention_varlen", "window_attention", "patch_merging", "patch_embed"])
def test_expanded_inputs(op, device):
    made = call(op, device=device)
    made.map(expanded, made.op.inputs).check()


@hostile(13, "a gradient of stride 0 in all dims, as `sum()` gives", RIGHT)
@each_op(["rms_norm", "block", "attention", "relative_attention", "patch_merging", "patch_embed"])
def test_expanded_gradient(op, device):
    call(op, device=device).check(upstream=lambda y: y.new_ones(()).expand_as(y))


@hostile(14, "a gradient that is a slice of another, as `cat` gives", RIGHT)
@pytest.mark.parametrize(
    ("op", "dim"),
    [
        ("add_rms_norm", -1),
        ("linear", 1),
        ("attention", 1),
        ("attention_qkvpacked", -1),
        ("window_attention", -1),
        ("patch_merging", -1),
        ("patch_embed", 1),
    ],
)
def test_gradient_sliced_out_of_a_cats(op, dim, device):
    def upstream(y):
        both = torch.randn_like(torch.cat([y, y], dim))
        return both.narrow(dim, y.shape[dim], y.shape[dim])

    call(op, device=device).check(upstream=upstream)


@hostile(15, "a dim of one element with an odd stride", RIGHT)
@pytest.mark.parametrize(
    ("op", "sizes"),
    [
        ("add_layer_norm", {"B": 1}),
        ("swiglu_mlp", {"N": 1}),
        ("attention_varlen", {"N": 1}),
        ("attention_qkvpacked", {"B": 1, "H": 1, "D": 16}),
        ("patch_merging", {"B": 1, "N": 1}),
        ("patch_embed", {"I": 1, "Y": 4, "X": 4, "R": 0}),
    ],
    ids=str,
)
def test_odd_strides_of_single_elements(op, sizes, device):
    # Over one key the weights are 1, whatever q and k: their gradients are nothing but rounding.
    made = call(op, **sizes, device=device, grad=op not in ATTENTION or "N" not in sizes)
    made.map(odd_strides, made.tensors).check(upstream=lambda y: odd_strides(torch.randn_like(y)))


@hostile(16, "memory that starts at no multiple of 16 bytes", RIGHT)
@pytest.mark.parametrize(
    ("op", "dtype"),
    [
        ("mlp", torch.float32),
        ("attention_varlen", torch.float32),
        ("window_attention", torch.float32),
        ("patch_merging", torch.float32),
        ("patch_embed", torch.float32),
        ("add_rms_norm", torch.bfloat16),
        ("block", torch.bfloat16),
    ],
    ids=str,
)
def test_unaligned(op, dtype, device):
    # In few rows of bf16 gradients are a matter of luck: its forward alone.
    made = call(op, B=3, N=7, dtype=dtype, device=device, grad=dtype == torch.float32)
    assert off_by_one_element(next(iter(made.tensors.values()))).data_ptr() % 16
    made.map(off_by_one_element, made.tensors).check(upstream=lambda y: off_by_one_element(torch.randn_like(y)))


@hostile(17, "images in channels_last", RIGHT)
@each_op(["patch_embed"])
def test_channels_last(op, device):
    made = call(op, device=device)
    made.map(lambda t: t.contiguous(memory_format=torch.channels_last), ["images", "weight"]).check()


@hostile(17, "images in channels_last to a model", RIGHT)
def test_channels_last_to_a_model(device, computed_by_pytorch):
    model, images = tiny_model(device), torch.randn(2, 3, 16, 16, device=device)
    logits = model(images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(logits, model(images))


def test_every_op_is_in_the_table():
    """What this folder sweeps is all that the package offers and launches kernels."""
    from vitkernels import ops

    others = {"attention_weights", "attention_provider", "uses_kernels", "QKNorm", "Rope"}  # no kernels of their own
    others |= {"Fp8", "quantize_fp8", "layer_norm_fp8", "add_layer_norm_fp8", "linear_fp8"}  # test_fp8.py looks at them
    assert {*OPS} == {*ops.__all__} - others


@each_op()
def test_lazily_negated(op, device):
    """Beyond the numbered inputs."""
    made = call(op, device=device)
    made.map(lazily_negated, made.tensors).check(upstream=lambda y: lazily_negated(torch.randn_like(y)))
