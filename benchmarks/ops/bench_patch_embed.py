"""Patch embedding with position and prefix tokens: B images of I = 3 channels to N tokens of C channels.

One bench starts from normalised images, the other from a decoder's (uint8, channels last), which the op normalises.
"""

from __future__ import annotations

import torch

from benchmarks.ops import Tensors, bench_of, by_mode


def _as_decoded(tensors: Tensors) -> Tensors:
    return tensors | {"images": tensors["images"].contiguous(memory_format=torch.channels_last)}


def _frozen(tensors: Tensors) -> Tensors:
    return tensors | {"images": tensors["images"].detach()}


def flops(case, mode):
    """One product in forward; one in backward, for the weight: images need no gradient."""
    product = 2 * case.batch * (case.tokens - case.prefix) * case.channels * 3 * case.patch**2
    return by_mode(mode, product, product)


def bytes(case, mode, itemsize, image_itemsize=None):
    """Forward reads images, weight, position, writes tokens; backward reads dtokens, images, writes the gradients."""
    images = case.batch * 3 * (case.image // case.patch * case.patch) ** 2 * (image_itemsize or itemsize)
    parameters = case.channels * 3 * case.patch**2 + case.tokens * case.channels
    tokens = case.batch * case.tokens * case.channels
    return by_mode(mode, *(2 * [images + (parameters + tokens) * itemsize]))


BENCHES = (
    bench_of("patch_embed", flops, bytes, change=_frozen),
    bench_of(
        "patch_embed_uint8", flops, lambda case, mode, itemsize: bytes(case, mode, itemsize, 1), change=_as_decoded
    ),
)
