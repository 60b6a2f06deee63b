"""Backwards that may run with ``create_graph=True``, but raise an error when their gradients are differentiated.

PyTorch's own ``once_differentiable`` raises only if an upstream gradient requires grad. After ``sum()``, ``mean()`` or
in a gradient penalty none does: the gradients become constants, and the second derivative is silently zero.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from vitkernels import runtime


def once_differentiable(backward: Callable) -> Callable:
    """Turn ``backward(ctx, saved, *upstream)``, which returns a tuple, into the backward of an ``autograd.Function``.

    With ``create_graph=True`` the gradients become outputs of a node that raises an error when differentiated. The
    node's inputs must be all tensors that the gradients depend on, or a derivative by a missing one would bypass the
    error: the upstream gradients, the saved tensors, and ``ctx.unsaved``, a tuple of the inputs that are not saved.

    The backward emulates the same GPU as its forward, ``ctx.emulated``, even if ``use_backend`` was left in between.
    """
    name = backward.__qualname__.partition(".")[0]

    @functools.wraps(backward)
    def run(ctx, *upstream):
        saved = ctx.saved_tensors  # read once: a checkpoint hands them out only once
        with torch.no_grad(), runtime.emulated_again(ctx.emulated):
            grads = backward(ctx, saved, *upstream)
        if not torch.is_grad_enabled():
            return grads
        # A gradient may be the caller's upstream gradient itself, so the node gets a new tensor for each.
        grads = tuple(None if g is None else g.detach() for g in grads)
        inputs = (*saved, *upstream, *getattr(ctx, "unsaved", ()))
        return _SecondDerivative.apply(name, grads, *(t for t in inputs if t is not None and t.requires_grad))

    return run


class _SecondDerivative(torch.autograd.Function):
    """Return ``grads`` (tensors or None) as a function of ``inputs`` whose derivative raises an error."""

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
