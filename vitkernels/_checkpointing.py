"""Selective activation checkpointing: which results of a block are kept, and which are computed again.

PyTorch's selective checkpointing is a mode that sees every op of the dispatcher. In the backward it hands out what an
op of ours returned in the forward, so the kernels do not run twice. Ops that a block otherwise runs in one plan are
called one by one under a mode (``ops/_registry.py``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

# Beginnings of names, as not every PyTorch has all of its attentions. PyTorch's own ops compute where the backend is
# torch, and where a tuning table prefers its attention.
_GROUPS = {
    "attention": ("vitkernels::attention_fwd", "vitkernels::attention_qkvpacked_fwd", "aten::_scaled_dot_product_"),
    "linear": ("vitkernels::linear_fwd", "aten::mm", "aten::addmm"),
    "mlp": ("vitkernels::mlp_fwd", "vitkernels::glu_fwd", "vitkernels::swiglu_mlp_fwd"),
}


def checkpoint_policy(save: str | Iterable[str] = "attention") -> Callable[..., CheckpointPolicy]:
    """Return a policy for ``torch.utils.checkpoint.create_selective_checkpoint_contexts``.

    Results of the chosen ops are kept from the forward to the backward, which does not compute them again; everything
    else is computed again. Gradients are the same bits as without checkpointing. What each choice keeps beside the
    checkpoint's input, in numbers per token of a block with C channels and F hidden features:

    - ``"attention"``: attention's output and its statistics, C + H; of the block's work, what grows with the square of
      the tokens is not repeated. PyTorch's own attention (``scaled_dot_product_attention``) counts, too, unless it
      drops weights.
    - ``"linear"``: the outputs of :func:`vitkernels.ops.linear`, 4 C for the projections of attention, and of PyTorch's
      ``mm`` and ``addmm``: where PyTorch computes, those of the MLP as well.
    - ``"mlp"``: the MLP's output and what its backward reads, C + 2 F (C + F with ``recompute``); of
      :func:`vitkernels.ops.swiglu_mlp` the gate, the value and their product, while the last product is ``"linear"``.

    Args:
        save: One of these names, or several.

    Raises:
        ValueError: A name is unknown, or there is none.
        TypeError: ``save`` is not a string or strings.
    """
    if not isinstance(save, str | Iterable):
        raise TypeError(f"checkpoint_policy: save is a {type(save).__name__}; expected a name or several")
    names = (save,) if isinstance(save, str) else tuple(save)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"checkpoint_policy: save holds a {type(name).__name__}; expected names")
        if name not in _GROUPS:
            raise ValueError(f"checkpoint_policy: save holds {name!r}; expected some of {', '.join(_GROUPS)}")
    if not names:
        raise ValueError("checkpoint_policy: save is empty; checkpoint without context_fn to keep nothing")
    kept = tuple(op for name in dict.fromkeys(names) for op in _GROUPS[name])
    return functools.partial(_policy, kept)


def checkpoint_context(save: str | Iterable[str] = "attention") -> Callable[[], tuple]:
    """Return a ``context_fn`` for ``torch.utils.checkpoint.checkpoint(..., use_reentrant=False)``, and for what passes
    one on: ``checkpoint_wrapper`` of torch.distributed, or ``gradient_checkpointing_kwargs`` of transformers.

    Args:
        save: As for :func:`checkpoint_policy`.

    Raises:
        ValueError, TypeError: As for :func:`checkpoint_policy`.
    """
    return functools.partial(create_selective_checkpoint_contexts, checkpoint_policy(save))


def _policy(kept: tuple[str, ...], context, op, *args, **kwargs) -> CheckpointPolicy:
    keep = op.name().startswith(kept) and not _draws(op, args, kwargs)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def _draws(op, args: tuple, kwargs: dict) -> bool:
    """Tell whether PyTorch's attention drops weights: not run again, it would leave later random draws others."""
    for i, argument in enumerate(op._schema.arguments):
        if argument.name == "dropout_p" and op.namespace == "aten":
            return (args[i] if i < len(args) else kwargs.get("dropout_p", argument.default_value)) > 0
    return False
