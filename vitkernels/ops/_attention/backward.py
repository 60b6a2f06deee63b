"""Launchers of attention's backward: which kernels run, and their arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from vitkernels import runtime
from vitkernels.ops._attention.backward_blocks import (
    _attention_bwd_delta_kernel,
    _attention_bwd_dkv_kernel,
    _attention_bwd_dmask_kernel,
    _attention_bwd_dq_kernel,
)
from vitkernels.ops._attention.backward_row import _attention_bwd_row_kernel, _attention_bwd_windows_kernel
from vitkernels.ops._attention.config import AttentionConfig, Tiling, choose_config, head_parts
from vitkernels.ops._attention.forward import window_groups
from vitkernels.ops._attention.operands import Options, addressing, strides
from vitkernels.ops._sums import new_shares, sum_into, sum_shares


def attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    options: Options,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    *,
    dkey_bias: Tensor | None = None,
    sums_dtype: torch.dtype | None = None,
    needs_dmask: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """Launch the backward; write the gradients into ``dq``, ``dk`` and ``dv``, and skip those that are None.

    Tensors are (B, N, H, D), with B = 1 for packed images. ``dk`` and ``dv`` have the same strides; all gradients have
    unit stride along the last dim. ``dkey_bias`` (B, H, N_kv), contiguous, in lse's dtype, requires ``dk`` and receives
    each head's gradient of ``options.key_bias``. Returns two tensors, each None unless needed:

    - with ``sums_dtype``, which requires all three gradients, their sums over images and tokens, (3, H, D): the bias
      gradient of the preceding projection, without another pass;
    - with ``needs_dmask``, the gradient of ``options.mask``, of its shape, in fp32 (fp64 for fp64).
    """
    if dkey_bias is not None and q.numel() == 0:
        dkey_bias.zero_()
    if q.numel() == 0 or (dq is None and dk is None and not needs_dmask):
        sums = torch.zeros((3, *q.shape[2:]), dtype=sums_dtype, device=q.device) if sums_dtype else None
        return sums, torch.zeros_like(options.mask, dtype=lse.dtype) if needs_dmask else None
    do, q, k, v = (runtime.unit_stride(t) for t in (do, q, k, v))
    B, N_q, H, D = q.shape
    varlen = options.starts is not None
    images, longest_q, longest_kv = options.rows(B, N_q, k.shape[1])
    config = choose_config(
        longest_q, longest_kv, D, q.dtype, runtime.device_facts(q.device),
        heads=images * H, varlen=varlen, masked=options.mask is not None, key_bias=options.key_bias is not None,
        dropout=options.dropout_p > 0, is_causal=options.is_causal,
    )  # fmt: skip
    arguments = {
        "do_ptr": do,
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        **strides("do", do),
        **strides("q", q),
        **strides("k", k),
        **strides("v", v),
        **options.arguments(q),
        "N_q": 0 if varlen else N_q,
        "N_kv": 0 if varlen else k.shape[1],
        "H": H,
        "D": D,
        "PARTS": head_parts(D),
    }
    of_keys = {"dkey_bias_ptr": lse if dkey_bias is None else dkey_bias, "NEEDS_DKEY_BIAS": dkey_bias is not None}
    whole_rows = config.backward.regime != "blocks" and dq is not None and dk is not None
    if whole_rows:
        launch = _launch_row if config.backward.regime == "row" else _launch_windows
        sums, delta, dmask = launch(
            arguments | of_keys, config.backward, options, lse, dq, dk, dv, sums_dtype, needs_dmask
        )
    else:
        rows = images, longest_q, longest_kv
        sums, delta = _launch_blocks(arguments, of_keys, config, options, rows, o, lse, dq, dk, dv, sums_dtype)
        dmask = None
    if needs_dmask and dmask is None:
        dmask = _launch_dmask(arguments, config.dmask, options, lse, delta)
    if needs_dmask:  # the kernels do not sum over queries and keys
        dims = [i for i in (2, 3) if options.mask.shape[i] < dmask.shape[i]]
        dmask = dmask.sum(dims, keepdim=True) if dims else dmask
    return sums, dmask


def _launch_row(arguments, tiling, options, lse, dq, dk, dv, sums_dtype, needs_dmask):
    q = arguments["q_ptr"]
    B, N_q, H, D = q.shape
    shares, (sums,) = new_shares([sums_dtype is not None], B, 3 * H * D, lse.dtype, q.device)
    delta = lse.new_empty((B, H, N_q)) if needs_dmask else None
    _attention_bwd_row_kernel[(B * H,)](
        **arguments,
        **addressing(
            *(arguments[f"{x}_ptr"] for x in ("do", "q", "k", "v")),
            dq,
            dk,
            dv,
            mask_reach=N_q * arguments["stride_mask_m"],
        ),
        lse_ptr=lse,
        delta_ptr=delta if needs_dmask else lse,
        dq_ptr=dq,
        dk_ptr=dk,
        dv_ptr=dv,
        sums_ptr=sums,
        **strides("dq", dq),
        **strides("dk", dk),
        scale=options.scale,
        NEEDS_SUMS=sums_dtype is not None,
        NEEDS_DELTA=needs_dmask,
        **_tiles(tiling),
        enable_fp_fusion=False,  # as in the forward
    )
    return _sum(shares, H, D, sums_dtype), delta, None


def _sum(shares: Tensor, H: int, D: int, dtype: torch.dtype | None) -> Tensor | None:
    return None if dtype is None else sum_shares(shares, [True], [dtype])[0].view(3, H, D)


def _launch_windows(arguments, tiling, options, lse, dq, dk, dv, sums_dtype, needs_dmask):
    q = arguments["q_ptr"]
    B, N_q, H, D = q.shape
    windows, groups = window_groups(B, H, q.device)
    # The windows kernel can sum the gradient of a bias shared by all images; the dmask kernel sums any other.
    shared = needs_dmask and options.shares_mask
    shares, (sums,) = new_shares([sums_dtype is not None], groups, 3 * H * D, lse.dtype, q.device)
    dmask = torch.empty((groups, H, N_q, arguments["N_kv"]), dtype=lse.dtype, device=q.device) if shared else None
    delta = lse.new_empty((B, H, N_q)) if needs_dmask and not shared else None
    _attention_bwd_windows_kernel[(groups * H,)](
        **arguments,
        **addressing(
            *(arguments[f"{x}_ptr"] for x in ("do", "q", "k", "v")),
            dq,
            dk,
            dv,
            mask_reach=N_q * arguments["stride_mask_m"],
        ),
        delta_ptr=lse if delta is None else delta,
        dq_ptr=dq,
        dk_ptr=dk,
        dv_ptr=dv,
        sums_ptr=sums,
        dmask_ptr=dmask if shared else lse,
        **strides("dq", dq),
        **strides("dk", dk),
        B=B,
        windows=windows,
        scale=options.scale,
        MASK_B=not options.shares_mask,
        NEEDS_SUMS=sums_dtype is not None,
        NEEDS_DELTA=delta is not None,
        NEEDS_DMASK=shared,
        **_tiles(tiling),
        enable_fp_fusion=False,  # as in the forward
    )
    if shared:
        dmask = dmask.sum(0 if options.mask.shape[1] > 1 else (0, 1), keepdim=True)
    return _sum(shares, H, D, sums_dtype), delta, dmask


def _launch_blocks(arguments, of_keys, config: AttentionConfig, options, rows, o, lse, dq, dk, dv, sums_dtype):
    images, longest_q, longest_kv = rows
    do, q, k, v = (arguments[f"{x}_ptr"] for x in ("do", "q", "k", "v"))
    mask_reach = q.shape[1] * arguments["stride_mask_m"]
    B, N_q, H, D = q.shape
    varlen = options.starts is not None
    images_of = {"VARLEN": varlen, "starts_ptr": options.starts if varlen else q, "T": N_q}
    delta = lse.new_empty((B, H, N_q))
    needs_sums = sums_dtype is not None
    sums = torch.empty((3, H, D), dtype=sums_dtype, device=q.device) if needs_sums else None
    if dq is not None:
        num_blocks = runtime.cdiv(longest_q, config.dq.block_m)
        shares, (dq_sums,) = new_shares([needs_sums], B * num_blocks, H * D, lse.dtype, q.device)
        _attention_bwd_dq_kernel[(images * H * num_blocks,)](
            **arguments,
            **images_of,
            o_ptr=o,
            lse_ptr=lse,
            delta_ptr=delta,
            dq_ptr=dq,
            sums_ptr=dq_sums,
            **strides("o", o),
            **strides("dq", dq),
            **addressing(do, q, k, v, o, dq, mask_reach=mask_reach),
            **_tiles(config.dq),
            num_blocks=num_blocks,
            scale=options.scale,
            NEEDS_SUMS=needs_sums,
        )
        if needs_sums:
            sum_into(shares, [sums.narrow(0, 0, 1)])
    else:
        num_blocks = runtime.cdiv(N_q, config.forward.block_m)
        _attention_bwd_delta_kernel[(B * H * num_blocks,)](
            o_ptr=o,
            do_ptr=do,
            delta_ptr=delta,
            **strides("o", o),
            **strides("do", do),
            N_q=N_q,
            H=H,
            num_blocks=num_blocks,
            D=D,
            **addressing(o, do),
            ACC=arguments["ACC"],
            BLOCK_M=config.forward.block_m,
            PARTS=arguments["PARTS"],
        )
    if dk is not None:
        num_blocks = runtime.cdiv(longest_kv, config.dkv.block_n)
        shares, (dkv_sums,) = new_shares([needs_sums], B * num_blocks, 2 * H * D, lse.dtype, q.device)
        _attention_bwd_dkv_kernel[(images * H * num_blocks,)](
            **arguments,
            **images_of,
            **of_keys,
            lse_ptr=lse,
            delta_ptr=delta,
            dk_ptr=dk,
            dv_ptr=dv,
            sums_ptr=dkv_sums,
            **strides("dk", dk),
            **addressing(do, q, k, v, dk, dv, mask_reach=mask_reach),
            **_tiles(config.dkv),
            num_blocks=num_blocks,
            scale=options.scale,
            NEEDS_SUMS=needs_sums,
        )
        if needs_sums:
            sum_into(shares, [sums.narrow(0, 1, 2)])
    return sums, delta


def _launch_dmask(arguments, tiling: Tiling, options, lse, delta):
    do, q, k, v = (arguments[f"{x}_ptr"] for x in ("do", "q", "k", "v"))
    mask_reach = q.shape[1] * arguments["stride_mask_m"]
    B, N_q, H, _ = q.shape
    N_kv = k.shape[1]
    varies = [n > 1 for n in options.mask.shape[:2]]
    kept = (B if varies[0] else 1), (H if varies[1] else 1)
    blocks = runtime.cdiv(N_q, tiling.block_m), runtime.cdiv(N_kv, tiling.block_n)
    tiles = kept[0] * kept[1] * blocks[0] * blocks[1]
    # Just enough programs to fill the device, since each split stores a partial gradient.
    splits = min(B * H // (kept[0] * kept[1]), runtime.cdiv(2 * runtime.device_facts(q.device).num_sms, tiles))
    dmask = torch.empty((splits, *kept, N_q, N_kv), dtype=lse.dtype, device=q.device)
    _attention_bwd_dmask_kernel[(tiles * splits,)](
        **arguments,
        lse_ptr=lse,
        delta_ptr=delta,
        dmask_ptr=dmask,
        B=B,
        blocks_m=blocks[0],
        blocks_n=blocks[1],
        num_splits=splits,
        scale=options.scale,
        MASK_B=varies[0],
        MASK_H=varies[1],
        **addressing(do, q, k, v, mask_reach=mask_reach),
        **_tiles(tiling),
    )
    return dmask.sum(0) if splits > 1 else dmask.squeeze(0)


def _tiles(tiling: Tiling) -> dict[str, int]:
    return {
        "BLOCK_M": tiling.block_m,
        "BLOCK_N": tiling.block_n,
        "num_warps": tiling.num_warps,
        "num_stages": tiling.num_stages,
    }
