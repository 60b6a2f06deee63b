"""Forward of window attention: one kernel, and its launcher."""

from __future__ import annotations

import torch
from torch import Tensor

from vitkernels import runtime
from vitkernels.ops._attention import operands
from vitkernels.ops._attention.config import head_parts
from vitkernels.ops._attention.tiles import (
    LOG2_E,
    head_ptr,
    kept_factor,
    load_head,
    scaled_head,
    store_head,
    weighted_sum,
    zero_head,
    zeros,
)
from vitkernels.ops._tile import accumulator
from vitkernels.ops._triton import tl, triton
from vitkernels.ops._window_attention.config import Tiling, WindowConfig, choose_config
from vitkernels.ops._window_attention.tiles import (
    image_and_place,
    inverse_norms,
    load_bias,
    load_factor,
    load_tokens,
    masked_scores,
    scores_of,
    table_entry,
    window_dropout,
    window_tokens,
)
from vitkernels.ops._window_attention.windows import DecomposedOptions, Options


@triton.jit
def _window_attention_bias_kernel(
    table_ptr,  # (entries, H) by strides
    bias_ptr,  # (H, entries), or with PAIRS (H, padded tokens, padded tokens)
    stride_e,
    stride_h,
    SHAPE: tl.constexpr,
    ROWS: tl.constexpr,  # of a head in bias
    COLUMNS: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    h = (tl.program_id(0) // ROWS).to(tl.int64)
    m = tl.program_id(0) % ROWS
    n = tl.arange(0, BLOCK)
    exists = n < COLUMNS
    entry = n
    inside = exists
    if PAIRS:
        inside = (m < SHAPE[7]) & (n < SHAPE[7])
        entry = table_entry(m, n, SHAPE)
    x = tl.load(table_ptr + (entry.to(tl.int64) * stride_e + h * stride_h), mask=inside, other=0.0)
    x = x.to(bias_ptr.dtype.element_ty)
    if PAIRS:
        x = tl.where(n < SHAPE[7], x, float("-inf"))
    else:
        x *= LOG2_E
    tl.store(bias_ptr + (h * ROWS + m) * COLUMNS + n, x, mask=exists)


@triton.jit(do_not_specialize=["Y", "X", "windows_y", "windows_x", "total", "windows"])
def _window_attention_fwd_kernel(
    qkv_ptr,  # (B, N, 3, H, D)
    bias_ptr,  # (H, entries) of bias_of, with BIAS
    padding_ptr,  # (3, H, D), with PADDING "value"
    logit_ptr,  # (H,), with COSINE
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
    total,  # windows of all images
    windows,  # windows per program
    score_scale: tl.constexpr,
    D: tl.constexpr,
    SHAPE: tl.constexpr,
    ENTRIES: tl.constexpr,
    BIAS: tl.constexpr,  # "", "table" or "pairs"
    PADDING: tl.constexpr,  # "" (every window is whole), "value", or "hidden" from queries
    COSINE: tl.constexpr,
    DROPOUT: tl.constexpr,
    ALIGN: tl.constexpr,
    INDEX: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HIDES: tl.constexpr,  # whether scores of keys that do not exist need -inf; a bias of pairs has it already
    PARTS: tl.constexpr,
):
    TOKENS: tl.constexpr = SHAPE[7]
    BLOCKS: tl.constexpr = tl.cdiv(TOKENS, BLOCK_M)
    WHOLE: tl.constexpr = BLOCK_N >= TOKENS  # one tile has all keys
    pid = tl.program_id(0)
    m = (pid % BLOCKS * BLOCK_M + tl.arange(0, BLOCK_M)).to(INDEX)
    h = (pid // BLOCKS % H).to(tl.int64)
    first = pid // BLOCKS // H * windows
    size = (Y, X, windows_y, windows_x)
    padding_head = padding_ptr + h * D
    bias = 0.0
    if WHOLE:  # loaded once for all windows
        keys = tl.arange(0, BLOCK_N).to(INDEX)
        bias = load_bias(bias_ptr, h, m[:, None], keys[None, :], SHAPE, BIAS, ENTRIES, ACC)
    factor = load_factor(logit_ptr, h, COSINE, ACC)
    for window in range(first, tl.minimum(first + windows, total)):
        b, place = image_and_place(window, size)
        rows_m, _, mask_m, region_m = window_tokens(m, place, size, SHAPE)
        q_head = head_ptr(qkv_ptr, b, h, 0, stride_qkv_b, stride_qkv_n, stride_qkv_h, ALIGN)
        k_head = q_head + stride_qkv_part
        v_head = k_head + stride_qkv_part
        q = load_head(q_head, rows_m, stride_qkv_n, mask_m, D, PARTS, ALIGN)
        norms_m = inverse_norms(q, COSINE, ACC)
        maximum = tl.full((BLOCK_M,), float("-inf"), ACC)
        sums = tl.zeros((BLOCK_M,), ACC)
        o = zero_head(BLOCK_M, PARTS, ACC)
        for start in range(0, TOKENS, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N).to(INDEX)
            rows_n, in_window, in_image, region_n = window_tokens(n, place, size, SHAPE)
            k = load_tokens(
                k_head, rows_n, stride_qkv_n, in_image, in_window, padding_head + H * D, D, PARTS, ALIGN, PADDING
            )
            v = load_tokens(
                v_head, rows_n, stride_qkv_n, in_image, in_window, padding_head + 2 * H * D, D, PARTS, ALIGN, PADDING
            )
            norms_n = inverse_norms(k, COSINE, ACC)
            zero = zeros(BLOCK_M, BLOCK_N, ACC)
            s = scores_of(q, k, zero, score_scale, factor, norms_m[:, None], norms_n[None, :], COSINE, PRECISION)
            if WHOLE:
                s += bias
            else:
                s += load_bias(bias_ptr, h, m[:, None], n[None, :], SHAPE, BIAS, ENTRIES, ACC)
            exists = in_image if PADDING == "hidden" else in_window
            s = masked_scores(s, region_m[:, None], region_n[None, :], exists[None, :], place, size, SHAPE, HIDES)
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
        statistics = lse_ptr + ((b * H + h) * N + rows_m) * 2
        tl.store(statistics, maximum, mask=mask_m)
        tl.store(statistics + 1, tl.log2(sums), mask=mask_m)


def window_attention_forward(qkv: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Launch the forward on qkv (B, N, 3, H, D); return o (B, N, H, D) and lse (B, H, N, 2).

    lse is each row's maximum and the base-2 logarithm of its sum. Added, they would lose digits: the scores of cosine
    attention go up to its factor, 100, and a weight from a rounded sum of 170 would be wrong by 1e-5 in fp32.
    """
    o, lse = forward_outputs(qkv)
    if o.numel() == 0:
        return o, lse
    config = config_of(qkv, options)
    whole = config.forward.block_n >= options.windows.tokens
    bias = bias_of(options, pairs=not whole, in_fp64=qkv.dtype == torch.float64)
    qkv = runtime.unit_stride(qkv)
    arguments, total = launch_arguments(qkv, options, config.forward, bias, o)
    blocks = runtime.cdiv(options.windows.tokens, config.forward.block_m)
    windows, groups = groups_of(total, blocks * qkv.shape[3], whole, qkv)
    _window_attention_fwd_kernel[(groups * qkv.shape[3] * blocks,)](
        **arguments,
        o_ptr=o,
        lse_ptr=lse,
        windows=windows,
    )
    return o, lse


def config_of(qkv: Tensor, options: Options) -> WindowConfig:
    """Return the tilings for a call."""
    return choose_config(
        options.windows.tokens,
        qkv.shape[-1],
        qkv.dtype,
        runtime.device_facts(qkv.device),
        dropout=options.dropout_p > 0,
        cosine=options.logit_scale is not None,
        padded=options.padding is not None and not options.windows.whole,
    )


def forward_outputs(qkv: Tensor) -> tuple[Tensor, Tensor]:
    """Allocate the outputs of :func:`window_attention_forward`."""
    B, N, _, H, D = qkv.shape
    o = qkv.new_empty((B, N, H, D))
    return o, qkv.new_empty((B, H, N, 2), dtype=runtime.wide_dtype(qkv.dtype))


def launch_arguments(
    qkv: Tensor, options: Options, tiling: Tiling, bias: Tensor | None, o: Tensor, *others: Tensor
) -> tuple[dict[str, object], int]:
    """Return the arguments that the kernels share, with the options of a launch, and the windows of all images.

    ``bias`` is :func:`bias_of`'s. The strides of o are those of ``o``; ``others`` are further tensors (B, N, H, D) that
    the kernel reads or writes.
    """
    windows = options.windows
    kind = "" if bias is None else "table" if bias.shape[1] == windows.entries else "pairs"
    arguments, total = shared_arguments(qkv, options, tiling, o, *others)
    arguments |= {
        "bias_ptr": qkv if bias is None else bias,
        "logit_ptr": qkv if options.logit_scale is None else options.logit_scale.contiguous(),
        "total": total,
        "ENTRIES": 0 if bias is None else bias.shape[1],
        "BIAS": kind,
        "HIDES": arguments["PADDING"] == "hidden" or (kind != "pairs" and windows.tokens % tiling.block_n != 0),
        "COSINE": options.logit_scale is not None,
    }
    return arguments, total


def shared_arguments(
    qkv: Tensor, options: Options | DecomposedOptions, tiling: Tiling, o: Tensor, *others: Tensor
) -> tuple[dict[str, object], int]:
    """Return what :func:`launch_arguments` has of every kind of positions, and the windows of all images."""
    B, N, _, H, D = qkv.shape
    windows = options.windows
    rows, columns = windows.counts
    arguments = {
        "qkv_ptr": qkv,
        "padding_ptr": qkv if options.padding is None else options.padding.contiguous(),
        "seed_ptr": qkv if options.seed is None else options.seed,
        "stride_qkv_b": qkv.stride(0),
        "stride_qkv_n": qkv.stride(1),
        "stride_qkv_part": qkv.stride(2),
        "stride_qkv_h": qkv.stride(3),
        "stride_o_b": o.stride(0),
        "stride_o_n": o.stride(1),
        "stride_o_h": o.stride(2),
        "N": N,
        "H": H,
        "Y": windows.Y,
        "X": windows.X,
        "windows_y": rows,
        "windows_x": columns,
        "score_scale": options.scale * operands.LOG2_E,
        "D": D,
        "SHAPE": windows.constants,
        "PADDING": "" if windows.whole else "hidden" if options.padding is None else "value",
        "DROPOUT": round(options.dropout_p * 2**31),
        "ACC": accumulator(qkv.dtype),
        "PRECISION": runtime.dot_precision(qkv.device),
        "PARTS": head_parts(D),
        "BLOCK_M": tiling.block_m,
        "BLOCK_N": tiling.block_n,
        **tiling.options,
        "enable_fp_fusion": False,  # as in ops.attention: an fma would leave a remainder of the largest score
        **operands.addressing(qkv, o, *others),
    }
    return arguments, B * rows * columns


def bias_of(options: Options, *, pairs: bool, in_fp64: bool) -> Tensor | None:
    """Return the bias as kernels load it (see :func:`tiles.load_bias`).

    A table is at least fp32, and for scores in base 2. Pairs keep the table's dtype: they are loaded for every window.
    """
    table, windows = options.table, options.windows
    if table is None:
        return None
    H = table.shape[1]
    rows, columns = (windows.padded_tokens,) * 2 if pairs else (1, windows.entries)
    # Triton 3.7.1 compiles no fp64 product beside a load of 16 bits.
    dtype = table.dtype if pairs and not in_fp64 else runtime.wide_dtype(table.dtype)
    bias = torch.empty((H, rows * columns), dtype=dtype, device=table.device)
    _window_attention_bias_kernel[(H * rows,)](
        table_ptr=table,
        bias_ptr=bias,
        stride_e=table.stride(0),
        stride_h=table.stride(1),
        SHAPE=windows.constants,
        ROWS=rows,
        COLUMNS=columns,
        PAIRS=pairs,
        BLOCK=runtime.next_power_of_2(columns),
        num_warps=4,
    )
    return bias


def groups_of(total: int, programs: int, whole: bool, qkv: Tensor) -> tuple[int, int]:
    """Return the windows per program and the programs per head and block of queries.

    Only where one tile holds a ``whole`` window does a program gain by taking several: it loads the bias once. Eight
    programs an SM hide each other's latency.
    """
    windows = max(1, total * programs // (8 * runtime.device_facts(qkv.device).num_sms)) if whole else 1
    return windows, runtime.cdiv(total, windows)
