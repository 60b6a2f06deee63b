"""Arithmetic on loaded tiles: products, activations and their derivatives. No pointers."""

from __future__ import annotations

import torch

from vitkernels.ops._triton import tl, triton

LOG2_E = tl.constexpr(1.4426950408889634)
SQRT_HALF = tl.constexpr(0.7071067811865476)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
QUICK = tl.constexpr(1.702)


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """Return the Triton dtype for sums over values of ``dtype``."""
    return tl.float64 if dtype == torch.float64 else tl.float32


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b, accumulated in ``acc``'s dtype (fp32, or fp64 for fp64 operands)."""
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def activate(z, KIND: tl.constexpr):
    """The activation ``KIND`` of pre-activations ``z``, in ``z``'s dtype (fp32 or fp64)."""
    if KIND == "gelu":  # z Φ(z), arXiv 1606.08415
        return z * _normal_cdf(z)
    elif KIND == "gelu_tanh":  # ½(1 + tanh u) = σ(2u)
        return z * _sigmoid((z + 0.044715 * z * z * z) * 2.0 * SQRT_2_OVER_PI)
    elif KIND == "quick_gelu":
        return z * _sigmoid(z * QUICK)
    elif KIND == "silu":
        return z * _sigmoid(z)
    else:
        return z


@triton.jit
def activate_grad(z, KIND: tl.constexpr):
    """The derivative of :func:`activate` at ``z``."""
    if KIND == "gelu":
        return _normal_cdf(z) + z * INV_SQRT_2PI * tl.exp(-0.5 * z * z)
    elif KIND == "gelu_tanh":
        s, t = _sigmoids((z + 0.044715 * z * z * z) * 2.0 * SQRT_2_OVER_PI)
        return s + z * s * t * 2.0 * SQRT_2_OVER_PI * (1.0 + 0.134145 * z * z)
    elif KIND == "quick_gelu":
        s, t = _sigmoids(z * QUICK)
        return s + z * QUICK * s * t
    elif KIND == "silu":
        s, t = _sigmoids(z)
        return s + z * s * t
    else:
        return tl.full(z.shape, 1.0, z.dtype)


@triton.jit
def _normal_cdf(z):
    """Φ(z) = ½(1 + erf(z / √2)).

    In fp32 Φ(−|z|) = 2^(|z| Q(|z|) − 1), where Q has degree 7 and is minimax on |z| ≤ 5.5: there the error of Φ and z Φ
    is at most 1.5e-8 before rounding. Beyond 5.5 the exponent keeps falling. This takes a third of the instructions of
    libdevice's erf and fewer registers, and avoids the cancellation in 1 + erf for negative z.
    """
    if z.dtype == tl.float64:
        return 0.5 * (1.0 + tl.erf(z * SQRT_HALF))
    else:
        a = tl.abs(z)
        q = a * -2.3349476e-06 + 3.3737803e-05
        q = q * a - 1.6129379e-04
        q = q * a - 1.9170359e-04
        q = q * a + 7.1268651e-03
        q = q * a - 5.2533613e-02
        q = q * a - 4.5919830e-01
        q = q * a - 1.1511060e00
        tail = tl.exp2(q * a - 1.0)
        return tl.where(z >= 0, 1.0 - tail, tail)


@triton.jit
def _sigmoid(u):
    s, _ = _sigmoids(u)
    return s


@triton.jit
def _sigmoids(u):
    """Return σ(u), and 1 − σ(u) = σ(−u) without the cancellation of the subtraction."""
    # exp(|u|) could overflow; exp(−|u|) cannot.
    e = tl.exp(-tl.abs(u))
    large = 1.0 / (1.0 + e)
    small = e * large
    return tl.where(u >= 0, large, small), tl.where(u >= 0, small, large)
