"""Attention with decomposed relative positions, over a whole image or within its windows (MViTv2, ViTDet, SAM).

Forward (arXiv 2112.01526), for a query at row y and column x and a key at y', x' of one window:
    S = scale · q kᵀ + q · rel_pos_h[y − y' + rows − 1] + q · rel_pos_w[x − x' + columns − 1],  o = softmax(S) v
A first launch multiplies the queries by both tables. Attention takes keys by rows of the window, so that the bias along
x is loaded once for all rows, and that along y once for a row: nothing is gathered, and no (N, N) tensor is written.

Shapes: batch B, image rows Y and columns X, N = Y · X tokens, heads H, head dim D.
Saved for backward: qkv, o, lse (B, H, N, 2) and the parameters. There are no atomics, and results are bit-for-bit
reproducible.

    config.py      tiles                tiles.py      code shared by the kernels
    positions.py   products with the tables, forward and backward
    registered.py  registered ops       forward.py    forward kernel and launcher
                                        backward.py   backward kernels and launcher
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitkernels import runtime
from vitkernels.ops._attention.checks import check_dropout, check_sizes
from vitkernels.ops._attention.operands import cast_operands, draw_seed
from vitkernels.ops._checks import check_like, check_pair, check_scale, check_shape, check_tensor
from vitkernels.ops._decomposed_attention.registered import (
    by_pytorch,
    decomposed_attention_bwd,
    decomposed_attention_fwd,
)
from vitkernels.ops._once import once_differentiable
from vitkernels.ops._registry import needs_grad, uses_kernels
from vitkernels.ops._window_attention.windows import DecomposedOptions, Windows


class DecomposedAttentionFunction(torch.autograd.Function):
    """Autograd for packed qkv (B, N, 3, H, D), the tables and the padding."""

    @staticmethod
    def forward(ctx, qkv, rel_pos_h, rel_pos_w, padding, seed, Y, X, window, scale, dropout_p):
        o, lse = decomposed_attention_fwd(qkv, Y, X, window, rel_pos_h, rel_pos_w, padding, seed, scale, dropout_p)
        ctx.save_for_backward(qkv, o, lse, rel_pos_h, rel_pos_w, padding, seed)
        ctx.emulated = runtime.emulated_arch()
        ctx.options = (Y, X, window, scale, dropout_p)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, saved, do):
        qkv, o, lse, rel_pos_h, rel_pos_w, padding, seed = saved
        Y, X, window, scale, dropout_p = ctx.options
        needs_qkv, needs_h, needs_w, needs_padding = ctx.needs_input_grad[:4]
        dqkv, dtables, dpadding = decomposed_attention_bwd(
            do, qkv, o, lse, [needs_h or needs_w, needs_padding], Y, X, window, rel_pos_h, rel_pos_w, padding, seed,
            scale, dropout_p,
        )  # fmt: skip
        rows = len(rel_pos_h)
        grads = (
            dqkv if needs_qkv else None,
            dtables[:rows].to(rel_pos_h.dtype) if needs_h else None,
            dtables[rows:].to(rel_pos_w.dtype) if needs_w else None,
            dpadding if needs_padding else None,
        )
        return *grads, *[None] * 6


def decomposed_attention(
    qkv: Tensor,
    rel_pos_h: Tensor,
    rel_pos_w: Tensor,
    *,
    window_size: int | tuple[int, int] | None = None,
    padding: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Attend with decomposed relative positions, on the output of a qkv projection: ViTDet's and SAM's attention.

    Args:
        qkv: (B, Y, X, 3, H, D), queries, keys and values along dim 3; fp16, bf16, fp32 or fp64; B and H may be 0,
            Y and X may not, D ≤ 256. Rows of the image that do not follow one another in memory are copied.
        rel_pos_h: (2 · rows − 1, D), any floating dtype: the row of the table that a query is multiplied by for keys
            so many rows before it (arXiv 2112.01526). May require grad.
        rel_pos_w: (2 · columns − 1, D), any floating dtype: the same along x. May require grad.
        window_size: Rows and columns of a window, or one number for both; None is the whole image. An image that does
            not consist of whole windows is padded below and on the right.
        padding: (3, H, D), any floating dtype: queries, keys and values of padded tokens, which is the bias of the qkv
            projection where padding comes before it. May require grad. None: no query attends to padded tokens.
        scale: Factor of the products of queries and keys, finite; 1/√D unless given. The tables' are not scaled.
        dropout_p: As for :func:`vitkernels.ops.attention`.

    Returns:
        (B, Y, X, H, D), contiguous, in ``qkv``'s dtype (autocast's under autocast).

    Raises:
        ValueError: A shape, device or window does not fit, ``scale`` is not finite, or ``dropout_p`` lies outside 0
            to 1.
        TypeError: A dtype does not fit.
        NotImplementedError: D > 256, or a tensor is nested, sparse or quantized.

    Reference: arXiv 2112.01526 (MViTv2), 2203.16527 (ViTDet), 2304.02643 (SAM).
    """
    op = "decomposed_attention"
    check_tensor(op, "qkv", qkv)
    (qkv,) = cast_operands(qkv)
    if qkv.ndim != 6 or qkv.shape[3] != 3:
        raise ValueError(f"{op}: qkv has shape {tuple(qkv.shape)}; expected (B, Y, X, 3, H, D)")
    B, Y, X, _, H, D = qkv.shape
    check_sizes(op, "qkv", qkv, Y * X, D)
    rows, columns = (Y, X) if window_size is None else check_pair(op, "window_size", window_size, 1)
    scale, dropout_p = check_scale(op, scale, D), check_dropout(op, dropout_p)
    expected = (
        ("rel_pos_h", rel_pos_h, (2 * rows - 1, D), "2 · rows of a window − 1, and D"),
        ("rel_pos_w", rel_pos_w, (2 * columns - 1, D), "2 · columns of a window − 1, and D"),
        ("padding", padding, (3, H, D), "(3, H, D)"),
    )
    for name, t, shape, why in expected:
        if t is not None or name != "padding":
            check_like(op, name, t, "qkv", qkv, dtype=False)
            check_shape(op, name, t, shape, why)
    packed, windows = qkv.flatten(1, 2), Windows(Y, X, rows, columns)
    if not uses_kernels(qkv):
        options = DecomposedOptions(windows, (rel_pos_h, rel_pos_w), padding, None, scale, dropout_p)
        return by_pytorch(packed, options, dropout_p=dropout_p).reshape(B, Y, X, H, D)
    seed, tables = draw_seed(qkv, dropout_p), (rel_pos_h, rel_pos_w)
    if needs_grad(packed, *tables, padding):
        o = DecomposedAttentionFunction.apply(packed, *tables, padding, seed, Y, X, [rows, columns], scale, dropout_p)
    else:
        o, _ = decomposed_attention_fwd(packed, Y, X, [rows, columns], *tables, padding, seed, scale, dropout_p)
    return o.view(B, Y, X, H, D)
