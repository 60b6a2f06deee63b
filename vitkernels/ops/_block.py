"""Pre-norm transformer block as one autograd node, which saves passes over memory in the backward.

Forward (arXiv 2010.11929, LayerScale 2103.17239):
    r = x + γ1 · (attention(norm1(x) Wqkvᵀ + bqkv) Wpᵀ + bp)
    y = r + γ2 · mlp(norm2(r))
The backward runs the backwards of the ops above. One node can do what a chain of nodes cannot:
    - the backward of each LayerNorm adds the residual's gradient, which would otherwise take a pass of its own;
    - a kernel that has the rows loaded anyway also sums them for a bias gradient: norm2's backward sums dy (for db2)
      and dr (for dbp), attention's backward sums dqkv (for dbqkv);
    - the projection's products apply γ1 in both directions, by the identity in linear.py, without a pass over an
      activation.

Shapes: B batch, N tokens, C channels, H heads, D head dim, F hidden features. Saved for backward: x, r, both normed
tensors, qkv, o, lse, z and act(z) (only z with ``recompute``), and the LayerNorm statistics.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitkernels import reference, runtime
from vitkernels.ops._attention.checks import MAX_HEAD_DIM
from vitkernels.ops._attention.registered import attention_qkvpacked_bwd, attention_qkvpacked_fwd
from vitkernels.ops._checks import (
    check_integer,
    check_like,
    check_scale,
    check_shape,
    check_tensor,
    dtypes_and_devices_match,
)
from vitkernels.ops._layer_norm import NormWanted, check_layer_norm, layer_norm_bwd, layer_norm_fwd
from vitkernels.ops._linear import LinearWanted, check_activation, check_weights, linear_bwd, linear_fwd
from vitkernels.ops._mlp import MlpWanted, mlp_bwd, mlp_fwd
from vitkernels.ops._once import once_differentiable
from vitkernels.ops._registry import needs_grad, planned, uses_kernels


class BlockFunction(torch.autograd.Function):
    """Autograd for :func:`block`; the caller has cast the weights to the dtype of the products."""

    @staticmethod
    def forward(ctx, x, n1_w, n1_b, qkv_w, qkv_b, proj_w, proj_b, gamma1, n2_w, n2_b, w1, b1, w2, b2, gamma2, options):
        tensors = (x, n1_w, n1_b, qkv_w, qkv_b, proj_w, proj_b, gamma1, n2_w, n2_b, w1, b1, w2, b2, gamma2)
        y, h1, mean1, rstd1, qkv, o, lse, r, h2, mean2, rstd2, z, *act = _forward(*tensors, options, True)
        ctx.save_for_backward(
            x, n1_w, mean1, rstd1, h1, qkv_w, qkv, o, lse, proj_w, proj_b, gamma1,
            r, n2_w, mean2, rstd2, h2, w1, w2, b2, gamma2, z, act[0] if act else None,
        )  # fmt: skip
        ctx.emulated = runtime.emulated_arch()
        ctx.unsaved = (n1_b, qkv_b, n2_b, b1)  # already added in h1, qkv, h2 and z
        ctx.options = options
        ctx.dtypes = tuple([None if t is None else t.dtype for t in tensors])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, saved, dy):
        needed = ctx.needs_input_grad[:15]
        grads = iter(_backward(dy, *saved, ctx.options, ctx.dtypes, needed))
        return *[next(grads) if need else None for need in needed], None


@planned
def _forward(
    x, n1_w, n1_b, qkv_w, qkv_b, proj_w, proj_b, gamma1, n2_w, n2_b, w1, b1, w2, b2, gamma2, options, save
):  # fmt: skip
    """Return the output, and with ``save`` the tensors made here that the backward needs."""
    heads, scale, eps1, eps2, activation, recompute = options
    dtype = qkv_w.dtype
    h1, _, mean1, rstd1 = layer_norm_fwd(x, None, n1_w, n1_b, None, None, eps1, dtype)
    qkv = linear_fwd(h1, qkv_w, qkv_b, None, None, None)[0]
    qkv = qkv.view(*x.shape[:2], 3, heads, qkv_w.shape[0] // (3 * heads))
    o, lse = attention_qkvpacked_fwd(qkv, scale)
    branch = linear_fwd(o.flatten(2), proj_w, proj_b, gamma1, None, None)[0]
    h2, r, mean2, rstd2 = layer_norm_fwd(branch, x, n2_w, n2_b, None, None, eps2, dtype)
    save_act = save and not recompute
    y, z, act = mlp_fwd(h2, w1, b1, w2, b2, gamma2, r, activation, None, save, save_act)
    if not save:
        return (y,)
    return y, h1, mean1, rstd1, qkv, o, lse, r, h2, mean2, rstd2, z, *([act] if save_act else [])


@planned
def _backward(
    dy, x, n1_w, mean1, rstd1, h1, qkv_w, qkv, o, lse, proj_w, proj_b, gamma1,
    r, n2_w, mean2, rstd2, h2, w1, w2, b2, gamma2, z, act, options, dtypes, needed,
):  # fmt: skip
    """Return the gradients that are needed, of the 15 tensors of the forward in their order."""
    _, scale, eps1, eps2, activation, _ = options
    (
        need_x, need_n1_w, need_n1_b, need_qkv_w, need_qkv_b, need_proj_w, need_proj_b, need_gamma1,
        need_n2_w, need_n2_b, need_w1, need_b1, need_w2, need_b2, need_gamma2,
    ) = needed  # fmt: skip
    # A gradient of an activation is needed if anything before it in the forward needs a gradient.
    need_h1 = need_x or need_n1_w or need_n1_b
    need_qkv = need_h1 or need_qkv_w or need_qkv_b
    need_r = need_qkv or need_proj_w or need_proj_b or need_gamma1
    need_h2 = need_r or need_n2_w or need_n2_b
    # b2 needs the sum of dy, and so does gamma2 if there is a b2; norm2's backward computes it, so it must run.
    need_dy_sum = need_b2 or (need_gamma2 and b2 is not None)
    need_dr_sum = need_proj_b or (need_gamma1 and proj_b is not None)

    d_qkv_w = d_qkv_b = d_proj_w = d_proj_b = d_gamma1 = d_n1_w = d_n1_b = dx = None
    dh2, d_w1, d_b1, d_w2, _, d_gamma2 = mlp_bwd(
        dy, h2, w1, w2, None, gamma2, z, act, activation,
        list(MlpWanted(need_h2 or need_dy_sum, need_w1, need_b1, need_w2, dgamma=need_gamma2)),
    )  # fmt: skip
    d_n2_w = d_n2_b = d_b2 = None
    if need_h2 or need_dy_sum:
        _, dr, d_n2_w, d_n2_b, _, dy_sum, dr_sum = layer_norm_bwd(
            dh2, dy, r, None, n2_w, None, None, mean2, rstd2, eps2, r.dtype,
            list(NormWanted(dresidual=need_r, dweight=need_n2_w, dbias=need_n2_b, dr_sum=need_dy_sum,
                            dresidual_sum=need_dr_sum)),
        )  # fmt: skip
        d_b2, d_gamma2 = _bias_and_gamma(dy_sum, b2, gamma2, d_gamma2, need_b2, need_gamma2)
    if need_r:
        do, d_proj_w, _, d_gamma1 = linear_bwd(
            dr, o.flatten(2), proj_w, None, None, gamma1, None,
            list(LinearWanted(need_qkv, need_proj_w, dgamma=need_gamma1)),
        )  # fmt: skip
        d_proj_b, d_gamma1 = _bias_and_gamma(dr_sum, proj_b, gamma1, d_gamma1, need_proj_b, need_gamma1)
    if need_qkv:
        dqkv, d_qkv_b, _ = attention_qkvpacked_bwd(do.view(o.shape), qkv, o, lse, scale, need_qkv_b)
        d_qkv_b = d_qkv_b.flatten()
        dh1, d_qkv_w, _, _ = linear_bwd(
            dqkv.flatten(2), h1, qkv_w, None, None, None, None, list(LinearWanted(need_h1, need_qkv_w))
        )
    if need_h1:
        _, dx, d_n1_w, d_n1_b, *_ = layer_norm_bwd(
            dh1, dr, x, None, n1_w, None, None, mean1, rstd1, eps1, x.dtype,
            list(NormWanted(dresidual=need_x, dweight=need_n1_w, dbias=need_n1_b)),
        )  # fmt: skip
    grads = (dx, d_n1_w, d_n1_b, d_qkv_w, d_qkv_b, d_proj_w, d_proj_b, d_gamma1,
             d_n2_w, d_n2_b, d_w1, d_b1, d_w2, d_b2, d_gamma2)  # fmt: skip
    return tuple([g.to(dtype) for g, dtype, need in zip(grads, dtypes, needed, strict=True) if need])


def _bias_and_gamma(
    upstream_sum: Tensor, bias: Tensor | None, gamma: Tensor | None, d_gamma: Tensor, need_bias: bool, need_gamma: bool
) -> tuple[Tensor | None, Tensor]:
    """Return the gradients of b and γ in ``γ · (product + b)``; the argument ``d_gamma`` is the product's part only."""
    d_bias = None
    if need_bias:
        d_bias = upstream_sum if gamma is None else upstream_sum * gamma.to(upstream_sum.dtype)
    if need_gamma and bias is not None:
        d_gamma = d_gamma + bias.to(upstream_sum.dtype) * upstream_sum
    return d_bias, d_gamma


def block(
    x: Tensor,
    *,
    norm1: tuple[Tensor | None, Tensor | None],
    qkv: tuple[Tensor, Tensor | None],
    proj: tuple[Tensor, Tensor | None],
    norm2: tuple[Tensor | None, Tensor | None],
    fc1: tuple[Tensor, Tensor | None],
    fc2: tuple[Tensor, Tensor | None],
    layer_scale: tuple[Tensor | None, Tensor | None] = (None, None),
    num_heads: int,
    scale: float | None = None,
    eps: tuple[float, float] = (1e-6, 1e-6),
    activation: str | None = "gelu",
    recompute: bool = False,
) -> Tensor:
    """A pre-norm transformer block.

    ``r = x + layer_scale[0] · attn(norm1(x))``, then ``r + layer_scale[1] · mlp(norm2(r))``.

    Args:
        x: (B, N, C), fp16, bf16, fp32 or fp64; B may be 0.
        norm1, norm2: LayerNorm's weight and bias, (C,) each or None, in ``x``'s dtype (or fp32 with half inputs).
        qkv: Weight (3·H·D, C) and bias (3·H·D,) or None; qkv, proj, fc1 and fc2 are in ``x``'s dtype.
        proj: Weight (C, H·D) and bias (C,) or None.
        fc1: Weight (F, C) and bias (F,) or None.
        fc2: Weight (C, F) and bias (C,) or None.
        layer_scale: γ1 and γ2, (C,) each or None, any floating dtype.
        num_heads: H.
        scale: Factor of the scores; 1/√D if None.
        eps: Terms added to the variance in norm1 and norm2, ≥ 0.
        activation: As for :func:`vitkernels.ops.mlp`.
        recompute: As for :func:`vitkernels.ops.mlp`.

    Returns:
        (B, N, C), contiguous. Under autocast the products run in autocast's dtype, and the residual stream keeps the
        dtype of ``x``, as in PyTorch on a GPU.

    Raises:
        ValueError: A shape, device, eps or activation does not fit.
        TypeError: A dtype does not fit, or a pair argument is not a pair.
        NotImplementedError: The head dim is above 256, or a tensor is nested, sparse or quantized.

    Reference: arXiv 2010.11929.
    """
    pairs = {"norm1": norm1, "qkv": qkv, "proj": proj, "norm2": norm2, "fc1": fc1, "fc2": fc2,
             "layer_scale": layer_scale}  # fmt: skip
    for name, pair in pairs.items():
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TypeError(f"block: {name} is a {type(pair).__name__}; expected a pair")
    tensors = (x, *norm1, *qkv, *proj, layer_scale[0], *norm2, *fc1, *fc2, layer_scale[1])
    num_heads, scale, dtype = _check(
        x, norm1, qkv, proj, norm2, fc1, fc2, layer_scale, num_heads, scale, eps, activation
    )
    if not uses_kernels(x):
        return reference.block(
            x, norm1=norm1, qkv=qkv, proj=proj, norm2=norm2, fc1=fc1, fc2=fc2, layer_scale=layer_scale,
            num_heads=num_heads, scale=scale, eps=eps, activation=activation,
        )  # fmt: skip
    if dtype is not None:
        qkv, proj, fc1, fc2 = ([None if t is None else t.to(dtype) for t in pair] for pair in (qkv, proj, fc1, fc2))
        tensors = (x, *norm1, *qkv, *proj, layer_scale[0], *norm2, *fc1, *fc2, layer_scale[1])
    options = (num_heads, scale, *map(float, eps), activation, recompute)
    if needs_grad(*tensors):
        return BlockFunction.apply(*tensors, options)
    return _forward(*tensors, options, False)[0]


def _check(x, norm1, qkv, proj, norm2, fc1, fc2, layer_scale, num_heads, scale, eps, activation):
    """Check every argument of :func:`block`; return the heads, the scale, and autocast's dtype or None."""
    op = "block"
    num_heads = check_integer(op, "num_heads", num_heads)
    if not isinstance(eps, tuple | list) or len(eps) != 2:
        raise TypeError(f"{op}: eps is {eps!r}; expected a pair of numbers, of norm1 and norm2")
    check_tensor(op, "x", x)
    matched = dtypes_and_devices_match(x, *norm1, *qkv, *proj, *norm2, *fc1, *fc2, *layer_scale)
    check_layer_norm(op, x, *norm1, eps[0], matched)
    check_layer_norm(op, x, *norm2, eps[1], matched)
    if x.ndim != 3 or x.shape[1] == 0:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}; expected (batch, tokens ≥ 1, channels)")
    check_activation(op, activation)
    C = x.shape[-1]
    dtype = runtime.autocast_dtype(x)
    strict = dtype is None
    check_weights(op, "qkv weight", qkv[0], "qkv bias", qkv[1], x, C, matched, strict)
    rows = qkv[0].shape[0]
    width = rows // (3 * num_heads) if num_heads > 0 else 0
    if not width or rows % (3 * num_heads):
        raise ValueError(f"{op}: the qkv weight has {qkv[0].shape[0]} rows; expected 3 · {num_heads} heads · head dim")
    if width > MAX_HEAD_DIM:
        raise NotImplementedError(f"{op}: the head dim is {width}; the kernels take up to {MAX_HEAD_DIM}")
    check_weights(op, "proj weight", proj[0], "proj bias", proj[1], x, num_heads * width, matched, strict)
    check_weights(op, "fc1 weight", fc1[0], "fc1 bias", fc1[1], x, C, matched, strict)
    check_weights(op, "fc2 weight", fc2[0], "fc2 bias", fc2[1], x, fc1[0].shape[0], matched, strict)
    for name, (weight, _) in (("proj", proj), ("fc2", fc2)):
        check_shape(op, f"{name} weight", weight, (C, weight.shape[1]), "the residual's width in front")
    for name, gamma in zip(("layer_scale[0]", "layer_scale[1]"), layer_scale, strict=True):
        if gamma is not None:
            if not matched:
                check_like(op, name, gamma, "x", x, dtype=False)
            check_shape(op, name, gamma, (C,), "the channels of x")
    return num_heads, check_scale(op, scale, width), dtype
