"""Backward of the gate: gradients of both halves, their sums over rows and, if needed, h, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from vitkernels import runtime
from vitkernels.ops import _tile
from vitkernels.ops._layer_scale import fold_layer_scale
from vitkernels.ops._product import _accumulate, _columns, _tile_of_program, product, within_reach
from vitkernels.ops._sums import new_shares, sum_shares
from vitkernels.ops._swiglu.config import choose_config
from vitkernels.ops._swiglu.forward import tile
from vitkernels.ops._triton import tl, triton
from vitkernels.runtime import cdiv, wide_dtype


@triton.jit(do_not_specialize=["M", "programs_m"])
def _glu_bwd_kernel(
    dh_ptr,  # (M, P)
    z_ptr,  # (M, 2, P), contiguous
    dz_ptr,  # (M, 2, P), contiguous
    h_ptr,  # (M, P), contiguous, with SAVE_H
    sums_ptr,  # (programs of M, 2, P), with SUM_DZ: each program's partial sum
    stride_dh_row,
    programs_m,
    M,
    P,
    GATE: tl.constexpr,
    SAVE_H: tl.constexpr,
    SUM_DZ: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    pid_m = pid % programs_m
    offs_n = pid // programs_m * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < P
    # Summed over the rows of a tile at the end only: each such sum passes shared memory, with bank conflicts.
    gate_sum = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    value_sum = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for first_m in range(pid_m * BLOCK_M, M, programs_m * BLOCK_M):
        offs_m = first_m + tl.arange(0, BLOCK_M).to(tl.int64)
        mask = (offs_m < M)[:, None] & mask_n[None, :]
        dh = tl.load(dh_ptr + offs_m[:, None] * stride_dh_row + offs_n[None, :], mask=mask, other=0.0).to(ACC)
        offs_z = offs_m[:, None] * (2 * P) + offs_n[None, :]
        offs_h = offs_m[:, None] * P + offs_n[None, :]
        dgate, dvalue = _gate_gradients(
            dh, z_ptr + offs_z, dz_ptr + offs_z, h_ptr + offs_h, P, mask, GATE, SAVE_H, ACTIVATION, ACC
        )
        if SUM_DZ:
            gate_sum += dgate
            value_sum += dvalue
    if SUM_DZ:
        sums_ptrs = sums_ptr + pid_m * 2 * P + offs_n
        tl.store(sums_ptrs + GATE * P, tl.sum(gate_sum, axis=0), mask=mask_n)
        tl.store(sums_ptrs + (1 - GATE) * P, tl.sum(value_sum, axis=0), mask=mask_n)


@triton.jit(do_not_specialize=["M"])
def _glu_product_bwd_kernel(
    dy_ptr,  # (M, K), upstream gradient of the last layer
    weight_ptr,  # (K, P), weight of the last layer
    alpha_ptr,  # (1,), with HAS_ALPHA
    z_ptr,  # (M, 2, P), contiguous
    dz_ptr,  # (M, 2, P), contiguous
    h_ptr,  # (M, P), contiguous, with SAVE_H
    sums_ptr,  # (blocks of M, 2, P), with SUM_DZ: each block's partial sum
    stride_dy_row,
    stride_dy_col,
    stride_weight_row,
    stride_weight_col,
    M,
    P,
    K,
    HAS_ALPHA: tl.constexpr,
    GATE: tl.constexpr,
    SAVE_H: tl.constexpr,
    SUM_DZ: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pid_m, pid_n = _tile_of_program(M, P, BLOCK_M, BLOCK_N)
    first_m, first_n = pid_m * BLOCK_M, pid_n * BLOCK_N
    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M - first_m, offs_n < P - first_n
    dh = _accumulate(
        tl.zeros((BLOCK_M, BLOCK_N), ACC), dy_ptr + first_m * stride_dy_row, weight_ptr + first_n * stride_weight_col,
        stride_dy_row, stride_dy_col, stride_weight_row, stride_weight_col,
        offs_m, offs_n, mask_m, mask_n, K, EVEN_K, PRECISION, BLOCK_K,
    )  # fmt: skip
    if HAS_ALPHA:
        dh *= tl.load(alpha_ptr).to(ACC)
    for part in tl.static_range(PARTS):
        offs_n = part * (BLOCK_N // PARTS) + tl.arange(0, BLOCK_N // PARTS)
        mask_n = offs_n < P - first_n
        mask = mask_m[:, None] & mask_n[None, :]
        first_z, first_h = first_m * 2 * P + first_n, first_m * P + first_n
        offs_z = offs_m[:, None] * (2 * P) + offs_n[None, :]
        offs_h = offs_m[:, None] * P + offs_n[None, :]
        dgate, dvalue = _gate_gradients(
            _columns(dh, part, PARTS), z_ptr + first_z + offs_z, dz_ptr + first_z + offs_z, h_ptr + first_h + offs_h,
            P, mask, GATE, SAVE_H, ACTIVATION, ACC,
        )  # fmt: skip
        if SUM_DZ:
            sums_ptrs = sums_ptr + pid_m * 2 * P + first_n + offs_n
            tl.store(sums_ptrs + GATE * P, tl.sum(dgate, axis=0), mask=mask_n)
            tl.store(sums_ptrs + (1 - GATE) * P, tl.sum(dvalue, axis=0), mask=mask_n)


@triton.jit
def _gate_gradients(
    dh,
    z_ptrs,
    dz_ptrs,
    h_ptrs,
    P,
    mask,
    GATE: tl.constexpr,
    SAVE_H: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACC: tl.constexpr,
):
    """Store a tile of dz and, with SAVE_H, of h; return the gradients of gate and value, zero outside the mask."""
    gate = tl.load(z_ptrs + GATE * P, mask=mask, other=0.0).to(ACC)
    value = tl.load(z_ptrs + (1 - GATE) * P, mask=mask, other=0.0).to(ACC)
    act = _tile.activate(gate, ACTIVATION)
    dgate = dh * value * _tile.activate_grad(gate, ACTIVATION)
    dvalue = dh * act
    tl.store(dz_ptrs + GATE * P, dgate.to(dz_ptrs.dtype.element_ty), mask=mask)
    tl.store(dz_ptrs + (1 - GATE) * P, dvalue.to(dz_ptrs.dtype.element_ty), mask=mask)
    if SAVE_H:
        tl.store(h_ptrs, (act * value).to(h_ptrs.dtype.element_ty), mask=mask)
    return dgate, dvalue


def glu_backward(
    dy: Tensor,
    w3: Tensor | None,
    gamma: Tensor | None,
    z: Tensor,
    activation: str | None,
    gate_last: bool,
    save_h: bool,
    sum_dz: bool,
    sum_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the backward; return ``(dz, h, Σ dz)``; h (..., P) and Σ dz (2, P) are empty unless wanted.

    Σ dz has ``sum_dtype``, or fp32 (fp64).

    Args:
        dy: Gradient of h, (..., P), or, with w3, of ``γ · h w3ᵀ``, (..., K).
        w3, gamma: (K, P) and (K,).
        z: (..., 2, P), contiguous.
    """
    M, P = z.shape[:-2].numel(), z.shape[-1]
    dy = dy.reshape(M, dy.shape[-1]).to(z.dtype)
    facts = runtime.device_facts(z.device)
    config = None
    if w3 is not None:
        weight, alpha = fold_layer_scale(w3, gamma)
        config = choose_config(M, P, dy.shape[1], z.dtype, kind="backward", facts=facts)
        if config.provider == "torch":
            dy, config = product(dy, weight, alpha=alpha)[0], None
    dz = torch.empty_like(z)
    h = torch.empty((*z.shape[:-2], P) if save_h else (0,), dtype=z.dtype, device=z.device)
    block_m, block_n = tile(P, z.dtype) if config is None else (config.block_m, config.block_n)
    blocks_n = cdiv(P, block_n)
    programs_m = cdiv(M, block_m)
    if config is None:
        # About four programs per SM in all, so that the number of partial sums does not grow with M.
        programs_m = max(1, min(programs_m, 4 * facts.num_sms // blocks_n))
    wide = wide_dtype(z.dtype)
    shares, (parts,) = new_shares([sum_dz], programs_m if M else 0, 2 * P, wide, z.device)
    options = {
        "GATE": int(gate_last),
        "SAVE_H": save_h,
        "SUM_DZ": sum_dz,
        "ACTIVATION": activation or "none",
        "ACC": _tile.accumulator(z.dtype),
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
    }
    if M > 0 and config is None:
        dy = dy if dy.stride(1) == 1 else dy.contiguous()
        _glu_bwd_kernel[(programs_m * blocks_n,)](
            dh_ptr=dy,
            z_ptr=z,
            dz_ptr=dz,
            h_ptr=h,
            sums_ptr=parts,
            stride_dh_row=dy.stride(0),
            programs_m=programs_m,
            M=M,
            P=P,
            num_warps=4,
            **options,
        )
    elif M > 0:
        dy, weight = within_reach(dy), within_reach(weight)
        _glu_product_bwd_kernel[(programs_m * blocks_n,)](
            dy_ptr=dy,
            weight_ptr=weight,
            alpha_ptr=dy if alpha is None else alpha,
            z_ptr=z,
            dz_ptr=dz,
            h_ptr=h,
            sums_ptr=parts,
            stride_dy_row=dy.stride(0),
            stride_dy_col=dy.stride(1),
            stride_weight_row=weight.stride(0),
            stride_weight_col=weight.stride(1),
            M=M,
            P=P,
            K=dy.shape[1],
            HAS_ALPHA=alpha is not None,
            EVEN_K=dy.shape[1] % config.block_k == 0,
            PRECISION=runtime.dot_precision(z.device),
            PARTS=config.parts,
            BLOCK_K=config.block_k,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            **options,
        )
    (sums,) = sum_shares(shares, [sum_dz], [sum_dtype or wide])
    return dz, h, sums.view(2, P) if sum_dz else sums
