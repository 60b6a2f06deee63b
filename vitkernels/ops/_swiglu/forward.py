"""Forward of the gated product: both halves and the gate in one kernel, or cuBLAS followed by a gate kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from vitkernels import runtime
from vitkernels.ops import _tile
from vitkernels.ops._product import _columns, _tile_of_program, within_reach
from vitkernels.ops._swiglu.config import choose_config, padded
from vitkernels.ops._triton import tl, triton
from vitkernels.runtime import cdiv, dense_or, next_power_of_2, unit_stride


@triton.jit(do_not_specialize=["M"])
def _glu_product_kernel(
    x_ptr,  # (M, K)
    gate_weight_ptr,  # (F, K)
    value_weight_ptr,  # (F, K)
    gate_bias_ptr,  # (F,)
    value_bias_ptr,  # (F,)
    z_ptr,  # (M, 2, P), contiguous: pre-activations (half GATE is the gate), with SAVE_Z
    h_ptr,  # (M, P), contiguous: act(gate) · value
    stride_x_row,
    stride_gate_row,
    stride_value_row,
    M,
    F,
    P,
    K,
    GATE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SAVE_Z: tl.constexpr,
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
    offs_m, offs_n, offs_k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    mask_m, mask_n = offs_m < M - first_m, offs_n < F - first_n
    x_ptrs = x_ptr + first_m * stride_x_row + offs_m[:, None] * stride_x_row + offs_k[None, :]
    gate_ptrs = gate_weight_ptr + first_n * stride_gate_row + offs_n[None, :] * stride_gate_row + offs_k[:, None]
    value_ptrs = value_weight_ptr + first_n * stride_value_row + offs_n[None, :] * stride_value_row + offs_k[:, None]
    gate = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    value = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs, mask=mask_m[:, None], other=0.0)
            gate_weight = tl.load(gate_ptrs, mask=mask_n[None, :], other=0.0)
            value_weight = tl.load(value_ptrs, mask=mask_n[None, :], other=0.0)
        else:
            mask_k = offs_k < K - start
            x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
            gate_weight = tl.load(gate_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
            value_weight = tl.load(value_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        gate = _tile.dot(x, gate_weight, gate, PRECISION)
        value = _tile.dot(x, value_weight, value, PRECISION)
        x_ptrs += BLOCK_K
        gate_ptrs += BLOCK_K
        value_ptrs += BLOCK_K
    for part in tl.static_range(PARTS):
        g, v = _columns(gate, part, PARTS), _columns(value, part, PARTS)
        offs_n = part * (BLOCK_N // PARTS) + tl.arange(0, BLOCK_N // PARTS)
        if HAS_BIAS:
            mask_n = offs_n < F - first_n
            g += tl.load(gate_bias_ptr + first_n + offs_n, mask=mask_n, other=0.0).to(ACC)[None, :]
            v += tl.load(value_bias_ptr + first_n + offs_n, mask=mask_n, other=0.0).to(ACC)[None, :]
        mask = mask_m[:, None] & (offs_n < P - first_n)[None, :]
        if SAVE_Z:
            z_ptrs = z_ptr + first_m * 2 * P + first_n + offs_m[:, None] * (2 * P) + offs_n[None, :]
            tl.store(z_ptrs + GATE * P, g.to(z_ptr.dtype.element_ty), mask=mask)
            tl.store(z_ptrs + (1 - GATE) * P, v.to(z_ptr.dtype.element_ty), mask=mask)
        h = _tile.activate(g, ACTIVATION) * v
        h_ptrs = h_ptr + first_m * P + first_n + offs_m[:, None] * P + offs_n[None, :]
        tl.store(h_ptrs, h.to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def _glu_kernel(
    z_ptr,  # (M, 2, P), contiguous
    h_ptr,  # (M, P), contiguous
    M,
    P,
    GATE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    blocks_n = tl.cdiv(P, BLOCK_N)
    offs_m = pid // blocks_n * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (offs_m < M)[:, None] & (offs_n < P)[None, :]
    z_ptrs = z_ptr + offs_m[:, None] * (2 * P) + offs_n[None, :]
    gate = tl.load(z_ptrs + GATE * P, mask=mask, other=0.0).to(ACC)
    value = tl.load(z_ptrs + (1 - GATE) * P, mask=mask, other=0.0).to(ACC)
    h = _tile.activate(gate, ACTIVATION) * value
    tl.store(h_ptr + offs_m[:, None] * P + offs_n[None, :], h.to(h_ptr.dtype.element_ty), mask=mask)


def glu_forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    activation: str | None,
    gate_last: bool = False,
    save_z: bool = False,
) -> tuple[Tensor, Tensor]:
    """Launch the forward on (..., K); return ``(h, z)``, z empty unless saved. Columns from F on are zero in both.

    Args:
        w1, b1: Both halves, (2F, K) and (2F,); or, with w2 and b2, the first half, (F, K) and (F,).
    """
    M, K = x.shape[:-1].numel(), x.shape[-1]
    weights, biases = halves(w1, w2), (None, None) if b1 is None else halves(b1, b2)
    F = weights[0].shape[0]
    P = padded(F)
    rows = within_reach(unit_stride(x.reshape(M, K)))
    config = choose_config(M, F, K, x.dtype, kind="forward", facts=runtime.device_facts(x.device))
    if config.provider == "torch":
        z = torch.zeros((M, 2, P), dtype=x.dtype, device=x.device) if P > F else x.new_empty((M, 2, P))
        for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            half = z[:, i, :F]
            if bias is None:
                torch.mm(rows, weight.t(), out=half)
            else:
                torch.addmm(bias, rows, weight.t(), out=half)
        h = glu(z, activation, gate_last)
        z = z if save_z else x.new_empty(0)
    else:
        h = torch.empty((M, P), dtype=x.dtype, device=x.device)
        z = torch.empty((M, 2, P) if save_z else (0,), dtype=x.dtype, device=x.device)
        gate, value = (1, 0) if gate_last else (0, 1)
        weights = [within_reach(unit_stride(w)) for w in weights]
        if h.numel() > 0:
            _glu_product_kernel[(cdiv(M, config.block_m) * cdiv(P, config.block_n),)](
                x_ptr=rows,
                gate_weight_ptr=weights[gate],
                value_weight_ptr=weights[value],
                gate_bias_ptr=dense_or(biases[gate], rows),
                value_bias_ptr=dense_or(biases[value], rows),
                z_ptr=z,
                h_ptr=h,
                stride_x_row=rows.stride(0),
                stride_gate_row=weights[gate].stride(0),
                stride_value_row=weights[value].stride(0),
                M=M,
                F=F,
                P=P,
                K=K,
                GATE=gate,
                HAS_BIAS=b1 is not None,
                SAVE_Z=save_z,
                ACTIVATION=activation or "none",
                EVEN_K=K % config.block_k == 0,
                PRECISION=runtime.dot_precision(x.device),
                ACC=_tile.accumulator(x.dtype),
                PARTS=config.parts,
                BLOCK_M=config.block_m,
                BLOCK_N=config.block_n,
                BLOCK_K=config.block_k,
                num_warps=config.num_warps,
                num_stages=config.num_stages,
            )
    return h.view(*x.shape[:-1], P), z.view(*x.shape[:-1], 2, P) if save_z else z


def glu(z: Tensor, activation: str | None, gate_last: bool) -> Tensor:
    """Launch the gate kernel: ``act(gate) · value`` (..., P) from contiguous pre-activations (..., 2, P)."""
    M, P = z.shape[:-2].numel(), z.shape[-1]
    h = torch.empty((*z.shape[:-2], P), dtype=z.dtype, device=z.device)
    block_m, block_n = tile(P, z.dtype)
    if h.numel() > 0:
        _glu_kernel[(cdiv(M, block_m) * cdiv(P, block_n),)](
            z_ptr=z,
            h_ptr=h,
            M=M,
            P=P,
            GATE=int(gate_last),
            ACTIVATION=activation or "none",
            ACC=_tile.accumulator(z.dtype),
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            num_warps=4,
        )
    return h


def halves(both: Tensor, second: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the two halves of a packed tensor, or the two separate tensors."""
    return both.chunk(2) if second is None else (both, second)


def hidden_features(both: Tensor, second: Tensor | None) -> int:
    """Return the number of rows in a half."""
    return both.shape[0] // 2 if second is None else both.shape[0]


def tile(P: int, dtype: torch.dtype) -> tuple[int, int]:
    """Return the tile (rows, columns) of the elementwise kernels over P columns."""
    # 16 rows, or as many columns in fp64, would take twice the registers.
    return 8, min(256 if dtype.itemsize <= 4 else 64, next_power_of_2(P))
