"""Backwards that may run with ``create_graph=True``, and whose gradients cannot be differentiated.

PyTorch's own ``once_differentiable`` asks whether an upstream gradient requires grad. Those of ``sum()``, ``mean()``
and of a gradient penalty do not: its gradients are then constants, and the second derivative is zero without a word.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from vitkernels import runtime


def once_differentiable(backward: Callable) -> Callable:
    """Make the backward of an ``autograd.Function`` out of ``backward(ctx, saved, *upstream)``, a tuple of gradients.

    Where its own graph is asked for, the gradients are joined to a node that raises when it is differentiated. What
    leads to it is all that they hang on: the upstream gradients, the saved tensors, and ``ctx.unsaved``, a tuple of
    those inputs that are in none of these. A derivative by an input that is missing there would pass the node by.

    It runs on the GPU that its forward emulated, ``ctx.emulated``, also where ``use_backend`` was left in between.
    """
    name = backward.__qualname__.partition(".")[0]

    @functools.wraps(backward)
    def run(ctx, *upstream):
        saved = ctx.saved_tensors  # once, as a checkpoint gives them out once
        with torch.no_grad(), runtime.emulated_again(ctx.emulated):
            grads = backward(ctx, saved, *upstream)
        if not torch.is_grad_enabled():
            return grads
        # Of each a new tensor: it may be an upstream gradient, which is the caller's.
        grads = tuple(None if g is None else g.detach() for g in grads)
        inputs = (*saved, *upstream, *getattr(ctx, "unsaved", ()))
        return _SecondDerivative.apply(name, grads, *(t for t in inputs if t is not None and t.requires_grad))

    return run


class _SecondDerivative(torch.autograd.Function):
    """The identity of ``grads``, tensors or None, as a function of ``inputs`` that cannot be differentiated."""

    @staticmethod
    def forward(ctx, name, grads, *inputs):
        ctx.name = name
        return grads

    @staticmethod
    def backward(ctx, *upstream):
        raise NotImplementedError(
            f"{ctx.name}: a gradient of a vitkernels op is differentiated again (create_graph=True); expected first "
            'derivatives alone: compute what is differentiated twice within vitkernels.use_backend("torch"), or on the '
            "model as vitkernels.restore gives it back"
        )
