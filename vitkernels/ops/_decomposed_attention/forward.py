"""Forward of decomposed attention: one kernel, and its launcher."""

from __future__ import annotations

import torch
from torch import Tensor

from vitkernels import runtime
from vitkernels.ops._attention.tiles import (
    dot_heads,
    head_ptr,
    kept_factor,
    load_head,
    scaled_head,
    store_head,
    weighted_sum,
    zero_head,
    zeros,
)
from vitkernels.ops._decomposed_attention.config import DecomposedConfig, choose_config, tile_width
from vitkernels.ops._decomposed_attention.positions import biases_of
from vitkernels.ops._decomposed_attention.tiles import bias_along_x, bias_along_y, sixteen, window_keys
from vitkernels.ops._triton import tl, triton
from vitkernels.ops._window_attention.config import Tiling
from vitkernels.ops._window_attention.forward import forward_outputs, shared_arguments
from vitkernels.ops._window_attention.tiles import image_and_place, load_tokens, window_dropout, window_tokens
from vitkernels.ops._window_attention.windows import DecomposedOptions


@triton.jit(do_not_specialize=["Y", "X", "windows_y", "windows_x"])
def _decomposed_attention_fwd_kernel(
    qkv_ptr,  # (B, N, 3, H, D)
    along_y_ptr,  # (B, H, N, rows of a window)
    along_x_ptr,  # (B, H, N, columns of a window)
    padding_ptr,  # (3, H, D), with PADDING "value"
    seed_ptr,  # (1,), with DROPOUT
    o_ptr,  # (B, N, H, D)
    lse_ptr,  # (B, H, N, 2), each row's maximum and the base-2 logarithm of its sum
    stride_qkv_b,
    stride_qkv_n,
    stride_qkv_part,
    stride_qkv_h,
    stride_o_b,
    stride_o_n,
    stride_o_h,
    N,
    H,
    Y,
    X,
    windows_y,
    windows_x,
    score_scale: tl.constexpr,
    D: tl.constexpr,
    SHAPE: tl.constexpr,
    PADDING: tl.constexpr,  # "" (every window is whole), "value", or "hidden" from queries
    DROPOUT: tl.constexpr,
    ALIGN: tl.constexpr,
    INDEX: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
):
    STEP: tl.constexpr = BLOCK_N // WIDTH  # rows of a window in a tile of keys
    BLOCKS: tl.constexpr = tl.cdiv(SHAPE[7], BLOCK_M)
    pid = tl.program_id(0)
    m = (pid % BLOCKS * BLOCK_M + tl.arange(0, BLOCK_M)).to(INDEX)
    h = (pid // BLOCKS % H).to(tl.int64)
    window = pid // BLOCKS // H
    size = (Y, X, windows_y, windows_x)
    b, place = image_and_place(window, size)
    padding_head = padding_ptr + h * D
    rows_m, _, mask_m, _ = window_tokens(m, place, size, SHAPE)
    q_head = head_ptr(qkv_ptr, b, h, 0, stride_qkv_b, stride_qkv_n, stride_qkv_h, ALIGN)
    k_head = q_head + stride_qkv_part
    v_head = k_head + stride_qkv_part
    q = load_head(q_head, rows_m, stride_qkv_n, mask_m, D, PARTS, ALIGN)
    query = (b * H + h) * N + rows_m
    along_y = along_y_ptr + query * sixteen(SHAPE[0])
    along_x = along_x_ptr + query * sixteen(SHAPE[1])
    maximum = tl.full((BLOCK_M,), float("-inf"), ACC)
    sums = tl.zeros((BLOCK_M,), ACC)
    o = zero_head(BLOCK_M, PARTS, ACC)
    for column in range(0, SHAPE[1], WIDTH):
        of_columns = bias_along_x(along_x, column + tl.arange(0, BLOCK_N) % WIDTH, mask_m, SHAPE, WIDTH, ACC)
        for row in range(0, SHAPE[0], STEP):
            y, _x, n, rows_n, in_window, in_image = window_keys(row, column, place, size, SHAPE, WIDTH, BLOCK_N, INDEX)
            k = load_tokens(
                k_head, rows_n, stride_qkv_n, in_image, in_window, padding_head + H * D, D, PARTS, ALIGN, PADDING
            )
            v = load_tokens(
                v_head, rows_n, stride_qkv_n, in_image, in_window, padding_head + 2 * H * D, D, PARTS, ALIGN, PADDING
            )
            s = dot_heads(q, k, zeros(BLOCK_M, BLOCK_N, ACC), PRECISION) * score_scale + of_columns
            s += bias_along_y(along_y, row, y, mask_m, SHAPE, STEP, ACC)
            if PADDING == "hidden":
                s = tl.where(in_image[None, :], s, float("-inf"))
            largest = tl.maximum(maximum, tl.max(s, axis=1))
            # If all scores so far are -inf, subtracting their maximum would give NaN.
            shift = tl.where(largest == float("-inf"), 0.0, largest)
            p = tl.exp2(s - shift[:, None])
            rescale = tl.exp2(maximum - shift)
            sums = sums * rescale + tl.sum(p, axis=1)
            if DROPOUT > 0:
                # The largest weight is 1 here, and 1/(1 − p) would be rounded with it: it is a factor of the output.
                p = tl.where(window_dropout(seed_ptr, window, h, H, m, n, DROPOUT, ACC) > 0, p, 0.0)
            o = weighted_sum(p, v, scaled_head(o, rescale[:, None]), PRECISION)
            maximum = largest
    o_head = head_ptr(o_ptr, b, h, 0, stride_o_b, stride_o_n, stride_o_h, ALIGN)
    o = scaled_head(o, (kept_factor(DROPOUT, ACC) / sums)[:, None])
    store_head(o_head, o, rows_m, stride_o_n, mask_m, D, PARTS, ALIGN)
    statistics = lse_ptr + query * 2
    tl.store(statistics, maximum, mask=mask_m)
    tl.store(statistics + 1, tl.log2(sums), mask=mask_m)


def decomposed_attention_forward(qkv: Tensor, options: DecomposedOptions) -> tuple[Tensor, Tensor]:
    """Launch the forward on qkv (B, N, 3, H, D); return o (B, N, H, D) and lse (B, H, N, 2), as window attention's."""
    o, lse = forward_outputs(qkv)
    if o.numel() == 0:
        return o, lse
    config, qkv = config_of(qkv, options), runtime.unit_stride(qkv)
    options = options._replace(rel_pos=tables_of(qkv, options))
    biases = biases_of(qkv, options.rel_pos, options.windows, config)
    arguments, programs = launch_arguments(qkv, options, config.forward, biases, o)
    blocks = runtime.cdiv(options.windows.tokens, config.forward.block_m)
    _decomposed_attention_fwd_kernel[(programs * blocks,)](**arguments, o_ptr=o, lse_ptr=lse)
    return o, lse


def config_of(qkv: Tensor, options: DecomposedOptions) -> DecomposedConfig:
    """Return the tilings for a call."""
    facts = runtime.device_facts(qkv.device)
    return choose_config(options.windows.columns, qkv.shape[-1], qkv.dtype, facts, dropout=options.dropout_p > 0)


def tables_of(qkv: Tensor, options: DecomposedOptions) -> tuple[Tensor, Tensor]:
    """Return the tables as the kernels load them, contiguous."""
    tables = tuple(t.contiguous() for t in options.rel_pos)
    if qkv.dtype == torch.float64:  # Triton 3.7.1 compiles no fp64 product beside a load of 16 bits.
        tables = tuple(t.double() for t in tables)
    return tables


def launch_arguments(
    qkv: Tensor, options: DecomposedOptions, tiling: Tiling, biases: tuple[Tensor, Tensor], o: Tensor, *others: Tensor
) -> tuple[dict[str, object], int]:  # fmt: skip
    """Return the arguments that the kernels of the attention share, with the options of a launch, and the windows of
    all heads of all images.

    ``biases`` are :func:`biases_of`'s. The strides of o are those of ``o``; ``others`` are further tensors
    (B, N, H, D) that the kernel reads or writes.
    """
    arguments, total = shared_arguments(qkv, options, tiling, o, *others)
    arguments |= {
        "along_y_ptr": biases[0],
        "along_x_ptr": biases[1],
        "WIDTH": tile_width(options.windows.columns, tiling.block_n),
    }
    return arguments, total * qkv.shape[3]
