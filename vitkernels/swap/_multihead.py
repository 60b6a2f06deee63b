"""``nn.MultiheadAttention`` as self-attention, for the libraries whose blocks contain it."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from vitkernels.layers import records
from vitkernels.swap._limits import head_dim_limit
from vitkernels.swap._rules import PARAMETERS

# The limit of a rule that reads an nn.MultiheadAttention must call multihead_limit.
PARAMETERS[nn.MultiheadAttention] = frozenset(
    {"in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight"}
)
PARAMETERS[NonDynamicallyQuantizableLinear] = PARAMETERS[nn.Linear]


def multihead(attn: nn.MultiheadAttention, proj_drop: float = 0.0) -> records.Attention:
    """Read ``attn`` as self-attention with output dropout ``proj_drop``."""
    own = attn._parameters
    return records.Attention(
        records.Linear(own["in_proj_weight"], own["in_proj_bias"]),
        records.linear(attn._modules["out_proj"]),
        attn.num_heads,
        attn.head_dim,
        attn_drop=attn.dropout if attn.training else 0.0,
        proj_drop=proj_drop,
    )


def multihead_limit(attn: nn.MultiheadAttention) -> str | None:
    """Return why :func:`multihead` cannot read ``attn``, or None if it can."""
    if attn.in_proj_weight is None:
        return "its keys and values have other widths than its queries"
    if not attn.batch_first:
        return "its tokens come before its batch (batch_first=False)"
    if attn.bias_k is not None or attn.bias_v is not None or attn.add_zero_attn:
        return "it adds keys of its own (add_bias_kv or add_zero_attn)"
    return head_dim_limit(attn.head_dim)
