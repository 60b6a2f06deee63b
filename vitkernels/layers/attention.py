"""Multi-head self-attention."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from vitkernels import ops
from vitkernels.layers import fused, records
from vitkernels.layers._plain import has_plain_children
from vitkernels.layers.layer_norm import LayerNorm

_DROP = {"attn_drop": (nn.Dropout,)}
_NORMS = dict.fromkeys(("q_norm", "k_norm"), (nn.Identity, LayerNorm))
_CHILDREN = {"qkv": (nn.Linear,), **_NORMS, **_DROP, "proj": (nn.Linear,), "proj_drop": (nn.Dropout,)}


class Attention(nn.Module):
    """``proj(attention(qkv(x)))`` over (B, N, C), read from the packed projection in place (arXiv 1706.03762).

    Args:
        dim: Channels of the input.
        num_heads: Heads.
        attn_head_dim: Channels per head; ``dim / num_heads`` unless given.
        dim_out: Channels of the output; ``dim`` unless given.
        qkv_bias: Whether the projection to queries, keys and values has a bias.
        proj_bias: Whether the output projection has a bias.
        attn_drop: Dropout rate of the attention weights.
        proj_drop: Dropout rate of the output.
        qk_norm: Whether each head's queries and keys are normalised (arXiv 2302.05442).
        norm_layer: Callable that makes these LayerNorms from their channels, ``device`` and ``dtype``.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``, or a rate lies outside 0 to 1.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        attn_head_dim: int | None = None,
        dim_out: int | None = None,
        qkv_bias: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        *,
        qk_norm: bool = False,
        norm_layer: Callable[..., nn.Module] = LayerNorm,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or (attn_head_dim is None and dim % num_heads):
            raise ValueError(f"num_heads {num_heads} does not divide dim {dim}; choose another or give attn_head_dim")
        self.num_heads = num_heads
        self.head_dim = attn_head_dim or dim // num_heads
        self.scale = self.head_dim**-0.5
        attn_dim = num_heads * self.head_dim
        self.qkv = nn.Linear(dim, 3 * attn_dim, bias=qkv_bias, device=device, dtype=dtype)
        self.q_norm = norm_layer(self.head_dim, device=device, dtype=dtype) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(self.head_dim, device=device, dtype=dtype) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(attn_dim, dim_out or dim, bias=proj_bias, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)

    def fuses(self) -> bool:
        """Tell whether the fused forward may run: it would skip a hook or an adapter other than LoRA on a child."""
        return has_plain_children(self, _CHILDREN)

    def forward(self, x: Tensor) -> Tensor:
        if self.fuses():
            return fused.attention(records.attention(self), x)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if has_plain_children(self, _DROP):
            out = ops.attention(q, k, v, scale=self.scale, dropout_p=records.dropout(self.attn_drop))
        else:  # another module in place of the dropout, or a hook on it, needs the weights
            out = self.attn_drop(ops.attention_weights(q, k, scale=self.scale).to(v.dtype)) @ v
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))
