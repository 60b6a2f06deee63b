"""LoRA's update of a linear layer: u Bᵀ with u = x Aᵀ, beside x Wᵀ and in the same tiles (arXiv 2106.09685).

Backward of y = γ · (x Wᵀ + u Bᵀ + b), with W' = γ ∘ W and v = (γ · dy) B:
    dx = dy W' + v A,  dA = vᵀ x,  dB = γ ∘ dyᵀ u,  dγⱼ gets Σᵣ Bⱼᵣ (dyᵀ u)ⱼᵣ more

Why not one weight W + B A: in 16 bits it would lose every update smaller than the rounding of W, and the gradients of A
and B would take that of the whole weight, a third product of full size.

Shapes: x (M, K), A (R, K), u and v (M, R), B (N, R), W (N, K), y (M, N).
"""

from __future__ import annotations

from torch import Tensor

from vitkernels.ops._layer_scale import fold_layer_scale
from vitkernels.ops._linear import weight_gradients
from vitkernels.ops._product import product


def update(x: Tensor, lora: tuple[Tensor, Tensor] | None) -> tuple[tuple[Tensor, Tensor], Tensor] | tuple[None, None]:
    """Return u and Bᵀ, whose product is the update of x (..., K) by A and B, and u alone; None without them."""
    if lora is None:
        return None, None
    a, b = lora
    u, _ = product(x.reshape(x.shape[:-1].numel(), x.shape[-1]), a.t())
    return (u, b.t()), u


class LowRank:
    """The update in a backward: first :meth:`upstream`, for the gradient of x, then :meth:`gradients`."""

    def __init__(self, a: Tensor, b: Tensor, u: Tensor, needs_da: bool, needs_db: bool, dtype) -> None:
        self.a, self.b, self.u = a, b, u
        self.needs_da, self.needs_db, self.dtype = needs_da, needs_db, dtype
        # γ = alpha · γ' for one alpha, where γ is folded into weights of fp16; v is without it.
        self.v: Tensor | None = None
        self.alpha: Tensor | None = None

    @property
    def trains(self) -> bool:
        """Whether a gradient of A or B is wanted."""
        return self.needs_da or self.needs_db

    def upstream(self, dy: Tensor | None, gamma: Tensor | None, needs_dx: bool) -> tuple[Tensor, Tensor] | None:
        """Return v and A, whose product is the update's part of dx; None if neither dx nor dA is wanted.

        ``alpha`` scales it as it scales the product with γ ∘ W.
        """
        if not (needs_dx or self.needs_da):
            return None
        folded, self.alpha = fold_layer_scale(self.b, gamma)
        self.v, _ = product(dy, folded)
        return self.v, self.a

    def gradients(
        self, dy: Tensor | None, x: Tensor | None, gamma: Tensor | None, needs_dgamma: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return dA and dB in ``dtype`` and the update's part of dγ, each empty unless wanted."""
        da = self.a.new_empty(0, dtype=self.dtype)
        if self.needs_da:
            da, _ = product(self.v.t(), x, out_dtype=self.dtype, alpha=self.alpha)
        if not (self.needs_db or needs_dgamma):
            return da, da.new_empty(0), da.new_empty(0) if gamma is None else gamma.new_empty(0)
        needed = self.needs_db, False, needs_dgamma, False
        db, _, dgamma, _ = weight_gradients(dy, self.u, self.b, None, gamma, needed, self.dtype)
        return da, db, dgamma
