"""Vision Transformer (arXiv 2010.11929), with timm's argument names, defaults and state-dict keys.

Checkpoints load with ``strict=True`` in both directions between this and a timm ``VisionTransformer`` with the same
arguments.
Shape letters: B batch, R prefix tokens (class and register tokens), N patches, C channels.
"""

from __future__ import annotations

import collections
import functools
import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitkernels.layers import (
    Block,
    Linear,
    PatchDropout,
    PatchEmbed,
    SwiGLU,
    SwiGLUPacked,
    fused,
    resample_pos_embed,
    sincos1d,
    sincos2d,
)
from vitkernels.models import convert
from vitkernels.models._arguments import check_weight_init, norm_factory, refuse, taken_indices

POOLS = ("", "token", "avg", "avgmax", "max")
POS_EMBEDS = ("learn", "none", "sincos1d", "sincos2d")

# Arguments of timm that have no counterpart here, with the value that has no effect.
_UNSUPPORTED = {
    "scale_attn_norm": False,
    "scale_mlp_norm": False,
    "dynamic_img_pad": False,
    "fix_init": False,
    "embed_layer": None,
    "embed_norm_layer": None,
    "attn_layer": None,
}


class VisionTransformer(nn.Module):
    """Vision Transformer, from images (B, I, Y, X) to logits (B, num_classes).

    Args:
        img_size: Height and width of the images, in pixels.
        patch_size: Height and width of a patch, in pixels; divides ``img_size``.
        in_chans: Channels of the images.
        num_classes: Number of logits; 0 leaves the head out.
        global_pool: Input of the head: ``"token"`` the class token; ``"avg"``, ``"max"`` or ``"avgmax"`` (mean of
            both) over the patches; ``""`` every token.
        embed_dim: Channels C of a token.
        depth: Number of blocks.
        num_heads: Heads of each attention; divides ``embed_dim``.
        mlp_ratio: Hidden features of an MLP divided by ``embed_dim``.
        qkv_bias: Whether the qkv projections have biases.
        qk_norm: Whether each head's queries and keys are normalised (arXiv 2302.05442).
        proj_bias: Whether the blocks' other linear layers have biases.
        init_values: Initial value of LayerScale (arXiv 2103.17239); no LayerScale if None or 0.
        class_token: Whether there is a class token.
        pos_embed: ``"learn"``; ``"none"``; ``"sincos1d"`` over the sequence (arXiv 1706.03762); ``"sincos2d"`` over the
            grid of patches (arXiv 2111.06377), see :mod:`vitkernels.layers.pos_embed`. The two fixed tables are a
            persistent buffer, which no optimizer changes. Its key in the state dict is ``pos_embed``, as for a learned
            one, so that checkpoints of either kind load, and a resampled table is saved with the weights.
        no_embed_class: Position embedding only for the patches.
        reg_tokens: Number of register tokens (arXiv 2309.16588), after the class token.
        pre_norm: A LayerNorm before the blocks, and no bias in the patch embedding, as in CLIP.
        final_norm: A LayerNorm after the blocks.
        fc_norm: Whether that LayerNorm comes after pooling, not before; None: it does if the pool is over patches.
        pool_include_prefix: Pool over the prefix tokens too.
        dynamic_img_size: Accept images of any size that the patch divides, and resample the position embedding. A
            program of ``torch.export`` does so, too, for at least two patches in each direction, which PyTorch's
            interpolation requires there.
        drop_rate: Dropout rate before the head.
        pos_drop_rate: Dropout rate after the position embedding.
        patch_drop_rate: Fraction of the patches dropped in training (arXiv 2212.00794).
        proj_drop_rate: Dropout rate after the blocks' linear layers.
        attn_drop_rate: Dropout rate of the attention weights.
        drop_path_rate: Stochastic depth (arXiv 1603.09382): 0 in the first block, rising linearly to this in the last.
        weight_init: ``""`` as in timm, ``"skip"`` as in PyTorch (position, class and register tokens are then zero).
        norm_layer: Callable that makes a LayerNorm, for an eps other than the default 1e-6:
            ``functools.partial(nn.LayerNorm, eps=1e-5)``.
        act_layer: As for :func:`vitkernels.layers.create_activation`; None for GELU.
        representation_size: Features of one tanh hidden layer before the head, ``pre_logits.fc``, as in the
            original's pre-training (arXiv 2010.11929 §3.1); None leaves it out.
        block_fn: Callable that makes a block from the arguments of :class:`vitkernels.layers.Block`, ``qk_norm`` and
            ``mlp_layer`` only if they are given; None for that class.
        mlp_layer: As for :class:`vitkernels.layers.Block`, such as :class:`vitkernels.layers.SwiGLUPacked` in DINOv2's
            giant, beside ``act_layer="silu"``; None for a plain MLP.
        use_mask_token: Whether there is a ``mask_token``, for :meth:`forward_features` with a mask.
        normalize: ``(mean, std)``, one number per channel: images are uint8, 0..255, or floating point, 0..1, and the
            patch embedding normalises them. It is not in the state dict. None: the caller has normalised the images.
        device, dtype: Device and dtype of the parameters.

    Raises:
        ValueError: Arguments exclude one another, or a name is unknown.
        NotImplementedError: An argument of timm's asks for something that is not supported here.
        TypeError: Neither this class nor timm's has such an argument.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        *,
        qk_norm: bool = False,
        proj_bias: bool = True,
        init_values: float | None = None,
        class_token: bool = True,
        pos_embed: str = "learn",
        no_embed_class: bool = False,
        reg_tokens: int = 0,
        pre_norm: bool = False,
        final_norm: bool = True,
        fc_norm: bool | None = None,
        pool_include_prefix: bool = False,
        dynamic_img_size: bool = False,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        patch_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        weight_init: str = "",
        norm_layer: Callable[..., nn.Module] | str | None = None,
        act_layer: Callable[[], nn.Module] | str | None = None,
        representation_size: int | None = None,
        block_fn: Callable[..., nn.Module] | None = None,
        mlp_layer: Callable[..., nn.Module] | None = None,
        use_mask_token: bool = False,
        normalize: tuple[Sequence[float], Sequence[float]] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **others,
    ) -> None:
        super().__init__()
        refuse(type(self), others, _UNSUPPORTED)
        _check_pool(global_pool, class_token)
        pos_embed = pos_embed or "none"
        if pos_embed not in POS_EMBEDS:
            raise ValueError(f"unknown pos_embed {pos_embed!r}; expected one of {', '.join(POS_EMBEDS)}")
        check_weight_init(weight_init)
        dd = {"device": device, "dtype": dtype}
        norm = norm_factory(norm_layer)
        use_fc_norm = global_pool in ("avg", "avgmax", "max") if fc_norm is None else fc_norm

        self.num_classes = num_classes
        self.global_pool = global_pool
        self.num_features = self.embed_dim = embed_dim
        self.head_hidden_size = representation_size or embed_dim
        self.has_class_token = class_token
        self.num_reg_tokens = reg_tokens
        self.num_prefix_tokens = int(class_token) + reg_tokens
        self.no_embed_class = no_embed_class
        self.pool_include_prefix = pool_include_prefix
        self.dynamic_img_size = dynamic_img_size
        self.grad_checkpointing = False

        self.patch_embed = PatchEmbed(
            img_size,
            patch_size,
            in_chans,
            embed_dim,
            bias=not pre_norm,  # the following norm has a bias
            strict_img_size=not dynamic_img_size,
            normalize=normalize,
            **dd,
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim, **dd)) if class_token else None
        self.reg_token = nn.Parameter(torch.zeros(1, reg_tokens, embed_dim, **dd)) if reg_tokens else None
        self.mask_token = nn.Parameter(torch.zeros(1, 1, embed_dim, **dd)) if use_mask_token else None
        embed_prefix = 0 if no_embed_class else self.num_prefix_tokens
        embed_len = embed_prefix + self.patch_embed.num_patches
        if pos_embed == "learn":
            self.pos_embed = nn.Parameter(torch.zeros(1, embed_len, embed_dim, **dd))
        elif pos_embed == "sincos1d":
            self.register_buffer("pos_embed", sincos1d(embed_len, embed_dim, **dd))
        elif pos_embed == "sincos2d":
            grid_size = self.patch_embed.grid_size
            self.register_buffer("pos_embed", sincos2d(grid_size, embed_dim, num_prefix_tokens=embed_prefix, **dd))
        else:
            self.pos_embed = None
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.patch_drop = PatchDropout(patch_drop_rate, self.num_prefix_tokens) if patch_drop_rate else nn.Identity()
        self.norm_pre = norm(embed_dim, **dd) if pre_norm else nn.Identity()
        more = {name: value for name, value in (("qk_norm", qk_norm), ("mlp_layer", mlp_layer)) if value}
        make_block = functools.partial(block_fn or Block, **more)
        self.register_module("rel_pos_bias", None)  # BEiT's, which stands here in its state dict
        self.blocks = nn.Sequential(
            *(
                make_block(
                    embed_dim,
                    num_heads,
                    mlp_ratio,
                    qkv_bias=qkv_bias,
                    proj_bias=proj_bias,
                    proj_drop=proj_drop_rate,
                    attn_drop=attn_drop_rate,
                    init_values=init_values,
                    drop_path=drop_path,
                    act_layer=act_layer,
                    norm_layer=norm,
                    **dd,
                )
                for drop_path in torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
            )
        )
        self.norm = norm(embed_dim, **dd) if final_norm and not use_fc_norm else nn.Identity()
        self.fc_norm = norm(embed_dim, **dd) if final_norm and use_fc_norm else nn.Identity()
        if representation_size:
            hidden = Linear(embed_dim, representation_size, **dd)
            self.pre_logits = nn.Sequential(collections.OrderedDict(fc=hidden, act=nn.Tanh()))
        else:
            self.pre_logits = nn.Identity()
        self.head_drop = nn.Dropout(drop_rate)
        self.head = Linear(self.head_hidden_size, num_classes, **dd) if num_classes else nn.Identity()
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
    ) -> VisionTransformer:
        """Make a model with the weights of timm's ``VisionTransformer``: ViT, DeiT, DINOv2, CLIP and the like.

        Args:
            source: A model of timm; or a file or directory of weights, see
                :func:`vitkernels.models.weights.read_weights`; or a name for ``timm.create_model``.
            architecture: Name for ``timm.create_model`` if the source is a file; a directory has it in its config.json.
            pretrained: Let timm download the weights of a name.
            features_only: Leave out the head and the pool; the model then returns all tokens (B, R + N, C).
            timm_args: Further arguments of ``timm.create_model``, for a name or a path. With another ``img_size`` timm
                resamples the positions of pretrained weights.

        Raises:
            ValueError: The weights do not fit (the error lists all differences), or the file does not contain tensors.
            NotImplementedError: The model has an unsupported part: attention pooling (SigLIP) without
                ``features_only``, norms inside the branches, ….
        """
        config, state = convert.timm_source(source, architecture, pretrained, features_only, timm_args)
        return convert.build(cls, config, state, source)

    @classmethod
    def from_torchvision(
        cls,
        source: nn.Module | str | os.PathLike,
        *,
        architecture: str | None = None,
        weights: str | None = "DEFAULT",
        features_only: bool = False,
        **torchvision_args,
    ) -> VisionTransformer:
        """Make a model with the weights of torchvision's ``VisionTransformer``, with its old or new key names.

        Args:
            source: A model of torchvision; or a file or directory of weights; or a name, as ``"vit_b_16"``.
            architecture: The name if the source is a path.
            weights: Weights that torchvision downloads for a name; None for none.
            features_only: As for :meth:`from_timm`.
            torchvision_args: Further arguments of ``torchvision.models.get_model``, for a name or a path.

        Raises:
            ValueError, NotImplementedError: As for :meth:`from_timm`.
        """
        config, state = convert.torchvision_source(source, architecture, weights, features_only, torchvision_args)
        return convert.build(cls, config, state, source)

    @classmethod
    def from_hf(cls, source: nn.Module | str | os.PathLike, *, features_only: bool = False) -> VisionTransformer:
        """Make a model with the weights of transformers' ViT, DeiT, DINOv2, SigLIP or CLIP vision tower.

        The model returns the same as the source: logits, image embeddings (CLIP with its projection) or
        ``pooler_output``. For DINOv2 with registers, the class token's position is added to the token, as in timm.

        Args:
            source: A model of transformers (release 4 or 5); or a directory with config.json and weights; or the name
                of a repository on the Hugging Face Hub. Of a CLIP or SigLIP with two towers, the vision tower is used.
            features_only: As for :meth:`from_timm`. It is needed for SigLIP's attention pool, DINOv2's classifier and
                DeiT's pair of heads, which have no counterpart here.

        Raises:
            ValueError, NotImplementedError: As for :meth:`from_timm`.
        """
        config, state = convert.hf_source(source, features_only)
        return convert.build(cls, config, state, source)

    def to_timm(self) -> nn.Module:
        """Return timm's ``VisionTransformer`` with copies of these weights, and with the same names in the state dict.

        Raises:
            NotImplementedError: The model has ``representation_size``, ``normalize`` or a mask token.
        """
        from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer

        ours_alone = self.patch_embed.normalize is not None or self.mask_token is not None
        if ours_alone or not isinstance(self.pre_logits, nn.Identity):
            raise NotImplementedError("timm's model has no representation_size, no normalize and no mask token")
        config = convert.timm_config(self)
        config["mlp_layer"] = convert.timm_mlp_layer(config["mlp_layer"])
        return convert.to_timm(self, TimmVisionTransformer, weight_init="skip", **config)

    def init_weights(self) -> None:
        """Initialize linear layers, position embedding, class and register tokens randomly, as timm does."""
        self._init_linear_layers_and_tokens()
        for block in self.blocks:
            if isinstance(block.mlp, SwiGLU | SwiGLUPacked):
                block.mlp.init_weights()

    @torch.no_grad()
    def _init_linear_layers_and_tokens(self) -> None:
        if isinstance(self.pos_embed, nn.Parameter):
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for token in (self.cls_token, self.reg_token):
            if token is not None:
                nn.init.normal_(token, std=1e-6)
        if self.mask_token is not None:  # as in BEiT
            nn.init.trunc_normal_(self.mask_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters that optimizers should not decay."""
        return {"pos_embed", "cls_token", "reg_token"} | self._mask_token_name()

    def _mask_token_name(self) -> set[str]:
        return set() if self.mask_token is None else {"mask_token"}

    def group_matcher(self, coarse: bool = False) -> dict:
        """Return the patterns that group parameters for timm's layer-wise learning rates."""
        return {
            "stem": "|".join((r"^cls_token|reg_token|pos_embed|patch_embed|norm_pre", *self._mask_token_name())),
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward instead of saving them (arXiv 1604.06174)."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """Return the head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one, with PyTorch's initialisation, and the pool if one is given.

        Raises:
            ValueError: The pool is unknown, or ``"token"`` without a class token.
        """
        if global_pool is not None:
            _check_pool(global_pool, self.has_class_token)
            self.global_pool = global_pool
        like = self.patch_embed.proj.weight
        self.num_classes = num_classes
        self.head = (
            Linear(self.head_hidden_size, num_classes, device=like.device, dtype=like.dtype)
            if num_classes
            else nn.Identity()
        )
        self.head.train(self.training)

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Accept images of another size from now on; a learned position embedding is resampled into a new Parameter.

        Raises:
            ValueError: The patch does not divide the image.
            NotImplementedError: ``patch_size`` differs from the model's.
        """
        if patch_size is not None and patch_size not in (self.patch_embed.patch_size, self.patch_embed.patch_size[0]):
            raise NotImplementedError(f"patch_size is {patch_size}; expected the model's {self.patch_embed.patch_size}")
        if img_size is None:
            return
        old_size = self.patch_embed.grid_size
        self.patch_embed.set_input_size(img_size)
        if self.pos_embed is None or self.patch_embed.grid_size == old_size:
            return
        resampled = self._resampled(self.pos_embed.detach(), self.patch_embed.grid_size, old_size)
        if isinstance(self.pos_embed, nn.Parameter):
            resampled = nn.Parameter(resampled, requires_grad=self.pos_embed.requires_grad)
        self.pos_embed = resampled

    def _resampled(self, pos_embed: Tensor, new_size: tuple[int, int], old_size: tuple[int, int]) -> Tensor:
        prefix = 0 if self.no_embed_class else self.num_prefix_tokens
        return resample_pos_embed(pos_embed, new_size, old_size, prefix)

    def _embed(self, images: Tensor, mask: Tensor | None = None, visible: Tensor | None = None) -> Tensor:
        """Map images (B, I, Y, X) to the tokens (B, R + N, C) that enter the blocks."""
        if mask is not None and self.mask_token is None:
            raise ValueError("a mask is given, but the model has no mask token; make it with use_mask_token=True")
        pos_embed = self.pos_embed
        if pos_embed is not None and self.dynamic_img_size:
            self.patch_embed.check_images(images)  # before their shape is used
            grid_size = self.patch_embed.grid_of(tuple(images.shape[2:]))
            pos_embed = self._resampled(pos_embed, grid_size, self.patch_embed.grid_size)
        prefix = [token for token in (self.cls_token, self.reg_token) if token is not None]
        x = self.patch_embed(
            images,
            pos_embed=pos_embed,
            prefix_tokens=torch.cat(prefix, dim=1) if prefix else None,
            pos_embed_prefix=not self.no_embed_class,
            mask=mask,
            mask_token=None if mask is None else self.mask_token,
            visible=visible,
        )
        if pos_embed is not None:
            x = self.pos_drop(x)
        return self.norm_pre(self.patch_drop(x))

    def _pack(self, x: Tensor, num_visible: Tensor) -> tuple[Tensor, fused.Packed]:
        """Return of tokens (B, R + V, C) the first R + ``num_visible`` of each image, (1, T, C), and where each begins.

        Raises:
            TypeError: ``num_visible`` is no tensor of integers.
            ValueError: ``num_visible`` is no (B,), or the model drops some of the patches that it counts.
        """
        if not isinstance(num_visible, Tensor) or num_visible.dtype not in (torch.int32, torch.int64):
            given = getattr(num_visible, "dtype", type(num_visible).__name__)
            raise TypeError(f"num_visible is a {given}; expected a tensor of int32 or int64")
        if num_visible.shape != x.shape[:1]:
            raise ValueError(f"num_visible has shape {tuple(num_visible.shape)}; expected ({x.shape[0]},), the images")
        if isinstance(self.patch_drop, PatchDropout):
            raise ValueError("num_visible is given, but patch_drop_rate drops some of the patches that it counts")
        valid = torch.arange(x.shape[1], device=x.device) < self.num_prefix_tokens + num_visible.unsqueeze(1)
        return fused.pack(x, valid)[:2]

    def _run_block(self, block: nn.Module, x: Tensor, *images: fused.Packed) -> Tensor:
        beside = *self._beside_tokens(), *images
        return checkpoint(block, x, *beside, use_reentrant=False) if self.grad_checkpointing else block(x, *beside)

    def _beside_tokens(self) -> tuple[object, ...]:
        """Return what each block takes beside its tokens."""
        return ()

    def forward_features(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        visible: Tensor | None = None,
        num_visible: Tensor | None = None,
    ) -> Tensor:
        """Map images (B, I, Y, X) to tokens (B, R + N, C) after the blocks and ``norm``.

        Args:
            x: The images.
            mask: (B, N), bool: where it is true, the mask token takes a patch's place, as BEiT trains
                (:func:`vitkernels.layers.blockwise_mask`).
            visible: (B, V), indices of patches: these alone are embedded, and the result is (B, R + V, C), as MAE
                trains its encoder (:func:`vitkernels.layers.random_mask`).
            num_visible: (B,), integers from 0 to V: so many of each image's ``visible`` patches enter the blocks, the
                first ones. The tokens of all images are then packed into one row without padding, and the result is
                (T, C): R + ``num_visible[0]`` tokens of the first image, then those of the second, ….

        Raises:
            ValueError: The images do not fit, ``mask`` and ``visible`` are both given, ``num_visible`` comes without
                ``visible`` or beside ``patch_drop_rate``, or the model has no mask token for a mask; or it has biases
                by relative position, which need all patches.
            NotImplementedError: A block cannot take packed images: it is BEiT's or EVA's, or a part of it has a hook.
        """
        if num_visible is not None and visible is None:
            raise ValueError("num_visible is given without visible, the patches that it counts")
        x, packed = self._embed(x, mask, visible), ()
        if num_visible is not None:
            x, *packed = self._pack(x, num_visible)
        for block in self.blocks:
            x = self._run_block(block, x, *packed)
        x = self.norm(x)
        return x if num_visible is None else x[0]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> list | tuple[Tensor, list] | dict[str, Tensor | list]:
        """Return the outputs of selected blocks, in timm's formats.

        Args:
            x: Images (B, I, Y, X).
            indices: An int n for the last n blocks, or a list of block indices (negative ones count from the end); None
                for all.
            return_prefix_tokens: Also return each block's prefix tokens (B, R, C).
            norm: Apply ``norm`` to each.
            stop_early: Skip the blocks after the last selected one.
            output_fmt: ``"NCHW"`` for maps (B, C, rows, columns), ``"NLC"`` for patch tokens (B, N, C).
            intermediates_only: Leave the final features out.
            output_dict: Return a dictionary.

        Returns:
            ``(features, intermediates)``, with features (B, R + N, C) as from :meth:`forward_features`, or only
            ``intermediates``. Each intermediate is a tensor, or (tensor, prefix tokens) with ``return_prefix_tokens``.
            A dictionary has the keys ``image_features``, ``image_intermediates`` and ``image_intermediates_prefix``.

        Raises:
            ValueError: ``output_fmt`` is unknown, or an index is out of range.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"unknown output_fmt {output_fmt!r}; expected 'NCHW' or 'NLC'")
        wanted = taken_indices("block", len(self.blocks), indices)
        size = tuple(x.shape[2:])
        x = self._embed(x)
        grid_size = self.patch_embed.grid_of(size)
        intermediates, prefixes = [], []
        for i, block in enumerate(self.blocks[: max(wanted) + 1] if stop_early else self.blocks):
            x = self._run_block(block, x)
            if i not in wanted:
                continue
            tokens = self.norm(x) if norm else x
            prefixes.append(tokens[:, : self.num_prefix_tokens])
            patches = tokens[:, self.num_prefix_tokens :]
            if output_fmt == "NCHW":
                patches = patches.unflatten(1, grid_size).permute(0, 3, 1, 2).contiguous()
            intermediates.append(patches)
        return_prefix_tokens = return_prefix_tokens and self.num_prefix_tokens > 0
        if output_dict:
            result = {"image_intermediates": intermediates}
            if return_prefix_tokens:
                result["image_intermediates_prefix"] = prefixes
            if not intermediates_only:
                result["image_features"] = self.norm(x)
            return result
        if return_prefix_tokens:
            intermediates = list(zip(intermediates, prefixes, strict=True))
        return intermediates if intermediates_only else (self.norm(x), intermediates)

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> list:
        """Return the intermediates of :meth:`forward_intermediates`, with the arguments of DINO and DINOv2.

        Args:
            x: Images (B, I, Y, X).
            n: An int n for the last n blocks, or block indices.
            reshape: Return maps (B, C, rows, columns) instead of patch tokens (B, N, C).
            return_prefix_tokens: Also return each block's prefix tokens.
            norm: Apply ``norm`` to each.
        """
        return self.forward_intermediates(
            x,
            n,
            return_prefix_tokens=return_prefix_tokens,
            norm=norm,
            output_fmt="NCHW" if reshape else "NLC",
            intermediates_only=True,
        )

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """Pool tokens (B, R + N, C) to (B, C); return them unchanged if the pool is ``""``."""
        pool_type = self.global_pool if pool_type is None else pool_type
        _check_pool(pool_type, self.has_class_token)
        if not pool_type:
            return x
        if pool_type == "token":
            return x[:, 0]
        if not self.pool_include_prefix:
            x = x[:, self.num_prefix_tokens :]
        if pool_type == "avg":
            return x.mean(dim=1)
        if pool_type == "max":
            return x.amax(dim=1)
        return 0.5 * (x.amax(dim=1) + x.mean(dim=1))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map tokens (B, R + N, C) to logits or, with ``pre_logits``, to the input of the head."""
        x = self.head_drop(self.pre_logits(self.fc_norm(self.pool(x))))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, I, Y, X) to logits (B, num_classes), or (B, R + N, num_classes) if the pool is ``""``.

        Raises:
            ValueError: The images' rank, number of channels or size does not fit the model.
            TypeError: The images are not a floating-point tensor (with ``normalize``, nor a uint8 tensor).
        """
        return self.forward_head(self.forward_features(x))


def _check_pool(pool: str, class_token: bool) -> None:
    if pool in ("map", "prr"):
        raise NotImplementedError(f"attention pooling ({pool!r}) is not supported; expected one of {POOLS}")
    if pool not in POOLS:
        raise ValueError(f"unknown pool {pool!r}; expected one of {POOLS}")
    if pool == "token" and not class_token:
        raise ValueError("the 'token' pool needs a class token: class_token=True, or another pool")
