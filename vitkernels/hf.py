"""The attention kernels as one of transformers' attention implementations, for any of its models.

    vitkernels.hf.register()
    model.set_attn_implementation("vitkernels")    # or from_pretrained(..., attn_implementation="vitkernels")

:func:`vitkernels.accelerate` fuses more, but only in the Vision Transformers that it knows.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from vitkernels import ops

NAME = "vitkernels"


def register() -> None:
    """Make ``attn_implementation="vitkernels"`` known to transformers: the attention, and the masks of its sdpa.

    Without an entry of its own for masks, transformers would silently hand out none.
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
    """transformers' ``sdpa``, with its arguments, on :func:`vitkernels.ops.attention`.

    Args:
        module: The attention module; its ``is_causal`` counts where the argument is None.
        query: (B, H, N_q, D).
        key, value: (B, H or fewer, N_kv, D): a head of keys and values may serve several of queries.
        attention_mask: Broadcasts to (B, H, N_q, N_kv), bool (True: look) or added to the scores; None for none.
        dropout: Probability with which an attention weight is dropped.
        scaling: Factor of the scores; 1/√D if None.
        is_causal: Query i looks at keys 0 to i alone, where there is no mask and more than one query.
        **kwargs: What ``sdpa`` takes no notice of either.

    Returns:
        (B, N_q, H, D), and None in the place of the weights. On a CPU that runs no kernels what ``sdpa`` gives.

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
