"""Attention within windows of an image, and over a whole image with a table of relative positions.

Forward (arXiv 2103.14030, with cosine attention 2111.09883), for the tokens of one window:
    S = scale · q kᵀ + table[position of q − position of k] + mask value · (q, k of other regions),  o = softmax(S) v
A window is read and written where the projection put it. Rolling, padding, cutting and the shift's mask are arithmetic
on indices, and the bias is read from its table: no tensor is rolled, padded, partitioned, masked or gathered.

Shapes: batch B, image rows Y and columns X, prefix tokens R, N = R + Y · X tokens, heads H, head dim D.
Saved for backward: qkv, o, lse (B, H, N, 2) and the parameters. There are no atomics, and results are bit-for-bit
reproducible.

    windows.py     the windows of an image, and the options     tiles.py      code shared by the kernels
    config.py      tiles                                        forward.py    forward kernel and launcher
    registered.py  registered ops                               backward.py   backward kernels and launcher
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitkernels import runtime
from vitkernels.ops._attention.checks import check_dropout, check_sizes
from vitkernels.ops._attention.operands import cast_operands, draw_seed
from vitkernels.ops._checks import check_integer, check_like, check_pair, check_scale, check_shape, check_tensor
from vitkernels.ops._once import once_differentiable
from vitkernels.ops._registry import needs_grad, uses_kernels
from vitkernels.ops._window_attention.registered import by_pytorch, window_attention_bwd, window_attention_fwd
from vitkernels.ops._window_attention.windows import Options, Windows


class WindowAttentionFunction(torch.autograd.Function):
    """Autograd for packed qkv (B, N, 3, H, D) and the parameters of the windows."""

    @staticmethod
    def forward(ctx, qkv, table, padding, logit_scale, seed, Y, X, window, scale, dropout_p):
        o, lse = window_attention_fwd(qkv, Y, X, window, table, padding, logit_scale, seed, scale, dropout_p)
        ctx.save_for_backward(qkv, o, lse, table, padding, logit_scale, seed)
        ctx.emulated = runtime.emulated_arch()
        ctx.options = (Y, X, window, scale, dropout_p)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, saved, do):
        qkv, o, lse, table, padding, logit_scale, seed = saved
        Y, X, window, scale, dropout_p = ctx.options
        needs_qkv, *needed = ctx.needs_input_grad[:4]
        dqkv, *grads = window_attention_bwd(
            do, qkv, o, lse, needed, Y, X, window, table, padding, logit_scale, seed, scale, dropout_p
        )
        return dqkv if needs_qkv else None, *(g if n else None for g, n in zip(grads, needed, strict=True)), *[None] * 6


def window_attention(
    qkv: Tensor,
    window_size: int | tuple[int, int],
    *,
    shift: int | tuple[int, int] = 0,
    bias_table: Tensor | None = None,
    padding: Tensor | None = None,
    logit_scale: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    grid: bool = False,
    roll_padded: bool = False,
    mask_value: int = -100,
) -> Tensor:
    """Attend within the windows of images, on the output of a qkv projection: Swin's attention.

    Args:
        qkv: (B, Y, X, 3, H, D), queries, keys and values along dim 3; fp16, bf16, fp32 or fp64; B and H may be 0,
            Y and X may not, D ≤ 256. Rows of the image that do not follow one another in memory are copied.
        window_size: Rows and columns of a window, or one number for both. An image that does not consist of whole
            windows is padded below and on the right.
        shift: How far the image is rolled up and to the left before it is cut, less than the window; the output is
            rolled back. ``mask_value`` is added to the scores of tokens that the roll brought together
            from different sides.
        bias_table: ((2 · rows − 1) · (2 · columns − 1), H), any floating dtype: the bias of a query and a key by
            where they lie apart, as Swin, timm and torchvision number its entries. May require grad.
        padding: (3, H, D), any floating dtype: queries, keys and values of padded tokens, which is the bias of the qkv
            projection where padding comes before it. May require grad. None: no query attends to padded tokens.
        logit_scale: (H,), any floating dtype: divide queries and keys by their norms and scale their product by this
            (Swin V2's cosine attention). May require grad. With it, ``scale`` must be None.
        scale: Factor of the scores, finite; 1/√D unless given.
        dropout_p: As for :func:`vitkernels.ops.attention`.
        grid: A window takes every (Y / rows)-th row and (X / columns)-th column (MaxViT's grid attention). The image
            must consist of whole windows, and there is no shift.
        roll_padded: Roll the image after it is padded, as torchvision and transformers do; timm rolls it before.
        mask_value: −100 in Swin's code; transformers' Swin V2 adds it twice.

    Returns:
        (B, Y, X, H, D), contiguous, in ``qkv``'s dtype (autocast's under autocast).

    Raises:
        ValueError: A shape, device, window or shift does not fit, ``scale`` is not finite, or ``dropout_p`` lies
            outside 0 to 1.
        TypeError: A dtype does not fit.
        NotImplementedError: D > 256, or a tensor is nested, sparse or quantized.

    Reference: arXiv 2103.14030 (Swin), 2111.09883 (Swin V2), 2204.01697 (MaxViT).
    """
    op = "window_attention"
    check_tensor(op, "qkv", qkv)
    (qkv,) = cast_operands(qkv)
    if qkv.ndim != 6 or qkv.shape[3] != 3:
        raise ValueError(f"{op}: qkv has shape {tuple(qkv.shape)}; expected (B, Y, X, 3, H, D)")
    B, Y, X, _, H, D = qkv.shape
    check_sizes(op, "qkv", qkv, Y * X, D)
    rows, columns = check_pair(op, "window_size", window_size, 1)
    shift_y, shift_x = check_pair(op, "shift", shift, 0)
    if shift_y >= rows or shift_x >= columns:
        raise ValueError(f"{op}: shift is {(shift_y, shift_x)}; expected less than the window, {(rows, columns)}")
    mask_value = check_integer(op, "mask_value", mask_value)
    windows = Windows(Y, X, rows, columns, shift_y, shift_x, 0, int(bool(grid)), int(bool(roll_padded)), mask_value)
    if grid and not windows.whole:
        raise ValueError(f"{op}: the image is {(Y, X)}; with grid expected a multiple of the window, {(rows, columns)}")
    if grid and (shift_y or shift_x):
        raise ValueError(f"{op}: shift is {(shift_y, shift_x)}; expected 0 with grid")
    o = _attend(op, qkv.flatten(1, 2), windows, bias_table, padding, logit_scale, scale, dropout_p)
    return o.view(B, Y, X, H, D)


def relative_attention(
    qkv: Tensor,
    grid_size: tuple[int, int],
    *,
    bias_table: Tensor | None = None,
    num_prefix_tokens: int = 0,
    logit_scale: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Attend over a whole image with a bias by relative position: BEiT's attention.

    Args:
        qkv: (B, N, 3, H, D), N = prefix tokens + Y · X, row after row; as for :func:`window_attention`.
        grid_size: Y and X, the rows and columns of tokens.
        bias_table: ((2Y − 1) · (2X − 1), H), or with prefix tokens three entries more: of a prefix token's query and
            an image's key, of the reverse, and of two prefix tokens, as BEiT numbers them.
        num_prefix_tokens: Tokens before the image's, such as the class token.
        logit_scale, scale, dropout_p: As for :func:`window_attention`.

    Returns:
        (B, N, H, D), contiguous, in ``qkv``'s dtype (autocast's under autocast).

    Raises:
        ValueError, TypeError, NotImplementedError: As for :func:`window_attention`.

    Reference: arXiv 2106.08254 (BEiT).
    """
    op = "relative_attention"
    check_tensor(op, "qkv", qkv)
    (qkv,) = cast_operands(qkv)
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(f"{op}: qkv has shape {tuple(qkv.shape)}; expected (B, N, 3, H, D)")
    Y, X = check_pair(op, "grid_size", grid_size, 1)
    prefix = check_integer(op, "num_prefix_tokens", num_prefix_tokens)
    if prefix < 0 or prefix + Y * X != qkv.shape[1]:
        raise ValueError(
            f"{op}: qkv has {qkv.shape[1]} tokens; expected num_prefix_tokens ({prefix}) + {Y} · {X}, the grid"
        )
    check_sizes(op, "qkv", qkv, qkv.shape[1], qkv.shape[-1])
    windows = Windows(Y, X, Y, X, prefix=prefix)
    return _attend(op, qkv, windows, bias_table, None, logit_scale, scale, dropout_p)


def _attend(op, qkv, windows, table, padding, logit_scale, scale, dropout_p):
    """Check the parameters, and attend within ``windows`` of qkv (B, N, 3, H, D)."""
    H, D = qkv.shape[3:]
    if logit_scale is not None and scale is not None:
        raise ValueError(f"{op}: scale is {scale} beside logit_scale; expected one of them")
    scale = check_scale(op, scale, D)
    dropout_p = check_dropout(op, dropout_p)
    expected = (
        ("bias_table", table, (windows.entries, H), "entries of the window and heads"),
        ("padding", padding, (3, H, D), "(3, H, D)"),
        ("logit_scale", logit_scale, (H,), "the heads"),
    )
    for name, t, shape, why in expected:
        if t is not None:
            check_like(op, name, t, "qkv", qkv, dtype=False)
            check_shape(op, name, t, shape, why)
    if not uses_kernels(qkv):
        options = Options(windows, table, padding, logit_scale, None, scale, dropout_p)
        return by_pytorch(qkv, options, dropout_p=dropout_p).contiguous()
    seed, (Y, X, *window) = draw_seed(qkv, dropout_p), windows
    if needs_grad(qkv, table, padding, logit_scale):
        return WindowAttentionFunction.apply(qkv, table, padding, logit_scale, seed, Y, X, window, scale, dropout_p)
    o, _ = window_attention_fwd(qkv, Y, X, window, table, padding, logit_scale, seed, scale, dropout_p)
    return o
