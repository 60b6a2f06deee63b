"""Images as rows of tokens and back, and what blocks on images share. No rules."""

from __future__ import annotations

from torch import Tensor, nn

from vitkernels.layers import records


def tokens_of(image: Tensor) -> Tensor:
    """Return (B, Y, X, C) as (B, Y · X, C), contiguous: a view if the image is."""
    return image.contiguous().flatten(1, 2)


def tokens_of_channels_first(image: Tensor) -> Tensor:
    """Return (B, C, Y, X) as (B, Y · X, C), contiguous: a view if the image's memory format is channels_last."""
    return tokens_of(image.permute(0, 2, 3, 1))


def channels_first(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """View (B, Y · X, C) as (B, C, Y, X), whose memory format is channels_last."""
    return tokens.unflatten(1, size).permute(0, 3, 1, 2)


def pointwise(conv: nn.Conv2d) -> records.Linear:
    """Read a convolution with kernels of one pixel as the linear layer that it is."""
    return records.Linear(records.parameter(conv, "weight").flatten(1), records.parameter(conv, "bias"))


def pointwise_limit(conv: nn.Conv2d) -> str | None:
    """Return why ``conv`` is no linear layer, or None if it is one."""
    if conv.kernel_size != (1, 1) or conv.stride != (1, 1) or conv.groups != 1 or conv.padding not in ((0, 0), "valid"):
        return f"a convolution has kernel {conv.kernel_size}, stride {conv.stride} and groups {conv.groups}, not all 1"
    return None


def whole_windows(size: tuple[int, int], window: tuple[int, int]) -> bool:
    """Tell whether an image consists of whole windows."""
    return size[0] % window[0] == 0 and size[1] % window[1] == 0
