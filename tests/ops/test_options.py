"""Options of NumPy's types, as data loaders and configurations give them: what plain numbers give, bit for bit."""

import numpy as np
import pytest
import torch

from vitkernels import ops, use_backend
from vitkernels.models import VisionTransformer

INTEGERS = (np.int64, np.int32, np.uint8)
NUMBERS = (np.float64, np.float32, np.int64)
FLAGS = (np.bool_, int)


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


Q, QKV, T = draw(1, 2, 5, 8), draw(1, 5, 3, 2, 8), draw(7, 2, 8)
STARTS = torch.tensor([0, 3, 7], dtype=torch.int32)
ROPE = draw(4, 8), draw(4, 8)
X, W = draw(2, 5, 16), draw(16)
BLOCK = {
    "norm1": (W, W), "qkv": (draw(48, 16), None), "proj": (draw(16, 16), None), "norm2": (W, W),
    "fc1": (draw(32, 16), None), "fc2": (draw(16, 32), None),
}  # fmt: skip
SWIGLU = draw(24, 16), None, draw(16, 12), None
IMAGES, PATCH = draw(1, 3, 8, 8), draw(16, 3, 4, 4)

# A call of the option's value, the value as Python's number, and the types that it may come in.
CALLS = {
    "attention, scale": (lambda v: ops.attention(Q, Q, Q, scale=v), 2, NUMBERS),
    "attention, is_causal": (lambda v: ops.attention(Q, Q, Q, is_causal=v), True, FLAGS),
    "attention, dropout_p": (lambda v: ops.attention(Q, Q, Q, dropout_p=v), 0, NUMBERS),
    "attention, num_prefix_tokens": (lambda v: ops.attention(Q, Q, Q, rope=ROPE, num_prefix_tokens=v), 1, INTEGERS),
    "attention, interleaved": (
        lambda v: ops.attention(Q, Q, Q, rope=(*ROPE, v), num_prefix_tokens=1), True, FLAGS
    ),
    "attention, a norm's eps": (lambda v: ops.attention(Q, Q, Q, q_norm=(None, None, v)), 1, NUMBERS),
    "attention, a norm's rms": (lambda v: ops.attention(Q, Q, Q, q_norm=(None, None, 1e-6, v)), True, FLAGS),
    "attention_qkvpacked, scale": (lambda v: ops.attention_qkvpacked(QKV, scale=v), 2, NUMBERS),
    "attention_qkvpacked, is_causal": (lambda v: ops.attention_qkvpacked(QKV, is_causal=v), True, FLAGS),
    "attention_qkvpacked, num_prefix_tokens": (
        lambda v: ops.attention_qkvpacked(QKV, rope=ROPE, num_prefix_tokens=v), 1, INTEGERS
    ),
    "attention_varlen, max_seqlen": (
        lambda v: ops.attention_varlen(T, T, T, STARTS, v), 4, (*INTEGERS, lambda v: torch.tensor(v))
    ),
    "attention_varlen, scale": (lambda v: ops.attention_varlen(T, T, T, STARTS, 4, scale=v), 2, NUMBERS),
    "attention_varlen, is_causal": (lambda v: ops.attention_varlen(T, T, T, STARTS, 4, is_causal=v), True, FLAGS),
    "attention_weights, query": (lambda v: ops.attention_weights(Q, Q, query=v), 1, INTEGERS),
    "attention_weights, scale": (lambda v: ops.attention_weights(Q, Q, scale=v), 2, NUMBERS),
    "attention_weights, num_prefix_tokens": (
        lambda v: ops.attention_weights(Q, Q, rope=ROPE, num_prefix_tokens=v), 1, INTEGERS
    ),
    "block, num_heads": (lambda v: ops.block(X, num_heads=v, **BLOCK), 2, INTEGERS),
    "block, scale": (lambda v: ops.block(X, num_heads=2, scale=v, **BLOCK), 2, NUMBERS),
    "block, eps": (lambda v: ops.block(X, num_heads=2, eps=(v, v), **BLOCK), 1, NUMBERS),
    "layer_norm, eps": (lambda v: ops.layer_norm(X, W, W, v), 1, NUMBERS),
    "rms_norm, eps": (lambda v: ops.rms_norm(X, W, v), 1, NUMBERS),
    "add_layer_norm, eps": (lambda v: ops.add_layer_norm(X, X, W, W, v)[0], 1, NUMBERS),
    "add_rms_norm, eps": (lambda v: ops.add_rms_norm(X, X, W, v)[0], 1, NUMBERS),
    "swiglu_mlp, eps": (lambda v: ops.swiglu_mlp(X, *SWIGLU, norm=(None, None, v)), 1, NUMBERS),
    "swiglu_mlp, gate_last": (lambda v: ops.swiglu_mlp(X, *SWIGLU, gate_last=v), True, FLAGS),
    "patch_embed, normalize": (
        lambda v: ops.patch_embed(IMAGES, PATCH, normalize=(v, v)), (0.5, 0.25, 1.0),
        (np.array, lambda v: np.array(v, np.float32), torch.tensor),
    ),
    "patch_embed, pos_embed_prefix": (
        lambda v: ops.patch_embed(IMAGES, PATCH, pos_embed=draw(5, 16), prefix_tokens=draw(1, 16), pos_embed_prefix=v),
        True, FLAGS,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("backend", ["torch", "emulated"])
def test_what_plain_numbers_give(name, backend, computed_by_pytorch):
    call, value, types = CALLS[name]
    with use_backend(backend):
        expected = call(value)
        for make in types:
            for _ in range(3):  # unknown, seen and known
                assert torch.equal(call(make(value)), expected), make
            leaf = X.requires_grad_()
            try:
                assert torch.equal(call(make(value)), expected), make
            finally:
                leaf.requires_grad_(False)


WRONG = {
    "num_heads a float": (lambda: ops.block(X, num_heads=2.0, **BLOCK), "num_heads is a float; expected an integer"),
    "num_heads a bool": (lambda: ops.block(X, num_heads=True, **BLOCK), "num_heads is a bool; expected an integer"),
    "max_seqlen a bool": (lambda: ops.attention_varlen(T, T, T, STARTS, np.bool_(True)), "expected an integer"),
    "max_seqlen two": (lambda: ops.attention_varlen(T, T, T, STARTS, STARTS), "is a Tensor; expected an integer"),
    "query a float": (lambda: ops.attention_weights(Q, Q, query=1.0), "query is a float; expected an integer"),
    "prefix a float": (lambda: ops.attention(Q, Q, Q, rope=ROPE, num_prefix_tokens=np.float64(1)), "an integer"),
    "eps a bool": (lambda: ops.layer_norm(X, W, W, True), "eps is a bool; expected a number ≥ 0"),
    "eps a tensor": (lambda: ops.layer_norm(X, W, W, torch.tensor(1e-6)), "eps is a Tensor; expected a number ≥ 0"),
    "scale of a block": (lambda: ops.block(X, num_heads=2, scale="1", **BLOCK), "scale is a str; expected a number"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_number(case, no_launch):
    call, message = WRONG[case]
    with pytest.raises(TypeError, match=message):
        call()


def test_scale_of_a_block_that_is_not_finite(no_launch):
    with pytest.raises(ValueError, match="block: scale is nan; expected a finite number"):
        ops.block(X, num_heads=2, scale=float("nan"), **BLOCK)


def test_a_model_of_numpys_sizes(device):
    sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    images = torch.randn(2, 3, 32, 32, device=device)
    models = []
    for make in (int, np.int64):
        torch.manual_seed(0)
        models.append(VisionTransformer(**{k: make(v) for k, v in sizes.items()}).to(device))
    expected, got = (m(images) for m in models)
    assert torch.equal(got, expected)
    assert len(models[1].forward_intermediates(images, indices=np.int64(1))[1]) == 1
