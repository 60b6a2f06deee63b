"""The Transformer blocks of Swin and Swin V2."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from vitkernels.layers import windows
from vitkernels.layers._plain import has_plain_children
from vitkernels.layers.drop_path import DropPath
from vitkernels.layers.layer_norm import LayerNorm
from vitkernels.layers.mlp import Mlp
from vitkernels.layers.patch_embed import to_pair
from vitkernels.layers.window_attention import WindowAttention, WindowAttentionV2

_CHILDREN = {
    "norm1": (LayerNorm,),
    "attn": (WindowAttention, WindowAttentionV2),
    "drop_path1": (nn.Identity, DropPath),
    "norm2": (LayerNorm,),
    "mlp": (Mlp,),
    "drop_path2": (nn.Identity, DropPath),
}


class _SwinBlock(nn.Module):
    """What both share: windows no larger than the image, unless ``always_partition``, and shifted only in a larger."""

    def __init__(
        self,
        input_resolution: int | tuple[int, int],
        window_size: int | tuple[int, int],
        shift_size: int | tuple[int, int],
        always_partition: bool,
    ) -> None:
        super().__init__()
        self.input_resolution = to_pair(input_resolution)
        self.target_shift_size = to_pair(shift_size)
        self.always_partition = always_partition
        self._fit(to_pair(window_size), self.target_shift_size)

    def _fit(self, window_size: tuple[int, int], shift_size: tuple[int, int]) -> None:
        if not self.always_partition:
            image = self.input_resolution
            window_size = tuple(min(w, n) for w, n in zip(window_size, image, strict=True))
            shift_size = tuple(s if n > w else 0 for s, w, n in zip(shift_size, window_size, image, strict=True))
        self.window_size, self.shift_size = window_size, shift_size

    def set_input_size(
        self, feat_size: tuple[int, int], window_size: int | tuple[int, int], always_partition: bool | None = None
    ) -> None:
        """Fit the windows to another image; a block that is shifted is shifted by half of ``window_size``."""
        self.input_resolution, size = to_pair(feat_size), to_pair(window_size)
        if always_partition is not None:
            self.always_partition = always_partition
        self._fit(size, tuple(w // 2 for w in size) if any(self.target_shift_size) else (0, 0))
        self.attn.set_window_size(self.window_size)

    def fuses(self) -> bool:
        """Tell whether the fused forward may run: it would skip an adapter or a hook on a child."""
        return has_plain_children(self, _CHILDREN) and self.attn.fuses() and self.mlp.fuses()


class SwinTransformerBlock(_SwinBlock):
    """``x + attn(norm1(x))``, then ``x + mlp(norm2(x))``, over windows of (B, Y, X, C) (arXiv 2103.14030).

    Args:
        dim: Channels.
        input_resolution: Y and X of the images that windows and shift are fitted to.
        num_heads: Heads of the attention.
        head_dim: Channels per head; ``dim / num_heads`` unless given.
        window_size: Rows and columns of a window, or one number for both.
        shift_size: How far the image is rolled back before it is cut into windows.
        always_partition: Keep windows and shift even where the image is smaller than a window.
        mlp_ratio: Hidden features of the MLP over ``dim``.
        qkv_bias: Whether the qkv projection has a bias.
        proj_drop: Dropout rate after the linear layers.
        attn_drop: Dropout rate of the attention weights.
        drop_path: Probability of dropping a sample's branch in training.
        act_layer: As for :func:`vitkernels.layers.create_activation`.
        norm_layer: Callable that makes a LayerNorm from ``dim``, ``device`` and ``dtype``.
    """

    def __init__(
        self,
        dim: int,
        input_resolution: int | tuple[int, int],
        num_heads: int = 4,
        head_dim: int | None = None,
        window_size: int | tuple[int, int] = 7,
        shift_size: int | tuple[int, int] = 0,
        always_partition: bool = False,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        act_layer: str | Callable[[], nn.Module] | None = None,
        norm_layer: Callable[..., nn.LayerNorm] = LayerNorm,
        *,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(input_resolution, window_size, shift_size, always_partition)
        dd = {"device": device, "dtype": dtype}
        self.norm1 = norm_layer(dim, **dd)
        self.attn = WindowAttention(
            dim,
            num_heads,
            head_dim,
            self.window_size,
            qkv_bias=qkv_bias,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            **dd,
        )
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=proj_drop, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.fuses():
            return windows.swin_block(self, x)
        x = x + self.drop_path1(self.attn(self.norm1(x), self.shift_size))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class SwinTransformerV2Block(_SwinBlock):
    """``x + norm1(attn(x))``, then ``x + norm2(mlp(x))``, over windows of (B, Y, X, C) (arXiv 2111.09883).

    Args:
        pretrained_window_size: As for :class:`vitkernels.layers.WindowAttentionV2`.

    The other arguments are those of :class:`SwinTransformerBlock`.
    """

    def __init__(
        self,
        dim: int,
        input_resolution: int | tuple[int, int],
        num_heads: int,
        window_size: int | tuple[int, int] = 7,
        shift_size: int | tuple[int, int] = 0,
        always_partition: bool = False,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        act_layer: str | Callable[[], nn.Module] | None = None,
        norm_layer: Callable[..., nn.LayerNorm] = LayerNorm,
        pretrained_window_size: int | tuple[int, int] = 0,
        *,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(input_resolution, window_size, shift_size, always_partition)
        dd = {"device": device, "dtype": dtype}
        self.attn = WindowAttentionV2(
            dim,
            self.window_size,
            num_heads,
            qkv_bias=qkv_bias,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            pretrained_window_size=pretrained_window_size,
            **dd,
        )
        self.norm1 = norm_layer(dim, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=proj_drop, **dd)
        self.norm2 = norm_layer(dim, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.fuses():
            return windows.swin_v2_block(self, x)
        x = x + self.drop_path1(self.norm1(self.attn(x, self.shift_size)))
        return x + self.drop_path2(self.norm2(self.mlp(x)))
