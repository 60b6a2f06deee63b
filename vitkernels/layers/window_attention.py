"""The attentions of Swin and Swin V2."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vitkernels import ops
from vitkernels.layers import fused, records, windows
from vitkernels.layers._plain import has_plain_children
from vitkernels.layers.patch_embed import to_pair
from vitkernels.layers.rel_pos import resize_rel_pos_bias_table

_DROP = {"attn_drop": (nn.Dropout,)}
_CHILDREN = {"qkv": (nn.Linear,), **_DROP, "proj": (nn.Linear,), "proj_drop": (nn.Dropout,)}


class _WindowAttention(nn.Module):
    """What both share: ``qkv`` and ``proj`` around the attention that :meth:`windows` describes."""

    def __init__(self, dim: int, window_size: int | tuple[int, int], num_heads: int, head_dim: int | None) -> None:
        super().__init__()
        if num_heads < 1 or (head_dim is None and dim % num_heads):
            raise ValueError(f"num_heads {num_heads} does not divide dim {dim}; choose another or give head_dim")
        self.dim = dim
        self.window_size = to_pair(window_size)
        self.num_heads = num_heads
        self.head_dim = head_dim or dim // num_heads

    def _make_projections(self, qkv_bias: bool, attn_drop: float, proj_drop: float, **kwargs) -> None:
        attn_dim = self.num_heads * self.head_dim
        self.qkv = nn.Linear(self.dim, 3 * attn_dim, bias=qkv_bias, **kwargs)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(attn_dim, self.dim, **kwargs)
        self.proj_drop = nn.Dropout(proj_drop)

    def windows(self, image: tuple[int, int], shift: tuple[int, int]) -> records.Windows:
        """Return the windows of an ``image`` of Y rows and X columns, rolled back by ``shift``."""
        raise NotImplementedError

    def _project(self, x: Tensor) -> Tensor:
        """Return queries, keys and values (..., 3, H, D) of x (..., C) by calling ``qkv``."""
        return self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))

    def fuses(self) -> bool:
        """Tell whether the fused forward may run: it would skip an adapter or a hook on a child."""
        return has_plain_children(self, _CHILDREN)

    def forward(self, x: Tensor, shift: tuple[int, int] = (0, 0)) -> Tensor:
        """Attend within the windows of images x (B, Y, X, C), rolled back by ``shift``; the output has x's shape.

        Raises:
            NotImplementedError: ``attn_drop`` has a hook or is no ``nn.Dropout``: there are no weights to give it.
        """
        read = self.windows(tuple(x.shape[1:3]), shift)
        if self.fuses():
            attn = records.attention(self)._replace(positions=read)
            return fused.attention(attn, x.flatten(1, 2)).view(x.shape)
        if not has_plain_children(self, _DROP):
            raise NotImplementedError(
                f"attn_drop is {self.attn_drop!r}, or has a hook; attention keeps no weights for it"
            )
        (Y, X), (rows, columns) = read.image, read.size
        padded = Y % rows or X % columns
        out = ops.window_attention(
            self._project(x),
            read.size,
            shift=read.shift,
            bias_table=read.bias_table,
            padding=self._project(x.new_zeros(self.dim)) if padded else None,
            logit_scale=read.logit_scale,
            dropout_p=records.dropout(self.attn_drop),
        )
        return self.proj_drop(self.proj(out.flatten(3)))


class WindowAttention(_WindowAttention):
    """Attention within windows of an image, with a table of biases by relative position (arXiv 2103.14030).

    Nothing is rolled, padded or cut in memory. State-dict keys are those of timm's ``WindowAttention`` of Swin.

    Args:
        dim: Channels.
        num_heads: Heads.
        head_dim: Channels per head; ``dim / num_heads`` unless given.
        window_size: Rows and columns of a window, or one number for both.
        qkv_bias: Whether the projection to queries, keys and values has a bias.
        attn_drop: Dropout rate of the attention weights.
        proj_drop: Dropout rate of the output.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``, or a rate lies outside 0 to 1.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int | None = None,
        window_size: int | tuple[int, int] = 7,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        *,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(dim, window_size, num_heads, head_dim)
        rows, columns = self.window_size
        entries = (2 * rows - 1) * (2 * columns - 1)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(entries, num_heads, device=device, dtype=dtype))
        self._make_projections(qkv_bias, attn_drop, proj_drop, device=device, dtype=dtype)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw the table as timm does; the linear layers are left to the model."""
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    @torch.no_grad()
    def set_window_size(self, window_size: int | tuple[int, int]) -> None:
        """Attend within windows of another size from now on; the table is resampled into a new Parameter."""
        old_size, self.window_size = self.window_size, to_pair(window_size)
        table = self.relative_position_bias_table
        if self.window_size != old_size:
            resized = resize_rel_pos_bias_table(table, self.window_size, old_size)
            self.relative_position_bias_table = nn.Parameter(resized, requires_grad=table.requires_grad)

    def windows(self, image: tuple[int, int], shift: tuple[int, int]) -> records.Windows:
        return windows.swin_windows(self, image, shift)


class WindowAttentionV2(_WindowAttention):
    """Cosine attention within windows of an image, with biases that an MLP makes of positions (arXiv 2111.09883).

    State-dict keys are those of timm's ``WindowAttention`` of Swin V2. The projection has no bias of keys.

    Args:
        dim: Channels; ``num_heads`` divides them.
        window_size, num_heads, qkv_bias, attn_drop, proj_drop: As for :class:`WindowAttention`.
        pretrained_window_size: Rows and columns of the window that positions are measured by, or one number for both;
            0 for the present window.

    Raises:
        ValueError: As for :class:`WindowAttention`.
    """

    def __init__(
        self,
        dim: int,
        window_size: int | tuple[int, int],
        num_heads: int,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        pretrained_window_size: int | tuple[int, int] = 0,
        *,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(dim, window_size, num_heads, None)
        dd = {"device": device, "dtype": dtype}
        self.pretrained_window_size = to_pair(pretrained_window_size)
        self.logit_scale = nn.Parameter(torch.full((num_heads, 1, 1), math.log(10.0), **dd))
        self.cpb_mlp = nn.Sequential(
            nn.Linear(2, 512, **dd), nn.ReLU(inplace=True), nn.Linear(512, num_heads, bias=False, **dd)
        )
        self.q_bias = nn.Parameter(torch.zeros(dim, **dd)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(dim, **dd)) if qkv_bias else None
        self._make_projections(False, attn_drop, proj_drop, **dd)
        self.init_non_persistent_buffers()

    def init_non_persistent_buffers(self) -> None:
        """Make what no state dict holds: the coordinates, and the bias of the keys, which is 0."""
        like = self.proj.weight
        k_bias = None if self.q_bias is None else torch.zeros_like(self.q_bias, requires_grad=False)
        self.register_buffer("k_bias", k_bias, persistent=False)
        table = self._coordinates().to(like.device, like.dtype)
        self.register_buffer("relative_coords_table", table, persistent=False)

    def _coordinates(self) -> Tensor:
        """Return all relative positions (1, rows, columns, 2) on a logarithmic scale (arXiv 2111.09883 §3.3)."""
        measured_by = self.pretrained_window_size if self.pretrained_window_size[0] > 0 else self.window_size
        axes = [
            torch.arange(1.0 - size, size, dtype=torch.float32) / max(unit - 1, 1) * 8
            for size, unit in zip(self.window_size, measured_by, strict=True)
        ]
        positions = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).unsqueeze(0)
        return positions.sign() * torch.log2(positions.abs() + 1.0) / math.log2(8)

    def set_window_size(self, window_size: int | tuple[int, int]) -> None:
        """Attend within windows of another size from now on; no parameter changes."""
        self.window_size = to_pair(window_size)
        self.init_non_persistent_buffers()

    def windows(self, image: tuple[int, int], shift: tuple[int, int]) -> records.Windows:
        return windows.swin_v2_windows(self, image, shift)

    def _project(self, x: Tensor) -> Tensor:
        qkv = super()._project(x)
        if self.q_bias is None:
            return qkv
        return qkv + torch.cat((self.q_bias, self.k_bias, self.v_bias)).view(qkv.shape[-3:])
