"""Attention: from packed qkv, masked, biased, and on images of different sizes packed into one sequence.

B images, N tokens, H heads, D head dim. The masked case hides a fifth of the keys, a different fifth in each image, as
padding does. The images of the varlen case have in turn a quarter, a half, all and three quarters of the case's tokens,
packed as in NaViT (arXiv 2307.06304).
"""

from __future__ import annotations

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.environment import Missing
from benchmarks.ops import OpBench, by_mode, normal, require
from vitkernels import ops, reference

PARTS = (0.25, 0.5, 1.0, 0.75)


def _packed(case, dtype, device):
    return {"qkv": normal((case.batch, case.tokens, 3, case.heads, case.head_dim), dtype, device)}


def _separate(case, dtype, device):
    qkv = torch.randn(3, case.batch, case.tokens, case.heads, case.head_dim, device=device).to(dtype)
    # The strides are those of a qkv projection: each token holds all heads.
    return dict(zip(("q", "k", "v"), (x.transpose(1, 2).requires_grad_() for x in qkv), strict=True))


def _masked(case, dtype, device):
    first = torch.arange(case.batch, device=device).unsqueeze(1) * case.tokens // 5
    offsets = (torch.arange(case.tokens, device=device) - first) % case.tokens
    return _separate(case, dtype, device) | {"attn_mask": (offsets >= case.tokens // 5)[:, None, None, :]}


def _biased(case, dtype, device):
    bias = normal((1, case.heads, case.tokens, case.tokens), dtype, device)
    return _separate(case, dtype, device) | {"attn_mask": bias}


def _lengths(case):
    return [max(1, int(case.tokens * PARTS[i % len(PARTS)])) for i in range(case.batch)]


def _varlen(case, dtype, device):
    total = sum(_lengths(case))
    tensors = {name: normal((total, case.heads, case.head_dim), dtype, device) for name in ("q", "k", "v")}
    ends = torch.tensor([0, *_lengths(case)], device=device).cumsum(0)
    return tensors | {"cu_seqlens": ends.to(torch.int32)}


def _sdpa(case, q, k, v, attn_mask=None):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)


def _sdpa_image_by_image(case, q, k, v, cu_seqlens):
    outputs = []
    for image in zip(*(x.split(_lengths(case)) for x in (q, k, v)), strict=True):
        outputs.append(_sdpa(case, *(x.transpose(0, 1).unsqueeze(0) for x in image)).squeeze(0).transpose(0, 1))
    return torch.cat(outputs)


def _scores(case):
    """Return the number of scores times D."""
    return case.batch * case.tokens**2 * case.channels


def _scores_varlen(case):
    return sum(n * n for n in _lengths(case)) * case.channels


def _flops(scores):
    """Return the FLOPs: two products in forward; five in backward, which recomputes the scores."""
    return lambda case, mode: by_mode(mode, 4 * scores(case), 10 * scores(case))


def _bytes(elements, bias=lambda case: 0):
    """Return the bytes: forward has q, k, v, o and the bias, backward also do, dq, dk, dv and the bias' gradient."""

    def count(case, mode, itemsize):
        forward, backward = 4 * elements(case) + bias(case), 8 * elements(case) + 2 * bias(case)
        return by_mode(mode, forward * itemsize, backward * itemsize)

    return count


def _elements(case):
    return case.batch * case.tokens * case.channels


def _backend(backend):
    def make(device):
        if device.type != "cuda":
            raise Missing("runs on a GPU only")

        def attend(case, **tensors):
            with sdpa_kernel(backend):
                return reference.attention_qkvpacked(**tensors) if "qkv" in tensors else _sdpa(case, **tensors)

        return attend

    return make


def _flash_attention(device):
    attend = require("flash_attn", device).flash_attn_qkvpacked_func
    return lambda case, qkv: attend(qkv)


def _flash_attention_3(device):
    attend = require("flash_attn_interface", device).flash_attn_func
    return lambda case, qkv: attend(*qkv.unbind(2))


def _flash_attention_varlen(device):
    attend = require("flash_attn", device).flash_attn_varlen_func
    return lambda case, q, k, v, cu_seqlens: attend(q, k, v, cu_seqlens, cu_seqlens, case.tokens, case.tokens)


BENCHES = (
    OpBench(
        "attention",
        _packed,
        lambda case, qkv: ops.attention_qkvpacked(qkv),
        lambda case, qkv: reference.attention_qkvpacked(qkv),
        _flops(_scores),
        _bytes(_elements),
        rivals={
            "sdpa flash": _backend(SDPBackend.FLASH_ATTENTION),
            "sdpa cudnn": _backend(SDPBackend.CUDNN_ATTENTION),
            "flash-attn 2": _flash_attention,
            "flash-attn 3": _flash_attention_3,
        },
    ),
    OpBench(
        "attention_masked",
        _masked,
        lambda case, **tensors: ops.attention(**tensors),
        _sdpa,
        _flops(_scores),
        _bytes(_elements),
        rivals={
            "sdpa efficient": _backend(SDPBackend.EFFICIENT_ATTENTION),
            "sdpa cudnn": _backend(SDPBackend.CUDNN_ATTENTION),
        },
    ),
    OpBench(
        "attention_biased",
        _biased,
        lambda case, **tensors: ops.attention(**tensors),
        _sdpa,
        _flops(_scores),
        _bytes(_elements, lambda case: case.heads * case.tokens**2),
        rivals={"sdpa efficient": _backend(SDPBackend.EFFICIENT_ATTENTION)},
    ),
    OpBench(
        "attention_varlen",
        _varlen,
        lambda case, q, k, v, cu_seqlens: ops.attention_varlen(q, k, v, cu_seqlens, max(_lengths(case))),
        _sdpa_image_by_image,
        _flops(_scores_varlen),
        _bytes(lambda case: sum(_lengths(case)) * case.channels),
        rivals={"flash-attn 2": _flash_attention_varlen},
    ),
)
