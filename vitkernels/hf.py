"""The attention kernels as an attention implementation for any transformers model, and a callback for its Trainer.

    vitkernels.hf.register()
    model.set_attn_implementation("vitkernels")    # or from_pretrained(..., attn_implementation="vitkernels")

    trainer = Trainer(model, args, callbacks=[vitkernels.hf.SwapCallback()], ...)

:func:`vitkernels.accelerate`, which the callback calls, fuses more, but only in the Vision Transformers that it
supports.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers import AttentionInterface, TrainerCallback
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from vitkernels import ops, swap

NAME = "vitkernels"


def register() -> None:
    """Register ``attn_implementation="vitkernels"`` with transformers: our attention, and the masks of its ``sdpa``.

    Without a registered mask function, transformers would silently pass no mask.
    """
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attention on :func:`vitkernels.ops.attention`, with the arguments of transformers' ``sdpa``.

    Args:
        module: The attention module; its ``is_causal`` is used if the argument is None.
        query: (B, H, N_q, D).
        key, value: (B, H or fewer, N_kv, D): several query heads may share a head of keys and values.
        attention_mask: Broadcasts to (B, H, N_q, N_kv), bool (True: attend) or added to the scores; None for none.
        dropout: Probability of dropping an attention weight.
        scaling: Factor of the scores; 1/√D if None.
        is_causal: Query i attends only to keys 0 to i; ignored with a mask, and with a single query.
        **kwargs: Further arguments, which ``sdpa`` ignores, too.

    Returns:
        (B, N_q, H, D), and None instead of the weights. On a CPU without kernels, the result of ``sdpa``.

    Raises:
        NotImplementedError: Soft-capped scores, a position bias, attention sinks or a paged cache.
        ValueError, TypeError: As for :func:`vitkernels.ops.attention`.
    """
    if not ops.uses_kernels(query):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    for name in ("softcap", "position_bias", "s_aux", "cache"):
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"attn_implementation={NAME!r} got {name}; expected none: choose another one")
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    o = ops.attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        scale=scaling,
        is_causal=is_causal and attention_mask is None and query.shape[2] > 1,
        dropout_p=dropout,
    )
    return o.transpose(1, 2), None


class SwapCallback(TrainerCallback):
    """Swap the kernels into the model of a transformers ``Trainer``: :func:`vitkernels.accelerate`.

    It does so when the trainer is made, so that an evaluation without training runs them too, and again when training
    begins, as ``model_init`` makes a model anew. The first process prints the report.

    Args:
        **options: For :func:`vitkernels.accelerate`, such as ``strict``.

    Raises:
        NotImplementedError: As for :func:`vitkernels.accelerate`, from the trainer.
    """

    def __init__(self, **options: object) -> None:
        self.options = options
        self._swapped = None

    def on_init_end(self, args, state, control, model=None, **kwargs) -> None:
        if model is not None and model is not self._swapped:
            report = swap.accelerate(model, **self.options)
            self._swapped = model
            if state.is_world_process_zero:
                report.print()

    on_train_begin = on_init_end
