"""Patch embedding: images to tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from vitkernels.layers import fused


def to_pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """Return ``size`` as (height, width)."""
    return tuple(size) if isinstance(size, Iterable) else (size, size)


class PatchEmbed(nn.Module):
    """Map images to tokens, with position embedding and prefix tokens, in one op (arXiv 2010.11929).

    Args:
        img_size: Height and width of the images, in pixels; the patch size divides both.
        patch_size: Height and width of a patch, in pixels.
        in_chans: Channels of the images.
        embed_dim: Channels of the tokens.
        bias: Whether the projection has a bias.
        strict_img_size: Raise an error for images of another size than ``img_size``.
        normalize: ``(mean, std)`` as for :func:`vitkernels.ops.patch_embed`: images are uint8, 0..255, or floating
            point, 0..1, and the op normalises them. None: the caller has normalised them.
        norm_layer: Callable that makes a norm of the tokens, as in Swin; there are then no position embedding and
            prefix tokens. None: no norm.

    Raises:
        ValueError: The patch does not divide the image.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        bias: bool = True,
        strict_img_size: bool = True,
        *,
        normalize: tuple[Sequence[float], Sequence[float]] | None = None,
        norm_layer: Callable[..., nn.Module] | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.patch_size = to_pair(patch_size)
        self.strict_img_size = strict_img_size
        self.normalize = normalize
        self.set_input_size(img_size)
        self.proj = nn.Conv2d(
            in_chans, embed_dim, self.patch_size, stride=self.patch_size, bias=bias, device=device, dtype=dtype
        )
        self.norm = norm_layer(embed_dim, device=device, dtype=dtype) if norm_layer else nn.Identity()

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Set the size of images in later calls."""
        img_size = to_pair(img_size)
        self.grid_size = self.grid_of(img_size)
        self.img_size = img_size
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def grid_of(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Return the number of patches (down, across) of an image of (height, width).

        Raises:
            ValueError: The patch does not divide the image.
        """
        (height, width), (patch_height, patch_width) = img_size, self.patch_size
        if height < patch_height or width < patch_width or height % patch_height or width % patch_width:
            raise ValueError(
                f"image of {height}×{width} pixels does not divide into patches of {patch_height}×{patch_width}; "
                "crop or resize it to a multiple"
            )
        return height // patch_height, width // patch_width

    def check_images(self, images: Tensor) -> None:
        """Require images (B, I, Y, X) of a dtype, size and number of channels that this module accepts.

        Raises:
            ValueError: The rank, the number of channels or the size does not fit.
            TypeError: It is not a floating-point tensor (with ``normalize``, nor a uint8 tensor).
        """
        kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
        takes_uint8 = self.normalize is not None
        if not isinstance(images, Tensor) or not (images.is_floating_point() or (takes_uint8 and kind == torch.uint8)):
            wanted = "of 0 to 1, or uint8" if takes_uint8 else "scaled and normalised, or normalize=(mean, std)"
            raise TypeError(f"images are {kind}; expected floating-point values, {wanted}")
        if images.ndim != 4:
            raise ValueError(f"images have shape {tuple(images.shape)}; expected (batch, channels, height, width)")
        if images.shape[1] != self.proj.in_channels:
            raise ValueError(f"images have {images.shape[1]} channels; expected {self.proj.in_channels}")
        size = tuple(images.shape[2:])
        if self.strict_img_size and size != self.img_size:
            raise ValueError(
                f"images are {size[0]}×{size[1]} pixels; expected {self.img_size[0]}×{self.img_size[1]} "
                "(dynamic_img_size=True takes any size, set_input_size another one)"
            )
        self.grid_of(size)

    def forward(
        self,
        images: Tensor,
        *,
        pos_embed: Tensor | None = None,
        prefix_tokens: Tensor | None = None,
        pos_embed_prefix: bool = True,
        mask: Tensor | None = None,
        mask_token: Tensor | None = None,
        visible: Tensor | None = None,
    ) -> Tensor:
        """Map images (B, I, Y, X) to tokens (B, R + N, C), with arguments as for :func:`vitkernels.ops.patch_embed`."""
        self.check_images(images)
        if not isinstance(self.norm, nn.Identity) and not (pos_embed is prefix_tokens is mask is None):
            raise ValueError("pos_embed, prefix_tokens or mask beside a norm, which would see them; add them behind it")
        tokens = fused.patch_embed(
            self.proj,
            images,
            pos_embed=pos_embed,
            prefix_tokens=prefix_tokens,
            pos_embed_prefix=pos_embed_prefix,
            normalize=self.normalize,
            mask=mask,
            mask_token=mask_token,
            visible=visible,
        )
        return self.norm(tokens)
