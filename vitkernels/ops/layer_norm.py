"""LayerNorm over the last dim, and residual + LayerScale + DropPath + LayerNorm in one pass.

Forward (arXiv 1607.06450):       x̂ = (x − mean) · rstd,  y = x̂ · weight + bias,  rstd = 1 / √(var + eps)
Backward, with g = dy · weight:   dx = rstd · (g − mean(g) − x̂ · mean(g · x̂)),  dweight = Σ dy · x̂,  dbias = Σ dy
add_layer_norm (LayerScale arXiv 2103.17239, DropPath arXiv 1603.09382), with row m of sample b:
                                  r = residual + s[b] · γ · x,  y = layer_norm(r)
                                  dr = d(new_residual) + layer_norm_backward(dy),  dresidual = dr
                                  dx = s[b] · γ · dr,  dγ = Σ s[b] · x · dr

Shapes: rows M (all leading dims), channels C. Saved for backward: the normalised input (x or r), mean and rstd,
and x where γ needs a gradient. Statistics and sums are fp32 (fp64 for fp64 inputs) whatever the dtype of x.
The backward is persistent over rows: at most 2 programs an SM, each sums its rows' share of the parameter
gradients into one row of a (programs, C) buffer, so that the buffer does not grow with M and nothing is atomic.
Tiles of both kernels are (BLOCK_M rows, BLOCK_C channels); a lane outside the mask holds zero.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vitkernels import reference, runtime, tuning
from vitkernels.ops import _tile
from vitkernels.ops._checks import check_like, check_shape, check_tensor
from vitkernels.ops._registry import needs_grad, reference_gradients, register, uses_kernels
from vitkernels.ops._triton import tl, triton
from vitkernels.runtime import DeviceFacts, as_rows, cdiv, dense_or, promoted_dtype, wide_dtype

MAX_WHOLE_ROW = 8192  # channels that one program holds at once; wider rows pass by in chunks, read several times


@dataclasses.dataclass(frozen=True)
class LayerNormConfig:
    """Rows a tile, channels a chunk, warps a program, and programs a launch of the backward."""

    block_m: int
    block_c: int
    num_warps: int
    programs: int


def choose_config(M: int, C: int, facts: DeviceFacts) -> LayerNormConfig:
    """Choose a configuration for M rows of C channels: the tuning table's, else a heuristic."""
    block_c = min(runtime.next_power_of_2(C), MAX_WHOLE_ROW)
    # The interpreter pays for each program, whatever its size.
    block_m = max(1, min(8, 1024 // block_c) if facts.arch != "interpreter" else min(64, (1 << 16) // block_c))
    config = {
        "block_m": block_m,
        "block_c": block_c,
        "num_warps": max(1, min(16, block_m * block_c // 256)),
        "programs": 2 * facts.num_sms,
    }
    config |= tuning.lookup("layer_norm", facts.name, f"C={C}") or {}
    return LayerNormConfig(**{**config, "programs": max(1, min(config["programs"], cdiv(M, config["block_m"])))})


@triton.jit
def _layer_norm_fwd_kernel(
    x_ptr,  # (M, C)
    residual_ptr,  # (M, C), with HAS_RESIDUAL
    weight_ptr,  # (C,)
    bias_ptr,  # (C,)
    gamma_ptr,  # (C,), LayerScale
    path_ptr,  # (B,), DropPath
    y_ptr,  # (M, C), contiguous
    r_ptr,  # (M, C), contiguous, with HAS_RESIDUAL
    mean_ptr,  # (M,)
    rstd_ptr,  # (M,)
    stride_x_row,
    stride_residual_row,
    M,
    C,
    rows_per_sample,
    eps: tl.constexpr,  # an argument would be fp32, also in fp64
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_GAMMA: tl.constexpr,
    HAS_PATH: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WHOLE_ROW: tl.constexpr,
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    x_rows = x_ptr + offs_m[:, None] * stride_x_row
    residual_rows = residual_ptr + offs_m[:, None] * stride_residual_row
    path = tl.full((BLOCK_M,), 1.0, ACC)
    if HAS_PATH:
        path = tl.load(path_ptr + offs_m // rows_per_sample, mask=mask_m, other=0.0).to(ACC)

    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    mask = mask_m[:, None] & mask_c[None, :]
    r = _load_sum(x_rows, residual_rows, gamma_ptr, path, r_ptr, offs_c, mask, HAS_RESIDUAL, HAS_GAMMA, ACC)
    total = tl.sum(r, axis=1)
    if not WHOLE_ROW:
        for start in range(BLOCK_C, C, BLOCK_C):
            offs_c = start + tl.arange(0, BLOCK_C)
            mask = mask_m[:, None] & (offs_c < C)[None, :]
            r = _load_sum(x_rows, residual_rows, gamma_ptr, path, r_ptr, offs_c, mask, HAS_RESIDUAL, HAS_GAMMA, ACC)
            total += tl.sum(r, axis=1)
    mean = total / C

    if WHOLE_ROW:
        centred = tl.where(mask, r - mean[:, None], 0.0)
        square = tl.sum(centred * centred, axis=1)
    else:
        square = tl.zeros((BLOCK_M,), ACC)
        for start in range(0, C, BLOCK_C):
            offs_c = start + tl.arange(0, BLOCK_C)
            mask = mask_m[:, None] & (offs_c < C)[None, :]
            r = _load_sum(x_rows, residual_rows, gamma_ptr, path, r_ptr, offs_c, mask, HAS_RESIDUAL, HAS_GAMMA, ACC)
            centred = tl.where(mask, r - mean[:, None], 0.0)
            square += tl.sum(centred * centred, axis=1)
    rstd = 1.0 / tl.sqrt(square / C + eps)
    tl.store(mean_ptr + offs_m, mean, mask=mask_m)
    tl.store(rstd_ptr + offs_m, rstd, mask=mask_m)

    for start in range(0, 1 if WHOLE_ROW else C, BLOCK_C):
        if not WHOLE_ROW:
            offs_c = start + tl.arange(0, BLOCK_C)
            mask_c = offs_c < C
            mask = mask_m[:, None] & mask_c[None, :]
            r = _load_sum(x_rows, residual_rows, gamma_ptr, path, r_ptr, offs_c, mask, HAS_RESIDUAL, HAS_GAMMA, ACC)
        offs_out = offs_m[:, None] * C + offs_c[None, :]
        if HAS_RESIDUAL:
            tl.store(r_ptr + offs_out, _tile.cast(r, r_ptr.dtype.element_ty), mask=mask)
        y = (r - mean[:, None]) * rstd[:, None]
        if HAS_WEIGHT:
            y *= tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0).to(ACC)[None, :]
        if HAS_BIAS:
            y += tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(ACC)[None, :]
        tl.store(y_ptr + offs_out, _tile.cast(y, y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_sum(
    x_rows,
    residual_rows,
    gamma_ptr,
    path,
    r_ptr,
    offs_c,
    mask,
    HAS_RESIDUAL: tl.constexpr,
    HAS_GAMMA: tl.constexpr,
    ACC: tl.constexpr,
):
    """A tile of x, or of residual + path · gamma · x as it will be stored."""
    x = tl.load(x_rows + offs_c[None, :], mask=mask, other=0.0).to(ACC)
    if HAS_RESIDUAL:
        x *= path[:, None]
        if HAS_GAMMA:
            x *= tl.load(gamma_ptr + offs_c[None, :], mask=mask, other=0.0).to(ACC)
        x += tl.load(residual_rows + offs_c[None, :], mask=mask, other=0.0).to(ACC)
        # The statistics are those of the rounded sum, which is all that the backward will see.
        x = _tile.cast(x, r_ptr.dtype.element_ty).to(ACC)
    return x


@triton.jit
def _layer_norm_bwd_kernel(
    dy_ptr,  # (M, C)
    dr_ptr,  # (M, C), upstream gradient of the sum, with HAS_DR
    r_ptr,  # (M, C), what was normalised
    weight_ptr,  # (C,)
    mean_ptr,  # (M,)
    rstd_ptr,  # (M,)
    x_ptr,  # (M, C), the branch, with NEEDS_DGAMMA
    gamma_ptr,  # (C,)
    path_ptr,  # (B,)
    dresidual_ptr,  # (M, C), contiguous
    dx_ptr,  # (M, C), contiguous, with NEEDS_DX
    dweight_ptr,  # (programs, C), this and the next two: each program's share
    dbias_ptr,  # (programs, C)
    dgamma_ptr,  # (programs, C)
    dr_sum_ptr,  # (programs, C), of dr
    dresidual_sum_ptr,  # (programs, C), of dresidual
    stride_dy_row,
    stride_dr_row,
    stride_r_row,
    stride_x_row,
    M,
    C,
    rows_per_sample,
    HAS_DR: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_GAMMA: tl.constexpr,
    HAS_PATH: tl.constexpr,
    NEEDS_DRESIDUAL: tl.constexpr,
    NEEDS_DX: tl.constexpr,
    NEEDS_DWEIGHT: tl.constexpr,
    NEEDS_DBIAS: tl.constexpr,
    NEEDS_DGAMMA: tl.constexpr,
    NEEDS_DR_SUM: tl.constexpr,
    NEEDS_DRESIDUAL_SUM: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WHOLE_ROW: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0)
    # A row wider than BLOCK_C does not fit: its chunks are walked outermost, and both row means taken anew for
    # each chunk, so that a program still sums each parameter gradient in registers.
    for first_c in range(0, 1 if WHOLE_ROW else C, BLOCK_C):
        offs_c = first_c + tl.arange(0, BLOCK_C)
        mask_c = offs_c < C
        weight = tl.full((BLOCK_C,), 1.0, ACC)
        if HAS_WEIGHT:
            weight = tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0).to(ACC)
        gamma = tl.full((BLOCK_C,), 1.0, ACC)
        if HAS_GAMMA:
            gamma = tl.load(gamma_ptr + offs_c, mask=mask_c, other=0.0).to(ACC)
        dweight = tl.zeros((BLOCK_C,), ACC)
        dbias = tl.zeros((BLOCK_C,), ACC)
        dgamma = tl.zeros((BLOCK_C,), ACC)
        dr_sum = tl.zeros((BLOCK_C,), ACC)
        dresidual_sum = tl.zeros((BLOCK_C,), ACC)

        for first_m in range(pid * BLOCK_M, M, programs * BLOCK_M):
            offs_m = first_m + tl.arange(0, BLOCK_M).to(tl.int64)
            mask_m = offs_m < M
            mask = mask_m[:, None] & mask_c[None, :]
            mean = tl.load(mean_ptr + offs_m, mask=mask_m, other=0.0)
            rstd = tl.load(rstd_ptr + offs_m, mask=mask_m, other=0.0)
            dy_rows = dy_ptr + offs_m[:, None] * stride_dy_row
            r_rows = r_ptr + offs_m[:, None] * stride_r_row

            dy = tl.load(dy_rows + offs_c[None, :], mask=mask, other=0.0).to(ACC)
            r = tl.load(r_rows + offs_c[None, :], mask=mask, other=0.0).to(ACC)
            x_hat = tl.where(mask, (r - mean[:, None]) * rstd[:, None], 0.0)
            g = dy * weight[None, :]
            dbias += _tile.sum_rows(dy)
            dweight += _tile.sum_rows(dy * x_hat)

            if NEEDS_DRESIDUAL or NEEDS_DX or NEEDS_DGAMMA or NEEDS_DR_SUM or NEEDS_DRESIDUAL_SUM:
                if WHOLE_ROW:
                    g_mean = tl.sum(g, axis=1) / C
                    gx_mean = tl.sum(g * x_hat, axis=1) / C
                else:
                    g_mean, gx_mean = _row_means(
                        dy_rows, r_rows, weight_ptr, mean, rstd, mask_m, C, HAS_WEIGHT, ACC, BLOCK_M, BLOCK_C
                    )
                dr = rstd[:, None] * (g - g_mean[:, None] - x_hat * gx_mean[:, None])
                if HAS_DR:
                    dr_rows = dr_ptr + offs_m[:, None] * stride_dr_row
                    upstream = tl.load(dr_rows + offs_c[None, :], mask=mask, other=0.0).to(ACC)
                    dr += upstream
                    if NEEDS_DR_SUM:
                        dr_sum += _tile.sum_rows(upstream)
                if NEEDS_DRESIDUAL_SUM:
                    dresidual_sum += _tile.sum_rows(tl.where(mask, dr, 0.0))
                offs_out = offs_m[:, None] * C + offs_c[None, :]
                if NEEDS_DRESIDUAL:
                    tl.store(dresidual_ptr + offs_out, _tile.cast(dr, dresidual_ptr.dtype.element_ty), mask=mask)
                if HAS_PATH:
                    path = tl.load(path_ptr + offs_m // rows_per_sample, mask=mask_m, other=0.0).to(ACC)
                    dr *= path[:, None]
                if NEEDS_DX:
                    dx = dr * gamma[None, :]
                    tl.store(dx_ptr + offs_out, _tile.cast(dx, dx_ptr.dtype.element_ty), mask=mask)
                if NEEDS_DGAMMA:
                    x_rows = x_ptr + offs_m[:, None] * stride_x_row
                    x = tl.load(x_rows + offs_c[None, :], mask=mask, other=0.0).to(ACC)
                    dgamma += _tile.sum_rows(tl.where(mask, dr * x, 0.0))

        if NEEDS_DWEIGHT:
            tl.store(dweight_ptr + pid * C + offs_c, dweight, mask=mask_c)
        if NEEDS_DBIAS:
            tl.store(dbias_ptr + pid * C + offs_c, dbias, mask=mask_c)
        if NEEDS_DGAMMA:
            tl.store(dgamma_ptr + pid * C + offs_c, dgamma, mask=mask_c)
        if NEEDS_DR_SUM:
            tl.store(dr_sum_ptr + pid * C + offs_c, dr_sum, mask=mask_c)
        if NEEDS_DRESIDUAL_SUM:
            tl.store(dresidual_sum_ptr + pid * C + offs_c, dresidual_sum, mask=mask_c)


@triton.jit
def _row_means(
    dy_rows,
    r_rows,
    weight_ptr,
    mean,
    rstd,
    mask_m,
    C,
    HAS_WEIGHT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """mean(g) and mean(g · x̂) of BLOCK_M rows wider than BLOCK_C."""
    g_total = tl.zeros((BLOCK_M,), ACC)
    gx_total = tl.zeros((BLOCK_M,), ACC)
    for start in range(0, C, BLOCK_C):
        offs_c = start + tl.arange(0, BLOCK_C)
        mask_c = offs_c < C
        mask = mask_m[:, None] & mask_c[None, :]
        g = tl.load(dy_rows + offs_c[None, :], mask=mask, other=0.0).to(ACC)
        if HAS_WEIGHT:
            g *= tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0).to(ACC)[None, :]
        r = tl.load(r_rows + offs_c[None, :], mask=mask, other=0.0).to(ACC)
        g_total += tl.sum(g, axis=1)
        gx_total += tl.sum(tl.where(mask, g * (r - mean[:, None]) * rstd[:, None], 0.0), axis=1)
    return g_total / C, gx_total / C


def layer_norm_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    gamma: Tensor | None,
    path: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the forward: ``(normed, sum, mean, rstd)``, the sum empty without a residual."""
    y, r, mean, rstd = _forward_outputs(x, residual, weight, bias, gamma, path, eps, out_dtype)
    if x.numel() == 0:
        return y, r, mean, rstd
    rows = as_rows(x)
    M, C = rows.shape
    residual_rows = rows if residual is None else as_rows(residual)
    config = choose_config(M, C, runtime.device_facts(x.device))
    _layer_norm_fwd_kernel[(cdiv(M, config.block_m),)](
        x_ptr=rows,
        residual_ptr=residual_rows,
        weight_ptr=dense_or(weight, rows),
        bias_ptr=dense_or(bias, rows),
        gamma_ptr=dense_or(gamma, rows),
        path_ptr=dense_or(path, rows),
        y_ptr=y,
        r_ptr=r,
        mean_ptr=mean,
        rstd_ptr=rstd,
        stride_x_row=rows.stride(0),
        stride_residual_row=residual_rows.stride(0),
        M=M,
        C=C,
        rows_per_sample=1 if path is None else M // x.shape[0],
        eps=eps,
        HAS_RESIDUAL=residual is not None,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        HAS_GAMMA=gamma is not None,
        HAS_PATH=path is not None,
        ACC=_tile.accumulator(mean.dtype),
        BLOCK_M=config.block_m,
        BLOCK_C=config.block_c,
        WHOLE_ROW=config.block_c >= C,
        num_warps=config.num_warps,
    )
    return y, r, mean, rstd


def layer_norm_backward(
    dy: Tensor,
    dr: Tensor | None,
    r: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    gamma: Tensor | None,
    path: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    eps: float,
    x_dtype: torch.dtype,
    needed: list[bool],
) -> tuple[Tensor, ...]:
    """Launch the backward: gradients of (x, residual, weight, bias, gamma), then sums over rows.

    The sums are those of dr, which must be given, and of the residual's gradient: the bias gradients of the linear
    layers around, at no pass of their own. What is not ``needed``, by position, is empty. Gradients of parameters
    and sums come in the statistics' dtype.
    """
    needs_dx, needs_dresidual, *needs_sums = needed
    C = r.shape[-1]
    rows, dy_rows = as_rows(r), as_rows(dy)
    dr_rows = rows if dr is None else as_rows(dr)
    x_rows = rows if x is None else as_rows(x)
    M = rows.shape[0]
    dx = torch.empty(r.shape if needs_dx else (0,), dtype=x_dtype, device=r.device)
    dresidual = torch.empty(r.shape if needs_dresidual else (0,), dtype=r.dtype, device=r.device)
    if M == 0:
        shares = [torch.zeros((1, C), dtype=mean.dtype, device=r.device) for _ in needs_sums]
    else:
        config = choose_config(M, C, runtime.device_facts(r.device))
        shares = [torch.empty((config.programs if n else 0, C), dtype=mean.dtype, device=r.device) for n in needs_sums]
        _layer_norm_bwd_kernel[(config.programs,)](
            dy_ptr=dy_rows,
            dr_ptr=dr_rows,
            r_ptr=rows,
            weight_ptr=dense_or(weight, rows),
            mean_ptr=mean,
            rstd_ptr=rstd,
            x_ptr=x_rows,
            gamma_ptr=dense_or(gamma, rows),
            path_ptr=dense_or(path, rows),
            dresidual_ptr=dresidual,
            dx_ptr=dx,
            dweight_ptr=shares[0],
            dbias_ptr=shares[1],
            dgamma_ptr=shares[2],
            dr_sum_ptr=shares[3],
            dresidual_sum_ptr=shares[4],
            stride_dy_row=dy_rows.stride(0),
            stride_dr_row=dr_rows.stride(0),
            stride_r_row=rows.stride(0),
            stride_x_row=x_rows.stride(0),
            M=M,
            C=C,
            rows_per_sample=1 if path is None else M // r.shape[0],
            HAS_DR=dr is not None,
            HAS_WEIGHT=weight is not None,
            HAS_GAMMA=gamma is not None,
            HAS_PATH=path is not None,
            NEEDS_DRESIDUAL=needs_dresidual,
            NEEDS_DX=needs_dx,
            NEEDS_DWEIGHT=needs_sums[0],
            NEEDS_DBIAS=needs_sums[1],
            NEEDS_DGAMMA=needs_sums[2],
            NEEDS_DR_SUM=needs_sums[3],
            NEEDS_DRESIDUAL_SUM=needs_sums[4],
            ACC=_tile.accumulator(r.dtype),
            BLOCK_M=config.block_m,
            BLOCK_C=config.block_c,
            WHOLE_ROW=config.block_c >= C,
            # It holds several tiles at once, where the forward holds one.
            num_warps=min(16, 2 * config.num_warps),
        )
    sums = (share.sum(0) if n else mean.new_empty(0) for share, n in zip(shares, needs_sums, strict=True))
    return dx, dresidual, *sums


def _forward_outputs(x, residual, weight, bias, gamma, path, eps, out_dtype):
    y = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    sum_dtype = promoted_dtype(x, residual, gamma, path)
    r = torch.empty((0,) if residual is None else x.shape, dtype=sum_dtype, device=x.device)
    mean = torch.empty(x.shape[:-1].numel(), dtype=wide_dtype(sum_dtype), device=x.device)
    return y, r, mean, torch.empty_like(mean)


def _reference_forward(x, residual, weight, bias, gamma, path, eps, out_dtype):
    r = x
    if residual is not None:
        r = reference.add_layer_norm(x, residual, layer_scale=gamma, drop_path_scale=path)[1]
    statistics = wide_dtype(r.dtype)
    rows = r.reshape(-1, r.shape[-1]).to(statistics)
    rstd = (rows.var(-1, correction=0) + eps).rsqrt()
    y = reference.layer_norm(r.to(out_dtype), *_cast(out_dtype, weight, bias), eps).contiguous()
    return y, x.new_empty(0) if residual is None else r.contiguous(), rows.mean(-1), rstd


def _reference_backward(dy, dr, r, x, weight, gamma, path, mean, rstd, eps, x_dtype, needed):
    statistics = mean.dtype
    wide_r, wide_dy, wide_weight = _cast(statistics, r, dy, weight)
    bias = torch.zeros(r.shape[-1], dtype=statistics, device=r.device)
    d_sum, dweight, dbias = reference_gradients(
        lambda r, w, b: reference.layer_norm(r, w, b, eps), (wide_r, wide_weight, bias), (wide_dy,),
        (True, needed[2], needed[3]),
    )  # fmt: skip
    rows = tuple(range(r.ndim - 1))
    dr_sum = dr.sum(rows, dtype=statistics) if needed[5] else d_sum.new_empty(0)
    if dr is not None:
        d_sum = d_sum + dr
    branch = d_sum if path is None else d_sum * path.reshape(-1, *[1] * (r.ndim - 1))
    dgamma = (branch * x).sum(rows) if needed[4] else d_sum.new_empty(0)
    dx = (branch if gamma is None else branch * gamma).to(x_dtype, copy=True)
    return (
        dx if needed[0] else dx.new_empty(0),
        d_sum.to(r.dtype, copy=True) if needed[1] else r.new_empty(0),
        dweight,
        dbias,
        dgamma.to(statistics),
        dr_sum,
        d_sum.sum(rows) if needed[6] else d_sum.new_empty(0),
    )


def _fake_backward(dy, dr, r, x, weight, gamma, path, mean, rstd, eps, x_dtype, needed):
    def empty(shape, dtype, n):
        return torch.empty(shape if n else (0,), dtype=dtype, device=r.device)

    parameters = [empty(r.shape[-1:], mean.dtype, n) for n in needed[2:]]
    return empty(r.shape, x_dtype, needed[0]), empty(r.shape, r.dtype, needed[1]), *parameters


def _cast(dtype: torch.dtype, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.to(dtype) for t in tensors]


layer_norm_fwd = register(
    "layer_norm_fwd(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? gamma, Tensor? path, float eps, "
    "ScalarType out_dtype) -> (Tensor, Tensor, Tensor, Tensor)",
    launcher=layer_norm_forward,
    reference=_reference_forward,
    fake=_forward_outputs,
)
layer_norm_bwd = register(
    "layer_norm_bwd(Tensor dy, Tensor? dr, Tensor r, Tensor? x, Tensor? weight, Tensor? gamma, Tensor? path, "
    "Tensor mean, Tensor rstd, float eps, ScalarType x_dtype, bool[] needed) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    launcher=layer_norm_backward,
    reference=_reference_backward,
    fake=_fake_backward,
)


class LayerNormFunction(torch.autograd.Function):
    """Autograd for both public functions; ``residual=None`` is plain LayerNorm."""

    @staticmethod
    def forward(ctx, x, residual, weight, bias, gamma, path, eps, out_dtype):
        y, r, mean, rstd = layer_norm_fwd(x, residual, weight, bias, gamma, path, eps, out_dtype)
        plain = residual is None
        branch = x if gamma is not None and ctx.needs_input_grad[4] else None
        ctx.save_for_backward(x if plain else r, branch, weight, gamma, path, mean, rstd)
        ctx.eps, ctx.x_dtype, ctx.plain = eps, x.dtype, plain
        ctx.parameter_dtypes = [None if p is None else p.dtype for p in (weight, bias, gamma)]
        ctx.residual_dtype = None if plain else residual.dtype
        ctx.set_materialize_grads(False)
        return y if plain else (y, r)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dr=None):
        r, x, weight, gamma, path, mean, rstd = ctx.saved_tensors
        needs_x, needs_residual, *needs_parameters = ctx.needs_input_grad[:5]
        if dy is None:
            dy = torch.zeros_like(r)
        if ctx.plain:
            needed = [False, needs_x]
        else:
            # Without LayerScale and DropPath both gradients are the same tensor.
            shared = gamma is None and path is None and ctx.x_dtype == r.dtype
            needed = [needs_x and not shared, needs_residual or (needs_x and shared)]
        needed += [*needs_parameters, False, False]
        dx, dresidual, *parameters = layer_norm_bwd(
            dy, dr, r, x, weight, gamma, path, mean, rstd, ctx.eps, ctx.x_dtype, needed
        )
        grads = [
            g.to(dtype) if n else None
            for g, dtype, n in zip(parameters[:3], ctx.parameter_dtypes, needs_parameters, strict=True)
        ]
        if ctx.plain:
            dx, dresidual = dresidual, None
        else:
            dx = dresidual if shared else dx
            dresidual = dresidual.to(ctx.residual_dtype) if needs_residual else None
        return dx if needs_x else None, dresidual, *grads, None, None, None


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """Normalise ``x`` over its last dim: ``(x − mean) / √(var + eps) · weight + bias``.

    Args:
        x: (..., C), fp16, bf16, fp32 or fp64, any strides; leading dims may be empty.
        weight: (C,), ``x``'s dtype or fp32, or None for ones.
        bias: (C,), ``x``'s dtype or fp32, or None for zeros.
        eps: Added to the variance, ≥ 0.

    Returns:
        (..., C), contiguous, in ``x``'s dtype; under CUDA autocast in fp32, as PyTorch's does.

    Raises:
        ValueError: A shape or device does not fit, C is 0, or eps is negative or NaN.
        TypeError: A dtype does not fit.
        NotImplementedError: A tensor is nested, sparse or quantized.

    Reference: arXiv 1607.06450.
    """
    check_layer_norm("layer_norm", x, weight, bias, eps)
    if not uses_kernels(x):
        return reference.layer_norm(x, *_as_torch_wants(x.dtype, weight, bias), eps)
    if needs_grad(x, weight, bias):
        return LayerNormFunction.apply(x, None, weight, bias, None, None, eps, _normed_dtype(x))
    return layer_norm_fwd(x, None, weight, bias, None, None, eps, _normed_dtype(x))[0]


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    layer_scale: Tensor | None = None,
    drop_path_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Add a branch to the residual stream and normalise the sum, in one pass.

    ``r = residual + drop_path_scale[b] · layer_scale · x``, then LayerNorm over the last dim.

    Args:
        x: (B, ..., C), the branch's output; dtypes and strides as for :func:`layer_norm`.
        residual: Of ``x``'s shape, in its dtype or a wider one.
        weight, bias, eps: As for :func:`layer_norm`.
        layer_scale: γ of LayerScale, (C,), or None for ones.
        drop_path_scale: (B,), each sample's 0 or 1/keep of DropPath, or None for ones. A drawn constant: it must
            not require a gradient.

    Returns:
        ``(normed, new_residual)``, both of ``x``'s shape and contiguous; the sum in the widest dtype of its terms and
        scales, the normed in the sum's (fp32 under CUDA autocast).

    Raises:
        ValueError, TypeError: As for :func:`layer_norm`.
        NotImplementedError: ``drop_path_scale`` requires a gradient, or as for :func:`layer_norm`.

    Reference: arXiv 2103.17239 (LayerScale), 1603.09382 (DropPath).
    """
    op = "add_layer_norm"
    check_tensor(op, "x", x)
    check_like(op, "residual", residual, "x", x, dtype=False)
    check_shape(op, "residual", residual, x.shape, "x's shape")
    check_layer_norm(op, residual if residual.dtype.itemsize >= x.dtype.itemsize else x, weight, bias, eps)
    if layer_scale is not None:
        _check_parameter(op, "layer_scale", layer_scale, residual)
    if drop_path_scale is not None:
        check_like(op, "drop_path_scale", drop_path_scale, "x", x, dtype=False)
        if x.ndim < 2:
            raise ValueError(f"{op}: x has shape {tuple(x.shape)}; drop_path_scale needs (batch, ..., channels)")
        check_shape(op, "drop_path_scale", drop_path_scale, x.shape[:1], "one scale a sample of x")
        if drop_path_scale.requires_grad:
            raise NotImplementedError(f"{op}: drop_path_scale requires a gradient; it is a drawn constant: detach it")
    sum_dtype = promoted_dtype(x, residual, layer_scale, drop_path_scale)
    if not uses_kernels(x):
        outputs = reference.add_layer_norm(
            x,
            residual,
            *_as_torch_wants(sum_dtype, weight, bias),
            eps,
            layer_scale=layer_scale,
            drop_path_scale=drop_path_scale,
        )
        return outputs[0].contiguous(), outputs[1].contiguous()
    out_dtype = torch.promote_types(sum_dtype, torch.float32) if autocasts(x) else sum_dtype
    if needs_grad(x, residual, weight, bias, layer_scale):
        return LayerNormFunction.apply(x, residual, weight, bias, layer_scale, drop_path_scale, eps, out_dtype)
    return layer_norm_fwd(x, residual, weight, bias, layer_scale, drop_path_scale, eps, out_dtype)[:2]


def autocasts(x: Tensor) -> bool:
    """Tell whether autocast makes PyTorch's LayerNorm run in fp32 on ``x``'s device: on a GPU, not on a CPU."""
    return x.device.type != "cpu" and runtime.autocast_dtype(x) is not None


def _normed_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32) if autocasts(x) else x.dtype


def _as_torch_wants(dtype: torch.dtype, *parameters: Tensor | None) -> list[Tensor | None]:
    # On a GPU PyTorch's LayerNorm takes no half inputs with fp32 parameters; under autocast it casts by itself.
    autocast = any(p is not None and autocasts(p) for p in parameters)
    return list(parameters) if autocast else _cast(dtype, *parameters)


def check_layer_norm(op: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
    """Require floating-point rows, parameters of their width and a usable eps."""
    check_tensor(op, "x", x)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}; expected at least one channel in the last dim")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            _check_parameter(op, name, parameter, x)
    if not eps >= 0:
        raise ValueError(f"{op}: eps is {eps}; expected a number ≥ 0")


def _check_parameter(op: str, name: str, parameter: Tensor, x: Tensor) -> None:
    check_like(op, name, parameter, "x", x, dtype=False)
    mixed = x.dtype.itemsize == 2 and parameter.dtype == torch.float32
    if parameter.dtype != x.dtype and not mixed and not autocasts(x):
        wanted = f"{x.dtype} or torch.float32" if x.dtype.itemsize == 2 else f"{x.dtype}"
        raise TypeError(f"{op}: {name} has dtype {parameter.dtype}, x has {x.dtype}; expected {wanted}")
    check_shape(op, name, parameter, x.shape[-1:], "the last dim of x")
