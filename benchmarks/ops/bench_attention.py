"""Attention: from packed qkv, masked, biased, and on images of different sizes packed into one sequence.

B images, N tokens, H heads, D head dim.
"""

from __future__ import annotations

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.environment import Missing
from benchmarks.ops import Tensors, bench_of, by_mode, require
from vitkernels import reference
from vitkernels.testing.workloads import packed_lengths


def _as_projected(tensors: Tensors) -> Tensors:
    """Give q, k and v the strides of a qkv projection: each token holds all heads."""
    projected = {n: tensors[n].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for n in "qkv"}
    return tensors | projected


def _sdpa(case, q, k, v, attn_mask=None):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)


def _sdpa_image_by_image(case, q, k, v, cu_seqlens):
    outputs = []
    for image in zip(*(x.split(packed_lengths(case)) for x in (q, k, v)), strict=True):
        outputs.append(_sdpa(case, *(x.transpose(0, 1).unsqueeze(0) for x in image)).squeeze(0).transpose(0, 1))
    return torch.cat(outputs)


def _scores(case):
    """Return the number of scores times D."""
    return case.batch * case.tokens**2 * case.channels


def _scores_varlen(case):
    return sum(n * n for n in packed_lengths(case)) * case.channels


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
    bench_of(
        "attention",
        _flops(_scores),
        _bytes(_elements),
        {
            "sdpa flash": _backend(SDPBackend.FLASH_ATTENTION),
            "sdpa cudnn": _backend(SDPBackend.CUDNN_ATTENTION),
            "flash-attn 2": _flash_attention,
            "flash-attn 3": _flash_attention_3,
        },
    ),
    bench_of(
        "attention_masked",
        _flops(_scores),
        _bytes(_elements),
        {
            "sdpa efficient": _backend(SDPBackend.EFFICIENT_ATTENTION),
            "sdpa cudnn": _backend(SDPBackend.CUDNN_ATTENTION),
        },
        workload="attention_key_mask",
        reference=_sdpa,
        change=_as_projected,
    ),
    bench_of(
        "attention_biased",
        _flops(_scores),
        _bytes(_elements, lambda case: case.heads * case.tokens**2),
        {"sdpa efficient": _backend(SDPBackend.EFFICIENT_ATTENTION)},
        reference=_sdpa,
        change=_as_projected,
    ),
    bench_of(
        "attention_varlen",
        _flops(_scores_varlen),
        _bytes(lambda case: sum(packed_lengths(case)) * case.channels),
        {"flash-attn 2": _flash_attention_varlen},
        reference=_sdpa_image_by_image,
    ),
)
