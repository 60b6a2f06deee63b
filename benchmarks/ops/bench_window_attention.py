"""Attention in windows, shifted as in every other block of Swin, and over a whole image with relative positions.

B images of N tokens, H heads, D head dim. The rivals gather the windows in one pass over q, k and v. timm rolls and
partitions the tokens before their projection, two passes over a third of that, and joins the windows in two more.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops import bench_of, by_mode
from vitkernels.reference import window_index
from vitkernels.testing.cases import Case
from vitkernels.testing.workloads import find

OPTIONS = ("window_size", "shift", "num_prefix_tokens")


# What timm keeps in buffers, by workload, sizes and device: filled with the inputs, as torch.compile traces no cache.
_BUFFERS: dict[tuple, tuple[Tensor, ...]] = {}


def _shape(case: Case, workload: str) -> tuple[int, int, int, int]:
    """Return the tokens on a side of the image and of a window, the shift and the prefix tokens."""
    options = find(workload, case).options(case)
    side = case.image // case.patch
    return side, options.get("window_size", side), options.get("shift", 0), options.get("num_prefix_tokens", 0)


def _fill_buffers(workload: str, case: Case, device: torch.device) -> None:
    """Keep the windows' tokens, where each token lies in them, the shift's mask, and the entries of the table."""
    side, window, shift, prefix = _shape(case, workload)
    row, region, entry = window_index((side,) * 2, (window,) * 2, (shift,) * 2, prefix)
    mask = -100.0 * (region[:, None, None, :] != region[:, None, :, None])
    buffers = row, row.flatten().argsort(), mask, entry
    _BUFFERS[workload, case.name, case.image, device.type] = tuple(t.to(device) for t in buffers)


def _as_timm(workload: str, *, fused: bool, case: Case, qkv: Tensor, bias_table: Tensor, logit_scale=None) -> Tensor:
    """Attend with a bias of pairs, by scaled_dot_product_attention if ``fused``."""
    row, place, mask, entry = _BUFFERS[workload, case.name, case.image, qkv.device.type]
    _, _, shift, _ = _shape(case, workload)
    tokens = qkv if qkv.ndim == 5 else qkv.flatten(1, 2)
    images, windows = len(tokens), len(row)
    if windows > 1:
        tokens = tokens[:, row].flatten(0, 1)
    q, k, v = tokens.permute(2, 0, 3, 1, 4)
    scale = q.shape[-1] ** -0.5
    if logit_scale is not None:
        q, k, scale = F.normalize(q, dim=-1) * logit_scale[:, None, None], F.normalize(k, dim=-1), 1.0
    bias = bias_table[entry].permute(2, 0, 1)
    if fused:
        if shift:
            bias = (bias + mask.to(bias.dtype)).repeat(images, 1, 1, 1)
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    else:
        scores = (q * scale) @ k.mT + bias
        if shift:
            scores = (scores.unflatten(0, (images, windows)) + mask.to(bias.dtype)).flatten(0, 1)
        o = scores.softmax(-1) @ v
    o = o.transpose(1, 2)
    if windows > 1:
        o = o.reshape(images, -1, *o.shape[2:])[:, place]
    return o.reshape(*qkv.shape[:-3], *o.shape[-2:])


def _scores(case: Case, workload: str) -> int:
    """Return the number of scores times D."""
    _, window, _, prefix = _shape(case, workload)
    return case.batch * case.tokens * (window**2 + prefix) * case.channels


def _bench(name: str, workload: str, *, fused: bool, stages: str):
    """``fused``: whether timm's own code attends by scaled_dot_product_attention; else that is a rival of its own."""

    def flops(case, mode):
        """Return the FLOPs: two products in forward; five in backward, which recomputes the scores."""
        return by_mode(mode, 4 * _scores(case, workload), 10 * _scores(case, workload))

    def size(case, mode, itemsize):
        """Return the bytes: forward has q, k, v and o, backward also do, dq, dk and dv; both have the table."""
        tokens = case.batch * case.tokens * case.channels
        _, window, _, prefix = _shape(case, workload)
        table = ((2 * window - 1) ** 2 + 3 * (prefix > 0)) * case.heads
        return by_mode(mode, (4 * tokens + table) * itemsize, (8 * tokens + 2 * table) * itemsize)

    def timm(fused):
        return lambda case, **tensors: _as_timm(workload, fused=fused, case=case, **tensors)

    def inputs(case, dtype, device):
        _fill_buffers(workload, case, device)
        return {name: t for name, t in bench.inputs(case, dtype, device).items() if name != "padding"}

    bench = bench_of(
        name,
        flops,
        size,
        {} if fused else {"sdpa": lambda device: timm(True)},
        workload=workload,
        reference=timm(fused),
        stages=stages,
    )
    # At these sizes no window is padded.
    return dataclasses.replace(bench, inputs=inputs)


BENCHES = (
    _bench("window_attention", "attention_swin", fused=False, stages="swin_"),
    _bench("window_attention_cosine", "attention_swin_cosine", fused=False, stages="swinv2_"),
    _bench("relative_attention", "attention_relative", fused=True, stages="beit_"),
)
