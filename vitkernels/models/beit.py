"""BEiT (arXiv 2106.08254), BEiT v2 (arXiv 2208.06366) and BEiT-3 (arXiv 2208.10442), with timm's arguments and keys.

Checkpoints load with ``strict=True`` in both directions between this and a timm ``Beit`` with the same arguments.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import NoReturn

import torch
from torch import Tensor, nn

from vitkernels.layers import BeitBlock, LayerNorm, RelativePositionBias, records
from vitkernels.layers.patch_embed import to_pair
from vitkernels.models import convert
from vitkernels.models._arguments import check_weight_init, refuse
from vitkernels.models.vision_transformer import VisionTransformer


class Beit(VisionTransformer):
    """Vision Transformer with biases by relative position, from images (B, I, Y, X) to logits (B, num_classes).

    The biases are read from their tables in the kernel. Nothing of the size of the attention weights is made of them.

    Args:
        img_size, patch_size, in_chans, num_classes, embed_dim, depth, num_heads: As for ``VisionTransformer``.
        mlp_ratio, norm_layer, final_norm, use_mask_token, weight_init, normalize, device, dtype: The same.
        init_values: Initial value of ``gamma_1`` and ``gamma_2``, the branches' factors; there are none if None or 0.
        global_pool: Input of the head: ``"avg"`` over the patches, ``"token"`` the class token, or ``""`` every token.
        qkv_bias: Whether queries and values have a bias.
        swiglu_mlp: Whether the MLPs are :class:`vitkernels.layers.SwiGLU`.
        scale_mlp: Whether the MLPs' hidden features have a norm.
        drop_rate, pos_drop_rate, proj_drop_rate, attn_drop_rate, drop_path_rate: As for ``VisionTransformer``.
        use_abs_pos_emb: Whether there is a learned position embedding.
        use_rel_pos_bias: Whether each block has a table of biases by relative position.
        use_shared_rel_pos_bias: Whether there is a table that all blocks share; both are added.
        head_init_scale: Factor of the head's random weights.
        use_fc_norm: Whether the last norm comes after pooling, not before; None: it does if the pool is over patches.

    Raises:
        ValueError, NotImplementedError, TypeError: As for ``VisionTransformer``.
    """

    _packs_mlp = False  # whether a SwiGLU without a norm has one packed first layer
    _config = staticmethod(convert.beit_config)

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        qkv_bias: bool = True,
        mlp_ratio: float = 4.0,
        swiglu_mlp: bool = False,
        scale_mlp: bool = False,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: Callable[..., nn.Module] | str | None = LayerNorm,
        init_values: float | None = None,
        use_abs_pos_emb: bool = True,
        use_rel_pos_bias: bool = False,
        use_shared_rel_pos_bias: bool = False,
        head_init_scale: float = 0.001,
        use_fc_norm: bool | None = None,
        *,
        final_norm: bool = True,
        use_mask_token: bool = False,
        weight_init: str = "",
        normalize: tuple[Sequence[float], Sequence[float]] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **others,
    ) -> None:
        refuse(type(self), others, {})
        _check_pool(global_pool)
        grid_size = tuple(n // p for n, p in zip(to_pair(img_size), to_pair(patch_size), strict=True))
        super().__init__(
            img_size,
            patch_size,
            in_chans,
            num_classes,
            global_pool,
            embed_dim,
            depth,
            num_heads,
            mlp_ratio,
            qkv_bias,
            init_values=init_values,
            pos_embed="learn" if use_abs_pos_emb else "none",
            final_norm=final_norm,
            fc_norm=use_fc_norm,
            drop_rate=drop_rate,
            pos_drop_rate=pos_drop_rate,
            proj_drop_rate=proj_drop_rate,
            attn_drop_rate=attn_drop_rate,
            drop_path_rate=drop_path_rate,
            use_mask_token=use_mask_token,
            weight_init="skip",
            norm_layer=norm_layer,
            block_fn=functools.partial(
                BeitBlock,
                scale_mlp=scale_mlp,
                swiglu_mlp=swiglu_mlp,
                packed_mlp=self._packs_mlp and not scale_mlp,
                window_size=grid_size if use_rel_pos_bias else None,
            ),
            normalize=normalize,
            device=device,
            dtype=dtype,
        )
        self.head_init_scale = head_init_scale
        if use_shared_rel_pos_bias:
            self.rel_pos_bias = RelativePositionBias(grid_size, num_heads, device=device, dtype=dtype)
        check_weight_init(weight_init)
        if weight_init != "skip":
            self.init_weights()

    @classmethod
    def from_timm(
        cls,
        source: nn.Module | str | os.PathLike,
        *,
        architecture: str | None = None,
        pretrained: bool = True,
        features_only: bool = False,
        **timm_args,
    ) -> Beit:
        """Make a model with the weights of timm's class of this name, as ``VisionTransformer.from_timm`` does."""
        model, state = convert.timm_model(source, architecture, pretrained, timm_args)
        config = cls._config(model)
        if features_only:
            config, state = convert.without_head(config, state, "use_fc_norm")
        return convert.build(cls, config, state, source)

    @classmethod
    def from_torchvision(cls, source: object, **options: object) -> Beit:
        """Raise NotImplementedError: torchvision has no BEiT."""
        raise NotImplementedError("torchvision has no BEiT")

    @classmethod
    def from_hf(cls, source: object, **options: object) -> Beit:
        """Raise NotImplementedError: weights of transformers' BEiT are not read; timm has them, too."""
        raise NotImplementedError("transformers' BEiT is not read here; from_timm reads timm's")

    def to_timm(self) -> nn.Module:
        """Return timm's class of this name with copies of these weights, and with the same names in the state dict.

        Raises:
            NotImplementedError: The model has ``normalize``, a mask token, or no ``final_norm``.
        """
        config = self._config(self)
        if not config.pop("final_norm") or self.patch_embed.normalize is not None or self.mask_token is not None:
            raise NotImplementedError("timm's model has no normalize, no mask token, and always a final_norm")
        return convert.to_timm(self, self._timm_class(), **config)

    @staticmethod
    def _timm_class() -> type[nn.Module]:
        from timm.models.beit import Beit as TimmBeit

        return TimmBeit

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialize weights randomly as timm does: what ends a branch is smaller the deeper it is, the head tiny."""
        self._init_linear_layers_and_tokens()
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        for i, block in enumerate(self.blocks):
            for layer in (block.attn.proj, block.mlp.fc2):
                layer.weight.div_(math.sqrt(2.0 * (i + 1)))
        if self.head_init_scale and isinstance(self.head, nn.Linear):
            self.head.weight.mul_(self.head_init_scale)

    def no_weight_decay(self) -> set[str]:
        tables = {name for name, _ in self.named_parameters() if "relative_position_bias_table" in name}
        return {"pos_embed", "cls_token"} | self._mask_token_name() | tables

    def group_matcher(self, coarse: bool = False) -> dict:
        stem = "|".join((r"^cls_token|pos_embed|patch_embed|rel_pos_bias", *self._mask_token_name()))
        return {**super().group_matcher(coarse), "stem": stem}

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        super().set_input_size(img_size, patch_size)
        if self.rel_pos_bias is not None:
            self.rel_pos_bias.set_window_size(self.patch_embed.grid_size)
        for block in self.blocks:
            block.attn.set_window_size(self.patch_embed.grid_size)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        if global_pool is not None:
            _check_pool(global_pool)
        super().reset_classifier(num_classes, global_pool)

    def _embed(self, images: Tensor, mask: Tensor | None = None, visible: Tensor | None = None) -> Tensor:
        x = super()._embed(images, mask, visible)
        return self.pos_drop(x) if self.pos_embed is None else x  # timm's ViT drops nothing without positions

    def _pack(self, x: Tensor, num_visible: Tensor) -> NoReturn:
        raise NotImplementedError(f"num_visible is given, but {type(self).__name__} takes no packed images")

    def _beside_tokens(self) -> tuple[records.Relative, ...]:
        return () if self.rel_pos_bias is None else (self.rel_pos_bias(),)


def _check_pool(pool: str) -> None:
    if pool not in ("", "avg", "token"):
        raise ValueError(f"unknown pool {pool!r}; expected '', 'avg' or 'token'")
