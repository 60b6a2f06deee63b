"""Linear layer with a fused epilogue: bias, activation, LayerScale, residual.

Forward:     z = x Wᵀ + b,  y = residual + γ · act(z)
Backward:    dz = γ · dy · act'(z),  dx = dz W,  dW = dzᵀ x,  db = Σ dz,  dγ = Σ dy · act(z),  dresidual = dy
Without an activation, the backward of LayerScale needs no pass over the activations, by an exact identity
(_layer_scale.py). With W' = γ ∘ W and dW' = dyᵀ x:
             dx = dy W',  dW = γ ∘ dW',  dγⱼ = Σᵢ Wⱼᵢ dW'ⱼᵢ + bⱼ Σ dyⱼ

Shapes, as in a GEMM: rows M (all leading dims), N output features, K input features. Products accumulate in fp32
(fp64 for fp64). Saved for backward: x, W and, with an activation, z in x's dtype.
Sources: GELU arXiv 1606.08415, LayerScale arXiv 2103.17239.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vitkernels import reference, runtime
from vitkernels.ops import _tile
from vitkernels.ops._cast import cast
from vitkernels.ops._checks import check_like, check_shape, check_tensor, dtypes_and_devices_match
from vitkernels.ops._layer_scale import fold_layer_scale, layer_scale_backward
from vitkernels.ops._once import once_differentiable
from vitkernels.ops._product import product, within_reach
from vitkernels.ops._registry import needs_grad, reference_gradients, register, uses_kernels
from vitkernels.ops._sums import new_shares, sum_shares
from vitkernels.ops._triton import tl, triton
from vitkernels.runtime import cdiv, dense_or, next_power_of_2, promoted_dtype, unit_stride, wide_dtype


@triton.jit(do_not_specialize=["M", "programs_m"])
def _activation_bwd_kernel(
    dy_ptr,  # (M, N)
    z_ptr,  # (M, N), contiguous
    gamma_ptr,  # (N,)
    dz_ptr,  # (M, N), contiguous
    dbias_ptr,  # (programs of M, N): each program's partial sum
    dgamma_ptr,  # (programs of M, N): each program's partial sum
    stride_dy_row,
    stride_dy_col,
    programs_m,
    M,
    N,
    HAS_GAMMA: tl.constexpr,
    NEEDS_DBIAS: tl.constexpr,
    NEEDS_DGAMMA: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    pid_m = pid % programs_m
    offs_n = pid // programs_m * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    gamma = tl.full((BLOCK_N,), 1.0, ACC)
    if HAS_GAMMA:
        gamma = tl.load(gamma_ptr + offs_n, mask=mask_n, other=0.0).to(ACC)
    # Summed over the rows of a tile at the end only: each such sum passes shared memory, with bank conflicts.
    dbias = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    dgamma = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for first_m in range(pid_m * BLOCK_M, M, programs_m * BLOCK_M):
        offs_m = first_m + tl.arange(0, BLOCK_M).to(tl.int64)
        mask = (offs_m < M)[:, None] & mask_n[None, :]
        offs_z = offs_m[:, None] * N + offs_n[None, :]
        offs_dy = offs_m[:, None] * stride_dy_row + offs_n[None, :] * stride_dy_col
        dy = tl.load(dy_ptr + offs_dy, mask=mask, other=0.0).to(ACC)
        z = tl.load(z_ptr + offs_z, mask=mask, other=0.0).to(ACC)
        dz = dy * gamma[None, :] * _tile.activate_grad(z, ACTIVATION)
        tl.store(dz_ptr + offs_z, dz.to(dz_ptr.dtype.element_ty), mask=mask)
        dbias += dz
        if NEEDS_DGAMMA:
            dgamma += dy * _tile.activate(z, ACTIVATION)
    if NEEDS_DBIAS:
        tl.store(dbias_ptr + pid_m * N + offs_n, tl.sum(dbias, axis=0), mask=mask_n)
    if NEEDS_DGAMMA:
        tl.store(dgamma_ptr + pid_m * N + offs_n, tl.sum(dgamma, axis=0), mask=mask_n)


def activation_backward(
    dy: Tensor,
    z: Tensor,
    gamma: Tensor | None,
    activation: str,
    *,
    needed: tuple[bool, bool],
    dtypes: tuple[torch.dtype, torch.dtype],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(dz, Σ dz, Σ dy · act(z))`` with ``dz = γ · dy · act'(z)``.

    The two sums over rows have ``dtypes``, and each is empty unless ``needed``.
    """
    M, N = z.shape
    # A larger tile, or as many columns in fp64, would take too many registers.
    block_m, block_n = 8, min(256 if z.dtype.itemsize <= 4 else 64, next_power_of_2(N))
    blocks_n = cdiv(N, block_n)
    # About four programs per SM in all, so that the number of partial sums does not grow with M.
    programs_m = max(1, min(cdiv(M, block_m), 4 * runtime.device_facts(z.device).num_sms // blocks_n))
    dz = torch.empty_like(z)
    shares, (dbias, dgamma) = new_shares(needed, programs_m if M else 0, N, wide_dtype(z.dtype), z.device)
    if M > 0:
        _activation_bwd_kernel[(programs_m * blocks_n,)](
            dy_ptr=dy,
            z_ptr=z,
            gamma_ptr=dense_or(gamma, z),
            dz_ptr=dz,
            dbias_ptr=dbias,
            dgamma_ptr=dgamma,
            stride_dy_row=dy.stride(0),
            stride_dy_col=dy.stride(1),
            programs_m=programs_m,
            M=M,
            N=N,
            HAS_GAMMA=gamma is not None,
            NEEDS_DBIAS=needed[0],
            NEEDS_DGAMMA=needed[1],
            ACTIVATION=activation,
            ACC=_tile.accumulator(z.dtype),
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            num_warps=4,
        )
    return dz, *sum_shares(shares, needed, dtypes)


def weight_gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    needed: Sequence[bool],
    dtype: torch.dtype,
    bias_path: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of W, b, γ and γ ∘ W of ``γ · (x Wᵀ + t · b)`` for upstream ``dy``, empty unless needed.

    Args:
        dy: (M, N), any strides.
        x: (M, K), any strides.
        needed: Which of the four. The last one, for a γ, comes alone.
        dtype: Dtype of the gradients of W and b. That of γ has γ's, and that of γ ∘ W is fp32 (fp64).
        bias_path: t, (samples,), or None for ones.
    """
    needs_dweight, needs_dbias, needs_dgamma, needs_dfolded = needed
    wide = wide_dtype(weight.dtype)
    dtypes = (dtype, dtype, wide if gamma is None else gamma.dtype, wide)
    dweight, dbias, dgamma, dfolded = (dy.new_empty(0, dtype=each) for each in dtypes)
    if gamma is None:
        if needs_dweight:
            dweight, _ = product(dy.t(), x, out_dtype=dtype)
        if needs_dbias:
            dbias = _sum_rows(dy, bias_path, dtype)
        return dweight, dbias, dgamma, dfolded
    if needs_dweight or needs_dgamma or needs_dfolded:
        dfolded, _ = product(dy.t(), x, out_dtype=wide)
    if needs_dfolded:
        return dweight, dbias, dgamma, dfolded
    dy_sum = _sum_rows(dy, bias_path, wide) if needs_dbias or (needs_dgamma and bias is not None) else None
    grads = layer_scale_backward(dfolded, weight, gamma, bias, dy_sum, needed[:3], dtype)
    return *grads, dy.new_empty(0, dtype=wide)


def _sum_rows(dy: Tensor, path: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the sum of the rows of dy (M, N), those of each sample scaled by its number in ``path``."""
    if path is None or dy.shape[0] == 0:
        return dy.sum(0, dtype=dtype)
    wide = wide_dtype(dtype)
    sums = dy.view(len(path), -1, dy.shape[1]).sum(1, dtype=wide)
    return (sums * path.to(wide).unsqueeze(1)).sum(0).to(dtype)


def linear_forward(x, weight, bias, gamma, residual, activation, out_dtype=None, save_z=False, **more):
    """Launch the forward on (..., K); return ``(y, z)``, y by default in the widest dtype of x, residual and gamma.

    ``more``: scales of samples and an update of low rank, as :func:`vitkernels.ops._product.product` takes them.
    """
    M, N = x.shape[:-1].numel(), weight.shape[0]
    y, z = product(
        x.reshape(M, x.shape[-1]),
        weight.t(),
        out_dtype=out_dtype or promoted_dtype(x, residual, gamma),
        bias=bias,
        activation=activation,
        gamma=gamma,
        residual=None if residual is None else unit_stride(within_reach(residual.reshape(M, N))),
        save_z=save_z,
        **more,
    )
    return y.view(*x.shape[:-1], N), z.view(*x.shape[:-1], N) if save_z else z


class LinearWanted(NamedTuple):
    """Which gradients of :func:`linear` are wanted, in the order in which they come.

    ``dfolded`` is that of γ ∘ W. It comes in place of those of W, b and γ, which ``layer_scale_bwd`` makes from it.
    """

    dx: bool = False
    dweight: bool = False
    dbias: bool = False
    dgamma: bool = False
    dfolded: bool = False


def linear_backward(dy, x, weight, bias, z, gamma, activation, needed, dtype=None):
    """Launch the backward; return the gradients named by :class:`LinearWanted`, each empty unless ``needed``.

    Those of W and b have ``dtype``, x's if None; that of γ has γ's, and that of γ ∘ W is fp32 (fp64).
    """
    wanted = LinearWanted(*needed)
    dtype = dtype or x.dtype
    M, K, N = x.shape[:-1].numel(), x.shape[-1], weight.shape[0]
    rows, dy = x.reshape(M, K), dy.reshape(M, N).to(x.dtype)
    if activation is None:
        folded, alpha = fold_layer_scale(weight, gamma) if wanted.dx else (None, None)
        dx = product(dy, folded, alpha=alpha)[0].view(x.shape) if wanted.dx else x.new_empty(0)
        return dx, *weight_gradients(dy, rows, weight, bias, gamma, wanted[1:], dtype)
    dtypes = dtype, wide_dtype(x.dtype) if gamma is None else gamma.dtype
    dz, dbias, dgamma = activation_backward(
        dy, z.reshape(M, N), gamma, activation, needed=(wanted.dbias, wanted.dgamma), dtypes=dtypes
    )
    dx = product(dz, weight)[0].view(x.shape) if wanted.dx else x.new_empty(0)
    dweight = product(dz.t(), rows, out_dtype=dtype)[0] if wanted.dweight else x.new_empty(0, dtype=dtype)
    return dx, dweight, dbias, dgamma, x.new_empty(0, dtype=wide_dtype(x.dtype))


def fake_linear_forward(x, weight, bias, gamma, residual, activation, out_dtype=None, save_z=False):
    shape = (*x.shape[:-1], weight.shape[0])
    out_dtype = out_dtype or promoted_dtype(x, residual, gamma)
    return x.new_empty(shape, dtype=out_dtype), x.new_empty(shape if save_z else (0,))


def _fake_backward(dy, x, weight, bias, z, gamma, activation, needed, dtype=None):
    shapes = (x.shape, weight.shape, weight.shape[:1], weight.shape[:1], weight.shape)
    dtype, wide = dtype or x.dtype, wide_dtype(x.dtype)
    dtypes = (x.dtype, dtype, dtype, wide if gamma is None else gamma.dtype, wide)
    return tuple(
        x.new_empty(shape if n else (0,), dtype=dtype) for shape, dtype, n in zip(shapes, dtypes, needed, strict=True)
    )


def _reference_forward(x, weight, bias, gamma, residual, activation, out_dtype=None, save_z=False):
    y = reference.linear(x, weight, bias, activation=activation, residual=residual, layer_scale=gamma)
    z = reference.linear(x, weight, bias) if save_z else x.new_empty(0)
    return y.to(out_dtype or promoted_dtype(x, residual, gamma)).contiguous(), z.contiguous()


def _reference_backward(dy, x, weight, bias, z, gamma, activation, needed, dtype=None):
    outputs = _fake_backward(dy, x, weight, bias, z, gamma, activation, needed, dtype)
    wanted = LinearWanted(*needed)
    grads = reference_gradients(
        lambda x, w, b, gamma: reference.linear(x, w, b, activation=activation, layer_scale=gamma),
        (x, weight, bias, None if gamma is None else gamma.to(x.dtype)),
        (dy.to(x.dtype),),
        needed[:4],
    )
    for output, grad in zip(outputs[:4], grads, strict=True):
        output.copy_(grad)
    if wanted.dfolded:
        wide = outputs[4].dtype
        outputs[4].copy_(dy.reshape(-1, weight.shape[0]).to(wide).t() @ x.reshape(-1, x.shape[-1]).to(wide))
    return outputs


linear_fwd = register(
    "linear_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor? gamma, Tensor? residual, str? activation, "
    "ScalarType? out_dtype=None, bool save_z=False) -> (Tensor, Tensor)",
    launcher=linear_forward,
    reference=_reference_forward,
    fake=fake_linear_forward,
    work="linear",
)
linear_bwd = register(
    "linear_bwd(Tensor dy, Tensor x, Tensor weight, Tensor? bias, Tensor? z, Tensor? gamma, str? activation, "
    "bool[] needed, ScalarType? dtype=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    launcher=linear_backward,
    reference=_reference_backward,
    fake=_fake_backward,
)


class LinearFunction(torch.autograd.Function):
    """Autograd for :func:`linear`; the product runs in ``dtype``, that of x, whatever that of the weight."""

    @staticmethod
    def forward(ctx, x, weight, bias, gamma, residual, activation, dtype):
        ctx.unsaved = (weight, bias) if dtype is not None else ()
        ctx.weight_dtype, ctx.bias_dtype = weight.dtype, None if bias is None else bias.dtype
        # Cast here, so that the backward's product writes the gradient of an fp32 weight in fp32.
        weight, bias = cast(dtype, weight, bias)
        save_z = activation is not None and any(ctx.needs_input_grad[:4])
        y, z = linear_fwd(x, weight, bias, gamma, residual, activation, None, save_z)
        ctx.save_for_backward(x, weight, bias, z if save_z else None, gamma)
        ctx.emulated = runtime.emulated_arch()
        ctx.activation = activation
        ctx.residual_dtype = None if residual is None else residual.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, saved, dy):
        needed = list(ctx.needs_input_grad[:4])
        grads = [None] * 4
        if any(needed):
            results = linear_bwd(dy, *saved, ctx.activation, [*needed, False], ctx.weight_dtype)
            grads = [g if n else None for g, n in zip(results[:4], needed, strict=True)]
        if needed[2]:
            grads[2] = grads[2].to(ctx.bias_dtype)
        dresidual = dy.to(ctx.residual_dtype) if ctx.needs_input_grad[4] else None
        return *grads, dresidual, None, None


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    layer_scale: Tensor | None = None,
) -> Tensor:
    """Compute ``residual + layer_scale · activation(x Wᵀ + bias)`` in one pass.

    Args:
        x: (..., K), fp16, bf16, fp32 or fp64, any strides; leading dims may be empty.
        weight: (N, K), as ``nn.Linear``'s, in ``x``'s dtype.
        bias: (N,), in ``x``'s dtype, or None.
        activation: ``gelu`` (with erf), ``gelu_tanh``, ``quick_gelu`` (x·σ(1.702 x)), ``silu`` or None.
        residual: (..., N), any floating dtype, or None.
        layer_scale: γ of LayerScale, (N,), any floating dtype, or None.

    Returns:
        (..., N), contiguous, in the widest dtype among ``x``, ``residual`` and ``layer_scale``. Under autocast the
        product runs in autocast's dtype, as in PyTorch.

    Raises:
        ValueError: A shape, device or activation does not fit.
        TypeError: A dtype does not fit.
        NotImplementedError: A tensor is nested, sparse or quantized.

    Reference: arXiv 1606.08415 (GELU), 2103.17239 (LayerScale).
    """
    op = "linear"
    *lead, K = check_input(op, x)
    check_activation(op, activation)
    dtype = runtime.autocast_dtype(x)
    matched = dtypes_and_devices_match(x, weight, bias, residual, layer_scale)
    N = check_weights(op, "weight", weight, "bias", bias, x, K, matched, dtype is None)
    check_epilogue(op, residual, layer_scale, x, lead, N, matched)
    if not uses_kernels(x):
        y = reference.linear(x, weight, bias, activation=activation, residual=residual, layer_scale=layer_scale)
        return y.contiguous()
    if dtype is not None:
        x = x.to(dtype)
    if needs_grad(x, weight, bias, layer_scale, residual):
        return LinearFunction.apply(x, weight, bias, layer_scale, residual, activation, dtype)
    return linear_fwd(x, *cast(dtype, weight, bias), layer_scale, residual, activation)[0]


def check_input(op: str, x: Tensor) -> torch.Size:
    """Require a floating-point (..., K) with K ≥ 1; return its shape."""
    check_tensor(op, "x", x)
    shape = x.shape
    if not shape or shape[-1] == 0:
        raise ValueError(f"{op}: x has shape {tuple(shape)}; expected at least one feature in the last dim")
    return shape


def check_activation(op: str, activation: str | None) -> None:
    """Require an activation that the kernels support."""
    if activation is not None and activation not in reference.ACTIVATIONS:
        raise ValueError(
            f"{op}: activation is {activation!r}; expected one of {', '.join(reference.ACTIVATIONS)} or None"
        )


def check_weights(
    op: str,
    name: str,
    weight: Tensor,
    bias_name: str,
    bias: Tensor | None,
    x: Tensor,
    K: int,
    matched: bool,
    dtype: bool,
) -> int:
    """Require an (N, K) weight with N ≥ 1, an (N,) bias or None, on ``x``'s device and, with ``dtype``, of its dtype.

    Returns N. ``matched`` is the result of :func:`dtypes_and_devices_match`; if True, only shapes are checked.
    """
    if not matched or weight is None:
        check_like(op, name, weight, "x", x, dtype=dtype)
        if bias is not None:
            check_like(op, bias_name, bias, "x", x, dtype=dtype)
    shape = weight.shape
    if len(shape) != 2 or shape[1] != K or shape[0] == 0:
        raise ValueError(f"{op}: {name} has shape {tuple(shape)}; expected (out features, {K})")
    if bias is not None and bias.shape != (shape[0],):
        check_shape(op, bias_name, bias, shape[:1], f"the rows of {name}")
    return shape[0]


def check_epilogue(
    op: str, residual: Tensor | None, layer_scale: Tensor | None, x: Tensor, lead: list[int], N: int, matched: bool
) -> None:
    """Require a residual of the output's shape, (*lead, N), and a LayerScale of N features, on ``x``'s device."""
    if residual is not None:
        if not matched:
            check_like(op, "residual", residual, "x", x, dtype=False)
        check_shape(op, "residual", residual, (*lead, N), "the output's shape")
    if layer_scale is not None:
        if not matched:
            check_like(op, "layer_scale", layer_scale, "x", x, dtype=False)
        check_shape(op, "layer_scale", layer_scale, (N,), "the output's width")
