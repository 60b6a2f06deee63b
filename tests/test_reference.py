"""The reference in fp64 against formulas written out here: the reference is the truth for all else."""

import math

import pytest
import torch

from vitkernels import reference

TIGHT = {"rtol": 1e-12, "atol": 1e-12}


def _randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


FORMULAS = {
    None: lambda z: z,
    "gelu": lambda z: 0.5 * z * (1 + math.erf(z / math.sqrt(2))),
    "gelu_tanh": lambda z: 0.5 * z * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
    "quick_gelu": lambda z: z / (1 + math.exp(-1.702 * z)),
    "silu": lambda z: z / (1 + math.exp(-z)),
}


def _activated(z, activation):
    return torch.tensor([FORMULAS[activation](v) for v in z.flatten().tolist()], dtype=torch.float64).view_as(z)


def _normalised(x, weight, bias, eps):
    rows = []
    for row in x.reshape(-1, x.shape[-1]):
        mean = row.sum() / row.numel()
        variance = ((row - mean) ** 2).sum() / row.numel()
        rows.append((row - mean) / (variance + eps) ** 0.5 * weight + bias)
    return torch.stack(rows).view_as(x)


@pytest.mark.parametrize("activation", FORMULAS)
def test_activate(activation):
    z = torch.cat([_randn(50), torch.tensor([0.0, -8.0, 8.0, -1e-9], dtype=torch.float64)])
    torch.testing.assert_close(reference.activate(z, activation), _activated(z, activation), **TIGHT)


def test_the_activations_differ_and_are_all_listed():
    assert set(reference.ACTIVATIONS) == set(FORMULAS) - {None}
    z = torch.tensor(-1.0, dtype=torch.float64)
    values = [reference.activate(z, name).item() for name in FORMULAS]
    assert min(abs(a - b) for i, a in enumerate(values) for b in values[:i]) > 1e-4


def test_activate_refuses_an_unknown_name():
    with pytest.raises(ValueError, match="unknown activation 'relu'; expected one of gelu, "):
        reference.activate(_randn(3), "relu")


@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_layer_norm(eps):
    x, weight, bias = 3.0 + 2.0 * _randn(2, 5, 7), _randn(7), _randn(7)
    one, zero = torch.ones_like(weight), torch.zeros_like(bias)
    for w, b in ((weight, bias), (weight, None), (None, bias), (None, None)):
        expected = _normalised(x, one if w is None else w, zero if b is None else b, eps)
        torch.testing.assert_close(reference.layer_norm(x, w, b, eps), expected, **TIGHT)


def test_layer_norm_has_the_eps_of_timm_by_default():
    x, one, zero = 1e-3 * _randn(4, 6), torch.ones(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    torch.testing.assert_close(reference.layer_norm(x), _normalised(x, one, zero, 1e-6), **TIGHT)
    assert not torch.allclose(reference.layer_norm(x), _normalised(x, one, zero, 1e-5))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dropped", [False, True])
def test_add_layer_norm(scaled, dropped):
    x, residual, weight, bias = _randn(3, 4, 6), _randn(3, 4, 6), _randn(6), _randn(6)
    layer_scale = _randn(6) if scaled else None
    drop_path_scale = torch.tensor([0.0, 1.25, 0.5], dtype=torch.float64) if dropped else None
    expected = residual.clone()
    for b in range(3):
        for n in range(4):
            for c in range(6):
                term = x[b, n, c]
                term = term * layer_scale[c] if scaled else term
                expected[b, n, c] += term * drop_path_scale[b] if dropped else term
    normed, new_residual = reference.add_layer_norm(
        x, residual, weight, bias, 1e-3, layer_scale=layer_scale, drop_path_scale=drop_path_scale
    )
    torch.testing.assert_close(new_residual, expected, **TIGHT)
    torch.testing.assert_close(normed, _normalised(expected, weight, bias, 1e-3), **TIGHT)


@pytest.mark.parametrize("activation", FORMULAS)
def test_linear(activation):
    x, weight, bias, residual, layer_scale = _randn(2, 3, 5), _randn(4, 5), _randn(4), _randn(2, 3, 4), _randn(4)
    product = torch.einsum("bnk,ck->bnc", x, weight)
    plain = _activated(product, activation)
    torch.testing.assert_close(reference.linear(x, weight, activation=activation), plain, **TIGHT)
    biased = _activated(product + bias, activation)
    torch.testing.assert_close(reference.linear(x, weight, bias, activation=activation), biased, **TIGHT)
    full = reference.linear(x, weight, bias, activation=activation, residual=residual, layer_scale=layer_scale)
    torch.testing.assert_close(full, residual + layer_scale * biased, **TIGHT)
    added = reference.linear(x, weight, bias, activation=activation, residual=residual)
    torch.testing.assert_close(added, residual + biased, **TIGHT)


@pytest.mark.parametrize("activation", FORMULAS)
def test_mlp(activation):
    x, w1, b1, w2, b2 = _randn(2, 3, 5), _randn(7, 5), _randn(7), _randn(4, 7), _randn(4)
    residual, layer_scale = _randn(2, 3, 4), _randn(4)
    hidden = _activated(torch.einsum("bnc,fc->bnf", x, w1) + b1, activation)
    expected = torch.einsum("bnf,cf->bnc", hidden, w2) + b2
    torch.testing.assert_close(reference.mlp(x, w1, b1, w2, b2, activation=activation), expected, **TIGHT)
    full = reference.mlp(x, w1, b1, w2, b2, activation=activation, residual=residual, layer_scale=layer_scale)
    torch.testing.assert_close(full, residual + layer_scale * expected, **TIGHT)
    bare = torch.einsum("bnf,cf->bnc", _activated(torch.einsum("bnc,fc->bnf", x, w1), activation), w2)
    torch.testing.assert_close(reference.mlp(x, w1, None, w2, None, activation=activation), bare, **TIGHT)


def _attended(q, k, v, scale):
    scores = scale * torch.einsum("bhnd,bhmd->bhnm", q, k)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return torch.einsum("bhnm,bhmd->bhnd", weights / weights.sum(-1, keepdim=True), v)


@pytest.mark.parametrize("scale", [None, 0.7])
def test_attention(scale):
    q, k, v = _randn(2, 3, 5, 6), _randn(2, 3, 7, 6), _randn(2, 3, 7, 6)
    expected = _attended(q, k, v, 6**-0.5 if scale is None else scale)
    torch.testing.assert_close(reference.attention(q, k, v, scale=scale), expected, **TIGHT)


@pytest.mark.parametrize("mask_dtype", [torch.float32, torch.float64, torch.bfloat16, torch.bool])
def test_attention_weights_are_of_the_dtype_of_what_they_weigh(mask_dtype):
    q, k, v = (_randn(1, 2, 5, 4).bfloat16() for _ in range(3))
    weights = reference.attention_weights(q, k, attn_mask=torch.ones(5, 5).to(mask_dtype))
    assert (weights @ v).dtype == weights.dtype == torch.bfloat16


@pytest.mark.parametrize("scale", [None, 0.7])
def test_attention_qkvpacked(scale):
    qkv = _randn(2, 5, 3, 4, 6)
    output = reference.attention_qkvpacked(qkv, scale=scale)
    assert output.shape == (2, 5, 4, 6)
    for b in range(2):
        for h in range(4):
            q, k, v = (qkv[b, :, i, h] for i in range(3))
            expected = _attended(q[None, None], k[None, None], v[None, None], 6**-0.5 if scale is None else scale)
            torch.testing.assert_close(output[b, :, h], expected[0, 0], **TIGHT)


def _patches(images, weight, bias):
    (B, _, Y, X), (C, _, PY, PX) = images.shape, weight.shape
    tokens = torch.empty(B, (Y // PY) * (X // PX), C, dtype=torch.float64)
    for b in range(B):
        for row in range(Y // PY):
            for column in range(X // PX):
                patch = images[b, :, row * PY : (row + 1) * PY, column * PX : (column + 1) * PX]
                for c in range(C):
                    tokens[b, row * (X // PX) + column, c] = (patch * weight[c]).sum() + bias[c]
    return tokens


def test_patch_embed():
    images, weight, bias = _randn(2, 3, 8, 12), _randn(5, 3, 4, 2), _randn(5)
    patches = _patches(images, weight, bias)
    torch.testing.assert_close(reference.patch_embed(images, weight, bias), patches, **TIGHT)
    unbiased = _patches(images, weight, torch.zeros_like(bias))
    torch.testing.assert_close(reference.patch_embed(images, weight), unbiased, **TIGHT)

    prefix, whole, grid = _randn(1, 2, 5), _randn(1, 14, 5), _randn(1, 12, 5)

    def put_in_front(tokens):
        return torch.stack([torch.cat([prefix[0], sample]) for sample in tokens])

    for options, expected in (
        ({"pos_embed": grid}, patches + grid),
        ({"pos_embed": grid, "pos_embed_prefix": False}, patches + grid),
        ({"prefix_tokens": prefix}, put_in_front(patches)),
        ({"prefix_tokens": prefix, "pos_embed": whole}, put_in_front(patches) + whole),
        ({"prefix_tokens": prefix, "pos_embed": grid, "pos_embed_prefix": False}, put_in_front(patches + grid)),
    ):
        torch.testing.assert_close(reference.patch_embed(images, weight, bias, **options), expected, **TIGHT)
