"""Reasons why a module cannot run fused that several libraries' rules share: each returns one, or None."""

from __future__ import annotations

from torch import nn

from vitkernels.ops._attention.checks import MAX_HEAD_DIM


def head_dim_limit(head_dim: int) -> str | None:
    """No attention kernel supports heads of this width."""
    if head_dim > MAX_HEAD_DIM:
        return f"its head dim is {head_dim}; the attention kernel takes up to {MAX_HEAD_DIM}"
    return None


def packed_heads_limit(attn: nn.Module) -> str | None:
    """:func:`head_dim_limit` of an attention whose ``qkv`` maps C channels to 3·C."""
    return head_dim_limit(attn.qkv.in_features // attn.num_heads)


def ignored_adapter(attn: nn.Module) -> str | None:
    """An adapter on ``qkv`` does nothing: timm adds biases of its own in one product with the weight of ``qkv``."""
    own, qkv = vars(attn), attn._modules.get("qkv")
    biased = attn._parameters.get("q_bias") is not None and not own.get("qkv_bias_separate")
    if biased and qkv is not None and "base_layer" in qkv._modules:
        return "timm reads the weight of qkv and does not call it, so an adapter on qkv does nothing until it is merged"
    return None


def block_heads_limit(block: nn.Module) -> str | None:
    """:func:`packed_heads_limit` of a block's attention."""
    return packed_heads_limit(block.attn)


def layer_scales_limit(block: nn.Module, names: tuple[str, str] = ("ls1", "ls2")) -> str | None:
    """A LayerScale works in place."""
    scales = (block._modules[name] for name in names)
    return "its LayerScale works in place" if any(vars(scale).get("inplace", False) for scale in scales) else None


def patches_limit(conv: nn.Conv2d, patch_size: tuple[int, int]) -> str | None:
    """``conv`` does not cut an image into separate patches of ``patch_size``."""
    if conv.kernel_size != conv.stride or conv.kernel_size != patch_size:
        return f"its kernel {conv.kernel_size}, stride {conv.stride} and patch {patch_size} are not one size"
    if conv.padding not in ((0, 0), "valid") or conv.dilation != (1, 1) or conv.groups != 1:
        return f"its convolution has padding {conv.padding}, dilation {conv.dilation} and groups {conv.groups}"
    return None


def one_dim(norm: nn.Module) -> str | None:
    """``norm`` normalises over more than the last dim."""
    dims = len(norm.normalized_shape)
    return None if dims == 1 else f"it normalises over the last {dims} dims; the kernel over the last one"
