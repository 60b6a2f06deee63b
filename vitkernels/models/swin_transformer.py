"""Swin Transformer (arXiv 2103.14030) and Swin V2 (arXiv 2111.09883), with timm's arguments and state-dict keys.

Checkpoints load with ``strict=True`` in both directions between these and timm's ``SwinTransformer`` and
``SwinTransformerV2`` with the same arguments. No window is rolled, padded, cut or masked in memory.
Shape letters: B batch, Y and X rows and columns of tokens, C channels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitkernels.layers import (
    Linear,
    PatchEmbed,
    PatchMerging,
    SwinTransformerBlock,
    SwinTransformerV2Block,
    WindowAttention,
)
from vitkernels.layers.patch_embed import to_pair
from vitkernels.models import convert
from vitkernels.models._arguments import check_weight_init, norm_factory, refuse, taken_indices

Pair = tuple[int, int]

POOLS = ("", "avg", "max", "avgmax")


class ClassifierHead(nn.Module):
    """Pool (B, Y, X, C) over the image, drop features, and map them to logits.

    Args:
        in_features: Channels C.
        num_classes: Number of logits; 0 leaves the linear layer out.
        pool_type: ``"avg"``, ``"max"``, ``"avgmax"`` (mean of both), or ``""`` for none.
        drop_rate: Dropout rate of the pooled features.

    Raises:
        ValueError: The pool is unknown.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        pool_type: str = "avg",
        drop_rate: float = 0.0,
        *,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.num_features = in_features
        self.drop = nn.Dropout(drop_rate)
        self.reset(num_classes, pool_type, device=device, dtype=dtype)

    def reset(self, num_classes: int, pool_type: str, *, device=None, dtype=None) -> None:
        """Replace the linear layer by a new one, with PyTorch's initialisation, and the pool."""
        if pool_type not in POOLS:
            raise ValueError(f"unknown pool {pool_type!r}; expected one of {POOLS}")
        self.pool_type = pool_type
        self.fc = Linear(self.num_features, num_classes, device=device, dtype=dtype) if num_classes else nn.Identity()
        self.fc.train(self.training)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if self.pool_type == "avg":
            x = x.mean(dim=(1, 2))
        elif self.pool_type == "max":
            x = x.amax(dim=(1, 2))
        elif self.pool_type == "avgmax":
            x = 0.5 * (x.amax(dim=(1, 2)) + x.mean(dim=(1, 2)))
        x = self.drop(x)
        return x if pre_logits else self.fc(x)


class SwinTransformerStage(nn.Module):
    """Patch merging, except in the first stage, then blocks whose windows every other one shifts.

    Args:
        downsample: The patch merging, or an ``nn.Identity``.
        blocks: The blocks, on what ``downsample`` gives.
        input_resolution: Y and X of the images.
    """

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module], input_resolution: Pair) -> None:
        super().__init__()
        self.input_resolution = input_resolution
        self.grad_checkpointing = False
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)

    def set_input_size(self, feat_size: Pair, window_size: Pair, always_partition: bool | None = None) -> None:
        """Fit the windows to images of another size."""
        self.input_resolution = feat_size
        if isinstance(self.downsample, PatchMerging):
            feat_size = _halved(feat_size)
        for block in self.blocks:
            block.set_input_size(feat_size, window_size, always_partition)

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.grad_checkpointing else block(x)
        return x


class _SwinTransformer(nn.Module):
    """What both versions share.

    Args:
        block_class: :class:`SwinTransformerBlock` or :class:`SwinTransformerV2Block`.
        of_stages: For each stage the arguments of its blocks that the versions do not share.

    The other arguments are those of :class:`SwinTransformer`.
    """

    _UNDECAYED: tuple[str, ...]

    def __init__(
        self,
        block_class: type[nn.Module],
        of_stages: Sequence[dict[str, object]],
        *,
        img_size: int | Pair,
        patch_size: int | Pair,
        in_chans: int,
        num_classes: int,
        global_pool: str,
        embed_dim: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        window_size: int | Pair | Sequence[int | Pair],
        strict_img_size: bool,
        drop_rate: float,
        drop_path_rate: float,
        norm_layer: Callable[..., nn.Module] | str | None,
        weight_init: str,
        normalize: tuple[Sequence[float], Sequence[float]] | None,
        **dd: object,
    ) -> None:
        super().__init__()
        check_weight_init(weight_init)
        stages = len(depths)
        if len(num_heads) != stages:
            raise ValueError(f"num_heads is {num_heads}; expected one number for each of {stages} stages")
        window_sizes = _window_sizes(window_size, stages)
        norm = norm_factory(norm_layer)
        widths = [embed_dim * 2**i for i in range(stages)]
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.embed_dim = embed_dim
        self.num_layers = stages
        self.num_features = self.head_hidden_size = widths[-1]
        self.output_fmt = "NHWC"
        self.dynamic_img_size = not strict_img_size
        self.patch_embed = PatchEmbed(
            img_size,
            patch_size,
            in_chans,
            embed_dim,
            strict_img_size=strict_img_size,
            normalize=normalize,
            norm_layer=norm,
            **dd,
        )
        resolution = self.patch_embed.grid_size
        # As in timm: the windows that later sizes are scaled from, and the grid that they were given for.
        self._ref_window_sizes, self._ref_grid_size = window_sizes, resolution
        post_norm = block_class is SwinTransformerV2Block
        drop_paths = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").split(list(depths))
        self.feature_info, layers = [], []
        for i, width in enumerate(widths):
            resolutions = resolution, resolution if i == 0 else _halved(resolution)
            shift = tuple(w // 2 for w in window_sizes[i])
            downsample = (
                nn.Identity() if i == 0 else PatchMerging(widths[i - 1], width, norm, post_norm=post_norm, **dd)
            )
            blocks = [
                block_class(
                    width,
                    resolutions[1],
                    num_heads[i],
                    window_size=window_sizes[i],
                    shift_size=shift if j % 2 else 0,
                    drop_path=drop_path,
                    norm_layer=norm,
                    **of_stages[i],
                    **dd,
                )
                for j, drop_path in enumerate(drop_paths[i].tolist())
            ]
            layers.append(SwinTransformerStage(downsample, blocks, resolutions[0]))
            reduction = max(self.patch_embed.patch_size) * 2**i
            self.feature_info.append({"num_chs": width, "reduction": reduction, "module": f"layers.{i}"})
            resolution = resolutions[1]
        self.layers = nn.Sequential(*layers)
        self.norm = norm(self.num_features, **dd)
        self.head = ClassifierHead(self.num_features, num_classes, global_pool, drop_rate, **dd)
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
    ) -> SwinTransformer:
        """Make a model with the weights of timm's model of this class's name.

        Args:
            source, architecture, pretrained, timm_args: As for :meth:`vitkernels.models.VisionTransformer.from_timm`.
            features_only: Leave out the head and the pool; the model then returns the last stage's (B, Y, X, C).

        Raises:
            ValueError, NotImplementedError: As for :meth:`vitkernels.models.VisionTransformer.from_timm`.
        """
        model, state = convert.timm_model(source, architecture, pretrained, timm_args)
        config = convert.swin_config(model, cls.__name__)
        if features_only:
            config |= {"num_classes": 0, "global_pool": ""}
            state = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
        return convert.build(cls, config, state, source)

    def to_timm(self) -> nn.Module:
        """Return timm's model of this class's name with copies of these weights, and the same names in the state dict.

        Raises:
            NotImplementedError: The model has ``normalize``.
        """
        import timm.models

        if self.patch_embed.normalize is not None:
            raise NotImplementedError("timm's model has no normalize")
        name = type(self).__name__
        return convert.to_timm(self, getattr(timm.models, name), **convert.swin_config(self, name))

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialize linear layers and tables of biases randomly, as timm does."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, WindowAttention):
                module.init_weights()

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters that optimizers should not decay."""
        return {name for name, _ in self.named_parameters() if any(part in name for part in self._UNDECAYED)}

    def group_matcher(self, coarse: bool = False) -> dict:
        """Return the patterns that group parameters for timm's layer-wise learning rates."""
        fine = [
            (r"^layers\.(\d+).downsample", (0,)),
            (r"^layers\.(\d+)\.\w+\.(\d+)", None),
            (r"^norm", (99999,)),
        ]
        return {"stem": r"^patch_embed", "blocks": r"^layers\.(\d+)" if coarse else fine}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward instead of saving them (arXiv 1604.06174)."""
        for stage in self.layers:
            stage.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """Return the head's linear layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head's linear layer by a new one, with PyTorch's initialisation, and the pool if one is given.

        Raises:
            ValueError: The pool is unknown.
        """
        like = self.patch_embed.proj.weight
        pool = self.global_pool if global_pool is None else global_pool
        self.head.reset(num_classes, pool, device=like.device, dtype=like.dtype)
        self.num_classes, self.global_pool = num_classes, pool

    def set_input_size(
        self,
        img_size: int | Pair | None = None,
        patch_size: int | Pair | None = None,
        window_size: int | Pair | Sequence[int | Pair] | None = None,
        window_ratio: int | Sequence[int] | None = None,
        always_partition: bool | None = None,
    ) -> None:
        """Accept images of another size from now on; tables of biases are resampled into new Parameters.

        Args:
            img_size: Height and width of the images, in pixels; None for the present ones.
            patch_size: None, or the model's.
            window_size: As for the constructor. Without it and ``window_ratio``, windows grow with the image.
            window_ratio: Rows and columns of patches over those of a window, one number or one a stage.
            always_partition: As for the constructor; None leaves it.

        Raises:
            ValueError: The patch does not divide the image, or the windows do not fit the stages.
            NotImplementedError: ``patch_size`` differs from the model's.
        """
        if patch_size is not None and to_pair(patch_size) != self.patch_embed.patch_size:
            raise NotImplementedError(f"patch_size is {patch_size}; expected the model's {self.patch_embed.patch_size}")
        grid = self.patch_embed.grid_size if img_size is None else self.patch_embed.grid_of(to_pair(img_size))
        if window_size is not None:
            windows = _window_sizes(window_size, len(self.layers))
        elif window_ratio is not None:
            ratios = _per_stage("window_ratio", window_ratio, len(self.layers))
            if min(ratios) < 1:
                raise ValueError(f"window_ratio is {window_ratio}; expected 1 at least")
            windows = [tuple(max(1, n // ratio) for n in grid) for ratio in ratios]
        else:
            old = self._ref_grid_size
            windows = [
                tuple(max(1, w * n // o) for w, n, o in zip(size, grid, old, strict=True))
                for size in self._ref_window_sizes
            ]
        if img_size is not None:
            self.patch_embed.set_input_size(img_size)
        if window_size is not None or window_ratio is not None:
            self._ref_window_sizes, self._ref_grid_size = windows, grid
        for i, (stage, window) in enumerate(zip(self.layers, windows, strict=True)):
            stage.set_input_size(grid, window, always_partition)
            grid = grid if i == 0 else _halved(grid)

    def _embed(self, images: Tensor) -> Tensor:
        """Map images (B, I, Y, X) to the patches (B, rows, columns, C) that enter the first stage."""
        patches = self.patch_embed(images)
        return patches.unflatten(1, self.patch_embed.grid_of(tuple(images.shape[2:])))

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images (B, I, Y, X) to the last stage's features (B, rows, columns, C) after ``norm``."""
        return self.norm(self.layers(self._embed(x)))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the outputs of selected stages, in timm's format.

        Args:
            x: Images (B, I, Y, X).
            indices: An int n for the last n stages, or a list of stage indices (negative ones count from the end); None
                for all.
            norm: Apply ``norm`` to the last stage's.
            stop_early: Skip the stages after the last selected one.
            output_fmt: ``"NCHW"``, for maps (B, C, rows, columns).
            intermediates_only: Leave the final features out.

        Returns:
            ``(features, intermediates)``, with features as from :meth:`forward_features`, or of the last stage that
            ran without ``norm``; or only ``intermediates``.

        Raises:
            ValueError: ``output_fmt`` is unknown, or an index is out of range.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"unknown output_fmt {output_fmt!r}; expected 'NCHW'")
        wanted, last = taken_indices("stage", len(self.layers), indices), len(self.layers) - 1
        ends = max(wanted) if stop_early else last
        x, intermediates = self._embed(x), []
        for i, stage in enumerate(self.layers[: ends + 1]):
            x = stage(x)
            if i in wanted:
                features = self.norm(x) if norm and i == last else x
                intermediates.append(features.permute(0, 3, 1, 2).contiguous())
        if intermediates_only:
            return intermediates
        return self.norm(x) if ends == last else x, intermediates

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map features (B, Y, X, C) to logits or, with ``pre_logits``, to the input of the head's linear layer."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, I, Y, X) to logits (B, num_classes), or (B, rows, columns, num_classes) if the pool is ``""``.

        Raises:
            ValueError: The images' rank, number of channels or size does not fit the model.
            TypeError: The images are not a floating-point tensor (with ``normalize``, nor a uint8 tensor).
        """
        return self.forward_head(self.forward_features(x))


class SwinTransformer(_SwinTransformer):
    """Swin Transformer, from images (B, I, Y, X) to logits (B, num_classes); features are (B, Y, X, C).

    Args:
        img_size: Height and width of the images, in pixels.
        patch_size: Height and width of a patch, in pixels; divides ``img_size``.
        in_chans: Channels of the images.
        num_classes: Number of logits; 0 leaves the head's linear layer out.
        global_pool: ``"avg"``, ``"max"`` or ``"avgmax"`` (mean of both) over the image; ``""`` none.
        embed_dim: Channels in the first stage; each later one doubles them.
        depths: Number of blocks of each stage.
        num_heads: Heads of each stage's attention.
        head_dim: Channels per head, one number or one a stage; channels over heads unless given.
        window_size: Rows and columns of a window: one number, a pair, or one of these a stage.
        always_partition: Keep windows and shifts even where a stage's image is smaller than a window.
        strict_img_size: Raise an error for images of another size than ``img_size``.
        dynamic_img_size: The same as ``strict_img_size=False``: accept images of any size that the patch divides. The
            windows stay those of ``img_size``.
        mlp_ratio: Hidden features of an MLP over its channels, one number or one a stage.
        qkv_bias: Whether the qkv projections have biases.
        drop_rate: Dropout rate before the head.
        proj_drop_rate: Dropout rate after the blocks' linear layers.
        attn_drop_rate: Dropout rate of the attention weights.
        drop_path_rate: Stochastic depth (arXiv 1603.09382): 0 in the first block, rising linearly to this in the last.
        norm_layer: Callable that makes a LayerNorm; its eps counts.
        weight_init: ``""`` as in timm, ``"skip"`` as in PyTorch (tables of biases are then zero).
        normalize: As for :class:`vitkernels.models.VisionTransformer`.
        device, dtype: Device and dtype of the parameters.

    Raises:
        ValueError: Arguments do not fit each other, or a pool is unknown.
        NotImplementedError: An argument of timm's asks for something that is not supported here.
        TypeError: Neither this class nor timm's has such an argument.
    """

    _UNDECAYED = ("relative_position_bias_table",)

    def __init__(
        self,
        img_size: int | Pair = 224,
        patch_size: int | Pair = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        head_dim: int | Sequence[int | None] | None = None,
        window_size: int | Pair | Sequence[int | Pair] = 7,
        always_partition: bool = False,
        strict_img_size: bool = True,
        dynamic_img_size: bool = False,
        mlp_ratio: float | Sequence[float] = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        *,
        norm_layer: Callable[..., nn.Module] | str | None = nn.LayerNorm,
        weight_init: str = "",
        normalize: tuple[Sequence[float], Sequence[float]] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **others,
    ) -> None:
        refuse(type(self), others, {"embed_layer": None})
        head_dims, ratios = (
            _per_stage(*given, len(depths)) for given in (("head_dim", head_dim), ("mlp_ratio", mlp_ratio))
        )
        of_block = {
            "always_partition": always_partition,
            "qkv_bias": qkv_bias,
            "proj_drop": proj_drop_rate,
            "attn_drop": attn_drop_rate,
        }
        of_stages = [
            {**of_block, "head_dim": dim, "mlp_ratio": ratio} for dim, ratio in zip(head_dims, ratios, strict=True)
        ]
        super().__init__(
            SwinTransformerBlock,
            of_stages,
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            embed_dim=embed_dim,
            depths=depths,
            num_heads=num_heads,
            window_size=window_size,
            strict_img_size=strict_img_size and not dynamic_img_size,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            norm_layer=norm_layer,
            weight_init=weight_init,
            normalize=normalize,
            device=device,
            dtype=dtype,
        )


class SwinTransformerV2(_SwinTransformer):
    """Swin Transformer V2: norms after the branches, cosine attention, and biases that an MLP makes of positions.

    Args:
        act_layer: As for :func:`vitkernels.layers.create_activation`.
        pretrained_window_sizes: For each stage the window that positions are measured by, one number or a pair; 0 for
            the present window.
        weight_init: ``""`` as in timm, where each block begins as the identity; ``"skip"`` as in PyTorch.

    The other arguments are those of :class:`SwinTransformer`, except ``head_dim`` and ratios by stage.

    Raises:
        ValueError, NotImplementedError, TypeError: As for :class:`SwinTransformer`.
    """

    _UNDECAYED = ("cpb_mlp", "logit_scale")

    def __init__(
        self,
        img_size: int | Pair = 224,
        patch_size: int | Pair = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int | Pair | Sequence[int | Pair] = 7,
        always_partition: bool = False,
        strict_img_size: bool = True,
        dynamic_img_size: bool = False,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        act_layer: Callable[[], nn.Module] | str | None = None,
        norm_layer: Callable[..., nn.Module] | str | None = nn.LayerNorm,
        pretrained_window_sizes: Sequence[int | Pair] = (0, 0, 0, 0),
        *,
        weight_init: str = "",
        normalize: tuple[Sequence[float], Sequence[float]] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **others,
    ) -> None:
        refuse(type(self), others, {})
        if len(pretrained_window_sizes) < len(depths):
            raise ValueError(f"pretrained_window_sizes is {pretrained_window_sizes}; expected one for each stage")
        of_block = {
            "always_partition": always_partition,
            "mlp_ratio": mlp_ratio,
            "qkv_bias": qkv_bias,
            "proj_drop": proj_drop_rate,
            "attn_drop": attn_drop_rate,
            "act_layer": act_layer,
        }
        of_stages = [{**of_block, "pretrained_window_size": size} for size in pretrained_window_sizes]
        super().__init__(
            SwinTransformerV2Block,
            of_stages,
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            embed_dim=embed_dim,
            depths=depths,
            num_heads=num_heads,
            window_size=window_size,
            strict_img_size=strict_img_size and not dynamic_img_size,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            norm_layer=norm_layer,
            weight_init=weight_init,
            normalize=normalize,
            device=device,
            dtype=dtype,
        )

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialize linear layers randomly, and the norms after branches with 0, as timm does."""
        super().init_weights()
        for block in self.modules():
            if isinstance(block, SwinTransformerV2Block):
                for parameter in (*block.norm1.parameters(), *block.norm2.parameters()):
                    nn.init.zeros_(parameter)


def _halved(size: Pair) -> Pair:
    return tuple((n + 1) // 2 for n in size)


def _per_stage(name: str, value: object, stages: int) -> tuple:
    values = tuple(value) if isinstance(value, list | tuple) else (value,) * stages
    if len(values) != stages:
        raise ValueError(f"{name} is {value}; expected one number, or one for each of {stages} stages")
    return values


def _window_sizes(value: int | Pair | Sequence[int | Pair], stages: int) -> list[Pair]:
    """Return each stage's window; two numbers are always one window of so many rows and columns."""
    if isinstance(value, list | tuple) and len(value) == 2 and not any(isinstance(n, list | tuple) for n in value):
        value = (tuple(value),) * stages
    sizes = [to_pair(size) for size in _per_stage("window_size", value, stages)]
    if min(n for size in sizes for n in size) < 1:
        raise ValueError(f"window_size is {value}; expected 1 at least")
    return sizes
