"""Selective activation checkpointing: which results of a block are kept, and which are computed again.

PyTorch's selective checkpointing is a mode that sees every op of the dispatcher. In the backward it hands out what an
op of ours returned in the forward, so the kernels do not run twice. Ops that a block otherwise runs in one plan are
called one by one under a mode (``ops/_registry.py``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from vitkernels.ops._registry import OPS

# PyTorch's own ops, which compute where the backend is torch, and where a tuning table prefers its attention. Not every
# PyTorch has all attentions: of them the names begin so.
_OF_PYTORCH = {"attention": (), "linear": ("aten::mm", "aten::addmm", "aten::convolution"), "mlp": ()}
_ATTENTIONS = "aten::_scaled_dot_product_"


def checkpoint_policy(save: str | Iterable[str] = "attention") -> Callable[..., CheckpointPolicy]:
    """Return a policy for ``torch.utils.checkpoint.create_selective_checkpoint_contexts``.

    Results of the chosen ops are kept from the forward to the backward, which does not compute them again; everything
    else is computed again. Gradients are the same bits as without checkpointing. What each choice keeps beside the
    checkpoint's input, in numbers per token of a block with C channels and F hidden features:

    - ``"attention"``: attention's output and its statistics, C + H; of the block's work, what grows with the square of
      the tokens is not repeated. PyTorch's own attention (``scaled_dot_product_attention``) counts, too, unless it
      drops weights.
    - ``"linear"``: the outputs of :func:`vitkernels.ops.linear`, 4 C for the projections of attention, of
      :func:`vitkernels.ops.patch_embed`, and of PyTorch's ``mm``, ``addmm`` and ``convolution``: where PyTorch
      computes, those of the MLP as well.
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
        if name not in _OF_PYTORCH:
            raise ValueError(f"checkpoint_policy: save holds {name!r}; expected some of {', '.join(_OF_PYTORCH)}")
    if not names:
        raise ValueError("checkpoint_policy: save is empty; checkpoint without context_fn to keep nothing")
    kept = {f"vitkernels::{op}" for op, found in OPS.items() if found.work in names}
    kept.update(op for name in names for op in _OF_PYTORCH[name])
    return functools.partial(_policy, frozenset(kept), "attention" in names)


def checkpoint_context(save: str | Iterable[str] = "attention") -> Callable[[], tuple]:
    """Return a ``context_fn`` for ``torch.utils.checkpoint.checkpoint(..., use_reentrant=False)``, and for what passes
    one on: ``checkpoint_wrapper`` of torch.distributed, or ``gradient_checkpointing_kwargs`` of transformers.

    Args:
        save: As for :func:`checkpoint_policy`.

    Raises:
        ValueError, TypeError: As for :func:`checkpoint_policy`.
    """
    return functools.partial(create_selective_checkpoint_contexts, checkpoint_policy(save))


def _policy(kept: frozenset[str], attention: bool, context, op, *args, **kwargs) -> CheckpointPolicy:
    name = op.name()
    keep = name in kept or (attention and name.startswith(_ATTENTIONS) and not _draws(op, args, kwargs))
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def _draws(op, args: tuple, kwargs: dict) -> bool:
    """Tell whether PyTorch's attention drops weights: not run again, it would leave later random draws others."""
    for i, argument in enumerate(op._schema.arguments):
        if argument.name == "dropout_p":
            return (args[i] if i < len(args) else kwargs.get("dropout_p", argument.default_value)) > 0
    return False
