"""The Transformer block of BEiT, whose attention has a bias by relative position, and of EVA, where it has RoPE."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vitkernels import ops
from vitkernels.layers import fused, records
from vitkernels.layers._plain import has_plain_children
from vitkernels.layers.drop_path import DropPath
from vitkernels.layers.layer_norm import LayerNorm
from vitkernels.layers.mlp import Mlp
from vitkernels.layers.rel_pos import resize_rel_pos_bias_table
from vitkernels.layers.swiglu import SwiGLU, SwiGLUPacked

Shared = records.Relative | ops.Rope | None  # what all blocks share beside the tokens
_DROP = {"attn_drop": (nn.Dropout,)}
_ATTENTION_CHILDREN = {"qkv": (nn.Linear,), **_DROP, "proj": (nn.Linear,), "proj_drop": (nn.Dropout,)}


def _make_table(window_size: tuple[int, int], num_heads: int, **kwargs) -> nn.Parameter:
    """Return a table of zeros with an entry for each relative position, and three for the class token."""
    rows, columns = window_size
    return nn.Parameter(torch.zeros((2 * rows - 1) * (2 * columns - 1) + 3, num_heads, **kwargs))


@torch.no_grad()
def _resize(module: nn.Module, window_size: tuple[int, int]) -> None:
    """Give ``module`` the table for another window; one of the same size stays the same Parameter."""
    old_size, module.window_size = module.window_size, tuple(window_size)
    table = module.relative_position_bias_table
    resized = resize_rel_pos_bias_table(table, module.window_size, old_size)
    if resized is not table:
        module.relative_position_bias_table = nn.Parameter(resized, requires_grad=table.requires_grad)


class RelativePositionBias(nn.Module):
    """A table of biases by relative position that all blocks share (arXiv 2106.08254).

    Args:
        window_size: Rows and columns of patches; before them is one class token.
        num_heads: Heads.
    """

    def __init__(self, window_size: tuple[int, int], num_heads: int, *, device=None, dtype=None) -> None:
        super().__init__()
        self.window_size = tuple(window_size)
        self.relative_position_bias_table = _make_table(self.window_size, num_heads, device=device, dtype=dtype)

    def set_window_size(self, window_size: tuple[int, int]) -> None:
        """Resample the table for another number of patches, into a new Parameter."""
        _resize(self, window_size)

    def forward(self) -> records.Relative:
        """Return what a block takes beside its tokens."""
        return records.Relative(self.window_size, records.parameter(self, "relative_position_bias_table"), 1)


class BeitAttention(nn.Module):
    """Self-attention with a bias by relative position, read from its table in the kernel (arXiv 2106.08254), or with
    rotary positions (arXiv 2104.09864).

    State-dict keys are those of timm's ``Attention`` of BEiT and of its ``EvaAttention``. The projection has no bias of
    keys. One class token stands before the patches.

    Args:
        dim: Channels.
        num_heads: Heads.
        qkv_bias: Whether queries and values have a bias.
        attn_drop: Dropout rate of the attention weights.
        proj_drop: Dropout rate of the output.
        window_size: Rows and columns of patches behind the class token; None for no table.
        attn_head_dim: Channels per head; ``dim / num_heads`` unless given.
        proj_bias: Whether the output projection has a bias.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``, or a rate lies outside 0 to 1.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        window_size: tuple[int, int] | None = None,
        attn_head_dim: int | None = None,
        *,
        proj_bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or (attn_head_dim is None and dim % num_heads):
            raise ValueError(f"num_heads {num_heads} does not divide dim {dim}; choose another or give attn_head_dim")
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.head_dim = attn_head_dim or dim // num_heads
        self.num_prefix_tokens = 1  # which RoPE does not rotate
        self.window_size = None if window_size is None else tuple(window_size)
        attn_dim = num_heads * self.head_dim
        self.q_bias = nn.Parameter(torch.zeros(attn_dim, **dd)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(attn_dim, **dd)) if qkv_bias else None
        self.relative_position_bias_table = None if window_size is None else _make_table(window_size, num_heads, **dd)
        self.qkv = nn.Linear(dim, 3 * attn_dim, bias=False, **dd)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(attn_dim, dim, bias=proj_bias, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.init_non_persistent_buffers()

    def init_non_persistent_buffers(self) -> None:
        """Make what no state dict holds: the bias of the keys, which is 0."""
        k_bias = None if self.q_bias is None else torch.zeros_like(self.q_bias, requires_grad=False)
        self.register_buffer("k_bias", k_bias, persistent=False)

    def set_window_size(self, window_size: tuple[int, int]) -> None:
        """Resample the table, if there is one, for another number of patches, into a new Parameter."""
        if self.window_size is not None:
            _resize(self, window_size)

    def positions(self, shared: Shared) -> tuple[records.Relative | None, ops.Rope | None]:
        """Return this attention's biases, with those that all blocks share, and the rotary positions.

        Raises:
            ValueError: There are both.
        """
        biases, rope = (None, shared) if isinstance(shared, ops.Rope) else (shared, None)
        if self.window_size is None:
            return biases, rope
        if rope is not None:
            raise ValueError("rotary positions are given to an attention with biases by relative position")
        table = records.parameter(self, "relative_position_bias_table")
        return records.Relative(self.window_size, table if biases is None else table + biases.bias_table, 1), None

    def fuses(self) -> bool:
        """Tell whether the fused forward may run: it would skip an adapter or a hook on a child."""
        return has_plain_children(self, _ATTENTION_CHILDREN)

    def forward(self, x: Tensor, shared: Shared = None) -> Tensor:
        """Attend on x (B, N, C), with biases or rotary positions that all blocks share.

        Raises:
            ValueError: x has not as many tokens as they are for, or there are both.
            NotImplementedError: ``attn_drop`` has a hook or is no ``nn.Dropout``: there are no weights to give it.
        """
        positions, rope = self.positions(shared)
        if self.fuses():
            return fused.attention(records.attention(self)._replace(positions=positions), x, rope=rope)
        if not has_plain_children(self, _DROP):
            raise NotImplementedError(f"attn_drop is {self.attn_drop!r}, or has a hook; no weights are kept for it")
        qkv = self.qkv(x)
        if self.q_bias is not None:
            qkv = qkv + torch.cat((self.q_bias, self.k_bias, self.v_bias))
        qkv = qkv.unflatten(-1, (3, self.num_heads, self.head_dim))
        dropout_p = records.dropout(self.attn_drop)
        if positions is None:
            prefix = 0 if rope is None else self.num_prefix_tokens
            out = ops.attention_qkvpacked(qkv, dropout_p=dropout_p, rope=rope, num_prefix_tokens=prefix)
        else:
            image, table, prefix = positions
            out = ops.relative_attention(qkv, image, bias_table=table, num_prefix_tokens=prefix, dropout_p=dropout_p)
        return self.proj_drop(self.proj(out.flatten(2)))


_CHILDREN = {
    "norm1": (LayerNorm,),
    "attn": (BeitAttention,),
    "drop_path1": (nn.Identity, DropPath),
    "norm2": (LayerNorm,),
    "mlp": (Mlp, SwiGLU, SwiGLUPacked),
    "drop_path2": (nn.Identity, DropPath),
}


class BeitBlock(nn.Module):
    """``x + γ₁ · attn(norm1(x))``, then ``x + γ₂ · mlp(norm2(x))``, with DropPath on both branches.

    State-dict keys are those of timm's ``Block`` of BEiT and of its ``EvaBlock``: the factors are ``gamma_1`` and
    ``gamma_2``.

    Args:
        dim: Channels.
        num_heads: Heads of the attention.
        mlp_ratio: Hidden features of the MLP over ``dim``.
        qkv_bias: Whether queries and values have a bias.
        proj_bias: Whether the other linear layers have a bias.
        proj_drop: Dropout rate after the linear layers.
        attn_drop: Dropout rate of the attention weights.
        init_values: Initial value of γ₁ and γ₂ (arXiv 2103.17239); there are none if None or 0.
        drop_path: Probability of dropping a sample's branch in training.
        act_layer: As for :func:`vitkernels.layers.create_activation`; a SwiGLU has its own.
        norm_layer: Callable that makes a LayerNorm from ``dim``, ``device`` and ``dtype``.
        scale_mlp: Whether the MLP's hidden features have a norm.
        swiglu_mlp: Whether the MLP is a :class:`vitkernels.layers.SwiGLU`.
        packed_mlp: Whether that is a :class:`vitkernels.layers.SwiGLUPacked` instead, as in EVA-02.
        window_size: As for :class:`BeitAttention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        proj_bias: bool = True,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        init_values: float | None = None,
        drop_path: float = 0.0,
        act_layer: str | Callable[[], nn.Module] | None = None,
        norm_layer: Callable[..., nn.LayerNorm] = LayerNorm,
        *,
        scale_mlp: bool = False,
        swiglu_mlp: bool = False,
        packed_mlp: bool = False,
        window_size: tuple[int, int] | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.gamma_1 = nn.Parameter(torch.full((dim,), init_values, **dd)) if init_values else None
        self.gamma_2 = nn.Parameter(torch.full((dim,), init_values, **dd)) if init_values else None
        self.norm1 = norm_layer(dim, **dd)
        self.attn = BeitAttention(
            dim, num_heads, qkv_bias, attn_drop, proj_drop, window_size, proj_bias=proj_bias, **dd
        )
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = norm_layer(dim, **dd)
        of_mlp = {"bias": proj_bias, "norm_layer": norm_layer if scale_mlp else None, "drop": proj_drop, **dd}
        hidden = int(dim * mlp_ratio)
        if not swiglu_mlp:
            self.mlp = Mlp(dim, hidden, act_layer=act_layer, **of_mlp)
        else:
            self.mlp = SwiGLUPacked(dim, 2 * hidden, **of_mlp) if packed_mlp else SwiGLU(dim, hidden, **of_mlp)
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def fuses(self) -> bool:
        """Tell whether the fused forward may run: it would skip an adapter or a hook on a child."""
        return has_plain_children(self, _CHILDREN) and self.attn.fuses() and self.mlp.fuses()

    def forward(self, x: Tensor, shared: Shared = None) -> Tensor:
        """Run the block on x (B, N, C), with biases or rotary positions that all blocks share."""
        if self.fuses():
            block = records.block(self)
            positions, rope = self.attn.positions(shared)
            return fused.block(block._replace(attn=block.attn._replace(positions=positions)), x, rope=rope)
        for gamma, path, branch in (
            (self.gamma_1, self.drop_path1, lambda x: self.attn(self.norm1(x), shared)),
            (self.gamma_2, self.drop_path2, lambda x: self.mlp(self.norm2(x))),
        ):
            x = x + path(branch(x) if gamma is None else gamma * branch(x))
        return x
