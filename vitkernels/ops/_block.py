"""Pre-norm transformer block as one autograd node, which saves passes over memory in the backward.

Forward (arXiv 2010.11929, LayerScale 2103.17239, DropPath 1603.09382), with s1 and s2 one number a sample:
    r = x + s1 · γ1 · (attention(norm1(x) Wqkvᵀ + bqkv) Wpᵀ + bp)
    y = r + s2 · γ2 · mlp(norm2(r))
The backward runs the backwards of the ops above. One node can do what a chain of nodes cannot:
    - the backward of each LayerNorm adds the residual's gradient, which would otherwise take a pass of its own;
    - a kernel that has the rows loaded anyway also sums them for a bias gradient: norm2's backward sums s2 · dy (for
      db2) and s1 · dr (for dbp), attention's backward sums dqkv (for dbqkv);
    - γ1 and γ2 are folded into the weights of the products in both directions (_layer_scale.py), and s1 and s2 are
      applied by kernels that write the rows anyway, all without a pass over an activation.

Shapes: B batch, N tokens, C channels, H heads, D head dim, F hidden features. Saved for backward: x, r, both normed
tensors, qkv, o, lse, z and act(z) (only z with ``recompute``), and the LayerNorm statistics.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitkernels import reference, runtime
from vitkernels.ops._attention.checks import MAX_HEAD_DIM
from vitkernels.ops._attention.registered import attention_qkvpacked_bwd, attention_qkvpacked_fwd
from vitkernels.ops._cast import cast
from vitkernels.ops._checks import (
    check_drop_path_scale,
    check_integer,
    check_like,
    check_scale,
    check_shape,
    check_tensor,
    dtypes_and_devices_match,
)
from vitkernels.ops._layer_norm import NormWanted, check_layer_norm, layer_norm_bwd, layer_norm_fwd
from vitkernels.ops._layer_scale import layer_scale_bwd
from vitkernels.ops._linear import LinearWanted, check_activation, check_weights, linear_bwd, linear_fwd
from vitkernels.ops._mlp import MlpWanted, mlp_bwd, mlp_fwd
from vitkernels.ops._once import once_differentiable
from vitkernels.ops._registry import needs_grad, planned, uses_kernels


class BlockFunction(torch.autograd.Function):
    """Autograd for :func:`block`; the products run in ``dtype``, whatever that of the weights."""

    @staticmethod
    def forward(
        ctx, x, n1_w, n1_b, qkv_w, qkv_b, proj_w, proj_b, gamma1, n2_w, n2_b, w1, b1, w2, b2, gamma2, path1, path2,
        options, dtype,
    ):  # fmt: skip
        given = (x, n1_w, n1_b, qkv_w, qkv_b, proj_w, proj_b, gamma1, n2_w, n2_b, w1, b1, w2, b2, gamma2)
        ctx.dtypes = tuple([None if t is None else t.dtype for t in given])
        # Not saved: what is already added in h1, qkv, h2 and z, and weights that are saved in the products' dtype. They
        # are cast here, so that the backward's products write the gradient of an fp32 weight in fp32.
        ctx.unsaved = (n1_b, qkv_b, n2_b, b1, *_weights(given) * (dtype is not None))
        tensors = _in_dtype(dtype, given)
        y, h1, mean1, rstd1, qkv, o, lse, r, h2, mean2, rstd2, z, *act = _forward(*tensors, path1, path2, options, True)
        _, _, _, qkv_w, _, proj_w, proj_b, _, _, _, w1, _, w2, b2, _ = tensors
        ctx.save_for_backward(
            x, n1_w, mean1, rstd1, h1, qkv_w, qkv, o, lse, proj_w, proj_b, gamma1,
            r, n2_w, mean2, rstd2, h2, w1, w2, b2, gamma2, z, act[0] if act else None, path1, path2,
        )  # fmt: skip
        ctx.emulated = runtime.emulated_arch()
        ctx.options = options
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, saved, dy):
        needed = ctx.needs_input_grad[:15]
        grads = iter(_backward(dy, *saved, ctx.options, ctx.dtypes, needed))
        return *[next(grads) if need else None for need in needed], *[None] * 4


def _weights(tensors: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Return weights and biases of the products, of the 15 tensors of the forward."""
    return (*tensors[3:7], *tensors[10:14])


def _in_dtype(dtype: torch.dtype | None, tensors: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Return the 15 tensors of the forward with the weights and biases of the products in ``dtype``."""
    if dtype is None:
        return tensors
    weights = cast(dtype, *_weights(tensors))
    return (*tensors[:3], *weights[:4], *tensors[7:10], *weights[4:], tensors[14])


@planned
def _forward(
    x, n1_w, n1_b, qkv_w, qkv_b, proj_w, proj_b, gamma1, n2_w, n2_b, w1, b1, w2, b2, gamma2, path1, path2, options,
    save,
):  # fmt: skip
    """Return the output, and with ``save`` the tensors made here that the backward needs."""
    heads, scale, eps1, eps2, activation, recompute = options
    dtype = qkv_w.dtype
    h1, _, mean1, rstd1 = layer_norm_fwd(x, None, n1_w, n1_b, None, None, eps1, dtype)
    qkv = linear_fwd(h1, qkv_w, qkv_b, None, None, None)[0]
    qkv = qkv.view(*x.shape[:2], 3, heads, qkv_w.shape[0] // (3 * heads))
    o, lse = attention_qkvpacked_fwd(qkv, scale)
    branch = linear_fwd(o.flatten(2), proj_w, proj_b, gamma1, None, None)[0]
    h2, r, mean2, rstd2 = layer_norm_fwd(branch, x, n2_w, n2_b, None, path1, eps2, dtype)
    save_act = save and not recompute
    y, z, act = mlp_fwd(h2, w1, b1, w2, b2, gamma2, r, activation, None, save, save_act, path2)
    if not save:
        return (y,)
    return y, h1, mean1, rstd1, qkv, o, lse, r, h2, mean2, rstd2, z, *([act] if save_act else [])


@planned
def _backward(
    dy, x, n1_w, mean1, rstd1, h1, qkv_w, qkv, o, lse, proj_w, proj_b, gamma1,
    r, n2_w, mean2, rstd2, h2, w1, w2, b2, gamma2, z, act, path1, path2, options, dtypes, needed,
):  # fmt: skip
    """Return the gradients that are needed, of the 15 tensors of the forward in their order."""
    _, scale, eps1, eps2, activation, _ = options
    dtype = qkv_w.dtype
    (
        need_x, need_n1_w, need_n1_b, need_qkv_w, need_qkv_b, need_proj_w, need_proj_b, need_gamma1,
        need_n2_w, need_n2_b, need_w1, need_b1, need_w2, need_b2, need_gamma2,
    ) = needed  # fmt: skip
    (
        _, _, n1_b_dtype, qkv_w_dtype, qkv_b_dtype, proj_w_dtype, proj_b_dtype, _,
        _, n2_b_dtype, w1_dtype, _, w2_dtype, b2_dtype, _,
    ) = dtypes  # fmt: skip
    # A gradient of an activation is needed if anything before it in the forward needs a gradient.
    need_h1 = need_x or need_n1_w or need_n1_b
    need_qkv = need_h1 or need_qkv_w or need_qkv_b
    need_r = need_qkv or need_proj_w or need_proj_b or need_gamma1
    need_h2 = need_r or need_n2_w or need_n2_b
    # Gradients of b2 and of γ2 beside a b2 need the sum of dy over rows; norm2's backward computes it, so it must run.
    need_dy_sum = need_b2 or (need_gamma2 and b2 is not None)
    need_branch_sum = need_proj_b or (need_gamma1 and proj_b is not None)
    # A scaled layer's gradients come last, from that of its folded weight and those sums, which are then wide.
    folded1, folded2 = gamma1 is not None, gamma2 is not None
    narrow = not (folded1 or folded2) and proj_b_dtype in (b2_dtype, None)
    sum_dtype = b2_dtype if narrow else None

    d_qkv_w = d_qkv_b = d_proj_w = d_proj_b = d_gamma1 = d_n1_w = d_n1_b = dx = None
    dh2, d_w1, d_b1, d_w2, _, _, d_folded = mlp_bwd(
        dy, h2, w1, w2, None, gamma2, z, act, activation,
        list(MlpWanted(need_h2 or need_dy_sum, need_w1, need_b1, need_w2 and not folded2,
                       dfolded=folded2 and (need_w2 or need_gamma2))),
        w1_dtype, path2,
    )  # fmt: skip
    d_n2_w = d_n2_b = d_b2 = d_gamma2 = None
    if need_h2 or need_dy_sum:
        needs_branch = need_r and (path1 is not None or r.dtype is not dtype)
        d_branch, dr, d_n2_w, d_n2_b, _, d_b2, branch_sum = layer_norm_bwd(
            dh2, dy, r, None, n2_w, None, path1, mean2, rstd2, eps2, dtype,
            list(NormWanted(needs_branch, need_r, need_n2_w, need_n2_b, dr_sum=need_dy_sum,
                            dresidual_sum=need_branch_sum)),
            False, None, n2_b_dtype, sum_dtype, path2,
        )  # fmt: skip
        d_branch = d_branch if needs_branch else dr
    if folded2 and (need_w2 or need_b2 or need_gamma2):
        d_w2, d_b2, d_gamma2 = layer_scale_bwd(
            d_folded, w2, gamma2, b2, d_b2, [need_w2, need_b2, need_gamma2], w2_dtype
        )
    if need_r:
        do, d_proj_w, _, _, d_folded = linear_bwd(
            d_branch, o.flatten(2), proj_w, None, None, gamma1, None,
            list(LinearWanted(need_qkv, need_proj_w and not folded1, dfolded=folded1 and (need_proj_w or need_gamma1))),
            proj_w_dtype,
        )  # fmt: skip
        d_proj_b = branch_sum
        if folded1 and (need_proj_w or need_proj_b or need_gamma1):
            d_proj_w, d_proj_b, d_gamma1 = layer_scale_bwd(
                d_folded, proj_w, gamma1, proj_b, branch_sum, [need_proj_w, need_proj_b, need_gamma1], proj_w_dtype
            )
    if need_qkv:
        dqkv, d_qkv_b, _ = attention_qkvpacked_bwd(
            do.view(o.shape), qkv, o, lse, scale, qkv_b_dtype if need_qkv_b else None
        )
        d_qkv_b = d_qkv_b.flatten()
        dh1, d_qkv_w, *_ = linear_bwd(
            dqkv.flatten(2), h1, qkv_w, None, None, None, None, list(LinearWanted(need_h1, need_qkv_w)), qkv_w_dtype
        )
    if need_h1:
        _, dx, d_n1_w, d_n1_b, *_ = layer_norm_bwd(
            dh1, dr, x, None, n1_w, None, None, mean1, rstd1, eps1, x.dtype,
            list(NormWanted(dresidual=need_x, dweight=need_n1_w, dbias=need_n1_b)), False, None, n1_b_dtype,
        )  # fmt: skip
    grads = (dx, d_n1_w, d_n1_b, d_qkv_w, d_qkv_b, d_proj_w, d_proj_b, d_gamma1,
             d_n2_w, d_n2_b, d_w1, d_b1, d_w2, d_b2, d_gamma2)  # fmt: skip
    return tuple([g.to(dtype) for g, dtype, need in zip(grads, dtypes, needed, strict=True) if need])


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
    drop_path_scale: tuple[Tensor | None, Tensor | None] = (None, None),
    num_heads: int,
    scale: float | None = None,
    eps: tuple[float, float] = (1e-6, 1e-6),
    activation: str | None = "gelu",
    recompute: bool = False,
) -> Tensor:
    """A pre-norm transformer block.

    ``r = x + layer_scale[0] · attn(norm1(x))``, then ``r + layer_scale[1] · mlp(norm2(r))``; each branch of a sample
    is also scaled by its number in ``drop_path_scale``.

    Args:
        x: (B, N, C), fp16, bf16, fp32 or fp64; B may be 0.
        norm1, norm2: LayerNorm's weight and bias, (C,) each or None, in ``x``'s dtype (or fp32 with half inputs).
        qkv: Weight (3·H·D, C) and bias (3·H·D,) or None; qkv, proj, fc1 and fc2 are in ``x``'s dtype.
        proj: Weight (C, H·D) and bias (C,) or None.
        fc1: Weight (F, C) and bias (F,) or None.
        fc2: Weight (C, F) and bias (C,) or None.
        layer_scale: γ1 and γ2, (C,) each or None, any floating dtype.
        drop_path_scale: DropPath's 0 or 1/keep of each sample for the two branches, (B,) each, or None for ones. They
            must not require a gradient.
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
        NotImplementedError: The head dim is above 256, a tensor is nested, sparse or quantized, or a scale of DropPath
            requires a gradient.

    Reference: arXiv 2010.11929, 2103.17239 (LayerScale), 1603.09382 (DropPath).
    """
    pairs = {"norm1": norm1, "qkv": qkv, "proj": proj, "norm2": norm2, "fc1": fc1, "fc2": fc2,
             "layer_scale": layer_scale, "drop_path_scale": drop_path_scale}  # fmt: skip
    for name, pair in pairs.items():
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TypeError(f"block: {name} is a {type(pair).__name__}; expected a pair")
    num_heads, scale, dtype = _check(
        x, norm1, qkv, proj, norm2, fc1, fc2, layer_scale, drop_path_scale, num_heads, scale, eps, activation
    )
    if not uses_kernels(x):
        return reference.block(
            x, norm1=norm1, qkv=qkv, proj=proj, norm2=norm2, fc1=fc1, fc2=fc2, layer_scale=layer_scale,
            drop_path_scale=drop_path_scale, num_heads=num_heads, scale=scale, eps=eps, activation=activation,
        )  # fmt: skip
    tensors = (x, *norm1, *qkv, *proj, layer_scale[0], *norm2, *fc1, *fc2, layer_scale[1])
    options = (num_heads, scale, *map(float, eps), activation, recompute)
    if needs_grad(*tensors):
        return BlockFunction.apply(*tensors, *drop_path_scale, options, dtype)
    return _forward(*_in_dtype(dtype, tensors), *drop_path_scale, options, False)[0]


def _check(x, norm1, qkv, proj, norm2, fc1, fc2, layer_scale, drop_path_scale, num_heads, scale, eps, activation):
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
    for i, path in enumerate(drop_path_scale):
        if path is not None:
            check_drop_path_scale(op, f"drop_path_scale[{i}]", path, x)
    return num_heads, check_scale(op, scale, width), dtype
