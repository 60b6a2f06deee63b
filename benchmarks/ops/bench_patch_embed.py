"""Patch embedding with position and prefix tokens: B images of I = 3 channels to N tokens of C channels.

One bench starts from normalised images, the other from a decoder's (uint8, channels last), which the op normalises.
"""

from __future__ import annotations

import torch

from benchmarks.ops import OpBench, by_mode, normal
from vitkernels import ops, reference

NORMALIZE = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # ImageNet's


def _side(case):
    return case.image // case.patch * case.patch  # pixels that fill no patch are dropped


def _inputs(case, dtype, device):
    C, P = case.channels, case.patch
    tensors = {
        "images": normal((case.batch, 3, _side(case), _side(case)), dtype, device).requires_grad_(False),
        "weight": normal((C, 3, P, P), dtype, device, (3 * P * P) ** -0.5),
        "bias": normal((C,), dtype, device, 0.1),
        "pos_embed": normal((1, case.tokens, C), dtype, device, 0.1),
    }
    if case.prefix:
        tensors["prefix_tokens"] = normal((1, case.prefix, C), dtype, device, 0.1)
    return tensors


def _uint8_inputs(case, dtype, device):
    # Channels last, as image decoders return them.
    pixels = torch.randint(256, (case.batch, _side(case), _side(case), 3), device=device, dtype=torch.uint8)
    return _inputs(case, dtype, device) | {"images": pixels.permute(0, 3, 1, 2)}


def flops(case, mode):
    """One product in forward; one in backward, for the weight: images need no gradient."""
    product = 2 * case.batch * (case.tokens - case.prefix) * case.channels * 3 * case.patch**2
    return by_mode(mode, product, product)


def bytes(case, mode, itemsize, image_itemsize=None):
    """Forward reads images, weight, position, writes tokens; backward reads dtokens, images, writes the gradients."""
    images = case.batch * 3 * _side(case) ** 2 * (image_itemsize or itemsize)
    parameters = case.channels * 3 * case.patch**2 + case.tokens * case.channels
    tokens = case.batch * case.tokens * case.channels
    return by_mode(mode, *(2 * [images + (parameters + tokens) * itemsize]))


BENCHES = (
    OpBench(
        "patch_embed",
        _inputs,
        lambda case, **tensors: ops.patch_embed(**tensors),
        lambda case, **tensors: reference.patch_embed(**tensors),
        flops,
        bytes,
    ),
    OpBench(
        "patch_embed_uint8",
        _uint8_inputs,
        lambda case, **tensors: ops.patch_embed(**tensors, normalize=NORMALIZE),
        lambda case, **tensors: reference.patch_embed(**tensors, normalize=NORMALIZE),
        flops,
        lambda case, mode, itemsize: bytes(case, mode, itemsize, 1),
    ),
)
