"""A pre-norm Transformer block."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from vitkernels.layers import fused, records
from vitkernels.layers._plain import has_plain_children
from vitkernels.layers.attention import Attention
from vitkernels.layers.drop_path import DropPath
from vitkernels.layers.layer_norm import LayerNorm
from vitkernels.layers.layer_scale import LayerScale
from vitkernels.layers.mlp import Mlp
from vitkernels.layers.swiglu import SwiGLU, SwiGLUPacked

MLPS = (Mlp, SwiGLU, SwiGLUPacked)
_CHILDREN = {
    "norm1": (LayerNorm,),
    "attn": (Attention,),
    "ls1": (nn.Identity, LayerScale),
    "drop_path1": (nn.Identity, DropPath),
    "norm2": (LayerNorm,),
    "mlp": MLPS,
    "ls2": (nn.Identity, LayerScale),
    "drop_path2": (nn.Identity, DropPath),
}


class Block(nn.Module):
    """``x + ls1(attn(norm1(x)))``, then ``x + ls2(mlp(norm2(x)))``, with DropPath on both branches.

    Args:
        dim: Channels.
        num_heads: Heads of the attention.
        mlp_ratio: Hidden features of the MLP over ``dim``.
        qkv_bias: Whether the qkv projection has a bias.
        proj_bias: Whether the other linear layers have a bias.
        proj_drop: Dropout rate after the linear layers.
        attn_drop: Dropout rate of the attention weights.
        init_values: Initial value of LayerScale; no LayerScale if None or 0.
        drop_path: Probability of dropping a sample's branch in training.
        act_layer: As for :func:`vitkernels.layers.create_activation`.
        norm_layer: Callable that makes a LayerNorm from ``dim``, ``device`` and ``dtype``.
        qk_norm: Whether each head's queries and keys are normalised.
        mlp_layer: :class:`Mlp`, :class:`SwiGLU`, :class:`SwiGLUPacked`, or a callable that makes one from the same
            arguments; the hidden features of a packed one are gate and value together, as in timm.

    Raises:
        NotImplementedError: ``mlp_layer`` makes something else.
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
        qk_norm: bool = False,
        mlp_layer: Callable[..., nn.Module] = Mlp,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}

        def layer_scale() -> nn.Module:
            return LayerScale(dim, init_values, **dd) if init_values else nn.Identity()

        def path() -> nn.Module:
            return DropPath(drop_path) if drop_path else nn.Identity()

        self.norm1 = norm_layer(dim, **dd)
        self.attn = Attention(
            dim,
            num_heads,
            qkv_bias=qkv_bias,
            proj_bias=proj_bias,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            qk_norm=qk_norm,
            norm_layer=norm_layer,
            **dd,
        )
        self.ls1 = layer_scale()
        self.drop_path1 = path()
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = mlp_layer(dim, int(dim * mlp_ratio), act_layer=act_layer, bias=proj_bias, drop=proj_drop, **dd)
        if not isinstance(self.mlp, MLPS):
            wanted = ", ".join(cls.__name__ for cls in MLPS)
            raise NotImplementedError(
                f"mlp_layer makes a {type(self.mlp).__name__}; expected one of this package: {wanted}"
            )
        self.ls2 = layer_scale()
        self.drop_path2 = path()

    def fuses(self) -> bool:
        """Tell whether the fused forward may run: it would skip an adapter or a hook on a child."""
        return has_plain_children(self, _CHILDREN) and self.attn.fuses() and self.mlp.fuses()

    def forward(self, x: Tensor, images: fused.Packed | None = None) -> Tensor:
        """Map tokens (B, N, C) to tokens (B, N, C); or, with ``images``, all their tokens (1, T, C) to (1, T, C).

        Raises:
            NotImplementedError: A child has an adapter or a hook, which expects no packed images.
        """
        if self.fuses():
            return fused.block(records.block(self), x, attn_mask=images)
        if images is not None:
            raise NotImplementedError("a part of the block has a hook or an adapter, which takes no packed images")
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
